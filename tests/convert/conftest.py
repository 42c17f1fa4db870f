"""Fixtures of the tests of conversion."""

import pytest

import siglip_files


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """(Hugging Face's small vision model, {name: what it was saved in})."""
    return siglip_files.write(tmp_path_factory.mktemp("siglip"))
