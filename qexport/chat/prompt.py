"""What a model reads of a conversation: its chat template's words, or without one the plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qexport.calibration import bos_id, encode
from qexport.errors import UsageError

Message: TypeAlias = Mapping[str, str]  # role (system, user or assistant) and content


@dataclass(frozen=True)
class Prompt:
    """How messages become tokens.

    Attributes:
        tokenizer: of transformers.
        template: in Jinja; None: the model goes on where the messages end, one below the other.
    """

    tokenizer: Any
    template: str | None

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, up to where the answer begins.

        Raises:
            UsageError: the template can't be used for these messages.
        """
        if self.template is None:
            bos = bos_id(self.tokenizer, "auto")
            text = "\n".join(message["content"] for message in messages)
            return [*([] if bos is None else [bos]), *encode(self.tokenizer, text).tolist()]
        try:
            found: list[int] = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=self.template, add_generation_prompt=True,
                return_dict=False, tokenizer_kwargs={"verbose": False},
            )  # fmt: skip
        except Exception as error:  # a template is a program: anything may come of it
            why = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                f"the chat template refuses this conversation ({why}). Some know no system message, or want user and "
                "assistant in turn; --template FILE takes another one, --no-template none."
            ) from error
        return found


def template_of(tokenizer: Any) -> str | None:
    """The chat template that comes with a tokenizer, if one does."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    found: str = tokenizer.get_chat_template()
    return found


def shortened(messages: Sequence[Message]) -> Sequence[Message] | None:
    """Without the oldest turn: what stands before the second message of a user. None if there is but one turn.

    A system message at the beginning stays.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    later = [i for i, message in enumerate(messages) if message["role"] == "user" and i > first]
    return [*messages[:first], *messages[later[0] :]] if later else None
