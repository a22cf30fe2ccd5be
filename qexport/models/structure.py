"""Reading a model's structure off an empty copy of it: which weights there are, and which of them share an input."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qexport.errors import PlanError
from qexport.models import embeddings, mapping
from qexport.models.build import shell, striped
from qexport.models.chain import Call, find_blocks, head_module, record, tensors_in
from qexport.models.linears import is_linear
from qexport.models.parts import Anatomy, Block, LinearGroup, WeightView
from qexport.models.source import Source

# A batch of two tells what depends on the tokens from what is shared by all rows.
PROBE = (2, 8)


def anatomy(source: Source) -> Anatomy:
    """Describe a model from its config and headers; no weight is read.

    Raises:
        PlanError: it can't be quantized here; the message names the modules or tensors in the way.
    """
    origins = source.origins
    model = source.model
    home = mapping.tied_names(model)
    path, blocks = find_blocks(model)
    calls, ran = _text_pass(source)
    text = source.config.get_text_config()
    described = tuple(
        _block(f"{path}.{i}", b, c, text.hidden_size, home) for i, (b, c) in enumerate(zip(blocks, calls, strict=True))
    )
    if not any(b.views for b in described):
        raise PlanError(f"{type(model).__name__}: the blocks {path}.* hold no nn.Linear, Conv1D or stacked experts.")
    table = model.get_input_embeddings()
    embedding = _name_of(model, table) + ".weight"
    head = _head(model, home)
    obstacle = embeddings.obstacle(table) or _further_users(embedding, head, home)
    return Anatomy(
        architecture=type(model).__name__,
        model_type=source.config.model_type,
        blocks=described,
        head=head,
        tied=head is not None and head.param == home[embedding],
        embedding=embedding,
        towers=_towers(model, path, ran),
        parameters={name: (origin.dtype, origin.shape) for name, origin in origins.items()},
        vocab=text.vocab_size,
        hidden=text.hidden_size,
        context=getattr(text, "max_position_embeddings", None),
        cache_width=_cache_width(text),
        unseen=_unseen(blocks, described, home),
        shared_bias=_shared_bias(head, home),
        embedding_view=None if obstacle else _table(embedding, table, home),
        embedding_obstacle=obstacle,
    )


def _cache_width(text: PretrainedConfig) -> int:
    """Elements that one token takes in the cache, layer by layer: in some models they differ (Gemma 4).

    It feeds an estimate and nothing else, so what a config does not say, or says in another way, counts as nothing.
    """
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int):
        return 0
    layers: Any = getattr(text, "per_layer_config", None) or [text] * count
    return sum(_layer_width(layer) for layer in layers)


def _layer_width(layer: PretrainedConfig) -> int:
    try:
        queries = getattr(layer, "num_attention_heads", None) or 0
        heads = getattr(layer, "num_key_value_heads", None) or queries
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // max(queries, 1)
        return int(2 * heads * head_dim)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return 0


def text_calls(source: Source) -> tuple[PreTrainedModel, nn.ModuleList, list[Call], frozenset[str]]:
    """The model without weights, its blocks, how it calls them, and the modules outside them that tokens run through.

    Masks and position tables are made by code that looks at values, so this part runs on the CPU; weights outside the
    blocks are single columns seen in every place, which takes no memory.
    """
    outer = shell(source.config, torch.float32)
    path, blocks = find_blocks(outer)
    ran: set[str] = set()
    for name, module in outer.named_modules():
        if not name.startswith(path + "."):
            for key, param in module._parameters.items():
                if param is not None:
                    module._parameters[key] = nn.Parameter(striped(param.shape), requires_grad=False)
            module.register_forward_pre_hook(lambda _module, _args, name=name: ran.add(name))
    # Two rows of different tokens.
    tokens = torch.arange(PROBE[0]).unsqueeze(1).expand(PROBE)
    return outer, blocks, record(outer, list(blocks), tokens), frozenset(ran)


def _text_pass(source: Source) -> tuple[list[Call], frozenset[str]]:
    """How the model calls its blocks, tensors on meta, and the modules outside them that tokens run through."""
    outer, _, calls, ran = text_calls(source)
    _refuse_token_dependent(type(outer).__name__, calls)
    bare = [
        replace(c, **tree_map_only(Tensor, lambda t: t.to("meta"), {"args": c.args, "kwargs": c.kwargs})) for c in calls
    ]
    return bare, ran


def _name_of(model: PreTrainedModel, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def _head(model: PreTrainedModel, home: dict[str, str]) -> WeightView | None:
    module = head_module(model)
    if not (isinstance(module, nn.Linear) and is_linear(module)):
        return None
    name = _name_of(model, module)
    param = home[f"{name}.weight"]
    return WeightView(name, module.out_features, module.in_features, param, bias=module.bias is not None)


def _further_users(embedding: str, head: WeightView | None, home: dict[str, str]) -> str | None:
    known = {embedding, f"{head.name}.weight" if head else embedding}
    others = [name for name, first in home.items() if first == home[embedding] and name not in known]
    return f"its weight is also {mapping.listed(others)}" if others else None


def _table(embedding: str, module: nn.Module, home: dict[str, str]) -> WeightView:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return WeightView(embedding.removesuffix(".weight"), weight.shape[0], weight.shape[1], home[embedding])


def _unseen(modules: Iterable[nn.Module], blocks: Iterable[Block], home: dict[str, str]) -> tuple[str, ...]:
    names = []
    for module, block in zip(modules, blocks, strict=True):
        seen = {view.param for view in block.views}
        own = [home[f"{block.name}.{name}"] for name, param in module.named_parameters() if param.ndim > 1]
        names += [name for name in own if name not in seen]
    return tuple(dict.fromkeys(names))


def _shared_bias(head: WeightView | None, home: dict[str, str]) -> str | None:
    if head is None or not head.bias:
        return None
    own = f"{head.name}.bias"
    return None if home[own] == own else home[own]


def _towers(model: PreTrainedModel, blocks: str, ran: frozenset[str]) -> tuple[str, ...]:
    """Modules with weights that branch off on the way from the model to its text decoder, and that text does not use.

    What runs on tokens alone, such as a transform between decoder and head, is part of the language model.
    """
    decoder = _name_of(model, model.get_decoder())
    if not blocks.startswith(decoder):
        return ()
    steps = decoder.split(".") if decoder else []
    own = {id(model.get_input_embeddings()), id(head_module(model))}
    towers = []
    for depth in range(len(steps)):
        parent = model.get_submodule(".".join(steps[:depth]))
        for name, child in parent.named_children():
            tower = ".".join([*steps[:depth], name])
            used = any(module == tower or module.startswith(tower + ".") for module in ran)
            if (
                name != steps[depth]
                and id(child) not in own
                and not used
                and next(child.parameters(), None) is not None
            ):
                towers.append(tower)
    return tuple(towers)


def _refuse_token_dependent(where: str, calls: Sequence[Call]) -> None:
    for index, call in enumerate(calls):
        for tensor in tensors_in((call.args, call.kwargs)):
            if tensor.ndim > 0 and tensor.shape[0] == PROBE[0] and not torch.equal(tensor[0], tensor[1]):
                raise PlanError(
                    f"{where}: block {index} takes a second input computed from the tokens, {list(tensor.shape)}. "
                    "qexport streams decoders whose only token-dependent input is the hidden state."
                )


def _block(path: str, block: nn.Module, call: Call, hidden: int, home: dict[str, str]) -> Block:
    linears = {n: m for n, m in block.named_modules() if is_linear(m)}
    groups = []
    for names in _sharing(block, linears, call, hidden):
        groups.append(LinearGroup(tuple(_linear(path, n, linears[n], home) for n in names)))
    return Block(path, tuple(groups), _experts(path, block, home))


def _linear(path: str, name: str, module: nn.Module, home: dict[str, str]) -> WeightView:
    full = f"{path}.{name}"
    weight = module.weight
    assert isinstance(weight, Tensor)
    transposed = isinstance(module, Conv1D)
    n, k = weight.shape[::-1] if transposed else weight.shape
    return WeightView(full, n, k, home[f"{full}.weight"], transposed, bias=module.bias is not None)


def _experts(path: str, block: nn.Module, home: dict[str, str]) -> tuple[WeightView, ...]:
    views = []
    for name, param in block.named_parameters():
        owner = block.get_submodule(name.rpartition(".")[0])
        if param.ndim < 3 or isinstance(owner, nn.modules.conv._ConvNd):
            continue
        full = f"{path}.{name}"
        transposed = getattr(owner, "is_transposed", None)
        if param.ndim != 3 or transposed is None:
            raise PlanError(
                f"{full}: a parameter {list(param.shape)} of {type(owner).__name__} does not say which axis is in and "
                "which is out. qexport knows stacked experts by the mark that transformers puts on their class."
            )
        a, b = param.shape[1:]
        n, k = (b, a) if transposed else (a, b)
        # Biases of experts are parameters of their own, beside the weights: they stay dense.
        views += [WeightView(f"{full}.{e}", n, k, home[full], bool(transposed), index=e) for e in range(param.shape[0])]
    return tuple(views)


def _sharing(block: nn.Module, linears: dict[str, nn.Module], call: Call, hidden: int) -> list[list[str]]:
    """Names of linears by input tensor, in execution order.

    The block runs on meta tensors; two linears share an input when they are given the same object. An operation whose
    result depends on values (a router's choice) can't run there: what was seen until then counts, and linears not seen
    stand alone.
    """
    seen: list[tuple[Tensor, list[str]]] = []  # the tensors are kept, so no identity is used twice
    runs: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            runs[name] = runs.get(name, 0) + 1
            for tensor, names in seen:
                if tensor is x:
                    if name not in names:
                        names.append(name)
                    return
            seen.append((x, [name]))

        return see

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in linears.items()]
    try:
        with torch.no_grad():
            call.run(block, torch.empty(*PROBE, hidden, device="meta", dtype=_dtype_of(block)))
    except Exception:  # noqa: BLE001  anything: a data-dependent operation has no agreed error on meta
        pass
    finally:
        for handle in handles:
            handle.remove()
    once = {n for n, count in runs.items() if count == 1}
    groups = [[n for n in names if n in once] for _, names in seen]
    alone = [[n] for n in linears if n not in once]
    return [g for g in groups if g] + alone


def _dtype_of(block: nn.Module) -> torch.dtype:
    return next(p.dtype for p in block.parameters() if p.is_floating_point())
