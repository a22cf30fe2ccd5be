"""Every export of a real model, each proven by the library that reads it; and what comes back from an import.

    python -m benchmarks.exports MODEL [--only TEXT] [--work DIR] [--name NAME]

The model is rounded to nearest in each setting, exported, loaded by the other library in a process of its own, and its
logits compared with ours. Where a target can be imported too, the import is exported again and its tensors compared
byte by byte with those of the first export. Ends with 1 if anything differs.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import model_folder, record
from qexport.calibration import Calibration
from qexport.checkpoint import Reader
from qexport.errors import QExportError
from qexport.export import adopt, export
from qexport.models import anatomy, open_source
from qexport.plan import make_plan
from qexport.quantize import quantize
from qexport.recipe import load_recipe, with_options, with_parts, with_transforms


@dataclass(frozen=True)
class Case:
    """A setting of `rtn` and where it goes; `back` says that it can be imported, `inputs` how these are rounded."""

    to: str
    bits: int
    group_size: int
    symmetric: bool
    back: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = ""
    transforms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As printed."""
        groups = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        more = "".join(f" {key}={value}" for key, value in self.options.items())
        more += f" input {self.inputs}" if self.inputs else ""
        more += "".join(f" {name}" for name in self.transforms)
        return f"{self.to} {self.bits}-bit {groups} {'sym' if self.symmetric else 'asym'}{more}"


CASES = (
    *(Case("compressed-tensors", bits, 64, sym, back=True) for bits in (4, 3) for sym in (True, False)),
    Case("compressed-tensors", 8, 64, True, back=True),
    Case("compressed-tensors", 8, -1, True, back=True),
    Case("compressed-tensors", 8, -1, True, back=True, inputs="token"),
    Case("compressed-tensors", 8, -1, True, back=True, inputs="token", transforms=("smoothquant",)),
    Case("compressed-tensors", 8, -1, True, back=True, inputs="tensor", transforms=("smoothquant",)),
    Case("compressed-tensors", 4, 64, True, back=True, inputs="token"),
    Case("gptq", 4, 64, True, back=True),
    Case("gptq", 4, 64, True, back=True, options={"version": "v1"}),
    Case("gptq", 3, 64, False, back=True),
    Case("bitsandbytes", 8, -1, True),
    Case("bitsandbytes", 8, -1, True, inputs="outliers"),
    Case("bitsandbytes", 8, -1, True, inputs="token"),
    Case("gguf", 4, 32, True),
    Case("gguf", 8, 32, True),
    Case("dense", 4, 64, False),
    Case("dense", 4, 64, False, options={"dtype": "bfloat16"}),
)


def measure(case: Case, model: Path, work: Path) -> dict[str, Any]:
    """Quantize, export, prove and import one case; returns its line."""
    source = open_source(str(model))
    options = {"format.bits": case.bits, "group_size": case.group_size, "format.symmetric": case.symmetric}
    recipe = with_transforms(with_parts(load_recipe("rtn"), input=case.inputs or None), case.transforms)
    recipe = with_options(recipe, list(options.items()))
    quantize(
        make_plan(source, anatomy(source), recipe, calibration=Calibration("builtin", samples=8, seqlen=256)),
        source,
        work / "packed",
    )
    began = time.perf_counter()
    found = export(work / "packed", case.to, work / "out", options=case.options)
    line = {
        "case": case.name,
        "to": case.to,
        "source": found["source"],
        "bytes": found["bytes"],
        "check": found["check"],
    }
    line["seconds"] = time.perf_counter() - began
    if case.back:
        adopt(work / "out", work / "back")
        export(work / "back", case.to, work / "again", check=False, options=case.options)
        line["round_trip"] = same_tensors(work / "out", work / "again") and same_tensors(work / "packed", work / "back")
    return line


def same_tensors(one: Path, two: Path) -> bool:
    """Whether two folders hold the same tensors, byte by byte."""
    a, b = Reader(one), Reader(two)
    return set(a.names) == set(b.names) and all(
        (a.meta(n).dtype, a.meta(n).shape, b"".join(a.chunks(n)))
        == (b.meta(n).dtype, b.meta(n).shape, b"".join(b.chunks(n)))
        for n in a.names
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or Hub id, or demo")
    parser.add_argument("--only", help="just the cases whose name contains this")
    parser.add_argument("--work", type=Path, help="where intermediate folders go")
    parser.add_argument("--name", help="what to call the model in the results")
    options = parser.parse_args()
    model, good = model_folder(options.model), True
    for case in CASES:
        if options.only and options.only.lower() not in case.name.lower():
            continue
        work = Path(tempfile.mkdtemp(dir=options.work))
        try:
            line = measure(case, model, work)
            record("exports", model=options.name or model.name, **line)
            good &= line.get("round_trip", True)
            back = {True: "round trip equal", False: "ROUND TRIP DIFFERS"}.get(line.get("round_trip"), "")  # type: ignore[arg-type]
            check = line["check"]
            text = (
                f"differs {check['max_difference']:.1e} (allowed {check['tolerance']:.0e}), top-1 {check['top1']:.1%}"
            )
            if "rounding" in check:
                found = check["rounding"]
                text += f", rounded {found['logits']:.2f} (allowed {found['allowed']:g}), one {found['products']:.2f}"
        except QExportError as error:
            good, text, back = False, f"FAILED: {error}", ""
        finally:
            shutil.rmtree(work)
        sys.stdout.write(f"{case.name:44s} {text}  {back}\n")
        sys.stdout.flush()
    sys.exit(not good)


if __name__ == "__main__":
    main()
