"""Benchmarks that take a model run on a tiny one and leave finite figures; what they are for is to run on real ones."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from tests import finished, tiny

SMALL = ["--samples", "2", "--seqlen", "32"]
WINDOWS = ["--window", "192", "--windows", "1"]  # longer than what a cache leaves in full precision


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("benchmarks")
    tiny.save("llama", folder / "model")
    finished.write(folder / "packed")
    (folder / "text").write_text("the quick brown fox jumps over the lazy dog. " * 120)
    (folder / "other").write_text("pack my box with five dozen liquor jugs. " * 120)
    return {path.name: str(path) for path in folder.iterdir()}


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "cache",
            ["packed", "--text", "text", "--calibration", "other", *SMALL, *WINDOWS, "--generate", "4",
             "--only", "kvquant-3bit", "kivi-2bit"],
        ),
        ("cache_batch", ["packed", "--kv", "kivi-2bit", "--tokens", "2"]),
        ("cache_decode", ["--model", "model", "--tokens", "160", "--steps", "2", "--caches", "kivi-4bit"]),
        ("calibration", ["model", "--text", "text", "--domain", "other", *SMALL, "--only", "in domain"]),
        (
            "quality",
            ["model", "--text", "text", "--calibration", "other", *SMALL, "--window", "64", "--windows", "1",
             "--only", "rtn w8a8"],
        ),
    ],
)  # fmt: skip
def test_a_benchmark_runs(
    name: str, options: list[str], files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *(files.get(o, o) for o in options)])
    threads, code = torch.get_num_threads(), None
    try:
        importlib.import_module(f"benchmarks.{name}").main()
    except SystemExit as end:
        code = end.code
    finally:
        torch.set_num_threads(threads)
    assert not code
    (written,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert lines
    assert all(math.isfinite(number) for line in lines for number in numbers(line))
