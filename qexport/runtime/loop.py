"""Writing one token after the other: a cache of fixed length and one compiled graph a token, where that can be had.

    loop = fastest_loop(model, 512)
    ids = loop.generate(prompt, 100)
    print(loop.path)

`model.generate` decides anew for each token what is to be done. A loop decides once: all shapes are fixed, so
`torch.compile` makes one graph of the whole model, and nothing is checked before it runs. So a loop fits the model as
it is: one that was changed, moved or cast needs a new loop.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from qexport.errors import UsageError
from qexport.runtime import joining
from qexport.runtime.cache import kept, kv_cache

_MULTIPLE = 64  # tokens that a cache of fixed length is rounded up to
_WARM, _TIMED = 2, 5  # tokens of each loop, before times count and while they do


class Loop:
    """A causal language model that continues a batch of token ids.

    Attributes:
        model: of transformers, in evaluation mode.
        length: tokens that its cache holds.
        path: `"compiled (inductor)"`, or `"eager: "` and why; `fastest_loop` adds times.
        used: tokens that are in the cache.
    """

    def __init__(self, model: Any, length: int, path: str, graph: "Graph | None") -> None:
        self.model, self.length, self.path, self.used = model, length, path, 0
        self._graph = graph
        # The head of a long prompt costs as much as its layers, and only the last token's logits are asked for.
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        self._cache = self._empty()

    @classmethod
    def of(cls, model: Any, max_tokens: int, *, batch: int = 1, compiled: bool = True) -> "Loop":
        """A loop for prompts and answers of up to so many tokens; to compile takes seconds to a minute.

        Args:
            model: a causal language model of transformers.
            max_tokens: of prompt and answer together. Attention reads a cache of fixed length whole, so ask for little
                more than is needed.
            batch: sequences that are continued together, of equal length.
            compiled: False keeps to eager calls.
        """
        length = -(-max_tokens // _MULTIPLE) * _MULTIPLE
        cache = StaticCache(config=model.config, max_cache_len=length)
        reason = _obstacle(model, cache) if compiled else "asked for"
        if reason is None:
            graph = Graph(model, cache)
            reason = graph.warm(batch)
            if reason is None:
                return cls(model, length, graph.path, graph)
        return cls(model, max_tokens, f"eager: {reason}", None)

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache, self.used = self._empty(), 0

    @torch.inference_mode()
    def rewind(self, count: int) -> int:
        """Forget all tokens behind the first `count`; returns how many are left: 0 where layers can't go back so far.

        What a quantized cache has packed stays packed.
        """
        if count and self._went_back(self.used - count):
            self.used = count
        else:
            self.reset()
        return self.used

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Read ids, int64 [batch, t], behind those read before; logits of the last one, [batch, vocabulary]."""
        self._take(ids)
        return self._eagerly(ids)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Read one token of each sequence, int64 [batch, 1]; its logits, [batch, vocabulary]."""
        self._take(ids)
        return self._eagerly(ids) if self._graph is None else self._graph(ids)

    def generate(self, ids: Tensor, count: int, *, stop: Collection[int] = ()) -> Tensor:
        """The likeliest token each time, int64 [batch, up to count]; a sequence alone ends behind a token of `stop`."""
        self.reset()
        logits, found = self.prefill(ids), []
        while True:
            found.append(logits.argmax(-1, keepdim=True))
            if len(found) == count or (stop and ids.shape[0] == 1 and int(found[-1]) in stop):
                return torch.cat(found, 1)
            logits = self.step(found[-1])

    @torch.inference_mode()
    def _empty(self) -> Any:
        if self._graph is not None:
            self._graph.cache.reset()
            return self._graph.cache
        return DynamicCache(config=self.model.config) if kept(self.model) is None else kv_cache(self.model)

    def _went_back(self, tokens: int) -> bool:
        """Take the last tokens out of the cache, where it can be done."""
        if self._graph is not None:
            for layer in self._cache.layers:
                layer.cumulative_length.sub_(tokens)
            return True
        if not tokens or not self._cache.is_croppable:
            return not tokens
        try:
            self._cache.crop(-tokens)
        except RuntimeError:  # a window has left behind what would be seen again
            return False
        return True

    def _take(self, ids: Tensor) -> None:
        if self.used + ids.shape[1] > self.length:
            raise UsageError(
                f"this loop holds {self.length} tokens: {self.used} are in it, and {ids.shape[1]} more were given. "
                "Make it with a larger max_tokens."
            )
        self.used += ids.shape[1]

    def _eagerly(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last).logits
        return logits[:, -1]


class Graph:
    """One compiled graph: a token of each sequence in, its logits out, keys and values into a cache of fixed length."""

    def __init__(self, model: Any, cache: StaticCache) -> None:
        self.model, self.cache = model, cache
        on_gpu = model.device.type == "cuda"
        self.path = "compiled (inductor, CUDA graphs)" if on_gpu else "compiled (inductor)"
        options: dict[str, Any] = {"triton.cudagraphs": True} if on_gpu else {"cpp.threads": torch.get_num_threads()}
        # All tensors that a graph meets are known before, and looking at their strides takes a call for each.
        options |= {"post_grad_custom_pre_pass": _joining(), "size_asserts": False, "alignment_asserts": False}
        self._options, self._marks = options, on_gpu
        self._run: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def warm(self, batch: int) -> str | None:
        """Compile; why that can't be done, or None. The cache is empty afterwards."""
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.model.device)
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        calls: list[_Call] = []
        step = torch.compile(
            _step_of(self.model, self.cache),
            fullgraph=True,
            dynamic=False,
            backend=partial(_inductor, self._options, calls),
        )
        try:
            found = [step(own) for own in (ids, ids.clone())]
        except RuntimeError as error:  # of which torch's own about compiling are kinds
            return f"can't be compiled ({str(error).strip().splitlines()[0]})"
        run = _straight(calls, found)
        calls.clear()
        if run is None:
            return "a step does more than its graph"
        self._run = run
        self.cache.reset()
        return None

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] of ids [batch, 1]."""
        if self._marks:  # without which CUDA graphs of two tokens would be one
            torch.compiler.cudagraph_mark_step_begin()
        return self._run(ids)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of what inductor made: its arguments are the ids, parameters, modules' numbers and the cache's tensors."""

    inner: Callable[..., Any]
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]


def _inductor(
    options: dict[str, Any], calls: list[_Call], graph: torch.fx.GraphModule, inputs: list[Any]
) -> Callable[..., Any]:
    """A backend of `torch.compile`: inductor with options; calls of what it makes are noted."""
    from torch._inductor.compile_fx import compile_fx

    inner: Any = compile_fx(graph, inputs, config_patches=options)

    def run(*arguments: Any) -> Any:
        results = inner(*arguments)
        calls.append(_Call(inner, arguments, tuple(results)))
        return results

    return run


def _straight(calls: list[_Call], found: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """The graph alone, without what collects its hundreds of arguments anew for each token; None if a step is more.

    No guard runs either: nothing that they look at changes while a loop fits its model.

    Args:
        calls: of two steps, with different tensors of ids.
        found: what the steps gave.
    """
    if len(calls) != 2 or any(len(c.results) != 1 or c.results[0] is not y for c, y in zip(calls, found, strict=True)):
        return None
    one, two = calls
    own = [i for i, pair in enumerate(zip(one.arguments, two.arguments, strict=True)) if pair[0] is not pair[1]]
    if len(own) != 1 or one.inner is not two.inner:
        return None
    before, behind, inner = one.arguments[: own[0]], one.arguments[own[0] + 1 :], one.inner

    def run(ids: Tensor) -> Tensor:
        logits: Tensor = inner(*before, ids, *behind)[0]
        return logits

    return run


def fastest_loop(model: Any, max_tokens: int, *, batch: int = 1) -> Loop:
    """The compiled loop or the eager one, whichever takes less time a token here; `path` says both times."""
    loops = [Loop.of(model, max_tokens, batch=batch), Loop.of(model, max_tokens, batch=batch, compiled=False)]
    if loops[0].path.startswith("eager"):
        return loops[0]
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    times: list[list[float]] = [[] for _ in loops]
    for i in range(min(_WARM + _TIMED, max_tokens)):
        for loop, own in zip(loops, times, strict=True):
            start = time.perf_counter()
            int(loop.step(ids).argmax())  # waits until it is done
            own.extend([(time.perf_counter() - start) * 1e3] if i >= _WARM else [])
    compiled, eager = (statistics.median(own) if own else 0.0 for own in times)
    best = loops[0] if compiled <= eager else loops[1]
    best.path = f"{best.path.split(':')[0]}: {compiled:.1f} ms a token compiled, {eager:.1f} eager"
    best.reset()
    return best


def _obstacle(model: Any, cache: StaticCache) -> str | None:
    """Why a model should not be compiled, or None."""
    if kept(model) is not None:
        return "the checkpoint's quantized cache can't be in a graph"
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return "not all layers attend to all tokens; the others count tokens in Python, where a graph does not look"
    return None


def _joining() -> Any:
    """`join` as inductor wants it, which keys what it has compiled by the pass's source."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Joining(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            joining.join(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((joining.__file__,))

    return Joining()


def _step_of(model: Any, cache: StaticCache) -> Callable[[Tensor], Tensor]:
    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits[:, -1]

    # Graphs are kept with the code that they were made of, a few each: so a code for each.
    step.__code__ = step.__code__.replace(co_name=f"step_{id(cache)}")
    return step
