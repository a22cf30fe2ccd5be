"""What the files of a checkpoint say, in the shape that tables and pictures want. Pure data; no weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any

from qexport.checkpoint import Reader, read_json
from qexport.finish import MANIFEST
from qexport.report import inspect
from qexport.reporting.results import Result, newest


@dataclass(frozen=True)
class Module:
    """A packed module.

    Attributes:
        name: its path.
        layer: the first number in it; None outside the layers.
        kind: what stands after that number, further numbers as `*`.
        weights: how many.
        nbytes: stored.
        error: relative error that the job noted, of outputs on calibration text or, without data, of weights.
    """

    name: str
    layer: int | None
    kind: str
    weights: int
    nbytes: int
    error: float | None

    @property
    def bits(self) -> float:
        """Stored bits of a weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Checkpoint:
    """A finished folder.

    Attributes:
        folder: where it is.
        label: a name that no other checkpoint of the report has.
        about: as `report.inspect` gives it.
        modules: the packed ones, in their order in the model.
        dense: bytes of all other tensors, by kind.
        fingerprint: of the original, to know it again; None in older manifests.
        results: what was measured, the newest of each protocol.
    """

    folder: Path
    label: str
    about: Mapping[str, Any]
    modules: tuple[Module, ...]
    dense: Mapping[str, int]
    fingerprint: str | None
    results: tuple[Result, ...]

    @property
    def calibrated(self) -> bool:
        """Whether the job had data, so that its errors are of outputs."""
        return self.about["calibration"]["origin"] is not None


def place(name: str) -> tuple[int | None, str]:
    """Layer and kind of a module or tensor: `model.layers.3.mlp.up_proj` is 3, `mlp.up_proj`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return None, name
    rest = parts[numbers[0] + 1 :]
    return int(parts[numbers[0]]), ".".join("*" if part.isdigit() else part for part in rest)


def read(folder: Path, label: str) -> Checkpoint:
    """Facts of one checkpoint; raises `CheckpointError` where its files are not what they should be."""
    about = inspect(folder, device="cpu")
    manifest = read_json(folder / MANIFEST)  # `inspect` has looked at its tables
    plan = manifest.get("plan") or {}
    table, order = manifest["modules"], _planned(plan)
    modules = []
    for name in sorted(table, key=lambda name: (order.get(name, len(order)), name)):
        found = table[name]
        layer, kind = place(name)
        error = found.get("error")
        error = float(error) if isinstance(error, float | int) else None
        modules.append(Module(name, layer, kind, found["n"] * found["k"], found["nbytes"], error))
    packed = {module.name for module in modules}
    dense: dict[str, int] = {}
    reader = Reader(folder)
    for name in reader.names:
        module, _, tensor = name.rpartition(".")
        if module not in packed or tensor == "bias":  # a bias is no part of what is packed
            kind = place(name)[1]
            dense[kind] = dense.get(kind, 0) + reader.meta(name).nbytes
    modules.sort(key=lambda m: (m.layer is None, m.layer or 0))
    return Checkpoint(folder, label, about, tuple(modules), dense, plan.get("fingerprint"), newest(folder))


def _planned(plan: Mapping[str, Any]) -> dict[str, int]:
    """Where each module stands in the plan, which has them in the order in which they run."""
    groups = plan.get("modules")
    names = [name for group in groups for name in group.get("names", ())] if isinstance(groups, list) else []
    return {name: i for i, name in enumerate(names)}


def decibel(relative: float | None) -> float | None:
    """A relative squared error as the ratio of signal to it: 0.01 is 20 dB; None where there is none or no error."""
    return None if not relative or relative < 0 else -10 * log10(relative)


def kinds(modules: Sequence[Module]) -> list[str]:
    """Kinds of module, each once, in the order of the model."""
    return list(dict.fromkeys(m.kind for m in modules))


def table(modules: Sequence[Module], values: Mapping[str, float | None]) -> tuple[list[str], list[int], Any]:
    """Means of a value by layer and kind; modules outside the layers are left out.

    Returns:
        Kinds, layers, and for each kind a number or None for each layer; experts of a layer count together.
    """
    inside = [m for m in modules if m.layer is not None and values.get(m.name) is not None]
    names, layers = kinds(inside), sorted({m.layer for m in inside if m.layer is not None})
    cells: dict[tuple[str, int], list[float]] = {}
    for m in inside:
        value = values[m.name]
        assert m.layer is not None
        assert value is not None
        cells.setdefault((m.kind, m.layer), []).append(value)
    means = {key: sum(found) / len(found) for key, found in cells.items()}
    return names, layers, [[means.get((kind, layer)) for layer in layers] for kind in names]


def spread(modules: Sequence[Module], values: Mapping[str, float | None]) -> dict[str, tuple[float, float, float]]:
    """Lowest, mean and highest value by kind, modules outside the layers included."""
    found: dict[str, list[float]] = {}
    for m in modules:
        value = values.get(m.name)
        if value is not None:
            found.setdefault(m.kind, []).append(value)
    return {kind: (min(v), sum(v) / len(v), max(v)) for kind, v in found.items()}
