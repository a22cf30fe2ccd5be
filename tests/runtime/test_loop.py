"""Loops: the tokens of `generate`, compiled or not, and each loop the graph of its own model."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qexport
from qexport.errors import UsageError
from qexport.runtime import loop as loops
from qexport.runtime.linear import QuantLinear
from qexport.runtime.loop import Loop, fastest_loop
from tests import packing, tiny

PROMPT = torch.tensor([[0, 45, 100, 7, 201]])
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which inductor needs")


def load(name: str, folder: Path) -> Any:
    """A packed tiny model."""
    packing.pack_model(AutoModelForCausalLM.from_pretrained(tiny.save(name, folder / "dense")), folder / "packed")
    return qexport.load(folder / "packed")


def wanted(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """What `generate` adds, greedily."""
    found = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return found[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _afresh() -> Any:
    yield
    torch._dynamo.reset()


def test_an_eager_loop_writes_what_generate_writes(llama: Any) -> None:
    loop = Loop.of(llama, 40, compiled=False)
    assert loop.path == "eager: asked for"
    for ids in (PROMPT, PROMPT[:, :2]):
        assert torch.equal(loop.generate(ids, 12), wanted(llama, ids, 12))
    first = int(wanted(llama, PROMPT, 1))
    assert loop.generate(PROMPT, 12, stop=[first]).tolist() == [[first]]


@COMPILER
def test_a_compiled_loop_writes_what_generate_writes_by_the_kernels(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop.of(llama, 60)
    assert loop.path == "compiled (inductor)"
    assert loop.length == 64
    calls: list[int] = []
    alone, together = QuantLinear.multiplied, QuantLinear.multiplied_with

    def several(self: QuantLinear, numbers: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        before = len(calls)
        found = together(self, numbers, x)
        calls[before:] = [len(numbers)]
        return found

    monkeypatch.setattr(QuantLinear, "multiplied", lambda self, x: calls.append(1) or alone(self, x))
    monkeypatch.setattr(QuantLinear, "multiplied_with", several)
    for ids in (PROMPT, PROMPT[:, :2]):
        assert torch.equal(loop.generate(ids, 20), wanted(llama, ids, 20))
    linears = [m for m in llama.modules() if isinstance(m, QuantLinear) and m.choice.path == "cpu"]
    assert sum(calls) == 2 * 19 * len(linears)
    layers = llama.config.num_hidden_layers
    assert calls.count(3) == calls.count(2) == 2 * 19 * layers


@COMPILER
def test_each_loop_has_the_graph_of_its_model_and_length(llama: Any, tmp_path: Path) -> None:
    other = load("llama", tmp_path)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    pairs = [(m, Loop.of(m, length, batch=2)) for m, length in ((llama, 40), (other, 40), (llama, 100))]
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    for model, loop in pairs:
        assert loop.path == "compiled (inductor)"
        assert torch.equal(loop.generate(ids, 9), wanted(model, ids, 9))
    assert not torch.equal(wanted(llama, ids, 9), wanted(other, ids, 9))


@COMPILER
def test_a_conv1d_model_with_learned_positions_is_compiled_too(tmp_path: Path) -> None:
    model = load("gpt2", tmp_path)
    loop = Loop.of(model, 40)
    assert loop.path == "compiled (inductor)"
    assert torch.equal(loop.generate(PROMPT, 12), wanted(model, PROMPT, 12))


@COMPILER
def test_the_faster_loop_says_both_times(llama: Any) -> None:
    found = fastest_loop(llama, 40)
    assert "ms a token compiled" in found.path
    assert torch.equal(found.generate(PROMPT, 9), wanted(llama, PROMPT, 9))


@COMPILER
def test_eager_calls_are_taken_where_they_are_faster(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.cycle([0.0, 2.0, 0.0, 1.0])  # start and end of a compiled step, then of an eager one
    monkeypatch.setattr(loops, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert fastest_loop(llama, 40).path == "eager: 2000.0 ms a token compiled, 1000.0 eager"


def test_a_model_with_windows_stays_eager(tmp_path: Path) -> None:
    windows = load("gemma3", tmp_path)
    loop = Loop.of(windows, 40)
    assert loop.path.startswith("eager: not all layers attend to all tokens")
    assert torch.equal(loop.generate(PROMPT, 30), wanted(windows, PROMPT, 30))


def test_what_can_not_be_compiled_says_why(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: refuse)
    loop = Loop.of(llama, 40)
    assert loop.path == "eager: can't be compiled (no compiler)"
    assert torch.equal(loop.generate(PROMPT, 9), wanted(llama, PROMPT, 9))
    assert fastest_loop(llama, 40).path == loop.path


@COMPILER
def test_a_step_that_does_more_than_its_graph_stays_eager(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_step_of", lambda _model, _cache: lambda ids: (ids + 1, ids + 2))
    loop = Loop.of(llama, 40)
    assert loop.path == "eager: a step does more than its graph"
    assert torch.equal(loop.generate(PROMPT, 9), wanted(llama, PROMPT, 9))


def test_more_tokens_than_the_cache_holds_are_refused(llama: Any) -> None:
    loop = Loop.of(llama, 6, compiled=False)
    loop.prefill(PROMPT)
    loop.step(PROMPT[:, :1])
    with pytest.raises(UsageError, match="holds 6 tokens: 6 are in it, and 1 more were given"):
        loop.step(PROMPT[:, :1])
    loop.reset()
    assert loop.prefill(PROMPT).shape == (1, tiny.VOCAB)


# ---- going back --------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILER)])
def test_after_going_back_a_loop_writes_as_if_it_had_never_gone_on(llama: Any, compiled: bool) -> None:
    loop = Loop.of(llama, 60, compiled=compiled)
    assert loop.path.startswith("compiled") == compiled
    fresh = loop.generate(PROMPT, 9)
    loop.generate(torch.cat([PROMPT, PROMPT.flip(1)], 1), 9)
    assert loop.rewind(4) == loop.used == 4
    found = [loop.prefill(PROMPT[:, 4:]).argmax(-1, keepdim=True)]
    while len(found) < 9:
        found.append(loop.step(found[-1]).argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(found, 1), fresh)
    assert loop.rewind(loop.used) == PROMPT.shape[1] + 8
    assert loop.rewind(0) == loop.used == 0
    assert torch.equal(loop.prefill(PROMPT).argmax(-1), fresh[:, 0])


def test_a_loop_that_cannot_go_back_forgets_all(tmp_path: Path) -> None:
    windows = load("gemma3", tmp_path)
    loop = Loop.of(windows, 60, compiled=False)
    loop.generate(PROMPT, 30)  # more than the windows' 16
    assert loop.rewind(20) == loop.used == 0
    assert torch.equal(loop.generate(PROMPT, 5), wanted(windows, PROMPT, 5))
