"""What is read of a conversation: by a template, without one, and which turns go first."""

import pytest

from qexport.chat.prompt import Prompt, shortened, template_of
from qexport.errors import UsageError
from tests import tiny

TURNS = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
SYSTEM = {"role": "system", "content": "s"}


def test_a_template_says_what_is_read() -> None:
    tokenizer = tiny.tokenizer(chat=True, add_bos=True)
    prompt = Prompt(tokenizer, template_of(tokenizer))
    assert tokenizer.decode(prompt.ids([SYSTEM, *TURNS])) == "[system]s\n[user]a\n[assistant]b\n[user]c\n[assistant]"


def test_without_a_template_a_text_goes_on_behind_its_bos() -> None:
    assert template_of(tiny.tokenizer()) is None
    for bos in (False, True):
        tokenizer = tiny.tokenizer(add_bos=bos)
        assert tokenizer.decode(Prompt(tokenizer, None).ids(TURNS)) == "<s>" * bos + "a\nb\nc"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[7]['content'] }}", "refuses"),
        ("{% if %}", "refuses"),
    ],
)
def test_a_template_that_fails_says_why(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prompt(tiny.tokenizer(), template).ids(TURNS)


def test_the_oldest_turn_goes_first_and_the_system_message_stays() -> None:
    assert shortened(TURNS) == TURNS[2:]
    assert shortened([SYSTEM, *TURNS]) == [SYSTEM, *TURNS[2:]]
    assert shortened([TURNS[1], TURNS[2]]) == [TURNS[2]]
    assert shortened([SYSTEM, TURNS[0]]) is None
    assert shortened([TURNS[0]]) is None
