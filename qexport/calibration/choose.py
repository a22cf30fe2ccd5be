"""What the user chose, what it costs, and the token ids that come of it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.calibration.sampling import MAX_ROWS, sample
from qexport.calibration.texts import DATASETS, SEPARATOR, builtin_text, dataset_documents, file_text
from qexport.checkpoint import sha256
from qexport.errors import CalibrationError, UsageError
from qexport.events import Note, Observer, ignore
from qexport.models import Anatomy, Source, anatomy, load_dense
from qexport.models.decode import compute_dtype

BOS = ("auto", "always", "never")

# Bytes of cache that decide how many sequences are sampled together.
_CACHE = 2 << 30
# Bytes a second that a model and its cache are read at, for predictions only.
_BANDWIDTH = 1e10
# Measured with a tokenizer of 49,152 entries: encodings live as its own objects and as lists before they are a tensor.
_TOKENIZER_BYTES = 60 << 20
_BYTES_PER_TEXT_BYTE = 130
_BUILTIN_BYTES = 540_000
_OTHERS = "Use --calibration builtin (nothing to download), a text file, or wikitext2, c4, pile."


@dataclass(frozen=True)
class Calibration:
    """Where calibration tokens come from, and how many.

    Attributes:
        source: `self`, `builtin`, `wikitext2`, `c4`, `pile`, `hf:ID`, or the path of a .txt or .jsonl file.
        samples: sequences.
        seqlen: tokens of each.
        bos: `auto` puts BOS first exactly when the tokenizer does so by default; `always`, `never`.
        seed: of the choices that `self` makes.
    """

    source: str = "self"
    samples: int = 128
    seqlen: int = 512
    bos: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seqlen < 2:
            raise UsageError(
                f"calibration: expected at least 1 sample of 2 tokens, got {self.samples} of {self.seqlen}."
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: expected 0 to 2^63 - 1.")
        if self.bos not in BOS:
            raise UsageError(f"--bos {self.bos!r}: expected {', '.join(BOS)}.")

    def check(self, context: int | None) -> None:
        """Refuse what can be known to fail before any text is read.

        Raises:
            UsageError: there is no such source.
            CalibrationError: sequences are longer than `context`, the model's.
        """
        named = self.source in ("self", "builtin", *DATASETS) or self.source.startswith("hf:")
        if not named and not _is_file(self.source):
            raise UsageError(
                f"--calibration {self.source!r}: expected self, builtin, {', '.join(DATASETS)}, hf:ID, "
                "or an existing .txt or .jsonl file."
            )
        if context is not None and self.seqlen > context:
            raise CalibrationError(
                f"--seqlen {self.seqlen} is longer than the model's context, {context}. Use that or less."
            )

    def file_sha256(self) -> str | None:
        """SHA-256 of the file that the text comes from, None if it comes from elsewhere."""
        return sha256(Path(self.source).expanduser()) if _is_file(self.source) else None

    def tokenizing_bytes(self) -> int:
        """Memory of the tokenizer and of tokenizing the text; the allocator keeps it, so the whole job carries it."""
        size = 0
        if _is_file(self.source):
            size = Path(self.source).expanduser().stat().st_size
        elif self.source == "builtin":
            size = _BUILTIN_BYTES
        elif self.source != "self":
            size = 5 * self.samples * self.seqlen
        return _TOKENIZER_BYTES + _BYTES_PER_TEXT_BYTE * size

    def predicted_bytes(self, anatomy: Anatomy, device: str | torch.device = "cpu") -> int:
        """Memory that making the tokens takes beside tokenizing: for `self` the model, its cache and the logits."""
        if self.source != "self":
            return 0
        item = compute_dtype(anatomy, device).itemsize
        rows = self._rows(anatomy.cache_width, item)
        cache = rows * self.seqlen * anatomy.cache_width * item
        # Logits, their float32 copy, probabilities and cumulative sums are alive together.
        return _parameters(anatomy) * item + cache + rows * anatomy.vocab * (item + 4 * 4)

    def predicted_seconds(self, anatomy: Anatomy, speed: float, device: str | torch.device = "cpu") -> float:
        """Time that making the tokens takes, given the device's floating-point operations a second."""
        if self.source != "self":
            return 5.0
        item = compute_dtype(anatomy, device).itemsize
        rows = self._rows(anatomy.cache_width, item)
        steps = -(-self.samples // rows) * self.seqlen
        read = steps * _parameters(anatomy) * item + self.samples * self.seqlen**2 / 2 * anatomy.cache_width * item
        return 2 * _parameters(anatomy) * self.samples * self.seqlen / speed + read / _BANDWIDTH

    def _rows(self, cache_width: int, item: int) -> int:
        each = max(self.seqlen * cache_width * item, 1)
        return max(1, min(self.samples, MAX_ROWS, _CACHE // each))


@dataclass(frozen=True)
class Tokens:
    """Calibration tokens.

    Attributes:
        ids: int64 [samples, seqlen].
        origin: source, amounts, seed, `bos` (whether each sequence starts with it), `sha256` of the ids as
            little-endian int64, and `text_sha256` of the text that they were cut from (None for `self`).
    """

    ids: Tensor
    origin: dict[str, Any]


def tokens(
    source: Source,
    spec: Calibration,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    observer: Observer = ignore,
) -> Tokens:
    """Make calibration tokens.

    Args:
        source: the model; `self` loads all of it, the others its tokenizer only.
        spec: what the user chose.
        device: where `self` runs.
        dtype: compute dtype of `self`; None chooses as `compute_dtype` says.
        observer: is told of the progress.

    Raises:
        CalibrationError: too little text, or the model does not fit into memory.
        SourceError: a file or data set can't be read.
        UsageError: the source or BOS policy does not exist.
    """
    spec.check(None)
    tokenizer = source.tokenizer()

    def own(bos: int | None) -> Tensor:
        return _own(source, spec, tokenizer, bos, device, dtype, observer)

    return _made(spec, tokenizer, own, source.config.get_text_config().vocab_size, source.name)


def tokens_of(
    model: Any, tokenizer: Any, spec: Calibration, *, name: str, cache_width: int, observer: Observer = ignore
) -> Tokens:
    """As `tokens`, for a model that is in memory already, packed or dense.

    Args:
        model: of transformers.
        tokenizer: its tokenizer.
        spec: what the user chose.
        name: of the model, for errors.
        cache_width: elements that a token takes in its cache.
        observer: is told of the progress.
    """
    spec.check(getattr(model.config.get_text_config(), "max_position_embeddings", None))

    def own(bos: int | None) -> Tensor:
        observer(Note(f"The packed model writes its calibration text: {spec.samples} x {spec.seqlen} tokens."))
        return _written(model, tokenizer, spec, bos, cache_width, observer)

    return _made(spec, tokenizer, own, model.config.get_text_config().vocab_size, name)


def _made(spec: Calibration, tokenizer: Any, own: Callable[[int | None], Tensor], vocab: int, model: str) -> Tokens:
    """Tokens from a text, or from `own`, which has the model write them and is told the token to start with."""
    bos = bos_id(tokenizer, spec.bos)
    text_hash = None
    if spec.source == "self":
        ids = own(bos)
    else:
        text = _text(spec, tokenizer, bos)
        text_hash = hashlib.sha256(text.encode()).hexdigest()
        ids = cut(encode(tokenizer, text), spec, bos)
    _check_vocabulary(ids, vocab, model)
    name = Path(spec.source).name if _is_file(spec.source) else spec.source
    origin = {
        "source": name,
        "samples": spec.samples,
        "seqlen": spec.seqlen,
        "seed": spec.seed,
        "bos": bos is not None,
        "sha256": ids_sha256(ids),
        "text_sha256": text_hash,
    }
    return Tokens(ids, origin)


def ids_sha256(ids: Tensor) -> str:
    """SHA-256 of token ids, int64, as little-endian bytes."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def bos_id(tokenizer: Any, policy: str) -> int | None:
    """The token to put before each sequence under a `--bos` policy, or None.

    Raises:
        UsageError: no such policy, or `always` with a tokenizer that has no BOS.
    """
    if policy not in BOS:
        raise UsageError(f"--bos {policy!r}: expected {', '.join(BOS)}.")
    bos: int | None = tokenizer.bos_token_id
    if policy == "always" and bos is None:
        raise UsageError("--bos always: this tokenizer has no BOS token. Use --bos auto.")
    if policy == "auto" and bos is not None and list(tokenizer("a")["input_ids"])[:1] != [bos]:
        return None
    return None if policy == "never" else bos


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokens int64 [T] of a text as it is, without special tokens around it."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def cut(ids: Tensor, spec: Calibration, bos: int | None) -> Tensor:
    """Sequence i starts at token i * floor(T / samples); with BOS, one token less of the text follows it.

    Args:
        ids: int64 [T].
        spec: the amounts.
        bos: token to put first, or None.

    Returns:
        int64 [samples, seqlen].

    Raises:
        CalibrationError: the sequences would overlap.
    """
    body = spec.seqlen - (bos is not None)
    stride = len(ids) // spec.samples
    if stride < body:
        raise CalibrationError(
            f"calibration {spec.source}: expected at least {spec.samples * body} tokens for {spec.samples} x "
            f"{spec.seqlen}, found {len(ids)}. {_enough_for(len(ids) // body)}"
        )
    rows = torch.stack([ids[i * stride : i * stride + body] for i in range(spec.samples)])
    return rows if bos is None else torch.cat([torch.full((spec.samples, 1), bos), rows], dim=1)


def _enough_for(samples: int) -> str:
    return (
        f"Give more text, or use --samples {samples} or less." if samples else "Give more text, or a smaller --seqlen."
    )


def _text(spec: Calibration, tokenizer: Any, bos: int | None) -> str:
    if spec.source == "builtin":
        return builtin_text("calibration")
    if spec.source in DATASETS or spec.source.startswith("hf:"):
        return SEPARATOR.join(_enough(dataset_documents(spec.source), spec, tokenizer))
    if _is_file(spec.source):
        return file_text(Path(spec.source).expanduser())
    raise AssertionError("Calibration.check lets no other source through")


def _is_file(source: str) -> bool:
    named = source in ("self", "builtin", *DATASETS) or source.startswith("hf:")
    return not named and Path(source).expanduser().is_file()


def _enough(documents: Iterator[str], spec: Calibration, tokenizer: Any) -> Iterator[str]:
    """As many documents of a stream as the sequences need, and no more: a data set may have no end."""
    needed = spec.samples * spec.seqlen
    for document in documents:
        yield document
        needed -= len(encode(tokenizer, document))
        if needed <= 0:
            return


def _own(
    source: Source,
    spec: Calibration,
    tokenizer: Any,
    bos: int | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    observer: Observer,
) -> Tensor:
    described = anatomy(source)
    spec.check(described.context)
    needed, there = spec.predicted_bytes(described, device), _free_bytes(torch.device(device))
    if there is not None and needed > there:
        raise CalibrationError(
            "calibration self: the model has to be in memory to write its text, "
            f"about {needed / 2**30:.1f} GiB with its cache; {there / 2**30:.1f} GiB are free on {device}. {_OTHERS}"
        )
    chosen = dtype or compute_dtype(described, device)
    name = str(chosen).removeprefix("torch.")
    observer(Note(f"The model writes its calibration text: {spec.samples} x {spec.seqlen} tokens in {name}."))
    model = load_dense(source, dtype=chosen, device=device)
    return _written(model, tokenizer, spec, bos, described.cache_width, observer)


def _written(model: Any, tokenizer: Any, spec: Calibration, bos: int | None, width: int, observer: Observer) -> Tensor:
    """Text of a model in memory whose cache has so many elements for each token."""
    return sample(
        model,
        tokenizer,
        samples=spec.samples,
        seqlen=spec.seqlen,
        seed=spec.seed,
        bos=bos,
        rows=spec._rows(width, model.dtype.itemsize),
        observer=observer,
    )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _parameters(anatomy: Anatomy) -> int:
    return sum(torch.Size(shape).numel() for _, shape in anatomy.parameters.values())


def _check_vocabulary(ids: Tensor, vocab: int, model: str) -> None:
    if int(ids.max()) >= vocab:
        raise CalibrationError(
            f"{model}: its tokenizer gives token {int(ids.max())}, its embedding has {vocab} rows. "
            "The tokenizer belongs to another model."
        )
