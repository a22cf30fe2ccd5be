"""Text that the model writes itself, at temperature 1: its own distribution is what a quantized copy has to keep."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qexport.errors import CalibrationError
from qexport.events import Advanced, Observer, Started, ignore
from qexport.models.decode import Stepper, end_tokens

# Rows that run together: one step costs little more for many rows than for one.
MAX_ROWS = 128
_SENTINEL = "\u2063calibration\u2063"


@dataclass(frozen=True)
class Template:
    """A chat template around one turn.

    Attributes:
        before: tokens up to where the user's words begin.
        between: tokens from the end of the user's words to where the answer begins.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]


@dataclass
class _Row:
    """One row in the making: tokens that are set, and whether the document is a chat and at which turn."""

    chat: bool
    forced: list[int] = field(default_factory=list)
    asking: bool = False


def template_of(tokenizer: Any) -> Template | None:
    """The tokenizer's chat template as tokens; None if it has none, or one that can't be cut at the user's words."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        messages = [{"role": "user", "content": _SENTINEL}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001  a template is a program of the model's author
        return None
    before, found, after = text.partition(_SENTINEL)
    if not found or _SENTINEL in after:
        return None

    def ids(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False)["input_ids"])

    return Template(ids(before), ids(after))


def sample(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int = 0,
    bos: int | None = None,
    chat: float = 0.5,
    rows: int = MAX_ROWS,
    temperature: float = 1.0,
    observer: Observer = ignore,
) -> Tensor:
    """Let the model write sequences.

    A plain document starts with a random token. A chat starts with the template, the model writes the question, the
    template is continued, and the model writes the answer. A document that ends before its row is full is followed by
    another of the same kind. Equal for one seed, machine and thread count.

    Args:
        model: the whole model.
        tokenizer: its tokenizer.
        samples: sequences.
        seqlen: tokens of each.
        seed: of all random choices.
        bos: token that every sequence starts with; None for none.
        chat: share of the sequences that are chats, where there is a chat template.
        rows: sequences that run together.
        temperature: 1 samples the model's own distribution.
        observer: is told after every column.

    Returns:
        int64 [samples, seqlen].

    Raises:
        CalibrationError: the model's output is not finite.
    """
    template = template_of(tokenizer) if chat > 0 else None
    if template is not None and len(template.before) + len(template.between) > seqlen // 2:
        template = None
    generator = torch.Generator().manual_seed(seed)
    writer = _Writer(model, tokenizer, template, bos, seqlen, temperature, generator)
    batches = [min(rows, samples - start) for start in range(0, samples, rows)]
    observer(Started("sample", len(batches) * seqlen, "column"))
    out, first, columns = [], 0, 0
    for size in batches:
        # Chats are spread evenly over all rows, whatever the batches.
        kinds = [template is not None and int((i + 1) * chat) > int(i * chat) for i in range(first, first + size)]
        for done in writer.run(kinds):
            columns += 1
            observer(Advanced("sample", columns, f"{size} sequences"))
            if done is not None:
                out.append(done)
        first += size
    return torch.cat(out)


class _Writer:
    """Runs batches of rows, a column at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template | None,
        bos: int | None,
        seqlen: int,
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        self._model, self._template, self._bos = model, template, bos
        self._seqlen, self._temperature, self._generator = seqlen, temperature, generator
        self._ends = end_tokens(model, tokenizer)
        self._vocab = len(tokenizer)
        special = set(tokenizer.all_special_ids) | self._ends
        self._first = torch.tensor([t for t in range(self._vocab) if t not in special])

    def run(self, kinds: list[bool]) -> Iterator[Tensor | None]:
        """Yields None after each column, and the ids [rows, seqlen] after the last."""
        device = next(self._model.parameters()).device
        rows = [_Row(chat) for chat in kinds]
        for row in rows:
            self._begin(row)
            if self._bos is not None and row.forced[0] != self._bos:
                row.forced.insert(0, self._bos)
        ids = torch.empty(len(rows), self._seqlen, dtype=torch.int64)
        stepper = Stepper(self._model, self._seqlen)
        drawn = torch.empty(0)
        for column in range(self._seqlen):
            for i, row in enumerate(rows):
                ids[i, column] = row.forced.pop(0) if row.forced else self._accept(row, int(drawn[i]))
            if column + 1 < self._seqlen:
                drawn = self._draw(stepper.step(ids[:, column].to(device)))
                yield None
        yield ids

    def _begin(self, row: _Row) -> None:
        """A new document."""
        row.asking = row.chat
        if row.chat and self._template is not None:
            row.forced += self._template.before
        if not row.forced:
            row.forced.append(int(self._first[torch.randint(len(self._first), (), generator=self._generator)]))

    def _accept(self, row: _Row, token: int) -> int:
        """Take a drawn token; one that ends a turn or a document decides what follows."""
        if token in self._ends:
            if row.asking and self._template is not None:
                row.asking = False
                between = list(self._template.between)
                row.forced += between[1:] if between[:1] == [token] else between
            else:
                self._begin(row)
        return token

    def _draw(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self._vocab].cpu()
        if not torch.isfinite(logits).all():
            raise CalibrationError(
                "self: the model's output holds NaN or infinity, so it can't write calibration text. "
                "Try --dtype float32, or another source: --calibration builtin, or a text file."
            )
        # Inverse of the cumulative distribution: one uniform number a row, drawn on the CPU on every device.
        cumulative = (logits / self._temperature).softmax(-1).cumsum(-1)
        uniform = torch.rand(len(logits), 1, generator=self._generator) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, uniform, right=True).squeeze(1).clamp_max(self._vocab - 1)
