"""Tasks through lm-eval, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.errors import SourceError, UsageError
from qexport.evaluate.harness import find_tasks, flatten, run_tasks
from qexport.evaluate.through import Through
from qexport.formats.kv.kivi import Kivi
from tests import tiny

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": f"{i} and", "choices": [str(i + 1), str(i + 2)], "gold": i % 2} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("own_a", "own_b"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=folder / "rows.jsonl"))
    (folder / "own_lost.yaml").write_text(CHOICE.format(name="own_lost", file=folder / "gone.jsonl"))
    (folder / "long.jsonl").write_text(json.dumps({"q": "a", "choices": ["b" * 500, "c"], "gold": 0}) + "\n")
    (folder / "own_long.yaml").write_text(CHOICE.format(name="own_long", file=folder / "long.jsonl"))
    (folder / "own_all.yaml").write_text("group: own_all\ntask: [own_a, own_b]\n")
    return folder


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make("llama")


def test_values_agree_with_scoring_by_hand(model: Any, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.tokenizer()
    found = run_tasks(model, tokenizer, tasks=find_tasks(["own_a"], tasks))
    right = 0
    for i in range(12):
        scores = []
        for choice in (i + 1, i + 2):
            ids = torch.tensor(tokenizer(f"{i} and {choice}")["input_ids"])
            start = len(tokenizer(f"{i} and")["input_ids"])
            with torch.no_grad():
                logp = model(ids[None]).logits[0].log_softmax(-1)
            scores.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
        right += scores[i % 2] > scores[1 - i % 2]
    accuracy = right / 12
    assert found["own_a"]["acc"] == pytest.approx(accuracy)
    assert found["own_a"]["acc_stderr"] == pytest.approx((accuracy * (1 - accuracy) / 11) ** 0.5)
    assert capsys.readouterr().out == ""


def test_requests_are_read_through_a_cache(model: Any, tasks: Path) -> None:
    found = find_tasks(["own_a"], tasks)
    plain = run_tasks(model, tiny.tokenizer(), tasks=found, limit=4)
    through = Through(model, Kivi(2, 2, 4096), {})
    assert run_tasks(model, tiny.tokenizer(), tasks=found, limit=4, through=through) == plain
    assert through.reads > 0
    assert through.packed_reads == 0
    packed = Through(model, Kivi(2, 2, 0), {})
    run_tasks(model, tiny.tokenizer(), tasks=found, limit=4, through=packed)
    assert packed.packed_reads > 0.5 * packed.reads


def test_groups_patterns_and_limits(model: Any, tasks: Path) -> None:
    notes: list[Any] = []
    found = run_tasks(
        model, tiny.tokenizer(), tasks=find_tasks(["own_all", "own_[ab]"], tasks), limit=2, observer=notes.append
    )
    assert {"own_a", "own_b"} <= found.keys()
    assert any("first 2 documents" in getattr(note, "text", "") for note in notes)


def test_unknown_task_lists_the_closest(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    class Own(TaskManager):
        def __init__(self, include_path: str, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)  # the defaults take ten seconds

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Own)
    with pytest.raises(UsageError, match=r"no task 'own_aa' among the 5 known. Closest: own_a"):
        find_tasks(["own_b", "own_aa"], tasks)


def test_missing_folder_and_missing_data_say_so(tasks: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder with task files"):
        find_tasks(["own_a"], tasks / "none")
    with pytest.raises(SourceError, match=r"task 'own_lost': its data can't be loaded .*--include-path"):
        find_tasks(["own_lost"], tasks)


def test_filters_are_part_of_a_metrics_name() -> None:
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "match,strict": 1, "match_stderr,strict": 0.25}
    assert flatten(row) == {"acc": 0.5, "acc_stderr": None, "match/strict": 1.0, "match_stderr/strict": 0.25}


def test_a_failure_inside_lm_eval_names_the_task_and_the_context(model: Any, tasks: Path) -> None:
    with pytest.raises(SourceError, match="tasks own_long: lm-eval failed .*context of 128 tokens"):
        run_tasks(model, tiny.tokenizer(), tasks=find_tasks(["own_long"], tasks))


def test_bars_are_quiet_without_a_terminal(model: Any, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_tasks(model, tiny.tokenizer(), tasks=find_tasks(["own_a"], tasks))
    assert "it/s" not in capfd.readouterr().err
