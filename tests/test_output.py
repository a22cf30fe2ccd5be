"""The output folder: nothing is lost to a mistake, nothing foreign is touched, and two jobs never share one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from qexport import output
from qexport.checkpoint import Journal
from qexport.errors import CalibrationError, QExportError, ResumeError, UsageError
from qexport.events import Event, LayerDone
from qexport.finish import Outcome
from qexport.output import claimed, clear, differences, survey
from tests import tiny
from tests.test_quantize import TEXT, contents, job


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama."""
    return tiny.save("llama", tmp_path / "model")


class Killed(BaseException):
    """Stands for a kill."""


def cut(model: Path, out: Path, text: Path, **options: Any) -> None:
    """A job that ends after its first layer."""

    def once(event: Event) -> None:
        if isinstance(event, LayerDone):
            raise Killed

    with pytest.raises(Killed):
        job(model, out, text, observer=once, group_size=16, **options)


def again(model: Path, out: Path, text: Path | str, **options: Any) -> Outcome:
    """The same with `--restart`."""
    from qexport.quantize import quantize
    from qexport.recipe import load_recipe, with_options
    from tests.test_quantize import plan_for

    plan, source = plan_for(model, with_options(load_recipe("gptq"), list(options.items())), text)
    return quantize(plan, source, out, restart=True)


@pytest.mark.parametrize(("source", "error"), [("typo", UsageError), ("short.txt", CalibrationError)])
def test_restart_with_a_mistake_deletes_nothing(
    model: Path, text: Path, tmp_path: Path, source: str, error: type[QExportError]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    job(model, tmp_path / "out", text)
    before = contents(tmp_path / "out")
    with pytest.raises(error):
        again(model, tmp_path / "out", str(tmp_path / source) if source.endswith("txt") else source)
    assert contents(tmp_path / "out") == before


def test_a_job_that_fails_its_checks_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError):
        job(model, tmp_path / "out", tmp_path / "short.txt")
    assert not (tmp_path / "out").exists()


def test_another_text_of_the_same_name_is_another_job(model: Path, text: Path, tmp_path: Path) -> None:
    cut(model, tmp_path / "out", text)
    text.write_text(TEXT + " and more")
    with pytest.raises(ResumeError, match=r"calibration.sha256 \w+, now \w+"):
        job(model, tmp_path / "out", text, group_size=16)


def test_the_message_names_the_option_that_changed_even_before_the_end(model: Path, text: Path, tmp_path: Path) -> None:
    cut(model, tmp_path / "out", text)
    with pytest.raises(ResumeError, match=r"method.damp 0.01, now 0.02\)"):
        job(model, tmp_path / "out", text, group_size=16, damp=0.02)
    assert differences({"a": {"b": [1, 2]}, "c": 3}, {"a": {"b": [1, 4]}, "c": 3}) == ["a.b 2, now 4"]


def test_two_jobs_never_share_a_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(ResumeError, match="another job is writing to it"):  # noqa: SIM117
        with claimed(tmp_path / "out"):
            pass
    with claimed(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_what_can_not_be_a_folder_is_a_stated_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResumeError, match="can't be the output folder"), claimed(tmp_path / place):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("after", range(12))
def test_restart_can_be_interrupted_at_any_file(
    model: Path, text: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job(model, out, text, group_size=16)
    expected, unlink, count = contents(out), Path.unlink, 0

    def failing(path: Path, missing_ok: bool = False) -> None:
        nonlocal count
        if path.exists():
            count += 1
            if count > after:
                raise Killed
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", failing)
        with pytest.raises(Killed):
            clear(out, survey(out))
    assert not (out / "qexport.json").exists() or after == 0
    job(model, out, text, group_size=16)
    assert contents(out) == expected


def test_restart_takes_files_along_that_a_killed_job_had_copied(text: Path, tmp_path: Path) -> None:
    chat, plain = (tiny.save("llama", tmp_path / name, chat=name == "chat") for name in ("chat", "plain"))
    out = tmp_path / "out"

    def manifest_fails(path: Path, text: str) -> Any:
        if path.name == "qexport.json":
            raise Killed
        return write_text(path, text)

    from qexport import finish

    write_text = finish.write_text
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finish, "write_text", manifest_fails)
        with pytest.raises(Killed):
            job(chat, out, text)
    assert (out / "chat_template.jinja").exists()
    again(plain, out, text)
    assert not (out / "chat_template.jinja").exists()


def test_restart_keeps_a_card_that_is_not_ours(model: Path, text: Path, tmp_path: Path) -> None:
    job(model, tmp_path / "out", text)
    (tmp_path / "out" / "README.md").write_text("mine")
    again(model, tmp_path / "out", text, damp=0.02)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_complete_folder_that_lost_a_file_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    job(model, tmp_path / "out", text)
    (tmp_path / "out" / "run.json").unlink()
    assert job(model, tmp_path / "out", text).seconds is None
    next((tmp_path / "out").glob("model-00001-*")).unlink()
    with pytest.raises(ResumeError, match="was complete and lacks model-00001-of-.* now"):
        job(model, tmp_path / "out", text)


def test_a_full_disk_is_noticed_before_work_starts(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(ResumeError, match="the result takes .* GB, and 0.00 GB are free there"):
        job(model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("journal", ["[1]", "{}", '{"plan": 7}', "[" * 5000, '{"plan": "../x"}'])
def test_a_journal_of_another_shape_is_not_ours(tmp_path: Path, journal: str) -> None:
    (tmp_path / Journal.NAME).write_text(journal + "\n")
    with pytest.raises(ResumeError, match="not empty and not ours"):
        survey(tmp_path)


@pytest.mark.parametrize("manifest", ["[]", "{", '{"files": 5}', '{"digest": "x", "plan": {}, "files": {"../y": "z"}}'])
def test_a_manifest_of_another_shape_deletes_nothing(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "qexport.json").write_text(manifest)
    with pytest.raises(ResumeError, match="which files are ours"):
        survey(tmp_path)
