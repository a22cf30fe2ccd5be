"""`qexport chat`: its arguments, and what it does where nobody sits at a terminal."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from qexport.cli import options as o
from qexport.cli import terminal
from qexport.cli.request import check_dtype, kv_pairs_of, model_of
from qexport.cli.screen import Screen, ending, interruptible, writing
from qexport.devices import device_of
from qexport.errors import UsageError

if TYPE_CHECKING:
    from qexport.chat.talk import Answer, Chat

ROLES = ("user", "system", "assistant")


def chat(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A quantized folder, a dense one, a .gguf file, a Hub id, or demo.")
    ],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this, and end.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    template: Annotated[Path | None, typer.Option(metavar="FILE", help="Another chat template, in Jinja.")] = None,
    no_template: Annotated[
        bool, typer.Option("--no-template", help="Go on where the text ends, without a chat template.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; this and what follows: default as stored.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens of this probability together.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only so many of the likeliest tokens; 0: all.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Of tokens that came before; 1: none.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer; default: as stored, or 512.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is random; default: another one each time.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of all turns; default: what the model has, if compiled 2048.", min=8)
    ] = None,
    kv: o.Kv = None,
    settings: Annotated[
        list[str] | None, typer.Option("-s", help="An option of the cache: kv.residual_window=0.", metavar="KEY=VALUE")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled/--eager", help="Make one graph of a token's step first, which takes a minute.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: as many as torch takes.", min=1)] = None,
    backend: o.Backend = "auto",
    device: o.EvalDevice = None,
    dtype: o.Dtype = None,
    revision: o.Revision = None,
    token: o.Token = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Read turns as lines of JSON, and print a line of JSON for each answer.")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Talk to a model, at a terminal or through a pipe, a line a turn."""
    typed = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    out = sys.stdout
    with ending(debug=debug, interrupted="the conversation is over"), contextlib.ExitStack() as stack:
        turns = _turns(prompt, as_json)
        words = _template(template, no_template)
        if not directory.strip():
            raise UsageError("the model's name is empty.")
        if dtype is not None:
            check_dtype(dtype)
        with contextlib.redirect_stdout(sys.stderr), Screen() as screen:
            from qexport.chat.opening import Setting, open_chat
            from qexport.evaluate.latency import use_threads

            setting = Setting(
                device_of(device), dtype, backend, kv, kv_pairs_of(settings or ()), compiled, context, words,
                {name: str(value) for name, value in typed.items() if value is not None}, revision, token,
            )  # fmt: skip
            stack.enter_context(use_threads(threads))
            found = open_chat(model_of(directory, screen), setting, observer=screen.observe)
        found.note("system", system or "")
        if turns is None:
            terminal.converse(found, directory, out, screen)
        else:
            _through(found, turns, out, screen, as_json=as_json)


def _template(file: Path | None, none: bool) -> str | None:
    """Text of a template, empty for none; None to leave it to the tokenizer."""
    if file is not None and none:
        raise UsageError("--template and --no-template exclude each other.")
    if file is None:
        return "" if none else None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--template {file}: can't be read ({error}).") from error
    if not text.strip():
        raise UsageError(f"--template {file}: the file is empty. --no-template goes without one.")
    return text


def _turns(prompt: str | None, as_json: bool) -> Iterable[tuple[str, str]] | None:
    """Roles and contents; None where a person sits at a terminal."""
    if prompt is not None:
        if not prompt.strip():
            raise UsageError("--prompt: the text is empty.")
        return [("user", prompt)]
    if sys.stdin is None:
        raise UsageError("standard input is closed: there are no turns to read. Use --prompt TEXT.")
    if sys.stdin.isatty() and not as_json:
        return None
    return _read(sys.stdin, as_json)


def _read(source: TextIO, as_json: bool) -> Iterator[tuple[str, str]]:
    """A turn of each line that is not empty; raises `UsageError`."""
    number = 0
    while True:
        number += 1
        try:
            line = source.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"line {number} of standard input is no text in {error.encoding}.") from error
        if not line:
            return
        if line.strip():
            yield _message(line, number) if as_json else ("user", line.rstrip("\r\n"))


def _message(line: str, number: int) -> tuple[str, str]:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        found = None
    role, content = (found.get("role"), found.get("content")) if isinstance(found, dict) else (None, None)
    if role not in ROLES or not isinstance(content, str):
        raise UsageError(
            f'line {number} of standard input: expected {{"role": "user", "content": "..."}}, with a role of '
            f"{', '.join(ROLES)}; found {line.strip():.60}"
        )
    return role, content


def _through(
    talk: "Chat", turns: Iterable[tuple[str, str]], out: TextIO | None, screen: Screen, *, as_json: bool
) -> None:
    """Answer each turn of a user; turns of others are taken in."""

    def write(piece: str) -> None:
        if not as_json and piece:
            with writing(out) as stream:
                stream.write(piece)

    for role, content in turns:
        if role != "user":
            talk.note(role, content)
            continue
        before = talk.dropped
        with interruptible() as stopped, contextlib.redirect_stdout(sys.stderr):
            answer = talk.answer(content, write, stopped)
        with writing(out) as stream:
            stream.write(json.dumps(_line(talk, answer)) + "\n" if as_json else "\n")
        if talk.dropped > before:
            screen.show([terminal.FORGOTTEN.format(talk.dropped - before)])
        if answer.stopped == "interrupt":
            raise KeyboardInterrupt


def _line(talk: "Chat", answer: "Answer") -> dict[str, object]:
    """What `--json` says of a turn."""
    return {
        "answer": answer.text, "tokens": answer.tokens, "tokens_per_s": answer.tokens_per_second,
        "loop": talk.loop.path, "stopped": answer.stopped,
    }  # fmt: skip
