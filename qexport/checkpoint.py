"""Files of a checkpoint: reading safetensors lazily, writing them atomically, and the journal.

Reading trusts nothing: every header is checked against the size of its file before any tensor is looked at. Files are
read, not mapped, so that resident memory is what was asked for. Writing goes to `<name>.tmp`, is synced and renamed,
and the bytes depend on the tensors alone.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qexport.container import METADATA_KEY
from qexport.errors import CheckpointError, ResumeError

INDEX = "model.safetensors.index.json"
# What may lie beside config and weights and belongs to the model: tokenizer, chat template, generation settings,
# processors. Named one by one, because a folder also holds what is nobody's business: keys, adapters, results.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer.model*", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json", "spiece.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "chat_template.*", "processor_config.json",
    "preprocessor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meta:
    """Where a stored tensor lies: `nbytes` bytes from `offset` of `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Meta], dict[str, str]]:
    """Tensors and metadata of one safetensors file; raises `CheckpointError` unless header and file size agree."""

    def bad(reason: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: {reason}. The file is damaged or cut short; fetch or write it again.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise bad(f"expected a safetensors header, found length {length} in a file of {size} bytes")
            header = json.loads(file.read(length).decode())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise bad("the header is not JSON") from error
    if not isinstance(header, dict):
        raise bad("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise bad("the metadata is not a table of strings")
    tensors = {name: _meta(path, 8 + length, name, entry, bad) for name, entry in header.items()}
    end = 8 + length
    for name, meta in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if meta.offset != end:
            raise bad(f"{name} starts at byte {meta.offset}, expected {end}")
        end += meta.nbytes
    if end != size:
        raise bad(f"expected {end} bytes, found {size}")
    return tensors, metadata


def _meta(path: Path, base: int, name: str, entry: Any, bad: Any) -> Meta:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if not all(type(v) is int and v >= 0 for v in (*shape, start, stop)):
            raise ValueError(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise bad(f"the header entry of {name[:200]} is malformed") from error
    nbytes = prod(shape) * dtype.itemsize
    if stop - start != nbytes:
        raise bad(f"{name}: {nbytes} bytes follow from dtype and shape, the header says {stop - start}")
    return Meta(dtype, shape, path, base + start, nbytes)


class Reader:
    """Tensors of a folder of safetensors files, read one at a time and never mapped.

    Args:
        folder: a folder with `model.safetensors`, or `model.safetensors.index.json` and its shards.
        files: read just these files of the folder instead.

    Raises:
        CheckpointError: a file is missing or damaged, or two files hold one tensor.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        self.folder = Path(folder)
        self.files = tuple(files) if files is not None else _weight_files(self.folder)
        self.metadata: dict[str, dict[str, str]] = {}
        self._tensors: dict[str, Meta] = {}
        for file in self.files:
            tensors, self.metadata[file] = read_header(self.folder / file)
            for name, meta in tensors.items():
                if name in self._tensors:
                    raise CheckpointError(f"{name}: stored in {self._tensors[name].file.name} and in {file}.")
                self._tensors[name] = meta

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in file order."""
        return tuple(self._tensors)

    def meta(self, name: str) -> Meta:
        """Dtype, shape and place of a tensor; raises `CheckpointError` when there is none of that name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{name}: missing from {', '.join(self.files[:3])} in {self.folder}.") from None

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU."""
        meta = self.meta(name)
        return _load(meta, meta.offset, meta.nbytes).reshape(meta.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor's first axis."""
        meta = self.meta(name)
        row = meta.nbytes // meta.shape[0]
        return _load(meta, meta.offset + start * row, (stop - start) * row).reshape(stop - start, *meta.shape[1:])

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The stored bytes of a tensor, `size` at a time."""
        meta = self.meta(name)
        with meta.file.open("rb") as file:
            file.seek(meta.offset)
            left = meta.nbytes
            while left:
                data = file.read(min(size, left))
                if not data:
                    raise CheckpointError(f"{meta.file.name}: ended inside {name}.")
                left -= len(data)
                yield data


def shape_of(meta: Meta, name: str) -> Tensor:
    """A tensor of this dtype and shape on the meta device; raises `CheckpointError` where there can be none."""
    try:
        return torch.empty(meta.shape, dtype=meta.dtype, device="meta")
    except (RuntimeError, TypeError, OverflowError) as error:  # a zero among absurd extents passes the check of sizes
        raise CheckpointError(f"{name}: shape {str(list(meta.shape))[:100]} is none that a tensor can have.") from error


def _load(meta: Meta, offset: int, nbytes: int) -> Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes:
        with meta.file.open("rb") as file:
            file.seek(offset)
            if file.readinto(buffer.numpy().data) != nbytes:
                raise CheckpointError(f"{meta.file.name}: ended before byte {offset + nbytes}.")
    return buffer.view(meta.dtype)


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs to a model beside its config and weights."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)


def companions(folder: Path) -> tuple[Path, ...]:
    """Files of a folder that every copy of a model keeps as they are: tokenizer, chat template, processor."""
    return tuple(sorted(p for p in folder.iterdir() if is_companion(p.name) and stays_inside(p)))


def stays_inside(path: Path) -> bool:
    """Whether a path means a file of its own folder, and not, as a link, one that lies somewhere else.

    A snapshot in the Hub's cache is made of links into the blobs beside it, which count as its own.
    """
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    own = target.is_relative_to(folder) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))
    return own and target.is_file()


def _weight_files(folder: Path) -> tuple[str, ...]:
    index = folder / INDEX
    single = folder / "model.safetensors"
    if index.exists() and single.exists():
        raise CheckpointError(
            f"{folder}: expected model.safetensors or {index.name} with its shards, found both, and loaders differ in "
            "which of them they read. Delete the one that does not belong there."
        )
    if not index.exists():
        if single.exists():
            return (single.name,)
        raise CheckpointError(f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither.")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to files.")
    files = sorted(set(weights.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file[:200]!r} is not a safetensors file of this folder.")
    return tuple(files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` when it is missing or malformed."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}.")
    return data


# ---- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A finished file."""

    name: str
    sha256: str
    nbytes: int


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in the order of `order`, then renames it into place.

    Args:
        path: final path.
        entries: dtype and shape of every tensor that will come.
        metadata: the JSON object for the file's one metadata key; None leaves it out.
        tags: other metadata, that foreign readers ask for.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self._temporary = path, path.with_name(path.name + ".tmp")
        # Wide dtypes first: every tensor is then aligned to its own item size.
        self.order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
        self._entries = dict(entries)
        self._pending = list(self.order)
        self._hash = hashlib.sha256()
        own = {} if metadata is None else {METADATA_KEY: dump_json(metadata)}
        self._header = self._make_header({**(tags or {}), **own})
        self.result: Written | None = None

    def _make_header(self, metadata: Mapping[str, str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in self.order:
            dtype, shape = self._entries[name]
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-len(data) % 8)
        return len(data).to_bytes(8, "little") + data

    def __enter__(self) -> "ShardWriter":
        self._file = self._temporary.open("wb")
        self._put(self._header)
        return self

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Write the next tensor, whole or as chunks of its stored bytes."""
        if not self._pending or self._pending[0] != name:
            raise ValueError(f"expected {self._pending[:1]}, got {name}")
        dtype, shape = self._entries[self._pending.pop(0)]
        before = self._file.tell()
        if isinstance(data, Tensor):
            if data.dtype != dtype or tuple(data.shape) != shape:
                raise ValueError(f"{name}: announced {dtype} {shape}, got {data.dtype} {tuple(data.shape)}")
            flat = data.detach().cpu().contiguous().flatten()
            self._put(flat.view(torch.uint8).numpy().data)
        else:
            for chunk in data:
                self._put(chunk)
        if self._file.tell() - before != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{name}: the source gave {self._file.tell() - before} bytes, expected {dtype} {shape}."
            )

    def __exit__(self, kind: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        nbytes = self._file.tell()
        if kind is None and not self._pending:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is not None or self._pending:
            self._temporary.unlink(missing_ok=True)
            if kind is None:
                raise ValueError(f"tensors never written: {self._pending[:3]}")
            return
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        self.result = Written(self.path.name, self._hash.hexdigest(), nbytes)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Written:
    """Write tensors that are all in memory; returns the finished file."""
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(path, entries, metadata) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    assert writer.result is not None
    return writer.result


def dump_json(data: Any, indent: int | None = None) -> str:
    """JSON with sorted keys: equal data gives equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(data, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False)


def write_text(path: Path, text: str) -> Written:
    """Write a text file atomically."""
    data = text.encode()
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
    return Written(path.name, hashlib.sha256(data).hexdigest(), len(data))


def copy_companions(folder: Path, out: Path) -> "Iterator[Written]":
    """Copy a folder's companions, each whole or not at all."""
    for path in companions(folder):
        temporary = out / (path.name + ".tmp")
        shutil.copyfile(path, temporary)
        temporary.replace(out / path.name)
        yield Written(path.name, sha256(out / path.name), (out / path.name).stat().st_size)


def write_index(folder: Path, files: Iterable[str]) -> Written:
    """Write the index of some safetensors files of a folder."""
    reader = Reader(folder, sorted(files))
    table = {name: reader.meta(name).file.name for name in reader.names}
    total = sum(reader.meta(name).nbytes for name in reader.names)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    return write_text(folder / INDEX, dump_json(index, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


# ---- the journal -------------------------------------------------------------------------------


class Journal:
    """What a job has finished, one JSON line each; the first line is the plan: its digest, and its options in full.

    A line is on disk before the next step begins, so that a killed job knows exactly which files are whole.
    """

    NAME = "qexport.journal"

    def __init__(self, folder: Path, digest: str, options: Mapping[str, Any] | None = None) -> None:
        self.path = folder / self.NAME
        lines = self.lines(folder)
        if lines and lines[0].get("plan") != digest:
            raise ResumeError(f"{folder} was started with another plan. Use the old options, or --restart.")
        self.done: dict[str, dict[str, Any]] = {line["file"]: line for line in lines[1:]}
        if not lines:
            write_text(self.path, dump_json({"plan": digest, "options": options}) + "\n")

    @classmethod
    def lines(cls, folder: Path) -> list[dict[str, Any]]:
        """The complete lines of a folder's journal, up to the first that a crash cut short or that none of ours is."""
        path = folder / cls.NAME
        if not path.exists():
            return []
        out: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n"):
            try:
                entry = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                break
            name = entry.get("file" if out else "plan") if isinstance(entry, dict) else None
            if not isinstance(name, str) or Path(name).name != name:
                break
            out.append(entry)
        return out

    def add(self, written: Written, **facts: Any) -> None:
        """Record a finished file with whatever the report will want to know about it."""
        line = {"file": written.name, "sha256": written.sha256, "nbytes": written.nbytes, **facts}
        text = "".join(dump_json(entry) + "\n" for entry in [*self.lines(self.path.parent), line])
        write_text(self.path, text)  # rewritten whole: a line cut short by a crash must not swallow the next
        self.done[written.name] = line
