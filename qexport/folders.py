"""Where qexport keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of qexport: `$QEXPORT_CACHE`, else where the system keeps such things."""
    own = os.environ.get("QEXPORT_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qexport"
