"""Compile launches for GPUs that are not there, and read registers, spills, loads and instructions off the result.

Needs a process without TRITON_INTERPRET. `python -m tests.kernels.offline [FORMAT ...]` measures all cases, or those of
some formats, and writes `static.json`; all figures in it are static, never timed.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qexport import plugins, schema
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.inputs.base import make_input
from qexport.kernels import _gemm, _int_gemm
from tests.kernels import kv
from tests.kernels.kept import CACHES, WEIGHTS, compiled, kept
from tests.kernels.machine import report

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PRODUCTS = ("_gemv", "_gemm", "_decode", "int_product", "_packed", "_part", "_join")
MAIN = ("_gemv", "_gemm", "_decode", "int_product", "_packed")  # that do nearly all of the work
STORED = Path(__file__).with_name("static.json")
_DTYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.int16: "*i16", torch.uint16: "*u16", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A product to compile."""

    format: str
    options: tuple[tuple[str, Any], ...]
    m: int = 1
    n: int = 4096
    k: int = 4096
    dtype: torch.dtype = torch.float16
    input: tuple[tuple[str, Any], ...] = ()  # name and options of how the input is rounded, if it is
    config: _gemm.Config | None = None  # another launch than the usual one

    def __str__(self) -> str:
        spell = lambda options: "-".join(f"{key}{value}" for key, value in options)  # noqa: E731
        kind = f"{self.kind}-{spell(self.input)}-" if self.input else ""
        dtype = str(self.dtype).removeprefix("torch.")
        launch = "-" + "x".join(map(str, astuple(self.config))) if self.config else ""
        return f"{kind}{self.format}-{spell(self.options)}-m{self.m}-n{self.n}-k{self.k}-{dtype}{launch}"

    @property
    def kind(self) -> str:
        """What a name starts with."""
        return "integers" if self.input else self.format


def _integers_of(shape: Shape) -> tuple[list[_gemm.Launch], Any, tuple[torch.Tensor, ...], float]:
    """As `launches_of`, for an input that is rounded."""
    given = dict(shape.input)
    fmt = plugins.get("formats", shape.format)(**dict(shape.options))
    spec = LinearSpec(fmt, InputSpec(quant=make_input(given.pop("name"), given)))
    n, k = shape.n, shape.k
    assert _int_gemm.supports(spec, n, k) is None
    extents = spec.expected_extents(n, k)
    layout = spec.layout(n, k)
    packed = {name: torch.zeros(schema.bind(f, extents), dtype=f.dtype) for name, f in layout.items()}
    weights = tuple(t.to("meta") for t in _int_gemm.repack(spec, packed, n, k))
    x = torch.empty((shape.m, k), dtype=shape.dtype, device="meta")
    y = x.new_empty((shape.m, n))
    found = _int_gemm.launches(spec, x, weights, {name: t.to("meta") for name, t in packed.items()}, y)
    constants = found[-1].constants
    config = _int_gemm.Config(constants["BM"], constants["BN"], 32 * found[-1].warps, constants["STAGES"], 0)
    return found, config, weights, 8 * schema.nbytes(layout, extents) / (n * k)


def launches_of(shape: Shape) -> tuple[list[_gemm.Launch], Any, tuple[torch.Tensor, ...], float]:
    """Launches of a product on meta tensors, its configuration, its repacked weights and its stored bits per weight."""
    if shape.input:
        return _integers_of(shape)
    fmt = plugins.get("formats", shape.format)(**dict(shape.options))
    kernel = plugins.get("kernels", shape.format)
    n, k = shape.n, shape.k
    extents = fmt.expected_extents(n, k)
    layout = fmt.layout(n, k)
    packed = {name: torch.zeros(schema.bind(f, extents), dtype=f.dtype) for name, f in layout.items()}
    weights = tuple(t.to("meta") for t in kernel.repack(fmt, packed, n, k))
    x = torch.empty((shape.m, k), dtype=shape.dtype, device="meta")
    y = x.new_empty((shape.m, n))
    decoder = kernel.decoder(fmt, n, k)
    config = shape.config or _gemm.choose(shape.m, n, k, shape.dtype, decoder.vector)
    found = _gemm.launches(decoder, config, x, weights, y, None, None)
    found = [launch for launch in found if isinstance(launch, _gemm.Launch)]  # the library's products are its own
    return found, config, weights, 8 * schema.nbytes(layout, extents) / (n * k)


def name_of(launch: _gemm.Launch) -> str:
    """Name of a launch's kernel, for reports."""
    return str(launch.kernel.fn.__name__)


def _describe(arg, path, attrs, aligned):
    """Type of an argument as the just-in-time compiler would specialise it."""
    if isinstance(arg, tuple):
        return tuple(_describe(a, (*path, i), attrs, aligned) for i, a in enumerate(arg))
    if arg is None or (isinstance(arg, int) and arg == 1):
        return "constexpr"
    if isinstance(arg, float):
        return "fp32"
    if isinstance(arg, int):
        if aligned and arg % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        return "i32"
    if aligned:
        attrs[path] = [["tt.divisibility", 16]]  # torch aligns what it allocates to more than 16 bytes
    return _DTYPES[arg.dtype]


def compile_launch(launch: _gemm.Launch, target: str, aligned: bool = True, **options: Any):
    """What a launch would run on the target; `aligned=False` hides the alignment of pointers from the compiler."""
    names = launch.kernel.arg_names
    attrs: dict = {}
    signature, constants = {}, dict(launch.constants)
    for i, arg in enumerate(launch.args):
        fixed = launch.kernel.params[i].do_not_specialize
        signature[names[i]] = "i32" if fixed else _describe(arg, (i,), attrs, aligned)
        if signature[names[i]] == "constexpr":
            constants[names[i]] = arg
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(
        fn=launch.kernel, signature={name: signature[name] for name in names}, constexprs=constants, attrs=attrs
    )
    gpu = TARGETS[target]
    warps = max(launch.warps * 32 // gpu.warp_size, 1)
    return triton.compile(source, target=gpu, options={"num_warps": warps, **_gemm.OPTIONS, **options})


BUDGET = {
    "_prologue": 64,
    "_gemv": 168,
    "_gemm": 192,
    "_decode": 128,
    "_scatter": 64,
    "_finish": 128,
    "_encode": 64,
    "_sums": 64,
    "int_product": 192,
    "_packed": 192,
    "_part": 232,
    "_join": 64,
}  # registers a thread on NVIDIA
# On gfx942 the waves of a SIMD share 512 registers: over 256 leaves one wave, as the spqr GEMM with masks (268) has it,
# and products of two planes with groups of 32 (398).
BUDGET_AMD = {
    "_prologue": 64,
    "_gemv": 256,
    "_gemm": 288,
    "_decode": 128,
    "_scatter": 64,
    "_finish": 128,
    "_encode": 128,
    "_sums": 64,
    "int_product": 400,
    "_packed": 256,
    "_part": 256,
    "_join": 64,
}
SLACK = 1.05  # a figure may grow by a twentieth before someone has to look
SHARED = 48 * 1024  # bytes a program, what every GPU grants without asking
SHARED_AHEAD = 64 * 1024  # of a kernel that loads ahead, what gfx942 has; NVIDIA's grant it when asked, as Triton does


def gate(found: dict[str, Any], kernel: str, *, whole_words: bool, registers: int | None = None) -> None:
    """Raise AssertionError, with the figure, unless a compiled kernel is good enough.

    Args:
        found: what `report` returned.
        kernel: name of the kernel.
        whole_words: the matrix has k divisible by 128, so packed weights must be loaded 16 bytes at a time.
        registers: another budget than the usual one.
    """
    assert found["spills"] == 0, f"{kernel} spills {found['spills']} times"
    # NVIDIA's own exact division, of which only the branch for infinities and NaN does so.
    divides = kernel == "_encode" and "weight_loads" in found
    assert found["flushes"] <= 2 * divides, f"{kernel} flushes subnormal numbers, which its weights are"
    assert found["shared"] <= (SHARED_AHEAD if kernel in ("int_product", "_packed") else SHARED), (
        f"{kernel} takes {found['shared']} bytes of shared memory"
    )
    amd = "loads_128" in found
    budget = registers or (BUDGET_AMD if amd else BUDGET)[kernel]
    assert found["registers"] <= budget, f"{kernel} takes {found['registers']} registers of {budget}"
    if kernel == "int_product":
        narrow = found.get("weight_copies", 0) - found.get("weight_copies_128", 0)
        narrow = narrow if found.get("weight_copies") else int(found.get("loads_128", 0) == 0)
        assert narrow == 0, f"{kernel} loads packed weights {narrow} times with less than 16 bytes"
        assert found["mma"] > 0, f"{kernel} has no matrix instructions"
    if whole_words and kernel in ("_gemv", "_gemm"):
        narrow = int(found["loads_128"] == 0) if amd else found["weight_loads"] - found["weight_loads_128"]
        assert narrow == 0, f"{kernel} loads packed weights {narrow} times with less than 16 bytes"
        assert amd or found["weight_loads"] > 0, f"{kernel} has no loads of packed weights"


def compare(shape: "Shape | kv.Shape", target: str, kernel: str, found: dict[str, Any]) -> None:
    """Raise AssertionError unless the figures are about as good as those that are stored."""
    stored = json.loads(STORED.read_text())
    if stored["triton"].split(".")[:2] != triton.__version__.split(".")[:2]:
        return  # another compiler, other figures: the gate has to do
    before = stored["kernels"][str(shape)][target][kernel]
    for figure in ("registers", "instructions", "shared", "lane_instructions"):
        now, then = found.get(figure, 0), before.get(figure, 0)
        assert now <= then * SLACK, f"{kernel}: {figure} has grown from {then} to {now}"


@dataclass(frozen=True)
class Work:
    """What the launch of a product covers.

    Attributes:
        threads: of a program.
        programs: of the launch.
        turns: how often the loop of a program runs, if it is one.
        numbers: weights of a program, or numbers of a cache; those that only fill up a tile left out.
        ahead: turns whose weights are on their way at once.
    """

    threads: int
    programs: int
    turns: int
    numbers: int
    ahead: int = 1


def work_of(shape: "Shape | kv.Shape", launch: _gemm.Launch, config: Any) -> Work:
    """As the launch's grid and constants have it; threads are those of warps of 32."""
    c, threads, programs = launch.constants, launch.warps * 32, prod(launch.grid)
    if isinstance(shape, kv.Shape):
        per = launch.args[launch.kernel.arg_names.index("per")]
        return Work(threads, programs, per // c["BT"], 2 * per * shape.dim, max(c["STAGES"] - 1, 1))
    if shape.input:
        joined = (1 + c["PAIR"]) * c["UNROLL"]
        turns = c["STEPS"] // c["UNROLL"] if c["LONG"] else c["PARTS"] // joined
        return Work(threads, programs, turns, c["BN"] * shape.k, max(c["STAGES"] - 1, 1))
    rows = config.bn // c["PADDED"] * c["VECTOR"]
    turns = c.get("STEPS", 1)
    return Work(threads, programs, turns, rows * config.bkb * 32 * turns)


def kinds_of(shape: "Shape | kv.Shape") -> set[tuple[Any, ...]]:
    """What the launches of the work are compiled for, apart from the format's own and the exact size."""
    if isinstance(shape, kv.Shape):
        found = kv.launches_of(shape)[0]
        names = ("BT", "STAGES", "EXACT", "BK", "BV", "D")
    else:
        found = launches_of(shape)[0]
        names = ("BM", "BN", "BKB", "EVEN", "STAGES", "UNROLL")
    return {
        (name_of(launch), launch.warps, launch.constants.get("STEPS", 1) > 1, *map(launch.constants.get, names))
        for launch in found
        if name_of(launch) in PRODUCTS
    }


def lane_instructions(found: dict[str, Any], work: Work) -> float:
    """Instructions of all threads over the weights they work on: the whole kernel, its loop as often as it runs."""
    issued = found["instructions"] + found["loop"] * (work.turns - 1)
    return round(issued * work.threads / work.numbers, 2)


def traffic(shape: Shape) -> dict[str, float]:
    """Bits per weight that one product moves, counted from its tensors and grids.

    `weights` are read once for each tile of rows of x; `other` is all other tensors of all launches, x, planes, sums,
    parts, decoded weights and y, once for each launch that touches them; `planes_again` is what all programs together
    ask of x's planes, most of which a cache answers, nothing where weights are decoded whole.
    """
    found, config, weights, stored = launches_of(shape)
    scale = 8 / (shape.n * shape.k)
    size = lambda t: t.nbytes if isinstance(t, torch.Tensor) else 0  # noqa: E731
    tiles = triton.cdiv(shape.m, config.bm) if config.bm else 1
    product = next(launch for launch in found if name_of(launch) in PRODUCTS)
    own = {id(t) for t in weights}
    other = sum(size(arg) for launch in found for arg in launch.args if id(arg) not in own)
    return {
        "stored": round(stored, 4),
        "weights": round(sum(map(size, weights)) * tiles * scale, 4),
        "other": round(other * scale, 4),
        "planes_again": round(size(product.args[0]) * product.grid[0] * scale, 4) if config.bm else 0.0,
    }


@cache
def measure(shape: Shape | kv.Shape, target: str, whole: bool = False) -> dict[str, dict[str, Any]]:
    """Reports of the product, or of all launches, by the name of the kernel; kept until a source changes."""
    return dict(kept(_folder(shape), f"{shape} {target} {whole}", lambda: dict(_measured(shape, target, whole))))


def _folder(shape: Shape | kv.Shape) -> Path:
    return compiled(CACHES if isinstance(shape, kv.Shape) else WEIGHTS)


def _measured(shape: Shape | kv.Shape, target: str, whole: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(shape, kv.Shape):
        config, found, whole = None, kv.launches_of(shape)[0], True
    else:
        found, config, _, _ = launches_of(shape)
    for launch in found:
        name = name_of(launch)
        if whole or name in PRODUCTS:
            made = report(compile_launch(launch, target))
            if name in MAIN:
                work = work_of(shape, launch, config)
                made |= {"lane_instructions": lane_instructions(made, work), "work": asdict(work)}
            yield name, made


def main(*formats: str) -> None:
    """Write `static.json`; what is stored of other formats than these stays, if any are given.

    Shapes whose input is rounded go by the name "integers", attention over packed caches by "kv".
    """
    from tests.kernels import test_integers, test_kv_decode
    from tests.kernels.test_compilation import ALL as FORMATS
    from tests.kernels.test_compilation import WHOLE as FORMATS_WHOLE

    ALL, WHOLE = [*FORMATS, *test_integers.ALL, *test_kv_decode.ALL], (*FORMATS_WHOLE, *test_integers.WHOLE)

    stored = json.loads(STORED.read_text()) if formats else {"kernels": {}, "traffic": {}}
    if formats and stored["triton"] != triton.__version__:
        raise SystemExit(f"the stored figures are of Triton {stored['triton']}: measure all formats")
    names = {str(shape) for shape, _ in ALL}
    figures, moved = (
        {s: found for s, found in stored[kind].items() if s in names and s.split("-")[0] not in formats}
        for kind in ("kernels", "traffic")
    )
    for shape, targets in ALL:
        if not formats or shape.kind in formats:
            figures.setdefault(str(shape), {}).update({t: measure(shape, t, shape in WHOLE) for t in targets})
            count = kv.traffic if isinstance(shape, kv.Shape) else traffic
            moved[str(shape)] = kept(_folder(shape), f"{shape} traffic", lambda c=count, s=shape: c(s))
    STORED.write_text(_text(figures, moved))


def _text(figures: dict[str, Any], moved: dict[str, Any]) -> str:
    """As JSON, a line for each shape and target."""
    lines = lambda given: ",\n".join(f" {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in given)  # noqa: E731
    shapes = (
        f" {json.dumps(shape)}: {{\n{lines(sorted(found.items()))}\n }}" for shape, found in sorted(figures.items())
    )
    kernels, traffics = ",\n".join(shapes), lines(sorted(moved.items()))
    head = f'"note": "static, never timed",\n"triton": {json.dumps(triton.__version__)}'
    return f'{{\n{head},\n"kernels": {{\n{kernels}\n}},\n"traffic": {{\n{traffics}\n}}\n}}\n'


if __name__ == "__main__":
    main(*sys.argv[1:])
