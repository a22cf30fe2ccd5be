"""Compile launches for GPUs that are not there, and read registers, spills, loads and instructions off the result.

Needs a process without TRITON_INTERPRET. `python -m tests.kernels.offline [FORMAT ...]` measures all cases, or those of
some formats, and writes `static.json`; all figures in it are static, never timed.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PRODUCTS = ("_gemv", "_gemm", "_decode", "int_product", "_packed", "_part", "_join")
STORED = Path(__file__).with_name("static.json")
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
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

    def __str__(self) -> str:
        spell = lambda options: "-".join(f"{key}{value}" for key, value in options)  # noqa: E731
        kind = f"{self.kind}-{spell(self.input)}-" if self.input else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind}{self.format}-{spell(self.options)}-m{self.m}-n{self.n}-k{self.k}-{dtype}"

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
    config = _gemm.choose(shape.m, n, k, shape.dtype, decoder.vector)
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


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        text = subprocess.run([BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return used.stdout + used.stderr, text


_OP = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)\b.*;")
_LABEL = re.compile(r"^(\.L_\w+):")


def _longest_loop(text: str) -> int:
    """Instructions of the longest backward jump: the loop along k, if the steps were not unrolled."""
    labels: dict[str, int] = {}
    longest, at = 0, 0
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = at
        elif _OP.match(line):
            at += 1
            jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if jump and jump[1] in labels:
                longest = max(longest, at - labels[jump[1]])
    return longest if longest > 1 else 0  # a jump to itself is the padding behind EXIT


def report(compiled) -> dict[str, Any]:
    """Figures of one compiled kernel.

    `weight_loads` and `weight_loads_128` count loads of packed weights: they alone are marked "evict first". `flushes`
    counts arithmetic that would treat subnormal numbers as 0. `weight_copies` go straight to shared memory.
    """
    meta = compiled.metadata
    out: dict[str, Any] = {"shared": meta.shared}
    copies = re.findall(r"ttg.async_copy_global_to_local.*evict_first.*", compiled.asm["ttgir"])
    if copies:
        out |= {"weight_copies": len(copies), "weight_copies_128": sum("contiguity = 16 :" in c for c in copies)}
    if "cubin" in compiled.asm:
        used, text = _disassemble(compiled.asm["cubin"])
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used[used.rindex("Function") :])
        assert found is not None, used
        ops = [m[1] for m in map(_OP.match, text.splitlines()) if m]
        count = lambda pattern: sum(bool(re.match(pattern, op)) for op in ops)  # noqa: E731
        out |= {
            "registers": int(found[1]), "spills": count("LDL|STL") + int(found[4]), "loads": count("LDG|LDGSTS"),
            "weight_loads": count(r"LDG\b.*\.EF"), "weight_loads_128": count(r"LDG\b.*\.EF.*\.128"),
            "mma": count("[HI]MMA|[HI]GMMA"), "flushes": count(r"F(FMA|ADD|MUL)\..*FTZ"),
            "instructions": len(ops) - count("NOP"), "loop": _longest_loop(text),
        }  # fmt: skip
    else:
        asm = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", asm)[1])  # type: ignore[index]  # noqa: E731
        flush = re.search(r"\.amdhsa_float_denorm_mode_32 (\d+)", asm)
        out |= {
            "registers": number("vgpr_count"), "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
            "loads": len(re.findall(r"(?:global|buffer)_load", asm)), "mma": len(re.findall("v_mfma", asm)),
            "loads_128": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
            "flushes": int(flush is None or flush[1] != "3"),
        }  # fmt: skip
    return out


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
# On gfx942 the waves of a SIMD share 512 registers: over 256 leaves one wave, as the spqr GEMM (315) has it, and
# products of two planes with groups of 32 (398).
BUDGET_AMD = {
    "_prologue": 64,
    "_gemv": 256,
    "_gemm": 336,
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


def lane_instructions(found: dict[str, Any], config: _gemm.Config, k: int, rows: int) -> float:
    """Instructions of all threads over the weights they work on: the whole kernel, its loop as often as it runs.

    A program covers so many `rows` that exist.
    """
    steps = config.steps(k)
    issued = found["instructions"] + found["loop"] * (steps - 1)
    return round(float(issued * config.threads / (rows * config.bkb * 32 * steps)), 2)


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
    """Reports of the product, or of all launches, by the name of the kernel."""
    if isinstance(shape, kv.Shape):
        return {name_of(launch): report(compile_launch(launch, target)) for launch in kv.launches_of(shape)[0]}
    found, config, _, _ = launches_of(shape)
    if not whole:
        found = [launch for launch in found if name_of(launch) in PRODUCTS]
    out = {}
    for launch in found:
        name = name_of(launch)
        out[name] = report(compile_launch(launch, target))
        if name in ("_gemv", "_gemm") and "loop" in out[name]:
            rows = config.bn // launch.constants["PADDED"] * launch.constants["VECTOR"]
            out[name]["lane_instructions"] = lane_instructions(out[name], config, shape.k, rows)
    return out


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
            moved[str(shape)] = kv.traffic(shape) if isinstance(shape, kv.Shape) else traffic(shape)
    head = {"note": "static, never timed", "triton": triton.__version__}
    STORED.write_text(json.dumps({**head, "kernels": figures, "traffic": moved}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
