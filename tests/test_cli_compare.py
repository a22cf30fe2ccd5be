"""`qexport compare` and the new options of `qexport eval`, through the real entry point."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qexport.cli import app
from tests import finished, tiny

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    finished.write(folder / "packed")
    tiny.save("llama", folder / "dense", dtype=torch.float16)
    (folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return folder


def test_missing_figures_are_measured_if_asked_and_only_once(models: Path) -> None:
    names = [str(models / "packed"), str(models / "dense")]
    assert "Nothing is recorded" in RUNNER.invoke(app, ["compare", *names]).stdout
    how = ["--eval", "--text", str(models / "fox.txt"), "--seqlen", "32", "--against", names[1]]
    first = RUNNER.invoke(app, ["compare", *names, *how, "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert [column["label"] for column in found["columns"]] == ["perplexity, fox.txt", "KL, fox.txt", "top-1, fox.txt"]
    assert {row["name"]: row["original"] for row in found["rows"]} == {"packed": False, "dense": True}
    record = (models / "packed" / "results.jsonl").read_text()
    again = RUNNER.invoke(app, ["compare", *names, *how, "--json"])
    assert json.loads(again.stdout) == found
    assert "is not measured again" in again.stderr
    assert (models / "packed" / "results.jsonl").read_text() == record
    drawn = RUNNER.invoke(app, ["compare", *names]).stdout
    assert "packed" in drawn
    assert "dense (original)" in drawn
    paper = RUNNER.invoke(app, ["compare", *names, "--markdown"]).stdout.splitlines()
    assert paper[0] == "| model | bits per weight | size | perplexity, fox.txt | KL, fox.txt | top-1, fox.txt |"
    assert paper[1] == "|---|---:|---:|---:|---:|---:|"
    assert any(line.startswith("| packed | perplexity, fox.txt | x ") for line in paper)


def test_what_belongs_to_eval_is_refused_without_it(models: Path) -> None:
    found = RUNNER.invoke(app, ["compare", str(models / "packed"), "--windows", "2"])
    assert (found.exit_code, "--windows says how to evaluate: it goes with --eval" in found.stderr) == (2, True)


def test_eval_takes_what_is_recorded_unless_told(models: Path) -> None:
    command = ["eval", str(models / "packed"), "--text", str(models / "fox.txt"), "--seqlen", "16", "--json"]
    first, second = RUNNER.invoke(app, command), RUNNER.invoke(app, command)
    assert json.loads(first.stdout) == json.loads(second.stdout)
    assert ("not measured again" in first.stderr, "not measured again" in second.stderr) == (False, True)
    anew = RUNNER.invoke(app, [*command, "--again", "--batch", "4", "--no-cache"])
    assert json.loads(anew.stdout)["perplexity"]["fox.txt"]["value"] == pytest.approx(
        json.loads(first.stdout)["perplexity"]["fox.txt"]["value"], rel=1e-5
    )
    assert "not measured again" not in anew.stderr


def test_bos_once_stands_before_the_text(models: Path) -> None:
    command = ["eval", str(models / "packed"), "--text", str(models / "fox.txt"), "--seqlen", "32", "--json"]
    found = {
        bos: json.loads(RUNNER.invoke(app, [*command, "--bos", bos]).stdout)["perplexity"]["fox.txt"]
        for bos in ("once", "never")
    }
    assert not found["once"]["bos"]
    # The tokenizer of the tiny model puts none by itself, so none is put.
    assert found["once"]["value"] == found["never"]["value"]
