"""How fast a compiled kernel could be on a chip, from static figures alone: a bound, never a time.

A launch can't be faster than its bytes at the memory's full bandwidth, nor than its instructions through the units that
execute them. What either takes is computed for one weight; the larger one binds.

Sources: NVIDIA A100 80GB datasheet and "A100 Tensor Core GPU Architecture" (units and limits of an SM); NVIDIA H100
datasheet (SXM) and "H100 Tensor Core GPU Architecture", with the lower of the two clocks it is run at; AMD Instinct
MI300X datasheet and "CDNA 3 Instruction Set Architecture". Registers are handed out as CUDA's occupancy calculator
and LLVM's AMDGPU backend say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tests.kernels.machine import CLASSES


@dataclass(frozen=True)
class Chip:
    """A processor "unit" is an SM or a CU.

    Attributes:
        name: what it is sold as.
        bandwidth: of its memory, bytes a second.
        units: how many.
        clock: in Hz.
        warp: lanes of a warp.
        limits: what instructions go through: a name, the classes that take it, and lanes a unit and clock.
        registers: of a lane, of each of the four quarters of a unit, for all its warps.
        quarter: warps that a quarter holds at most.
        shared: bytes of shared memory of a unit.
        reserved: of these, for each program.
    """

    name: str
    bandwidth: float
    units: int
    clock: float
    warp: int
    limits: tuple[tuple[str, tuple[str, ...], int], ...]
    registers: int
    quarter: int
    shared: int
    reserved: int


# On AMD's chips other classes are issued beside the vector units', by other waves. NVIDIA's integers and floats have
# units of their own (64 lanes each, floats of an H100 128), but which take a multiply-add or a minimum is not said.
_NVIDIA = (("issue", CLASSES, 128), ("loads", ("load",), 32))
_AMD = (("vector units", ("integer", "convert", "float"), 64),)
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "sm_80": Chip("A100 80 GB SXM", 2.039e12, 108, 1.41e9, 32, _NVIDIA, 512, 16, 164 * 1024, 1024),
        "sm_90": Chip("H100 SXM", 3.35e12, 132, 1.755e9, 32, _NVIDIA, 512, 16, 228 * 1024, 1024),
        "gfx942": Chip("MI300X", 5.3e12, 304, 2.1e9, 64, _AMD, 512, 8, 64 * 1024, 0),
    }
)
# Lane-instructions that a weight of so many bits may take at one row of x: what a chip issues while it reads it, with
# its group's scale and zero, 4.2 and 3.2 bits in all, at a clock of 1.7 GHz for the H100.
GOALS: Mapping[tuple[int, str], float] = MappingProxyType(
    {(4, "sm_80"): 5.1, (4, "sm_90"): 4.5, (3, "sm_80"): 3.8, (3, "sm_90"): 3.4}
)
_GRAIN = 8  # registers of a lane are handed out in eights


def resident(chip: Chip, found: Mapping[str, Any]) -> int:
    """Programs that a unit holds at once, of those that there are."""
    warps = max(found["work"]["threads"] // chip.warp, 1)
    each = -(-max(found["registers"], 1) // _GRAIN) * _GRAIN
    held = 4 * min(chip.registers // each, chip.quarter)
    room = chip.shared // (found["shared"] + chip.reserved) if found["shared"] + chip.reserved else held
    return min(held // warps, room, 32, -(-found["work"]["programs"] // chip.units))


def lanes(found: Mapping[str, Any], steady: bool = False) -> dict[str, float]:
    """Lane-instructions a weight by class: of the whole kernel, or of its loop where it has one."""
    work, whole, loop = found["work"], found["classes"], found["loop_classes"]
    if steady and found["loop"]:
        return {kind: loop[kind] * work["threads"] * work["turns"] / work["numbers"] for kind in CLASSES}
    scale = work["threads"] / work["numbers"]
    return {kind: (whole[kind] + loop[kind] * (work["turns"] - 1)) * scale for kind in CLASSES}


@dataclass(frozen=True)
class Bound:
    """What limits a launch on a chip.

    Attributes:
        by: "memory", or the units that its instructions wait for.
        roof: part of the memory's bandwidth that is left to it at most.
        warps: that a unit holds at once.
        flight: bytes of weights that a unit's programs have asked for at once.
        covers: seconds that the memory may take to answer before these bytes no longer fill its bandwidth.
    """

    by: str
    roof: float
    warps: int
    flight: float
    covers: float


def bound_of(target: str, found: Mapping[str, Any], moved: Mapping[str, float]) -> Bound:
    """From the figures of a kernel and the bits that its product moves, as `static.json` has them."""
    chip, work, each = CHIPS[target], found["work"], lanes(found)
    memory = sum(moved[kind] for kind in ("weights", "other", "rotations") if kind in moved) / 8 / chip.bandwidth
    times = {
        name: sum(each[kind] for kind in classes) / (rate * chip.units * chip.clock)
        for name, classes, rate in chip.limits
    }
    slowest = max(times, key=lambda name: times[name])
    programs = resident(chip, found)
    turns = work["turns"] if found["loop"] else 1
    flight = programs * work["numbers"] / turns * min(work["ahead"], turns) * moved["weights"] / 8
    return Bound(
        by="memory" if memory >= times[slowest] else slowest,
        roof=min(memory / times[slowest], 1.0),
        warps=programs * max(work["threads"] // chip.warp, 1),
        flight=flight,
        covers=flight * chip.units / chip.bandwidth,
    )
