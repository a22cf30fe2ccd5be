"""What a long job tells its observer. The command line draws these; a library user may collect or ignore them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Note:
    """One line worth showing: a decision the user did not make, or a warning (`level` is `"info"` or `"warning"`)."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class Started:
    """A phase of the job begins: `"sample"`, `"embed"`, `"quantize"`, `"evaluate"` ... with `total` steps of `unit`.

    One that is `outer` goes on while other phases come and go within it.
    """

    phase: str
    total: int
    unit: str
    outer: bool = False


@dataclass(frozen=True)
class Advanced:
    """`done` of the current phase's steps are finished; `detail` says what the last one was."""

    phase: str
    done: int
    detail: str = ""


@dataclass(frozen=True)
class LayerDone:
    """One decoder layer is on disk; `error` is its mean relative output error, `None` for methods without data."""

    index: int
    total: int
    name: str
    error: float | None
    seconds: float
    resumed: bool = False


Event: TypeAlias = Note | Started | Advanced | LayerDone
Observer: TypeAlias = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """The observer of someone who does not want to know."""
