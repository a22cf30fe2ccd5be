"""A decoder layer as a checkpoint has it: decoded weights, rounded inputs, and what transforms changed beside them."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from qexport.checkpoint import Reader
from qexport.formats.specs import LinearSpec
from qexport.layer import rounding
from qexport.models import Block, Skeleton
from qexport.schema import Tensors


def stored_block(
    bones: Skeleton,
    index: int,
    block: Block,
    reader: Reader,
    specs: Mapping[str, LinearSpec],
    *,
    dense: Collection[str],
    device: torch.device,
) -> nn.Module:
    """A layer of a model with what a checkpoint says of it; the caller's to change and to drop.

    Args:
        bones: of the original model.
        index: of the layer.
        block: the layer.
        reader: of the checkpoint, or of the file that holds the layer.
        specs: of packed modules, by path.
        dense: state-dict names of other tensors that are taken from the checkpoint.
        device: where the layer runs.
    """
    module = bones.block(index)
    for view in block.views:
        spec = specs.get(view.name)
        if spec is not None:
            packed = stored_tensors(reader, spec, view.name, view.n, view.k)
            bones.put(index, module, view, spec.decoded(packed, view.n, view.k))
            if view.index is None:
                here = {name: packed[name].to(device) for name in spec.input.layout(view.k)}
                rounding(bones.submodule(index, module, view), spec.input, here)
    for name in dense:
        bones.put_tensor(index, module, name, reader.read(name))
    return module


def stored_tensors(reader: Reader, spec: LinearSpec, module: str, n: int, k: int) -> Tensors:
    """A packed module's tensors by field, without its bias."""
    return {name: reader.read(f"{module}.{name}") for name in spec.layout(n, k)}
