"""Trained parameters in use: loading, sampling, encoding and decoding."""
