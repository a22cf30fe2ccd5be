"""Results of the gates that are kept from run to run, in `build/gates`, until a source that they depend on changes."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "gates"
# What the launches of weights, and their machine code, follow from; and those of caches.
WEIGHTS = (
    "qexport/kernels/*.py", "qexport/formats/*.py", "qexport/inputs/*.py", "qexport/schema.py",
    "tests/kernels/offline.py", "tests/kernels/machine.py",
)  # fmt: skip
CACHES = (*WEIGHTS, "qexport/kernels/kv/*.py", "qexport/formats/kv/*.py", "tests/kernels/kv.py")


def digest_of(root: Path, sources: tuple[str, ...], *more: str) -> str:
    """Of names and contents of files that fit the patterns, and of what else is said."""
    found = hashlib.sha256("\0".join(more).encode())
    for file in sorted({file for source in sources for file in root.glob(source)}):
        found.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:24]


@cache
def compiled(sources: tuple[str, ...]) -> Path:
    """Where results of this compiler on these sources are kept."""
    return FOLDER / digest_of(ROOT, sources, triton.__version__)


def kept(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returned, as JSON has it, when it was first called for this folder and name."""
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return json.loads(path.read_text())
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}.tmp")
    own.write_text(json.dumps(made))
    own.replace(path)  # whole or not at all: another process may read it
    return made
