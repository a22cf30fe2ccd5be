"""One JSON line a measurement, with the machine, the versions and the commit that it was made on."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from qexport.checkpoint import dump_json
from qexport.finish import environment

RESULTS = Path(__file__).parent / "results"


def record(benchmark: str, **facts: Any) -> dict[str, Any]:
    """Append a measurement to `results/<benchmark>.jsonl` and return the line."""
    RESULTS.mkdir(exist_ok=True)
    kept = {key: value for key, value in environment().items() if key != "host"}
    line = {
        **facts,
        **kept,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(dump_json(line) + "\n")
    return line


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
