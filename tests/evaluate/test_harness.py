"""Tasks through lm-eval, offline."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.errors import SourceError, UsageError
from qexport.evaluate.harness import find_tasks, flatten, run_tasks
from qexport.evaluate.presets import PRESETS, expand
from qexport.evaluate.through import Through
from qexport.events import Advanced, Started
from qexport.formats.kv.kivi import Kivi
from qexport.integrations.transformers import load_model
from tests import finished, tiny
from tests.tasks import CHOICE


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
    (folder / "own_set.yaml").write_text("group: own_set\ntask: [own_a, own_b]\n")
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (folder / "own_all.yaml").write_text(f"group: own_all\ntask: [own_a, own_b]\n{mean}\n")
    return folder


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make("llama")


def test_values_agree_with_scoring_by_hand(model: Any, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.tokenizer()
    (found,) = run_tasks(model, tokenizer, tasks=find_tasks(["own_a"], tasks))
    right = []
    for i in range(12):
        scores = []
        for choice in (i + 1, i + 2):
            ids = torch.tensor(tokenizer(f"{i} and {choice}")["input_ids"])
            start = len(tokenizer(f"{i} and")["input_ids"])
            with torch.no_grad():
                logp = model(ids[None]).logits[0].log_softmax(-1)
            scores.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
        right.append(scores[i % 2] > scores[1 - i % 2])
    accuracy = sum(right) / 12
    assert (found.name, found.metric, found.value) == ("own_a", "acc", pytest.approx(accuracy))
    assert found.se == pytest.approx((accuracy * (1 - accuracy) / 11) ** 0.5)
    assert found.documents == {"own_a": "".join(str(int(hit)) for hit in right)}
    assert capsys.readouterr().out == ""


def test_requests_are_read_through_a_cache(model: Any, tasks: Path) -> None:
    found = find_tasks(["own_a"], tasks)
    plain = list(run_tasks(model, tiny.tokenizer(), tasks=found, limit=4))
    through = Through(model, Kivi(2, 2, 4096), {})
    assert list(run_tasks(model, tiny.tokenizer(), tasks=found, limit=4, through=through)) == plain
    assert through.reads > 0
    assert through.packed_reads == 0
    packed = Through(model, Kivi(2, 2, 0), {})
    list(run_tasks(model, tiny.tokenizer(), tasks=found, limit=4, through=packed))
    assert packed.packed_reads > 0.5 * packed.reads


def test_groups_patterns_limits_and_progress(model: Any, tasks: Path) -> None:
    events: list[Any] = []
    wanted = find_tasks(["own_all", "own_[ab]"], tasks)
    assert list(wanted.loaded) == ["own_all"]
    assert list(find_tasks(["own_set"], tasks).loaded) == ["own_a", "own_b"]
    (found,) = run_tasks(model, tiny.tokenizer(), tasks=wanted, limit=2, observer=events.append)
    assert found.metrics.keys() == {"own_a", "own_b", "own_all"}
    assert found.documents.keys() == {"own_a", "own_b"}
    assert any("first 2 documents" in getattr(event, "text", "") for event in events)
    assert [e.total for e in events if isinstance(e, Started)] == [8]
    assert [e.done for e in events if isinstance(e, Advanced)] == list(range(1, 9))


def test_numbers_are_those_of_lm_eval_and_packed_ones_those_of_decoded_weights(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = finished.write(tmp_path / "packed")
    packed = load_model(str(folder), backend="reference", dtype=torch.float32)
    decoded = load_model(str(folder), backend="reference", dtype=torch.float32).dequantize(torch.float32)
    decoded.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'dense'},dtype=float32", tasks=["own_a"], device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), batch_size=4,
    )  # fmt: skip
    found = [
        list(run_tasks(model, tiny.tokenizer(), tasks=find_tasks(["own_a"], tasks))) for model in (packed, decoded)
    ]
    assert found[0] == found[1]
    assert found[0][0].metrics["own_a"] == flatten(theirs["results"]["own_a"])


def test_hashes_say_what_is_asked(tasks: Path, tmp_path: Path) -> None:
    own = find_tasks(["own_a"], tasks).hashes("own_a", None)
    assert own == find_tasks(["own_a"], tasks).hashes("own_a", None)
    assert own["documents"] != find_tasks(["own_a"], tasks).hashes("own_a", 3)["documents"]
    shutil.copy(tasks / "rows.jsonl", tmp_path / "moved.jsonl")
    text = CHOICE.format(name="own_a", file=tmp_path / "moved.jsonl")
    (tmp_path / "own_a.yaml").write_text(text)
    assert find_tasks(["own_a"], tmp_path).hashes("own_a", None) == own
    (tmp_path / "own_a.yaml").write_text(text.replace("{{q}}", "Q: {{q}}"))
    other = find_tasks(["own_a"], tmp_path).hashes("own_a", None)
    assert (other["documents"], other["config"] != own["config"]) == (own["documents"], True)


def test_presets_stand_for_tasks_and_each_is_taken_once() -> None:
    assert expand(["csqa", "piqa", "own"]) == [
        "boolq", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "own",
    ]  # fmt: skip


def test_presets_are_known_to_lm_eval() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    text = "\n".join(
        path.read_text()
        for name in ("super_glue", "arc", "hellaswag", "piqa", "winogrande", "mmlu", "gsm8k", "truthfulqa", "bbh")
        for path in (folder / name).rglob("*")
        if path.suffix in (".yaml", ".yml", "") and path.is_file()
    )
    for task in expand(list(PRESETS)):
        assert re.search(rf"^\s*(task|group): *[\"']?{task}[\"']?$", text, re.MULTILINE), task


def test_unknown_task_lists_the_closest(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    class Own(TaskManager):
        def __init__(self, include_path: str, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)  # the defaults take ten seconds

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Own)
    with pytest.raises(UsageError, match=r"no task 'own_aa' among the 6 known. Closest: own_a"):
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
    with pytest.raises(SourceError, match="task own_long: lm-eval failed .*context of 128 tokens"):
        list(run_tasks(model, tiny.tokenizer(), tasks=find_tasks(["own_long"], tasks)))


def test_bars_are_quiet_without_a_terminal(model: Any, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    list(run_tasks(model, tiny.tokenizer(), tasks=find_tasks(["own_a"], tasks)))
    assert "it/s" not in capfd.readouterr().err
