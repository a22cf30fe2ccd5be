"""Which tokens the model sees and which predictions count."""

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.errors import SourceError, UsageError
from qexport.evaluate.windows import Windows, cut, draw, read_text


def predicted(windows: Windows) -> list[int]:
    """Text positions that are predicted, when the text is 0, 1, 2 ..."""
    return [int(t) for ids, n in zip(windows.ids, windows.scored, strict=True) for t in ids[len(ids) - n :]]


def test_stride_equal_to_seqlen_tiles_the_text() -> None:
    found = cut("t", torch.arange(35), seqlen=8)
    assert found.ids.tolist() == [list(range(i, i + 8)) for i in (0, 8, 16, 24)]
    assert found.scored == (7, 7, 7, 7)
    assert (found.tokens, found.stride, found.bos) == (28, 8, False)


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("bos", [None, 99])
def test_smaller_stride_scores_every_token_once(stride: int, bos: int | None) -> None:
    found = cut("t", torch.arange(41), seqlen=8, stride=stride, bos=bos)
    covered = predicted(found)
    assert covered == list(range(covered[0], covered[-1] + 1))
    assert covered[0] == (1 if bos is None else 0)
    assert 40 - covered[-1] < stride  # only what fills no window is dropped


def test_bos_stands_before_each_window_and_inside_its_length() -> None:
    found = cut("t", torch.arange(24), seqlen=8, bos=99)
    assert found.ids.tolist() == [[99, *range(i, i + 7)] for i in (0, 8, 16)]
    assert found.scored == (7, 7, 7)
    assert found.bos


def test_limit_takes_the_first_windows_and_says_when_there_are_fewer() -> None:
    notes: list[Any] = []
    assert len(cut("t", torch.arange(100), seqlen=8, limit=4, observer=notes.append).ids) == 4
    assert not notes
    assert len(cut("t", torch.arange(20), seqlen=8, limit=4, observer=notes.append).ids) == 2
    assert "4 windows asked for, the text has 2" in notes[0].text


@pytest.mark.parametrize("bos", [None, 99])
def test_short_text_is_one_short_window(bos: int | None) -> None:
    notes: list[Any] = []
    found = cut("t", torch.arange(5), seqlen=8, bos=bos, observer=notes.append)
    assert found.ids.tolist() == [[*([] if bos is None else [bos]), 0, 1, 2, 3, 4]]
    assert found.seqlen == found.ids.shape[1]
    assert notes[0].level == "warning"


def test_impossible_sizes_are_refused() -> None:
    for options in ({"seqlen": 1}, {"seqlen": 8, "stride": 0}, {"seqlen": 8, "limit": 0}, {"seqlen": 2, "bos": 1}):
        with pytest.raises(UsageError, match="expected seqlen"):
            cut("t", torch.arange(50), **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="at least 2 tokens"):
        cut("t", torch.arange(1), seqlen=8)


def test_text_file_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" x\n\n = y = \n", encoding="utf-8")
    found = read_text(path)
    assert (found.name, found.content) == ("a.txt", " x\n\n = y = \n")
    assert len(found.sha256) == 64


def test_json_lines_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "more": 1}) + "\n" for t in ("one", "two\nlines")) + "\n")
    assert read_text(path).content == "one\n\ntwo\nlines"
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(SourceError, match="line 2: expected a JSON object with a string under 'text'"):
        read_text(path)


def test_missing_empty_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="one of builtin, c4, c4-new, wikitext2"):
        read_text("wikitext3")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(SourceError, match="holds no text"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="UTF-8"):
        read_text(tmp_path / "binary.txt")


def test_data_set_out_of_reach_names_the_ways_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=refuse))
    with pytest.raises(SourceError, match=r"'wikitext2' can't be had .*Couldn't reach the Hub.*--text FILE"):
        read_text("wikitext2")


def test_data_sets_are_joined_as_in_the_literature(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["a", "", "b"]})
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_a, **_o: rows))
    assert read_text("wikitext2").content == "a\n\n\n\nb"
    assert read_text("c4").documents == ["a", "", "b"]
    assert read_text("c4-new").content == "a  b"


def _documents(lengths: list[int]) -> list[str]:
    return [" ".join(f"{i}:{j}" for j in range(n)) for i, n in enumerate(lengths)]


def _number(document: str) -> torch.Tensor:
    return torch.tensor([int(word.partition(":")[0]) * 1000 + int(word.partition(":")[2]) for word in document.split()])


def test_windows_of_c4_are_drawn_as_by_gptq() -> None:
    documents, seqlen = _documents([5, 40, 8, 100, 9, 30]), 8
    # Written from the description of GPTQ's get_c4: seed 0; a document until it is long enough; then the place.
    rng = random.Random(0)
    expected = []
    for _ in range(256):
        while True:
            ids = _number(documents[rng.randint(0, 5)])
            if len(ids) > seqlen:
                break
        start = rng.randint(0, len(ids) - seqlen - 1)
        expected.append(ids[start : start + seqlen])
    found = draw("c4", documents, _number, seqlen=seqlen)
    assert torch.equal(found.ids, torch.stack(expected))
    assert found.scored == (7,) * 256
    few = draw("c4", documents, _number, seqlen=seqlen, limit=4)
    assert torch.equal(few.ids, found.ids[:4])


def test_drawn_windows_start_with_bos_and_lie_in_one_document() -> None:
    found = draw("c4", _documents([40, 50]), _number, seqlen=8, bos=99, limit=20)
    assert (found.ids[:, 0] == 99).all()
    assert (found.ids[:, 1:].diff(dim=1) == 1).all()


def test_too_short_documents_are_refused() -> None:
    with pytest.raises(UsageError, match="too few documents of c4 have so many tokens"):
        draw("c4", _documents([5, 8]), _number, seqlen=8)
