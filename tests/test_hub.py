"""Pushing against a local server that speaks the Hub's API, and fails when told to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qexport.card import is_generated
from qexport.errors import CheckpointError, SourceError, UsageError
from qexport.evaluate.record import Record, append
from qexport.export import export
from qexport.hub import push, sendable
from qexport.verify import verify
from tests import finished
from tests.hub_server import HubServer

REPO = "tester/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = finished.write(tmp_path / "out")
    for name in ("qexport.journal", "model-00001-of-00003.safetensors.tmp", "results_others.json", "notes.txt"):
        (out / name).write_text("not for the Hub")
    (out / "LICENSE").write_text("the base model's")
    (out / "cache").mkdir()
    (out / "cache" / "config.json").write_text("{}")
    return out


def send(folder: Path, hub: HubServer, repo: str = REPO, **options: Any) -> dict[str, Any]:
    return push(folder, repo, token="hf_good", endpoint=hub.url, sleep=lambda _seconds: None, **options)


def expected(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sendable(folder)}


def test_files_arrive_and_verify(folder: Path, hub: HubServer, tmp_path: Path) -> None:
    found = send(folder, hub)
    assert hub.files(REPO) == expected(folder)
    names = set(hub.files(REPO))
    assert {
        "config.json",
        "qexport.json",
        "tokenizer.json",
        "README.md",
        "LICENSE",
        "model-00003-of-00003.safetensors",
    } <= names
    assert not names & {"run.json", "qexport.journal", "results_others.json", "notes.txt"}
    assert found["files"] == {name: len(data) for name, data in hub.files(REPO).items()}
    assert (found["repo"], found["url"], found["dry_run"]) == (REPO, f"{hub.url}/{REPO}", False)
    assert found["commit"] == hub.repos[REPO].head("main")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in hub.files(REPO).items():
        (copy / name).write_bytes(data)
    verify(copy)


def test_what_was_pushed_loads_back_with_equal_logits(folder: Path, hub: HubServer, tmp_path: Path) -> None:
    send(folder, hub)
    program = (
        "import sys, torch, qexport\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "torch.set_num_threads(1)\n"
        "far, near = (AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[1:])\n"
        "ids = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1])('hello there')['input_ids']])\n"
        "assert torch.equal(far(ids).logits, near(ids).logits)\n"
    )
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, REPO, str(folder)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.count("GET", "/resolve/") > 0


def test_repeating_sends_nothing(folder: Path, hub: HubServer) -> None:
    first = send(folder, hub)
    again = send(folder, hub)
    assert len(hub.repos[REPO].commits) == 1
    assert hub.count("PUT", "/storage/") == len(hub.storage)
    assert again["commit"] == first["commit"]


def test_only_changed_files_are_sent_again(folder: Path, hub: HubServer) -> None:
    send(folder, hub)
    (folder / "LICENSE").write_text("another")
    send(folder, hub)
    assert hub.repos[REPO].commits[-1][2] == ("LICENSE",)


@pytest.mark.parametrize("how", ["500", "drop"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/info/lfs/objects/batch"),
        ("PUT", "/storage/"),
        ("POST", "/commit/"),
        ("HEAD", "/resolve/"),
    ],
)
def test_failure_is_tried_again(folder: Path, hub: HubServer, method: str, path: str, how: str) -> None:
    hub.fail(method, path, times=1, how=how)
    send(folder, hub)
    assert hub.files(REPO) == expected(folder)


@pytest.mark.parametrize("how", ["500", "drop"])
def test_lasting_failure_is_reported_and_repeating_completes_it(folder: Path, hub: HubServer, how: str) -> None:
    notes: list[Any] = []
    hub.fail("POST", "/commit/", times=50, how=how)
    with pytest.raises(SourceError, match=r"uploading failed 3 times .*repeat the command"):
        send(folder, hub, observer=notes.append)
    assert sum("trying again" in getattr(note, "text", "") for note in notes) == 2
    assert not hub.files(REPO)
    stored = hub.count("PUT", "/storage/")
    assert stored == len(hub.storage) > 0
    hub.faults.clear()
    send(folder, hub)
    assert hub.files(REPO) == expected(folder)
    assert hub.count("PUT", "/storage/") == stored  # weights that had arrived are not sent twice


def test_half_of_the_weights_survive_a_broken_connection(folder: Path, hub: HubServer) -> None:
    hub.fail("PUT", "/storage/", times=1000, how="drop")
    with pytest.raises(SourceError, match="repeat the command"):
        send(folder, hub)
    hub.faults.clear()
    send(folder, hub)
    assert hub.files(REPO) == expected(folder)


def test_damaged_directory_is_not_pushed(folder: Path, hub: HubServer) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="model-00002"):
        send(folder, hub)
    assert not hub.requests


def test_unfinished_and_foreign_directories_are_not_pushed(tmp_path: Path, hub: HubServer) -> None:
    with pytest.raises(CheckpointError, match="there is none"):
        send(tmp_path / "none", hub)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="quant_method"):
        send(tmp_path, hub)
    assert not hub.requests


def test_verification_can_be_replaced(folder: Path, hub: HubServer) -> None:
    def refuse(_folder: Path) -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="^no$"):
        send(folder, hub, verify=refuse)


def test_dry_run_shows_everything_and_connects_to_nothing(folder: Path, hub: HubServer) -> None:
    before = sorted(folder.iterdir())
    found = push(folder, REPO, dry_run=True, endpoint=hub.url)
    assert not hub.requests
    assert sorted(folder.iterdir()) == before
    assert found["commit"] is None
    assert found["card"]["action"] == "write"
    assert "someone/tiny-llama" in found["card"]["text"]
    sent = send(folder, hub)
    assert sent["files"] == found["files"]
    assert sent["bytes"] == found["bytes"] == sum(found["files"].values())


def test_card_edited_here_is_sent_as_it_is(folder: Path, hub: HubServer) -> None:
    (folder / "README.md").write_text("# mine\n")
    found = send(folder, hub)
    assert found["card"]["action"] == "keep"
    assert hub.files(REPO)["README.md"] == b"# mine\n"
    assert (folder / "README.md").read_text() == "# mine\n"


def test_card_with_a_broken_header_is_refused_at_once(folder: Path, hub: HubServer) -> None:
    (folder / "README.md").write_text("---\ntags: [\n---\n# mine\n")
    with pytest.raises(SourceError, match=r"uploading failed \(HTTP 400: Invalid metadata in README.md"):
        send(folder, hub)
    assert hub.count("POST", "/api/validate-yaml") == 1
    assert not hub.files(REPO)


def test_card_edited_on_the_hub_is_kept(folder: Path, hub: HubServer) -> None:
    notes: list[Any] = []
    send(folder, hub)
    hub.files(REPO)["README.md"] += b"\nEdited by hand.\n"
    edited = hub.files(REPO)["README.md"]
    (folder / "LICENSE").write_text("another")
    found = send(folder, hub, observer=notes.append)
    assert hub.files(REPO)["README.md"] == edited
    assert hub.files(REPO)["LICENSE"] == b"another"
    assert found["card"]["action"] == "keep"
    assert "README.md" not in found["files"]
    assert any("edited by hand" in getattr(note, "text", "") for note in notes)


def test_card_of_ours_is_renewed_with_new_results(folder: Path, hub: HubServer) -> None:
    send(folder, hub)
    old = hub.files(REPO)["README.md"].decode()
    protocol = {"windows": 1, "seqlen": 11, "stride": 11, "bos": False, "dtype": "float32"}
    details = {"value": 9.875, "tokens": 10, "losses": [2.29], "seqlen": 11, "stride": 11, "bos": False}
    found = Record("perplexity", "fox.txt", 9.875, None, protocol, {"device": "cpu"}, {**details, "observations": {}})
    append(folder / "results.jsonl", [found], command=None)
    send(folder, hub)
    new = hub.files(REPO)["README.md"].decode()
    assert is_generated(old)
    assert is_generated(new)
    assert "9.875" in new
    assert "9.875" not in old
    assert hub.repos[REPO].commits[-1][2] == ("README.md", "results.jsonl")


def test_name_without_owner_is_completed_in_the_card(folder: Path, hub: HubServer) -> None:
    found = send(folder, hub, repo="mine")
    assert found["repo"] == "tester/mine"
    assert 'from_pretrained("tester/mine")' in hub.files("tester/mine")["README.md"].decode()


def test_branch_is_made_and_filled(folder: Path, hub: HubServer) -> None:
    for _ in range(2):
        send(folder, hub, revision="4bit")
    assert hub.files(REPO, "4bit") == expected(folder)
    assert not hub.files(REPO, "main")


def test_private_is_private_or_an_error(folder: Path, hub: HubServer) -> None:
    send(folder, hub, repo="tester/secret", private=True)
    assert hub.repos["tester/secret"].private
    send(folder, hub)
    assert not hub.repos[REPO].private
    with pytest.raises(UsageError, match="exists and is public"):
        send(folder, hub, private=True)


def test_missing_and_refused_tokens_say_how_to_get_one(folder: Path, hub: HubServer) -> None:
    with pytest.raises(SourceError, match=r"found none. Run `hf auth login`"):
        push(folder, REPO, endpoint=hub.url)
    assert not hub.requests
    with pytest.raises(SourceError, match=r"HTTP 401.*write access") as caught:
        push(folder, REPO, token="hf_bad", endpoint=hub.url)
    assert "hf_bad" not in str(caught.value)


def test_impossible_repository_names_are_usage_errors(folder: Path, hub: HubServer) -> None:
    for name in ("a/b/c", "", "bad name", "x" * 200):
        with pytest.raises(UsageError, match="can't name a repository"):
            send(folder, hub, repo=name)


def test_unreachable_hub_is_reported(folder: Path, hub: HubServer) -> None:
    with pytest.raises(SourceError, match="creating the repository failed 3 times"):
        push(folder, REPO, token="hf_good", endpoint="http://127.0.0.1:9", sleep=lambda _seconds: None)


def test_manifest_decides_what_belongs_to_a_checkpoint(folder: Path) -> None:
    names = {path.name for path in sendable(folder)}
    assert "notes.txt" not in names
    text = (folder / "qexport.json").read_text()
    (folder / "qexport.json").write_text(text.replace('"config.json"', '"notes.txt":"","config.json"', 1))
    assert "notes.txt" in {path.name for path in sendable(folder)}


def test_a_link_to_a_file_elsewhere_is_not_sent(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE: expected a file in .*, found a link to one elsewhere"):
        sendable(folder)


def test_an_export_is_pushed_with_its_card(folder: Path, hub: HubServer, tmp_path: Path) -> None:
    export(folder, "dense", tmp_path / "plain", check=False)
    (tmp_path / "plain" / "notes.txt").write_text("not for the Hub")
    send(tmp_path / "plain", hub)
    files = hub.files(REPO)
    assert files == expected(tmp_path / "plain")
    assert {"config.json", "README.md", "qexport-export.json", "tokenizer.json"} <= set(files)
    assert "notes.txt" not in files
    card = files["README.md"].decode()
    assert is_generated(card)
    assert f'from_pretrained("{REPO}")' in card
    assert "**not checked**" in card
    assert "pip install qexport" not in card


def test_a_changed_export_is_not_pushed(folder: Path, hub: HubServer, tmp_path: Path) -> None:
    export(folder, "dense", tmp_path / "plain", check=False)
    config = tmp_path / "plain" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config.json: was changed since it was exported"):
        send(tmp_path / "plain", hub)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing; qexport-export.json lists it"):
        send(tmp_path / "plain", hub)
