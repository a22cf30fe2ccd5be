"""One evaluation from directories to the JSON document, and its record."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qexport.checkpoint import Reader
from qexport.errors import CheckpointError, SourceError, UsageError
from qexport.evaluate.perplexity import perplexity
from qexport.evaluate.record import read_results
from qexport.evaluate.run import evaluate
from qexport.evaluate.size import measure, packed_modules
from qexport.evaluate.windows import Windows
from tests import finished, tiny
from tests.tasks import CHOICE

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "tiny", dtype=torch.float16)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


def quiz(folder: Path) -> Path:
    """A folder with two small tasks."""
    rows = [{"q": f"{i} and", "choices": [str(i + 1), str(i + 2)], "gold": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("own_a", "own_b"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=folder / "rows.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def _fresh(packed: Path) -> None:
    (packed / "results.jsonl").unlink(missing_ok=True)


def test_document_has_exactly_the_stated_keys(packed: Path, text: Path) -> None:
    found = evaluate(packed, texts=[text], against=packed, windows=2)
    assert sorted(found) == ["bits_per_parameter", "bits_per_weight", "bytes", "fidelity", "perplexity", "tasks"]
    assert sorted(found["perplexity"]) == ["fox.txt"]
    assert sorted(found["perplexity"]["fox.txt"]) == ["bos", "losses", "seqlen", "stride", "tokens", "value"]
    assert {key: sorted(value) for key, value in found["fidelity"].items() if key != "tokens"} == {
        "kl": ["max", "mean", "median", "p99", "se"], "top1": ["se", "value"], "ln_ppl_ratio": ["se", "value"],
    }  # fmt: skip
    assert found["fidelity"]["kl"]["mean"] == 0
    assert found["perplexity"]["fox.txt"]["seqlen"] == tiny.CONTEXT
    json.dumps(found, allow_nan=False)


def test_packed_model_is_compared_with_its_dense_original(packed: Path, dense: Path, text: Path) -> None:
    found = evaluate(packed, texts=[text], against=dense, seqlen=64)
    assert 0 < found["fidelity"]["kl"]["mean"] < 1
    assert found["fidelity"]["tokens"] == found["perplexity"]["fox.txt"]["tokens"] == 8 * 63


def test_dense_directory_is_evaluated_in_float32_and_left_alone(dense: Path, text: Path) -> None:
    found = evaluate(dense, texts=[text], seqlen=64, windows=1)
    assert found["bits_per_weight"] == found["bits_per_parameter"] == 16
    assert found["bytes"] == (dense / "model.safetensors").stat().st_size
    assert not (dense / "results.jsonl").exists()
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = torch.tensor([tiny.tokenizer()(TEXT)["input_ids"][:64]])
    loss = model(ids, labels=ids).loss.item()
    assert found["perplexity"]["fox.txt"]["losses"] == [pytest.approx(loss, rel=1e-5)]


def test_bits_are_those_of_the_stored_tensors(packed: Path) -> None:
    sizes = measure(packed)
    reader = Reader(packed)
    modules = packed_modules(reader)
    assert len(modules) == 14
    own = [n for n in reader.names if n.rpartition(".")[0] in modules]
    weights = sum(n * k for _, n, k in modules.values())
    assert sizes.bits_per_weight == 8 * sum(reader.meta(n).nbytes for n in own) / weights
    assert sizes.nbytes == sum(path.stat().st_size for path in packed.glob("model-*.safetensors"))
    dense = sum(reader.meta(n).nbytes for n in reader.names if n not in own)
    assert sizes.bits_per_parameter == 8 * (dense + sizes.bits_per_weight * weights / 8) / (weights + dense / 4)


def test_files_that_do_not_explain_themselves_are_measured_by_the_model(tmp_path: Path, packed: Path) -> None:
    silent = finished.write(tmp_path / "silent", metadata=False)
    with pytest.raises(CheckpointError, match="how large its quantized modules are"):
        measure(silent)
    from qexport.integrations.transformers import load_model

    wanted, found = measure(packed), measure(silent, load_model(str(silent)))
    assert (found.bits_per_weight, found.bits_per_parameter) == (wanted.bits_per_weight, wanted.bits_per_parameter)


def test_each_evaluation_adds_a_line_with_its_protocol(packed: Path, text: Path) -> None:
    evaluate(packed, texts=[text], seqlen=32, windows=2)
    with (packed / "results.jsonl").open("ab") as file:
        file.write(b'{"cut short')
    found = evaluate(packed, texts=[text], seqlen=64, stride=32, windows=2, bos="always", against=packed)
    notes: list[Any] = []
    lines = read_results(packed, notes.append)
    assert "line 2" in notes[0].text
    assert [line["what"] for line in lines] == ["perplexity", "perplexity", "fidelity"]
    perplexity, fidelity = lines[1:]
    document = {k: v for k, v in perplexity["details"].items() if k != "observations"}
    assert document == found["perplexity"]["fox.txt"]
    assert perplexity["figure"] == document["value"]
    assert (fidelity["figure"], fidelity["details"]["against"]) == (0, "tiny")
    for line in (perplexity, fidelity):
        protocol = line["protocol"]
        assert (protocol["bos"], protocol["dtype"], protocol["seqlen"], protocol["windows"]) == (True, "float32", 64, 2)
        assert protocol["text"] == hashlib.sha256(TEXT.encode()).hexdigest()
        assert {"torch", "transformers"} <= line["versions"].keys()
    assert lines[1]["command"] == (
        "qexport eval tiny --text fox.txt --against tiny --seqlen 64 --stride 32 --windows 2 --bos always"
    )
    assert str(packed.parent) not in (packed / "results.jsonl").read_text()


def test_result_survives_a_record_that_cannot_be_written(packed: Path, text: Path) -> None:
    notes: list[Any] = []
    (packed / "results.jsonl").mkdir()
    try:
        assert evaluate(packed, texts=[text], windows=1, observer=notes.append)["perplexity"]
    finally:
        (packed / "results.jsonl").rmdir()
    assert any("was not written" in getattr(note, "text", "") for note in notes)


def test_builtin_text_is_the_default_unless_only_tasks_are_asked_for(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.evaluate.windows.builtin_text", lambda part: f"{part} {TEXT}")
    assert list(evaluate(packed, windows=1)["perplexity"]) == ["builtin"]
    found = evaluate(packed, tasks=["own_a"], include_path=quiz(tmp_path))
    assert (found["perplexity"], found["fidelity"], list(found["tasks"])) == ({}, None, ["own_a"])


def test_long_text_gets_bos_as_asked_and_no_warning(packed: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        found = {bos: evaluate(packed, texts=[text], seqlen=32, bos=bos) for bos in ("auto", "always", "never")}
    assert [f["perplexity"]["fox.txt"]["bos"] for f in found.values()] == [False, True, False]
    assert found["auto"] == found["never"] != found["always"]
    assert not [r for r in caplog.records if "longer than" in r.getMessage()]
    with pytest.raises(UsageError, match="auto, always, never"):
        evaluate(packed, texts=[text], bos="yes")


def test_a_loader_can_be_given(packed: Path, text: Path) -> None:
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return tiny.make("llama")

    evaluate(packed, texts=[text], windows=1, backend="reference", cache_gb=0.5, dtype="float32", loader=load)
    path, options = asked[0]
    assert path == str(packed)
    assert options == {"backend": "reference", "cache_gb": 0.5, "dtype": torch.float32, "device_map": None}


def test_what_does_not_fit_is_refused_before_work(packed: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="context has 128 tokens"):
        evaluate(packed, texts=[text], seqlen=129)
    with pytest.raises(UsageError, match="given twice"):
        evaluate(packed, texts=[text, tmp_path / "x" / "fox.txt"])
    with pytest.raises(UsageError, match="empty name"):
        evaluate("", texts=[text])
    with pytest.raises(UsageError, match="found another file"):
        evaluate(text, texts=[text])
    with pytest.raises(UsageError, match="expected float32, bfloat16, float16"):
        evaluate(packed, texts=[text], dtype="int8")
    with pytest.raises(SourceError, match="no such file"):
        evaluate(packed, texts=["none.txt"])


def test_directory_without_tokenizer_says_what_to_do(tmp_path: Path, text: Path) -> None:
    folder = finished.write(tmp_path / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match="Copy the original's tokenizer files"):
        evaluate(folder, texts=[text])


def test_tasks_are_looked_up_before_a_model_is_loaded(packed: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder with task files"):
        evaluate(
            packed,
            texts=[text],
            tasks=["one"],
            include_path=tmp_path / "none",
            loader=lambda *_a, **_o: pytest.fail("loaded"),
        )


def test_what_was_finished_before_a_task_failed_is_kept_and_not_run_again(
    packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate

    asked: list[str] = []

    def fail_once(**options: Any) -> Any:
        asked.append(options["tasks"][0].task_name)
        if asked == ["own_a", "own_b"]:
            raise KeyboardInterrupt
        return simple_evaluate(**options)

    monkeypatch.setattr("lm_eval.simple_evaluate", fail_once)
    notes: list[Any] = []
    options: dict[str, Any] = {
        "texts": [text], "windows": 1, "tasks": ["own_a", "own_b"], "include_path": quiz(tmp_path), "reuse": True,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        evaluate(packed, **options, observer=notes.append)
    assert [(line["what"], line["name"]) for line in read_results(packed)] == [
        ("perplexity", "fox.txt"), ("task", "own_a"),
    ]  # fmt: skip
    assert any("before the tasks failed" in getattr(note, "text", "") for note in notes)
    found = evaluate(packed, **options)
    assert asked == ["own_a", "own_b", "own_b"]
    assert list(found["tasks"]) == ["own_a", "own_b"]
    assert len(read_results(packed)) == 3
    assert evaluate(packed, **options, loader=lambda *_a, **_o: pytest.fail("loaded")) == found


def test_recorded_figures_are_taken_only_for_the_same_weights_and_protocol(
    packed: Path, text: Path, dense: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    loads: list[str] = []

    def load(path: str, **options: Any) -> Any:
        from qexport.integrations.transformers import load_model

        loads.append(path)
        return load_model(path, **options)

    options: dict[str, Any] = {"texts": [text], "against": dense, "seqlen": 64, "loader": load, "reuse": True}
    first = evaluate(folder, **options)
    assert evaluate(folder, **options) == first
    assert len(loads) == 1
    evaluate(folder, **options | {"windows": 2})
    assert len(loads) == 2
    text.write_text(TEXT.upper())
    evaluate(folder, **options)
    assert len(loads) == 3
    text.write_text(TEXT)
    evaluate(folder, **options | {"reuse": False})
    assert len(loads) == 4
    manifest = json.loads((folder / "qexport.json").read_text())
    manifest["files"]["config.json"] = "0" * 64
    (folder / "qexport.json").write_text(json.dumps(manifest))
    evaluate(folder, **options)
    assert len(loads) == 5


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[Windows]:
    """The windows that were measured."""
    seen: list[Windows] = []

    def watched(model: Any, windows: Any, **options: Any) -> Any:
        seen.extend(windows)
        return perplexity(model, windows, **options)

    monkeypatch.setattr("qexport.evaluate.run.perplexity", watched)
    return seen


def test_bos_once_stands_in_front_of_the_text_alone(
    packed: Path, text: Path, cuts: list[Windows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.evaluate.run.bos_id", lambda _tokenizer, policy: {"auto": 1, "never": None}[policy])
    evaluate(packed, texts=[text], seqlen=32, bos="once")
    evaluate(packed, texts=[text], seqlen=32, bos="never")
    evaluate(packed, texts=[text], seqlen=32, bos="auto")
    once, never, auto = (found.ids.flatten() for found in cuts)
    assert once[0] == 1
    assert torch.equal(once[1:], never[: len(once) - 1])
    assert (auto[::32] == 1).all()


def test_windows_of_c4_lie_in_documents(packed: Path, cuts: list[Windows], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["a short one", TEXT, TEXT.upper()]})
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_a, **_o: rows))
    found = evaluate(packed, texts=["c4"], seqlen=32, windows=3)
    assert found["perplexity"]["c4"]["tokens"] == 3 * 31
    documents = [tiny.tokenizer()(row)["input_ids"] for row in (TEXT, TEXT.upper())]
    for ids in cuts[0].ids.tolist():
        assert any(ids == own[i : i + 32] for own in documents for i in range(len(own)))
    with pytest.raises(UsageError, match="--stride: the windows of c4 are drawn here and there"):
        evaluate(packed, texts=["c4"], seqlen=32, stride=8)
