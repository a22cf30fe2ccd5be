"""`qexport sweep` on a tiny model: what a grid's file means, what is refused, and that a killed sweep goes on."""

import gc
import io
import json
import os
import re
import signal
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qexport.checkpoint import read_json, sha256
from qexport.cli import app
from qexport.cli.screen import Screen
from qexport.errors import UsageError
from qexport.evaluate import loading
from qexport.events import Advanced, Event, LayerDone, Note, Started, ignore
from qexport.finish import RUN
from qexport.models import open_source
from qexport.plan import Plan
from qexport.predict import Prediction, predict
from qexport.sweep import outlook, read_grid, sweep
from qexport.sweep.clock import Clock, spelled
from tests import tiny
from tests.tasks import CHOICE

RUNNER = CliRunner()
ROOT = Path(__file__).parents[1]
GRID = """
model = "{model}"
output = "{out}"

[quantize]
samples = 6
seqlen = 16

[[setting]]
method = "rtn"
bits = [3, 8]
group_size = 16

[[setting]]
method = "gptq"
group_size = 16
transforms = [[], ["rotation"]]

[eval]
texts = ["{text}"]
seqlen = 32
windows = 8
"""
NAMES = ["rtn-3b-g16", "rtn-8b-g16", "gptq-g16", "gptq+rotation-g16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return tiny.save("llama", folder / "tiny")


@pytest.fixture
def grid(model: Path, tmp_path: Path) -> Path:
    """The file of a grid of four settings."""
    return written(model, tmp_path)


def written(model: Path, folder: Path, change: Callable[[str], str] = str) -> Path:
    path = folder / "grid.toml"
    text = GRID.format(model=model, out=folder / "out", text=model.parent / "fox.txt")
    path.write_text(change(text))
    return path


def run(
    path: Path, observer: Callable[[Event], None] = ignore, *, names: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """A sweep over all settings, or some."""
    found = read_grid(path)
    settings = [s for s in found.settings if not names or s.name in names]
    return sweep(found, settings, open_source(str(found.model)), observer=observer, **options)


def notes(events: Sequence[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def figures(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Values and intervals of a setting."""
    row = next(row for row in result["comparison"]["rows"] if row["name"] == name)
    return {label: (found["value"], found["interval"]) for label, found in row["figures"].items()}


# ---- the file ----------------------------------------------------------------------------------


def test_lists_span_the_product_and_names_follow_from_a_settings_own_options(grid: Path) -> None:
    assert [s.name for s in read_grid(grid).settings] == NAMES
    grid.write_text(grid.read_text().replace("bits = [3, 8]", "bits = [3]\nclip = [0, 4]\ntune.steps = [0, 2]"))
    names = [s.name for s in read_grid(grid).settings if s.number == 1]
    assert names == [f"rtn-3b-g16-clip-{clip}-tune.steps-{n}" for clip in (0, 4) for n in (0, 2)]
    assert read_grid(grid).settings[3].recipe.block_options == {"steps": 2}


def test_a_cache_a_format_and_symmetry_are_in_the_name_and_in_the_recipe(grid: Path) -> None:
    spanned = "kv = ['none', 'kivi-2bit']\nformat = 'uniform'\nsymmetric = [true, false]"
    grid.write_text(grid.read_text().replace("bits = [3, 8]\ngroup_size = 16", spanned))
    found = read_grid(grid).settings[:4]
    assert [s.name for s in found] == [f"rtn-uniform-{kv}-{s}" for kv in ("none", "kivi-2bit") for s in ("sym", "asym")]
    assert [s.recipe.kv for s in found] == ["none", "none", "kivi-2bit", "kivi-2bit"]
    assert [s.recipe.format_options["symmetric"] for s in found] == [True, False, True, False]


def test_what_all_settings_share_is_not_in_their_names_but_in_their_recipes(grid: Path) -> None:
    grid.write_text(grid.read_text().replace("samples = 6", "samples = 6\nembeddings = 8"))
    found = read_grid(grid)
    assert [s.name for s in found.settings] == NAMES
    assert {s.recipe.embeddings for s in found.settings} == {8}
    assert (found.calibration.source, found.calibration.samples, found.against) == ("self", 6, True)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("samples = 6", "sampels = 6", r"grid.toml: \[quantize\]: unknown key 'sampels'.*mean 'samples'"),
        ("[eval]", "[evla]", r"unknown key 'evla'.*mean 'eval'"),
        ("windows = 8", "window = 8", r"\[eval\]: unknown key 'window'.*mean 'windows'"),
        ("windows = 8", "windows = 'all'", r"\[eval\]: option 'windows': expected int"),
        ("windows = 8", "against = 3", "against = 3: expected true"),
        ('"gptq"', '"gpqt"', r"setting 2: there is no method 'gpqt'.*mean 'gptq'"),
        ("bits = [3, 8]", "bitss = [3, 8]", r"setting 1: no option 'bitss'.*mean 'bits'"),
        ("bits = [3, 8]", "bits = [3, 9]", r"setting 1: .*bits"),
        ("bits = [3, 8]", "bits = []", r"setting 1: bits = \[\]: an empty list"),
        ("bits = [3, 8]", "bits = [3, 3]", "setting 1: rtn-3b-g16 is in setting 1 already"),
        ('method = "rtn"', 'methid = "rtn"', r"setting 1: needs a method.*mean 'methid'"),
        ('["rotation"]', '["rotatoin"]', r"setting 2: there is no transform 'rotatoin'.*mean 'rotation'"),
        ('["rotation"]', "[4]", r"setting 2: transforms = \[4\]: expected a name"),
        ("[[setting]]", "[[settings]]", r"unknown key 'settings'"),
        ("output = ", "# ", "output = None: expected the name of a folder"),
    ],
)
def test_what_does_not_exist_is_refused_by_file_setting_and_closest_name(
    old: str, new: str, told: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        read_grid(written(model, tmp_path, lambda text: text.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('transforms = [[], ["rotation"]]', 'format = "vector"', r"setting 2, gptq-vector: .*cannot use format"),
        ("samples = 6", 'calibration = "nowhere.txt"\nsamples = 6', "setting 2, gptq-g16: .*'nowhere.txt'"),
        ("windows = 8", 'bos = "seldom"', r"\[eval\]: --bos 'seldom'"),
        ("seqlen = 32", "seqlen = 4096", r"\[eval\]: seqlen = 4096: the model's context has 128"),
        ("fox.txt", "wolf.txt", r"\[eval\]: .*wolf.txt"),
    ],
)
def test_what_the_model_or_the_disk_lacks_is_refused_before_anything_is_written(
    old: str, new: str, told: str, model: Path, tmp_path: Path
) -> None:
    path = written(model, tmp_path, lambda text: text.replace(old, new).replace("group_size = 16\nformat", "format"))
    found = RUNNER.invoke(app, ["sweep", str(path)])
    assert found.exit_code in (1, 2)
    assert re.search(told, found.stderr), found.stderr
    assert not (tmp_path / "out").exists()


def test_a_figure_that_is_not_measured_can_not_be_sorted_by(grid: Path) -> None:
    grid.write_text(grid.read_text() + "against = false\n")
    with pytest.raises(
        UsageError, match="--sort 'kl': this grid measures no such figure. Known: perplexity, bits, size."
    ):
        run(grid, sort="kl")
    assert not (grid.parent / "out").exists()


# ---- the work ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Event]]:
    """Folder, result and events of a sweep that nothing stopped."""
    folder, events = tmp_path_factory.mktemp("whole"), []
    return folder, run(written(model, folder), events.append), events


def test_every_setting_is_what_quantize_and_eval_make_of_it(
    whole: tuple[Path, dict[str, Any], list[Event]], model: Path, tmp_path: Path
) -> None:
    folder, result, _ = whole
    assert [row["name"] for row in result["settings"]] == NAMES
    words = ["quantize", str(model), "-m", "gptq", "-t", "rotation", "--group-size", "16", "--samples", "6"]
    made = RUNNER.invoke(app, [*words, "--seqlen", "16", "-o", str(tmp_path / "one")])
    assert made.exit_code == 0, made.output
    for file in tmp_path.glob("one/*.safetensors"):
        assert sha256(file) == sha256(folder / "out" / NAMES[3] / file.name)
    how = ["--text", str(model.parent / "fox.txt"), "--seqlen", "32", "--windows", "8", "--json"]
    found = json.loads(RUNNER.invoke(app, ["eval", str(tmp_path / "one"), *how]).stdout)["perplexity"]["fox.txt"]
    rows = {row["name"]: row for row in result["comparison"]["rows"]}
    assert rows[NAMES[3]]["figures"]["perplexity, fox.txt"]["value"] == pytest.approx(found["value"], rel=1e-6)
    assert json.loads((folder / "out" / "comparison.json").read_text())["comparison"] == result["comparison"]


def test_the_model_writes_its_calibration_text_once(whole: tuple[Path, dict[str, Any], list[Event]]) -> None:
    folder, _, events = whole
    assert sum("writes its calibration text" in text for text in notes(events)) == 1
    hashes = {sha256(folder / "out" / name / "calibration.safetensors") for name in NAMES[2:]}
    assert len(hashes) == 1


def test_the_front_is_who_no_smaller_one_beats(whole: tuple[Path, dict[str, Any], list[Event]]) -> None:
    kl = next(column for column in whole[1]["comparison"]["columns"] if column["kind"] == "kl")
    assert kl["front"][0] == "rtn-3b-g16"
    assert kl["front"][-1] == kl["best"] == "rtn-8b-g16"


def _in_calibration(_seen: Sequence[Event], event: Event) -> bool:
    return isinstance(event, Advanced) and event.phase == "sample"


def _in_a_layer(seen: Sequence[Event], event: Event) -> bool:
    return isinstance(event, LayerDone) and "gptq-g16 (2 of 2)" in notes(seen)


def _in_measuring(seen: Sequence[Event], event: Event) -> bool:
    return isinstance(event, Started) and event.unit == "window" and "gptq-g16 (2 of 2)" in notes(seen)


def _run_until(moment: Callable[[Sequence[Event], Event], bool], grid: Path, names: Sequence[str]) -> None:
    """A sweep whose process is killed at a moment."""
    seen: list[Event] = []

    def kill(event: Event) -> None:
        if moment(seen, event):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)

    run(grid, kill, names=names)


@pytest.mark.parametrize("moment", [_in_calibration, _in_a_layer, _in_measuring])
def test_a_killed_sweep_goes_on_to_the_same_results(
    moment: Callable[[Sequence[Event], Event], bool], whole: tuple[Path, dict[str, Any], list[Event]], grid: Path
) -> None:
    names = ["rtn-3b-g16", "gptq-g16"]
    # A new process: in a fork, products wait for threads that it does not have.
    child = get_context("spawn").Process(target=_run_until, args=(moment, grid, names))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    out, events = grid.parent / "out", []
    assert not (out / "comparison.json").exists()
    kept = sha256(out / names[0] / RUN)
    result = run(grid, events.append, names=names)
    assert kept == sha256(out / names[0] / RUN)
    assert sum("is complete already" in text for text in notes(events)) == (2 if moment is _in_measuring else 1)
    for name in names:
        files = [read_json(folder / name / "qexport.json")["files"] for folder in (out, whole[0] / "out")]
        assert files[0] == files[1]
        assert figures(result, name) == figures(whole[1], name)


def test_a_finished_sweep_measures_nothing_again_and_comes_to_the_same_document(
    whole: tuple[Path, dict[str, Any], list[Event]],
) -> None:
    folder, first, _ = whole
    events: list[Event] = []
    assert run(folder / "grid.toml", events.append) == first
    assert sum("is complete already" in text for text in notes(events)) == len(NAMES)
    assert not any(isinstance(event, LayerDone) for event in events)


def test_a_failing_setting_is_told_and_the_others_that_a_pattern_chooses_go_on(grid: Path) -> None:
    taken = grid.parent / "out" / NAMES[1]
    taken.mkdir(parents=True)
    (taken / "diary.txt").write_text("not ours")
    command = ["sweep", str(grid), "--only", "rtn-*"]
    found = RUNNER.invoke(app, [*command, "--json"])
    assert found.exit_code == 1
    result = json.loads(found.stdout)
    assert [row["name"] for row in result["settings"] if row["failed"]] == [NAMES[1]]
    assert result["settings"][1]["failed"].startswith("ResumeError: ")
    assert "diary.txt" in result["settings"][1]["failed"]
    assert [row["name"] for row in result["comparison"]["rows"] if not row["original"]] == [NAMES[0]]
    assert (taken / "diary.txt").read_text() == "not ours"
    page = (grid.parent / "out" / "report.html").read_text()
    assert NAMES[0] in page
    assert NAMES[1] not in page
    (taken / "diary.txt").unlink()
    mended = RUNNER.invoke(app, [*command, "--sort", "size"])
    assert mended.exit_code == 0
    assert sorted(p.name for p in (grid.parent / "out").iterdir()) == [
        "comparison.json", "report.html", "rtn-3b-g16", "rtn-8b-g16"
    ]  # fmt: skip
    assert "no other beats rtn-3b-g16, rtn-8b-g16 in both" in " ".join(mended.stdout.split())
    assert "report.html" in mended.stdout


def test_models_are_loaded_one_at_a_time_and_one_with_the_bytes_of_another_stands_behind_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[tuple[str, Any]] = []

    def spied(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*how: Any, **options: Any) -> Any:
            assert [kind for kind, known in loads if known() is not None and kind == name] == []
            found = load(*how, **options)
            loads.append((name, weakref.ref(found)))
            return found

        return loaded

    monkeypatch.setattr(loading, "_reference_model", spied("original", loading._reference_model))
    monkeypatch.setattr(loading, "_usual_loader", spied("packed", loading._usual_loader))

    def change(text: str) -> str:
        head, _, rest = text.partition("[[setting]]")
        return f"{head}[[setting]]\nmethod = 'rtn'\nbits = 4\nsymmetric = [false]\ngroup_size = [16]\n\n" + (
            "[[setting]]\nmethod = 'rtn'\ngroup_size = 16\n\n[eval]" + rest.partition("[eval]")[2]
        )

    gc.disable()  # what is left to it may stay for long
    try:
        rows = run(written(model, tmp_path, change))["settings"]
    finally:
        gc.enable()
    assert [(row["name"], row["same_as"]) for row in rows] == [
        ("rtn-4b-g16-asym", None),
        ("rtn-g16", "rtn-4b-g16-asym"),
    ]
    assert sorted(kind for kind, _ in loads) == ["original", "packed", "packed"]


def test_a_folder_of_another_plan_is_left_alone_unless_told_to_begin_anew(grid: Path) -> None:
    name = NAMES[0]
    assert run(grid, names=[name])["settings"][0]["failed"] is None
    before = sha256(grid.parent / "out" / name / "qexport.json")
    grid.write_text(grid.read_text().replace("samples = 6", "samples = 6\nembeddings = 8"))
    assert "was started with another plan" in run(grid, names=[name])["settings"][0]["failed"]
    assert sha256(grid.parent / "out" / name / "qexport.json") == before
    anew = run(grid, names=[name], restart=True)
    assert anew["settings"][0]["failed"] is None
    assert read_json(grid.parent / "out" / name / "qexport.json")["embeddings"] == ["model.embed_tokens"]
    assert len(anew["comparison"]["columns"]) == 3


def test_tasks_are_measured_and_one_that_does_not_exist_is_refused(grid: Path) -> None:
    folder = grid.parent
    rows = [{"q": f"{i} and {i}", "choices": ["a", "b"], "gold": i % 2} for i in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "pairs.yaml").write_text(CHOICE.format(name="pairs", file=folder / "rows.jsonl"))
    text = grid.read_text().partition("[eval]")[0]
    grid.write_text(f'{text}[eval]\ntasks = "pairs"\nagainst = false\ninclude_path = "{folder}"\n')
    result = run(grid, names=NAMES[:1], sort="tasks")
    assert [column["kind"] for column in result["comparison"]["columns"]] == ["tasks"]
    grid.write_text(grid.read_text().replace('"pairs"', '"pears"'))
    with pytest.raises(UsageError, match=r"\[eval\]: .*'pears'"):
        run(grid, names=NAMES[:1])


def test_an_output_that_is_a_file_is_refused(grid: Path) -> None:
    (grid.parent / "out").write_text("a file")
    with pytest.raises(UsageError, match="output: .*out is a file"):
        run(grid)


# ---- the command -------------------------------------------------------------------------------


def test_a_dry_run_predicts_and_writes_nothing(grid: Path) -> None:
    found = RUNNER.invoke(app, ["sweep", str(grid), "--dry-run", "--json"])
    assert found.exit_code == 0, found.output
    rows = {row["name"]: row for row in json.loads(found.stdout)["settings"]}
    assert list(rows) == NAMES
    assert rows["rtn-3b-g16"]["bytes"] < rows["gptq-g16"]["bytes"] < rows["rtn-8b-g16"]["bytes"]
    assert not (grid.parent / "out").exists()
    drawn = RUNNER.invoke(app, ["sweep", str(grid), "--dry-run"]).stdout
    assert "gptq+rotation-g16" in drawn
    assert "4 settings" in drawn


def test_only_the_first_setting_is_predicted_to_wait_for_calibration_text(
    grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Plan] = []

    def spied(plan: Plan) -> Prediction:
        asked.append(plan)
        return predict(plan, flops_per_second=1e10)

    monkeypatch.setattr("qexport.sweep.run.predict", spied)
    found = read_grid(grid)
    outlook(found, found.settings, open_source(str(found.model)))
    sources = [None if plan.calibration is None else plan.calibration.source for plan in asked]
    assert sources == [None, None, "self", "builtin"]


def test_a_pattern_that_fits_nothing_names_the_closest(grid: Path) -> None:
    none = RUNNER.invoke(app, ["sweep", str(grid), "--only", "rnt-3b-g16"])
    assert (none.exit_code, "Did you mean 'rtn-3b-g16'" in none.stderr) == (2, True)


def test_the_time_left_follows_from_what_settings_took() -> None:
    clock = Clock({"a": 10.0, "b": 30.0, "c": 1.0})
    assert clock.left(["b"]) is None
    clock.took("c", 0.1, 0.1)
    assert clock.left(["b"]) is None
    clock.took("a", 20.0, 5.0)
    assert clock.left(["b"]) == pytest.approx(65.0)
    assert [spelled(s) for s in (40, 700, 3900)] == ["40 s", "12 min", "1 h 5 min"]


def test_an_outer_phase_stays_while_others_come_and_go_and_says_itself_what_is_left() -> None:
    screen, stream = Screen(), io.StringIO()
    screen.console = Console(file=stream, force_terminal=True, width=160)
    screen._bars.live.console = screen.console
    with screen:
        screen.observe(Started("sweep", 3, "setting", outer=True))
        screen.observe(Advanced("sweep", 1, "about 5 min left"))
        for phase in ("quantize", "evaluate"):
            screen.observe(Started(phase, 2, "layer"))
        stream.seek(0)
        stream.truncate()
        screen._bars.refresh()
        drawn = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in drawn.splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == ["sweep", "evaluate"]
    assert "1/3 setting" in lines[0]
    assert "about 5 min left" in lines[0]
    assert ("-:--:--" in lines[0], "-:--:--" in lines[1]) == (False, True)


# ---- what ships --------------------------------------------------------------------------------


def test_the_documented_example_spans_the_folders_that_the_page_names(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "sweep.md").read_text()
    path = tmp_path / "grid.toml"
    path.write_text(page.partition("```toml\n")[2].partition("```")[0])
    names = page.partition("```text\n")[2].partition("```")[0].split()
    assert [s.name for s in read_grid(path).settings] == names


def test_the_grid_of_the_demo_model_has_twelve_settings_or_more() -> None:
    assert len(read_grid(ROOT / "benchmarks" / "sweeps" / "smollm2.toml").settings) >= 12
