"""SentencePiece tokenizers in GGUF files: pieces with scores that merge them in the order of the list."""

from pathlib import Path
from typing import Any

import pytest
import transformers as t
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from qexport.errors import PlanError
from qexport.export import export
from qexport.export._gguf_vocabulary import read_vocabulary
from tests.test_export_gguf import made

_SPACES = normalizers.Replace(" ", "▁")
_LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), _SPACES])
_MERGES = [("a", "b"), ("▁", "ab"), ("▁a", "b"), ("▁", "a")]


def pieces(norm: Any = _LLAMA, cut: Any = None, merges: Any = _MERGES) -> t.PreTrainedTokenizerFast:
    """A tokenizer of all bytes, three letters, and what `merges` makes of them."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b"]
    names += list(dict.fromkeys(left + right for left, right in merges))
    raw = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if norm is not None:
        raw.normalizer = norm
    if cut is not None:
        raw.pre_tokenizer = cut
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("norm", "cut", "space"),
    [
        (_LLAMA, None, True),
        (_SPACES, None, False),
        (None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False), False),
    ],
)
def test_scores_follow_the_merges(norm: Any, cut: Any, space: bool, tmp_path: Path) -> None:
    pieces(norm, cut).save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 266)
    assert (found.space, found.pre, found.merges) == (space, None, [])
    assert found.scores is not None
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert (scores["ab"], scores["▁ab"], scores["▁a"]) == (0, -1, -3)
    assert scores["a"] < -3
    assert found.types[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert found.types[258:261] == [6, 1, 1]
    assert found.types[265] == 5  # a row that no token has


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (pieces(normalizers.Lowercase()), "it has pieces, but prepares text otherwise"),
        (pieces(merges=[("a", "b"), ("▁", "ab"), ("▁", "a")]), "its merges can't be said in scores, those of '▁ab'"),
        (
            pieces(merges=[("▁", "a"), ("a", "b"), ("▁a", "b"), ("b", "b"), ("▁", "ab")]),
            "its merges can't be said in scores, those of '▁ab'",
        ),
    ],
)
def test_what_scores_can_not_say_is_refused(tokenizer: Any, reason: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=reason):
        read_vocabulary(tmp_path, 266)


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    folder = made(tmp_path, tokenizer=pieces(), vocab_size=266)
    export(folder, "gguf", tmp_path / "out", check=False)
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.pre"].contents() == "default"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    assert len(fields["tokenizer.ggml.scores"].contents()) == 266
    assert "tokenizer.ggml.merges" not in fields
