"""The runner of mutants on a package of one function, with tests of one line."""

import pytest

from tests.kernels import mutate
from tests.kernels.mutants import MUTANTS
from tests.kernels.mutate import Mutant

FILE = "qexport/half.py"
TOLD = Mutant(FILE, "x >> 1", "x >> 2", ("tests/test_half.py",))
BLIND = Mutant(FILE, "& 255", "& 511", ("tests/test_half.py",))


@pytest.fixture
def project(tmp_path):
    """A root with a package, its test, and a folder for verdicts."""
    for name, text in (
        ("qexport/__init__.py", ""),
        (FILE, "def half(x):\n    return (x >> 1) & 255\n"),
        ("tests/test_half.py", "from qexport.half import half\n\n\ndef test_half():\n    assert half(6) == 3\n"),
        ("pyproject.toml", "[tool.pytest.ini_options]\npythonpath = ['.']\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def verdicts(project, *mutants):
    return [said for said, _, _ in mutate.report(project, project / "kept", mutants)]


def test_a_change_that_tests_find_is_killed_and_one_they_miss_survives(project, capsys):
    assert verdicts(project, TOLD, BLIND) == ["passes unchanged", "killed", "survives"]
    assert mutate.main([], [TOLD, BLIND], project, project / "kept") == 1
    assert "1 killed, 1 passes unchanged, 1 survives" in capsys.readouterr().out
    assert mutate.main(["x >>"], [TOLD, BLIND], project, project / "kept") == 0


def test_a_survivor_needs_a_reason_and_a_reason_a_survivor(project):
    assert mutate.verdict(False, Mutant(FILE, "a", "b", (), equivalent="255 is the most")) == "equivalent"
    assert mutate.verdict(True, Mutant(FILE, "a", "b", (), equivalent="255 is the most")) == "explained, but tests tell"
    assert mutate.main([], [], project) == 1, "no mutants prove nothing"


@pytest.mark.parametrize("old", ["x >> 3", "x"])
def test_a_text_that_is_not_there_once_is_an_error_before_any_test_runs(project, old, monkeypatch, capsys):
    monkeypatch.setattr(mutate, "fails", None)
    assert mutate.main([], [Mutant(FILE, old, "y", TOLD.tests)], project, project / "kept") == 1
    assert "expected once" in capsys.readouterr().out


def test_tests_that_fail_anyway_or_are_not_there_prove_nothing(project):
    (project / "tests" / "test_half.py").write_text("def test_half():\n    assert False\n")
    assert verdicts(project, TOLD) == ["fails unchanged", "killed"]
    assert mutate.main([], [TOLD], project, project / "kept") == 1
    gone = Mutant(FILE, TOLD.old, TOLD.new, ("tests/test_half.py::test_third",))
    assert verdicts(project, gone) == ["error", "error"]


def test_the_second_run_takes_verdicts_that_are_kept_until_a_source_changes(project, monkeypatch):
    first = verdicts(project, TOLD)
    monkeypatch.setattr(mutate, "fails", None)
    assert verdicts(project, TOLD) == first
    (project / "tests" / "test_half.py").write_text("def test_half():\n    assert True\n")
    with pytest.raises(TypeError):
        verdicts(project, TOLD)


def test_the_working_tree_stays_as_it_is(project):
    before = (project / FILE).read_text()
    verdicts(project, TOLD)
    assert (project / FILE).read_text() == before


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_mutant_of_the_list_has_its_place(mutant):
    assert mutant.of((mutate.ROOT / mutant.file).read_text())
    assert all((mutate.ROOT / test.split("::")[0]).exists() for test in mutant.tests)
