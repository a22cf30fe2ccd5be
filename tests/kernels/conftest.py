"""Fixtures of the kernel tests."""

import pytest
from tests.kernels.worker import Worker


@pytest.fixture(scope="session")
def worker():
    """A process that runs kernels under Triton's interpreter."""
    made = Worker()
    yield made
    made.close()
