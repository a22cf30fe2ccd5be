"""Packed linears that round their input: equal paths, rows that don't meet, tokens that are generated, and refusals."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexport.errors import BackendError
from qexport.formats.specs import InputSpec, LinearSpec, make_format
from qexport.inputs.base import InputQuant
from qexport.kernels import _integers
from qexport.runtime.dispatch import choose
from qexport.runtime.linear import QuantLinear
from tests.packing import pack_weight
from tests.rounding import QUANTS, sample

N, K = 33, 50
QUANTIZERS = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
BYTES = pytest.mark.skipif(_integers.obstacle() is not None, reason=str(_integers.obstacle()))
UNIFORM = make_format("uniform", {"bits": 4, "group_size": -1})
TREATED = {"scale": True, "hadamard": True, "permute": True}


def spec_for(quant: InputQuant, **steps: bool) -> LinearSpec:
    return LinearSpec(UNIFORM, InputSpec(**steps, quant=quant))


def make(spec: LinearSpec, *, bias: bool = True, **options: Any) -> tuple[QuantLinear, Tensor]:
    """A linear with contents on the CPU, and its decoded weight."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    found = pack_weight(w, spec)
    module = QuantLinear(spec, N, K, bias=bias, dtype=torch.float32, extents=found.extents, device="cpu", **options)
    own = {"bias": torch.linspace(-1, 1, N)} if bias else {}
    module.load_state_dict({**found.tensors, **own})
    return module, found.decoded


@BYTES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [{}, TREATED], ids=["plain", "treated"])
@QUANTIZERS
def test_both_paths_give_the_same_bits(quant: InputQuant, steps: dict[str, bool], dtype: torch.dtype) -> None:
    paths = {backend: make(spec_for(quant, **steps), backend=backend)[0].to(dtype) for backend in ("cpu", "reference")}
    assert [m.choice.path for m in paths.values()] == ["cpu", "reference"]
    for shape in ((1, K), (2, 7, K), (K,), (1, 1, K)):
        x = sample(14, K)[: max(1, shape[-2] if len(shape) == 2 else 14)].flatten()[: torch.Size(shape).numel()]
        x = x.reshape(shape).to(dtype)
        found = {name: module(x) for name, module in paths.items()}
        assert found["cpu"].dtype == dtype
        assert found["cpu"].shape == (*shape[:-1], N)
        assert torch.equal(found["cpu"], found["reference"])


@pytest.mark.parametrize("bias", [True, False])
@QUANTIZERS
def test_the_result_is_that_of_the_rounded_input_and_the_decoded_weight(quant: InputQuant, bias: bool) -> None:
    for steps in ({}, TREATED):
        module, decoded = make(spec_for(quant, **steps), bias=bias)
        x = sample(14, K).view(2, 7, K)
        rounded = module.spec.input.rounded(x, module.packed)
        wanted = rounded.double() @ decoded.double().T + (0 if module.bias is None else module.bias.double())
        torch.testing.assert_close(module(x).double(), wanted, atol=1e-4, rtol=1e-4)
        assert not torch.equal(rounded, x)


@QUANTIZERS
def test_what_stands_for_a_conv1d_gives_the_same(quant: InputQuant) -> None:
    x = sample(14, K).view(2, 7, K)
    plain, conv = make(spec_for(quant))[0], make(spec_for(quant), transposed=True)[0]
    assert torch.equal(conv(x), plain(x))
    assert conv.weight.shape == (K, N)


@QUANTIZERS
def test_padding_on_the_left_changes_no_token_unless_outliers_are_found_in_a_call(quant: InputQuant) -> None:
    module, _ = make(spec_for(quant))
    x = sample(5, K).clamp(-1.9, 1.9).unsqueeze(0)
    padding = torch.full((1, 3, K), 0.5)
    padding[0, 1, 4] = 50.0
    alone, padded = module(x), module(torch.cat([padding, x], 1))[:, 3:]
    by_design = quant.name == "outliers" and not quant.calibrated
    assert torch.equal(alone, padded) is not by_design
    together = module(torch.cat([x, x.flip(2)]))[:1]
    assert torch.equal(alone, together)  # as long as the others have no outliers


@QUANTIZERS
def test_generated_tokens_meet_the_weight_as_floats_if_asked_for(quant: InputQuant) -> None:
    floats = replace(quant, decode_input="float")  # type: ignore[type-var]
    module, decoded = make(spec_for(floats))
    rounding, _ = make(spec_for(quant))
    dense = nn.Linear(K, N)
    dense.weight, dense.bias = nn.Parameter(decoded), module.bias
    x = sample(4, K)
    for one in (x[:1], x[0], x.view(4, 1, K)):
        wanted = dense(one)
        assert (module(one) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        assert (rounding(one) - wanted).abs().max() > 1e-4 * wanted.abs().max()
    for several in (x, x.view(2, 2, K), x.view(1, 4, K)):
        assert torch.equal(module(several), rounding(several))
        assert not torch.equal(module(several), dense(several))


@QUANTIZERS
def test_no_rows_and_the_meta_device_give_shapes(quant: InputQuant) -> None:
    module, _ = make(spec_for(quant))
    for shape in ((0, K), (2, 0, K), (0, 3, K)):
        assert module(torch.zeros(shape)).shape == (*shape[:-1], N)
    assert module(torch.zeros(2, 3, K, device="meta")).shape == (2, 3, N)
    empty = QuantLinear(spec_for(quant), N, K, extents={"input_outliers": 3})
    found = empty(torch.zeros(2, 3, K))
    assert found.shape == (2, 3, N)


@pytest.mark.parametrize("transposed", [False, True])
@QUANTIZERS
def test_gradients_reach_the_input_as_if_it_was_not_rounded(quant: InputQuant, transposed: bool) -> None:
    module, decoded = make(spec_for(quant), transposed=transposed)
    x = sample(4, K).requires_grad_()
    y = module(x)
    assert torch.equal(y.detach(), module(x.detach()))
    towards = torch.linspace(-1, 1, 4 * N).view(4, N)
    y.backward(towards)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, towards @ decoded)


def test_a_row_with_a_nan_is_nan_and_no_other() -> None:
    for name in ("token", "tensor", "sdr", "token with zero", "outliers"):
        module, _ = make(spec_for(QUANTS[name]))
        x = sample(4, K)
        x[2, 5] = torch.nan
        y = module(x)
        assert y[2].isnan().all(), name
        assert torch.isfinite(y[[0, 1, 3]]).all(), name


def test_new_contents_are_not_hidden_by_what_was_prepared() -> None:
    module, _ = make(spec_for(QUANTS["tensor"]))
    x = sample(4, K)
    old = module(x)
    other = pack_weight(torch.randn(N, K, generator=torch.Generator().manual_seed(5)), module.spec)
    module.load_state_dict({**other.tensors, "bias": module.bias.detach().clone()})  # type: ignore[union-attr]
    assert not torch.equal(module(x), old)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module._weights
    module.forget()
    assert not module._weights


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@QUANTIZERS
def test_casting_a_model_leaves_stored_tensors_alone(quant: InputQuant, cast: str) -> None:
    module, _ = make(spec_for(quant, **TREATED))
    before = {name: tensor.clone() for name, tensor in module.packed.items()}
    getattr(nn.Sequential(module), cast)()
    assert all(torch.equal(module.packed[name], tensor) for name, tensor in before.items())
    assert all(module.packed[name].dtype == tensor.dtype for name, tensor in before.items())


# ---- the choice of a path ----


TOKEN = spec_for(QUANTS["token"])


def test_auto_multiplies_bytes_on_a_cpu_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_integers, "obstacle", lambda: None)
    for backend in ("auto", "cpu"):
        found = choose(TOKEN, N, K, "cpu", backend)
        assert (found.path, found.reason) == ("cpu", "products of 8-bit integers on the CPU")


def test_a_cpu_that_can_not_multiplies_floats_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_integers, "obstacle", lambda: "no bytes here")
    found = choose(TOKEN, N, K, "cpu")
    assert found.path == "reference"
    assert found.reason == "integers are multiplied as floats that hold them exactly: no bytes here"
    with pytest.raises(BackendError, match="backend 'cpu' can't run here: no bytes here. Use backend='auto' or 'refer"):
        choose(TOKEN, N, K, "cpu", "cpu")


def test_reference_is_taken_when_asked_for() -> None:
    found = choose(TOKEN, N, K, "cpu", "reference")
    assert found.path == "reference"
    assert "backend 'reference' was asked for" in found.reason


def test_backends_that_can_not_run_are_refused() -> None:
    with pytest.raises(BackendError, match="backend 'triton' can't run here: the weights are on the CPU"):
        choose(TOKEN, N, K, "cpu", "triton")
    for device in ("cuda", "mps"):
        with pytest.raises(BackendError, match=f"backend 'cpu' can't run here: the weights are on a '{device}' device"):
            choose(TOKEN, N, K, device, "cpu")
    with pytest.raises(BackendError, match="there are auto, triton, cpu, reference"):
        choose(TOKEN, N, K, "cpu", "fast")
    module, _ = make(TOKEN, backend="triton")
    with pytest.raises(BackendError, match="backend 'triton' can't run here"):
        module(sample(3, K))
