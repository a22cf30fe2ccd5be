"""Turns: what is read of each, what stays when one is stopped, and what goes when the context is full."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from qexport import kv
from qexport.calibration import Calibration
from qexport.chat.opening import Setting, open_chat
from qexport.chat.talk import Chat
from qexport.errors import UsageError
from qexport.events import Note
from qexport.formats.kv.base import make_kv
from qexport.hub import push
from tests import finished, talker, tiny
from tests.hub_server import HubServer
from tests.test_hub import hub  # noqa: F401  a fixture
from tests.test_models_gguf import llama, write

QUIET: Callable[[str], None] = lambda _piece: None  # noqa: E731


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "talker"
    return talker.write(path, {"u": "é 漢字🙂", "n": "ok."}, endless="xab")


@pytest.fixture(params=["llama", "gemma3"], scope="module")
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp("talk") / request.param, chat=True)


def read(chat: Chat) -> str:
    """All that the model has read."""
    return str(chat.prompt.tokenizer.decode(chat._read))


def test_answers_come_in_pieces_and_stay(folder: Path) -> None:
    chat, pieces = open_chat(str(folder), Setting()), list[str]()
    found = chat.answer("say u", pieces.append)
    assert (found.text, found.tokens, found.stopped) == ("é 漢字🙂", 13, "eos")
    assert "".join(pieces) == found.text
    assert found.tokens_per_second
    assert found.tokens_per_second > 0
    assert [m["content"] for m in chat.messages] == ["say u", "é 漢字🙂"]


def test_a_turn_reads_only_what_is_new(folder: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = open_chat(str(folder), Setting(template=template, values={"max_new_tokens": "13"}))
    assert chat.answer("say u", QUIET).read == 5
    assert chat.answer("xx", QUIET).read == 1 + 2  # the last token of an answer that was cut was chosen, not read
    assert chat.answer("n", QUIET).read == 1 + 1
    assert read(chat) == "say ué 漢字🙂xxababababababanok."
    assert chat.answer("n", QUIET).read == 1
    chat.note("system", "say ü")
    assert chat.answer("n", QUIET).text == "ok."
    assert read(chat) == "say üsay ué 漢字🙂xxababababababanok.nok.nok."


def test_what_the_template_changes_is_read_anew_from_there_on(folder: Path) -> None:
    chat = open_chat(str(folder), Setting())  # which puts [assistant] before an answer only when it is past
    assert chat.answer("u", QUIET).read == len("[user]u")
    assert chat.answer("n", QUIET).read == len("[assistant]é 漢字🙂[user]n".encode())
    assert read(chat) == "[user]u[assistant]é 漢字🙂[user]nok."


def test_what_is_kept_changes_no_answer(model: Path) -> None:
    """With windows that move on the cache can't go back, and all is read."""
    kept, fresh = (open_chat(str(model), Setting(values={"max_new_tokens": "9"})) for _ in range(2))
    reads = []
    for turn in ("a", "bc", "d"):
        answers = [chat.answer(turn, QUIET) for chat in (kept, fresh)]
        assert answers[0].text == answers[1].text
        reads.append([a.read for a in answers])
        fresh._forget()
    assert all(own <= whole for own, whole in reads)


def test_a_stopped_answer_stays_as_far_as_it_got(folder: Path) -> None:
    chat, pieces = open_chat(str(folder), Setting()), list[str]()
    found = chat.answer("x", pieces.append, lambda: len(pieces) == 5)
    assert (found.text, found.stopped) == ("ababa", "interrupt")
    assert chat.messages[-1] == {"role": "assistant", "content": "ababa"}
    assert chat.answer("n", QUIET).text == "ok."


def test_a_turn_that_is_stopped_before_anything_was_written_was_never_taken(folder: Path) -> None:
    chat = open_chat(str(folder), Setting())
    found = chat.answer("x", QUIET, lambda: True)
    assert (found.text, found.stopped, found.tokens, chat.messages) == ("", "interrupt", 0, [])


def test_a_turn_that_breaks_off_was_never_taken(folder: Path) -> None:
    chat, pieces = open_chat(str(folder), Setting()), list[str]()
    chat.answer("n", QUIET)

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.answer("x", write)
    assert len(chat.messages) == 2
    assert (chat.answer("n", QUIET).text, read(chat)) == ("ok.", "[user]n[assistant]ok.[user]nok.")


def test_answers_end_at_their_length_or_the_contexts(folder: Path) -> None:
    chat = open_chat(str(folder), Setting(values={"max_new_tokens": "7"}))
    found = chat.answer("x", QUIET)
    assert (found.text, found.tokens, found.stopped) == ("abababa", 7, "length")
    chat = open_chat(str(folder), Setting(context=20))
    found = chat.answer("x", QUIET)
    assert (found.tokens, found.stopped) == (20 - len("[user]x"), "length")


def test_the_oldest_turns_go_when_the_context_is_full(folder: Path) -> None:
    chat = open_chat(str(folder), Setting(context=120, values={"max_new_tokens": "30"}))
    chat.note("system", "be good")
    dropped = [chat.answer(f"turn {i} n", QUIET).dropped for i in range(9)]
    assert dropped[0] == 0 < dropped[-1] < 18
    assert dropped == sorted(dropped)
    assert len(set(dropped)) < 6  # several go at once
    assert read(chat).startswith("[system]be good[user]turn ")
    assert f"[user]turn {dropped[-1] // 2} n[assistant]ok." in read(chat)
    assert len(chat.messages) == 18
    with pytest.raises(
        UsageError, match="this message takes 2.. tokens with what belongs to it, and the context holds 120"
    ):
        chat.answer("n" * 200, QUIET)
    assert len(chat.messages) == 18
    assert chat.answer("n", QUIET).text == "ok."
    chat.reset()
    assert (chat.answer("n", QUIET).dropped, chat.system) == (0, "be good")


def test_a_base_model_goes_on_and_says_so(tmp_path: Path) -> None:
    notes: list[Any] = []
    path = finished.write(tmp_path / "packed")
    chat = open_chat(str(path), Setting(values={"max_new_tokens": "4"}), observer=notes.append)
    assert [n.text for n in notes if isinstance(n, Note) and "no chat template" in n.text]
    answer = chat.answer("Once", QUIET)
    assert read(chat).startswith("Once")
    assert answer.read == 4
    chat = open_chat(str(path), Setting(template=""), observer=notes.append)
    assert len(notes) == 1
    chat = open_chat(str(path), Setting(template=talker.TEMPLATE), observer=notes.append)
    chat.answer("a", QUIET)
    assert read(chat).startswith("[user]a")
    assert len(notes) == 1


def test_a_seed_repeats_a_conversation(model: Path) -> None:
    values = {"temperature": "1.5", "max_new_tokens": "12", "seed": "3"}
    chat = open_chat(str(model), Setting(values=values))
    first = chat.answer("a", QUIET).text
    chat.reset()
    chat.use(chat.settings)
    assert chat.answer("a", QUIET).text == first
    other = open_chat(str(model), Setting(values={**values, "seed": "4"}))
    assert other.answer("a", QUIET).text != first


def test_a_conversation_through_a_quantized_cache(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path / "llama", chat=True)
    chat = open_chat(str(path), Setting(kv="kivi-2bit", kv_options={"residual_window": "0"}))
    for turn in ("a long enough turn", "b"):
        chat.answer(turn, QUIET)
    assert type(chat.loop._cache).__name__ == "QuantCache"
    assert chat.loop._cache.packed_reads > 0
    with pytest.raises(UsageError, match="needs what calibration finds"):
        open_chat(str(path), Setting(kv="kvquant-3bit"))


def test_what_cannot_be_opened_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="--context 999: the model's context has 256 tokens"):
        open_chat(str(folder), Setting(context=999))
    with pytest.raises(UsageError, match="expected a folder, a .gguf file or a Hub id"):
        open_chat(str(folder / "config.json"), Setting())
    with pytest.raises(UsageError, match="there is no setting 'heat'"):
        open_chat(str(folder), Setting(values={"heat": "1"}))


def test_a_gguf_file_talks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path / "cache"))
    write(llama(), tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    chat = open_chat(str(tmp_path / "tiny.gguf"), Setting(values={"max_new_tokens": "3"}))
    assert chat.answer("hello", QUIET).read == 4  # of which one is "he"
    assert chat.context == tiny.CONTEXT


def test_a_model_of_the_hub_talks_through_its_own_cache(tmp_path: Path, hub: HubServer) -> None:  # noqa: F811
    folder = finished.write(tmp_path / "out")
    kv.change(folder, make_kv("kvquant-3bit", {}), kv.Job(Calibration("builtin", 4, 32)))
    push(folder, "tester/tiny", token="hf_good", endpoint=hub.url, sleep=lambda _seconds: None)
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [
        sys.executable,
        "-m",
        "qexport",
        "chat",
        "tester/tiny",
        "--prompt",
        "a",
        "--max-new-tokens",
        "3",
        "--json",
    ]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=120, check=True)
    near = open_chat(str(folder), Setting(values={"max_new_tokens": "3"}))
    assert json.loads(done.stdout)["answer"] == near.answer("a", QUIET).text
    assert hub.count("GET", "/resolve/") > 0
