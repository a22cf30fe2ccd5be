"""Rounding of inputs in specs: through JSON, out of untrusted JSON, and stored tensors that are damaged."""

import json
from typing import Any

import pytest
import torch

from qexport import schema
from qexport.errors import CheckpointError, LayoutError, UsageError
from qexport.formats.specs import InputSpec, LinearSpec, from_json, make_format, refuse_input, to_json
from qexport.inputs.base import InputQuant, as_json, make_input
from tests.packing import pack_weight
from tests.rounding import QUANTS

QUANTIZERS = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
UNIFORM = make_format("uniform", {"bits": 8, "group_size": 24})
WHOLE = make_format("uniform", {"bits": 4, "group_size": -1})
STATIC = LinearSpec(UNIFORM, InputSpec(quant=make_input("outliers", {"static": True})))
TENSOR = LinearSpec(UNIFORM, InputSpec(quant=make_input("tensor", {"bits": 5, "symmetric": False})))


@QUANTIZERS
def test_a_spec_survives_json(quant: InputQuant) -> None:
    for steps in (InputSpec(quant=quant), InputSpec(scale=True, hadamard=True, permute=True, quant=quant)):
        spec = LinearSpec(WHOLE, steps)
        found = from_json(json.loads(json.dumps(to_json(spec), allow_nan=False)), "config.json")
        assert found == spec
        assert hash(found) == hash(spec)
    assert as_json(quant)["name"] == quant.name
    assert quant.source
    assert quant.text


def test_a_spec_without_rounding_says_nothing_of_it() -> None:
    assert to_json(LinearSpec(UNIFORM, InputSpec(permute=True)))["input"] == {"permute": True}


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"name": "tokens"}, "unknown input quantizer 'tokens'; this qexport reads outliers, sdr, tensor, token"),
        ({"name": ["token"]}, "unknown input quantizer"),
        ({}, "unknown input quantizer 'None'"),
        ("token", "unknown input quantizer 'None'"),
        (["token"], "unknown input quantizer 'None'"),
        ({"name": "base"}, "unknown input quantizer 'base'"),
        ({"name": "token", "group_size": 8}, "'token' has no option 'group_size'; it has bits, decode_input, symm"),
        ({"name": "token", "bits": 3}, "bits must be a whole number from 4 to 8, got 3"),
        ({"name": "token", "bits": 9}, "bits must be"),
        ({"name": "token", "bits": "8"}, "bits must be"),
        ({"name": "token", "bits": 8.0}, "bits must be"),
        ({"name": "token", "bits": True}, "bits must be"),
        ({"name": "token", "bits": None}, "bits must be"),
        ({"name": "token", "symmetric": 1}, "symmetric must be true or false"),
        ({"name": "tensor", "symmetric": "yes"}, "symmetric must be true or false"),
        ({"name": "tensor", "decode_input": "int"}, "decode_input must be integer or float, got 'int'"),
        ({"name": "tensor", "decode_input": ["float"]}, "decode_input must be integer or float"),
        ({"name": "sdr", "bits": 1}, "bits must be a whole number from 2 to 8"),
        ({"name": "sdr", "group_size": 0}, "group_size must be a whole number from 1"),
        ({"name": "sdr", "group_size": -1}, "group_size must be a whole number from 1"),
        ({"name": "sdr", "group_size": 2**31}, "group_size must be a whole number from 1"),
        ({"name": "sdr", "group_size": 10}, "groups of 10 of the input don't line up with the weight's groups of 24"),
        ({"name": "sdr", "static": 0}, "static must be true or false"),
        ({"name": "outliers", "static": None}, "static must be true or false"),
        ({"name": "outliers", "threshold": 0}, "threshold must be a number above 0"),
        ({"name": "outliers", "threshold": -6.0}, "threshold must be"),
        ({"name": "outliers", "threshold": "6"}, "threshold must be"),
        ({"name": "outliers", "threshold": True}, "threshold must be"),
        ({"name": "outliers", "threshold": float("nan")}, "threshold must be"),
        ({"name": "outliers", "threshold": float("inf")}, "threshold must be"),
        ({"name": "outliers", "threshold": 10**400}, "threshold must be"),
    ],
)
def test_untrusted_json_is_a_stated_error(quant: Any, message: str) -> None:
    data = {**to_json(LinearSpec(UNIFORM)), "input": {"quant": quant}}
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        from_json(data, "config.json")


@pytest.mark.parametrize("steps", [{"quants": {"name": "token"}}, {"scale": {"name": "token"}}, {"scale": 1}])
def test_unknown_steps_of_the_input_are_a_stated_error(steps: Any) -> None:
    with pytest.raises(CheckpointError, match="unknown treatment of the input"):
        from_json({**to_json(LinearSpec(UNIFORM)), "input": steps}, "config.json")


@pytest.mark.parametrize(
    ("fmt", "options", "message"),
    [
        ("spqr", {}, "format 'spqr' stores no integers, so an input can't be multiplied by it as integers"),
        ("vector", {}, "format 'vector' stores no integers"),
        ("dense", {}, "format 'dense' stores no integers"),
        ("bcq", {}, "format 'bcq' stores no integers"),
        ("fp_asym", {}, "format 'fp_asym' stores no integers"),
        ("sdr", {"base_bits": 16}, "input 'token' with format 'sdr': its integers have 16 bits; 8 can be multiplied"),
    ],
)
def test_weights_that_are_no_bytes_are_refused(fmt: str, options: dict[str, Any], message: str) -> None:
    spec = LinearSpec(make_format(fmt, options), InputSpec(quant=make_input("token", {})))
    assert message in str(refuse_input(spec))
    with pytest.raises(CheckpointError, match=message):
        from_json(to_json(spec), "config.json")


@pytest.mark.parametrize(("own", "other", "fits"), [(16, -1, True), (16, 8, True), (8, 16, True), (16, 24, False)])
def test_groups_of_the_input_must_line_up_with_those_of_the_weight(own: int, other: int, fits: bool) -> None:
    quant = make_input("sdr", {"group_size": own})
    reason = quant.reject(make_format("uniform", {"group_size": other}))
    assert reason == (None if fits else f"groups of {own} of the input don't line up with the weight's groups of 24")


def test_wrong_options_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="there is no input 'tokn'; there are outliers, sdr, tensor, token. Did you"):
        make_input("tokn", {})
    with pytest.raises(UsageError, match="input 'token' has no option 'static'"):
        make_input("token", {"static": True})


def damaged(spec: LinearSpec, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Stored tensors of an [8, 48] weight with some exchanged, or gone."""
    found = dict(pack_weight(torch.randn(8, 48, generator=torch.Generator().manual_seed(0)), spec).tensors)
    spec.check(found, 8, 48, "m")
    return {name: t for name, t in {**found, **changes}.items() if t is not None}


def scale(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (TENSOR, {"input_quant_scale": scale(-1)}, r"m.input_quant_scale: expected a finite scale above 0, found \[-1"),
        (TENSOR, {"input_quant_scale": scale(0)}, "expected a finite scale above 0"),
        (TENSOR, {"input_quant_scale": scale(float("nan"))}, "expected a finite scale above 0"),
        (TENSOR, {"input_quant_scale": scale(float("inf"))}, "expected a finite scale above 0"),
        (TENSOR, {"input_quant_scale": scale(1, 1)}, r"expected float32 \[1\], found float32 \[2\]"),
        (TENSOR, {"input_quant_scale": scale(1).half()}, r"expected float32 \[1\], found float16 \[1\]"),
        (TENSOR, {"input_quant_scale": None}, "m.input_quant_scale: is missing; the format stores "),
        (TENSOR, {"input_quant_zero": ints(16)}, "m.input_quant_zero: expected -16 to 15, found 16"),
        (TENSOR, {"input_quant_zero": ints(-17)}, "m.input_quant_zero: expected -16 to 15, found -17"),
        (TENSOR, {"input_quant_zero": None}, "m.input_quant_zero: is missing"),
        (TENSOR, {"input_quant_columns": ints(3)}, "m.input_quant_columns: does not belong to this format"),
        (STATIC, {"input_quant_columns": ints(3, 2)}, "m.input_quant_columns: expected rising numbers from 0 to 47"),
        (STATIC, {"input_quant_columns": ints(3, 3)}, "expected rising numbers"),
        (STATIC, {"input_quant_columns": ints(-1, 3)}, "expected rising numbers"),
        (STATIC, {"input_quant_columns": ints(3, 48)}, "expected rising numbers"),
        (STATIC, {"input_quant_columns": ints(3).long()}, r"expected int32 \[1\], found int64 \[1\]"),
        (STATIC, {"input_quant_columns": None}, "m.input_quant_columns: is missing"),
    ],
)
def test_damaged_tensors_are_refused_by_name(spec: LinearSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        spec.check(damaged(spec, **changes), 8, 48, "m")


def test_static_outliers_may_be_none_or_all() -> None:
    for columns in (ints(), ints(*range(48))):
        found = STATIC.check(damaged(STATIC, input_quant_columns=columns), 8, 48, "m")
        assert found == {"input_outliers": columns.numel()}


def test_a_calibrated_quantizer_without_calibration_is_a_layout_error() -> None:
    with pytest.raises(LayoutError, match="input_quant_scale: this linear rounds its input by calibration, but"):
        InputSpec(quant=make_input("tensor", {})).pack({})


@QUANTIZERS
def test_stored_bytes_are_those_of_the_spec(quant: InputQuant) -> None:
    spec = LinearSpec(UNIFORM, InputSpec(scale=True, quant=quant))
    found = pack_weight(torch.randn(33, 50), spec)
    assert spec.nbytes(33, 50, found.extents) == sum(t.nbytes for t in found.tensors.values())
    assert all(len(f.shape) == len(f.axes) for f in spec.layout(33, 50).values())
    assert all(f"| `{name}` |" in schema.markdown_table(spec.layout(33, 50)) for name in found.tensors)


@QUANTIZERS
def test_what_the_rounded_input_does_to_the_weight_as_the_model_has_it_is_what_it_does_to_the_stored_one(
    quant: InputQuant,
) -> None:
    steps = InputSpec(scale=True, hadamard=True, permute=True, quant=quant)
    spec = LinearSpec(make_format("uniform", {"bits": 8, "group_size": 48}), steps)
    found = pack_weight(torch.randn(33, 48, generator=torch.Generator().manual_seed(0)), spec)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    rows = steps.prepared(x.reshape(-1, 48), found.tensors)
    stored = spec.weight.decode(spec.weight.unpack(found.tensors, 33, 48))
    wanted = quant.encode(rows, found.tensors).values(rows).double() @ stored.double().T
    y = steps.rounded(x, found.tensors)
    assert y.shape == x.shape
    torch.testing.assert_close(y.double().reshape(-1, 48) @ found.decoded.double().T, wanted, atol=2e-4, rtol=1e-4)
    assert steps.rounded(x.bfloat16(), found.tensors).dtype == torch.bfloat16


def test_the_gradient_passes_through_a_rounded_input() -> None:
    steps = InputSpec(quant=make_input("token", {"bits": 4}))
    x = torch.randn(3, 40, requires_grad=True)
    steps.rounded(x, {}).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * steps.rounded(x.detach(), {}))
