"""Fixtures of the kernel tests."""

import os
from pathlib import Path

import pytest

from tests.kernels.worker import Worker

# Compiled kernels are kept in the build folder, not in the home directory; read by Triton whenever it compiles.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "triton"))


@pytest.fixture(scope="session")
def worker():
    """A process that runs kernels under Triton's interpreter."""
    made = Worker()
    yield made
    made.close()
