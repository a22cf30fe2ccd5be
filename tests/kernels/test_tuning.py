"""The choice among launches: who is timed, what is kept on disk, and what happens to files that are no good."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qexport.errors import UsageError
from qexport.kernels import _gemm, _tuning
from tests.kernels.cases import Case, build

LAUNCHES = _gemm.candidates(1, 4096, 4096)
FACTS = {"format": "uniform", "n": 4096, "device": "a card"}


class Clock:
    """A stand-in for time on a GPU: what each launch takes, and which ones were timed."""

    def __init__(self, *times: float | Exception) -> None:
        self.times, self.timed, self.now = times, [], None

    def run(self, launch: _gemm.Config) -> None:
        self.now = self.times[LAUNCHES.index(launch)]

    def seconds(self, call: Any) -> float:
        call()
        self.timed.append(self.now)
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


def ask(folder: Path, clock: Clock, facts: dict[str, Any] = FACTS, *, free: bool = True) -> _gemm.Config | None:
    """What a process that has just started finds."""
    made = _tuning.Tuner(folder, clock.seconds)
    return made.best("key", lambda: (facts, LAUNCHES[: len(clock.times)]), clock.run, lambda: free)


def test_the_fastest_is_kept_and_another_process_times_nothing(tmp_path: Path) -> None:
    first, second = Clock(3.0, 1.0, 2.0), Clock(1.0, 2.0, 3.0)
    assert ask(tmp_path / "new", first) == LAUNCHES[1]
    assert first.timed == [3.0, 1.0, 2.0]
    assert ask(tmp_path / "new", second) == LAUNCHES[1]
    assert second.timed == []


def test_a_process_reads_once_until_it_may_time(tmp_path: Path) -> None:
    clock = Clock(1.0, 2.0)
    made = _tuning.Tuner(tmp_path, clock.seconds)
    asked: list[int] = []

    def product() -> tuple[dict[str, Any], tuple[_gemm.Config, ...]]:
        asked.append(1)
        return FACTS, LAUNCHES[:2]

    for _ in range(2):
        assert made.best("key", product, clock.run, lambda: False) is None
    assert len(asked) == 1
    for free in (True, False):
        assert made.best("key", product, clock.run, lambda free=free: free) == LAUNCHES[0]
    assert len(asked) == 2


def test_of_equally_fast_ones_the_first_is_taken(tmp_path: Path) -> None:
    assert ask(tmp_path, Clock(2.0, 1.0, 1.0)) == LAUNCHES[1]


def test_keys_do_not_mix(tmp_path: Path) -> None:
    assert ask(tmp_path, Clock(1.0, 2.0)) == LAUNCHES[0]
    for change in ({"device": "another card"}, {"n": 4097}, {"format": "spqr"}):
        clock = Clock(2.0, 1.0)
        assert ask(tmp_path, clock, FACTS | change) == LAUNCHES[1]
        assert clock.timed == [2.0, 1.0]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"key": ',
        b"\xff\xfe",
        b"[1, 2]",
        b'{"key": {}, "launch": {}}',
        json.dumps({"key": FACTS, "launch": asdict(LAUNCHES[0]) | {"threads": 4096}}).encode(),
        json.dumps({"key": FACTS | {"n": 1}, "launch": asdict(LAUNCHES[0])}).encode(),
    ],
)
def test_a_damaged_file_is_replaced_with_a_warning(tmp_path: Path, content: bytes) -> None:
    _tuning.Tuner(tmp_path, Clock().seconds).path(FACTS).write_bytes(content)
    with pytest.warns(UserWarning, match="is not read: .* The launch is timed again"):
        assert ask(tmp_path, Clock(2.0, 1.0)) == LAUNCHES[1]
    clock = Clock(1.0, 2.0)
    assert ask(tmp_path, clock) == LAUNCHES[1]
    assert clock.timed == []


def test_a_folder_that_can_not_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="can't be kept there"):
        assert ask(tmp_path / "file" / "folder", Clock(2.0, 1.0)) == LAUNCHES[1]


def test_launches_that_fail_are_skipped_and_other_errors_are_not(tmp_path: Path) -> None:
    assert ask(tmp_path, Clock(RuntimeError("out of resources"), 2.0)) == LAUNCHES[1]
    assert ask(tmp_path / "none", Clock(RuntimeError("a"), RuntimeError("b"))) is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError):
        ask(tmp_path / "other", Clock(UsageError("a bug"), 2.0))


def test_nothing_is_timed_while_a_graph_is_recorded(tmp_path: Path) -> None:
    clock = Clock(2.0, 1.0)
    assert ask(tmp_path, clock, free=False) is None
    assert clock.timed == []
    ask(tmp_path, clock)
    assert ask(tmp_path, Clock(1.0, 2.0), free=False) == LAUNCHES[1], "what is known is used"


def test_processes_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: ask(tmp_path, Clock(*(1.0 + (j != i % 2) for j in range(2)))), range(32)))
    assert set(found) <= set(LAUNCHES[:2])
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["key"] == FACTS


def test_a_product_asks_by_rows_up_to_a_power_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `linear` does with a GPU, up to the launch."""
    p = build(Case("uniform", {"bits": 4}, n=64, k=1024))
    ran: list[_gemm.Config] = []
    made = _tuning.Tuner(tmp_path, lambda call: call() or float(ran[-1].split != 2))
    monkeypatch.setattr(_tuning, "wanted", lambda x: True)
    monkeypatch.setattr(_tuning, "tuner", lambda: made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "here", lambda device: {"device": "a card"})
    monkeypatch.setattr(_gemm.triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(_gemm, "launches", lambda d, c, *rest: [SimpleNamespace(run=lambda: ran.append(c))])
    weights = p.kernel.repack(p.fmt, p.packed, 64, 1024)

    def launched(m: int, timed: bool) -> list[_gemm.Config]:
        ran.clear()
        _gemm.linear(p.kernel, p.fmt, torch.zeros(m, 1024), weights, 64, 1024, timed=timed)
        return list(ran)

    for m, rows in ((1, 1), (3, 4), (17, 32), (33, 64)):
        assert launched(m, False) == [_gemm.choose(m, 64, 1024, torch.float32)]
        candidates = _gemm.candidates(rows, 64, 1024, torch.float32)
        best = next((c for c in candidates if c.split == 2), candidates[0])
        assert launched(m, True) == [*candidates, best]
        for again in (m, rows):
            assert launched(again, False) == launched(again, True) == [best]
    assert launched(65, True) == [_gemm.choose(65, 64, 1024, torch.float32)]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_gpu_is_asked_unless_switched_off_or_results_must_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.delenv(_tuning.SWITCH, raising=False)
    assert _tuning.wanted(gpu)
    assert not _tuning.wanted(cpu)
    monkeypatch.setenv(_tuning.SWITCH, "0")
    assert not _tuning.wanted(gpu)
    monkeypatch.delenv(_tuning.SWITCH)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not _tuning.wanted(gpu)


@pytest.mark.parametrize("vector", [1, 6])
@pytest.mark.parametrize("m", [1, 2, 16, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(1, 31), (37, 300), (576, 576), (4096, 4096), (1536, 576), (4096, 14336)])
def test_candidates_begin_with_the_usual_launch_and_cover_the_matrix(m: int, n: int, k: int, vector: int) -> None:
    found = _gemm.candidates(m, n, k, torch.float16, vector)
    assert found[0] == _gemm.choose(m, n, k, torch.float16, vector)
    assert len(set(found)) == len(found) <= 5
    assert len(found) > 1 or not found[0].even(k)
    assert all(c.even(k) for c in found[1:])
    padded = 8 if vector == 6 else 1
    for c in found:
        assert c.padded(k) >= _gemm.blocks(k) > c.steps(k) * c.bkb * (c.split - 1)
        assert (c.bm == 1) == (m == 1)
        assert c.bn % padded == 0
        assert astuple(c) >= (0, 1, 1, 1, 32)
