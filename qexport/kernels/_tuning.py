"""Which of a few launches is the fastest here: timed when a product is first wanted, and kept on disk.

A file holds one choice, as JSON: the key, which is all that a time depends on, and the launch. Its name follows from
the key, so processes that time the same product at once replace a whole file by a whole file, and nothing is merged.
What can't be read, or says another key or a launch that is no candidate, is timed anew.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from qexport.folders import cache_folder

SWITCH = "QEXPORT_TUNE"  # 0: nothing is timed, and nothing read


class Tuner:
    """Remembers the fastest launch of each product.

    Args:
        folder: where choices are kept.
        seconds: the time that a call takes; may raise what the call raises.
    """

    def __init__(self, folder: Path, seconds: Callable[[Callable[[], None]], float]) -> None:
        self.folder, self._seconds = folder, seconds
        self._known: dict[Any, Any] = {}
        self._sought: set[Any] = set()  # in vain on disk

    def best(
        self,
        key: Any,
        product: Callable[[], tuple[Mapping[str, Any], Sequence[Any]]],
        run: Callable[[Any], None],
        free: Callable[[], bool],
    ) -> Any | None:
        """The fastest launch, or None: it isn't known and nothing may be timed now, or all of them failed.

        Args:
            key: what is looked up in this process, at each call.
            product: what is looked up on disk, as JSON values; and launches, dataclasses of integers. Of equally fast
                ones the first is taken.
            run: launches one.
            free: whether launches may be timed now.
        """
        if key in self._known:
            return self._known[key]
        if key in self._sought and not free():
            return None
        facts, candidates = product()
        found = self._read(facts, candidates) if len(candidates) > 1 else candidates[0]
        if found is None:
            self._sought.add(key)
            if not free():
                return None
            found = self._timed(candidates, run)
            if found is not None:
                self._write(facts, found)
        self._known[key] = found
        return found

    def path(self, facts: Mapping[str, Any]) -> Path:
        """The file of a choice."""
        return self.folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}.json"

    def _timed(self, candidates: Sequence[Any], run: Callable[[Any], None]) -> Any | None:
        times: list[tuple[float, int]] = []
        for i, candidate in enumerate(candidates):
            try:
                times.append((self._seconds(lambda c=candidate: run(c)), i))  # type: ignore[misc]
            except (RuntimeError, TritonError):
                continue  # another chip has fewer registers, or less shared memory
        return candidates[min(times)[1]] if times else None

    def _read(self, facts: Mapping[str, Any], candidates: Sequence[Any]) -> Any | None:
        path = self.path(facts)
        try:
            stored = json.loads(path.read_text())
            fits = [c for c in candidates if stored["key"] == facts and stored["launch"] == asdict(c)]
            reason = "it names no launch of this product"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            fits, reason = [], str(error)
        if not fits:
            warnings.warn(f"{path} is not read: {reason}. The launch is timed again.", stacklevel=2)
        return next(iter(fits), None)

    def _write(self, facts: Mapping[str, Any], found: Any) -> None:
        text = json.dumps({"key": facts, "launch": asdict(found)}, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, own = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(own, self.path(facts))
        except OSError as error:
            warnings.warn(f"{self.folder}: the fastest launch can't be kept there: {error}", stacklevel=2)


@cache
def tuner() -> Tuner:
    """The one of this process, for GPUs."""
    return Tuner(cache_folder() / "launches", _on_gpu)


def wanted(x: torch.Tensor) -> bool:
    """Whether launches for x are timed: on a GPU, unless switched off, or results have to be the same everywhere."""
    return x.is_cuda and os.environ.get(SWITCH) != "0" and not torch.are_deterministic_algorithms_enabled()


def here(device: torch.device) -> dict[str, str]:
    """What a time depends on beside the product: the GPU, versions, and the kernels' sources."""
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": _sources(),
    }


@cache
def _sources() -> str:
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _on_gpu(call: Callable[[], None]) -> float:
    """The median time of a call in seconds, without what Python adds, and with weights that no cache holds."""
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    found: float = triton.testing.do_bench(graph.replay, warmup=5, rep=25, return_mode="median")
    return found / 1e3
