"""What `results.jsonl` says was measured; `docs/measuring.md` states its format."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.evaluate.record import Line, read_lines
from qexport.finish import RESULTS

_ORDER = ("fidelity", "perplexity", "task")
_DIGEST = re.compile("[0-9a-f]{32,}")


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        what: `perplexity`, `fidelity`, `task`, `needle`, `speed`.
        name: of the text or task.
        figure: perplexity, KL in nats, score, tokens per second.
        se: its standard error, where there is one.
        protocol: figures compare only where it is the same.
        details: other figures of the same measurement, without its observations.
        time: when, ISO 8601.
    """

    what: str
    name: str
    figure: float
    se: float | None
    protocol: Mapping[str, Any]
    details: Mapping[str, Any]
    time: str

    @property
    def key(self) -> str:
        """Equal for results that can be compared."""
        return json.dumps([self.what, self.name, self.protocol], sort_keys=True)

    @property
    def how(self) -> str:
        """The protocol in a line."""
        found = {**{k: self.details.get(k) for k in ("seqlen", "stride", "tokens")}, **self.protocol}
        known = {k: v for k, v in found.items() if isinstance(v, str | int | float) and not _DIGEST.fullmatch(str(v))}
        return ", ".join(f"{key} {value}" for key, value in known.items())


def newest(folder: Path) -> tuple[Result, ...]:
    """Figures of a checkpoint, of those that measure the same the newest; damaged lines are passed over."""
    lines, _ = read_lines(folder / RESULTS)
    found = [_result(line) for line in lines if line["figure"] is not None]
    return tuple({result.key: result for result in found}.values())


def _result(line: Line) -> Result:
    extra = {key: value for key, value in line["details"].items() if key != "observations"}  # which a bootstrap draws
    return Result(
        line["what"], line["name"], line["figure"], line["se"], line["protocol"], extra, str(line.get("time", ""))
    )


def of(results: Sequence[Result], what: str) -> list[Result]:
    """Those of one kind."""
    return [result for result in results if result.what == what]


def shared(columns: Sequence[Sequence[Result]]) -> list[list[Result | None]]:
    """What two or more checkpoints were measured for by one protocol, of each text and task the most shared protocol.

    Returns:
        For each figure a result or None for each checkpoint: KL first, then perplexities, then tasks and the rest.
    """
    holders: dict[str, list[Result]] = {}
    for results in columns:
        for result in results:
            holders.setdefault(result.key, []).append(result)
    best: dict[tuple[str, str], str] = {}
    for key, found in holders.items():
        name = (found[0].what, found[0].name)
        if len(found) > max(1, len(holders.get(best.get(name, ""), ()))):
            best[name] = key
    order = sorted(best, key=lambda name: _ORDER.index(name[0]) if name[0] in _ORDER else len(_ORDER))
    return [[next((r for r in results if r.key == best[name]), None) for results in columns] for name in order]
