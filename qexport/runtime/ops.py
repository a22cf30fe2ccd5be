"""Packed modules in graphs: operators of torch that stand for what a module computes by a kernel of ours.

`torch.compile` can't look into kernels that numba compiled. So a graph holds an operator in the module's place, with
the module's number as a tensor. When the graph runs, the operator has that module compute what it computes without a
graph, so both give the same bits. A number is a tensor because constants are compiled into a graph, and into what is
cached of it.

Triton's kernels read tensors and nothing else, so theirs is an operator of tensors: CUDA graphs see at each call
whether these still lie where they lay, and take no tensor of the CPU.
"""

import json
import secrets
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qexport.errors import BackendError
from qexport.formats.specs import LinearSpec, from_json, to_json
from qexport.runtime import products


def number_of(module: Any) -> Tensor:
    """A number for a module, int64 [], by which operators find it as long as it lives; never given twice."""
    _library()
    number = secrets.randbits(62)
    _modules()[number] = module
    return torch.tensor(number, device="cpu")


@cache
def _modules() -> "WeakValueDictionary[int, Any]":
    """Modules by their numbers; they own what is derived from them, and nothing here keeps one alive."""
    return WeakValueDictionary()


def module_of(number: Tensor) -> Any:
    """The module that has this number."""
    try:
        return _modules()[number.item()]  # type: ignore[index]
    except KeyError:
        raise BackendError(
            "this graph holds a packed module of another process, or one that is gone: graphs of packed modules can't "
            "be saved. Load the checkpoint and compile it again."
        ) from None


def _linear(x: Tensor, number: Tensor, n: int) -> Tensor:
    y: Tensor = module_of(number).multiplied(x)
    return y


def _linears(x: Tensor, numbers: list[Tensor], n: int) -> Tensor:
    y: Tensor = module_of(numbers[0]).multiplied_with(numbers, x)
    return y


def _rows(ids: Tensor, number: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    y: Tensor = module_of(number).looked_up(ids)
    return y


def words(spec: LinearSpec) -> str:
    """A spec as `product` takes it: the same in every process, so a graph may be cached with it."""
    return json.dumps(to_json(spec), sort_keys=True)


@cache
def _spec(text: str) -> LinearSpec:
    return from_json(json.loads(text), "an operator in a graph")


def _product(x: Tensor, weights: list[Tensor], inputs: list[Tensor], spec: str, rounded: bool, n: int) -> Tensor:
    known = _spec(spec)
    named = dict(zip(known.input.layout(x.shape[-1]), inputs, strict=True))
    # Nothing is timed in a graph: it may be one that is being recorded, or about to be.
    return products.product(known, x, weights, named, n, rounded=rounded, timed=False)


def _product_of_nothing(
    x: Tensor, weights: list[Tensor], inputs: list[Tensor], spec: str, rounded: bool, n: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _linear_of_nothing(x: Tensor, number: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _linears_of_nothing(x: Tensor, numbers: list[Tensor], n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _rows_of_nothing(ids: Tensor, number: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, k, dtype=dtype)


@cache
def _library() -> torch.library.Library:
    """The operators, defined once.

    `linear`: x [..., k] times a packed weight [n, k], plus its bias: [..., n] in x's dtype.
    `linears`: x times several, one behind the other: [..., n], of n out features together.
    `rows`: of a packed embedding [n, k] those of int64 ids [...]: [..., k].
    `product`: x [..., k] times what `products.laid_out` made of a weight [n, k]: [..., n]. `product_that_waits`: the
    same where the host waits for the device, so that CUDA graphs leave it out.
    """
    library = torch.library.Library("qexport", "FRAGMENT")
    library.define("linear(Tensor x, Tensor number, SymInt n) -> Tensor")
    library.define("linears(Tensor x, Tensor[] numbers, SymInt n) -> Tensor")
    library.define("rows(Tensor ids, Tensor number, SymInt k, ScalarType dtype) -> Tensor")
    library.impl("linear", _linear, "CPU")
    library.impl("linears", _linears, "CPU")
    library.impl("rows", _rows, "CPU")
    product = "(Tensor x, Tensor[] weights, Tensor[] inputs, str spec, bool rounded, SymInt n) -> Tensor"
    for name, tags in (("product", ()), ("product_that_waits", (torch.Tag.cudagraph_unsafe,))):
        library.define(name + product, tags=tags)
        for device in ("CUDA", "CPU"):  # there in the interpreter
            library.impl(name, _product, device)
        torch.library.register_fake(f"qexport::{name}", _product_of_nothing, lib=library)

    torch.library.register_fake("qexport::linear", _linear_of_nothing, lib=library)
    torch.library.register_fake("qexport::linears", _linears_of_nothing, lib=library)
    torch.library.register_fake("qexport::rows", _rows_of_nothing, lib=library)
    return library
