"""LKD: weights that are rounded to nearest move towards the layer's output, and never away from it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport.blocks import lkd
from qexport.blocks.lkd import Lkd
from qexport.checkpoint import Reader, read_json, sha256
from qexport.errors import PlanError, UsageError
from qexport.formats.base import rounded
from qexport.formats.specs import make_format
from qexport.formats.uniform import Uniform
from qexport.predict import predict
from qexport.quantize import quantize
from qexport.recipe import Change, Recipe, load_recipe, with_options, with_parts, with_transforms
from tests import tiny
from tests.test_quantize import contents, plan_for
from tests.test_quantize import text as text  # a fixture


def recipe(name: str = "zeroquant-w4w8a16", **options: Any) -> Recipe:
    return with_options(load_recipe(name), [(k.replace("__", "."), v) for k, v in options.items()])


def modules_of(out: Path) -> dict[str, Any]:
    return read_json(out / "qexport.json")["modules"]


# ---- one layer in a few lines ----


def problem(bits: int = 3) -> tuple[Any, Tensor, list[Tensor], list[Tensor]]:
    """A linear whose weight is rounded while it runs; correlated inputs, as hidden states are."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(12, 16, generator=rng)
    x = torch.randn(24, 8, 16, generator=rng) @ (torch.randn(16, 16, generator=rng) / 4) + 0.5
    fmt = Uniform(bits=bits, group_size=8)

    def run(numbers: Sequence[Tensor], part: Tensor) -> Tensor:
        own = numbers[0]
        with torch.no_grad():
            found = rounded(fmt, own.detach())
        return part @ (own + (found - own).detach()).T

    return run, w, [x], [x @ w.T]


@pytest.mark.parametrize("bits", [3, 4])
def test_training_through_the_rounding_lowers_the_loss_on_sequences_that_were_held_out(bits: int) -> None:
    run, w, x, y = problem(bits)
    outcome = Lkd(steps=64, rate=0.01).tune(run, [w], list, x, y, torch.Generator().manual_seed(0))
    assert outcome.after < 0.8 * outcome.before
    assert not torch.equal(outcome.numbers[0], w)
    again = Lkd(steps=64, rate=0.01).tune(run, [w], list, x, y, torch.Generator().manual_seed(0))
    assert torch.equal(again.numbers[0], outcome.numbers[0])


def test_weights_that_get_worse_are_left_as_they_were() -> None:
    run, w, x, _ = problem()
    start = [part.clone() for part in x]
    wanted = [run([w], part).detach() for part in x]  # nothing is better than what is there
    outcome = Lkd(steps=16, rate=0.3).tune(run, [w], list, x, wanted, torch.Generator())
    assert outcome.numbers[0] is w
    assert outcome.before == outcome.after == 0
    assert all(torch.equal(a, b) for a, b in zip(start, x, strict=True))


@pytest.mark.parametrize("best", [0.001, 0.003, 0.009])
def test_the_best_of_three_rates_is_taken(best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.ones(16, 2, 3)]
    asked: list[tuple[int, float, int]] = []

    def step(_run: Any, _numbers: Any, seen: Any, steps: int, rate: float, rng: torch.Generator) -> list[Tensor]:
        asked.append((steps, rate, int(torch.randint(1000, (1,), generator=rng))))
        assert len(seen) == 14  # two of sixteen sequences are held out
        return [torch.full((3,), 1.5 if rate != pytest.approx(best) else 1.1)]

    monkeypatch.setattr(lkd, "descend", step)
    outcome = Lkd(steps=20, rate=0.003).tune(
        lambda numbers, part: part * numbers[0], [torch.full((3,), 2.0)], list, x, x, torch.Generator()
    )
    assert [s for s, _, _ in asked] == [3, 3, 3, 20]
    assert [r for _, r, _ in asked] == pytest.approx([0.001, 0.003, 0.009, best])
    assert len({drawn for *_, drawn in asked[:3]}) == 1  # all trials see the same sequences
    assert torch.equal(outcome.numbers[0], torch.full((3,), 1.1))


# ---- in the job ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_no_layer_gets_worse_and_some_get_better(name: str, tmp_path: Path, text: Path) -> None:
    own = replace(recipe(bits=3, group_size=16, lkd__steps=32), changes=())
    plan, source = plan_for(tiny.save(name, tmp_path / "model"), own, text)
    quantize(plan, source, tmp_path / "out")
    modules = modules_of(tmp_path / "out").values()
    assert all(0 < m["layer_loss"] <= m["layer_loss_before"] for m in modules)
    assert any(m["layer_loss"] < 0.98 * m["layer_loss_before"] for m in modules)


def test_the_loss_of_rounded_inputs_is_what_is_lowered(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = with_parts(recipe(bits=4, group_size=16, lkd__steps=16), input="token")
    before = {}
    for bits in (4, 8):
        plan, source = plan_for(model, with_options(own, [("input.bits", bits)]), text)
        quantize(plan, source, tmp_path / str(bits))
        found = modules_of(tmp_path / str(bits)).values()
        assert all(m["layer_loss"] <= m["layer_loss_before"] for m in found)
        before[bits] = max(m["layer_loss_before"] for m in found)
    assert before[4] > 1.2 * before[8]


def test_lkd_follows_a_smoothing_and_a_rotation(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = with_transforms(recipe("zeroquant-w4w8a8", group_size=16, lkd__steps=8), ["smoothquant", "rotation"])
    for out in ("a", "b"):
        plan, source = plan_for(model, own, text)
        quantize(plan, source, tmp_path / out)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert all(m["layer_loss"] <= m["layer_loss_before"] for m in modules_of(tmp_path / "a").values())


def test_a_mixture_has_all_but_its_experts_distilled(tmp_path: Path, text: Path) -> None:
    plan, source = plan_for(tiny.save("mixtral", tmp_path / "model"), recipe(group_size=16, lkd__steps=4), text)
    quantize(plan, source, tmp_path / "out")
    distilled = {n for n, m in modules_of(tmp_path / "out").items() if "layer_loss" in m}
    assert distilled == {n for n in plan.modules if ".experts." not in n}


def test_without_lkd_the_bytes_are_those_of_plain_rounding(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    plain = with_options(with_parts(load_recipe("rtn"), input="token"), [("format.symmetric", True)])
    files = {}
    off = with_parts(recipe(lkd=False), input="token")
    for name, own in (("plain", plain), ("zeroquant", load_recipe("zeroquant-w8a8")), ("off", off)):
        options = [("format.bits", 8), ("group_size", 16)]
        plan, source = plan_for(model, with_options(own, options), text)
        assert not plan.needs_data
        quantize(plan, source, tmp_path / name)
        files[name] = {p.name: sha256(p) for p in (tmp_path / name).glob("model-*.safetensors")}
    assert files["plain"] == files["zeroquant"] == files["off"]


def test_lkd_changes_codes_and_no_more_than_packed_weights(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for name, on in (("on", True), ("off", False)):
        plan, source = plan_for(model, replace(recipe(bits=3, group_size=16, lkd=on, steps=16), changes=()), text)
        assert plan.needs_data is on
        quantize(plan, source, tmp_path / name)
    on, off = Reader(tmp_path / "on"), Reader(tmp_path / "off")
    assert on.names == off.names
    changed = {name.rpartition(".")[2] for name in on.names if not torch.equal(on.read(name), off.read(name))}
    assert "qweight" in changed
    assert changed <= {"qweight", "scales", "qzeros"}


# ---- plans ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("*.down_proj", "method", "gptq"), "and method 'gptq' does otherwise. Use --method rtn, or another"),
        (Change("*.down_proj", "clip", 20), "and method 'rtn' with a clip search does otherwise"),
    ],
)
def test_what_does_not_round_to_nearest_is_refused(change: Change, message: str, tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = replace(recipe(), changes=(change,))
    with pytest.raises(PlanError, match='layers.0.mlp.down_proj: block method "lkd": it rounds the weights that it tr'):
        plan_for(model, own, text)
    with pytest.raises(PlanError, match=message):
        plan_for(model, own, text)
    assert plan_for(model, replace(with_options(own, [("lkd", False)]), changes=(change,)), text)


def test_formats_of_vectors_are_refused() -> None:
    vector = make_format("vector", {})
    assert Lkd().reject("rtn", {}, vector) == "it rounds weights one by one, and this codes vectors"
    assert Lkd().reject("vptq", {}, vector) == (
        "it rounds the weights that it trains to nearest, and method 'vptq' does otherwise"
    )
    assert Lkd(lkd=False).reject("gptq", {}, vector) is None
    assert Lkd().reject("rtn", {"clip": 0}, Uniform()) is None


def test_a_plan_says_that_lkd_takes_time_and_data(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    on, off = (plan_for(model, recipe(lkd=flag), text)[0] for flag in (True, False))
    assert (on.needs_data, off.needs_data) == (True, False)
    assert Lkd(steps=96).passes == 96 + 3 * 12
    assert Lkd(lkd=False).passes == 0
    assert predict(on, flops_per_second=1e9).seconds > predict(off, flops_per_second=1e9).seconds
    assert on.digest != off.digest
    assert on.as_json()["block"] == {"name": "lkd", "lkd": True, "steps": 96, "rate": 0.003}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": -1}, {"rate": 0.0}, {"rate": 0.4}, {"steps": 10**6}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="lkd: "):
        Lkd(**wrong)
