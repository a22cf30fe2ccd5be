"""The tokenizer of a GGUF file, as llama.cpp rebuilds it: byte-level BPE, or pieces of SentencePiece with scores."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import PlanError
from qexport.export._gguf_model import ELSEWHERE
from qexport.models.auto import read_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut into words before merging, and llama.cpp's name for it. Where two tokenizers are cut alike, one of the
# names also has words that are tokens skip the merges, as the flag says.
_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes and words",), False): "gpt-2",
    (("digits", "bytes and words"), False): "smollm",
    ((_WORDS % r"\p{N}{1,3}", "bytes"), True): "llama-bpe",
    ((_WORDS % r"\p{N}{1,3}", "bytes"), False): "smaug-bpe",
    ((_WORDS % r"\p{N}", "bytes"), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        tokens: by id, one for each row of the embedding.
        types: of the tokens.
        merges: pairs with a space between them, the most urgent first; of pieces none.
        pre: llama.cpp's name of how text is cut into words; of pieces None.
        special: ids by role: `bos`, `eos`, `unk`, `pad`.
        add_bos: whether a text starts with `bos`.
        add_eos: whether it ends with `eos`.
        template: of a chat; several have names.
        scores: of pieces, by id: the pair that makes the piece of the highest score is merged first.
        space: whether pieces put a space before a text.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str | None
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    template: str | Sequence[Mapping[str, str]] | None
    scores: list[float] | None = None
    space: bool = False

    def add_to(self, writer: Any) -> None:
        """Tell a `GGUFWriter`."""
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a folder.

    Args:
        folder: a checkpoint.
        size: rows of the embedding; ids that no token has are filled up, tokens without a row are left out.

    Raises:
        SourceError: there is none.
        PlanError: it is none that llama.cpp can rebuild.
    """
    tokenizer: Any = read_tokenizer(folder, name=folder.name, advice="Add the model's tokenizer.json to the folder.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(f"{type(tokenizer).__name__} has no tokenizer.json, of which alone the file can be made")
    state: dict[str, Any] = json.loads(backend.to_str())
    pieces = state["model"].get("byte_fallback") and state["model"]["type"] == "BPE"
    space, pre = (_space(state), None) if pieces else (False, _pre(state))
    tokens, types = _tokens(state, size)
    add_bos, add_eos = _ends(tokenizer)
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[] if pieces else [" ".join(pair) for pair in _merges(state)],
        pre=pre,
        special={role: number for role, number in ids.items() if number is not None and number < size},
        add_bos=add_bos,
        add_eos=add_eos,
        template=template,
        scores=_scores(state, tokens) if pieces else None,
        space=space,
    )


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in state["model"]["merges"]]


def _space(state: Mapping[str, Any]) -> bool:
    """Whether SentencePiece's tokenizer puts a space before a text; raises `PlanError` if it does anything else."""
    norm, cut = state.get("normalizer"), state.get("pre_tokenizer")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match norm, cut:
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, last]}, None if last == spaces:
            return True
        case _, None if norm == spaces:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return bool(scheme != "never")
    raise PlanError(f"it has pieces, but prepares text otherwise: {json.dumps([norm, cut])[:300]}. {ELSEWHERE}")


def _scores(state: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Scores of pieces that merge them in the order of the list; raises `PlanError` if none do."""
    vocab, merges = state["model"]["vocab"], _merges(state)
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    gaps = [piece for piece, own in ranks.items() if own[-1] - own[0] != len(own) - 1]
    known = set(merges)
    splits = ((p, i) for p in vocab for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab and p in ranks)
    lost = next((p for p, i in splits if (p[:i], p[i:]) not in known), None)
    if gaps or lost:
        raise PlanError(f"its merges can't be said in scores, those of {[*gaps, lost][0]!r} for one. {ELSEWHERE}")
    return [float(-ranks[token][0]) if token in ranks else float(-len(merges)) for token in tokens]


def _pre(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's way to cut words; it does without NFC, which some ask for."""
    model, norm = state["model"], (state.get("normalizer") or {}).get("type", "NFC")
    if model["type"] != "BPE" or norm != "NFC":
        raise PlanError(
            f"it is {model['type']} and normalizes with {norm}, and only byte-level BPE and SentencePiece are "
            f"written here. {ELSEWHERE}"
        )
    cut = state.get("pre_tokenizer") or {}
    steps = tuple(_step(step) for step in cut.get("pretokenizers", [cut]))
    found = _CUTS.get((steps, bool(model.get("ignore_merges"))))
    if found is None:
        raise PlanError(
            f"it cuts text into words as none of {', '.join(_CUTS.values())} does: {json.dumps(cut)[:300]}. {ELSEWHERE}"
        )
    return found


def _step(step: Mapping[str, Any]) -> str:
    """One step of cutting in a word, or the pattern that it cuts by; what llama.cpp can't do is called unknown."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return "bytes and words" if words else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
    return "unknown"


def _tokens(state: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    added = {t["id"]: (t["content"], CONTROL if t["special"] else USER_DEFINED) for t in state["added_tokens"]}
    fallback, unknown = state["model"].get("byte_fallback"), state["model"].get("unk_token")
    own = {
        number: (token, BYTE if fallback and _BYTE.fullmatch(token) else NORMAL)
        for token, number in state["model"]["vocab"].items()
    }
    for number, (token, kind) in {**own, **added}.items():
        if number < size:  # classes of tokenizers add tokens of their own, for which a model need not have rows
            tokens[number], types[number] = token, UNKNOWN if fallback and token == unknown else kind
    return tokens, types


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether it puts its bos before a text, and its eos behind it."""
    plain, full = (list(tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (False, True))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos in (False, True):
        for add_eos in (False, True):
            if full == bos * add_bos + plain + eos * add_eos:
                return add_bos, add_eos
    raise PlanError(f"it adds more to a text than {bos} before it and {eos} behind it: {plain} becomes {full}")
