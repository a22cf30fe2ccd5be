"""Text from tokens, as they come: only characters that are whole, and that no later token can change."""

import re
from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what a tokenizer makes of bytes that are no character (yet)
_PATIENCE = 8  # tokens that may wait for the rest of a character; 4 bytes are the longest
# Pictographs, flags and what joins or colours them: what follows may belong to the same picture.
_PICTURES = re.compile("[\u200d\ufe0f\u2600-\u27bf\U0001f000-\U0001faff]+$")


class Writing:
    """Turns tokens into text one by one.

    All pieces together are what the tokenizer makes of all tokens at once. A tokenizer decides about a token by its
    neighbours (spaces between words, bytes of a character), so each is decoded behind those of the piece before.

    Args:
        tokenizer: of transformers.
        before: tokens that the text continues, of which nothing is written.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids, self._first, self._next = list(before), 0, len(before)
        self._held = ""

    def add(self, token: int) -> str:
        """What can be written now that this token has come; often nothing."""
        self._ids.append(token)
        return self._written(final=len(self._ids) - self._next >= _PATIENCE, end=False)

    def end(self) -> str:
        """What is left, if no token comes any more."""
        return self._written(final=True, end=True)

    def _written(self, *, final: bool, end: bool) -> str:
        old = self._decoded(self._ids[self._first : self._next])
        new = self._decoded(self._ids[self._first :])
        if len(new) > len(old) and (final or not new.endswith(_HALF)):
            self._held += new[len(old) :]
            self._first, self._next = self._next, len(self._ids)
        waiting = None if end else _PICTURES.search(self._held)
        cut = waiting.start() if waiting else len(self._held)
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
