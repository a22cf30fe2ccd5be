"""The choice between kernel and reference, and the reason that is shown for it."""

from types import SimpleNamespace

import pytest

from qexport import plugins
from qexport.errors import BackendError
from qexport.runtime import dispatch
from qexport.runtime.dispatch import Choice, choose
from tests import packing


@pytest.mark.parametrize(("obstacle", "decoder", "path"), [
    (None, None, "cpu"), ("k is odd", None, "reference"), ("k is odd", object(), "cpu"),
])  # fmt: skip
def test_auto_asks_the_kernel_on_a_cpu_and_then_the_decoder(
    monkeypatch: pytest.MonkeyPatch, obstacle: str | None, decoder: object | None, path: str
) -> None:
    kernel = SimpleNamespace(supports=lambda fmt, n, k: obstacle)
    monkeypatch.setattr(dispatch, "cpu_kernel_of", lambda spec: kernel)
    monkeypatch.setattr(dispatch, "decoder_of", lambda name: decoder)
    found = choose(packing.UNIFORM, 8, 32, "cpu")
    assert found.path == path
    assert (obstacle or "the CPU's kernel of 'uniform'") in found.reason
    if path == "cpu":
        assert choose(packing.UNIFORM, 8, 32, "cpu", "cpu") == found
    else:
        with pytest.raises(BackendError, match="backend 'cpu' can't run here: k is odd"):
            choose(packing.UNIFORM, 8, 32, "cpu", "cpu")


def test_without_numba_the_reference_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(kind: str, name: str) -> None:
        raise ImportError

    monkeypatch.setattr(plugins, "get", missing)
    dispatch.decoder_of.cache_clear()
    try:
        found = choose(packing.UNIFORM, 8, 32, "cpu")
    finally:
        dispatch.decoder_of.cache_clear()
    assert found == Choice("reference", "numba is not installed; pip install 'qexport[cpu]'")


def test_reference_is_taken_when_asked_for() -> None:
    assert choose(packing.UNIFORM, 8, 32, "cuda", "reference") == Choice(
        "reference", "backend 'reference' was asked for"
    )


def test_triton_on_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        choose(packing.UNIFORM, 8, 32, "cpu", "triton")


def test_cpu_elsewhere_and_unknown_backends_are_refused() -> None:
    with pytest.raises(BackendError, match="the weights are on a 'cuda' device"):
        choose(packing.UNIFORM, 8, 32, "cuda", "cpu")
    with pytest.raises(BackendError, match="there are auto, triton, cpu, reference"):
        choose(packing.UNIFORM, 8, 32, "cpu", "cuda")


def test_dense_weights_need_no_kernel() -> None:
    assert choose(packing.DENSE, 8, 32, "cuda", "triton").path == "reference"


@pytest.mark.parametrize(("obstacle", "path"), [(None, "triton"), ("k is odd", "reference")])
def test_auto_asks_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch, obstacle: str | None, path: str) -> None:
    monkeypatch.setattr(plugins, "names", lambda kind: ("uniform",))
    monkeypatch.setattr(dispatch, "kernel_of", lambda spec: SimpleNamespace(supports=lambda fmt, n, k: obstacle))
    found = choose(packing.UNIFORM, 8, 32, "cuda")
    assert found.path == path
    assert (obstacle or "on cuda") in found.reason
    if obstacle:
        with pytest.raises(BackendError, match="k is odd"):
            choose(packing.UNIFORM, 8, 32, "cuda", "triton")


def test_a_format_without_a_kernel_and_a_foreign_device_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "names", lambda kind: ())
    assert "has no kernel" in choose(packing.UNIFORM, 8, 32, "cuda").reason
    assert "no kernel was written for 'mps'" in choose(packing.UNIFORM, 8, 32, "mps").reason
