"""Jobs whose linears round their inputs: every recipe end to end, static scales, resumption, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qexport.checkpoint import Reader, read_json
from qexport.container import read_shard_metadata
from qexport.errors import PlanError
from qexport.events import Event, LayerDone
from qexport.inputs.base import make_input
from qexport.load import load
from qexport.models import load_dense
from qexport.predict import predict
from qexport.quantize import quantize, read_tokens
from qexport.recipe import Change, Recipe, load_recipe, recipe_names, with_options, with_parts
from qexport.runtime.linear import QuantLinear
from qexport.runtime.packed import quantized
from qexport.verify import verify
from tests import tiny
from tests.packing import near
from tests.test_quantize import contents, plan_for, with_transforms_of
from tests.test_quantize import text as text  # a fixture

NEW = ("llm-int8", "smoothquant-w6a6", "smoothquant-w8a8", "zeroquant-w4w8a16", "zeroquant-w4w8a8", "zeroquant-w8a8")
RECIPES = (*NEW, "qrazor-w4a16", "qrazor-w4a4", "qrazor-w4a4kv4", "qrazor-w4a8")
IDS = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB


def recipe(name: str, *options: tuple[str, Any], **parts: str) -> Recipe:
    """A recipe with other parts and options; block methods work for a moment only."""
    own = with_parts(load_recipe(name), **parts)
    short = [("lkd.steps", 8)] if own.block == "lkd" else []
    return with_options(own, [*short, *options])


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_every_recipe_that_rounds_inputs_is_tested() -> None:
    assert {n for n in recipe_names() if load_recipe(n).input or load_recipe(n).block == "lkd"} <= set(RECIPES)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_verifies_and_loads_as_predicted(name: str, model: str, tmp_path: Path, text: Path) -> None:
    plan, source = plan_for(tiny.save(model, tmp_path / "model"), recipe(name), text)
    out = tmp_path / "out"
    outcome = quantize(plan, source, out)
    assert verify(out)["modules"] == len(plan.modules)
    reader = Reader(out)
    assert sum(reader.meta(n).nbytes for n in reader.names) == predict(plan, flops_per_second=1e10).nbytes
    assert outcome.bits_per_weight == pytest.approx(predict(plan, flops_per_second=1e10).bits_per_weight)
    for file in reader.files:
        for spec, _, _ in read_shard_metadata(reader.metadata[file], file).values():
            assert (spec.input.quant is not None) == bool(load_recipe(name).input)
    packed = load(out, dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), logits(packed))
    same = torch.equal if load_recipe(name).input else near  # products of integers are the same to the bit
    assert same(logits(load(out, backend="reference", dtype=torch.float32)), logits(packed))
    wanted = logits(load_dense(source, dtype=torch.float32, device="cpu"))
    error = float((logits(packed) - wanted).norm() / wanted.norm())
    assert error < (0.05 if name in ("llm-int8", "smoothquant-w8a8", "zeroquant-w8a8") else 0.7)


@pytest.mark.parametrize("model", ["opt", "phi3", "gemma3"])
@pytest.mark.parametrize("name", ["token", "tensor", "sdr", "outliers"])
def test_other_models_take_every_quantizer(name: str, model: str, tmp_path: Path, text: Path) -> None:
    static = [("input.static", True)] if name == "outliers" else []
    own = recipe("rtn", ("format.bits", 8), ("format.group_size", 16), ("lm_head", 8), *static, input=name)
    if name == "outliers":
        own = with_options(own, [("input.threshold", 3.0)])
    plan, source = plan_for(tiny.save(model, tmp_path / "model"), own, text)
    quantize(plan, source, tmp_path / "out")
    verify(tmp_path / "out")
    packed = load(tmp_path / "out", dtype=torch.float32)
    linears = [m for m in quantized(packed).values() if isinstance(m, QuantLinear)]
    assert len(linears) == len(plan.modules)
    assert all(m.spec.input.quant is not None and m.spec.input.quant.name == name for m in linears)
    wanted = logits(load_dense(source, dtype=torch.float32, device="cpu"))
    assert (logits(packed) - wanted).norm() < 0.05 * wanted.norm()


def test_static_outliers_survive_being_saved_twice(tmp_path: Path, text: Path) -> None:
    options = [("input.static", True), ("input.threshold", 2.0)]
    plan, source = plan_for(tiny.save("llama", tmp_path / "model"), recipe("llm-int8", *options), text)
    quantize(plan, source, tmp_path / "a")
    stored = Reader(tmp_path / "a")
    columns = {n: stored.read(n) for n in stored.names if n.endswith("input_quant_columns")}
    assert len(columns) == len(plan.modules)
    assert len({c.numel() for c in columns.values()}) > 1
    wanted = logits(load(tmp_path / "a"))
    for before, after, opener in (("a", "b", load), ("b", "c", AutoModelForCausalLM.from_pretrained)):
        model: Any = opener(tmp_path / before)
        assert torch.equal(logits(model), wanted)
        model.save_pretrained(tmp_path / after)
        found = Reader(tmp_path / after)
        assert all(torch.equal(found.read(name), c) for name, c in columns.items())
        described = read_json(tmp_path / after / "config.json")["quantization_config"]["extents"]
        assert {n: e["input_outliers"] for n, e in described.items()} == {
            n.removesuffix(".input_quant_columns"): c.numel() for n, c in columns.items()
        }
    assert torch.equal(logits(load(tmp_path / "c")), wanted)


def test_static_scales_are_those_of_the_hidden_states_that_rounded_layers_leave(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = recipe("rtn", ("format.bits", 8), ("format.group_size", 16), ("input.bits", 4), input="tensor")
    plan, source = plan_for(model, own, text)
    quantize(plan, source, tmp_path / "out")
    name = "model.layers.1.mlp.gate_proj"
    scale = float(Reader(tmp_path / "out").read(f"{name}.input_quant_scale"))
    q, gate = _largest(load(tmp_path / "out", backend="reference"), tmp_path / "out")
    stored = float(Reader(tmp_path / "out").read("model.layers.1.self_attn.q_proj.input_quant_scale"))
    assert 7 * stored == pytest.approx(q, rel=1e-5)
    assert 7 * scale == pytest.approx(gate, rel=0.2)  # within a layer nothing is rounded yet
    q_unrounded, _ = _largest(load_dense(source, dtype=torch.float32, device="cpu"), tmp_path / "out")
    assert q_unrounded != pytest.approx(q, rel=1e-3)


def _largest(model: nn.Module, out: Path) -> tuple[float, float]:
    """Largest |x| at two linears of the second layer, over the calibration tokens."""
    found = {"self_attn.q_proj": 0.0, "mlp.gate_proj": 0.0}

    def watch(path: str) -> Any:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[path] = max(found[path], float(args[0].abs().max()))

        return look

    for path in found:
        model.get_submodule(f"model.layers.1.{path}").register_forward_pre_hook(watch(path))
    with torch.inference_mode():
        model(input_ids=read_tokens(out))
    return found["self_attn.q_proj"], found["mlp.gate_proj"]


def test_static_outliers_follow_the_order_of_the_stored_columns(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    options = [("input.static", True), ("input.threshold", 2.5), ("format.bits", 8), ("format.group_size", 16)]
    features: dict[str, set[int]] = {}
    for method, more in (("rtn", []), ("gptq", [("order", "act")])):
        own = recipe(method, *options, *more, input="outliers")
        plan, source = plan_for(model, own, text)
        quantize(plan, source, tmp_path / method)
        verify(tmp_path / method)
        reader, name = Reader(tmp_path / method), "model.layers.0.self_attn.q_proj"
        columns = reader.read(f"{name}.input_quant_columns").long()
        assert 0 < columns.numel() < 40
        order = reader.read(f"{name}.input_perm").long() if method == "gptq" else torch.arange(40)
        features[method] = set(order[columns].tolist())
        wanted = logits(load_dense(source, dtype=torch.float32, device="cpu"))
        assert (logits(load(tmp_path / method)) - wanted).norm() < 0.05 * wanted.norm()
    assert features["gptq"] == features["rtn"]


# ---- resuming ----


@pytest.mark.parametrize("name", ["zeroquant-w4w8a8", "smoothquant-w8a8", "qrazor-w4a4", "llm-int8"])
def test_interrupted_job_resumes_to_equal_bytes(name: str, tmp_path: Path, text: Path) -> None:
    options = {"smoothquant-w8a8": [("alpha", "auto")], "llm-int8": [("input.static", True)]}.get(name, [])
    model = tiny.save("llama", tmp_path / "model")

    class Killed(BaseException):
        pass

    def once(event: Event) -> None:
        if isinstance(event, LayerDone) and event.index == 0:
            raise Killed

    for out, observer in (("whole", None), ("cut", once), ("cut", None)):
        plan, source = plan_for(model, recipe(name, *options), text)
        if observer is None:
            outcome = quantize(plan, source, tmp_path / out)
        else:
            with pytest.raises(Killed):
                quantize(plan, source, tmp_path / out, observer=observer)
    assert outcome.resumed_layers == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# ---- what is refused ----


@pytest.mark.parametrize("model", tiny.MOE)
@pytest.mark.parametrize("name", ["token", "sdr"])
def test_stacks_of_experts_are_refused_with_the_way_out(name: str, model: str, tmp_path: Path, text: Path) -> None:
    folder = tiny.save(model, tmp_path / "model")
    own = recipe("rtn", ("format.bits", 8), ("format.group_size", 16), input=name)
    with pytest.raises(PlanError, match="experts of a stack are decoded one by one, and their inputs") as refusal:
        plan_for(folder, own, text)
    setting = str(refusal.value).partition("--set '")[2].partition("'")[0]
    pattern, _, value = setting.rpartition(":input=")
    assert (pattern, value) == ("*.experts.*", "none")
    plan, source = plan_for(folder, replace(own, changes=(Change(pattern, "input", value),)), text)
    quantize(plan, source, tmp_path / "out")
    verify(tmp_path / "out")
    rounds = {n for n, m in plan.modules.items() if m.spec.input.quant is not None}
    assert rounds == {n for n in plan.modules if ".experts." not in n}
    packed = load(tmp_path / "out")
    assert torch.isfinite(logits(packed)).all()


def test_other_inputs_for_some_modules(tmp_path: Path, text: Path) -> None:
    told = {"down_proj": ("input", "none"), "o_proj": ("input", "sdr"), "up_proj": ("input.bits", 6)}
    changes = tuple(Change(f"*.{name}", *change) for name, change in told.items())
    own = replace(recipe("rtn", ("format.group_size", 16), input="token"), changes=changes)
    plan, _ = plan_for(tiny.save("llama", tmp_path / "model"), own, text)
    found = {n.rpartition(".")[2]: m.spec.input.quant for n, m in plan.modules.items()}
    assert found["down_proj"] is None
    assert found["o_proj"] == make_input("sdr", {})
    assert found["up_proj"] == make_input("token", {"bits": 6})
    assert found["q_proj"] == make_input("token", {})
    assert plan.calibration is not None  # for the scales of sdr


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({"format": "spqr", "method": "spqr"}, [], "q_proj: format 'spqr' stores no integers"),
        ({"format": "vector", "method": "vptq"}, [], "stores no integers.*Formats with integers: sdr, uniform"),
        ({"format": "sdr"}, [("base_bits", 16)], "its integers have 16 bits; 8 can be multiplied"),
        ({"input": "sdr"}, [("format.group_size", 24)], "groups of 16 of the input don't line up with the weight's"),
    ],
)
def test_weights_that_are_no_integers_are_refused_by_name(
    parts: dict[str, str], options: list[tuple[str, Any]], message: str, tmp_path: Path, text: Path
) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = with_options(with_parts(load_recipe("rtn"), **{"input": "token", **parts}), options)
    with pytest.raises(PlanError, match=message):
        plan_for(model, own, text)


def test_a_rotated_input_can_only_be_rounded_by_what_is_found_when_it_runs(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    rotated = with_transforms_of("rtn", ["rotation"], group_size=16, bits=8)
    with pytest.raises(PlanError, match="calibrated feature by feature, and a rotation mixes features.*--input token"):
        plan_for(model, with_parts(rotated, input="tensor"), text)
    plan, source = plan_for(model, with_parts(rotated, input="token"), text)
    quantize(plan, source, tmp_path / "out")
    wanted = logits(load_dense(source, dtype=torch.float32, device="cpu"))
    assert (logits(load(tmp_path / "out")) - wanted).norm() < 0.05 * wanted.norm()


def test_a_plan_has_data_only_where_a_quantizer_asks_for_it(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for name, needs in (("zeroquant-w8a8", False), ("llm-int8", False), ("qrazor-w4a8", True), ("qrazor-w4a16", False)):
        assert plan_for(model, load_recipe(name), text)[0].needs_data is needs, name
    assert plan_for(model, recipe("llm-int8", ("static", True)), text)[0].needs_data
    a, b = (plan_for(model, recipe("rtn", input=i), text)[0].digest for i in ("token", "none"))
    assert a != b
    assert b == plan_for(model, load_recipe("rtn"), text)[0].digest
