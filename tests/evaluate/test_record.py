"""The lines of `results.jsonl`: whole or not at all, and nothing that is damaged is believed or lost in silence."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qexport.checkpoint import sha256
from qexport.evaluate.record import Record, append, newest, read_lines, read_results, weights_id
from tests import finished, tiny

FOX = Record(
    "perplexity", "fox.txt", 9.5, 0.25, {"seqlen": 8}, {"weights": "0" * 64},
    {"tokens": 7, "losses": [2.25], "observations": {"loss": [2.25], "predictions": [7.0]}},
)  # fmt: skip


def test_a_line_says_what_when_where_and_by_what(tmp_path: Path) -> None:
    append(tmp_path / "new" / "results.jsonl", [FOX], command="qexport eval x")
    (line,) = read_results(tmp_path / "new")
    assert (line["what"], line["name"], line["figure"], line["se"]) == ("perplexity", "fox.txt", 9.5, 0.25)
    assert line["command"] == "qexport eval x"
    assert line["time"].endswith("+00:00")
    assert {"torch", "qexport", "transformers"} <= line["versions"].keys()


def test_json_has_no_nan(tmp_path: Path) -> None:
    append(tmp_path / "results.jsonl", [replace(FOX, figure=float("nan"), se=float("inf"))], command=None)
    (line,) = read_results(tmp_path)
    assert (line["figure"], line["se"]) == (None, None)
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()


def _observed(line: Any, values: Any) -> Any:
    return {**line, "details": {**line["details"], "observations": values}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: "{" + json.dumps(line),
        lambda line: "[" * 100000,
        lambda line: json.dumps([line]),
        lambda line: json.dumps({**line, "figure": "9.5"}),
        lambda line: json.dumps({**line, "details": {}}),
        lambda line: json.dumps({**line, "what": "fidelity", "details": {**line["details"], "kl": 1.0}}),
        lambda line: json.dumps({**line, "what": "task", "details": {"metrics": {"a": 1}, "metric": "a"}}),
        lambda line: json.dumps({"protocol": {}, "result": {}}),
        lambda line: json.dumps(_observed(line, {"loss": ["1"]})),
        lambda line: json.dumps(_observed(line, {"loss": [1], "predictions": []})),
        lambda line: json.dumps(_observed(line, {"predictions": [0]})),
    ],
)  # fmt: skip
def test_damaged_lines_are_told_by_number(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [FOX, FOX], command=None)
    first, second = path.read_text().splitlines()
    path.write_text("\n".join([first, spoil(json.loads(first)), "", second]) + "\n")
    found, damaged = read_lines(path)
    assert (len(found), damaged) == (2, [2])
    notes: list[Any] = []
    assert read_results(tmp_path, notes.append) == found
    assert "in line 2" in notes[0].text


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"what": "perp\xff')
    append(path, [FOX], command=None)
    found, damaged = read_lines(path)
    assert (len(found), damaged) == (1, [1])


def test_what_unicode_calls_a_line_end_is_none(tmp_path: Path) -> None:
    append(tmp_path / "results.jsonl", [replace(FOX, name="a\u2028b")], command=None)
    assert [line["name"] for line in read_results(tmp_path)] == ["a\u2028b"]


def _write(path: Path) -> None:
    for _ in range(5):
        append(path, [FOX], command=None)


def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=_write, args=(path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found, damaged = read_lines(path)
    assert (len(found), damaged) == (20, [])


def test_newest_of_the_same_protocol_setting_and_versions_is_found(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, [FOX, replace(FOX, figure=8.5), replace(FOX, protocol={"seqlen": 9}, figure=7.5)], command=None)
    lines = read_results(tmp_path)
    found = newest(lines, FOX)
    assert found is not None
    assert found["figure"] == 8.5
    assert newest(lines, replace(FOX, setting={"weights": "1" * 64})) is None
    assert newest([{**line, "versions": {"torch": "1"}} for line in lines], FOX) is None


def test_weights_are_known_by_their_bytes(tmp_path: Path) -> None:
    folder = finished.write(tmp_path / "a")
    own = weights_id(folder)
    (folder / "README.md").write_text("more")
    assert weights_id(folder) == own
    (folder / "qexport.json").unlink()
    assert weights_id(folder) == own
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert weights_id(folder) != own


def test_large_files_of_a_download_are_known_by_the_name_that_the_hubs_cache_gives_them(tmp_path: Path) -> None:
    plain = tiny.save("llama", tmp_path / "plain")
    shutil.copytree(plain, tmp_path / "snapshots" / "1")
    weights = tmp_path / "snapshots" / "1" / "model.safetensors"
    blob = tmp_path / "blobs" / sha256(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    assert weights_id(weights.parent) == weights_id(plain)
