"""The original's logits on disk: the same figures, bounded, and never a wrong one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.evaluate.fidelity import compare
from qexport.evaluate.original import Original, Store
from qexport.evaluate.windows import Windows, cut
from tests import tiny


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny.make("llama")


@pytest.fixture(scope="module")
def model() -> Any:
    changed = tiny.make("llama")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.1)
    return changed


def windows(seed: int = 0) -> Windows:
    tokens = torch.randint(2, tiny.VOCAB, (200,), generator=torch.Generator().manual_seed(seed))
    return cut("t", tokens, seqlen=32, stride=24)


def never() -> Any:
    pytest.fail("the original was loaded")


def test_kept_logits_give_equal_figures_and_nothing_is_loaded(model: Any, original: Any, tmp_path: Path) -> None:
    key = {"weights": "a"}
    (live,) = compare(model, Original(lambda: original), [windows()])
    (first,) = compare(model, Original(lambda: original, Store(tmp_path, key)), [windows()], batch=3)
    (kept,) = compare(model, Original(never, Store(tmp_path, key)), [windows()])
    assert torch.equal(kept.kl, first.kl)
    assert torch.equal(kept.original_loss, first.original_loss)
    assert torch.allclose(kept.kl, live.kl, atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "text", "scored"])
def test_logits_of_anything_else_are_not_taken(change: str, original: Any, tmp_path: Path) -> None:
    own, loads = windows(), []

    def load() -> Any:
        loads.append(1)
        return original

    span = range(2)
    Original(load, Store(tmp_path, {"weights": "a"})).logits(own, span)
    key = {"weights": "b" if change == "weights" else "a"}
    text = windows(1) if change == "text" else own
    if change == "scored":
        text = Windows("t", own.ids, (5, *own.scored[1:]), own.seqlen, own.stride, own.bos)
    found = Original(load, Store(tmp_path, key)).logits(text, span)
    assert len(loads) == 2
    assert [len(x) for x in found] == list(text.scored[:2])


def test_damaged_files_are_made_again(original: Any, tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    expected = Original(lambda: original, store).logits(windows(), range(1))
    (path,) = store.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    found = Original(lambda: original, store).logits(windows(), range(1))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(Original(never, store).logits(windows(), range(1))[0], expected[0])


def test_space_is_bounded_and_others_that_were_used_least_lately_go_first(original: Any, tmp_path: Path) -> None:
    text, notes = windows(), []
    Original(lambda: original, Store(tmp_path, {"weights": "old"})).logits(text, range(2))
    one = max(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    for path in tmp_path.rglob("*.safetensors"):
        os.utime(path, (1, 1))
    Original(lambda: original, Store(tmp_path, {"weights": "mid"})).logits(text, range(1))
    store = Store(tmp_path, {"weights": "new"}, limit=3 * one, observer=notes.append)
    found = Original(lambda: original, store).logits(text, range(5))
    assert len(found) == 5
    assert len(list(store.folder.iterdir())) == 3
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert len(notes) == 1
    assert "from window 3 on, the original's logits are not kept" in notes[0].text


def test_a_disk_that_refuses_costs_no_figure(original: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes: list[Any] = []
    store = Store(tmp_path / "file", {}, observer=notes.append)
    assert len(Original(lambda: original, store).logits(windows(), range(3))) == 3
    assert len(notes) == 1
