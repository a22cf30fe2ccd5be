"""Layouts: the names, dtypes and shapes of a format's stored tensors, and all that follows from them.

A format states its layout once. Sizes, validation, empty buffers, tables in the documents and random test inputs are
derived here and nowhere else. Everything in this file is pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qexport.errors import LayoutError

_LARGEST = (1 << 63) - 1  # bytes of a tensor that can be counted, even on the meta device


@dataclass(frozen=True)
class Field:
    """One stored tensor.

    Attributes:
        shape: extents; a str names an extent known only after packing, for example `"nnz"`.
        dtype: stored dtype.
        axes: what each axis runs along: `"n"`, `"k"`, `"group"`, `"word"`, `"nnz"` ...
        doc: one line, shown in documents and errors.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    axes: tuple[str, ...]
    doc: str


Layout = Mapping[str, Field]
Tensors = Mapping[str, Tensor]
Extents = Mapping[str, int]


def bind(field: Field, extents: Extents) -> tuple[int, ...]:
    """Concrete shape of a field; raises `LayoutError` when an extent is not known."""
    missing = [d for d in field.shape if isinstance(d, str) and d not in extents]
    if missing:
        raise LayoutError(f"extent {missing[0]!r} is not known; known: {sorted(extents) or 'none'}")
    shape = tuple(extents[d] if isinstance(d, str) else d for d in field.shape)
    if prod(shape) * field.dtype.itemsize > _LARGEST:
        raise LayoutError(f"a tensor of {_spell(field.dtype, shape)} can't be: expected at most {_LARGEST} bytes.")
    return shape


def nbytes(layout: Layout, extents: Extents | None = None) -> int:
    """Stored bytes of all tensors of a layout."""
    return sum(prod(bind(f, extents or {})) * f.dtype.itemsize for f in layout.values())


def extents_of(tensors: Tensors, layout: Layout) -> dict[str, int]:
    """Values of the named extents, read off checked tensors."""
    return {
        d: tensors[name].shape[axis]
        for name, field in layout.items()
        for axis, d in enumerate(field.shape)
        if isinstance(d, str)
    }


def _spell(dtype: torch.dtype, shape: tuple[int | str, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"


def check(tensors: Tensors, layout: Layout, where: str, extents: Extents | None = None) -> dict[str, int]:
    """Compare names, dtypes and shapes with a layout, without reading any content.

    Args:
        tensors: stored tensors (meta tensors will do).
        layout: what they must be.
        where: module path, for the error.
        extents: values that named extents must have; others are taken from the first tensor that shows them.

    Returns:
        All named extents.

    Raises:
        LayoutError: the first difference, with the tensor, what was expected and what was found.
    """
    for name in sorted(set(tensors) ^ set(layout)):
        state = "is missing" if name in layout else "does not belong to this format"
        raise LayoutError(f"{where}.{name}: {state}; the format stores {', '.join(sorted(layout))}.")
    known = dict(extents or {})
    for name, field in layout.items():
        found = tensors[name]
        if found.ndim == len(field.shape):
            for d, size in zip(field.shape, found.shape, strict=True):
                if isinstance(d, str):
                    known.setdefault(d, size)
        want = tuple(known.get(d, d) if isinstance(d, str) else d for d in field.shape)
        if found.dtype != field.dtype or tuple(found.shape) != want:
            spelled = _spell(found.dtype, tuple(found.shape))
            raise LayoutError(f"{where}.{name}: expected {_spell(field.dtype, want)}, found {spelled}.")
    return known


def empty(layout: Layout, extents: Extents | None = None, device: str | torch.device = "meta") -> dict[str, Tensor]:
    """Uninitialised tensors of a layout; by default on the meta device, as a loader wants them."""
    return {name: torch.empty(bind(f, extents or {}), dtype=f.dtype, device=device) for name, f in layout.items()}


def markdown_table(layout: Layout) -> str:
    """The layout as a Markdown table."""
    rows = [f"| `{n}` | {_spell(f.dtype, f.shape)} | {', '.join(f.axes)} | {f.doc} |" for n, f in layout.items()]
    return "\n".join(["| tensor | type | axes | meaning |", "|---|---|---|---|", *rows])
