"""Packed modules in graphs: operators where kernels compute, the same bits, and nothing that outlives its module."""

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexport.errors import BackendError
from qexport.formats.specs import InputSpec, LinearSpec, make_format
from qexport.kernels.cpu.base import FEW
from qexport.runtime.embedding import QuantEmbedding
from qexport.runtime.linear import QuantLinear
from tests import packing
from tests.rounding import QUANTS

N, K = 33, 50
SPECS = {"uniform": packing.UNIFORM, "rotated": packing.ROTATED, "spqr": packing.SPQR}
ROUNDING = LinearSpec(
    make_format("uniform", {"bits": 4, "group_size": -1}), InputSpec(quant=next(iter(QUANTS.values())))
)


def make(spec: LinearSpec = packing.UNIFORM, *, bias: bool = True, **options: Any) -> QuantLinear:
    """A linear with contents on the CPU; skips where no kernel would multiply by it."""
    found = packing.pack_weight(torch.randn(N, K), spec)
    module = QuantLinear(spec, N, K, bias=bias, dtype=torch.float32, extents=found.extents, device="cpu", **options)
    module.load_state_dict(dict(found.tensors) | ({"bias": torch.randn(N)} if bias else {}))
    if module.choice.path != "cpu":
        pytest.skip(module.choice.reason)
    module.forget()
    return module


def embedding() -> QuantEmbedding:
    found = packing.pack_weight(torch.randn(N, K), packing.UNIFORM)
    module = QuantEmbedding(packing.UNIFORM, nn.Embedding(N, K), dtype=torch.float32, device="cpu")
    module.load_state_dict(dict(found.tensors))
    return module


class Graphs:
    """A backend of `torch.compile` that runs what it gets as it is, and counts our operators in it."""

    def __init__(self) -> None:
        self.operators: list[int] = []

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.operators.append(sum("qexport" in str(node.target) for node in graph.graph.nodes))
        return graph.forward


@pytest.fixture(autouse=True)
def _afresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_graph_of_few_rows_holds_the_operator_and_gives_the_same_bits(
    spec: LinearSpec, bias: bool, dtype: torch.dtype
) -> None:
    module, graphs = make(spec, bias=bias).to(dtype), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs, dynamic=False)
    with torch.no_grad():
        for shape in [(1, K), (2, 1, K), (2, 7, K)]:
            x = torch.randn(shape, dtype=dtype)
            assert torch.equal(compiled(x), module(x))
    assert graphs.operators == [1, 1, 1]


def test_more_rows_are_decoded_in_the_graph() -> None:
    module, graphs = make(), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs, dynamic=False)
    for rows in (FEW, FEW + 1):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x), module(x))
    assert graphs.operators == [1, 0]


def test_what_stands_for_a_conv1d_and_autocast_are_compiled_too() -> None:
    module, graphs = make(transposed=True), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    x = torch.randn(2, 3, K)
    assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, module(x))
    assert graphs.operators == [1, 1]


def test_rounded_inputs_are_one_operator_however_many_rows() -> None:
    module, graphs = make(ROUNDING), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs, dynamic=False)
    for rows in (1, 2 * FEW):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x), module(x))
    assert graphs.operators == [1, 1]


def test_gradients_go_through_the_decoded_weight() -> None:
    module, graphs = make(), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    x = torch.randn(1, K, requires_grad=True)
    compiled(x).sum().backward()
    assert graphs.operators == [0]
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], module.decoded().sum(0))


def test_an_embedding_is_one_operator() -> None:
    module, graphs = embedding(), Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    ids = torch.tensor([[3, 0, 32], [5, 5, 1]])
    assert torch.equal(compiled(ids), module(ids))
    assert graphs.operators == [1]
    with pytest.raises(IndexError, match="expected ids from 0 to 32"):
        compiled(ids + 30)


def test_a_compiled_module_sees_new_contents_and_a_new_dtype() -> None:
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend=Graphs())
    x = torch.randn(1, K)
    old = compiled(x)
    module.load_state_dict(make().state_dict())
    assert not torch.equal(compiled(x), old)
    assert torch.equal(compiled(x), module(x))
    module.to(torch.bfloat16)
    assert torch.equal(compiled(x.bfloat16()), module(x.bfloat16()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_answers_for_itself(how: str) -> None:
    module, x = make(), torch.randn(1, K)
    want = module(x)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not twin._weights
    assert torch.equal(torch.ops.qexport.linear(x, twin._number, N), want)
    twin.load_state_dict(make().state_dict())
    assert not torch.equal(torch.ops.qexport.linear(x, twin._number, N), want)
    assert torch.equal(torch.ops.qexport.linear(x, module._number, N), want)


def test_a_module_that_is_gone_is_an_error() -> None:
    module = make()
    number = module._number
    del module
    gc.collect()
    with pytest.raises(BackendError, match="packed module of another process, or one that is gone"):
        torch.ops.qexport.linear(torch.randn(1, K), number, N)


def test_the_operators_keep_the_rules_of_torch() -> None:
    linear, table = make(), embedding()
    for x in (torch.randn(1, K), torch.randn(2, 3, K, dtype=torch.float16)):
        torch.library.opcheck(torch.ops.qexport.linear.default, (x, linear._number, N))
    ids: Tensor = torch.tensor([[3, 0], [5, 1]])
    torch.library.opcheck(torch.ops.qexport.rows.default, (ids, table._number, K, torch.float32))
