"""The command as it was typed, for records that say how something was made."""

import shlex
import sys

_SECRET = "--token"


def called() -> str:
    """The arguments of this process; an access token is left out."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        words.append("***" if hidden else f"{_SECRET}=***" if word.startswith(f"{_SECRET}=") else word)
        hidden = word == _SECRET
    return shlex.join(["qexport", *words])
