"""Calibration tokens that all settings of a grid share: the model writes its text once, not once for each."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qexport.calibration import Calibration, Tokens, tokens
from qexport.checkpoint import Reader, write_tensors
from qexport.container import METADATA_KEY
from qexport.events import Note, Observer, ignore
from qexport.kv import CALIBRATION_FILE
from qexport.models import Source
from qexport.plan import fingerprint


@dataclass(frozen=True)
class Shared:
    """Makes tokens as `calibration.tokens` does, and keeps them in a folder for the next who asks for the same.

    Attributes:
        folder: where the file lies.
    """

    folder: Path

    def __call__(
        self, source: Source, spec: Calibration, *, device: str = "cpu", observer: Observer = ignore
    ) -> Tokens:
        """The kept tokens of this model and choice, or new ones."""
        path = self.folder / CALIBRATION_FILE
        key = {"model": fingerprint(source), "spec": asdict(spec), "file": spec.file_sha256(), "device": device}
        if path.is_file():
            reader = Reader(self.folder, [path.name])
            known = json.loads(reader.metadata[path.name].get(METADATA_KEY, "{}"))
            if known.get("key") == key:
                observer(Note(f"The calibration tokens are those of {path}."))
                return Tokens(reader.read("input_ids").long(), known["origin"])
        made = tokens(source, spec, device=device, observer=observer)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"input_ids": made.ids.int()}, {"key": key, "origin": made.origin})
        return made
