"""A conversation: turns in, answers out a piece at a time, and only what is new is read."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qexport.chat.prompt import Message, Prompt, shortened
from qexport.chat.sampling import Settings, next_token
from qexport.chat.writing import Writing
from qexport.errors import UsageError
from qexport.runtime.loop import Loop

_AT_ONCE = 512  # tokens that are read before it is asked whether to stop
_TAIL = 8  # tokens of a text that say how a tokenizer writes what follows


@dataclass(frozen=True)
class Answer:
    """What a model wrote in one turn.

    Attributes:
        text: all of it.
        tokens: of the text, the one that ends it aside.
        seconds: from the first of them to the last.
        read: tokens that were read before; others were still in the cache.
        stopped: `"eos"`, `"length"` (of the answer or the context) or `"interrupt"`.
        dropped: messages at the beginning that were left out of this turn and the turns before, for want of room.
    """

    text: str
    tokens: int
    seconds: float
    read: int
    stopped: str
    dropped: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of writing, without reading; None for fewer than two tokens."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Chat:
    """A model, what was said so far, and what of it is in the model's cache.

    Attributes:
        loop: runs the model.
        prompt: makes tokens of messages.
        context: tokens of prompt and answer together.
        settings: how tokens are chosen.
        system: the system message, if there is one.
        messages: all turns.
        dropped: messages at the beginning of those that the model no longer sees.
    """

    def __init__(self, loop: Loop, prompt: Prompt, ends: frozenset[int], settings: Settings, context: int) -> None:
        self.loop, self.prompt, self.context = loop, prompt, context
        self.system: str | None = None
        self._ends = ends
        self.use(settings)
        self.reset()

    def use(self, settings: Settings) -> None:
        """Take other settings; a seed counts from here on."""
        self._random = torch.Generator(self.loop.model.device)
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(settings.seed)
        self.settings = settings

    def reset(self) -> None:
        """Forget all turns; the system message and settings stay."""
        self.messages: list[Message] = []
        self.dropped = 0
        self._forget()

    def note(self, role: str, text: str) -> None:
        """Take in a message without answering it; a system message stands in place of the one before.

        Raises:
            UsageError: it is no text, but has bytes or halves of characters in it.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError("this message is no text: it holds bytes, or a half of a character. Send it as UTF-8.")
        if role == "system":
            self.system = text or None
        else:
            self.messages.append({"role": role, "content": text})

    def answer(self, text: str, write: Callable[[str], object], stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Take a turn: a message of the user in, the model's answer out and into the conversation.

        An answer that is stopped stays in the conversation as far as it got; a turn that fails, or is stopped before
        anything was written, was never taken.

        Args:
            text: what the user says.
            write: is given each piece of the answer as it comes.
            stopped: is asked before each token whether to stop.

        Raises:
            UsageError: the message is no text, it alone is too long, or the template refuses it.
            CheckpointError: the model's predictions are not finite.
        """
        before = self.dropped
        self.note("user", text)
        try:
            found = self._answered(write, stopped)
        except BaseException:
            self._undo(before)
            raise
        if found.stopped == "interrupt" and not found.text:
            self._undo(before)
        else:
            self.note("assistant", found.text)
        return found

    def _undo(self, dropped: int) -> None:
        self.messages.pop()
        self.dropped = dropped
        self._forget()  # where a step was cut short, nobody knows what is in the cache

    def _forget(self) -> None:
        self.loop.reset()
        self._read: list[int] = []

    def _answered(self, write: Callable[[str], object], stopped: Callable[[], bool]) -> Answer:
        ids = self._fitted()
        most = min(self.settings.max_new_tokens, self.context - len(ids))
        writing = Writing(self.prompt.tokenizer, ids[-_TAIL:] if self.prompt.template is None else ())
        pieces: list[str] = []
        kept = self._rewound(ids)
        logits, why = self._prefilled(ids[kept:], stopped), "interrupt"
        read = len(self._read) - kept
        count, start, end = 0, time.perf_counter(), 0.0
        while logits is not None:
            token = next_token(logits, self._read, self.settings, self._random)
            end = time.perf_counter()
            if token in self._ends:
                why = "eos"
                break
            count += 1
            pieces.append(writing.add(token))
            write(pieces[-1])
            if count == most:
                why = "length"
            if count == most or stopped():
                break
            logits = self._take([token])
        pieces.append(writing.end())
        write(pieces[-1])
        return Answer("".join(pieces), count, end - start, read, why, self.dropped)

    # ---- what is read ------------------------------------------------------------------------------

    def _fitted(self) -> list[int]:
        """Tokens of the conversation, without its oldest turns once it does not fit.

        Then as many go as it takes to fit into half of the room: else the next turns would all be read anew.
        """
        system: Sequence[Message] = [{"role": "system", "content": self.system}] if self.system else []
        seen: Sequence[Message] = [*system, *self.messages[self.dropped :]]
        length = self.context
        room = length - min(self.settings.max_new_tokens, length // 4)
        ids = self.prompt.ids(seen)
        full = len(ids) > room
        while full and len(ids) > room // 2:
            fewer = shortened(seen)
            if fewer is None:
                break
            seen, ids = fewer, self.prompt.ids(fewer)
        if len(ids) >= length:
            raise UsageError(
                f"this message takes {len(ids)} tokens with what belongs to it, and the context holds {length} with "
                "the answer. Shorten it, or the system message."
            )
        self.dropped = len(self.messages) - (len(seen) - len(system))
        return ids

    def _rewound(self, ids: list[int]) -> int:
        """Keep of the cache what these tokens begin with; returns how many that are, never all of them."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._read, ids[:-1], strict=False))
        kept = self.loop.rewind(sum(1 for _ in pairs))
        del self._read[kept:]
        return kept

    def _prefilled(self, ids: list[int], stopped: Callable[[], bool]) -> torch.Tensor | None:
        """Read tokens; logits [vocabulary] of the last, or None when it was stopped."""
        logits = None
        for first in range(0, len(ids), _AT_ONCE):
            if stopped():
                return None
            logits = self._take(ids[first : first + _AT_ONCE])
        return logits

    def _take(self, ids: list[int]) -> torch.Tensor:
        """Read tokens; logits [vocabulary] behind the last."""
        given: Any = torch.tensor([ids], device=self.loop.model.device)
        logits = self.loop.step(given) if len(ids) == 1 else self.loop.prefill(given)
        self._read += ids
        return logits[0]
