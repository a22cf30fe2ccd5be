"""Exports of checkpoints that round the inputs of their linears: told as they are, or refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport import load
from qexport.checkpoint import Reader, read_json
from qexport.errors import CheckpointError, PlanError, UsageError
from qexport.events import Note
from qexport.export import _rounding, bitsandbytes, compressed_tensors, export
from qexport.export.base import Module, Packed
from qexport.recipe import Change
from qexport.schema import Tensors
from tests.test_export import packed, plan_for

pytestmark = pytest.mark.usefixtures("forked")
EIGHT: dict[str, Any] = {"format.bits": 8, "group_size": -1, "format.symmetric": True}
FOUR: dict[str, Any] = {"format.bits": 4, "format.symmetric": True}
UP = "model.layers.0.mlp.up_proj"
V = "model.layers.1.self_attn.v_proj"


def scheme_of(folder: Path, group: str = "group_0") -> Any:
    """A group of an exported config."""
    return read_json(folder / "config.json")["quantization_config"]["config_groups"][group]


# ---- compressed-tensors ------------------------------------------------------------------------

EXACT = 1e-3  # of what rounding changes: the library's step is ours
CASES: list[tuple[dict[str, Any], float]] = [
    ({"recipe": "smoothquant-w8a8", "group_size": -1}, 2),
    ({"recipe": "zeroquant-w8a8"}, 2),
    ({"input": "token", "input.symmetric": False, **EIGHT}, EXACT),
    ({"input": "tensor", **EIGHT}, EXACT),
    ({"input": "tensor", "input.symmetric": False, **EIGHT}, EXACT),
    ({"input": "token", **FOUR}, 2),
    ({"input": "tensor", "input.bits": 5, "input.symmetric": False, **FOUR, "format.symmetric": False}, EXACT),
]


@pytest.mark.parametrize(("options", "most"), CASES, ids=str)
def test_compressed_tensors_rounds_inputs_as_we_do(options: dict[str, Any], most: float, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    found = export(packed(tmp_path, **options), "vllm", tmp_path / "out")
    assert found["check"]["max_difference"] < 1e-5
    assert found["check"]["rounding"]["logits"] < most
    assert found["check"]["rounding"]["products"] < most
    assert "of what the rounding itself changes" in (tmp_path / "out" / "README.md").read_text()
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["format"] == scheme_of(tmp_path / "out")["format"] == "int-quantized"
    assert "dequantize" not in config


def test_the_config_says_how_inputs_are_rounded(tmp_path: Path) -> None:
    export(packed(tmp_path / "a", recipe="smoothquant-w8a8"), "vllm", tmp_path / "token", check=False)
    found = scheme_of(tmp_path / "token")["input_activations"]
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    assert {key: found[key] for key in wanted} == wanted
    folder = packed(tmp_path / "b", input="tensor", **{"input.symmetric": False}, **EIGHT)
    export(folder, "vllm", tmp_path / "tensor", check=False)
    found = scheme_of(tmp_path / "tensor")["input_activations"]
    wanted = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    assert {key: found[key] for key in wanted} == wanted
    ours, theirs = Reader(folder), Reader(tmp_path / "tensor")
    assert torch.equal(theirs.read(f"{UP}.input_scale"), ours.read(f"{UP}.input_quant_scale"))
    assert theirs.read(f"{UP}.input_zero_point").dtype == torch.int8
    assert theirs.read(f"{UP}.input_zero_point").tolist() == ours.read(f"{UP}.input_quant_zero").tolist()


def test_rounded_inputs_stand_beside_float_ones(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    changes = [Change("*.down_proj", "input", "none"), Change("*.down_proj", "group_size", 8)]
    folder = packed(tmp_path, input="token", changes=changes, **EIGHT)
    found = export(folder, "compressed-tensors", tmp_path / "out")
    assert found["check"]["rounding"]["logits"] < 2
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["format"] == "mixed-precision"
    kinds = {group["format"]: group["input_activations"] for group in config["config_groups"].values()}
    assert kinds["pack-quantized"] is None
    assert kinds["int-quantized"]["strategy"] == "token"


def test_zeros_of_float_inputs_do_not_stand_beside_rounded_ones(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    options = {**EIGHT, "format.symmetric": False}
    folder = packed(tmp_path, input="token", changes=[Change("*.o_proj", "input", "none")], **options)
    with pytest.raises(PlanError, match=r"o_proj and 1 more: it has zeros and an input that stays a float, others"):
        export(folder, "compressed-tensors", tmp_path / "out", check=False)
    found = export(folder, "compressed-tensors", tmp_path / "out", options={"form": "int-quantized"})
    assert found["check"]["rounding"]["logits"] < 2


def test_what_vllm_has_no_kernel_for_is_noted(tmp_path: Path) -> None:
    for name, options, count in (
        ("a", {"recipe": "zeroquant-w8a8"}, 1),
        ("b", {"input": "token", **EIGHT}, 0),
        ("c", {"input": "token", **FOUR}, 0),
        ("d", {"input": "tensor", **FOUR}, 1),
    ):
        notes: list[Any] = []
        export(packed(tmp_path / name, **options), "vllm", tmp_path / f"{name}-out", check=False, observer=notes.append)
        texts = [note.text for note in notes if isinstance(note, Note)]
        assert len(texts) == count
        assert all("and 13 more: transformers computes that, vLLM has no kernel for it" in text for text in texts)


# ---- faults ------------------------------------------------------------------------------------


def _double_scale(found: dict[str, Tensor]) -> None:
    found[f"{UP}.input_scale"] = found[f"{UP}.input_scale"] * 2


def _scale_of_another(found: dict[str, Tensor]) -> None:
    found[f"{UP}.input_scale"] = found[f"{UP}.input_scale"] * 1.1


def _zero_of_unsigned(found: dict[str, Tensor]) -> None:
    zero = found[f"{UP}.input_zero_point"].to(torch.int16)  # by 1 alone it would change nothing but the ends
    found[f"{UP}.input_zero_point"] = torch.where(zero > 0, zero - 128, zero + 127).to(torch.int8)


def _shifted_zero(found: dict[str, Tensor]) -> None:
    zero = found[f"{UP}.input_zero_point"]
    found[f"{UP}.input_zero_point"] = torch.where(zero > 0, zero - 4, zero + 4).to(torch.int8)


def _weight_scales(found: dict[str, Tensor]) -> None:
    found[f"{UP}.weight_scale"] = found[f"{UP}.weight_scale"].flip(0).contiguous()


def _one_code(found: dict[str, Tensor]) -> None:
    weight = found[f"{UP}.weight"].clone()
    weight[3] = weight[3].roll(1)
    found[f"{UP}.weight"] = weight


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_double_scale, f"{UP}: with rounded inputs they differ by .* more than the 0.25"),
        (_scale_of_another, f"{UP}: with rounded inputs they differ by .* more than the 0.25"),
        (_zero_of_unsigned, f"{UP}: with rounded inputs they differ by .* more than the 0.25"),
        (_shifted_zero, f"{UP}: with rounded inputs they differ by .* more than the 0.25"),
        (_weight_scales, "logits differ from ours by .* of the largest"),
        (_one_code, "logits differ from ours by .* of the largest"),
    ],
)
def test_a_wrong_conversion_fails_the_check_and_leaves_nothing(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = packed(tmp_path, input="tensor", **{"input.symmetric": False}, **EIGHT)
    right = compressed_tensors.bytewise

    def wrong(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
        found = dict(right(module, tensors))
        if module.name == UP:
            damage(found)
        return found

    monkeypatch.setattr(compressed_tensors, "bytewise", wrong)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        export(folder, "compressed-tensors", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"down_proj: rounding inputs changes 0.00 times as much there as here"),
        ({"num_bits": 4}, r"down_proj: with rounded inputs they differ by .* more than the 3 that"),
        ({"strategy": "tensor"}, r"with rounded inputs they differ by .* more than the 3 that"),
    ],
)
def test_a_library_that_rounds_inputs_in_another_way_fails_the_check(
    change: dict[str, Any] | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = packed(tmp_path, input="token", **EIGHT)
    right = compressed_tensors.quantization

    def wrong(checkpoint: Packed, forms: Mapping[str, str]) -> dict[str, Any]:
        config = right(checkpoint, forms)
        group = config["config_groups"]["group_0"]
        group["input_activations"] = None if change is None else {**group["input_activations"], **change}
        return config

    monkeypatch.setattr(compressed_tensors, "quantization", wrong)
    with pytest.raises(CheckpointError, match=message):
        export(folder, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_proof_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder = packed(tmp_path, input="token", **EIGHT)
    model = load(folder, backend="reference", dtype=torch.float32)
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with _rounding.unrounded(model):
            plain = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, before)
    assert 1e-4 < float((plain - before).abs().max()) < 1


# ---- bitsandbytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"recipe": "llm-int8", "group_size": -1}, 6.0),
        ({"recipe": "llm-int8", "group_size": -1, "threshold": 1.5}, 1.5),
        ({"input": "token", **EIGHT}, 0.0),
    ],
    ids=str,
)
def test_bitsandbytes_rounds_inputs_as_we_do(options: dict[str, Any], threshold: float, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = export(packed(tmp_path, **options), "bitsandbytes", tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["llm_int8_threshold"] == threshold
    assert found["check"]["max_difference"] < 1e-5
    assert found["check"]["weights"] < 1e-6
    assert found["check"]["rounding"]["logits"] < 2
    assert found["check"]["rounding"]["products"] < 1


def test_a_wrong_threshold_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    folder = packed(tmp_path, recipe="llm-int8", group_size=-1)
    right = bitsandbytes.quantization
    monkeypatch.setattr(bitsandbytes, "quantization", lambda p, threshold: right(p, 0.0))
    with pytest.raises(CheckpointError, match=r"with rounded inputs they differ by .* more than the 1 that"):
        export(folder, "bitsandbytes", tmp_path / "out")


# ---- refusals ----------------------------------------------------------------------------------

_FLOAT = "-s input.decode_input=integer"


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        ("compressed-tensors", {"recipe": "llm-int8", "group_size": -1},
         'and 13 more: input "outliers" has no counterpart there. Use --input token or tensor'),
        ("compressed-tensors", {"input": "token", "input.decode_input": "float", **EIGHT},
         f"stays a float while text is generated, and is always rounded there. Quantize again with {_FLOAT}"),
        ("bitsandbytes", {"input": "token", "input.decode_input": "float", **EIGHT}, f"Quantize again with {_FLOAT}"),
        ("bitsandbytes", {"input": "tensor", **EIGHT},
         "rounded to int8, one calibrated scale, and there to 8 bits .* --input none, token or outliers"),
        ("bitsandbytes", {"input": "token", "input.bits": 6, **EIGHT}, "its input is rounded to int6, a scale"),
        ("bitsandbytes", {"recipe": "llm-int8", "group_size": -1, "static": True}, "--input none, token or outliers"),
        ("bitsandbytes", {"input": "token", "changes": [Change("*.o_proj", "input", "none")], **EIGHT},
         "inputs of other linears are rounded in another way, and all have one threshold there"),
        ("gptq", {"input": "token", **EIGHT}, "and 13 more: its input is rounded to integers when it runs, which"),
        ("gguf", {"input": "token", **FOUR}, "Quantize again with --input none, or use --to compressed-tensors"),
        ("llama.cpp", {"recipe": "zeroquant-w8a8"}, "which cannot be said there. Quantize again with --input none"),
        ("dense", {"input": "token", **FOUR}, "which no dense model does. With -s inputs=float it stays a float there"),
    ],
)  # fmt: skip
def test_refusals_name_modules_reason_and_what_works(
    target: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = packed(tmp_path, **options)
    with pytest.raises(PlanError, match=reason) as refusal:
        export(folder, target, tmp_path / "out", check=False)
    assert "nothing was written" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_options_do_not_talk_a_target_into_rounded_inputs(tmp_path: Path) -> None:
    folder = packed(tmp_path, input="token", **EIGHT)
    with pytest.raises(PlanError, match="pack-quantized is for inputs that stay floats. Leave out -s form"):
        export(folder, "compressed-tensors", tmp_path / "out", check=False, options={"form": "pack-quantized"})
    with pytest.raises(PlanError, match="rounded with the threshold 0. Leave out -s threshold=6"):
        export(folder, "bitsandbytes", tmp_path / "out", check=False, options={"threshold": "6"})
    with pytest.raises(PlanError, match="its input is rounded to integers when it runs"):
        export(folder, "gguf", tmp_path / "out", check=False, options={"others": "F16"})
    with pytest.raises(UsageError, match="inputs 'int8': expected refuse or float"):
        export(folder, "dense", tmp_path / "out", options={"inputs": "int8"})
    assert not (tmp_path / "out").exists()


def test_a_dense_export_says_that_inputs_stay_floats(tmp_path: Path) -> None:
    folder = packed(tmp_path, input="token", **EIGHT)
    found = export(folder, "dense", tmp_path / "out", options={"inputs": "float"})
    assert found["check"]["max_difference"] < 1e-5
    assert "rounding" not in found["check"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**stay floats** here" in card
    assert "float-inputs" in card


def test_plan_says_what_an_export_will_say(tmp_path: Path) -> None:
    w8a8 = ("--method", "smoothquant-w8a8", "--seqlen", "64")
    assert plan_for(tmp_path / "a", "vllm", *w8a8) == {
        "for": "vllm", "to": "compressed-tensors", "refused": [], "notes": [],
    }  # fmt: skip
    found = plan_for(tmp_path / "b", "llama.cpp", *w8a8)
    assert "its input is rounded to integers when it runs, which cannot be said there" in found["refused"][0]
    found = plan_for(tmp_path / "c", "vllm", "--method", "zeroquant-w8a8", "--group-size", "8")
    assert found["refused"] == []
    assert "vLLM has no kernel for it" in found["notes"][0]
    found = plan_for(tmp_path / "d", "bitsandbytes", "--method", "llm-int8")
    assert json.dumps(found["refused"]) == "[]"
