"""Linears on Triton's path in graphs of `torch.compile`: what a process under the interpreter finds, as JSON."""

import json
import sys
from typing import Any

import torch
from torch import nn

from qexport.formats import _rotation
from qexport.formats.specs import InputSpec, LinearSpec, make_format
from qexport.runtime import ops
from qexport.runtime.linear import QuantLinear
from tests import packing
from tests.rounding import QUANTS

N, K = 9, 40


def rounding(name: str) -> LinearSpec:
    return LinearSpec(make_format("uniform", {"bits": 4, "group_size": -1}), InputSpec(quant=QUANTS[name]))


SPECS = {
    "scaled": packing.SCALED,
    "rotated": packing.ROTATED,
    "spqr": packing.SPQR,
    "token": rounding("token"),
    "outliers": rounding("outliers"),
    "static outliers": rounding("outliers 5, static"),
}


def make(spec: LinearSpec, backend: str = "triton") -> QuantLinear:
    found = packing.pack_weight(torch.randn(N, K), spec)
    module = QuantLinear(
        spec, N, K, bias=True, dtype=torch.float32, extents=found.extents, device="cpu", backend=backend
    )
    module.load_state_dict(dict(found.tensors) | {"bias": torch.randn(N)})
    return module


def in_a_graph(spec: LinearSpec) -> dict[str, Any]:
    """Of a compiled linear: its operators, graph inputs that may move, and whether it is the linear, also later."""
    module, seen = make(spec), {}

    def backend(graph: Any, _inputs: Any) -> Any:
        nodes = list(graph.graph.nodes)
        seen["operators"] = [str(node.target) for node in nodes if str(node.target).startswith("qexport")]
        seen["moving"] = [
            node.name
            for node in nodes
            if node.op == "placeholder" and "_dynamo_static_input_type" not in node.meta["tensor_dict"]
        ]
        seen.setdefault("matrices", _rotation._matrix.cache_info().misses)
        return graph.forward

    torch._dynamo.reset()
    _rotation._matrix.cache_clear()
    x = torch.randn(2, K)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        y = compiled(x)
        seen["matrices"] -= _rotation._matrix.cache_info().misses
        seen["same"] = torch.equal(y, module(x))
        module.load_state_dict(make(spec).state_dict())
        seen["follows"] = torch.equal(compiled(x), module(x)) and not torch.equal(module(x), y)
        torch._dynamo.reset()
        seen["lowered"] = torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
        rounded = spec.input.quant is not None
        inputs = [getattr(module, name) for name in spec.input.layout(K)]
        arguments = (x, list(module._for_triton(rounded)), inputs, ops.words(spec), rounded, N)
        torch.library.opcheck(torch.ops.qexport.product.default, arguments)
    return seen


def gradient() -> bool:
    """Whether the gradient of a float input is that of the reference path, with and without a graph."""
    module, x, found = make(packing.UNIFORM), torch.randn(2, K), []
    torch._dynamo.reset()
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        own = x.clone().requires_grad_()
        run(own).sum().backward()
        found.append(own.grad)
    want = module.decoded().sum(0).expand(2, K)
    return all(grad is not None and torch.allclose(grad, want) for grad in found)


def shared() -> list[bool]:
    """Whether two linears, alike but for what their codes mean, give their own results from a model's one graph."""
    specs = [LinearSpec(make_format("fp_asym", {"code": code, "group_size": 8})) for code in ("fp4", "nf4")]
    model, x = nn.ModuleList(map(make, specs)), torch.randn(1, K)
    torch._dynamo.reset()
    run = torch.compile(lambda module, x: module(x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return [torch.equal(run(module, x), module(x)) for module in model]


if __name__ == "__main__":
    torch.manual_seed(0)
    found: dict[str, Any] = {name: in_a_graph(spec) for name, spec in SPECS.items()}
    sys.stdout.write(json.dumps(found | {"gradient": gradient(), "shared": shared()}))
