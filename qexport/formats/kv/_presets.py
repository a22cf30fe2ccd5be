"""Names of caches, as `--kv` takes them; imports nothing heavy, because the shell completes them."""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kivi-4bit": ("kivi", {"bits": 4}),
    "kivi-2bit": ("kivi", {"bits": 2}),
    "kvquant-4bit": ("nuq", {"bits": 4}),
    "kvquant-3bit": ("nuq", {"bits": 3}),
    "kvquant-2bit": ("nuq", {"bits": 2, "qnorm": True, "residual_window": 96}),
    "sdr-4bit": ("sdr", {"bits": 4}),
}
"""A format and its options, by name."""
NONE = "none"
