"""Publishing a checkpoint on the Hub: verify it, write its card, send what is not there yet. Repeating is safe."""

import fnmatch
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qexport import card
from qexport.checkpoint import COMPANIONS, Reader, read_json, stays_inside, write_text
from qexport.container import parse
from qexport.errors import CheckpointError, QExportError, SourceError, UsageError
from qexport.events import Advanced, Note, Observer, Started, ignore
from qexport.facts import EXPORT, card_facts, check_export, export_card

CARD = "README.md"
MANIFEST = "qexport.json"
_HUB = "https://huggingface.co"
_WAITS = (1.0, 4.0)  # seconds before the second and the third attempt; huggingface_hub retries single requests itself
# run.json stays at home: it names the machine. Journals, temporary files and others' results match nothing here.
_NOTES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_SIDE_FILES = (
    "config.json", "model.safetensors.index.json", "calibration.safetensors", MANIFEST, "results.jsonl", *_NOTES,
    *COMPANIONS,
)  # fmt: skip

T = TypeVar("T")
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class _Remote:
    """The repository that is written to."""

    api: Any
    repo: str
    revision: str | None
    observer: Observer
    sleep: Sleep


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    verify: Callable[[Path], object] | None = None,
    sleep: Sleep = time.sleep,
    observer: Observer = ignore,
) -> dict[str, Any]:
    """Upload a checkpoint and its card; files that the repository has already are not sent again.

    A card edited by hand, here or in the repository, is kept. Connection failures and server errors are tried again;
    what has arrived by then stays, and repeating the call completes it.

    Args:
        directory: a folder of `qexport quantize` or `qexport export`.
        repo: `owner/name`, or `name` for one of your own.
        private: make a new repository private.
        revision: branch, made if it does not exist; default `main`.
        dry_run: send nothing and connect to nothing; say what would be sent.
        token: access token; by default the one of `hf auth login` or `HF_TOKEN`.
        endpoint: of the Hub; by default `HF_ENDPOINT`.
        verify: check of the directory, by default `qexport.verify.verify`; raises on damage.
        sleep: waits between attempts.
        observer: is told of progress.

    Returns:
        `{repo, url, revision, commit, dry_run, files: {name: bytes}, bytes, card}`; `card` is `{text, action}` with
        action `write` or `keep`; `commit` is None in a dry run.

    Raises:
        CheckpointError: the directory is not a finished, undamaged checkpoint of ours; nothing was sent.
        UsageError: the name can't be a repository, or its visibility is not what was asked for.
        SourceError: no access, no connection, or the Hub failed repeatedly.
    """
    folder = Path(directory)
    _check_name(repo)
    _check_folder(folder, verify)
    if dry_run:
        return _report(folder, repo, f"{endpoint or _HUB}/{repo}", revision, _card(folder, repo), None)
    remote = _connect(repo, revision, token, endpoint, observer, sleep)
    full, url = _create(remote, private)  # a name without owner is complete only now, and the card shows it
    remote = _Remote(remote.api, full, revision, observer, sleep)
    text: str | None
    text, action = _card(folder, full)
    if _edited_remotely(remote, text):
        observer(Note(f"{full}: its {CARD} was edited by hand and is kept; delete it there to have it replaced"))
        text, action = None, "keep"
    elif action == "write":
        _write_card(folder, text)
    names = list(_sizes(folder, text))
    observer(Started("push", len(names), "file"))
    commit = _attempt(remote, "uploading", lambda: _upload(remote, folder, names))
    observer(Advanced("push", len(names), full))
    return _report(folder, full, url, revision, (text, action), commit)


def _report(
    folder: Path, repo: str, url: str, revision: str | None, text_action: tuple[str | None, str], commit: str | None
) -> dict[str, Any]:
    text, action = text_action
    files = _sizes(folder, text)
    return {
        "repo": repo,
        "url": url,
        "revision": revision or "main",
        "commit": commit,
        "dry_run": commit is None,
        "files": files,
        "bytes": sum(files.values()),
        "card": {"text": text, "action": action},
    }


def _sizes(folder: Path, text: str | None) -> dict[str, int]:
    """Bytes of each file to send; None for the card's text leaves the card out."""
    found = {path.name: path.stat().st_size for path in sendable(folder) if path.name != CARD}
    if text is not None:
        found[CARD] = len(text.encode())
    return dict(sorted(found.items()))


def _write_card(folder: Path, text: str) -> None:
    try:
        write_text(folder / CARD, text)
    except OSError as error:
        raise SourceError(f"{folder / CARD} can't be written: {error.strerror}. Push a copy that you own.") from error


def sendable(folder: Path) -> list[Path]:
    """The files of a checkpoint that belong on the Hub, sorted by name; the card is among them if there is one.

    Raises:
        CheckpointError: one of them is a link to a file elsewhere.
    """
    side: Sequence[str] = _SIDE_FILES
    if (folder / EXPORT).exists():
        known, side = {CARD, EXPORT, *check_export(folder)}, _NOTES
    else:
        # All that the manifest lists goes along: a download that lacks one of them would not verify.
        listed = read_json(folder / MANIFEST).get("files") if (folder / MANIFEST).exists() else None
        known = {CARD, *Reader(folder).files, *(listed or ())}
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name in known or any(fnmatch.fnmatch(path.name, p) for p in side))
        and not path.name.endswith(".tmp")
    ]
    for path in found:
        if not stays_inside(path):
            raise CheckpointError(
                f"{path.name}: expected a file in {folder}, found a link to one elsewhere, which would be sent. "
                "Put a copy in its place, or delete it."
            )
    return found


# ---- before anything is sent -------------------------------------------------------------------


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} can't name a repository: expected owner/name. {error}") from error


def _check_folder(folder: Path, verify: Callable[[Path], object] | None) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a directory that `qexport quantize` wrote; there is none.")
    if (folder / EXPORT).exists():
        check_export(folder)
        return
    parse(read_json(folder / "config.json").get("quantization_config"), str(folder / "config.json"))
    (verify or _verify)(folder)


def _verify(folder: Path) -> None:
    from qexport.verify import verify

    verify(folder)


def _card(folder: Path, repo: str) -> tuple[str, str]:
    """The text of the card, and whether it is to be written or is the user's own and kept."""
    path = folder / CARD
    if path.exists():
        text = path.read_bytes().decode(errors="replace")
        if not card.is_generated(text):
            return text, "keep"
    exported = (folder / EXPORT).exists()
    return export_card(folder, repo) if exported else card.render(card_facts(folder, repo)), "write"


# ---- the Hub -----------------------------------------------------------------------------------


def _connect(
    repo: str, revision: str | None, token: str | None, endpoint: str | None, observer: Observer, sleep: Sleep
) -> _Remote:
    import huggingface_hub

    token = token or huggingface_hub.get_token()
    if not token:
        raise SourceError(
            f"{repo}: pushing needs a token with write access, found none. Run `hf auth login`, set HF_TOKEN, or pass "
            "--token. Tokens are made at https://huggingface.co/settings/tokens."
        )
    return _Remote(huggingface_hub.HfApi(endpoint=endpoint, token=token), repo, revision, observer, sleep)


def _create(remote: _Remote, private: bool) -> tuple[str, str]:
    """Make the repository and the branch if they are not there; returns the full name and the address."""
    made = _attempt(
        remote,
        "creating the repository",
        lambda: remote.api.create_repo(remote.repo, private=True if private else None, exist_ok=True),
    )
    name = str(made.repo_id)
    if private and not _attempt(remote, "reading the repository", lambda: remote.api.repo_info(name).private):
        raise UsageError(f"{name} exists and is public; --private would not hide it. Change it in its settings first.")
    if remote.revision not in (None, "main"):
        branch = remote.revision
        _attempt(remote, "creating the branch", lambda: remote.api.create_branch(name, branch=branch, exist_ok=True))
    return name, str(made)


def _edited_remotely(remote: _Remote, text: str) -> bool:
    """Whether the repository has a card that is neither ours nor the one about to be sent."""
    from huggingface_hub.errors import EntryNotFoundError

    def read() -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = remote.api.hf_hub_download(remote.repo, CARD, revision=remote.revision, local_dir=folder)
            except EntryNotFoundError as error:
                if type(error).__name__ == "LocalEntryNotFoundError":
                    raise  # not "there is none" but "it could not be asked"
                return None
            return Path(path).read_bytes().decode(errors="replace")

    found = _attempt(remote, "reading its card", read)
    return found is not None and found != text and not card.is_generated(found)


def _upload(remote: _Remote, folder: Path, names: Sequence[str]) -> str:
    """One commit of what is new; returns the head of the branch afterwards."""
    info = remote.api.upload_folder(
        repo_id=remote.repo, folder_path=folder, revision=remote.revision, allow_patterns=list(names),
        commit_message="Upload with qexport",
    )  # fmt: skip
    return str(info.oid)


def _attempt(remote: _Remote, what: str, call: Callable[[], T]) -> T:
    """Call, again after a pause where that may help; what is left raises a `SourceError` with the next step."""
    for wait in (*_WAITS, None):
        try:
            return call()
        except QExportError:
            raise
        except Exception as error:  # huggingface_hub, its HTTP library and its transfer library each have their own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            status = _status(error)
            if status in (401, 403):
                raise SourceError(
                    f"{remote.repo}: {what} was refused (HTTP {status}: {reason}). Use a token with write access: "
                    "`hf auth login`, HF_TOKEN, or --token."
                ) from error
            if type(error).__name__ == "OfflineModeIsEnabled":
                raise SourceError(f"{remote.repo}: {what}: HF_HUB_OFFLINE is set. Unset it to push.") from error
            if status is not None and status < 500 and status not in (408, 429):
                raise SourceError(f"{remote.repo}: {what} failed (HTTP {status}: {reason}).") from error
            if isinstance(error, TypeError | AttributeError | NameError):
                raise  # a mistake in a program, which repeating does not mend
            if wait is None:
                raise SourceError(
                    f"{remote.repo}: {what} failed {len(_WAITS) + 1} times ({reason}). What has arrived is kept; "
                    "repeat the command to send the rest."
                ) from error
            remote.observer(Note(f"{what} failed ({reason}); trying again in {wait:.0f} s", "warning"))
            remote.sleep(wait)
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    """HTTP status behind an error, its own or that of its cause: a refused card comes as a ValueError from a 400."""
    for found in (error, error.__cause__):
        status = getattr(getattr(found, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None
