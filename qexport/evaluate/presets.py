"""Names for tasks that are usually reported together. The command line completes them, so nothing is imported here."""

from collections.abc import Mapping, Sequence

PRESETS: Mapping[str, Sequence[str]] = {
    "csqa": ("boolq", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
    "mmlu": ("mmlu",),
    "gsm8k": ("gsm8k",),
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "bbh": ("bbh",),
}


def expand(names: Sequence[str]) -> list[str]:
    """Names with presets in full, each once."""
    return list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))
