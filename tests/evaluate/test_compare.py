"""Models side by side: figures of one protocol in one column, and differences that are more than noise."""

import json
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qexport.errors import UsageError
from qexport.evaluate.compare import compare
from qexport.evaluate.record import Record, append, weights_id
from qexport.evaluate.run import evaluate
from tests import finished, tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 30
PROTOCOL = {
    "text": "0" * 64,
    "ids": "1" * 64,
    "windows": 40,
    "seqlen": 8,
    "stride": 8,
    "bos": False,
    "dtype": "float32",
}
NOISE = np.random.default_rng(0).normal(0, 0.3, 40)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three packed folders with different weights, as far as anyone can tell."""
    made = []
    for name in ("a", "b", "c"):
        folder = finished.write(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": len(made)}))
        (folder / "qexport.json").unlink()
        made.append(folder)
    return made


def text_record(folder: Path, losses: Any, **protocol: Any) -> None:
    observed = {"loss": list(losses), "predictions": [7.0] * len(losses)}
    details = {"tokens": 280, "losses": [], "observations": observed}
    setting = {"weights": weights_id(folder)}
    own = Record("perplexity", "t", exp(float(np.mean(losses))), None, {**PROTOCOL, **protocol}, setting, details)
    append(folder / "results.jsonl", [own], command=None)


def task_record(folder: Path, name: str, documents: str, figure: float | None = None) -> None:
    value = sum(map(int, documents)) / len(documents) if figure is None else figure
    details = {"metrics": {name: {"acc": value}}, "metric": "acc", "documents": {name: documents}}
    own = Record("task", name, value, None, {"documents": name}, {"weights": weights_id(folder)}, details)
    append(folder / "results.jsonl", [own], command=None)


def test_noise_is_no_win_and_pairs_tell_what_intervals_hide(folders: list[Path]) -> None:
    rng = np.random.default_rng(1)
    a, b, c = folders
    text_record(a, 3 + NOISE)
    text_record(b, 3 + NOISE + rng.normal(0, 0.02, 40))
    text_record(c, 3.02 + NOISE + rng.normal(0, 0.005, 40))
    found = compare([str(folder) for folder in folders])
    rows = {row["name"]: row["figures"]["perplexity, t"] for row in found["rows"]}
    best = found["columns"][0]["best"]
    other = ({"a", "b"} - {best}).pop()
    assert rows[best]["is_best"]
    assert rows[best]["to_best"] is None
    assert rows[other]["to_best"]["verdict"] == "not distinguishable"
    assert rows["c"]["to_best"]["verdict"] == "worse"
    assert rows["c"]["to_best"]["value"] == pytest.approx(rows["c"]["value"] / rows[best]["value"])
    low, high = rows["c"]["interval"]
    assert low < rows[best]["value"] < high  # by themselves they could be one
    assert [row["name"] for row in found["rows"]] == [best, other, "c"]


def test_other_windows_are_not_comparable_and_say_why(folders: list[Path]) -> None:
    a, b, c = folders
    text_record(a, 3 + NOISE)
    text_record(b, 3 + NOISE)
    text_record(c, 2 + NOISE, seqlen=16, ids="2" * 64)
    found = compare([str(folder) for folder in folders])
    figure = found["rows"][-1]["figures"]["perplexity, t"]
    assert figure == {"value": None, "reason": "not comparable: seqlen 16 instead of 8"}
    text_record(b, 3 + NOISE, text="3" * 64, ids="3" * 64)
    text_record(c, 2 + NOISE, ids="4" * 64)
    reasons = {
        row["name"]: row["figures"]["perplexity, t"].get("reason")
        for row in compare([str(a), str(c)])["rows"]
    }  # fmt: skip
    assert "not comparable: other tokens" in reasons.values()
    text_record(c, 2 + NOISE)
    assert all(row["figures"]["perplexity, t"]["value"] for row in compare(list(map(str, folders)))["rows"])


def test_the_newest_figure_of_a_protocol_counts_and_that_of_other_weights_never(folders: list[Path]) -> None:
    a, b, _ = folders
    text_record(a, 3 + NOISE)
    text_record(a, 2 + NOISE)
    text_record(b, 3 + NOISE)
    (b / "results.jsonl").write_text((b / "results.jsonl").read_text() + (a / "results.jsonl").read_text())
    found = {row["name"]: row["figures"]["perplexity, t"]["value"] for row in compare([str(a), str(b)])["rows"]}
    assert [log(found["a"]), log(found["b"])] == pytest.approx([2 + NOISE.mean(), 3 + NOISE.mean()])


def test_tasks_are_averaged_over_those_that_all_have(folders: list[Path]) -> None:
    a, b, c = folders
    for folder, first, second in ((a, "1110" * 20, "10" * 40), (b, "1100" * 20, "10" * 40)):
        task_record(folder, "one", first)
        task_record(folder, "two", second)
    task_record(a, "three", "1111")
    task_record(c, "two", "11" * 40)
    task_record(c, "four", "1111" * 20)
    text = (c / "results.jsonl").read_text().replace('"documents":"two"', '"documents":"others"')
    (c / "results.jsonl").write_text(text)
    found = compare([str(folder) for folder in folders], sort="tasks")
    rows = {row["name"]: row["figures"]["tasks"] for row in found["rows"]}
    assert rows["a"]["value"] == pytest.approx((0.75 + 0.5) / 2)
    assert rows["a"]["tasks"] == {"one": 0.75, "two": 0.5}
    assert rows["b"]["to_best"]["value"] == pytest.approx(-0.125)
    assert rows["b"]["to_best"]["verdict"] == "worse"
    assert rows["c"]["reason"] == "not comparable: one, two: other documents"
    assert [row["name"] for row in found["rows"]] == ["a", "b", "c"]


def test_a_score_that_is_no_mean_over_documents_has_no_interval(folders: list[Path]) -> None:
    for folder in folders:
        task_record(folder, "one", "1100", figure=0.75)
    figure = compare([str(folder) for folder in folders])["rows"][0]["figures"]["tasks"]
    assert (figure["value"], figure["interval"]) == (0.75, None)


def test_the_original_is_a_row_whether_it_is_named_or_not(tmp_path: Path) -> None:
    packed = finished.write(tmp_path / "packed")
    dense = tiny.save("llama", tmp_path / "dense", dtype=torch.float16)
    text = tmp_path / "fox.txt"
    text.write_text(TEXT)
    own = evaluate(packed, texts=[text], seqlen=32, against=dense)
    found = compare([str(packed)])
    rows = {row["name"]: row for row in found["rows"]}
    assert {name: row["original"] for name, row in rows.items()} == {"packed": False, "dense": True}
    assert rows["dense"]["bytes"] is None
    figure = rows["packed"]["figures"]["perplexity, fox.txt"]
    fidelity = own["fidelity"]
    assert figure["to_original"]["value"] == pytest.approx(exp(fidelity["ln_ppl_ratio"]["value"]), rel=1e-5)
    assert rows["packed"]["figures"]["KL, fox.txt"]["value"] == pytest.approx(fidelity["kl"]["mean"], rel=1e-5)
    theirs = rows["dense"]["figures"]["perplexity, fox.txt"]
    named = {row["name"]: row for row in compare([str(packed), str(dense)])["rows"]}
    assert named["dense"]["original"]
    assert named["dense"]["bytes"] == (dense / "model.safetensors").stat().st_size
    assert named["dense"]["figures"]["perplexity, fox.txt"]["value"] == pytest.approx(theirs["value"])
    direct = evaluate(dense, texts=[text], seqlen=32)["perplexity"]["fox.txt"]["value"]
    again = {row["name"]: row for row in compare([str(packed), str(dense)])["rows"]}
    assert (
        again["dense"]["figures"]["perplexity, fox.txt"]["value"] == direct == pytest.approx(theirs["value"], rel=1e-4)
    )


def test_nothing_recorded_is_no_error_and_wrong_names_are(folders: list[Path]) -> None:
    found = compare([str(folders[0])])
    assert (found["columns"], found["rows"][0]["figures"]) == ([], {})
    assert found["rows"][0]["bits_per_weight"] > 1
    with pytest.raises(UsageError, match="--sort 'kl': no model has such a figure"):
        compare([str(folders[0])], sort="kl")
    with pytest.raises(UsageError, match="two of the names mean the same model"):
        compare([str(folders[0]), f"{folders[0]}/"])


def test_sizes_sort_too(folders: list[Path]) -> None:
    tiny.save("llama", folders[0].parent / "dense", dtype=torch.float32)
    names = [str(folders[0].parent / "dense"), str(folders[1])]
    for key in ("bits", "size"):
        assert [row["name"] for row in compare(names, sort=key)["rows"]] == ["b", "dense"]
