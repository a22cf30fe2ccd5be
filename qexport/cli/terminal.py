"""A conversation at a terminal: lines in with editing, answers as they come, and commands that begin with a slash."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.text import Text

from qexport.cli.screen import Screen, interruptible, writing
from qexport.errors import QExportError, UsageError

if TYPE_CHECKING:
    from qexport.chat.talk import Answer, Chat

HELP = '''\
A line is a turn. One that ends in \\ goes on in the next, and so does all between """ and """; a paste is one turn.
Ctrl-C stops an answer, which stays as far as it got; pressed again it stops at once, and the turn is forgotten.
  /reset              forget all turns; the system message and settings stay
  /system TEXT        set the system message; without TEXT there is none
  /set                show the settings; /set temperature 0.7 changes one (0: always the likeliest token)
  /save FILE          write the messages as JSON into a new file
  /help, /quit        this; leave, as Ctrl-D does
A message that begins with a slash needs a space before it.'''
FORGOTTEN = "The context is full: {} older messages are no longer read. /reset begins anew."
_QUOTES = '"""'
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_CONTROL |= dict.fromkeys(range(128, 160), 0xFFFD)


class _Leave(Exception):  # noqa: N818  it is no error
    """Ends the conversation."""


def converse(talk: "Chat", name: str, out: TextIO | None, screen: Screen) -> None:
    """Talk until the user leaves.

    Args:
        talk: with the model.
        name: of the model, to greet with.
        out: where answers go.
        screen: where everything else goes.
    """
    _edit_lines()
    _say(screen, f"{name}: {talk.context:,} tokens of context, loop {talk.loop.path}. /help says what there is.")
    pressed = False
    while True:
        try:
            text = turn(_line)
            pressed = False
            if text.strip():
                _take(talk, text, out, screen)
        except (EOFError, _Leave) as end:
            if isinstance(end, EOFError):
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if pressed:
                return
            pressed = True
            _say(screen, "Ctrl-C again leaves, as Ctrl-D and /quit do.")
        except UnicodeDecodeError as error:
            _say(screen, f"That was no text in {error.encoding}.")
        except QExportError as error:
            _say(screen, f"{type(error).__name__}: {error}")


def visible(text: str) -> str:
    """A text whose control characters are pictures: what a model writes must not give orders to a terminal."""
    return text.translate(_CONTROL)


# ---- lines -------------------------------------------------------------------------------------


def turn(line: Callable[[str], str]) -> str:
    r"""One turn: a line, lines that end in `\`, or a block between triple quotes.

    Args:
        line: reads one, given what to show before it.
    """
    text = line("> ")
    if text.lstrip().startswith(_QUOTES):
        text = text.lstrip().removeprefix(_QUOTES)
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + line(". ")
        return text.rstrip().removesuffix(_QUOTES).strip("\n")
    while text.endswith("\\"):
        text = text.removesuffix("\\") + "\n" + line(". ")
    return text


def _line(prompt: str) -> str:
    if sys.stdout is not None and sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # answers go elsewhere, and nothing else should
    return input()


def _edit_lines() -> None:
    """Arrow keys, history, and a paste of several lines as one turn, where Python came with GNU readline."""
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def _say(screen: Screen, text: str) -> None:
    screen.console.print(Text(text, style="dim"), soft_wrap=True)


# ---- turns -------------------------------------------------------------------------------------


def _take(talk: "Chat", text: str, out: TextIO | None, screen: Screen) -> None:
    """A command or a message."""
    command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    if command is not None:
        _say(screen, obey(talk, command[1], (command[2] or "").strip()))
        return

    def write(piece: str) -> None:
        with writing(out) as stream:
            stream.write(visible(piece))

    before = talk.dropped
    try:
        with interruptible() as stopped, contextlib.redirect_stdout(sys.stderr):
            answer = talk.answer(text.removeprefix(" ") if text.startswith(" /") else text, write, stopped)
    except KeyboardInterrupt:
        write("\n")
        _say(screen, "Stopped at once; that turn is forgotten.")
        return
    write("" if answer.text.endswith("\n") else "\n")
    _say(screen, described(talk, answer))
    if talk.dropped > before:
        _say(screen, FORGOTTEN.format(talk.dropped - before))


def described(talk: "Chat", answer: "Answer") -> str:
    """How fast an answer came, and why it ended where it did."""
    speed = answer.tokens_per_second
    text = f"{answer.tokens} token{'s' * (answer.tokens != 1)}" + ("" if speed is None else f", {speed:.1f} a second")
    if answer.stopped == "interrupt":
        return text + (", stopped" if answer.text else "; nothing was written, so that turn is forgotten")
    if answer.stopped == "length":
        full = answer.tokens < talk.settings.max_new_tokens
        return text + (", and the context is full" if full else f", cut at max_new_tokens={answer.tokens} (/set)")
    return text


def obey(talk: "Chat", name: str, rest: str) -> str:
    """Do what a command says; returns what to tell.

    Raises:
        UsageError: there is no such command or setting, or the file can't be written.
    """
    match name:
        case "help":
            return HELP
        case "reset":
            talk.reset()
            return "All turns are forgotten."
        case "system":
            talk.note("system", rest)
            return "The next answer has another system message." if rest else "There is no system message now."
        case "set":
            return _set(talk, rest)
        case "save":
            return _save(talk, rest)
        case "quit" | "exit":
            raise _Leave
    raise UsageError(f"there is no /{name}. /help lists what there is; a space before the slash sends it to the model.")


def _set(talk: "Chat", rest: str) -> str:
    from qexport.chat.sampling import changed

    words = rest.replace("=", " ").split()
    if len(words) not in (0, 2):
        raise UsageError(f"/set {rest}: expected a name and a value, for example /set temperature 0.7.")
    if words:
        talk.use(changed(talk.settings, *words))
    return ", ".join(f"{name} {value}" for name, value in asdict(talk.settings).items())


def _save(talk: "Chat", rest: str) -> str:
    if not rest:
        raise UsageError("/save: expected the name of a file.")
    system = [{"role": "system", "content": talk.system}] if talk.system else []
    text = json.dumps([*system, *map(dict, talk.messages)], indent=2, ensure_ascii=False)
    try:
        with Path(rest).expanduser().open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except (OSError, RuntimeError) as error:
        raise UsageError(f"/save {rest}: can't be written ({error}). Name another file.") from error
    return f"{len(talk.messages)} messages are in {rest}."
