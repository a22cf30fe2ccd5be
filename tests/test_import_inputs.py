"""Checkpoints of compressed-tensors that round inputs, taken over as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexport import load
from qexport.checkpoint import Reader, dump_json, read_json
from qexport.errors import LayoutError, PlanError
from qexport.export import adopt, export
from qexport.export.base import Packed
from qexport.inputs.tensor import PerTensor
from qexport.inputs.token import Token
from qexport.recipe import Change
from qexport.verify import verify
from tests import tiny
from tests.test_export import packed
from tests.test_export_inputs import CASES, EIGHT, UP
from tests.test_import import tensors

MIXED: dict[str, Any] = {"input": "token", "changes": [Change("*.down_proj", "input", "none")], **EIGHT}


@pytest.mark.parametrize("options", [*(options for options, _ in CASES), MIXED], ids=str)
def test_export_import_export_gives_equal_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    folder = packed(tmp_path, **options)
    export(folder, "compressed-tensors", tmp_path / "one", check=False)
    adopt(tmp_path / "one", tmp_path / "ours")
    export(tmp_path / "ours", "compressed-tensors", tmp_path / "two", check=False)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    configs = [read_json(tmp_path / side / "config.json")["quantization_config"] for side in ("one", "two")]
    assert configs[0] == configs[1]
    specs = [{m.name: m.spec for m in Packed(f).modules} for f in (folder, tmp_path / "ours")]
    assert specs[0] == specs[1]
    verify(tmp_path / "ours")
    ids = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
    with torch.inference_mode():
        logits = [
            load(f, backend="reference", dtype=torch.float32)(input_ids=ids).logits for f in (folder, tmp_path / "ours")
        ]
    assert torch.equal(*logits)


def changed(folder: Path, group: dict[str, Any], change: Any = None) -> Path:
    """An exported folder with a static scale and zero, its group and its tensors changed."""
    from safetensors.torch import save_file

    source = packed(folder, input="tensor", **{"input.symmetric": False}, **EIGHT)
    theirs = folder / "theirs"
    export(source, "compressed-tensors", theirs, check=False)
    config = read_json(theirs / "config.json")
    found = config["quantization_config"]["config_groups"]["group_0"]
    for key, value in group.items():
        found[key] = {**(found[key] or {}), **value} if isinstance(value, dict) else value
    (theirs / "config.json").write_text(dump_json(config))
    if change is not None:
        stored = tensors(theirs)
        change(stored)
        for path in theirs.glob("model*"):
            path.unlink()
        save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    return theirs


@pytest.mark.parametrize(
    ("activations", "found"),
    [
        ({"type": "float"}, "float8, tensor, dynamic False"),
        ({"num_bits": 3}, "int3, tensor, dynamic False"),
        ({"strategy": "group", "group_size": 8, "dynamic": True}, "int8, group, dynamic True"),
        ({"dynamic": True}, "int8, tensor, dynamic True"),
        ({"dynamic": "local"}, "int8, tensor, dynamic local"),
        ({"strategy": "token"}, "int8, token, dynamic False"),
    ],
    ids=str,
)
def test_inputs_that_have_no_counterpart_are_refused(activations: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"expected input_activations of 4 to 8 bits, by token .* found .*{found}"):
        adopt(changed(tmp_path, {"input_activations": activations}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_rounded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="it rounds what comes out of linears"):
        adopt(changed(tmp_path, {"output_activations": {"num_bits": 8}}), tmp_path / "out")


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ({}, lambda t: t.pop(f"{UP}.input_scale"), "input_scale: is missing"),
        ({}, lambda t: t.pop(f"{UP}.input_zero_point"), "input_zero_point: is missing"),
        ({}, lambda t: t.update({f"{UP}.input_scale": torch.ones(2)}), r"input_scale: expected .* \[1\], found"),
        ({}, lambda t: t.update({f"{UP}.input_scale": torch.zeros(1)}), "expected a finite scale above 0"),
        ({}, lambda t: t.update({f"{UP}.input_zero_point": torch.tensor([300.0])}), "input_zero_point: expected"),
        (
            {},
            lambda t: t.update({f"{UP}.input_zero_point": torch.tensor([300], dtype=torch.int32)}),
            "expected -128 to 127, found 300",
        ),
        ({"input_activations": {"symmetric": True}}, None, "input_zero_point: is there, and the config calls inputs"),
        (
            {"input_activations": {"strategy": "token", "dynamic": True}},
            None,
            "input_scale: is there, and the config has no stored scale",
        ),
        ({"input_activations": None}, None, "input_scale: is there, and the config has no stored scale"),
    ],
)
def test_scales_of_inputs_that_do_not_fit_the_config_are_refused(
    group: dict[str, Any], change: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LayoutError, match=message):
        adopt(changed(tmp_path, group, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_older_files_with_zeros_and_scalars_are_read(tmp_path: Path) -> None:
    def old(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            if name.endswith("input_scale"):
                stored[name] = stored[name].reshape(())
            if name.endswith("input_zero_point"):
                stored[name] = torch.zeros(1, dtype=torch.int8)

    adopt(changed(tmp_path, {"input_activations": {"symmetric": True}}, old), tmp_path / "out")
    assert {module.spec.input.quant for module in Packed(tmp_path / "out").modules} == {PerTensor()}
    one, two = Reader(tmp_path / "theirs"), Reader(tmp_path / "out")
    assert torch.equal(two.read(f"{UP}.input_quant_scale"), one.read(f"{UP}.input_scale").reshape(1))


def test_packed_weights_with_rounded_inputs_are_read(tmp_path: Path) -> None:
    export(packed(tmp_path, bits=4, symmetric=True), "compressed-tensors", tmp_path / "theirs", check=False)
    config = read_json(tmp_path / "theirs" / "config.json")
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}
    (tmp_path / "theirs" / "config.json").write_text(dump_json(config))
    adopt(tmp_path / "theirs", tmp_path / "out")
    assert {module.spec.input.quant for module in Packed(tmp_path / "out").modules} == {Token(symmetric=False)}
