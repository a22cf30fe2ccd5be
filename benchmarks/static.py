"""The table of what binds each GPU kernel, from compiled code alone: static, never timed.

    python -m benchmarks.static [--write]

Reads the figures that `python -m tests.kernels.offline` stored, and prints tables, or writes them into
`docs/speed-static.md`. How a bound is computed is in `tests/kernels/chips.py`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.kernels.chips import CHIPS, GOALS, bound_of, lanes
from tests.kernels.machine import CLASSES

ROOT = Path(__file__).parents[1]
STORED = ROOT / "tests" / "kernels" / "static.json"
PAGE = ROOT / "docs" / "speed-static.md"
BEGIN, END = "<!-- tables: python -m benchmarks.static --write -->\n", "<!-- end of tables -->"
_HEAD = (
    "kernel", *CLASSES, "sum", "whole", "bytes", "128-bit", "registers", "shared", "warps", "KiB in flight",
    "covers ns", "bound", "roof",
)  # fmt: skip
_ROWS = (1, 16, 64)  # of x


def _label(shape: str) -> str | None:
    """What the table calls a shape: products of 4096 x 4096, attention over 32,768 tokens; None: it is left out."""
    if shape.startswith("kv-"):
        return shape.replace("-t32768", "").replace("-h8x4", "")
    name = shape.removesuffix("-n4096-k4096-float16")
    return name if name != shape and int(name.rpartition("-m")[2]) in _ROWS else None


def _wide(found: Mapping[str, Any]) -> str:
    """Loads of 16 bytes, of all loads: of packed weights on NVIDIA's chips, of anything on AMD's."""
    for kind in ("weight_copies", "weight_loads"):
        if found.get(kind):
            return f"{found[f'{kind}_128']}/{found[kind]}"
    return f"{found['loads_128']}/{found['loads']}" if "loads_128" in found else "none"


def rows(stored: Mapping[str, Any], target: str) -> Iterator[tuple[str, ...]]:
    """A line for each kernel that does the work of a shape."""
    for shape, targets in stored["kernels"].items():
        label, moved = _label(shape), stored["traffic"].get(shape)
        for kernel, found in targets.get(target, {}).items():
            if label is None or "work" not in found:
                continue
            each, bound = lanes(found, steady=True), bound_of(target, found, moved)
            numbers = sum(moved.get(kind, 0.0) for kind in ("weights", "other", "rotations")) / 8
            yield (
                f"{label} `{kernel}`", *(f"{each[kind]:.2f}" for kind in CLASSES), f"{sum(each.values()):.2f}",
                f"{found['lane_instructions']:.2f}", f"{numbers:.3f}", _wide(found), str(found["registers"]),
                str(found["shared"]), str(bound.warps), f"{bound.flight / 1024:.0f}", f"{bound.covers * 1e9:.0f}",
                bound.by, f"{bound.roof:.0%}",
            )  # fmt: skip


def goals(stored: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table: what `uniform` and `spqr` take at one row of x, and what they may take."""
    yield "| bits, target | at most | uniform, groups of 128 | spqr, groups of 16 |"
    yield "|---|---|---|---|"
    for (bits, target), most in GOALS.items():
        found = [
            stored["kernels"][f"{name}-m1-n4096-k4096-float16"][target]["_gemv"]["lane_instructions"]
            for name in (f"uniform-bits{bits}-group_size128-symmetricFalse", f"spqr-bits{bits}-group_size16")
        ]
        said = (f"{x:.2f}" + (f", missed by {x - most:.2f}" if x > most else "") for x in found)
        yield f"| {bits}, {target} | {most} | {' | '.join(said)} |"


def tables(stored: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    out = ["### Goals", "", *goals(stored), ""]
    for target, chip in CHIPS.items():
        out += [f"### {target}: {chip.name}", "", f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
        out += [f"| {' | '.join(row)} |" for row in rows(stored, target)] + [""]
    return "\n".join(out)


def page(text: str, stored: Mapping[str, Any]) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + tables(stored) + "\n" + END + rest.split(END)[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/speed-static.md")
    stored = json.loads(STORED.read_text())
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(), stored))
    else:
        sys.stdout.write(tables(stored) + "\n")


if __name__ == "__main__":
    main()
