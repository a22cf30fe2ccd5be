"""The output folder of a job: whose it is, who writes to it, and what may be deleted from it."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport import card
from qexport.checkpoint import Journal, dump_json, read_json, write_text
from qexport.errors import CheckpointError, ResumeError
from qexport.finish import CARD, MANIFEST, RESULTS, RUN
from qexport.kvfile import PENDING, WORK
from qexport.plan import Plan

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)  # of network file systems
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class Found:
    """What lies in an output folder.

    Attributes:
        digest: of the plan that wrote it; None if there is nothing of ours.
        options: that plan as JSON, as far as it is known.
        files: names of the files that it has finished.
        complete: whether the job came to its end.
        discarded: whether a `--restart` was interrupted while it deleted them.
    """

    digest: str | None = None
    options: Mapping[str, Any] | None = None
    files: frozenset[str] = frozenset()
    complete: bool = False
    discarded: bool = False


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder and keep other jobs out of it; if nothing was written, nothing is left behind.

    Raises:
        ResumeError: it can't be made or written to, or another job is writing to it.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ResumeError(f"{out}: can't be the output folder: {error.strerror}. Choose another -o.") from error
    try:
        if not os.access(out, os.W_OK | os.X_OK):
            raise ResumeError(f"{out}: can't be the output folder: it is not writable. Choose another -o.")
        _lock(handle, out)
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ResumeError(
            f"{out}: can't be written: {error.strerror}. What is finished is kept: make room and repeat the command."
        ) from error
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # not empty: something was written
                out.rmdir()


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResumeError(f"{out}: another job is writing to it. Wait for its end, or choose another -o.") from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise


def survey(out: Path) -> Found:
    """Look, and change nothing.

    Raises:
        ResumeError: the folder holds somebody else's files, or a manifest that can't be read.
    """
    lines = Journal.lines(out)
    if lines:
        head, files = lines[0], frozenset(line["file"] for line in lines[1:])
        return Found(head["plan"], head.get("options"), files, discarded=bool(head.get("discarded")))
    if (out / MANIFEST).exists():
        return _finished(out)
    present = sorted(p.name for p in out.iterdir() if p.name != f"{Journal.NAME}.tmp")
    if present:
        raise ResumeError(f"{out} is not empty and not ours: it holds {', '.join(present[:5])}. Choose another -o.")
    return Found()


def _finished(out: Path) -> Found:
    try:
        manifest = read_json(out / MANIFEST)
    except CheckpointError as error:
        raise ResumeError(f"{error} It can't say which files are ours: choose another -o.") from error
    digest, files, options = (manifest.get(key) for key in ("digest", "files", "plan"))
    known = isinstance(digest, str) and isinstance(options, dict) and isinstance(files, dict)
    if not known or any(Path(name).name != name for name in files or ()):
        raise ResumeError(f"{out / MANIFEST} is damaged and can't say which files are ours. Choose another -o.")
    return Found(digest, options, frozenset(files or ()), complete=True)


def settle(out: Path, found: Found, plan: Plan) -> bool:
    """Compare what was found with the plan; returns whether the job is complete already.

    Raises:
        ResumeError: it belongs to another plan, or it was complete and lacks files now.
    """
    if found.digest is None:
        return False
    if found.digest != plan.digest:
        changed = "; ".join(differences(found.options, plan.as_json())) or "another version of qexport"
        raise ResumeError(f"{out} was started with another plan ({changed}). Use the old options, or --restart.")
    lost = sorted(name for name in found.files if not (out / name).is_file())
    if found.complete and lost:
        raise ResumeError(
            f"{out} was complete and lacks {', '.join(lost[:3])} now. Put it back, or make all anew with --restart."
        )
    return found.complete


def differences(old: Any, new: Any, where: str = "", most: int = 3) -> list[str]:
    """The leaves in which two JSON values differ, as `samples 2, now 3`; not more than so many."""
    if old is None:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        pairs = [(f"{where}.{key}".lstrip("."), old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(where, a, b) for a, b in zip(old, new, strict=True)]
    elif old != new:
        return [f"{where} {str(old)[:60]}, now {str(new)[:60]}"]
    else:
        return []
    found = [line for name, a, b in pairs if a != b for line in differences(a if a is not None else "none", b, name)]
    return list(dict.fromkeys(found))[:most]


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raise `ResumeError` unless so many bytes are free beside what lies there."""
    free = shutil.disk_usage(out).free
    there = sum(p.stat().st_size for p in out.iterdir() if p.is_file())
    if needed > free + there:
        raise ResumeError(
            f"{out}: the result takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there. "
            "Make room, or choose another -o."
        )


def clear(out: Path, found: Found) -> None:
    """Delete what the earlier job wrote, and nothing else; if interrupted, the next call goes on.

    The journal says first what is to go, and goes last itself.
    """
    head = {"plan": found.digest, "discarded": True}
    lines = [head, *({"file": name, "sha256": ""} for name in sorted(found.files))]
    write_text(out / Journal.NAME, "".join(dump_json(line) + "\n" for line in lines))
    (out / MANIFEST).unlink(missing_ok=True)
    for name in (*sorted(found.files), PENDING, WORK, RUN, RESULTS):
        (out / name).unlink(missing_ok=True)
        (out / f"{name}.tmp").unlink(missing_ok=True)
    for path in out.glob("model-*-of-*.safetensors.tmp"):
        path.unlink(missing_ok=True)
    readme = out / CARD
    if readme.is_file() and card.is_generated(readme.read_text(encoding="utf-8", errors="replace")):
        readme.unlink()
    (out / Journal.NAME).unlink()
