"""What a person sees while work goes on, and how it ends: progress and errors on stderr, the result on stdout."""

import contextlib
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qexport import events
from qexport.errors import QExportError, UsageError

Drawing: TypeAlias = Callable[[Any], Iterable[Table | str]]

_WIDTH = 140  # of tables in a file or a pipe
_ETA_WINDOW = 1800.0  # seconds of history: a layer may take minutes


class OutputError(QExportError):
    """The result can't be written to standard output."""


class _Remaining(TimeRemainingColumn):
    """The time left, but of an outer phase: its steps are too unlike for it, and its detail says what is left."""

    def render(self, task: Task) -> Text:
        return Text("") if task.fields["outer"] else super().render(task)


class Screen:
    """Draws events: a progress bar with ETA on a terminal, only notes elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Remaining(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            speed_estimate_period=_ETA_WINDOW,
        )
        self._tasks: dict[str, TaskID] = {}
        self._current = ""

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def show(self, drawings: Iterable[Table | str]) -> None:
        """Print tables or lines on stderr, above the bars."""
        for drawing in drawings:
            self.console.print(
                drawing if isinstance(drawing, Table) else Text(drawing), soft_wrap=isinstance(drawing, str)
            )

    def observe(self, event: events.Event) -> None:
        """Take in one event; this is the observer that commands hand down."""
        match event:
            case events.Note(text, level):
                self.console.print(Text(("warning: " if level == "warning" else "") + text), soft_wrap=True)
            case events.Started(phase, total, unit, outer):
                self._finish()
                self._current = phase
                self._tasks[phase] = self._bars.add_task(phase, total=total, unit=unit, detail="", outer=outer)
            case events.Advanced(phase, done, detail):
                self._advance(phase, done, detail)
            case events.LayerDone(index, _, name, error, _, resumed):
                how = "from the last run" if resumed else "" if error is None else f"error {error:.4f}"
                self._advance(self._current, index + 1, f"{name} {how}".rstrip())

    def _advance(self, phase: str, done: int, detail: str) -> None:
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=done, detail=detail)

    def _finish(self) -> None:
        inner = [task.id for task in self._bars.tasks if not task.fields["outer"]]
        for task in inner:
            self._bars.update(task, visible=False)


def run(
    work: Callable[[Screen], Any],
    draw: Drawing,
    *,
    as_json: bool,
    debug: bool,
    interrupted: str = "nothing was changed",
) -> None:
    """Do the work of one command, print its result, and end the process if it failed.

    Whatever libraries print meanwhile goes to stderr, so that stdout holds the result alone.

    Args:
        work: makes the result.
        draw: turns it into tables and lines.
        as_json: print the result as JSON instead.
        debug: show tracebacks.
        interrupted: what Ctrl-C means for this command.

    Raises:
        typer.Exit: with the exit code of the error; the error is then already on stderr.
    """
    out = sys.stdout
    with ending(debug=debug, interrupted=interrupted):
        with contextlib.redirect_stdout(sys.stderr), Screen() as screen:
            result = work(screen)
        _print(out, result, draw, as_json=as_json)


@contextlib.contextmanager
def ending(*, debug: bool, interrupted: str) -> Iterator[None]:
    """End the process as every command ends: with one line on stderr and an exit code, if something failed within."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except QExportError as error:
        raise _failed(f"{type(error).__name__}: {error}", error.exit_code, debug) from None
    except KeyboardInterrupt:
        raise _failed(f"Interrupted: {interrupted}.", 1, debug) from None
    except Exception as error:  # noqa: BLE001  the command line is where everything ends as one line
        text = " ".join(str(error).split()) or "no message"
        raise _failed(f"{type(error).__name__}: {text} (unexpected; --debug shows where)", 1, debug) from None


def _print(out: TextIO | None, result: Any, draw: Drawing, *, as_json: bool) -> None:
    found = json.dumps(_plain(result), indent=2, allow_nan=False) + "\n" if as_json else list(draw(result))
    with writing(out) as stream:
        _write(stream, found)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C asks to stop, which the given function tells; pressed again it raises `KeyboardInterrupt`."""
    pressed: list[int] = []

    def press(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def writing(out: TextIO | None) -> Iterator[TextIO]:
    """Standard output to write results to, flushed in the end; what prevents that is a stated error."""
    if out is None:
        raise UsageError("standard output is closed: there is nowhere to print the result to.")
    try:
        yield out
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget(out)
        raise OutputError(
            f"the work is done, but its result can't be written to standard output ({error.strerror}). "
            "Repeat the command with its output in another place."
        ) from error


def _write(out: TextIO, found: str | list[Table | str]) -> None:
    if isinstance(found, str):
        out.write(found)
    else:
        console = Console(file=out, highlight=False, width=None if out.isatty() else _WIDTH)
        for drawing in found:
            console.print(drawing if isinstance(drawing, Table) else Text(drawing), soft_wrap=isinstance(drawing, str))


def _forget(out: TextIO) -> None:
    """Point a broken output elsewhere: Python would flush it once more at the end, and complain in its own way."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, out.fileno())
        os.close(sink)


def _failed(line: str, code: int, debug: bool) -> typer.Exit:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return typer.Exit(code)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
