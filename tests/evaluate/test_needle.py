"""Needles: where they are, how answers are scored, and their picture."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from qexport.cli import app
from qexport.errors import UsageError
from qexport.evaluate.needle import Question, needle, question, score, usual_lengths
from qexport.evaluate.through import Through
from qexport.formats.kv.kivi import Kivi
from tests import finished, tiny


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_text_has_its_length_and_the_needle_its_depth(depth: float) -> None:
    tokenizer = tiny.tokenizer()
    asked = question(tokenizer, torch.tensor(list(range(60, 90))), 200, depth, seed=3, bos=0)
    text = tokenizer.decode(asked.prompt[1:])
    number = tokenizer.decode(asked.answer).strip(" .")
    assert asked.prompt[0] == 0
    assert len(asked.prompt) + len(asked.answer) == 200
    assert number.isdigit()
    assert text.count(number) == 1
    assert text.endswith(text[text.index("The pass key") : text.index(f" {number}")])
    place, room = text.index("\n\nThe pass key"), len(text) - len("\n\nThe pass key of Alma is") * 2 - 10
    assert abs(place - depth * room) < 15


def test_the_same_seed_asks_the_same_question() -> None:
    make = [question(tiny.tokenizer(), torch.arange(60, 90), 100, 0.3, seed) for seed in (1, 1, 2)]
    assert torch.equal(make[0].prompt, make[1].prompt)
    assert not torch.equal(make[0].prompt, make[2].prompt)


class Parrot(torch.nn.Module):
    """A model that goes on with fixed tokens, one after the other, once a text has been read."""

    device = torch.device("cpu")

    def __init__(self, says: list[int], after: int) -> None:
        super().__init__()
        self.says, self.after, self.seen = says, after, 0

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        self.seen += input_ids.shape[1]
        logits = torch.zeros(1, 1, 100)
        logits[0, 0, self.says[self.seen - self.after]] = 5
        return SimpleNamespace(logits=logits, past_key_values=None)


@pytest.mark.parametrize(
    ("says", "expected"), [([7, 8, 9, 3], 1), ([7, 8, 1, 3], 0.5), ([1, 8, 9, 3], 0), ([7, 1, 9, 3], 0.25)]
)
def test_what_counts_is_right_before_the_first_wrong_token(says: list[int], expected: float) -> None:
    found, loss = score(Parrot(says, 5), Question(torch.arange(5), torch.tensor([7, 8, 9, 3])))
    assert found == expected
    assert loss > 0


def test_a_cache_that_packs_nothing_scores_as_none() -> None:
    model = tiny.make("llama")
    options: dict[str, Any] = {"lengths": (90, 120), "depths": (0.0, 1.0), "repeats": 1}
    ask = partial(needle, model, tiny.tokenizer(), "A text of letters. " * 9)
    plain = ask(**options)
    same = needle(
        model, tiny.tokenizer(), "A text of letters. " * 9, through=Through(model, Kivi(2, 32, 4096), {}), **options
    )
    coarse = needle(
        model, tiny.tokenizer(), "A text of letters. " * 9, through=Through(model, Kivi(2, 8, 0), {}), **options
    )
    for row, other in zip(plain["loss"], same["loss"], strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert coarse["loss"] != plain["loss"]
    assert len(plain["score"]) == 2
    assert len(plain["score"][0]) == 2


def test_lengths_leave_room() -> None:
    assert usual_lengths(tiny.tokenizer(), 2048) == (256, 512, 1024, 2048)
    assert usual_lengths(tiny.tokenizer(), 512) == (256, 512)
    assert usual_lengths(tiny.tokenizer(), 100) == (100,)
    with pytest.raises(UsageError, match=r"needle: expected texts of at least \d+ tokens, found 20"):
        question(tiny.tokenizer(), torch.arange(60, 90), 20, 0.5, 0)


def test_the_command_draws_a_heat_map(tmp_path: Path) -> None:
    folder = finished.write(tmp_path / "tiny")
    options = ["--needle", "--seqlen", "128", "--kv", "kivi-2bit", "-s", "kv.residual_window=0", "--json"]
    run = CliRunner().invoke(app, ["eval", str(folder), *options])
    found = json.loads(run.stdout)
    assert found["needle"]["lengths"] == [128]
    assert found["perplexity"] == {}
    picture = folder / "needle-kivi-2bit.png"
    assert found["needle"]["picture"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
