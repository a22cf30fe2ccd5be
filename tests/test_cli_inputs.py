"""Rounding of inputs on the command line: what is chosen, what is written, and what is a mistake."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qexport.cli import app
from qexport.cli.request import recipe_of
from tests import tiny
from tests.test_cli import _request, call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "model", "--method", "rtn", "--input", "tokn"],
         "there is no input 'tokn'; there are outliers, sdr, tensor, token. Did you mean 'token'?"),
        (["quantize", "model", "--method", "smoothquant-w8a8", "--input", ""], "there is no input ''; there are outl"),
        (["quantize", "model", "--method", "rtn", "--input", "token", "-s", "bits=8"],
         "option 'bits' belongs to format and input; write format.bits or input.bits"),
        (["quantize", "model", "--method", "rtn", "-s", "input.bits=8"], "--input NAME rounds them: outliers, sdr,"),
        (["plan", "model", "--method", "rtn", "--input", "token", "-s", "input.bits=x"], "expected int, found 'x'"),
        (["plan", "model", "--method", "rtn", "--input", "token", "-s", "static=true"], "no option 'static'"),
    ],
)  # fmt: skip
def test_usage_errors_end_with_2_and_say_what_exists(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_rounding_of_inputs_is_chosen_changed_and_left_out() -> None:
    found = recipe_of(_request(method="rtn", input="token", bits=3, settings=("input.bits=6", "format.symmetric=true")))
    assert (found.input, dict(found.input_options)) == ("token", {"bits": 6})
    assert dict(found.format_options)["bits"] == 3
    kept = recipe_of(_request(method="smoothquant-w6a6", settings=("decode_input=float",)))
    assert (kept.input, dict(kept.input_options)) == ("token", {"bits": 6, "decode_input": "float"})
    other = recipe_of(_request(method="smoothquant-w6a6", input="sdr"))
    assert (other.input, dict(other.input_options)) == ("sdr", {})
    assert recipe_of(_request(method="smoothquant-w6a6", input="none")).input == ""


def test_inputs_are_rounded_as_asked_for(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    options = ("--method", "rtn", "--group-size", "16", "--input", "token", "-s", "input.bits=8")
    changes = ("--set", "*.down_proj:input=none", "--set", "*.o_proj:input.bits=5", "--ignore", "*.k_proj")
    done = call("quantize", model, *options, *changes, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert call("verify", tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    plain = {"name": "token", "symmetric": True, "decode_input": "integer"}
    assert [spec["input"] for spec in config["specs"]] == [
        {"quant": {**plain, "bits": 8}}, {"quant": {**plain, "bits": 5}}, {}
    ]  # fmt: skip
    found = json.loads(call("inspect", tmp_path / "out", "--device", "cpu", "--json").stdout)
    assert {p["path"] for p in found["paths"]} <= {"cpu", "reference"}
    assert any("integers" in p["reason"] for p in found["paths"])
    assert call("inspect", tmp_path / "out").exit_code == 0
    assert call("push", tmp_path / "out", "someone/tiny", "--dry-run").exit_code == 0
