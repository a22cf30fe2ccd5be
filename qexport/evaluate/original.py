"""The model that others are compared with. What it predicts is kept on disk, so that it need not be loaded again.

Logits are kept in the dtype in which they were computed: figures with and without what is kept are the same.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from qexport.checkpoint import Reader, dump_json, write_tensors
from qexport.errors import CheckpointError
from qexport.evaluate.perplexity import predict
from qexport.evaluate.windows import Windows
from qexport.events import Note, Observer, ignore

LIMIT = 8_000_000_000  # bytes that kept logits take on disk, those of all models together
_FREE = 0.25  # and no more than this part of what is free


class Original:
    """A model that is loaded when the first window needs it.

    Args:
        load: makes the model, in eval mode.
        store: where its logits are kept; None keeps none.
    """

    def __init__(self, load: Callable[[], Any], store: "Store | None" = None) -> None:
        self._load, self._store = load, store

    @cached_property
    def model(self) -> Any:
        """The loaded model."""
        return self._load()

    def logits(self, text: Windows, span: range) -> list[Tensor]:
        """Logits [scored, vocabulary] of some windows of a text, in the dtype of the model, wherever they lie."""
        kept = [None if self._store is None else self._store.read(text, i) for i in span]
        found = [logits for logits in kept if logits is not None]
        if len(found) == len(kept):
            return found
        made = [logits for logits, _ in predict(self.model, text, span)]
        if self._store is not None:
            for i, logits in zip(span, made, strict=True):
                self._store.write(text, i, logits)
        return made


@dataclass
class Store:
    """Kept logits of one model, a file for each window.

    Attributes:
        root: folder of all models' logits.
        key: what the logits depend on besides the window: weights, dtype, device, versions.
        limit: bytes that all files together may take.
        observer: is told when that is reached.
    """

    root: Path
    key: dict[str, Any]
    limit: int = LIMIT
    observer: Observer = ignore
    full: bool = False

    @cached_property
    def folder(self) -> Path:
        """Of this model."""
        return self.root / hashlib.sha256(dump_json(self.key).encode()).hexdigest()[:32]

    def _file(self, text: Windows, i: int) -> str:
        data = text.ids[i].numpy().tobytes() + text.scored[i].to_bytes(8, "little")
        return hashlib.sha256(data).hexdigest()[:32] + ".safetensors"

    def read(self, text: Windows, i: int) -> Tensor | None:
        """Logits of a window, or None; a file that is damaged is as good as none."""
        path = self.folder / self._file(text, i)
        if not path.is_file():
            return None
        try:
            logits = Reader(self.folder, [path.name]).read("logits")
            os.utime(path)
        except (CheckpointError, OSError):
            return None
        return logits if logits.ndim == 2 and logits.shape[0] == text.scored[i] else None

    def write(self, text: Windows, i: int, logits: Tensor) -> None:
        """Keep logits, in place of the ones of other models that were used least lately, if there is room."""
        if self.full:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.full = not self._make_room(logits.nbytes)
            if not self.full:
                write_tensors(self.folder / self._file(text, i), {"logits": logits.contiguous().cpu()})
                return
            reason = f"they would take more than {self.limit / 1e9:.3g} GB, or than a quarter of the free disk"
        except OSError as error:
            self.full, reason = True, str(error.strerror)
        self.observer(Note(f"{text.name}, from window {i} on, the original's logits are not kept: {reason}"))

    def _make_room(self, nbytes: int) -> bool:
        files = sorted(self.root.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        sizes = {path: path.stat().st_size for path in files}
        used, free = sum(sizes.values()), shutil.disk_usage(self.root).free
        limit = min(self.limit, used + int(free * _FREE))
        others: Sequence[Path] = [path for path in files if path.parent != self.folder]
        for path in others:
            if used + nbytes <= limit:
                break
            path.unlink(missing_ok=True)
            used -= sizes[path]
        return used + nbytes <= limit
