"""Names of settings' folders: they follow from a setting's own options, whatever else its grid spans."""

import re
from collections.abc import Mapping
from typing import Any

_FIRST = ("format", "input", "kv", "bits", "group_size", "symmetric")


def folder_name(options: Mapping[str, Any]) -> str:
    """Such as `gptq+awq-4b-g64-damp-0.02`.

    Args:
        options: `method`, `transforms` as a list of names, and whatever else the setting states.
    """
    left = {key: value for key, value in options.items() if key not in ("method", "transforms")}
    keys = [key for key in _FIRST if key in left] + sorted(key for key in left if key not in _FIRST)
    name = "-".join(["+".join([options["method"], *options["transforms"]]), *(_part(key, left[key]) for key in keys)])
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")


def _part(key: str, value: Any) -> str:
    match key:
        case "format" | "input" | "kv":
            return str(value)
        case "bits":
            return f"{value}b"
        case "group_size":
            return f"g{value}"
        case "symmetric":
            return "sym" if value else "asym"
        case _:
            return f"{key}-{str(value).lower() if isinstance(value, bool) else value}"
