"""Settings for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _poison() -> None:
    """Fill `torch.empty` with NaN and largest integers, so that whoever reads what was never written gets caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
