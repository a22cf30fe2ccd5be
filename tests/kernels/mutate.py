"""Are the tests of decoders sharp? Changes one shift, mask or stride at a time, and demands that tests fail.

    python -m tests.kernels.mutate [WORD ...]    all of `mutants.MUTANTS`, or those whose file or text has a word

Each runs in a copy of the package in a temporary folder, which numba compiles for itself; the working tree stays as it
is. The same tests must pass without the change. A change that no test can tell is one that the list explains; one that
tests don't find and the list doesn't explain is a failure, as is one whose text is not found exactly once. Verdicts are
kept in `build/mutants` until the package, or a test that gave them, changes.

What changes loops of the CPU is only found on an x86 processor with AVX-512 VNNI, and with numba: elsewhere their tests
are skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.kept import ROOT, digest_of, kept

FOLDER = ROOT / "build" / "mutants"
PROCESSES = 2
_COPIED = ("qexport", "tests", "pyproject.toml")
_LONGEST = 600  # seconds of a run of tests; a loop without end is found, too


@dataclass(frozen=True)
class Mutant:
    """A change.

    Attributes:
        file: path from the root.
        old: text that the file has exactly once.
        new: what takes its place.
        tests: files or tests that shall fail, paths from the root.
        only: a choice of them, as pytest's `-k` takes it.
        equivalent: why nothing can tell, if nothing can.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str = ""
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"

    def of(self, text: str) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the old text is not there exactly once, or the new one is the same.
        """
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(f"{self}: expected once and changed, found {text.count(self.old)} times")
        return text.replace(self.old, self.new)


def fails(root: Path, mutant: Mutant, change: bool = True) -> dict[str, Any]:
    """Whether the mutant's tests fail in a copy of the project, with the change or without, and seconds.

    Raises:
        ValueError: see `Mutant.of`.
        RuntimeError: pytest could not run them; what it wrote is in the text.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as made:
        folder = Path(made)
        for name in _COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / name, folder / name)
        if change:
            file = folder / mutant.file
            file.write_text(mutant.of(file.read_text()))
        own = {"PYTHONPATH": made, "NUMBA_CACHE_DIR": str(folder / "numba"), "OMP_NUM_THREADS": "1"}
        own["TRITON_CACHE_DIR"] = str(folder / "triton")
        chosen = ["-k", mutant.only] if mutant.only else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen, *mutant.tests]
        try:
            run = subprocess.run(
                command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=_LONGEST
            )
            status = run.returncode
        except subprocess.TimeoutExpired:
            status = 1
    if status not in (0, 1):
        raise RuntimeError(f"{mutant}: pytest ended with {status}\n{run.stdout[-1500:]}{run.stderr[-500:]}")
    return {"fails": status == 1, "seconds": round(time.monotonic() - started, 1)}


def _sources(root: Path, mutant: Mutant) -> tuple[str, ...]:
    """What a verdict depends on: the package, the tests, and what tests share."""
    shared = (str(p.relative_to(root)) for p in (root / "tests").rglob("*.py") if not p.name.startswith("test_"))
    own = {"tests/kernels/mutate.py", "tests/kernels/mutants.py"}
    return ("qexport/**/*.py", *sorted(set(shared) - own), *(t.split("::")[0] for t in mutant.tests))


def tried(root: Path, folder: Path, mutant: Mutant, change: bool = True) -> dict[str, Any]:
    """As `fails`, from what is kept in the folder where it can be."""
    key = digest_of(root, _sources(root, mutant), *mutant.tests, mutant.only)
    name = f"{mutant.file} {mutant.old} {mutant.new}" if change else "unchanged"
    return dict(kept(folder / key, name, lambda: fails(root, mutant, change)))


def verdict(found: bool, mutant: Mutant) -> str:
    """What a run of the tests says of a mutant: "killed", "equivalent", or what is wrong."""
    if mutant.equivalent:
        return "explained, but tests tell" if found else "equivalent"
    return "killed" if found else "survives"


def report(root: Path, folder: Path, mutants: Sequence[Mutant]) -> Iterable[tuple[str, float, str]]:
    """Verdict, seconds and text of every mutant, and of tests that fail without one."""
    stale = []
    for mutant in mutants:
        try:
            mutant.of((root / mutant.file).read_text())
        except (OSError, ValueError) as error:
            stale.append(("stale", 0.0, str(error)))
    if stale:
        yield from stale
        return
    plain = list({(mutant.tests, mutant.only): mutant for mutant in mutants}.values())
    jobs = [(mutant, False) for mutant in plain] + [(mutant, True) for mutant in mutants]

    def work(job: tuple[Mutant, bool]) -> tuple[str, float, str]:
        mutant, change = job
        try:
            got = tried(root, folder, mutant, change)
        except RuntimeError as error:
            return "error", 0.0, str(error)
        if not change:
            said = "fails unchanged" if got["fails"] else "passes unchanged"
            return said, got["seconds"], f"{' '.join(mutant.tests)} {mutant.only}"
        said = verdict(got["fails"], mutant)
        return said, got["seconds"], f"{mutant}{': ' + mutant.equivalent if said == 'equivalent' else ''}"

    with ThreadPoolExecutor(PROCESSES) as pool:
        yield from pool.map(work, jobs)


def main(words: Sequence[str], mutants: Sequence[Mutant], root: Path = ROOT, folder: Path = FOLDER) -> int:
    """Write the verdicts; 0 if all mutants are killed or explained."""
    chosen = [m for m in mutants if not words or any(word in f"{m.file} {m.old}" for word in words)]
    counts: dict[str, int] = {}
    started, seconds = time.monotonic(), 0.0
    for said, took, text in report(root, folder, chosen):
        counts[said] = counts.get(said, 0) + 1
        seconds += took
        sys.stdout.write(f"{said:16} {took:6.1f} s  {text}\n")
        sys.stdout.flush()
    figures = ", ".join(f"{count} {said}" for said, count in sorted(counts.items()))
    spent = f"{seconds:.0f} s of tests in {time.monotonic() - started:.0f} s"
    sys.stdout.write(f"{len(chosen)} mutants: {figures}; {spent}\n")
    return 0 if chosen and set(counts) <= {"killed", "equivalent", "passes unchanged"} else 1


if __name__ == "__main__":
    from tests.kernels.mutants import MUTANTS

    sys.exit(main(sys.argv[1:], MUTANTS))
