"""`qexport bench` through its entry point: both modes, what they print, and what is a mistake."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qexport.cli import app, options
from qexport.evaluate import kernel, latency
from tests import finished, tiny
from tests.test_cli import call


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "_TRYING", 0.01)
    monkeypatch.setattr(kernel, "_MOST", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to time: DIR, a folder of `qexport quantize`, or --shape NxK, one of them"),
        (["model", "--shape", "8x8"], "one of them"),
        (["--shape", "8"], "--shape '8': expected NxK"),
        (["--shape", "8x8x8"], "expected NxK"),
        (["--shape", "0x8"], "expected NxK"),
        (["--shape", "8x8", "--format", "unifrm"], "Did you mean 'uniform'?"),
        (["--shape", "8x8", "--bits", "9"], "bits must be a whole number from 2 to 8"),
        (["--shape", "8x8", "--format", "fp_asym", "--bits", "4"], "no option 'bits'; it has code"),
        (["--shape", "8x8", "-s", "group=4"], "no option 'group'; it has bits"),
        (["--shape", "8x8", "-s", "group_size=x"], "option 'group_size': expected int"),
        (["--shape", "8x8", "-s", "group_size"], "expected KEY=VALUE"),
        (["--shape", "8x8", "--dtype", "int8"], "--dtype 'int8': expected float32"),
        (["--shape", "8x8", "-m", "0"], "'-m'"),
        (["--shape", "8x8", "--threads", "0"], "'--threads'"),
        (["--shape", "8x8", "--kv", "kivi-2bit"], "--kv goes with DIR"),
        (["--shape", "8x8", "--tokens", "3"], "--tokens goes with DIR"),
        (["--shape", "8x8", "-o", "x.png"], "-o goes with DIR"),
        (["model", "--format", "bcq"], "--format goes with --shape"),
        (["model", "-m", "4"], "-m goes with --shape"),
        (["model", "-s", "bits=4"], "expected an option of the cache, kv.bits"),
        (["model", "--prompt", "0"], "'--prompt'"),
        (["model", "--device", "cuda:99"], "--device cuda:99: this torch sees"),
        ([""], "folder's name is empty"),
    ],
)
def test_usage_errors_end_with_2_and_say_what_exists(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_stated_errors_end_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ((tiny.save("llama", tmp_path / "dense"),), "CheckpointError: "),
        ((tmp_path / "nowhere",), "CheckpointError: "),
        (("--shape", "8x8", "--backend", "fast"), "BackendError: there is no backend 'fast'"),
    ):
        result = call("bench", *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(message)
    monkeypatch.setattr(kernel, "error_of", lambda *_: 0.5)
    result = call("bench", "--device", "cpu", "--shape", "8x8", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error 5.0e-01, allowed 1e-05" in result.stderr


def test_one_linear_is_a_document_or_a_table() -> None:
    arguments = (
        "bench",
        "--device",
        "cpu",
        "--shape",
        "48x64",
        "--format",
        "bcq",
        "--bits",
        "3",
        "-m",
        "2",
        "--threads",
        "1",
    )
    found = json.loads(call(*arguments, "-s", "group_size=16", "--json").stdout)
    assert (found["format"], found["n"], found["k"], found["m"], found["threads"]) == ("bcq", 48, 64, 2, 1)
    assert (found["options"]["bits"], found["options"]["group_size"]) == (3, 16)
    assert set(found["dense_us"]) == {"fp32", "bf16", "fp16"}
    assert {"packed_us", "bytes", "bandwidth_fraction", "path", "error", "ratio"} <= set(found)
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    for word in ("bcq (bits=3, ", "48 x 64, m = 2", "packed", "fp16", "of what the machine reads", "threads 1"):
        assert word in result.stdout


def test_a_checkpoint_is_a_document_or_tables(folder: Path, tmp_path: Path) -> None:
    arguments = ("bench", folder, "--device", "cpu", "--prompt", "40", "--tokens", "2", "--threads", "1")
    done = call(*arguments, "--eager", "-o", tmp_path / "roof.png", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["dense"]) == {"fp32", "bf16", "fp16"}
    assert 0 <= found["packed"]["outside_share"] <= 1
    assert (tmp_path / "roof.png").exists()
    result = call(*arguments, "--kv", "kivi-2bit", "-s", "kv.residual_window=0")
    assert result.exit_code == 0, result.stderr
    for word in ("tokens/s", "outside block linears", "model.layers.*.mlp.up_proj", "uniform 4", "spqr 3", "float32",
                 "loop: eager", "through the cache kivi-2bit", "peak memory"):  # fmt: skip
        assert word in result.stdout, word


def test_it_stands_behind_eval_and_completes() -> None:
    commands = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert commands[commands.index("eval") + 1] == "bench"
    assert options.complete_format("bc") == ["bcq"]
    parameters = {p.name: p for p in typer.main.get_command(app).commands["bench"].params}  # type: ignore[attr-defined]
    for name in ("format_name", "kv", "backend"):
        assert parameters[name]._custom_shell_complete is not None
