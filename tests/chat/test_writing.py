"""Text from tokens as they come: whole characters and pictures, and together what the tokenizer says."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qexport.chat.writing import Writing
from tests import tiny

TEXTS = ("été 漢字 🙂.", "a👩‍💻b", "🇫🇷🇯🇵 ok", "e\u0301 ✌️ ✌🏽!", "  two  spaces\n\nline\t.", "<s>", "🙂🙂🙂", "")


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], before: list[int] | None = None) -> list[str]:
    writing = Writing(tokenizer, before or [])
    return [*(writing.add(token) for token in ids), writing.end()]


def falling_back() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: words with a mark for the space before them, and bytes of what is no word."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "▁time", "s", "▁"]
    vocab = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_and_no_character_is_half(text: str) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(found)


def test_a_picture_comes_whole_once_something_else_follows_and_a_letter_at_once() -> None:
    tokenizer = tiny.tokenizer()
    for picture in ("👩‍💻", "🇫🇷", "✌🏽", "☺️"):
        found = pieces(tokenizer, tokenizer(f"a{picture}b")["input_ids"])
        assert [piece for piece in found if piece] == ["a", f"{picture}b"]
        assert [piece for piece in pieces(tokenizer, tokenizer(picture)["input_ids"]) if piece] == [picture]
    found = pieces(tokenizer, tokenizer("aé漢b")["input_ids"])
    assert found == ["a", "", "é", "", "", "漢", "b", ""]


def test_bytes_that_are_no_text_do_not_hold_the_rest_back() -> None:
    tokenizer = tiny.tokenizer()
    byte = tokenizer("é")["input_ids"][0]  # the first of two
    ids = [byte] * 20 + tokenizer("ok")["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert any(found[:12])


def test_words_keep_the_space_between_them_and_characters_of_bytes_are_whole() -> None:
    tokenizer = falling_back()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "▁time", "s", "▁"])
    face = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🙂é".encode()]
    found = pieces(tokenizer, [*ids, *face, *ids])
    assert "".join(found) == "a times 🙂é a times " == tokenizer.decode([*ids, *face, *ids])
    assert found[:3] == ["a", " time", "s"]


def test_a_text_that_goes_on_begins_as_it_goes_on() -> None:
    tokenizer = falling_back()
    once, time = (tokenizer.convert_tokens_to_ids(word) for word in ("▁a", "▁time"))
    assert "".join(pieces(tokenizer, [time], [once])) == " time"
    assert "".join(pieces(tokenizer, [time])) == "time"
