"""Packed modules: equal to dense ones bit for bit, and their stored tensors survive whatever a model goes through."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qexport.errors import BackendError, LayoutError
from qexport.formats.specs import LinearSpec
from qexport.runtime.experts import QuantStack
from qexport.runtime.linear import QuantLinear
from qexport.runtime.packed import Budget, quantized
from tests import packing

SPECS = {
    "uniform": packing.UNIFORM,
    "permuted": packing.PERMUTED,
    "scaled": packing.SCALED,
    "rotated": packing.ROTATED,
    "spqr": packing.SPQR,
    "vector": packing.VECTOR,
    "dense": packing.DENSE,
}


def make(
    spec: LinearSpec, n: int = 33, k: int = 50, *, bias: bool = True, **options: object
) -> tuple[QuantLinear, torch.Tensor]:
    """A linear with contents on the CPU, and its decoded weight."""
    found = packing.pack_weight(torch.randn(n, k), spec)
    module = QuantLinear(
        spec, n, k, bias=bias, dtype=torch.float32, extents=found.extents, device="cpu", backend="reference", **options
    )
    module.load_state_dict(dict(found.tensors) | ({"bias": torch.randn(n)} if bias else {}))
    return module, found.decoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_reference_equals_a_dense_linear_bit_for_bit(spec: LinearSpec, dtype: torch.dtype) -> None:
    module, decoded = make(spec)
    module.to(dtype)
    dense = nn.Linear(50, 33, dtype=dtype)
    dense.weight = nn.Parameter(decoded.to(dtype))
    dense.bias = module.bias
    for shape in [(1, 50), (2, 7, 50)]:
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(module(x), dense(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_equals_a_conv1d_bit_for_bit(dtype: torch.dtype) -> None:
    module, decoded = make(packing.UNIFORM, transposed=True)
    module.to(dtype)
    conv = Conv1D(33, 50)
    conv.weight = nn.Parameter(decoded.to(dtype).T.contiguous())
    conv.bias = module.bias
    x = torch.randn(2, 7, 50, dtype=dtype)
    assert torch.equal(module(x), conv(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_casting_a_model_leaves_stored_tensors_alone(spec: LinearSpec, cast: str) -> None:
    module, _ = make(spec)
    before = {name: tensor.clone() for name, tensor in module.packed.items()}
    model = nn.Sequential(module)
    getattr(model, cast)()
    model.to(torch.float16).to(torch.float32)
    assert all(torch.equal(module.packed[name], tensor) for name, tensor in before.items())
    assert all(module.packed[name].dtype == tensor.dtype for name, tensor in before.items())
    assert module.bias is not None
    assert module.bias.dtype == torch.float32


def test_the_state_dict_has_the_names_of_the_layout() -> None:
    module, _ = make(packing.SCALED)
    assert set(module.state_dict()) == {*packing.SCALED.layout(33, 50), "bias"}


def test_the_meta_device_gives_shapes_only() -> None:
    module = QuantLinear(packing.SPQR, 33, 50, bias=True, extents={"nnz": 10**12})
    y = module(torch.empty(2, 3, 50, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 33)


def test_moving_to_meta_and_copying_work() -> None:
    module, decoded = make(packing.SPQR)
    assert torch.equal(copy.deepcopy(module).decoded(), decoded)
    assert copy.deepcopy(module).to("meta").place.type == "meta"


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_that_models_reach_for_is_the_decoded_one(transposed: bool) -> None:
    module, decoded = make(packing.SPQR, transposed=transposed)
    names = set(module.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        want = decoded.T if transposed else decoded
        assert module.weight.dtype == dtype
        assert torch.equal(module.weight, want.to(dtype))
    assert set(module.state_dict()) == names
    assert "weight" not in {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
    assert torch.equal(copy.deepcopy(module).weight, module.weight)


def test_the_weight_has_a_shape_on_the_meta_device() -> None:
    weight = QuantLinear(packing.SPQR, 33, 50, extents={"nnz": 10**12}, dtype=torch.float16, transposed=True).weight
    assert (weight.device.type, weight.dtype, weight.shape) == ("meta", torch.float16, (50, 33))


def test_nothing_is_kept_without_a_budget() -> None:
    module, _ = make(packing.UNIFORM)
    module(torch.randn(1, 50))
    assert module._kept is None


def test_decoded_weights_are_kept_within_the_budget_of_the_model() -> None:
    size = 33 * 50 * 4
    budget = Budget(size + 10)
    a, decoded = make(packing.UNIFORM, budget=budget)
    b, _ = make(packing.UNIFORM, budget=budget)
    x = torch.randn(3, 50)
    want = a(x)
    b(x)
    assert a._kept is not None
    assert b._kept is None
    assert budget.left == 10
    assert torch.equal(a(x), want)
    a.to(torch.float16)
    assert a._kept is None
    assert budget.left == size + 10
    assert torch.equal(a.decoded(), decoded)


def test_new_contents_are_not_hidden_by_kept_ones() -> None:
    module, _ = make(packing.UNIFORM, budget=Budget(10**6))
    x = torch.randn(3, 50)
    old = module(x)
    other, _ = make(packing.UNIFORM)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert not torch.equal(module(x), old)


def test_a_wrong_tensor_is_named() -> None:
    module, _ = make(packing.UNIFORM)
    module.scales = module.scales.float()
    with pytest.raises(LayoutError, match=r"model.q.scales: expected float16 \[33, 3\], found float32 \[33, 3\]"):
        module.check("model.q")


def test_a_weight_that_was_kept_for_inference_lets_gradients_pass() -> None:
    module, decoded = make(packing.UNIFORM, budget=Budget(10**6))
    with torch.inference_mode():
        module(torch.ones(3, 50))
    assert module.budget.left < 10**6
    x = torch.ones(3, 50, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, decoded.sum(0).expand(3, 50), rtol=1e-5)


def test_gradients_reach_the_input() -> None:
    module, _ = make(packing.SPQR)
    x = torch.randn(3, 50, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_a_backend_that_can_not_run_is_refused() -> None:
    module, _ = make(packing.UNIFORM)
    module.backend = "triton"
    module.forget()
    with pytest.raises(BackendError, match="can't run here"):
        module(torch.randn(1, 50))


# ---- stacks of experts -------------------------------------------------------------------------


def stack(spec: LinearSpec, *, transposed: bool = False) -> tuple[QuantStack, torch.Tensor]:
    """Three experts of [24, 40], and their decoded weights [3, 24, 40]."""
    found = [packing.pack_weight(torch.randn(24, 40), spec, seed) for seed in range(3)]
    module = QuantStack(
        [spec] * 3, 24, 40, extents=[f.extents for f in found], dtype=torch.float32, transposed=transposed, device="cpu"
    )
    module.load_state_dict({f"{e}.{name}": t for e, f in enumerate(found) for name, t in f.tensors.items()})
    return module, torch.stack([f.decoded for f in found])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_stack_hands_out_experts_as_the_parameter_did(spec: LinearSpec) -> None:
    module, decoded = stack(spec)
    assert len(module) == 3
    assert module.shape == (3, 24, 40)
    for e in (0, 2, -1, torch.tensor(1)):
        assert torch.equal(module[e], decoded[e])
    assert all(torch.equal(a, b) for a, b in zip(module, decoded, strict=True))


def test_a_transposed_stack_hands_out_k_by_n() -> None:
    module, decoded = stack(packing.UNIFORM, transposed=True)
    assert module.shape == (3, 40, 24)
    assert torch.equal(module[1], decoded[1].T)
    assert module[1].is_contiguous()


def test_a_stack_follows_the_dtype_of_the_model() -> None:
    module, decoded = stack(packing.SPQR)
    nn.Sequential(module).to(torch.bfloat16)
    assert torch.equal(module[0], decoded[0].to(torch.bfloat16))


def test_a_stack_refuses_several_experts_at_once() -> None:
    module, _ = stack(packing.UNIFORM)
    with pytest.raises(LayoutError, match="eager"):
        module[torch.tensor([0, 1])]
    with pytest.raises(IndexError):
        module[3]


def test_packed_weights_of_a_model_are_listed_by_path() -> None:
    model = nn.ModuleDict({"a": make(packing.UNIFORM)[0], "b": stack(packing.UNIFORM)[0]})
    assert list(quantized(model)) == ["a", "b.0", "b.1", "b.2"]


# ---- the kernel path ---------------------------------------------------------------------------

KERNEL = """
import torch
from qexport.runtime.linear import QuantLinear
from tests import packing
torch.manual_seed(0)
for spec, m in ((packing.SCALED, 2), (packing.ROTATED, 2), (packing.ROTATED, 1), (packing.SPQR, 1)):
    found = packing.pack_weight(torch.randn(9, 40), spec)
    a, b = (
        QuantLinear(spec, 9, 40, bias=True, dtype=torch.float32, extents=found.extents, device="cpu", backend=how)
        for how in ("triton", "reference")
    )
    for module in (a, b):
        module.load_state_dict(dict(found.tensors) | {"bias": torch.arange(9.0)})
    assert a.choice.path == "triton", a.choice
    x = torch.randn(m, 40)
    assert (a(x) - b(x)).abs().max() < 1e-5 * b(x).abs().max()
    assert set(a.state_dict()) == set(b.state_dict())
"""


def test_the_kernel_path_agrees_with_the_reference() -> None:
    run = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(packing.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
