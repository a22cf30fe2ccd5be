"""Calibration tokens from every source: what is in them, what is said about them, and what is refused."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qexport import calibration as cal
from qexport.calibration import Calibration, bos_id, builtin_text, choose, sample, sampling, texts, tokens
from qexport.calibration.texts import file_text
from qexport.errors import CalibrationError, SourceError, UsageError
from qexport.events import Advanced, Started
from qexport.models import Source, anatomy, open_source
from qexport.models.decode import Stepper, compute_dtype
from tests import tiny


@pytest.fixture
def llama(tmp_path: Path) -> Source:
    return open_source(str(tiny.save("llama", tmp_path / "llama", chat=True)))


def text_file(path: Path, tokens: int = 4000) -> Path:
    path.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(tokens)))
    return path


# ---- files ----


def test_sequence_i_starts_at_i_times_floor_of_tokens_over_samples(llama: Source, tmp_path: Path) -> None:
    path = text_file(tmp_path / "text.txt", 1003)
    got = tokens(llama, Calibration(str(path), samples=10, seqlen=30))
    all_ids = cal.encode(llama.tokenizer(), path.read_text())
    assert len(all_ids) == 1003
    assert torch.equal(got.ids, torch.stack([all_ids[100 * i : 100 * i + 30] for i in range(10)]))


def test_origin_says_what_the_tokens_are(llama: Source, tmp_path: Path) -> None:
    path = text_file(tmp_path / "text.txt")
    got = tokens(llama, Calibration(str(path), samples=4, seqlen=16, seed=7))
    assert got.origin == {
        "source": "text.txt",
        "samples": 4,
        "seqlen": 16,
        "seed": 7,
        "bos": False,
        "sha256": hashlib.sha256(got.ids.numpy().tobytes()).hexdigest(),
        "text_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_jsonl_is_read_by_its_text_key(llama: Source, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "ab" * 40, "id": 1}, {"text": "cd" * 40}]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    got = tokens(llama, Calibration(str(path), samples=2, seqlen=60))
    assert llama.tokenizer().decode(got.ids.flatten()[:60]) == "ab" * 30
    path.write_text(path.read_text() + '{"content": 1}\n')
    with pytest.raises(SourceError, match=r"rows\.jsonl, line 4: expected a JSON object with a string under 'text'"):
        tokens(llama, Calibration(str(path), samples=2, seqlen=60))


def test_too_little_text_is_an_error_that_says_how_much_there_is(llama: Source, tmp_path: Path) -> None:
    path = text_file(tmp_path / "text.txt", 99)
    with pytest.raises(
        CalibrationError, match=r"expected at least 100 tokens for 10 x 10, found 99.*--samples 9 or less"
    ):
        tokens(llama, Calibration(str(path), samples=10, seqlen=10))


def test_unreadable_file_is_refused(llama: Source, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SourceError, match="can't be read as UTF-8"):
        tokens(llama, Calibration(str(tmp_path / "bytes.txt"), seqlen=32))


@pytest.mark.parametrize("source", ["nowhere.txt", "wikitext", "", "."])
def test_unknown_source_lists_what_there_is(llama: Source, source: str) -> None:
    with pytest.raises(UsageError, match="expected self, builtin, wikitext2, c4, pile, hf:ID"):
        tokens(llama, Calibration(source))


def test_tokens_outside_the_embedding_are_refused(llama: Source, tmp_path: Path) -> None:
    llama.config.vocab_size = 50
    with pytest.raises(CalibrationError, match="its embedding has 50 rows"):
        tokens(llama, Calibration(str(text_file(tmp_path / "t.txt")), samples=2, seqlen=8))


# ---- BOS ----


@pytest.mark.parametrize(
    ("policy", "default", "expected"),
    [("auto", True, 0), ("auto", False, None), ("always", False, 0), ("never", True, None)],
)
def test_bos_is_put_first_when_the_tokenizer_does_so_by_default(
    policy: str, default: bool, expected: int | None
) -> None:
    assert bos_id(tiny.tokenizer(add_bos=default), policy) == expected


def test_with_bos_every_sequence_starts_with_it_and_is_as_long_as_the_others(llama: Source, tmp_path: Path) -> None:
    path = text_file(tmp_path / "text.txt", 400)
    without = tokens(llama, Calibration(str(path), samples=4, seqlen=16))
    with_bos = tokens(llama, Calibration(str(path), samples=4, seqlen=16, bos="always"))
    assert with_bos.origin["bos"] is True
    assert with_bos.ids.shape == without.ids.shape
    assert (with_bos.ids[:, 0] == 0).all()
    assert torch.equal(with_bos.ids[:, 1:], without.ids[:, :-1])


def test_bos_policies_that_cannot_be_met_are_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no BOS token"):
        bos_id(tokenizer, "always")
    with pytest.raises(UsageError, match="expected auto, always, never"):
        Calibration(bos="sometimes")


# ---- builtin ----


def test_builtin_parts_share_no_paragraph_and_are_the_same_every_time() -> None:
    parts = {part: builtin_text(part) for part in ("calibration", "evaluation")}  # type: ignore[arg-type]
    assert parts == {part: builtin_text(part) for part in parts}  # type: ignore[arg-type]
    calibration, evaluation = (
        {p.strip() for p in parts[k].split(texts.SEPARATOR)} for k in ("calibration", "evaluation")
    )
    assert not calibration & evaluation
    assert len(parts["calibration"]) > 300_000
    assert len(parts["evaluation"]) > 100_000


def test_builtin_text_is_prose_and_code() -> None:
    topics = texts._topics()
    assert any(text.splitlines()[0] in builtin_text("calibration") for text in topics.values())
    assert builtin_text("calibration").count("\ndef ") > 20


def test_builtin_calibration_never_reads_the_evaluation_part(llama: Source, monkeypatch: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr(choose, "builtin_text", lambda part: (asked.append(part), "text " * 100)[1])
    tokens(llama, Calibration("builtin", samples=2, seqlen=8))
    assert asked == ["calibration"]


# ---- data sets ----


def with_datasets(monkeypatch: Any, load: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_data_set_is_streamed_only_as_far_as_needed(llama: Source, monkeypatch: Any) -> None:
    asked: list[Any] = []
    given: list[int] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))

        def rows() -> Any:
            for i in range(1000):
                given.append(i)
                yield {"text": f"document {i} " * 4 if i % 2 else "  "}

        return rows()

    with_datasets(monkeypatch, load)
    got = tokens(llama, Calibration("hf:someone/some:part:test", samples=3, seqlen=32))
    assert asked == [(("someone/some", "part"), {"data_files": None, "split": "test", "streaming": True})]
    assert len(given) < 10
    assert llama.tokenizer().decode(got.ids[0]).startswith("document 1 document 1")
    assert got.origin["source"] == "hf:someone/some:part:test"


@pytest.mark.parametrize("name", ["wikitext2", "c4", "pile"])
def test_unreachable_data_set_names_sources_that_need_no_connection(llama: Source, name: str, monkeypatch: Any) -> None:
    def load(*_args: Any, **_options: Any) -> Any:
        raise ConnectionError("no route\nto host")

    with_datasets(monkeypatch, load)
    with pytest.raises(
        SourceError, match=rf"{name}: the data set .* can't be read \(no route\)\. Use --calibration self"
    ):
        tokens(llama, Calibration(name, samples=2, seqlen=8))


def test_data_set_without_text_is_refused(llama: Source, monkeypatch: Any) -> None:
    with_datasets(monkeypatch, lambda *_a, **_o: iter([{"question": "?"}]))
    with pytest.raises(SourceError, match=r"under 'text', found \['question'\]"):
        tokens(llama, Calibration("hf:someone/some", samples=2, seqlen=8))


# ---- self ----


def test_own_text_is_equal_for_equal_seeds_and_only_then(llama: Source) -> None:
    spec = Calibration("self", samples=6, seqlen=24)
    one, two = tokens(llama, spec), tokens(llama, spec)
    other = tokens(llama, Calibration("self", samples=6, seqlen=24, seed=1))
    assert torch.equal(one.ids, two.ids)
    assert one.origin == two.origin
    assert one.origin["text_sha256"] is None
    assert not torch.equal(one.ids, other.ids)
    assert one.ids.shape == (6, 24)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "qwen3"])
def test_stepping_gives_the_logits_of_the_whole_sequence(name: str) -> None:
    model = tiny.make(name)
    ids = torch.randint(2, 240, (3, 30), generator=torch.Generator().manual_seed(0))
    stepper = Stepper(model, 30)
    stepped = torch.stack([stepper.step(ids[:, i]) for i in range(30)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(stepped, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


class Scripted:
    """Stands for a model: after token t comes t + 1; after 20 comes the end; after the end, nothing sensible."""

    def __init__(self) -> None:
        self.config = tiny.config("llama")

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])


class ScriptedStepper:
    def __init__(self, _model: Any, _capacity: int) -> None:
        pass

    def step(self, column: torch.Tensor) -> torch.Tensor:
        following = torch.where(column % 20 == 0, 1, (column + 1) % tiny.VOCAB)
        return torch.nn.functional.one_hot(following, tiny.VOCAB).float() * 1e4


def scripted(monkeypatch: Any, **options: Any) -> torch.Tensor:
    monkeypatch.setattr(sampling, "Stepper", ScriptedStepper)
    return sample(Scripted(), tiny.tokenizer(chat=True), **{"samples": 8, "seqlen": 60, **options})


def test_document_that_ends_is_followed_by_another(monkeypatch: Any) -> None:
    ids = scripted(monkeypatch, chat=0.0)
    for row in ids.tolist():
        assert row[0] > 1  # a random first token is no special one
        assert 1 in row
        for before, token, after in zip(row, row[1:], row[2:], strict=False):
            assert token == (1 if before % 20 == 0 else (before + 1) % tiny.VOCAB) or before == 1
            if token == 1:
                assert after > 1
    assert len({row[0] for row in ids.tolist()}) > 4


def test_chats_follow_the_template_on_both_sides_of_the_question(monkeypatch: Any) -> None:
    tokenizer = tiny.tokenizer(chat=True)
    ids = scripted(monkeypatch, chat=0.5)
    before, between = tokenizer("[user]").input_ids, tokenizer("\n[assistant]").input_ids
    template = sampling.template_of(tokenizer)
    assert template is not None
    assert (list(template.before), list(template.between)) == (before, between)
    chats = [row for row in ids.tolist() if row[: len(before)] == before]
    assert len(chats) == 4
    for row in chats:
        end = row.index(1)
        assert row[end + 1 : end + 1 + len(between)] == between
        again = row.index(1, end + 1)
        rest = row[again + 1 : again + 1 + len(before)]
        assert rest == before[: len(rest)]


def test_end_token_that_the_template_repeats_is_written_once(monkeypatch: Any) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q{{ m['content'] }}</s>{% endfor %}A"
    monkeypatch.setattr(sampling, "Stepper", ScriptedStepper)
    row = sample(Scripted(), tokenizer, samples=1, seqlen=60, chat=1.0)[0].tolist()
    question, answer = tokenizer("Q").input_ids, tokenizer("A").input_ids
    end = row.index(1)
    assert row[:1] == question
    assert row[end + 1 : end + 2] == answer


def test_own_text_starts_with_bos_where_the_policy_says_so(monkeypatch: Any) -> None:
    ids = scripted(monkeypatch, bos=0)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 1] > 1).all()


def test_rows_in_several_batches_are_all_there(monkeypatch: Any) -> None:
    events: list[Any] = []
    ids = scripted(monkeypatch, samples=7, rows=3, seqlen=12, observer=events.append)
    assert ids.shape == (7, 12)
    assert events[0] == Started("sample", 36, "column")
    assert [e.done for e in events[1:]] == list(range(1, 37))
    assert all(isinstance(e, Advanced) for e in events[1:])


def test_sampling_follows_the_model_s_distribution(monkeypatch: Any) -> None:
    weights = torch.zeros(tiny.VOCAB)
    weights[[10, 20, 30]] = torch.tensor([1.0, 2.0, 5.0])

    class Fixed(ScriptedStepper):
        def step(self, column: torch.Tensor) -> torch.Tensor:
            return weights.log().clamp_min(-1e9).expand(len(column), -1)

    monkeypatch.setattr(sampling, "Stepper", Fixed)
    ids = sample(Scripted(), tiny.tokenizer(), samples=100, seqlen=41)[:, 1:]
    share = torch.bincount(ids.flatten(), minlength=tiny.VOCAB) / ids.numel()
    assert share[weights == 0].sum() == 0
    torch.testing.assert_close(share[[10, 20, 30]], torch.tensor([0.125, 0.25, 0.625]), atol=0.03, rtol=0)


def test_model_that_gives_nan_is_refused(monkeypatch: Any) -> None:
    class Broken(ScriptedStepper):
        def step(self, column: torch.Tensor) -> torch.Tensor:
            return torch.full((len(column), tiny.VOCAB), float("nan"))

    monkeypatch.setattr(sampling, "Stepper", Broken)
    with pytest.raises(CalibrationError, match=r"holds NaN or infinity.*--calibration builtin"):
        sample(Scripted(), tiny.tokenizer(), samples=2, seqlen=8)


def test_model_too_large_for_memory_names_the_other_sources(llama: Source, monkeypatch: Any) -> None:
    monkeypatch.setattr(choose, "_free_bytes", lambda _device: 1000)
    with pytest.raises(CalibrationError, match=r"GiB are free on cpu\. Use --calibration builtin"):
        tokens(llama, Calibration("self", samples=2, seqlen=8))


def test_sequences_longer_than_the_context_are_refused(llama: Source) -> None:
    with pytest.raises(CalibrationError, match="--seqlen 129 is longer than the model's context, 128"):
        tokens(llama, Calibration("self", samples=2, seqlen=129))


def test_predicted_bytes_are_parameters_cache_and_logits(llama: Source) -> None:
    found = anatomy(llama)
    parameters = sum(p.numel() for p in tiny.make("llama").parameters())
    assert compute_dtype(found) == torch.float32
    cache = 4 * 24 * found.cache_width * 4
    assert Calibration("self", samples=4, seqlen=24).predicted_bytes(found) == 4 * parameters + cache + 4 * 258 * 20
    assert Calibration("builtin").predicted_bytes(found) < 100 << 20
    few, many = (Calibration("self", samples=n).predicted_seconds(found, 1e9) for n in (16, 64))
    assert 0 < few < many


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_write_in_float32_on_a_cpu_while_they_are_small(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    found = anatomy(open_source(str(tiny.save("llama", tmp_path / "half", dtype=dtype))))
    assert compute_dtype(found, "cpu") == torch.float32
    assert compute_dtype(found, "cuda") == dtype
    large = replace(found, parameters={**found.parameters, "large": (dtype, (1 << 16, 1 << 15))})
    assert compute_dtype(large, "cpu") in (torch.bfloat16, torch.float32)
    assert compute_dtype(large, "cuda") == dtype


def test_jsonl_strings_may_hold_what_unicode_calls_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b", "c\u2029d", "e\u0085f"]
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert file_text(path) == "\n\n".join(texts)


def test_a_jsonl_line_nested_too_deeply_is_a_stated_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + "[" * 100000)
    with pytest.raises(SourceError, match="line 2: expected a JSON object"):
        file_text(path)
