"""A packed checkpoint beside dense models, token by token: how fast it is, what its linears take, and what the rest.

The dense sides are the checkpoint's own weights, decoded into an ordinary model, in float32, bfloat16 and float16. Each
takes its turn beside the packed model, one in memory at a time: first both read the prompt, a few times, then they
generate greedily, a token of the one after a token of the other. For the last tokens the time within each linear is
taken too, as it runs there: on that token's input, with weights that the rest of the model has driven out of caches.
"""

import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from qexport.calibration import encode
from qexport.checkpoint import dump_json, read_json
from qexport.errors import CheckpointError, UsageError
from qexport.evaluate.latency import DTYPES, Call, Clock, Roofs, error_of, on_device, roofs, use_threads
from qexport.evaluate.record import Record, append, weights_id
from qexport.evaluate.windows import read_text
from qexport.events import Advanced, Observer, Started, ignore
from qexport.finish import RESULTS, peak_rss_bytes
from qexport.formats.kv.base import kv_json, kv_name
from qexport.formats.specs import format_options
from qexport.models import Source, load_dense, open_source
from qexport.models.auto import read_tokenizer
from qexport.models.build import quiet
from qexport.models.linears import is_linear
from qexport.pictures import Point, roofline
from qexport.runtime.cache import QuantCache, cache_of, chosen, kept
from qexport.runtime.linear import QuantLinear
from qexport.runtime.loop import fastest_loop

PROMPT, TOKENS = 512, 32
PREFILLS = 3  # times that a prompt is read, unless that takes longer than PATIENCE
PATIENCE = 20.0  # seconds
INSIDE = 8  # tokens for which the time within linears is taken
_COMPARED = 16  # tokens after which logits are compared: kernels for few rows multiply by them
_LETTERS = 40  # of text that a token takes at most

Loop = Callable[[Any, Tensor, Any], Iterator[Tensor]]


def eager(model: Any, ids: Tensor, cache: Any) -> Iterator[Tensor]:
    """The usual loop: one call of the model a token.

    A loop takes a model, a prompt, int64 [1, length], and an empty cache. It gives the logits [1, vocabulary] of the
    last position: first after the prompt, then after each token, the likeliest by the logits before.
    """
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    while True:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits[:, -1]
        yield logits
        ids = logits.argmax(-1, keepdim=True)


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is measured.

    Attributes:
        prompt: tokens that are read first; by default 512, or what the model's context has room for.
        tokens: that are then generated, but for those whose linears are timed.
        device: where.
        dtype: of the packed model's activations; by default float32 on a CPU, as stored elsewhere.
        backend: of the packed model.
        kv: its cache; None for the checkpoint's own, `"none"` for transformers'.
        kv_options: of the cache's format.
        against: a dense model in place of the decoded weights: a directory, a Hub id or a `.gguf` file.
        loop: runs the models, one beside the other.
        compiled: whether the loop that `torch.compile` makes of the packed model is measured too.
    """

    prompt: int | None = None
    tokens: int = TOKENS
    device: str = "cpu"
    dtype: str | None = None
    backend: str = "auto"
    kv: str | None = None
    kv_options: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    loop: Loop = eager
    compiled: bool = True

    def __post_init__(self) -> None:
        known = [_name(dtype) for dtype in DTYPES.values()]
        if self.dtype is not None and self.dtype not in known:
            raise UsageError(f"--dtype {self.dtype!r}: expected {', '.join(known)}.")


@dataclass(frozen=True)
class Side:
    """A model and what makes an empty cache for it."""

    model: Any
    cache: Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """What was measured of a side, in seconds.

    Attributes:
        prefill: of each reading of the prompt.
        decode: of each token after it.
        around: of each token whose linears were timed, by `eager`.
        inside: of each call of each linear then, by its path in the model.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    around: list[float] = field(default_factory=list)
    inside: dict[str, list[float]] = field(default_factory=dict)

    def __add__(self, other: "Times") -> "Times":
        names = {**self.inside, **other.inside}
        inside = {name: self.inside.get(name, []) + other.inside.get(name, []) for name in names}
        return Times(self.prefill + other.prefill, self.decode + other.decode, self.around + other.around, inside)

    def figures(self) -> dict[str, float]:
        """Medians, and the share of a token's time that passes outside the linears of the layers."""
        decode = statistics.median(self.decode)
        linears = sum(sum(seconds) for name, seconds in self.inside.items() if _in_layers(name))
        return {
            "prefill_ms": statistics.median(self.prefill) * 1e3, "decode_ms": decode * 1e3,
            "tokens_per_second": 1 / decode, "outside_share": 1 - linears / sum(self.around),
        }  # fmt: skip


def bench(
    folder: Path,
    setting: Setting,
    *,
    threads: int | None = None,
    picture: Path | None = None,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Measure a packed checkpoint beside dense models; see docs/measuring.md for what the result means.

    Args:
        folder: a directory of `qexport quantize`.
        setting: how.
        threads: of torch and the kernels; by default as many as they use.
        picture: PNG file to draw the roofline into.
        observer: is told of progress.

    Raises:
        CheckpointError: the folder is none of ours, or damaged.
        SourceError: the dense model can't be had.
        UsageError: an option that does not exist or does not fit the model.
        BackendError: the backend can't run here.
    """
    _require_packed(folder)
    if picture is not None and not picture.parent.is_dir():
        raise UsageError(f"-o {picture}: there is no folder {picture.parent}.")
    original = None if setting.against is None else open_source(setting.against, observer=observer)
    with use_threads(threads) as number, on_device(setting.device) as clock:
        best = roofs(setting.device)
        packed = _packed(folder, setting)
        ids = _prompt(folder, packed.model, setting)
        _warm(packed, ids, setting.loop)
        peak = peak_rss_bytes()
        ours, dense, insides = Times(), {}, {}
        for name, dtype in DTYPES.items():
            observer(Started(f"packed, {name}", PREFILLS + setting.tokens + INSIDE, "turn"))
            sides = (packed, _dense(folder, original, dtype, setting))
            found, theirs, facts = _pair(*sides, ids, setting, clock, _counting(f"packed, {name}", observer))
            del sides
            ours, dense[name], insides[name] = ours + found, facts, theirs
        fastest = _fastest(packed, ids, setting, ours.figures()["decode_ms"], clock, observer)
        kv = _cache_facts(packed, ids)
    ratios = {name: facts["decode_ms"] / fastest["decode_ms"] for name, facts in dense.items()}
    linears = _linears(packed.model, ours, insides, best)
    if picture is not None:
        title = f"{folder.resolve().name}, one token, {setting.device}, threads {number}"
        roofline(picture, _points(linears), read_gbps=best.read_gbps, gflops=best.gflops, title=title)
    result = {
        "directory": str(folder), "device": setting.device, "threads": number, "loop": setting.loop.__name__,
        "dtype": _name(packed.model.dtype), "prompt": ids.shape[1], "tokens": setting.tokens,
        "packed": {**ours.figures(), "weight_bytes": weight_bytes(packed.model), "peak_rss_bytes": peak},
        "fastest_loop": {**fastest, "dense_ratio": ratios}, "dense": dense, "against": setting.against, "kv": kv,
        "paths": dict(sum((Counter({line["path"]: line["count"]}) for line in linears), Counter())),
        "linears": linears, "roofs": best.to_json(), "peak_rss_bytes": peak_rss_bytes(),
        "picture": None if picture is None else str(picture),
    }  # fmt: skip
    append(folder / RESULTS, [_record(folder, result)], command=None, observer=observer)
    return result


def _record(folder: Path, result: Mapping[str, Any]) -> Record:
    """The speed for `results.jsonl`: tokens per second of the fastest loop, and what a token takes otherwise."""
    own = ("device", "dtype", "prompt", "threads")
    protocol = {key: result[key] for key in own} | {"processor": platform.processor() or platform.machine()}
    setting = {"weights": weights_id(folder), "kv": result["kv"]}
    details = {
        "path": result["fastest_loop"]["path"], "tokens": result["tokens"], "packed": result["packed"],
        "dense": result["dense"],
    }  # fmt: skip
    return Record("speed", "decode", 1e3 / result["fastest_loop"]["decode_ms"], None, protocol, setting, details)


# ---- models ------------------------------------------------------------------------------------


def _require_packed(folder: Path) -> None:
    config = read_json(folder / "config.json").get("quantization_config")
    if not (isinstance(config, dict) and config.get("quant_method") == "qexport"):
        raise CheckpointError(f"{folder}: expected a folder of `qexport quantize`, found a model that is not packed.")


def _load(folder: Path, dtype: torch.dtype | None, setting: Setting, **options: Any) -> Any:
    from qexport.integrations.transformers import load_model

    place = None if setting.device == "cpu" else setting.device
    with quiet():
        return load_model(str(folder), dtype=dtype, device_map=place, **options)


def _packed(folder: Path, setting: Setting) -> Side:
    """The checkpoint, with the cache that it is asked to read through."""
    usual = torch.float32 if setting.device == "cpu" else None
    dtype = usual if setting.dtype is None else getattr(torch, setting.dtype)
    model = _load(folder, dtype, setting, backend=setting.backend)
    wanted = chosen(model, setting.kv, setting.kv_options)
    return Side(model, _own_cache(model) if wanted is None else partial(cache_of, model, wanted.fmt, wanted.statics))


def _dense(folder: Path, original: Source | None, dtype: torch.dtype, setting: Setting) -> Side:
    """The checkpoint's weights decoded into an ordinary model of a dtype, or the model that was named instead."""
    if original is None:
        model = _load(folder, dtype, setting, backend="reference", own_cache=False).dequantize(dtype)
    else:
        model = load_dense(original, dtype=dtype, device=setting.device)
    return Side(model, _own_cache(model))


def _own_cache(model: Any) -> Callable[[], Any]:
    return partial(DynamicCache, config=model.config.get_text_config(decoder=True))


def _prompt(folder: Path, model: Any, setting: Setting) -> Tensor:
    """The beginning of the built-in text, int64 [1, prompt]; raises `UsageError` where there is no room for it."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize
    room = context - setting.tokens - INSIDE
    length = max(1, min(PROMPT, room)) if setting.prompt is None else setting.prompt
    if length > room:
        raise UsageError(
            f"--prompt {length} --tokens {setting.tokens}: with {INSIDE} more tokens, whose linears are timed, that is "
            f"more than the model's context of {context}."
        )
    tokenizer = read_tokenizer(folder, name=str(folder), advice="Copy the original's tokenizer files there.")
    ids = encode(tokenizer, read_text("builtin").content[: _LETTERS * length])[:length]
    if len(ids) < length:
        raise UsageError(f"--prompt {length}: the built-in text has {len(ids)} tokens.")
    return torch.as_tensor(ids, device=setting.device)[None]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- times -------------------------------------------------------------------------------------


def _warm(side: Side, ids: Tensor, loop: Loop) -> None:
    """The prompt and two tokens: kernels are compiled, weights laid out, memory is there."""
    run = loop(side.model, ids, side.cache())
    for _ in range(3):
        next(run)


def _counting(phase: str, observer: Observer) -> Call:
    """Tells the observer of one more step each time that it is called."""
    steps = count(1)
    return lambda: observer(Advanced(phase, next(steps)))


def _pair(
    packed: Side, dense: Side, ids: Tensor, setting: Setting, clock: Clock, advance: Call
) -> tuple[Times, Times, dict[str, Any]]:
    """The packed model and a dense one in turn: times of both, and the facts of the dense side."""
    _warm(dense, ids[:, :8], setting.loop)
    differs = error_of(
        *(next(eager(side.model, ids[:, :_COMPARED], side.cache())).double() for side in (packed, dense))
    )
    ours, theirs = in_turn([packed, dense], ids, setting, clock, advance)
    own, figures = ours.figures(), theirs.figures()
    ratios = {f"{key}_ratio": figures[f"{key}_ms"] / own[f"{key}_ms"] for key in ("prefill", "decode")}
    size = weight_bytes(dense.model)
    return ours, theirs, {**figures, **ratios, "weight_bytes": size, "logits_difference": differs}


def in_turn(sides: Sequence[Side], ids: Tensor, setting: Setting, clock: Clock, advance: Call) -> list[Times]:
    """Times of several models, each doing every step after the one before has done it."""
    times, began = [Times() for _ in sides], time.perf_counter()
    for _ in range(PREFILLS):
        runs = [setting.loop(side.model, ids, side.cache()) for side in sides]
        for run, own in zip(runs, times, strict=True):
            own.prefill.append(clock.seconds(partial(next, run)))
        advance()
        if time.perf_counter() - began > PATIENCE:
            break
    for _ in range(setting.tokens):
        for run, own in zip(runs, times, strict=True):
            own.decode.append(clock.seconds(partial(next, run)))
        advance()
    if setting.loop is not eager:  # whose models call their modules one by one
        runs = [eager(side.model, ids, side.cache()) for side in sides]
        for run in runs:
            next(run)
    for _ in range(INSIDE):
        for side, run, own in zip(sides, runs, times, strict=True):
            with noted(_linears_of(side.model), clock) as calls:
                own.around.append(clock.seconds(partial(next, run)))
            for name, spans in calls.items():
                own.inside.setdefault(name, []).extend(clock.between(*span) for span in spans)
        advance()
    return times


@contextmanager
def noted(modules: Mapping[str, nn.Module], clock: Clock) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Note the moments before and after each `forward` of modules meanwhile, by their names."""
    calls: dict[str, list[tuple[Any, Any]]] = {}
    before = {name: vars(module).get("forward") for name, module in modules.items()}

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            found = forward(*args, **kwargs)
            calls.setdefault(name, []).append((start, clock.now()))
            return found

        return run

    try:
        for name, module in modules.items():
            vars(module)["forward"] = noting(name, module.forward)
        yield calls
    finally:
        for name, module in modules.items():
            del vars(module)["forward"]
            if before[name] is not None:
                vars(module)["forward"] = before[name]


def _fastest(
    side: Side, ids: Tensor, setting: Setting, usual_ms: float, clock: Clock, observer: Observer
) -> dict[str, Any]:
    """What a token takes by the loop that is fastest here, a token of the usual loop before each, and what it is."""
    reason = None if setting.compiled else "not asked for"
    if isinstance(side.cache(), QuantCache) or kept(side.model) is not None:
        reason = "a quantized cache can't be in a graph"
    if reason is not None:
        return {"path": f"eager: {reason}", "decode_ms": usual_ms, "usual_ratio": 1.0}
    observer(Started("compiled loop", setting.tokens, "token"))
    fast = fastest_loop(side.model, ids.shape[1] + setting.tokens)
    found, usual = [fast.prefill(ids)], setting.loop(side.model, ids, side.cache())
    next(usual)
    times: tuple[list[float], list[float]] = ([], [])
    for done in range(setting.tokens):
        times[0].append(clock.seconds(partial(next, usual)))
        times[1].append(clock.seconds(lambda: found.append(fast.step(found[-1].argmax(-1, keepdim=True)))))
        observer(Advanced("compiled loop", done + 1))
    eagerly, ms = (statistics.median(own) * 1e3 for own in times)
    return {"path": fast.path, "decode_ms": ms, "usual_ratio": eagerly / ms}


# ---- linears -----------------------------------------------------------------------------------


def _linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Packed and dense linears by their path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear) or is_linear(m)}


def _in_layers(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _described(name: str, module: Any) -> dict[str, Any]:
    """What all linears of a line of the table have in common."""
    kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
    found: dict[str, Any] = {"kind": kind, "in_layers": _in_layers(name)}
    if not isinstance(module, QuantLinear):
        n, k = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
        return found | {
            "n": n,
            "k": k,
            "format": None,
            "options": {"dtype": _name(module.weight.dtype)},
            "path": "torch",
        }
    quant, spec = module.spec.input.quant, module.spec
    choice = module.float_choice if quant is not None and quant.decode_input == "float" else module.choice
    own = {"format": spec.weight.name, "options": format_options(spec.weight), "path": choice.path}
    return found | {"n": module.n, "k": module.k, **own}


def _stored(module: Any) -> int:
    """Bytes of the weight."""
    tensors = module.packed.values() if isinstance(module, QuantLinear) else (module.weight,)
    return sum(tensor.nbytes for tensor in tensors)


def _linears(model: nn.Module, ours: Times, dense: Mapping[str, Times], best: Roofs) -> list[dict[str, Any]]:
    """A line for each kind of linear that ran, in the model's order; times are medians over all calls of its kind."""
    kinds: dict[str, list[str]] = {}
    for name, module in _linears_of(model).items():
        if name in ours.inside:
            kinds.setdefault(dump_json(_described(name, module)), []).append(name)
    lines = []
    for names in kinds.values():
        modules = [model.get_submodule(name) for name in names]
        nbytes, us = sum(map(_stored, modules)) / len(modules), _median_us(ours, names)
        assert us is not None
        lines.append(
            {
                **_described(names[0], modules[0]), "count": len(names), "bytes": nbytes, "packed_us": us,
                "dense_us": {dtype: _median_us(times, names) for dtype, times in dense.items()},
                "gbps": nbytes / us / 1e3, "bandwidth_fraction": best.fraction(nbytes, us),
            }
        )  # fmt: skip
    return lines


def _median_us(times: Times, names: Sequence[str]) -> float | None:
    """Over all calls of these linears; None for a model that has none of these names."""
    found = [seconds for name in names for seconds in times.inside.get(name, ())]
    return statistics.median(found) * 1e6 if found else None


def _points(lines: Sequence[Mapping[str, Any]]) -> list[Point]:
    """A point for each kind of linear and side; operations are multiplications and additions, bytes stored ones."""
    points = []
    for line in lines:
        operations, kind = 2 * line["n"] * line["k"], line["kind"].rpartition(".")[2]
        sides = {"packed": (line["bytes"], line["packed_us"])}
        for name, us in line["dense_us"].items():
            if us is not None:
                sides[name] = (line["n"] * line["k"] * DTYPES[name].itemsize, us)
        points += [
            Point(kind, side, operations / nbytes, operations / us / 1e3) for side, (nbytes, us) in sides.items()
        ]
    return points


def _cache_facts(side: Side, ids: Tensor) -> dict[str, Any] | None:
    """What the packed model's quantized cache holds after the prompt and a token, and how attention read it."""
    cache = side.cache()
    if not isinstance(cache, QuantCache):
        return None
    run = eager(side.model, ids, cache)
    for _ in range(2):
        next(run)
    return {
        "name": kv_name(cache.fmt), **kv_json(cache.fmt), "path": cache.path, "tokens": cache.get_seq_length(),
        "bytes": cache.nbytes, "fp16_bytes": cache.fp16_bytes,
    }  # fmt: skip
