"""What a job will take, from shapes alone: bytes, memory and time."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qexport import kvfile
from qexport.methods.base import Effort
from qexport.models import Block, LinearGroup
from qexport.plan import (
    CACHE_BATCH_TOKENS,
    MICRO_BATCH_TOKENS,
    ModulePlan,
    Plan,
    dense_tensors,
    method_for,
    micro_batch,
    stored_parameters,
)
from qexport.statistics import Hessian


@dataclass(frozen=True)
class Prediction:
    """Sizes are exact but for data-dependent extents; memory and time are estimates.

    Attributes:
        bits_per_weight: of the quantized modules, all their tensors counted.
        bits_per_parameter: of all parameters, those of a head that was untied counted too.
        nbytes: of the safetensors files' tensors.
        peak_rss_bytes: resident memory of the job.
        seconds: of the job, on this machine.
    """

    bits_per_weight: float
    bits_per_parameter: float
    nbytes: int
    peak_rss_bytes: int
    seconds: float


def predict(plan: Plan, *, flops_per_second: float | None = None) -> Prediction:
    """Size, memory and time of a job, from shapes alone.

    Args:
        plan: the plan.
        flops_per_second: float32 matrix product speed; measured in a moment when left out.
    """
    quantized = sum(m.nbytes for m in plan.modules.values())
    weights = sum(m.view.n * m.view.k for m in plan.modules.values())
    total = quantized + sum(math.prod(shape) * dtype.itemsize for dtype, shape in dense_tensors(plan).values())
    return Prediction(
        bits_per_weight=8 * quantized / weights,
        bits_per_parameter=8 * total / stored_parameters(plan),
        nbytes=total,
        peak_rss_bytes=_peak(plan),
        seconds=_seconds(plan, flops_per_second or _matmul_speed()),
    )


def predict_cache(plan: Plan, *, flops_per_second: float | None = None) -> dict[str, Any] | None:
    """What a plan's cache stores, and what calibrating it takes; None if there is no quantized cache.

    Returns:
        `kvfile.figures`; `options` of the format; `context`, bytes at the model's context, or None if it has none;
        `calibration`, None or `{peak_rss_bytes, seconds}` of the pass, made after the weights are packed.
    """
    if plan.kv is None:
        return None
    context, windows = plan.anatomy.context, {layer: own.window for layer, own in plan.attention.items()}
    return {
        **kvfile.figures(plan.kv, plan.heads),
        "options": kvfile.options_of(plan.kv),
        "context": None if context is None else kvfile.at_length(plan.kv, plan.heads, windows, context),
        "calibration": _cache_pass(plan, flops_per_second or _matmul_speed()) if plan.kv_calibration else None,
    }


def _cache_pass(plan: Plan, speed: float) -> dict[str, float]:
    """Memory and time of a pass through the packed model, whose weights are decoded each time they are met."""
    assert plan.kv is not None
    assert plan.kv_calibration is not None
    spec, method, speed = plan.kv_calibration, method_for(plan.kv), speed * _REACHED
    tokens, weights = spec.samples * spec.seqlen, sum(m.view.n * m.view.k for m in plan.modules.values())
    rows = max(CACHE_BATCH_TOKENS // spec.seqlen, 1)
    # With gradients: forwards, layer by layer forwards again, and backwards to the hidden states alone.
    runs = sum(3 if gradients else 1 for gradients in method.passes.values())
    decoding = weights * _DECODE
    seconds = _START + runs * (2 * weights * tokens / speed + -(-spec.samples // rows) * decoding)
    if plan.calibration is None:  # else the tokens of the weights' calibration are used
        written = spec.seqlen * decoding if spec.source == "self" else 0.0
        seconds += spec.predicted_seconds(plan.anatomy, speed) + written
    batch, anatomy = min(rows * spec.seqlen, tokens), plan.anatomy
    wide = max((sum(v.n for v in g.members) + g.k for g in _groups(plan)), default=0)
    activations = 4 * batch * (anatomy.hidden * (len(anatomy.blocks) + 6) + 6 * wide + 4 * anatomy.vocab)
    scores = 16 * rows * spec.seqlen**2 * max(anatomy.hidden // dim for _, dim in plan.heads.values())
    states = sum(
        t.nbytes for count, dim in plan.heads.values() for t in method.start(plan.kv, count * dim, tokens).values()
    )
    largest = 8 * max(m.view.n * m.view.k for m in plan.modules.values())
    packed = predict(plan, flops_per_second=speed).nbytes
    base = _resident_now() + _LOADING
    return {"peak_rss_bytes": base + packed + largest + activations + scores + 2 * states, "seconds": seconds}


def _block_floats(plan: Plan) -> int:
    """Largest number of weights of a decoder layer."""
    return max(_numel_of(block) for block in plan.anatomy.blocks)


def _numel_of(block: Block) -> int:
    return sum(v.n * v.k for v in block.views)


def _peak(plan: Plan) -> int:
    """Resident bytes: what is resident now, plus the larger of the phases' working sets, all in float32."""
    base = _resident_now()
    largest = max(m.view.n * m.view.k for m in plan.modules.values())
    if plan.calibration is None:
        return base + 4 * 8 * largest
    outer = max((m.view.n * m.view.k for m in (plan.embedding, plan.head) if m is not None), default=0)
    groups = _groups(plan)
    tokens = plan.calibration.samples * plan.calibration.seqlen
    hidden = 4 * tokens * plan.anatomy.hidden
    inputs = max((g.members[0].k for g in groups), default=0)
    hessians = max(
        sum(g.members[0].k ** 2 for g in block.groups if Hessian in plan.needs(g)) for block in plan.anatomy.blocks
    )
    batch = min(MICRO_BATCH_TOKENS, tokens) * (inputs * 4 + plan.anatomy.hidden * 6)
    copies = 1 if plan.transforms else 0  # of a Hessian and of weights, as transforms leave them
    solve = max(
        ((3 + copies) * g.k**2 + (5 + copies) * sum(v.n for v in g.members) * g.k for g in groups if plan.needs(g)),
        default=0,
    )
    if plan.block.passes:  # targets; all weights of a layer, decoded, with gradients; activations of one sequence
        wide = max((sum(v.n for v in g.members) for g in groups), default=0)
        solve += _block_floats(plan) * 8 + plan.calibration.seqlen * (8 * wide + 24 * plan.anatomy.hidden)
        hidden *= 2
    copies = 2 if any(t.variants for t in plan.transforms.values()) else 1  # of a layer, while variants are tried
    stream = hidden + 4 * (hessians + max(copies * _block_floats(plan) + batch, solve))
    embedding = max((math.prod(s) for _, s in plan.anatomy.parameters.values()), default=0)
    making = plan.calibration.predicted_bytes(plan.anatomy)
    return base + plan.calibration.tokenizing_bytes() + max(stream, hidden + 4 * (embedding + 8 * outer), making)


def _resident_now() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 600 << 20


_REACHED = 0.66  # of the speed of one product of small matrices, by the products of a job
# Seconds, set by hand so that jobs on one server's two cores come out about right: an elementwise operation on a
# weight; the launch of an operation; packing a weight, decoding and writing it; everything before the first layer.
_TOUCH, _CALL, _PACK, _START = 1.5e-10, 4e-6, 5e-8, 2.0
_DECODE = 2e-9  # a weight, by the reference path
_LOADING = 120 << 20  # bytes of what loading a model imports


def _seconds(plan: Plan, speed: float) -> float:
    speed *= _REACHED
    weights = sum(m.view.n * m.view.k for m in plan.modules.values())
    effort = sum(_efforts(plan), Effort())
    seconds = _START + weights * _PACK + effort.flops / speed + effort.touched * _TOUCH + effort.calls * _CALL
    if plan.calibration is None:
        return seconds
    tokens = plan.calibration.samples * plan.calibration.seqlen
    hessians = sum(g.members[0].k ** 2 for b in plan.anatomy.blocks for g in b.groups if Hessian in plan.needs(g))
    looked_up = 0 if plan.embedding is None else plan.embedding.view.n * plan.embedding.view.k
    passes = 2 * tokens * (2 * (weights - looked_up) + 0.6 * hessians)
    judges = min(max((t.judges for t in plan.transforms.values()), default=1), micro_batch(plan))
    trials = sum(t.trials for t in plan.transforms.values())
    ways = math.prod(len(t.variants) or 1 for t in plan.transforms.values())
    tuned = plan.block.passes * len(plan.anatomy.blocks)
    if tuned:
        mean = sum(_numel_of(b) for b in plan.anatomy.blocks) / len(plan.anatomy.blocks)
        passes += 2 * tuned * plan.calibration.seqlen * mean * 3
        seconds += tuned * mean * 80 * _TOUCH
    if ways > 1:  # the stream goes through the model once more, and each layer once for every way
        passes *= 2
    for block in plan.anatomy.blocks:
        size, whole = _numel_of(block), ways if ways > 1 else 0
        passes += 2 * (trials * len(block.groups) + whole) * judges * plan.calibration.seqlen * size
        seconds += (trials + whole) * size * 15 * _TOUCH
    return seconds + passes / speed + plan.calibration.predicted_seconds(plan.anatomy, speed)


def _efforts(plan: Plan) -> Iterator[Effort]:
    """Of everything that is solved together: members of a group with one method and one format."""
    together: dict[tuple[Any, ...], list[ModulePlan]] = {}
    home = {v.name: number for number, group in enumerate(_groups(plan)) for v in group.members}
    for name, planned in plan.modules.items():
        together.setdefault((home.get(name, name), planned.method, planned.spec.weight), []).append(planned)
    for members in together.values():
        first = members[0]
        yield first.method.effort(first.spec.weight, sum(m.view.n for m in members), first.view.k)


def _groups(plan: Plan) -> list[LinearGroup]:
    return [group for block in plan.anatomy.blocks for group in block.groups]


def _matmul_speed() -> float:
    """Floating-point operations a second of a float32 product; the best of a few, as other programs may run too."""
    a = torch.ones(512, 512)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / max(best, 1e-6)
