"""What the benchmarks share: opening a model, and one JSON line a measurement with machine, versions and commit.

Needs torch alone, but for `model_folder`; and the package need not be installed to be measured from its folder.
"""

import os
import platform
import subprocess
import time
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint import dump_json

RESULTS = Path(__file__).parent / "results"


def record(benchmark: str, **facts: Any) -> dict[str, Any]:
    """Append a measurement to `results/<benchmark>.jsonl` and return the line."""
    RESULTS.mkdir(exist_ok=True)
    line = {
        **facts,
        "versions": {"qexport": _own_version(), "torch": torch.__version__, **_versions("transformers", "triton")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(dump_json(line) + "\n")
    return line


def model_folder(name: str) -> Path:
    """The folder of safetensors behind a model's name: `demo`, a folder, packed or not, a `.gguf` file or a Hub id."""
    from qexport.models import demo_model, open_source

    if (Path(name) / "qexport.json").exists():
        return Path(name)
    return open_source(demo_model() if name == "demo" else name).folder


def _own_version() -> str:
    """Of the package, or where it is not installed what its `pyproject.toml` says."""
    found = _versions("qexport").get("qexport")
    if found is None:
        found = tomllib.loads((RESULTS.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    return str(found)


def _versions(*names: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    out = {}
    for name in names:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


@cache
def _commit() -> str | None:
    """The commit at the first line, with `-dirty` behind it when anything but results was changed since."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return f"{commit}-dirty" if commit and changed else commit


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )  # fmt: skip
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
