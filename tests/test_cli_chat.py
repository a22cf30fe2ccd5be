"""`qexport chat` through a pipe and at a real terminal: what is printed where, what keys do, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qexport.chat.opening import Setting, open_chat
from qexport.chat.talk import Answer, Chat
from qexport.cli import app, terminal
from qexport.errors import UsageError
from tests import finished, talker, tiny

WORDS = "é 漢字🙂"
ANSWERS = {"u": WORDS, "n": "ok."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker.write(tmp_path_factory.mktemp("chat") / "talker", ANSWERS, endless="xab")


def chat(*arguments: str | Path, given: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=given, env={"COLUMNS": "200"})


# ---- through a pipe ----------------------------------------------------------------------------


def test_a_line_is_a_turn_and_only_answers_are_printed(folder: Path) -> None:
    done = chat(folder, given="say u\n\nn\r\nlast n")
    assert (done.exit_code, done.stdout) == (0, f"{WORDS}\nok.\nok.\n")
    assert chat(folder, "--prompt", "two\nlines u").stdout == f"{WORDS}\n"
    assert (chat(folder).exit_code, chat(folder).stdout) == (0, "")


def test_json_in_and_out(folder: Path) -> None:
    turns = [("system", "be good"), ("user", "n"), ("assistant", "x"), ("user", "line\nx")]
    given = "".join(json.dumps({"role": role, "content": text}) + "\n" for role, text in turns)
    done = chat(folder, "--json", "--max-new-tokens", "5", given=given)
    assert done.exit_code == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert set(first) == {"answer", "tokens", "tokens_per_s", "loop", "stopped"}
    assert (first["answer"], first["tokens"], first["stopped"]) == ("ok.", 3, "eos")
    assert first["tokens_per_s"] > 0
    assert first["loop"] == "eager: compiling was not asked for"
    assert (second["answer"], second["tokens"], second["stopped"]) == ("ababa", 5, "length")


def test_settings_are_options(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path / "llama", chat=True)
    (path / "generation_config.json").write_text('{"do_sample": true, "max_new_tokens": 8, "min_p": 0.1}')

    def said(*arguments: str) -> str:
        done = chat(path, "--prompt", "a", "--json", *arguments)
        assert done.exit_code == 0, done.stderr
        assert "warning: generation_config.json asks for min_p" in done.stderr
        found = json.loads(done.stdout)
        assert found["tokens"] <= 8
        return str(found["answer"])

    assert said("--seed", "1") == said("--seed", "1") != said("--seed", "2")
    greedy = said("--temperature", "0")
    assert (
        greedy
        == said("--top-k", "1")
        == said("--top-p", "1e-9")
        != said("--temperature", "0", "--repetition-penalty", "9")
    )


def test_a_packed_folder_without_a_template_goes_on_with_a_note(tmp_path: Path) -> None:
    path = finished.write(tmp_path / "packed")
    arguments = (path, "--prompt", "Once", "--max-new-tokens", "3", "--backend", "reference", "--threads", "1")
    done = chat(*arguments, "--kv", "kivi-2bit", "-s", "kv.residual_window=0")
    assert done.exit_code == 0, done.stderr
    assert "There is no chat template here" in done.stderr
    assert "no chat template" not in chat(*arguments, "--no-template").stderr
    (tmp_path / "own.jinja").write_text(talker.TEMPLATE)
    assert "no chat template" not in chat(*arguments, "--template", tmp_path / "own.jinja").stderr


def test_a_full_context_drops_old_turns_and_says_so(folder: Path) -> None:
    done = chat(folder, "--context", "64", given="a n\n" * 8)
    assert (done.exit_code, done.stdout) == (0, "ok.\n" * 8)
    assert "The context is full" in done.stderr
    done = chat(folder, "--context", "64", given="n\n" + "n" * 99)
    assert (done.exit_code, done.stdout) == (2, "ok.\n")
    assert "UsageError: this message takes 105 tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "given", "code", "message"),
    [
        (["--prompt", " "], "", 2, "--prompt: the text is empty"),
        (["--template", "nowhere.jinja"], "", 2, "--template nowhere.jinja: can't be read"),
        (["--template", os.devnull], "", 2, "the file is empty"),
        (["--template", "a", "--no-template"], "", 2, "exclude each other"),
        (["--temperature", "-1"], "", 2, "temperature -1.0: expected 0"),
        (["--top-p", "2"], "", 2, "top_p 2.0: expected more than 0"),
        (["--dtype", "int8"], "", 2, "--dtype 'int8': expected float32"),
        (["--device", "cuda:99"], "", 2, "--device cuda:99: this torch sees"),
        (["--context", "100000"], "", 2, "the model's context has 256 tokens"),
        (["-s", "kv.bits=2"], "", 2, "this checkpoint names no cache"),
        (["--kv", "kivi"], "", 2, "kivi"),
        (["--json"], "hello\n", 2, 'line 1 of standard input: expected {"role": "user"'),
        (["--json"], '\n{"role": "nobody", "content": ""}\n', 2, "line 2 of standard input"),
        (["--json"], '{"role": "user", "content": 3}\n', 2, "line 1 of standard input"),
        (["--json"], '{"role": "system", "content": "\\ud83d"}\n', 2, "this message is no text"),
        (["--prompt", "a\udcc3"], "", 2, "this message is no text"),
        (["--backend", "fast"], "", 1, "BackendError: there is no backend 'fast'"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: list[str], given: str, code: int, message: str) -> None:
    done = chat(folder, *arguments, given=given)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    assert (chat(" ").exit_code, chat(tmp_path / "no.gguf").exit_code, chat(tmp_path).exit_code) == (2, 1, 1)


def test_a_pipes_answer_that_is_interrupted_is_printed_as_far_as_it_got(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Chat._take

    def take(self: Chat, ids: list[int]) -> Any:
        if len(self._read) == 10:
            signal.raise_signal(signal.SIGINT)
        return written(self, ids)

    monkeypatch.setattr(Chat, "_take", take)
    done = chat(folder, "--prompt", "x", "--json")
    assert (done.exit_code, json.loads(done.stdout)["stopped"]) == (1, "interrupt")
    assert json.loads(done.stdout)["answer"] == "ababa"
    assert done.stderr.endswith("Interrupted: the conversation is over.\n")


# ---- at a terminal -----------------------------------------------------------------------------


def lines(*texts: str) -> str:
    """What a person types line by line, as one turn."""
    left = iter(texts)
    found = terminal.turn(lambda _prompt: next(left))
    assert next(left, None) is None
    return found


def test_lines_become_turns() -> None:
    assert lines("one") == "one"
    assert lines("one\\", "two\\", "three") == "one\ntwo\nthree"
    assert lines('"""one', "", 'two"""') == "one\n\ntwo"
    assert lines('"""', "one\\", '"""') == "one\\"
    assert lines('"""one"""') == "one"
    assert lines("pasted\ntwice") == "pasted\ntwice"


def test_commands(folder: Path, tmp_path: Path) -> None:
    talk = open_chat(str(folder), Setting())
    talk.answer("n", lambda _piece: None)
    assert "temperature 0.7, " in terminal.obey(talk, "set", "temperature 0.7")
    assert talk.settings.temperature == 0.7
    assert "seed 3" in terminal.obey(talk, "set", "seed=3")
    terminal.obey(talk, "system", "be good")
    assert "2 messages" in terminal.obey(talk, "save", str(tmp_path / "said.json"))
    found = json.loads((tmp_path / "said.json").read_text())
    assert [m["role"] for m in found] == ["system", "user", "assistant"]
    terminal.obey(talk, "reset", "")
    assert (talk.messages, talk.system) == ([], "be good")
    terminal.obey(talk, "system", "")
    assert talk.system is None
    for name, rest, message in (
        ("foo", "", "there is no /foo"),
        ("set", "heat 1", "there is no setting 'heat'"),
        ("set", "top_k", "expected a name and a value"),
        ("save", "", "expected the name of a file"),
        ("save", str(tmp_path / "said.json"), "File exists"),
    ):
        with pytest.raises(UsageError, match=message):
            terminal.obey(talk, name, rest)


def test_what_a_model_writes_gives_no_orders_to_a_terminal() -> None:
    assert terminal.visible("a\x1b[2J\x07\r\x9b1m\x7f\tb\né漢🙂") == "a␛[2J␇␍\ufffd1m␡\tb\né漢🙂"


def test_the_line_below_an_answer_says_why_it_ended(folder: Path) -> None:
    talk = open_chat(str(folder), Setting(values={"max_new_tokens": "9"}))
    for answer, text in (
        (Answer("a", 9, 0.5, 1, "eos", 0), "9 tokens, 16.0 a second"),
        (Answer("a", 1, 0.0, 1, "interrupt", 0), "1 token, stopped"),
        (Answer("", 0, 0.0, 1, "interrupt", 0), "0 tokens; nothing was written"),
        (Answer("a", 9, 1.0, 1, "length", 0), "9 tokens, 8.0 a second, cut at max_new_tokens=9"),
        (Answer("a", 3, 1.0, 1, "length", 0), "and the context is full"),
    ):
        assert terminal.described(talk, answer).startswith(text) or text in terminal.described(talk, answer)


class Screen:
    """A program in a terminal of its own."""

    def __init__(self, socket: str) -> None:
        self._tmux = ["tmux", "-L", socket, "-f", os.devnull]

    def run(self, *arguments: str, given: str = "") -> str:
        done = subprocess.run([*self._tmux, *arguments], input=given, capture_output=True, text=True, check=True)
        return done.stdout

    def keys(self, text: str, *more: str) -> None:
        if text:
            self.run("send-keys", "-l", text)
        if more:
            self.run("send-keys", *more)

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.run("capture-pane", "-p", "-J", "-S", "-200").split("\n"))

    def wait(self, text: str, count: int = 1) -> str:
        """Until a text is there so often; returns all that is."""
        end = time.monotonic() + 60
        while (found := self.text()).count(text) < count:
            assert time.monotonic() < end, f"{text!r} never came:\n{found}"
            time.sleep(0.05)
        return found


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    if shutil.which("tmux") is None:
        pytest.skip("there is no tmux to drive a terminal with")
    long = talker.write(tmp_path / "long", ANSWERS, endless="xab", context=100_000)
    found = Screen(f"qexport-{os.getpid()}")
    python = f"exec env LC_ALL=C.UTF-8 PYTHONPATH='{Path(__file__).parents[1]}' '{sys.executable}'"
    command = f"({python} -m qexport chat '{long}' --max-new-tokens 100000 --seed 1); echo ended with $?; sleep 100"
    found.run("-u", "new-session", "-d", "-x", "150", "-y", "50", "-c", str(tmp_path), command)
    yield found
    found.run("kill-server")


def test_a_conversation_at_a_terminal(screen: Screen, tmp_path: Path) -> None:
    screen.wait("/help says what there is.\n>")
    screen.keys("x", "Enter")  # never ends by itself before the context does
    screen.wait("abab")
    screen.run("send-keys", "C-c")
    screen.wait(", stopped\n>")
    screen.keys("/reset", "Enter")
    screen.wait("All turns are forgotten.\n>")
    screen.keys("first \\", "Enter")
    screen.keys("漢字 é🙂 nn", "BSpace", "Enter")
    screen.wait("> first \\\n. 漢字 é🙂 n\nok.\n3 tokens")
    screen.run("load-buffer", "-", given="pasted 🙂\nu")
    screen.run("paste-buffer", "-p")
    screen.keys("", "Enter")
    screen.wait(f"pasted 🙂\nu\n{WORDS}\n13 tokens")
    screen.keys("/save said.json", "Enter")
    screen.wait("4 messages are in said.json.\n>")
    said = [message["content"] for message in json.loads((tmp_path / "said.json").read_text())]
    assert said == ["first \n漢字 é🙂 n", "ok.", "pasted 🙂\nu", WORDS]
    screen.run("send-keys", "C-c")
    screen.wait("Ctrl-C again leaves, as Ctrl-D and /quit do.\n>")
    screen.keys('"""a', "Enter")
    screen.keys('n"""', "Enter")  # so the next Ctrl-C is a first one again
    screen.wait("ok.\n3 tokens", 2)
    screen.run("send-keys", "C-c")
    screen.wait("Ctrl-C again leaves", 2)
    screen.run("send-keys", "C-d")
    found = screen.wait("ended with 0")
    assert "Traceback" not in found


def test_two_interrupts_leave_a_terminal(screen: Screen) -> None:
    screen.wait("/help says what there is.\n>")
    screen.run("send-keys", "C-c")
    screen.wait("Ctrl-C again leaves, as Ctrl-D and /quit do.\n>")
    screen.run("send-keys", "C-c")
    assert "Traceback" not in screen.wait("ended with 0")
