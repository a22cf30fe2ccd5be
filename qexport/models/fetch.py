"""A model on the Hub becomes a folder: only the files that are needed, and no pickle ever."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from torch import Tensor

from qexport import kvfile
from qexport.checkpoint import COMPANIONS, Meta
from qexport.errors import SourceError

_SIDE_FILES = ("config.json", "model.safetensors.index.json", "qexport.json", "results.jsonl", *COMPANIONS)
WEIGHT_FILES = ("model*.safetensors", kvfile.FILE)
# Subfolders hold other exports of the same weights.
_SKIPPED = ("*/*",)
# huggingface_hub has changed its HTTP library between versions; the base of its own error is that library's.
HTTP_ERRORS: tuple[type[BaseException], ...] = (*hub.HfHubHTTPError.__bases__, hub.HFValidationError, OSError)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def fetch(repo: str, *, revision: str | None, token: str | None, weights: bool) -> Path:
    """Download a model of the Hub, or find it in the Hub's cache.

    Args:
        repo: `owner/name`.
        revision: branch, tag or commit.
        token: access token; None uses the one that the user logged in with.
        weights: False fetches configuration and tokenizer only.

    Returns:
        The snapshot folder; its name is the commit.

    Raises:
        SourceError: no such repository or revision, no access, no connection, or weights in pickles only.
    """
    patterns = [*_SIDE_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=list(_SKIPPED)
        )
    except HTTP_ERRORS as error:
        refuse(error, repo, revision)
    return Path(folder)


def cached(repo: str, *, revision: str | None) -> Path | None:
    """The snapshot of a model whose weights lie in the Hub's cache already; None if they do not. Never connects."""
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except HTTP_ERRORS:
        return None
    return folder if any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES) else None


def refuse(error: BaseException, repo: str, revision: str | None = None) -> NoReturn:
    """Turn what huggingface_hub raised into a `SourceError` that says what to do."""
    if isinstance(error, hub.GatedRepoError):
        reason = f"is gated. Accept its licence at https://huggingface.co/{repo}, then `hf auth login` or pass --token."
    elif isinstance(error, hub.RevisionNotFoundError):
        reason = f"has no revision {revision!r}. See https://huggingface.co/{repo}/tree/main for what there is."
    elif isinstance(error, hub.RepositoryNotFoundError):
        reason = (
            "is neither a local folder nor a public model on the Hub. "
            "Check the spelling; if it is private, `hf auth login` or pass --token."
        )
    elif isinstance(error, hub.HFValidationError):
        reason = "is neither an existing folder, nor a .gguf file, nor an owner/name on the Hub. Check the path."
    elif not isinstance(error, hub.HfHubHTTPError):
        reason = (
            f"can't be fetched: the Hub can't be reached ({type(error).__name__}), and no copy is in the Hub's cache. "
            "Connect, unset HF_HUB_OFFLINE, or pass the path of a local folder."
        )
    else:
        reason = f"can't be fetched: {str(error).strip().splitlines()[0]}"
    raise SourceError(f"{repo}: {reason}") from error


def check_weights(files: list[str], where: str) -> None:
    """Refuse a model whose weights are pickles, or that has none; raises `SourceError`."""
    if any(f.endswith(".safetensors") for f in files):
        return
    pickles = sorted(f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")))
    if pickles:
        raise SourceError(
            f"{where}: the weights are in {pickles[0]}, which can run code when it is read. qexport reads safetensors "
            "and GGUF only. If you trust the file, load it with transformers, save_pretrained, and quantize that."
        )
    raise SourceError(
        f"{where}: expected model.safetensors, or model.safetensors.index.json and its shards, found no weights. "
        "If it is a GGUF repository, download one .gguf file and pass its path."
    )


def repo_files(repo: str, *, revision: str | None, token: str | None) -> list[str] | None:
    """Names of a repository's files; None when only the cache can say."""
    try:
        return huggingface_hub.HfApi(token=token).list_repo_files(repo, revision=revision)
    except HTTP_ERRORS as error:
        if isinstance(error, hub.HfHubHTTPError | hub.HFValidationError):
            refuse(error, repo, revision)
        return None


class Headers:
    """Names, dtypes and shapes of a Hub model's tensors, from its safetensors headers: no weights are downloaded."""

    def __init__(self, repo: str, *, revision: str | None, token: str | None) -> None:
        try:
            info: Any = huggingface_hub.HfApi(token=token).get_safetensors_metadata(repo, revision=revision)
        except hub.NotASafetensorsRepoError:
            check_weights(repo_files(repo, revision=revision, token=token) or [], repo)
            raise
        except HTTP_ERRORS as error:
            refuse(error, repo, revision)
        self._repo = repo
        self._tensors: dict[str, Meta] = {}
        for file, content in info.files_metadata.items():
            for name, tensor in content.tensors.items():
                start, stop = tensor.data_offsets
                if tensor.dtype not in _DTYPES:
                    raise SourceError(
                        f"{repo}: {name} has dtype {tensor.dtype}. Start from weights in F32, BF16 or F16."
                    )
                self._tensors[name] = Meta(_DTYPES[tensor.dtype], tuple(tensor.shape), Path(file), start, stop - start)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def meta(self, name: str) -> Meta:
        """Dtype and shape of a tensor."""
        return self._tensors[name]

    def _absent(self) -> NoReturn:
        raise SourceError(
            f"{self._repo}: only headers were fetched. Open the source with weights=True to read tensors."
        )

    def read(self, name: str) -> Tensor:
        """Always raises `SourceError`."""
        self._absent()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Always raises `SourceError`."""
        self._absent()

    def chunks(self, name: str, size: int = 0) -> Iterator[bytes]:
        """Always raises `SourceError`."""
        self._absent()
