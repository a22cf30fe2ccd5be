"""Fixtures of the kernel tests."""

import os
from pathlib import Path

import pytest
import torch

from tests.kernels.worker import Worker

# Compiled kernels are kept in the build folder, not in the home directory; read by Triton whenever it compiles.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "triton"))


@pytest.fixture(scope="session")
def interpreter():
    """A process that runs kernels under Triton's interpreter."""
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="session")
def worker(request):
    """A process that runs kernels on the GPU, or where there is none the interpreter."""
    if not torch.cuda.is_available():
        yield request.getfixturevalue("interpreter")
        return
    made = Worker("cuda")
    yield made
    made.close()
