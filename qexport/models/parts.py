"""What is said about a model: its blocks, the weights in them, and who shares an input. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightView:
    """A matrix [n, k] of the model that can be quantized: a linear's weight, one expert's part of a stack, or the token
    embedding, where n counts tokens and k is the width of their vectors.

    Attributes:
        name: module path of the linear or embedding; of an expert, path of the stacked parameter, a dot, and its index.
        n: out features.
        k: in features.
        param: state-dict name of the tensor that holds it; of tied tensors, the first name.
        transposed: the tensor holds [k, n] (`Conv1D`, and experts that multiply from the right).
        index: which entry of a stacked [experts, ., .] tensor; None for a tensor of its own.
        bias: the linear adds a bias.
    """

    name: str
    n: int
    k: int
    param: str
    transposed: bool = False
    index: int | None = None
    bias: bool = False


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read one and the same input tensor, in the order in which they run."""

    members: tuple[WeightView, ...]

    @property
    def k(self) -> int:
        """In features of every member."""
        return self.members[0].k


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        name: module path.
        groups: its linears, in the order in which they run.
        experts: matrices in stacked parameters, which see no calibration data of their own.
    """

    name: str
    groups: tuple[LinearGroup, ...]
    experts: tuple[WeightView, ...]

    @property
    def views(self) -> tuple[WeightView, ...]:
        """All that can be quantized in this block."""
        return tuple(v for g in self.groups for v in g.members) + self.experts


@dataclass(frozen=True)
class Anatomy:
    """All that is known of a model before any weight is read.

    Attributes:
        architecture: class name of the model.
        model_type: `model_type` of its config.
        blocks: decoder layers in the order in which they run.
        head: the output projection; None if the model has none that is a linear.
        tied: the head's weight is the embedding.
        unseen: state-dict names of parameters of the blocks that have two or more dimensions and no view: they can't be
            quantized and stay dense, be they a convolution or most of the model. Sizes are in `parameters`.
        shared_bias: state-dict name of the tensor that is the head's bias, where the bias is shared and has an earlier
            name than `<head>.bias`; a packed head needs a copy of its own.
        embedding: state-dict name of the token embedding.
        embedding_view: the token embedding as a matrix, a row for each token; None if it can't be quantized.
        embedding_obstacle: why it can't be.
        towers: module paths beside the text decoder (vision, audio, projectors): copied as they are.
        parameters: stored dtype and shape of every state-dict tensor; of tied ones, the first name only.
        vocab: rows of the embedding.
        hidden: width of the hidden state.
        context: longest sequence the model was made for, None if the config does not say.
        cache_width: elements that one token takes in the key-value cache of all layers, if every layer keeps it.
    """

    architecture: str
    model_type: str
    blocks: tuple[Block, ...]
    head: WeightView | None
    tied: bool
    embedding: str
    towers: tuple[str, ...]
    parameters: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    vocab: int
    hidden: int
    context: int | None
    cache_width: int
    unseen: tuple[str, ...] = ()
    shared_bias: str | None = None
    embedding_view: WeightView | None = None
    embedding_obstacle: str | None = None
