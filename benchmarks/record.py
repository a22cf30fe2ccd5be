"""What the benchmarks share: opening a model, and one JSON line a measurement with machine, versions and commit."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from qexport.checkpoint import dump_json
from qexport.finish import environment
from qexport.models import demo_model, open_source

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


def model_folder(name: str) -> Path:
    """The folder of safetensors behind a model's name: `demo`, a folder, a `.gguf` file or a Hub id."""
    return open_source(demo_model() if name == "demo" else name).folder


def _commit() -> str | None:
    """The commit, with `-dirty` behind it when anything but results was changed since."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return f"{commit}-dirty" if commit and changed else commit


def _git(*arguments: str) -> str | None:
    found = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )  # fmt: skip
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
