"""The command line through its entry point: what it prints where, and how it ends."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import qexport.verify
from qexport import events, plugins, report
from qexport.cli import app, options, tables
from qexport.cli.request import _notes, default_folder, recipe_of
from qexport.cli.screen import Screen
from qexport.errors import BackendError, UsageError
from qexport.runtime.dispatch import choose

COMMANDS = (
    "quantize", "plan", "eval", "bench", "compare", "report", "chat", "inspect", "verify", "push", "methods", "formats"
)  # fmt: skip


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qexport", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


# ---- the program -------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom qexport.cli import main\n"
        "sys.argv = ['qexport', *{0!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {{'torch', 'transformers', 'numpy', 'triton', 'datasets', 'huggingface_hub'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["quantize", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_module_and_entry_point_are_one_program() -> None:
    import importlib.metadata

    from qexport.cli import main

    done = process("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "qexport")
    found = {e.name: e for e in importlib.metadata.entry_points(group="console_scripts")}
    assert "qexport" not in found or found["qexport"].load() is main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_json_and_debug(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


def test_shell_completes_recipes_formats_and_calibration_sources() -> None:
    assert options.complete_recipe("g") == ["gptq", "gptq-rotation"]
    assert options.complete_format("") == list(plugins.names("formats"))
    assert options.complete_calibration("s") == ["self"]
    assert options.complete_tasks("cs") == ["csqa"]
    assert options.complete_sort("t") == ["top1", "tasks"]
    assert options.complete_input("") == ["none", *plugins.names("inputs")]
    words = {"_QEXPORT_COMPLETE": "complete_bash", "COMP_WORDS": "qexport quantize --method s", "COMP_CWORD": "3"}
    code = "import sys; sys.argv = ['qexport']; from qexport.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **words}, check=False
    )
    assert done.stdout.split() == ["smoothquant-w6a6", "smoothquant-w8a8", "spqr"]


# ---- how it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command"),
        (["quantize", "--nope"], "No such option"),
        (["quantize", "model"], "say which recipe"),
        (["quantize", "model", "--method", "gptq", "--recipe", "x.toml"], "one of them"),
        (["quantize", "model", "--method", "gptk"], "Did you mean 'gptq'?"),
        (["quantize", "model", "--method", "gptq", "--format", "unifrm"], "Did you mean 'uniform'?"),
        (["quantize", "", "--method", "gptq"], "name is empty"),
        (["verify", ""], "folder's name is empty"),
        (["inspect", " "], "folder's name is empty"),
        (["eval", ".", "--tasks", ","], "--tasks, which needs at least one name"),
        (["eval", ".", "--limit", "3"], "--tasks, which needs at least one name"),
        (["eval", ".", "--fewshot", "3"], "--tasks, which needs at least one name"),
        (["compare", ""], "name is empty"),
        (["eval", ".", "--device", "cuda:99"], "--device cuda:99: this torch sees"),
        (["eval", ".", "--cache-gb", "-1"], "--cache-gb"),
        (["quantize", "--method", "gptq", "--device", "nonsense"], "--device 'nonsense': expected auto, cpu"),
        (["plan", "--method", "gptq", "--device", "meta"], "--device meta: nothing can be computed"),
        (["quantize", "--method", "gptq", "-o", ""], "-o: expected the name of a folder"),
        (["quantize", "--method", ""], "say which recipe"),
        (["plan", "--method", "rtn", "--group-size", "9999999999999999999999"], "2147483647"),
        (["plan", "--method", "rtn", "--seed", "-1"], "--seed"),
        (["quantize", "model", "--method", "gptq", "-s", "damb=1"], "no option 'damb'"),
        (["quantize", "model", "--method", "gptq", "-s", "damp"], "expected KEY=VALUE"),
        (["quantize", "model", "--method", "gptq", "-s", "damp=x"], "expected float"),
        (["quantize", "model", "--method", "gptq", "--format", "dense", "--bits", "4"], "no option"),
        (["quantize", "model", "--method", "gptq", "--set", "bits=4"], "PATTERN:KEY=VALUE"),
        (["quantize", "model", "--method", "gptq", "--dtype", "int8"], "expected float32"),
        (["quantize", "model", "--recipe", "no.json"], "expected a .toml file"),
        (["quantize", "model", "--recipe", "no.toml"], "can't be read"),
        (["quantize", "model", "--method", "gptq", "--samples", "0"], "--samples"),
        (["eval", ""], "name is empty"),
    ],
)  # fmt: skip
def test_usage_errors_end_with_2_and_say_what_exists(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_stated_error_is_one_line_on_stderr_and_ends_with_1(tmp_path: Path) -> None:
    result = call("verify", tmp_path / "nowhere", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("CheckpointError: ")
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = call("verify", tmp_path / "nowhere", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_unexpected_error_is_one_line_with_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(qexport.verify, "verify", broken)
    result = call("verify", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "ZeroDivisionError: first line second line (unexpected; --debug shows where)\n"


def test_interrupt_says_that_the_job_can_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qexport.verify, "verify", interrupted)
    result = call("verify", tmp_path)
    assert (result.exit_code, result.stderr.split(":")[0]) == (1, "Interrupted")


def test_json_is_alone_on_stdout_and_has_no_nan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def chatty(*_: Any, observer: Any, **__: Any) -> dict[str, Any]:
        print("a library prints")
        observer(events.Note("a decision"))
        observer(events.Started("work", 2, "step"))
        return {"a": float("nan"), "b": [1.5, float("inf")], "c": (1, 2)}

    monkeypatch.setattr(qexport.verify, "verify", chatty)
    result = call("verify", tmp_path, "--json")
    assert json.loads(result.stdout) == {"a": None, "b": [1.5, None], "c": [1, 2]}
    assert result.stderr == "a library prints\na decision\n"


# ---- events ------------------------------------------------------------------------------------


def test_without_a_terminal_only_notes_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen:
        screen.observe(events.Started("quantize", 2, "layer"))
        screen.observe(events.LayerDone(0, 2, "model.layers.0", 0.01, 1.0))
        screen.observe(events.Advanced("quantize", 2, "x"))
        screen.observe(events.Note("rows were dropped", "warning"))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: rows were dropped\n")


def test_on_a_terminal_progress_shows_layer_error_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    screen = Screen()
    stream = io.StringIO()
    screen.console = Console(file=stream, force_terminal=True, width=160)
    screen._bars.live.console = screen.console
    with screen:
        screen.observe(events.Started("quantize", 2, "layer"))
        screen.observe(events.LayerDone(0, 2, "model.layers.0", 0.0123, 1.0))
        screen._bars.refresh()
    assert "1/2 layer" in stream.getvalue().replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert "model.layers.0 error 0.0123" in stream.getvalue()


# ---- methods and formats -----------------------------------------------------------------------


def test_tables_agree_with_what_methods_refuse() -> None:
    found = json.loads(call("methods", "--json").stdout)["methods"]
    for name in plugins.names("methods"):
        for fmt, cell in found[name]["formats"].items():
            reason = plugins.get("methods", name)().reject(plugins.get("formats", fmt)())
            assert cell == f"refused: {reason}" if reason else cell in ("validated", "runs")
    turned = json.loads(call("formats", "--json").stdout)["formats"]
    assert {(m, f): c for f, entry in turned.items() for m, c in entry["methods"].items()} == {
        (m, f): c for m, entry in found.items() for f, c in entry["formats"].items()
    }


def test_validated_pairs_have_their_evidence() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    for pair in report.validated():
        lines = [json.loads(line) for line in (results / pair["evidence"]).read_text().splitlines()]
        wanted = (pair["method"], pair["format"], [pair["transform"]] if "transform" in pair else [])
        found = [
            (line.get("method"), line.get("format"), [t["name"] for t in line.get("transforms", ())]) for line in lines
        ]
        assert wanted in found, pair


def test_tables_print_every_recipe_method_and_format() -> None:
    for command in ("methods", "formats"):
        result = call(command)
        assert result.exit_code == 0
        for name in [*plugins.names("methods"), *plugins.names("formats")]:
            assert name in result.stdout


def test_every_recipe_states_what_it_is_for_and_where_it_comes_from() -> None:
    for name, found in report.methods()["recipes"].items():
        assert found["summary"], name
        assert "arXiv" in found["source"], name
        assert "refused" not in report.methods()["methods"][found["method"]]["formats"][found["format"]]


# ---- options become a recipe -------------------------------------------------------------------


def _request(**changes: Any) -> Any:
    from qexport.cli.request import Request

    plain = dict.fromkeys(Request.__dataclass_fields__)
    plain |= {"method": "gptq", "ignore": (), "overrides": (), "settings": (), "transforms": ()}
    return Request(**{**plain, **changes})


def test_short_options_settings_patterns_and_ignores_reach_the_recipe() -> None:
    found = recipe_of(
        _request(
            bits=3, group_size=-1, symmetric=True, lm_head=6, embeddings=8, ignore=("*.q_proj",),
            settings=("damp=0.02", "scale_dtype=bfloat16"), overrides=("*.down_proj:bits=8",),
        )
    )  # fmt: skip
    assert dict(found.format_options) == {"bits": 3, "group_size": -1, "symmetric": True, "scale_dtype": "bfloat16"}
    assert found.method_options["damp"] == 0.02
    assert (found.lm_head, found.embeddings) == (6, 8)
    assert found.ignore == ("*.q_proj",)
    assert [(c.pattern, c.key, c.value) for c in found.changes] == [("*.down_proj", "bits", "8")]


def test_method_and_format_can_be_mixed() -> None:
    found = recipe_of(_request(format="spqr"))
    assert (found.method, found.format, found.format_options["bits"]) == ("gptq", "spqr", 4)


def test_recipe_file_is_read(tmp_path: Path) -> None:
    text = (Path(qexport.verify.__file__).parent / "recipes" / "spqr.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('name = "spqr"\nsummary', 'name = "mine"\nsummary'))
    assert recipe_of(_request(method=None, recipe=tmp_path / "mine.toml")).name == "mine"
    (tmp_path / "mine.toml").write_text(text + "\ncolour = 3\n")
    with pytest.raises(UsageError, match="colour"):
        recipe_of(_request(method=None, recipe=tmp_path / "mine.toml"))


# ---- the whole path, on a tiny model -----------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import save

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    save("llama", folder)
    return folder


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    out = tiny.parent / "packed"
    result = call("quantize", tiny, "--method", "rtn", "--group-size", "16", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) == {"out", "bits_per_weight", "bits_per_parameter", "bytes", "seconds", "peak_rss_bytes"}
    assert "recipe rtn" in result.stderr  # the plan comes first
    return out


def test_plan_predicts_what_quantize_stores(tiny: Path, packed: Path) -> None:
    found = json.loads(call("plan", tiny, "--method", "rtn", "--group-size", "16", "--json").stdout)
    assert {"bits_per_weight", "bytes", "peak_rss_bytes", "seconds", "modules"} <= set(found)
    stored = json.loads((packed / "qexport.json").read_text())["modules"]
    assert {name: m["bytes"] for name, m in found["modules"].items()} == {
        name: m["nbytes"] for name, m in stored.items()
    }


def test_plan_names_what_its_choices_cost(tiny: Path) -> None:
    arguments = ("--method", "spqr", "--samples", "2", "--seqlen", "16", "--json")
    notes = json.loads(call("plan", tiny, *arguments).stdout)["notes"]
    assert "14 linears store their columns in another order" in notes[0]
    assert "all of it is in memory" in notes[1]
    quiet = json.loads(call("plan", tiny, *arguments, "--calibration", "builtin", "-s", "order=group").stdout)
    assert quiet["notes"] == []


def test_calibrated_job_can_be_repeated_and_refuses_other_options(tiny: Path) -> None:
    text = tiny.parent / "calibration.txt"
    text.write_text("Words to be read by a model that was never trained. " * 40)
    out = tiny.parent / "gptq"
    job = ("quantize", tiny, "--method", "gptq", "--samples", "4", "--seqlen", "16", "-o", out, "--json")
    first = call(*job, "--calibration", text)
    assert first.exit_code == 0, first.stderr
    again = call(*job, "--calibration", text)
    assert json.loads(again.stdout)["bits_per_weight"] == json.loads(first.stdout)["bits_per_weight"]
    other = call(*job, "--calibration", text, "--seed", "1")
    assert (other.exit_code, other.stdout) == (1, "")
    assert other.stderr.splitlines()[-1].startswith("ResumeError: ")
    assert call("verify", out).exit_code == 0


def test_tables_are_drawn_for_every_command(tiny: Path, packed: Path) -> None:
    text = packed.parent / "text.txt"
    text.write_text("A tiny text about nothing in particular. " * 20)
    sizes = ("bits per weight, quantized modules", "bits per parameter, whole model", "size of the files")
    for arguments, words in [
        (("plan", tiny, "--method", "rtn"), ("predicted", "q_proj", *sizes)),
        (("inspect", packed), ("recipe", "rtn", "uniform", "q_proj", *sizes)),
        (("verify", packed), ("in order",)),
        (("eval", packed, "--text", text, "--seqlen", "32", "--windows", "2", "--against", tiny),
         (*sizes, "perplexity, text.txt", "of the original", "KL(original || quantized)", "top-1")),
        (("push", packed, "someone/tiny", "--dry-run"), ("would be sent", "model card", "config.json")),
    ]:  # fmt: skip
        result = call(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)
        for word in words:
            assert word in result.stdout, (arguments, word)


def test_inspect_json_says_which_path_runs_and_why(packed: Path) -> None:
    from tests.packing import UNIFORM

    found = json.loads(call("inspect", packed, "--device", "cpu", "--json").stdout)
    assert {p["path"] for p in found["paths"]} == {choose(UNIFORM, 64, 64, "cpu").path}  # as the processor can
    assert all(p["reason"] for p in found["paths"])
    assert sum(p["modules"] for p in found["paths"]) == sum(kind["modules"] for kind in found["kinds"].values()) == 14
    assert found["bits_per_weight"] == pytest.approx(
        sum(s["bytes"] for s in found["specs"]) * 8 / sum(s["weights"] for s in found["specs"])
    )


def test_damaged_checkpoint_is_named_by_verify_with_code_1(packed: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(packed, tmp_path / "copy")
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = call("verify", copy)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"CheckpointError: {shard.name}: expected sha256")
    assert call("push", copy, "someone/tiny", "--dry-run").exit_code == 1


def test_model_that_does_not_exist_is_a_stated_error(tmp_path: Path) -> None:
    result = call("plan", tmp_path / "nowhere.gguf", "--method", "rtn")
    assert result.exit_code == 1
    assert result.stderr.startswith("SourceError: ")


def test_default_folder_names_model_recipe_and_bits(tiny: Path) -> None:
    from qexport.calibration import Calibration
    from qexport.models import anatomy, open_source
    from qexport.plan import make_plan

    source = open_source(str(tiny))
    plan = make_plan(source, anatomy(source), recipe_of(_request(bits=3)), calibration=Calibration("builtin", 4, 32))
    assert default_folder(plan) == Path("llama-gptq-3b")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_memory_for_decoded_layers_is_a_number_of_bytes(value: float) -> None:
    from qexport.integrations.transformers import QExportConfig

    with pytest.raises(BackendError, match="cache_gb: expected 0 or more"):
        QExportConfig(cache_gb=value)


def test_a_result_that_can_not_be_drawn_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "methods", lambda _result: [1 / 0])
    found = call("methods")
    assert found.exit_code == 1
    assert found.stderr.startswith("ZeroDivisionError: ")
    assert "Traceback" not in found.stderr


def test_matrices_that_stay_dense_unasked_are_named_with_their_share(tiny: Path) -> None:
    from qexport.calibration import Calibration
    from qexport.models import anatomy, open_source
    from qexport.plan import make_plan

    source = open_source(str(tiny))
    found = replace(anatomy(source), unseen=("model.embed_tokens.weight",))
    plan = make_plan(source, found, recipe_of(_request(method="rtn")), calibration=Calibration("builtin", 4, 32))
    note = r"^1 matrices of the layers .* \d+\.\d% of .*: model.embed_tokens.weight\.$"
    assert any(re.search(note, text) for text in _notes(plan))


def test_long_times_and_sizes_are_readable() -> None:
    assert [tables._time(s) for s in (3.4, 75, 7300)] == ["3 s", "1 min 15 s", "2 h 1 min"]
    assert [tables._bytes(b) for b in (12, 3400, 5e6, 2.5e9, 2.5e12)] == [
        "12 B",
        "3.4 kB",
        "5.0 MB",
        "2.50 GB",
        "2500.00 GB",
    ]


# ---- where results can't be written, and what can't be drawn -----------------------------------


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("> /dev/full", 1, "OutputError: the work is done, but its result can't be written to standard output ("),
        ("--json > /dev/full", 1, "OutputError: the work is done, but its result can't be written to standard output"),
        (">&-", 2, "UsageError: standard output is closed"),
    ],
)
def test_an_output_that_cannot_be_written_to_is_one_line(how: str, code: int, message: str) -> None:
    line = f"{sys.executable} -m qexport methods {how}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("qexport.json", {"plan": {"model": None}}, None),
        ("qexport.json", {"writer": None, "dense": None, "towers": None}, None),
        ("qexport.json", {"plan": 3}, "expected dict under 'plan', found int"),
        ("qexport.json", {"plan": {"model": {}}}, "expected str under 'model', found dict"),
        ("qexport.json", {"dense": 3}, "expected list under 'dense', found int"),
        ("run.json", {"seconds": {}}, "run.json: expected int or float under 'seconds', found dict"),
    ],
)
def test_inspect_states_what_a_record_has_wrong(
    file: str, changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    from tests import finished

    folder = finished.write(tmp_path / "m")
    for name, own in {"qexport.json": {}, file: changes}.items():
        data = json.loads((folder / name).read_text())
        for facts in data.get("modules", {}).values():
            facts.setdefault("nbytes", 1)
        (folder / name).write_text(json.dumps(data | own))
    result = call("inspect", folder)
    assert result.exit_code == (0 if message is None else 1), result.stderr
    assert (message or "") in result.stderr
    assert "unexpected" not in result.stderr
