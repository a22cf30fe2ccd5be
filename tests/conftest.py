"""Settings and fixtures for all tests."""

import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.forked import Forked


@pytest.fixture(autouse=True, scope="session")
def _poison() -> None:
    """Fill `torch.empty` with NaN and largest integers, so that whoever reads what was never written gets caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _forked() -> Iterator[Forked]:
    made = Forked()
    yield made
    made.close()


@pytest.fixture
def forked(_forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are proven in forks of one process; without it each proof starts one, and imports the library."""
    monkeypatch.setattr("qexport.export._proof.subprocess", SimpleNamespace(run=_forked.run))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep results and logits of a test out of the user's cache, and out of the next test's."""
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path_factory.getbasetemp() / "cache" / uuid.uuid4().hex))
