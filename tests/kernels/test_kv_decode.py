"""The three gates of attention over packed caches by Triton: it is right, it compiles well, and it moves few bytes."""

from dataclasses import replace

import pytest

from qexport.kernels.kv import _decode as decode
from tests.kernels.kv import Case, Shape, existing, traffic
from tests.kernels.offline import TARGETS, compare, gate, kinds_of, measure

EVERY = tuple(TARGETS)
NVIDIA = ("sm_80", "sm_90")
SMALL = [
    *(Case("kivi", {"bits": b}, dim=d) for b in range(2, 9) for d in (64, 20)),
    *(Case("kivi", {"bits": 4}, heads=h, queries=g, dim=d, tokens=(32, 40), batch=2, room=2)
      for h, g, d in ((1, 1, 8), (3, 4, 80), (1, 3, 64))),
    *(Case("kivi", {"bits": 2}, dtype=dtype, tokens=(160, 170), recent=9) for dtype in ("float16", "bfloat16")),
    *(Case(name, {"bits": 3}, tokens=(50, 50), skip=k, batch=2, room=3, heads=3, dim=32) for name in ("sdr", "nuq")
      for k in (0, 1, 49)),
    *(Case("sdr", {"bits": b, "group_size": g}, dim=d) for b in (2, 4, 7) for g, d in ((16, 64), (8, 20))),
    *(Case("nuq", {"bits": b, "qnorm": b == 2}, turned=t, neighbours=n, tokens=(40, 40), sinks=1, dim=d)
      for b in (2, 3, 4) for t, n, d in ((64, False, 64), (16, True, 20))),
    *(Case("nuq", {"per_channel": p, "outlier_rate": r}, tokens=(3, 3), recent=0, sinks=s) for p in (True, False)
      for r, s in ((0, 0), (0.1, 5))),
]  # fmt: skip
LONG = [  # whole tiles, and what is left of them
    *(Case("kivi", {"bits": b}, dim=d, queries=g, tokens=(224, 219), recent=3, heads=1, dtype="float16")
      for b, d, g in ((2, 128, 1), (3, 64, 4), (4, 128, 8), (5, 64, 3), (6, 64, 4), (8, 64, 1))),
    *(Case("kivi", {"bits": 4, "group_size": size}, tokens=(384, 400), skip=skip, batch=2, room=1, dtype="float16")
      for size, skip in ((16, 0), (32, 33), (64, 1), (128, 100))),
    Case("kivi", {"bits": 4, "group_size": 48, "residual_window": 0}, tokens=(144, 140)),
    Case("kivi", {"bits": 4}, tokens=(32, 300), heads=1),
    Case("kivi", {"bits": 4, "group_size": 16}, tokens=(160, 150), skip=17, heads=1),
    *(Case("kivi", {"bits": 4}, dtype=dtype, tokens=(320, 330), dim=128, heads=1) for dtype in ("float16", "bfloat16")),
    *(Case("sdr", {"bits": b, "group_size": g}, dim=d, tokens=(210, 200), batch=2, room=4, skip=k, dtype=dtype)
      for b, g, d, k, dtype in ((4, 16, 64, 0, "float16"), (3, 32, 32, 7, "float32"), (2, 16, 128, 0, "float32"),
                                (5, 16, 64, 0, "float32"))),
    *(Case("nuq", {"bits": b}, dim=d, turned=t, neighbours=n, tokens=(70, 68), sinks=s, skip=k, batch=2, room=2)
      for b, d, t, n, s, k in ((4, 64, 64, False, 3, 0), (3, 64, 64, False, 0, 5), (2, 32, 32, False, 0, 0),
                               (4, 32, 32, True, 1, 0), (4, 32, 16, False, 1, 0))),
    *(Case("nuq", {"bits": 3, "per_channel": False, "outlier_rate": r}, turned=64, tokens=(40, 50), dtype="float16")
      for r in (0, 0.05)),
]  # fmt: skip
WIDE = [
    Case("kivi", {"bits": 4}, tokens=(512, 512), recent=0),
    Case("kivi", {"bits": 3}, tokens=(512, 512), recent=0),
    Case("sdr", {}, tokens=(256, 256), recent=0),
    Case("nuq", {"bits": 4}, tokens=(256, 256), recent=0, turned=64),
]


def _check(got: dict) -> None:
    assert got["nan"] == 0, f"{got['nan']} outputs were not written"
    assert got["error"] <= got["tolerance"]
    assert got.get("outside", 0) == 0, f"{got['outside']} addresses outside the tensors"
    assert got["same"], "two runs differ"


@pytest.mark.parametrize("case", existing(SMALL + LONG), ids=str)
def test_attention_is_that_of_what_is_decoded(worker, case):
    _check(worker.ask(case.to_json()))


@pytest.mark.parametrize("case", existing(WIDE), ids=str)
def test_programs_read_about_the_stored_bytes(interpreter, case):
    got = interpreter.ask(case.to_json())
    assert got["read_bits"] <= 1.1 * got["stored_bits"]
    assert got["read_bits"] >= 0.9 * got["stored_bits"], "the count misses loads"


def test_gate_catches_a_result_that_is_not_joined(interpreter):
    case = Case("kivi", {"bits": 4}, broken="no join")
    assert interpreter.ask(case.to_json())["nan"] > 0


# ---- compiled for GPUs that are not there ------------------------------------------------------


def _shape(name: str, bits: int, dim: int = 128, dtype: str = "float16", queries: int = 4, **options: object) -> Shape:
    return Shape(name, (("bits", bits), *options.items()), dim, queries=queries, dtype=dtype)


# One a kernel and width, and the usual one for all targets.
FEW = [
    (_shape("kivi", 4), EVERY),
    *((shape, ("sm_90",)) for shape in (_shape("kivi", 2), _shape("sdr", 4), _shape("nuq", 4, 64))),
]
REST = [
    *((_shape("kivi", bits, 64), EVERY) for bits in (2, 4)),
    *((shape, ("sm_80", "gfx942")) for shape in (_shape("kivi", 2), _shape("sdr", 4))),
    (_shape("nuq", 4, 64), ("sm_80",)),
    *((_shape("kivi", bits), EVERY) for bits in (3, 8)),
    (_shape("sdr", 4, 64), EVERY),
    *((_shape("nuq", bits, 64, qnorm=bits == 2), NVIDIA) for bits in (2, 3)),
    (_shape("nuq", 4, 64, pre_rope=False), NVIDIA),
    *((_shape("nuq", bits, 128, qnorm=bits == 2), NVIDIA) for bits in (2, 3, 4)),
    *((_shape(name, 4, dim, dtype), EVERY) for name in ("kivi", "sdr") for dim in (64, 128)
      for dtype in ("float32", "bfloat16")),
    *((_shape("nuq", 4, dim, dtype), NVIDIA) for dim in (64, 128) for dtype in ("float32", "bfloat16")),
    *((_shape("kivi", 4, queries=queries), EVERY) for queries in (1, 8)),
    (_shape("kivi", 4, 80), EVERY),  # not cut into tiles
]  # fmt: skip
ALL = [(shape, targets) for shape, targets in FEW + REST]


def _pairs(cases):
    return [pytest.param(shape, target, id=f"{shape}-{target}") for shape, targets in cases for target in targets]


def _compare(shape: Shape, target: str) -> None:
    for kernel, found in measure(shape, target).items():
        registers = 255 if shape.format == "nuq" and kernel != "_join" else None  # tables, outliers and rotations
        gate(found, kernel, whole_words=False, registers=registers)
        compare(shape, target, kernel, found)


@pytest.mark.parametrize(("shape", "target"), _pairs(FEW))
def test_compiles_without_spills(shape, target):
    _compare(shape, target)


@pytest.mark.gates
@pytest.mark.parametrize(("shape", "target"), _pairs(REST))
def test_compiles_without_spills_in_every_configuration(shape, target):
    _compare(shape, target)


@pytest.mark.parametrize("shape", [shape for shape, _ in ALL], ids=str)
def test_moves_at_most_a_tenth_more_than_the_stored_bits(shape):
    moved = traffic(shape)
    assert moved["weights"] == moved["stored"]
    # Rotations are one for all heads, and not counted as bits of any.
    assert moved["weights"] + moved["other"] <= 1.1 * moved["stored"]


@pytest.mark.parametrize("name", ["kivi", "sdr", "nuq"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_launch_of_usual_steps_is_compiled(name, dtype):
    known = {kind for shape, _ in ALL if shape.format == name for kind in kinds_of(shape)}
    for dim in (64, 128):
        for tokens, heads in ((96, 2), (2048, 3), (32768, 8), (131072, 8)):
            shape = replace(_shape(name, 4, dim, dtype), tokens=tokens // 96 * 96, heads=heads)
            assert kinds_of(shape) <= known, shape


def test_what_does_not_fit_is_refused():
    assert decode.supports("kivi", 128) is None
    assert "up to 128" in decode.supports("kivi", 256)
    assert decode.supports("nuq", 128) is None
    assert "up to 128" in decode.supports("nuq", 256)
