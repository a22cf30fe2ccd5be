"""Plans: what they refuse, what they predict, and when two of them are one job."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qexport.calibration import Calibration
from qexport.checkpoint import Reader
from qexport.errors import CalibrationError, PlanError, UsageError
from qexport.models import anatomy, open_source
from qexport.plan import Plan, fingerprint, make_plan
from qexport.predict import predict
from qexport.quantize import quantize
from qexport.recipe import Change, Recipe, load_recipe, with_options, with_parts
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, tied."""
    return tiny.save("llama", tmp_path_factory.mktemp("plan") / "model", tied=True)


def planned(model: Path, recipe: Recipe, **options: Any) -> Plan:
    """The plan of a recipe for a model."""
    source = open_source(str(model))
    return make_plan(source, anatomy(source), recipe, calibration=Calibration("self", 4, 16), **options)


def test_refusal_names_the_module_the_reason_and_what_would_work(model: Path) -> None:
    with pytest.raises(PlanError) as caught:
        planned(model, with_parts(load_recipe("spqr"), format="uniform"))
    first, second = str(caught.value).splitlines()
    assert first.startswith('model.layers.0.self_attn.q_proj: method "spqr" cannot use format "uniform": it keeps')
    assert second == '  Formats it can use: spqr. Did you mean method "gptq"?'


def test_nothing_left_to_quantize_is_an_error(model: Path) -> None:
    with pytest.raises(PlanError, match="nothing is left to quantize"):
        planned(model, replace(load_recipe("rtn"), ignore=("*",)))


def test_pattern_without_a_match_is_a_usage_error(model: Path) -> None:
    with pytest.raises(UsageError, match="matches no linear"):
        planned(model, replace(load_recipe("rtn"), changes=(Change("*.dwn_proj", "bits", 8),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("lm_head", "bits", 6), "lm_head stays dense; --lm-head BITS quantizes it too"),
        (Change("*.down_proj", "lm_head", True), "is an option of the whole recipe"),
    ],
)
def test_a_change_that_would_do_nothing_is_a_usage_error(model: Path, change: Change, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(model, replace(load_recipe("rtn"), changes=(change,)))


@pytest.mark.parametrize(("samples", "seqlen"), [(4, 512)])
def test_sequences_longer_than_the_context_are_refused(model: Path, samples: int, seqlen: int) -> None:
    source = open_source(str(model))
    calibration = Calibration("builtin", samples, seqlen)
    with pytest.raises(CalibrationError, match="longer than the model's context, 128"):
        make_plan(source, anatomy(source), load_recipe("gptq"), calibration=calibration)
    assert make_plan(source, anatomy(source), load_recipe("rtn"), calibration=calibration).calibration is None


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
@pytest.mark.parametrize("lm_head", [True, False])
def test_predicted_bytes_are_the_stored_ones(model: Path, recipe: str, lm_head: bool, tmp_path: Path) -> None:
    plan = planned(model, with_options(load_recipe(recipe), [("group_size", 16), ("lm_head", lm_head)]))
    outcome = quantize(plan, open_source(str(model)), tmp_path / "out")
    found = predict(plan, flops_per_second=1e10)
    reader = Reader(tmp_path / "out")
    assert sum(reader.meta(name).nbytes for name in reader.names) == found.nbytes
    assert outcome.bits_per_weight == pytest.approx(found.bits_per_weight)


def test_plan_without_calibrating_methods_has_no_calibration(model: Path) -> None:
    assert planned(model, load_recipe("rtn")).calibration is None
    assert planned(model, load_recipe("gptq")).calibration is not None


def test_digest_changes_with_all_that_changes_the_output_and_nothing_else(model: Path, tmp_path: Path) -> None:
    base = planned(model, load_recipe("gptq")).digest
    assert planned(model, load_recipe("gptq")).digest == base
    assert planned(model, load_recipe("gptq"), seed=1).digest != base
    assert planned(model, with_options(load_recipe("gptq"), [("damp", 0.02)])).digest != base
    assert planned(model, replace(load_recipe("gptq"), summary="other words")).digest == base
    other = tiny.save("llama", tmp_path / "model", tied=True)
    weights = tiny.make("llama", tied=True, seed=5)
    weights.save_pretrained(other)
    assert planned(other, load_recipe("gptq")).digest != base


def test_fingerprint_does_not_depend_on_where_the_model_lies(model: Path, tmp_path: Path) -> None:
    copy = tiny.save("llama", tmp_path / "elsewhere", tied=True)
    assert fingerprint(open_source(str(copy))) == fingerprint(open_source(str(model)))


def test_permuting_methods_store_a_permutation(model: Path) -> None:
    for name, permutes in (("rtn", False), ("gptq", False), ("spqr", True)):
        modules = planned(model, load_recipe(name)).modules.values()
        assert {m.spec.input.permute for m in modules} == {permutes}
        assert {m.spec.input.layout(8).keys() == {"input_perm"} for m in modules} == {permutes}


def test_memory_grows_with_the_calibration_set(model: Path) -> None:
    plan = planned(model, load_recipe("gptq"))
    small, large = (
        predict(replace(plan, calibration=Calibration("builtin", n, 128)), flops_per_second=1e10) for n in (8, 8000)
    )
    assert large.peak_rss_bytes - small.peak_rss_bytes >= 4 * 7992 * 128 * 40
