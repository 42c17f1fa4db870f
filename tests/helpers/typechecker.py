"""Beartype as tests use it: an int is a float too, as for static type checkers."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
