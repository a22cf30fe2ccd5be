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
from qexport.runtime.joining import join
from qexport.runtime.linear import QuantLinear
from tests import packing
from tests.rounding import QUANTS

N, K = 33, 50
SPECS = {"uniform": packing.UNIFORM, "rotated": packing.ROTATED, "spqr": packing.SPQR}
ROUNDING = LinearSpec(
    make_format("uniform", {"bits": 4, "group_size": -1}), InputSpec(quant=next(iter(QUANTS.values())))
)


def make(spec: LinearSpec = packing.UNIFORM, *, n: int = N, bias: bool = True, **options: Any) -> QuantLinear:
    """A linear with contents on the CPU; skips where no kernel would multiply by it."""
    found = packing.pack_weight(torch.randn(n, K), spec)
    module = QuantLinear(spec, n, K, bias=bias, dtype=torch.float32, extents=found.extents, device="cpu", **options)
    module.load_state_dict(dict(found.tensors) | ({"bias": torch.randn(n)} if bias else {}))
    if module.choice.path != "cpu":
        pytest.skip(module.choice.reason)
    module.forget()
    return module


def embedding() -> QuantEmbedding:
    found = packing.pack_weight(torch.randn(N, K), packing.UNIFORM)
    module = QuantEmbedding(packing.UNIFORM, nn.Embedding(N, K), dtype=torch.float32, device="cpu")
    module.load_state_dict(dict(found.tensors))
    return module


SYMMETRIC = LinearSpec(make_format("uniform", {"bits": 4, "group_size": 24, "symmetric": True}))
SDR = LinearSpec(make_format("sdr", {}))
JOINED = {"uniform": packing.UNIFORM, "symmetric": SYMMETRIC, "sdr": SDR}
APART = {
    "rows that don't fill blocks": (packing.UNIFORM, 96, packing.UNIFORM),
    "other groups": (packing.UNIFORM, 64, LinearSpec(make_format("uniform", {"bits": 4, "group_size": 32}))),
    "other zeros for all": (SDR, 64, LinearSpec(make_format("sdr", {"bits": 5}))),
    "outliers": (packing.SPQR, 64, packing.SPQR),
    "another kernel": (packing.UNIFORM, 64, LinearSpec(make_format("bcq", {"bits": 3, "group_size": 24}))),
    "inputs that are rotated": (packing.ROTATED, 64, packing.UNIFORM),
    "inputs that are rounded": (packing.UNIFORM, 64, ROUNDING),
}


def called_together(modules: list[QuantLinear], x: Tensor) -> list[Tensor]:
    """What the operator of several gives."""
    ns = [m.n for m in modules]
    whole: Tensor = torch.ops.qexport.linears(x, [m._number for m in modules], sum(ns))
    return list(whole.split(ns, -1))


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


@pytest.mark.parametrize("spec", JOINED.values(), ids=JOINED)
def test_linears_with_one_input_become_one_product_of_the_same_bits(spec: LinearSpec) -> None:
    modules = [make(spec, n=128), make(spec, n=64, bias=False), make(spec, n=33)]
    for rows in (1, 3):
        x = torch.randn(rows, 1, K)
        for own in (x, x.bfloat16()):
            want = [m.multiplied(own) for m in modules]
            for _ in range(2):
                found = called_together(modules, own)
                assert all(map(torch.equal, found, want))
    (joint,) = [m._joint for m in modules if m._joint is not None]
    assert joint.joined
    bases = [m._weights["plain"].codes.base for m in modules]
    assert all(base is not None and base is bases[0] for base in bases)
    assert all(torch.equal(m.multiplied(x), y) for m, y in zip(modules, called_together(modules, x), strict=True))


def test_one_of_several_that_changes_is_joined_anew() -> None:
    modules = [make(n=64) for _ in range(3)]
    x = torch.randn(1, K)
    old = [called_together(modules, x) for _ in range(2)][-1]
    modules[1].load_state_dict(make(n=64).state_dict())
    for _ in range(2):
        found = called_together(modules, x)
        assert torch.equal(found[1], modules[1](x))
        assert [torch.equal(*pair) for pair in zip(found, old, strict=True)] == [True, False, True]
    other = [modules[0], modules[2]]
    for _ in range(2):
        assert all(map(torch.equal, called_together(other, x), (old[0], old[2])))


@pytest.mark.parametrize("case", APART.values(), ids=APART)
def test_what_can_not_be_joined_is_computed_apart(case: tuple[LinearSpec, int, LinearSpec]) -> None:
    modules = [make(case[0], n=case[1]), make(case[2], n=64)]
    x = torch.randn(1, K)
    for _ in range(2):
        assert all(map(torch.equal, called_together(modules, x), [m.multiplied(x) for m in modules]))
    assert all(m._joint is None or not m._joint.joined for m in modules)


def test_a_graph_joins_linears_by_their_input() -> None:
    graph = torch.fx.Graph()
    one, two, *numbers = map(graph.placeholder, ("one", "two", "a", "b", "c", "d"))
    linear = torch.ops.qexport.linear.default
    nodes = [graph.call_function(linear, (x, n, 64)) for x, n in zip((one, two, one, one), numbers, strict=True)]
    for node in nodes:
        node.meta["val"] = torch.empty(1, 64)
    graph.output(tuple(nodes))
    join(graph)
    graph.lint()
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.qexport.linears.default, *[torch.ops.aten.slice.Tensor] * 3, linear]
    modules = [make(n=64) for _ in numbers]
    inputs = torch.randn(2, 1, K)
    found = torch.fx.GraphModule(nn.Module(), graph)(*inputs, *(m._number for m in modules))
    want = [m(x) for m, x in zip(modules, (inputs[0], inputs[1], inputs[0], inputs[0]), strict=True)]
    assert all(map(torch.equal, found, want))


def test_the_operators_keep_the_rules_of_torch() -> None:
    linear, table = make(), embedding()
    for x in (torch.randn(1, K), torch.randn(2, 3, K, dtype=torch.float16)):
        torch.library.opcheck(torch.ops.qexport.linear.default, (x, linear._number, N))
        torch.library.opcheck(torch.ops.qexport.linears.default, (x, [linear._number] * 2, 2 * N))
    ids: Tensor = torch.tensor([[3, 0], [5, 1]])
    torch.library.opcheck(torch.ops.qexport.rows.default, (ids, table._number, K, torch.float32))
