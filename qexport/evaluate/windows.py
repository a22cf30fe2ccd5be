"""Evaluation text and how it is cut: which tokens the model sees at once and which of its predictions count."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qexport.calibration import builtin_text
from qexport.calibration.texts import file_text
from qexport.errors import SourceError, UsageError
from qexport.events import Note, Observer, ignore

# As in the evaluation code of GPTQ, which most published C4 figures follow.
_C4_DOCUMENTS = 1100
DRAWN = 256


@dataclass(frozen=True)
class Text:
    """A text to evaluate on.

    Attributes:
        name: its key in the results.
        content: the text; documents that windows are drawn from are joined by a blank line.
        documents: where each window is drawn from one of many documents, these; otherwise empty.
    """

    name: str
    content: str
    documents: Sequence[str] = ()

    @property
    def sha256(self) -> str:
        """Hex digest of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """A tokenised text in windows of equal length.

    Attributes:
        name: key of the text in the results.
        ids: int64 [windows, length], on the CPU.
        scored: for each window, how many of its last predictions count; no token of the text counts twice.
        seqlen: tokens of a window, BOS included.
        stride: text tokens from the start of one window to the start of the next.
        bos: whether every window starts with the BOS token.
    """

    name: str
    ids: Tensor
    scored: tuple[int, ...]
    seqlen: int
    stride: int
    bos: bool

    @property
    def tokens(self) -> int:
        """Number of scored predictions."""
        return sum(self.scored)


# ---- sources -----------------------------------------------------------------------------------


def read_text(source: str | Path) -> Text:
    """Text from `builtin`, `wikitext2`, `c4`, `c4-new`, or a file: plain, or JSON lines with a key `text`.

    The name of a data set wins over a file of that name; `./c4` is the file. Text is used as it is; the documents of a
    `.jsonl` file are joined by a blank line.

    Raises:
        SourceError: the file can't be read or has no text, or the data set can't be had.
    """
    name = str(source)
    if name == "builtin":
        return Text(name, builtin_text("evaluation"))
    if name in _DATA_SETS:
        found = _fetch(name, _DATA_SETS[name])
        return Text(name, found) if isinstance(found, str) else Text(name, "\n\n".join(found), found)
    path = Path(source)
    if not path.exists():
        known = ", ".join(["builtin", *sorted(_DATA_SETS)])
        raise SourceError(f"text {name!r}: expected a file or one of {known}; there is no such file.")
    content = file_text(path)
    if not content.strip():
        raise SourceError(f"text {name}: the file holds no text.")
    return Text(path.name, content)


def _wikitext2() -> str:
    from datasets import load_dataset

    return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def _c4() -> list[str]:
    from datasets import load_dataset

    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    return list(load_dataset("allenai/c4", data_files=files, split="validation")["text"])


def _c4_new() -> str:
    return " ".join(_c4()[:_C4_DOCUMENTS])


_DATA_SETS: dict[str, Callable[[], str | list[str]]] = {"c4": _c4, "c4-new": _c4_new, "wikitext2": _wikitext2}


def _fetch(name: str, load: Callable[[], str | list[str]]) -> str | list[str]:
    try:
        return load()
    except Exception as error:  # whatever the network, the cache or the data set's own reader came up with
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"text {name!r} can't be had through `datasets` ({type(error).__name__}: {reason}). "
            "Without a connection use --text builtin, or --text FILE with a copy of it."
        ) from error


# ---- windows -----------------------------------------------------------------------------------


def cut(
    name: str,
    tokens: Tensor,
    *,
    seqlen: int,
    stride: int | None = None,
    limit: int | None = None,
    bos: int | None = None,
    observer: Observer = ignore,
) -> Windows:
    """Windows of `seqlen` tokens, one every `stride` tokens of the text.

    Window i holds the text from token `i * stride` on, after the BOS token if there is one. Its predictions count
    where no earlier window has made them: with a stride below `seqlen` only the new tokens are scored, each with at
    least `seqlen - stride` tokens before it. What is left at the end and does not fill a window is dropped; a text
    shorter than one window is one shorter window.

    Args:
        name: key of the text in the results.
        tokens: int64 [tokens].
        seqlen: tokens of a window, BOS included.
        stride: default `seqlen`.
        limit: at most so many windows.
        bos: token to put in front of each window.
        observer: told when the text is short.

    Raises:
        UsageError: sizes that make no window.
        SourceError: fewer than two tokens.
    """
    stride = seqlen if stride is None else stride
    extra = bos is not None
    if seqlen < 2 + extra or stride < 1 or (limit is not None and limit < 1):
        wanted = f"seqlen >= {2 + extra}, stride >= 1 and windows >= 1"
        raise UsageError(f"expected {wanted}; found seqlen {seqlen}, stride {stride} and windows {limit}.")
    total, room = tokens.numel(), seqlen - extra
    if total < 2:
        raise SourceError(f"text {name!r}: expected at least 2 tokens, found {total}.")
    if total < room:
        observer(Note(f"{name}: {total} tokens don't fill a window of {seqlen}; scored as one short window", "warning"))
        room, seqlen = total, total + extra
    count = (total - room) // stride + 1
    if limit is not None:
        if count < limit:
            observer(Note(f"{name}: {limit} windows asked for, the text has {count}", "warning"))
        count = min(count, limit)
    starts = torch.arange(count) * stride
    ids = tokens[starts[:, None] + torch.arange(room)]
    if bos is not None:
        ids = torch.cat([torch.full((count, 1), bos), ids], 1)
    first = seqlen - 1
    return Windows(name, ids, (first, *[min(stride, first)] * (count - 1)), seqlen, stride, extra)


def draw(
    name: str,
    documents: Sequence[str],
    tokens: Callable[[str], Tensor],
    *,
    seqlen: int,
    limit: int | None = None,
    bos: int | None = None,
) -> Windows:
    """256 windows, each from a random place in a random document that is long enough, as GPTQ's code draws them.

    With the seed 0 of Python's generator: documents are drawn until one has more tokens than a window, then the place
    where the window starts. (GPTQ's code fails where a document has just as many tokens; here it is passed over.)

    Args:
        name: key of the text in the results.
        documents: texts; a window lies within one.
        tokens: int64 [tokens] of a document.
        seqlen: tokens of a window, BOS included.
        limit: only the first so many windows.
        bos: token to put in front of each window.

    Raises:
        UsageError: no document is long enough.
    """
    rng, room = random.Random(0), seqlen - (bos is not None)
    rows: list[Tensor] = []
    missed = 0
    while len(rows) < min(limit or DRAWN, DRAWN):
        ids = tokens(documents[rng.randint(0, len(documents) - 1)])
        if len(ids) <= room:
            missed += 1
            if missed > 1000 * (len(rows) + 1):
                raise UsageError(f"--seqlen {seqlen}: too few documents of {name} have so many tokens.")
            continue
        start = rng.randint(0, len(ids) - room - 1)
        rows.append(ids[start : start + room])
    found = torch.stack(rows)
    if bos is not None:
        found = torch.cat([torch.full((len(rows), 1), bos), found], 1)
    return Windows(name, found, (seqlen - 1,) * len(rows), seqlen, seqlen, bos is not None)
