"""Tuning: the numbers of any format move towards the output of the layer, stay storable, and never get worse."""

from pathlib import Path

import pytest
import torch

from qexport import plugins
from qexport.blocks.tune import Tune
from qexport.checkpoint import read_json
from qexport.errors import UsageError
from qexport.quantize import quantize
from qexport.recipe import load_recipe, with_options, with_parts, with_transforms
from tests import tiny
from tests.test_quantize import contents, plan_for
from tests.test_quantize import text as text  # a fixture

FORMATS = [name for name in plugins.names("formats") if name != "dense"]


def recipe(name: str, steps: int, *, rotated: bool = False):
    base = load_recipe({"bcq": "bcq", "spqr": "spqr", "vector": "vptq"}.get(name, "gptq"))
    found = with_transforms(with_parts(base, format=name), ["rotation"] if rotated else [])
    width = {"fp_asym": ("code", "nf3")}.get(name, ("bits", 3))
    return with_options(found, [("group_size", 16), width, ("tune.steps", steps)])


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_of_any_format_is_tuned_and_stays_a_valid_checkpoint(name: str, tmp_path: Path, text: Path) -> None:
    plan, source = plan_for(tiny.save("llama", tmp_path / "model"), recipe(name, 12), text)
    quantize(plan, source, tmp_path / "out")
    modules = read_json(tmp_path / "out" / "qexport.json")["modules"].values()
    if name == "sdr":  # stores one number a row for all groups: there is nothing to tune that it could store
        assert all("layer_loss" not in m for m in modules)
        return
    assert all(m["layer_loss"] <= m["layer_loss_before"] for m in modules)
    assert any(m["layer_loss"] < m["layer_loss_before"] for m in modules)


def test_a_tuned_job_is_the_same_twice(tmp_path: Path, text: Path) -> None:
    model = tiny.save("gemma3", tmp_path / "model")
    for out in ("a", "b"):
        plan, source = plan_for(model, recipe("uniform", 6, rotated=True), text)
        quantize(plan, source, tmp_path / out)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tuning_needs_data_even_after_a_method_that_does_not(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    plan, _ = plan_for(model, with_options(load_recipe("rtn"), [("tune.steps", 1)]), text)
    assert plan.needs_data
    assert plan.calibration is not None
    assert not plan_for(model, load_recipe("rtn"), text)[0].needs_data


def test_numbers_that_get_worse_are_left_as_they_were() -> None:
    x = [torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0))]
    outcome = Tune(steps=20).tune(
        lambda numbers, part: part * numbers[0], [torch.ones(3)], lambda numbers: [torch.full((3,), 9.0)], x, x,
        torch.Generator(),
    )  # fmt: skip
    assert torch.equal(outcome.numbers[0], torch.ones(3))
    assert outcome.before == outcome.after == 0


def test_a_wrong_scale_is_found() -> None:
    x = [torch.randn(16, 5, 3, generator=torch.Generator().manual_seed(0))]
    outcome = Tune(steps=200, rate=0.01).tune(
        lambda numbers, part: part * numbers[0], [torch.full((3,), 0.8)], list, x, x, torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(outcome.numbers[0], torch.ones(3), atol=0.02, rtol=0)
    assert outcome.after < 0.01 * outcome.before


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"rate": 0.0}, {"rate": 2.0}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="tune: "):
        Tune(**wrong)  # type: ignore[arg-type]
