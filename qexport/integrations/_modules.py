"""From a dense model on the meta device to a packed one, back again, and is the checkpoint what the config says?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qexport import schema
from qexport.checkpoint import Reader, shape_of
from qexport.container import Quantization
from qexport.errors import CheckpointError, LayoutError
from qexport.formats.specs import LinearSpec
from qexport.runtime.embedding import QuantEmbedding
from qexport.runtime.experts import QuantStack
from qexport.runtime.linear import QuantLinear
from qexport.runtime.packed import Budget, Packed, PackedWeight, quantized
from qexport.schema import Extents


@dataclass(frozen=True)
class Names:
    """Names in the checkpoint of a model's modules: a base model, loaded alone, lacks the prefix of the whole.

    Attributes:
        prefix: what a path in the model needs in front to be one in the checkpoint.
    """

    prefix: str = ""

    @classmethod
    def of(cls, model: nn.Module, patterns: Iterable[str]) -> "Names":
        """The prefix, if the model is the base of what the patterns describe."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        alone = getattr(model, "base_model", None) is model
        return cls(prefix if alone and any(p.startswith(prefix) for p in patterns) else "")

    def stored(self, name: str) -> str:
        """Name in the checkpoint."""
        return self.prefix + name


# ---- swapping ----------------------------------------------------------------------------------


def swap(model: Any, quantization: Quantization, names: Names, backend: str, budget: Budget) -> None:
    """Replace every module and stacked parameter of a `PreTrainedModel` that has a spec by its packed form, on meta.

    Raises:
        CheckpointError: a spec names a module that is neither linear nor embedding, or part of a stack of experts.
    """
    from qexport.models.build import wanted_dtype  # not at the top: transformers may be half imported then

    for name, module in list(model.named_modules()):
        spec = quantization.spec_for(names.stored(name)) if name else None
        if spec is not None:
            new = _packed(module, spec, names.stored(name), quantization, backend, budget)
            new.dtype = wanted_dtype(model, f"{name}.weight", new.dtype)
            model.set_submodule(name, new)
        for field, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                _stack(module, field, parameter, names.stored(f"{name}.{field}" if name else field), quantization)


def _packed(
    module: nn.Module, spec: LinearSpec, where: str, quantization: Quantization, backend: str, budget: Budget
) -> PackedWeight:
    from qexport.models import embeddings  # not at the top either
    from qexport.models.linears import is_linear

    extents = quantization.extents_of(where)
    new: PackedWeight
    try:
        if isinstance(module, nn.Embedding) and embeddings.obstacle(module) is None:
            new = QuantEmbedding(spec, module, dtype=module.weight.dtype, extents=extents, budget=budget)
        elif isinstance(module, nn.Linear | Conv1D) and is_linear(module):
            new = _linear(module, spec, extents, backend, budget)
        else:
            raise CheckpointError(
                f"config.json: {where} has a spec, but is a {type(module).__name__}; expected a linear layer or an "
                "embedding. Fetch or write the checkpoint again."
            )
    except LayoutError as error:
        raise LayoutError(f"{where}: {error} Its place is quantization_config.extents of config.json.") from error
    # While loading, some models reach for the weights of their children to initialise them: give them one that says
    # that it is done. `check_contents` takes it away.
    done = module.weight.detach()
    setattr(done, "_is_hf_initialized", True)  # noqa: B010  no attribute that torch's types know
    if "weight" not in new.packed:
        new.weight = done
    if isinstance(new, QuantEmbedding):
        new.own.weight = done  # stays: it is on the meta device
    return new.train(module.training)


def _linear(
    module: nn.Linear | Conv1D, spec: LinearSpec, extents: Extents, backend: str, budget: Budget
) -> QuantLinear:
    from qexport.models.linears import own_class

    weight, transposed = module.weight, isinstance(module, Conv1D)
    k, n = weight.shape if transposed else reversed(weight.shape)
    return QuantLinear(
        spec, n, k, bias=module.bias is not None, dtype=weight.dtype, extents=extents, transposed=transposed,
        backend=backend, budget=budget, own=own_class(module),
    )  # fmt: skip


def _stack(parent: nn.Module, field: str, parameter: Tensor, where: str, quantization: Quantization) -> None:
    paths = [f"{where}.{e}" for e in range(parameter.shape[0])]
    specs = [spec for path in paths if (spec := quantization.spec_for(path)) is not None]
    if not specs:
        return
    if len(specs) != len(paths):
        raise CheckpointError(
            f"config.json: {where}: expected a spec for each of {len(paths)} experts, found {len(specs)}."
        )
    transposed = bool(getattr(parent, "is_transposed", False))
    n, k = reversed(parameter.shape[1:]) if transposed else parameter.shape[1:]
    extents = [quantization.extents_of(path) for path in paths]
    stack = QuantStack(specs, n, k, extents=extents, dtype=parameter.dtype, transposed=transposed)
    delattr(parent, field)
    parent.add_module(field, stack)
    # Nothing here may be filled with random numbers as a "missing" parameter.
    parent._is_hf_initialized = stack._is_hf_initialized = True  # type: ignore[assignment]
    config = getattr(parent, "config", None)
    if config is not None:
        config._experts_implementation = "eager"  # the others need all experts as one tensor


def untie(model: nn.Module) -> None:
    """Forget ties to weights that are packed now: head and embedding have tensors of their own, packed or dense."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    packed = quantized(model)
    gone = [target for target, source in ties.items() if {_module(target), _module(source)} & set(packed)]
    for target in gone:
        del ties[target]
    if gone and not ties:
        config = getattr(model, "config", None)
        for part in (config, config.get_text_config() if config is not None else None):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False  # type: ignore[union-attr]


def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense layers with the decoded weights, in a dtype, where packed ones are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, _dense(module, dtype))
        elif isinstance(module, QuantEmbedding):
            model.set_submodule(name, module.dense(dtype))
        elif isinstance(module, QuantStack):
            path, _, field = name.rpartition(".")
            parent = model.get_submodule(path)
            weights = torch.stack([view(dtype, module.transposed) for view in module.views])
            delattr(parent, field)
            parent.register_parameter(field, nn.Parameter(weights, requires_grad=False))


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Module:
    weight = module.decoded(dtype, transposed=module.transposed)
    with torch.device("meta"):
        dense = (
            Conv1D(module.n, module.k) if module.transposed else nn.Linear(module.k, module.n, module.bias is not None)
        )
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.own is not None:
        dense.__class__ = module.own  # of which nothing but `forward` differs
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
    return dense.train(module.training)


# ---- checking ----------------------------------------------------------------------------------


def check_structure(model: nn.Module, reader: Reader, quantization: Quantization, names: Names) -> None:
    """Compare the headers of a checkpoint with a swapped model, before any weight is read.

    Raises:
        LayoutError: a packed tensor is missing, too many, or of another dtype or shape than its layout says.
        CheckpointError: a dense tensor is, or the config describes a module that the model does not have.
    """
    packed = {names.stored(name): module for name, module in quantized(model).items()}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in packed}
    for name in reader.names:
        path, _, field = name.rpartition(".")
        if path in packed and field != "bias":
            found[path][field] = shape_of(reader.meta(name), name)
        elif path not in packed and path.startswith(names.prefix) and quantization.spec_for(path) is not None:
            raise CheckpointError(f"{name}: config.json describes {path} as packed, but the model has no such linear.")
    for where, module in packed.items():
        layout = module.spec.layout(module.n, module.k)
        schema.check(found[where], layout, where, quantization.extents_of(where))
    _check_dense(model, reader, names, packed)


def _check_dense(model: nn.Module, reader: Reader, names: Names, packed: Mapping[str, Packed]) -> None:
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    there = {name.removeprefix(names.prefix) for name in reader.names if name.startswith(names.prefix)}
    tied = [{source, *(t for t, s in ties.items() if s == source)} for source in set(ties.values())]
    spared = {name for group in tied if group & there for name in group}  # one of them stands for all
    for name, tensor in model.state_dict().items():
        stored = names.stored(name)
        if _module(stored) in packed and not name.endswith(".bias"):
            continue
        if name not in there:
            if name in spared:
                continue
            raise CheckpointError(
                f"{stored}: missing from the checkpoint ({', '.join(reader.files[:3])}); the files are not those "
                "that were written. Fetch or write them again."
            )
        meta = reader.meta(stored)
        if meta.shape != tuple(tensor.shape) or (
            meta.dtype != tensor.dtype and not _both_float(meta.dtype, tensor.dtype)
        ):
            raise CheckpointError(
                f"{stored}: expected {tensor.dtype} {list(tensor.shape)}, found {meta.dtype} {list(meta.shape)[:8]}."
            )


def _both_float(a: torch.dtype, b: torch.dtype) -> bool:
    return a.is_floating_point and b.is_floating_point


def check_contents(model: nn.Module, reader: Reader | None, names: Names) -> None:
    """Check what was loaded: structure again, and contents; tensors left on disk are read for it.

    Raises:
        LayoutError: the module, the tensor, what was expected and what was found.
    """
    for name, module in quantized(model).items():
        vars(module).pop("weight", None)
        module.pin()
        where, tensors = names.stored(name), module.packed
        if reader is not None:
            tensors = {f: reader.read(f"{where}.{f}") if t.is_meta else t for f, t in tensors.items()}
        module.check(where, tensors)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
