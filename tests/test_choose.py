"""Options that are searched for the whole model: what is tried, what is taken, and a job that is killed in between."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport import report
from qexport.choose import CHOICE_FILE, as_json, candidates, described, total_errors
from qexport.errors import CheckpointError
from qexport.events import Advanced, Event, LayerDone, Note
from qexport.load import load
from qexport.models import skeleton
from qexport.plan import Plan
from qexport.predict import predict
from qexport.quantize import quantize, read_tokens
from qexport.recipe import Recipe, load_recipe, with_options, with_transforms
from qexport.transforms.smoothquant import SmoothQuant
from qexport.verify import verify
from tests import tiny
from tests.test_quantize import contents, plan_for
from tests.test_quantize import text as text  # a fixture

ALPHAS = [a / 100 for a in range(35, 95, 5)]


def recipe(alpha: float | str) -> Recipe:
    """Four bits, so that alphas differ in more than noise."""
    return with_options(load_recipe("smoothquant-w6a6"), [("alpha", alpha), ("format.bits", 4), ("input.bits", 4)])


def shards(out: Path) -> dict[str, str]:
    """Hashes of the files that hold weights."""
    return {name: digest for name, digest in contents(out).items() if name.endswith(".safetensors")}


def test_a_transform_without_variants_stands_for_itself() -> None:
    plain, searched = SmoothQuant(0.5), SmoothQuant("auto")
    assert candidates({"smoothquant": plain}) == [{"smoothquant": plain}]
    assert [way["smoothquant"].alpha for way in candidates({"smoothquant": searched})] == ALPHAS  # type: ignore[attr-defined]
    both = candidates({"a": searched, "b": searched})
    assert len(both) == len(ALPHAS) ** 2
    assert [list(way) for way in both] == [["a", "b"]] * len(both)
    assert as_json({"smoothquant": plain}) == [{"name": "smoothquant", "alpha": 0.5}]
    assert described({"smoothquant": plain}) == "smoothquant with alpha 0.5"
    assert candidates({}) == [{}]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_auto_gives_the_bytes_of_the_alpha_that_it_takes(name: str, tmp_path: Path, text: Path) -> None:
    model, notes = tiny.save(name, tmp_path / "model"), []
    plan, source = plan_for(model, recipe("auto"), text)
    quantize(plan, source, tmp_path / "auto", observer=notes.append)
    facts = json.loads((tmp_path / "auto" / CHOICE_FILE).read_text())
    assert [entry[0]["alpha"] for entry in facts["tried"]] == ALPHAS
    errors, taken = facts["errors"], facts["chosen"][0]["alpha"]
    assert taken == ALPHAS[errors.index(min(errors))]
    assert len(set(errors)) == len(errors)
    assert any(isinstance(n, Note) and f"smoothquant with alpha {taken}" in n.text for n in notes)
    plan, source = plan_for(model, recipe(taken), text)
    quantize(plan, source, tmp_path / "fixed")
    assert shards(tmp_path / "auto") == shards(tmp_path / "fixed")
    manifest = json.loads((tmp_path / "auto" / "qexport.json").read_text())
    assert manifest["plan"]["transforms"] == [{"name": "smoothquant", "alpha": "auto"}]
    assert manifest["chosen"] == facts["chosen"] == report.inspect(tmp_path / "auto", device="cpu")["chosen"]
    assert report.inspect(tmp_path / "fixed", device="cpu")["chosen"] == []
    assert "chosen" not in json.loads((tmp_path / "fixed" / "qexport.json").read_text())
    (tmp_path / "auto" / CHOICE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=CHOICE_FILE):
        verify(tmp_path / "auto")


def first_layer(plan: Plan) -> Plan:
    """The plan for a model of one layer."""
    return replace(plan, anatomy=replace(plan.anatomy, blocks=plan.anatomy.blocks[:1]))


def test_the_error_is_that_of_the_packed_layer(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    plan, source = plan_for(model, recipe("auto"), text)
    dense = tiny.make("llama")
    wanted = []
    for alpha in (0.35, 0.6, 0.9):
        fixed, _ = plan_for(model, recipe(alpha), text)
        quantize(fixed, source, tmp_path / str(alpha))
        ids = read_tokens(tmp_path / str(alpha))
        packed = load(tmp_path / str(alpha), dtype=torch.float32, backend="reference")
        own = [m.model(ids[::3], output_hidden_states=True).hidden_states for m in (dense, packed)]  # four of twelve
        added = (own[0][1] - own[0][0]).square().mean()
        wanted.append(((own[1][1] - own[0][1]).square().mean() / added).item())
    bones = skeleton(source, plan.anatomy, dtype=torch.float32, seqlen=32)
    with torch.no_grad():
        hidden = bones.embed(ids)
    events: list[Event] = []
    found = total_errors(first_layer(plan), source, bones, [hidden], torch.device("cpu"), events.append)
    assert [found[ALPHAS.index(a)] for a in (0.35, 0.6, 0.9)] == pytest.approx(
        wanted, rel=0.02
    )  # folds round otherwise
    assert [e.done for e in events if isinstance(e, Advanced)] == [1]


@pytest.mark.parametrize("stop", ["choosing", "packing"])
def test_a_killed_job_settles_once(stop: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save("llama", tmp_path / "model")

    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        chosen = isinstance(event, Advanced) and event.phase == "choose"
        if chosen if stop == "choosing" else isinstance(event, LayerDone):
            raise Killed

    plan, source = plan_for(model, recipe("auto"), text)
    quantize(plan, source, tmp_path / "whole")
    with pytest.raises(Killed):
        quantize(plan, source, tmp_path / "cut", observer=kill)
    assert (tmp_path / "cut" / CHOICE_FILE).exists() == (stop == "packing")
    asked: list[Any] = []
    monkeypatch.setattr(sys.modules["qexport.quantize"], "total_errors", lambda *a: asked.append(a) or total_errors(*a))
    quantize(plan, source, tmp_path / "cut")
    assert len(asked) == (stop == "choosing")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_search_for_the_model_goes_with_another_transform(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = with_options(recipe("auto"), [("format.group_size", 16)])
    plan, source = plan_for(model, with_transforms(own, ["rotation"]), text)
    quantize(plan, source, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / CHOICE_FILE).read_text())
    assert [entry["name"] for entry in facts["chosen"]] == ["smoothquant", "rotation"]
    assert verify(tmp_path / "out")["modules"] == len(plan.modules)


def test_the_search_is_predicted(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    took = {a: predict(plan_for(model, recipe(a), text)[0], flops_per_second=1e9) for a in (0.5, "auto")}
    assert took[0.5].seconds < took["auto"].seconds
    assert took[0.5].peak_rss_bytes <= took["auto"].peak_rss_bytes
