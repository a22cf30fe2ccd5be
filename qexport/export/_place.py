"""A folder that is there whole, or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qexport.errors import ResumeError


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder beside `place` to write into, which gets its name at the end, unless something goes wrong.

    Raises:
        ResumeError: `place` is in use, or can't be made.
    """
    refuse_taken(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent)
    except OSError as error:
        raise ResumeError(f"{place}: can't be the output folder: {error.strerror}. Choose another -o.") from error
    with work as folder:
        made = Path(folder) / "out"
        made.mkdir()
        yield made
        if place.exists():
            place.rmdir()
        made.rename(place)


def refuse_taken(place: Path) -> None:
    """Raise `ResumeError` where something is already that is not an empty folder."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ResumeError(f"{place} is there already. Choose another -o, or remove it.")
