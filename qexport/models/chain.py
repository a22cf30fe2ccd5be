"""The decoder blocks of a model, found by structure, and running a model with its blocks replaced."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qexport.errors import PlanError

BlockCall = Callable[..., Any]

# Lengths of the tuples that blocks return; 0 is a tensor.
_ENTRIES = (0, 1, 2, 3)


class Stop(Exception):  # noqa: N818  no error: it ends a forward pass that has shown what was wanted
    """Ends a forward pass early; `value` is what it was run for."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class _Broken(Exception):  # noqa: N818
    """A block was not given what the block before it returned; `part`: but an entry of that tensor."""

    def __init__(self, text: str, *, part: bool) -> None:
        super().__init__(text)
        self.part = part


@dataclass(frozen=True)
class _Problem:
    """Why an attempt to run a model with its blocks replaced failed, after `blocks` of them."""

    text: str
    blocks: int
    part: bool = False


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden state."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: bool  # the hidden state comes as `hidden_states=`
    entries: int  # the block returns a tuple of so many, the hidden state first; 0 for the hidden state alone

    def output(self, hidden: Tensor) -> Any:
        """A hidden state in the form in which the model expects it from the block."""
        return (hidden, *[None] * (self.entries - 1)) if self.entries else hidden

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for a hidden state [b, L, d]."""
        if self.keyword:
            out = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple | list) else out


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks: the heaviest `ModuleList` of one class in the text decoder.

    Raises:
        PlanError: there is no such list, or its blocks are of several classes.
    """
    decoder = model.get_decoder()
    root = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise PlanError(
            f"{type(model).__name__}: no list of decoder blocks in {root or 'the model'}; its children are "
            f"{', '.join(n for n, _ in decoder.named_children())}. qexport needs one nn.ModuleList of blocks."
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    path = f"{root}.{name}" if root else name
    kinds = {type(b).__name__ for b in blocks}
    if len(kinds) > 1:
        raise PlanError(
            f"{type(model).__name__}: the blocks {path}.* are of several classes ({', '.join(sorted(kinds))}). "
            "qexport streams decoders whose blocks are all of one class."
        )
    return path, blocks


def head_module(model: PreTrainedModel) -> nn.Module | None:
    """The output projection."""
    head: nn.Module | None = model.get_output_embeddings()
    return head


@contextmanager
def replaced(blocks: Sequence[nn.Module], calls: Sequence[BlockCall]) -> Iterator[None]:
    """Let the blocks run other functions for a while; their attributes, which some models read, stay visible."""
    for block, call in zip(blocks, calls, strict=True):
        block.__dict__["forward"] = call
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def forward(model: PreTrainedModel, tokens: Tensor) -> Any:
    """One forward pass over whole sequences, without cache, gradients or padding."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False)


def record(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor) -> list[Call]:
    """Run everything but the blocks and note how each block is called.

    Args:
        model: embedding, rotary tables and norms must be usable on the device of `tokens`.
        blocks: in the order of the list.
        tokens: int64 [b, L].

    Returns:
        One call for each block.

    Raises:
        PlanError: the blocks do not form a chain, each called once with the output of the one before.
    """
    # Blocks return a tensor, or a tuple that begins with it: only the model's own code tells which, by what it does.
    problems = []
    for entries in _ENTRIES:
        calls, problem = _attempt(model, blocks, tokens, entries)
        if problem is None:
            return calls
        problems.append(problem)
    # The attempt that got furthest is the one to tell of; taking an entry of a tensor only means that it was no tuple.
    real = max(problems, key=lambda p: (p.blocks, not p.part))
    raise PlanError(f"{type(model).__name__}: {real.text} Such a decoder can't be streamed.")


def _attempt(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, entries: int
) -> tuple[list[Call], _Problem | None]:
    seen: list[int] = []
    calls: list[Call] = []
    last: list[Tensor] = []

    def stub(index: int) -> BlockCall:
        def call(*args: Any, **kwargs: Any) -> Any:
            keyword = "hidden_states" in kwargs
            hidden = kwargs.pop("hidden_states") if keyword else args[0]
            if last and hidden is not last[-1]:
                part = isinstance(hidden, Tensor) and hidden.shape == last[-1].shape[1:]
                raise _Broken(f"block {index} does not get the output of block {index - 1} as it is.", part=part)
            seen.append(index)
            calls.append(Call(args if keyword else args[1:], kwargs, keyword, entries))
            last.append(hidden.clone())
            return calls[-1].output(last[-1])

        return call

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise Stop(args[0])

    head = head_module(model)
    handle = head.register_forward_pre_hook(stop) if head is not None else None
    try:
        with replaced(blocks, [stub(i) for i in range(len(blocks))]):
            forward(model, tokens)
    except Stop:
        pass
    except _Broken as broken:
        return [], _Problem(str(broken), len(seen), broken.part)
    except Exception as error:  # noqa: BLE001  the code of any model, run in a way it was not written for
        reason = " ".join(str(error).split())[:200]
        text = f"it does not run with its blocks replaced ({type(error).__name__}: {reason})."
        return [], _Problem(text, len(seen))
    finally:
        if handle is not None:
            handle.remove()
    if seen != list(range(len(blocks))):
        return [], _Problem(f"the blocks run in the order {seen[:8]}, expected each once, in order.", len(seen))
    return calls, None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
