"""What compiled kernels consist of: instructions by class, the loop that does the work, registers and spills.

    load     loads, stores, shuffles: all that goes through the load and store units
    integer  integers and logic, comparisons and selections among them
    convert  between kinds of numbers
    float    sums, products, FMAs, powers, of one number or of a packed pair
    matrix   matrix instructions
    other    jumps, barriers, waits, moves and the uniform (NVIDIA) or scalar (AMD) units

NVIDIA's machine code is disassembled by the tools that Triton brings; AMD's is read as the compiler's assembly.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

CLASSES = ("load", "integer", "convert", "float", "matrix", "other")
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_NVIDIA = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)\b.*;")
_AMD = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)")
_LABEL = re.compile(r"^(\.L\w+):")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)|\bs_c?branch\w*\s+(\.L\w+)")
# The first that fits; what fits none is "other".
_KINDS = (
    ("matrix", re.compile(r"[HIDQ]G?MMA\b|v_s?mfmac?_")),
    ("load", re.compile(r"(LD|ST|ATOM|RED|SHFL|MATCH)|(ds|global|buffer|flat|scratch)_(?!\w*wbl2|\w*inv)")),
    ("convert", re.compile(r"([IF]2[IF]|F2FP|FRND|I2FP)|v_(cvt|rndne)_")),
    ("float", re.compile(r"[FH](FMA|ADD|MUL|MNMX|SEL|SETP|SET|SWZADD)\b|H(ADD|MUL|FMA|MNMX|SETP|SET)2|MUFU"
                         r"|v_(pk_)?(fma|fmac|mac|mul|add|sub|max3?|min3?|exp|log|rcp|sqrt|rsq|ldexp|div|cmp)\w*_f(16|32)"
                         r"|v_(fma_mix|dot2)")),
    ("integer", re.compile(r"(IADD|IMAD|IMUL|IMNMX|VIMNMX|VIADD|ISETP|ICMP|IABS|IDP|LEA|LOP|PLOP|SHF|SHL|SHR|SGXT|BMSK)"
                           r"|(FLO|POPC|PRMT|SEL|XMAD|BREV|VABSDIFF)"
                           r"|v_(?!mov|readfirstlane|readlane|writelane|nop|accvgpr)")),
)  # fmt: skip


def class_of(op: str) -> str:
    """Class of an instruction by its mnemonic."""
    return next((kind for kind, pattern in _KINDS if pattern.match(op)), "other")


def instructions(text: str) -> tuple[list[str], list[str]]:
    """Mnemonics of a kernel, and those of its longest backward jump, padding left out.

    That jump is the loop along k, where steps were not written out; a loop inside it counts once.
    """
    labels: dict[str, int] = {}
    ops: list[str] = []
    loop: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(ops)
        elif found := _NVIDIA.match(line) or _AMD.match(line):
            ops.append(found[1])
            jump = _JUMP.search(line)
            start = labels.get(jump[1] or jump[2]) if jump else None
            if start is not None and len(ops) - start > max(len(loop), 1):  # a jump to itself is padding behind the end
                loop = ops[start:]
    plain = lambda found: [op for op in found if not re.match(r"NOP|s_nop|s_code_end", op)]  # noqa: E731
    return plain(ops), plain(loop)


def counted(ops: list[str]) -> dict[str, int]:
    """Instructions by class."""
    found = Counter(map(class_of, ops))
    return {kind: found[kind] for kind in CLASSES}


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resources that NVIDIA's tool finds, as text, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = subprocess.run([_BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        text = subprocess.run([_BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return used.stdout + used.stderr, text


def report(compiled: Any) -> dict[str, Any]:
    """Figures of one compiled kernel.

    `weight_loads` and `weight_loads_128` count loads of packed weights: they alone are marked "evict first". `flushes`
    counts arithmetic that would treat subnormal numbers as 0. `weight_copies` go straight to shared memory. `classes`
    and `loop_classes` are `instructions` and `loop` by class.
    """
    out: dict[str, Any] = {"shared": compiled.metadata.shared}
    copies = re.findall(r"ttg.async_copy_global_to_local.*evict_first.*", compiled.asm["ttgir"])
    if copies:
        out |= {"weight_copies": len(copies), "weight_copies_128": sum("contiguity = 16 :" in c for c in copies)}
    text = _nvidia(compiled.asm["cubin"], out) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"], out)
    ops, loop = instructions(text)
    return out | {
        "instructions": len(ops), "loop": len(loop), "classes": counted(ops), "loop_classes": counted(loop),
    }  # fmt: skip


def _nvidia(cubin: bytes, out: dict[str, Any]) -> str:
    used, text = disassemble(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used[used.rindex("Function") :])
    assert found is not None, used
    ops = [m[1] for m in map(_NVIDIA.match, text.splitlines()) if m]
    count = lambda pattern: sum(bool(re.match(pattern, op)) for op in ops)  # noqa: E731
    out |= {
        "registers": int(found[1]), "spills": count("LDL|STL") + int(found[4]), "loads": count("LDG|LDGSTS"),
        "weight_loads": count(r"LDG\b.*\.EF"), "weight_loads_128": count(r"LDG\b.*\.EF.*\.128"),
        "mma": count("[HI]MMA|[HI]GMMA"), "flushes": count(r"F(FMA|ADD|MUL)\..*FTZ"),
    }  # fmt: skip
    return text


def _amd(asm: str, out: dict[str, Any]) -> str:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", asm)[1])  # type: ignore[index]  # noqa: E731
    flush = re.search(r"\.amdhsa_float_denorm_mode_32 (\d+)", asm)
    out |= {
        "registers": number("vgpr_count"), "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": len(re.findall(r"(?:global|buffer)_load", asm)), "mma": len(re.findall("v_mfma", asm)),
        "loads_128": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
        "flushes": int(flush is None or flush[1] != "3"),
    }  # fmt: skip
    return asm
