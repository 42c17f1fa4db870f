"""What a program takes on a pod is told by XLA as it is there."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def as_on_a_pod(optimizing_compiler):
    pass
