"""How long the rest of a sweep takes, by what was predicted and what the settings so far took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_NOTHING = 2.0  # seconds; what took less was mostly there already, and says nothing of the rest


@dataclass
class Clock:
    """Attributes are seconds.

    Attributes:
        predicted: of packing, by setting.
        packed: what that took, of the settings that were packed.
        measured: what measuring took, of the settings that were measured.
    """

    predicted: Mapping[str, float]
    packed: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def took(self, name: str, packing: float, measuring: float) -> None:
        """Take in a setting; what was finished before does not count."""
        for known, seconds in ((self.packed, packing), (self.measured, measuring)):
            if seconds >= _NOTHING:
                known[name] = seconds

    def left(self, names: Sequence[str]) -> float | None:
        """Seconds that settings will take; None before there is anything to tell it by."""
        if not self.packed and not self.measured:
            return None
        ratio = sum(self.packed.values()) / sum(self.predicted[name] for name in self.packed) if self.packed else 1.0
        each = sum(self.measured.values()) / max(len(self.measured), 1)
        return sum(ratio * self.predicted[name] + each for name in names)


def spelled(seconds: float) -> str:
    """For people: `40 s`, `12 min`, `1 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
