"""Quantized caches on the command line: options, the whole path, and what commands say of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qexport import card, facts, report
from qexport.checkpoint import read_json, write_text
from qexport.cli import app, options
from qexport.errors import UsageError
from qexport.formats.kv.base import PRESETS, kv_json, make_kv
from qexport.recipe import load_recipe, parse_recipe, refuse_idle_patterns, with_kv, with_options
from tests import tiny

FEW = ("--calibration", "builtin", "--samples", "4", "--seqlen", "32")
RTN = ("--method", "rtn", "--group-size", "16")
RECIPE = """
schema = 1
[method]
name = "rtn"
[format]
name = "uniform"
[kv]
name = "kivi-2bit"
residual_window = 64
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def answer(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    answer("quantize", model, *RTN, "-o", tmp_path / "packed")
    return tmp_path / "packed"


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def kv_of(folder: Path) -> Any:
    return read_json(folder / "config.json")["quantization_config"]["kv"]


# ---- names and options -------------------------------------------------------------------------


def test_the_shell_completes_caches() -> None:
    assert options.complete_kv("kivi") == ["kivi-4bit", "kivi-2bit"]
    assert options.complete_kv("") == [*PRESETS, "none"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "model", "--method", "rtn", "--kv", "kivi-3bit"], "there is no cache 'kivi-3bit'"),
        (["quantize", "model", "--method", "rtn", "--kv", "kivi-2bitt"], "Did you mean 'kivi-2bit'?"),
        (["plan", "model", "--method", "rtn", "--kv", "kivi-2bit", "-s", "kv.window=3"], "there are kv.bits, kv.gr"),
        (["plan", "model", "--method", "rtn", "-s", "kv.bits=3"], "--kv NAME quantizes it: kivi-4bit"),
        (["plan", "model", "--method", "rtn", "--kv", "kivi-2bit", "-s", "kv.bits=x"], "expected int, found 'x'"),
        (["plan", "model", "--method", "rtn", "--kv", "kivi-2bit", "-s", "residual_window=0"], "no option 'resi"),
        (["plan", "model", "--method", "rtn", "--kv", "kivi-2bit", "--set", "*:kv.bits=3"], "one for all layers"),
        (["quantize", "model", "--kv", "kivi-2bit", "--bits", "4"], "--bits: --kv without --method"),
        (["quantize", "model", "--kv", "kivi-2bit", "-o", "x"], "-o: --kv without --method"),
        (["quantize", "model", "--kv", "kivi-2bit", "-s", "damp=1"], "-s damp: --kv without --method"),
        (["quantize", "model", "--kv", "kivi-5bit"], "there is no cache 'kivi-5bit'"),
        (["quantize", "model", "--kv", "none", "-s", "kv.bits=3"], "the cache stays as it is"),
        (["quantize", "model", "--kv", "kivi-2bit"], "not a folder that qexport packed"),
        (["quantize", "--kv", "kivi-2bit"], "say which recipe"),
    ],
)  # fmt: skip
def test_usage_errors_say_what_exists(arguments: list[str], message: str, model: Path) -> None:
    result = call(*(str(model) if a == "model" else a for a in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_value_that_a_format_refuses_is_a_usage_error(packed: Path) -> None:
    result = call("quantize", packed, "--kv", "kivi-2bit", "-s", "kv.residual_window=5")
    assert result.exit_code == 2
    assert "0 or a multiple of the group size 32" in result.stderr
    assert kv_of(packed) is None


def test_recipes_name_a_cache_and_options_change_it() -> None:
    recipe = parse_recipe(RECIPE, "mine.toml")
    assert (recipe.kv, recipe.kv_options) == ("kivi-2bit", {"residual_window": 64})
    changed = with_options(recipe, [("kv.residual_window", "32"), ("format.bits", "3")])
    assert changed.kv_options == {"residual_window": 32}
    assert with_kv(recipe, "kivi-4bit").kv_options == {}
    assert with_kv(recipe, "kivi-2bit").kv_options == {"residual_window": 64}
    for text, message in (("name = 3", "needs a name"), ("window = 1\nname = 'kivi-2bit'", "no option 'kv.window'")):
        with pytest.raises(UsageError, match=message):
            parse_recipe(RECIPE.split("[kv]")[0] + "[kv]\n" + text, "mine.toml")
    with pytest.raises(UsageError, match="one for all layers"):
        refuse_idle_patterns(with_options(recipe, []).__class__(**{**vars(recipe), "changes": _change()}), ["a.b"])


def _change() -> Any:
    from qexport.recipe import Change

    return (Change("*", "kv.bits", "3"),)


def test_qrazor_w4a4kv4_is_its_w4a4_with_a_cache() -> None:
    one, other = load_recipe("qrazor-w4a4kv4"), load_recipe("qrazor-w4a4")
    assert (one.kv, other.kv) == ("sdr-4bit", "")
    assert (one.format_options, one.input_options) == (other.format_options, other.input_options)
    assert report.methods()["recipes"]["qrazor-w4a4kv4"]["kv"] == {"name": "sdr-4bit", "group_size": 16}


# ---- the whole path ----------------------------------------------------------------------------


def test_weights_and_cache_in_one_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = answer("quantize", model, *RTN, "--kv", "kvquant-3bit", *FEW, "-s", "kv.sink_tokens=4", "-o", out)
    assert found["kv"]["name"] == "kvquant-3bit"
    assert set(found["kv"]["bits"]) == {"keys", "values"}
    assert found["kv"]["bytes_per_token"] < found["kv"]["fp16_bytes_per_token"]
    assert kv_of(out) == kv_json(make_kv("kvquant-3bit", {"sink_tokens": 4}))  # type: ignore[arg-type]
    assert call("verify", out).exit_code == 0
    assert answer("verify", out)["kv"] == "kvquant-3bit"
    # The command again does nothing; with another cache, or none, it exchanges that and leaves the weights.
    before = weights(out)
    assert answer("quantize", model, *RTN, "-o", out)["kv"]["name"] == "kvquant-3bit"
    assert answer("quantize", model, *RTN, "--kv", "kivi-4bit", "-o", out)["kv"]["name"] == "kivi-4bit"
    assert "kv" not in answer("quantize", model, *RTN, "--kv", "none", "-o", out)
    assert kv_of(out) is None
    assert weights(out) == before
    answer("quantize", model, *RTN, "--kv", "kvquant-2bit", *FEW, "-o", out)
    assert call("quantize", model, *RTN, "--bits", "3", "-o", out, "--restart").exit_code == 0
    assert sorted(p.name for p in out.iterdir() if "cache" in p.name) == []


def test_a_cache_is_added_changed_and_removed_in_place(packed: Path) -> None:
    before = weights(packed)
    for name in ("kivi-2bit", "kvquant-2bit", "sdr-4bit"):
        found = answer("quantize", packed, "--kv", name, *FEW)
        assert (found["out"], found["kv"]["name"]) == (str(packed), name)
        assert (packed / "cache.safetensors").exists() == (name == "kvquant-2bit")
        assert answer("verify", packed)["kv"] == name
    found = answer("quantize", packed, "--kv", "none")
    assert "kv" not in found
    assert set(found) == {"out", "bits_per_weight", "bits_per_parameter", "bytes", "seconds", "peak_rss_bytes"}
    assert kv_of(packed) is None
    assert weights(packed) == before


def test_a_recipe_file_with_a_cache(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    out = tmp_path / "out"
    found = answer("quantize", model, "--recipe", tmp_path / "mine.toml", "-o", out)
    assert found["kv"]["name"] == "kivi-2bit"
    assert kv_of(out)["options"]["residual_window"] == 64


def test_tables_are_drawn(model: Path, packed: Path) -> None:
    done = call("quantize", packed, "--kv", "kvquant-3bit", *FEW)
    assert "cache kvquant-3bit, bytes per token" in done.stdout
    shown = call("inspect", packed).stdout
    assert "cache kvquant-3bit" in shown
    assert "2 layers, calibrated on 4 x 32 tokens, builtin" in shown
    assert "cache kvquant-3bit." in call("verify", packed).stdout
    assert "caches (--kv NAME)" in call("formats").stdout
    planned = call("plan", model, *RTN, "--kv", "kvquant-3bit", *FEW).stdout
    assert "a sequence of 128 tokens" in planned
    assert "time of its calibration" in planned


# ---- what is said of it ------------------------------------------------------------------------


def test_plan_predicts_the_cache(model: Path) -> None:
    found = answer("plan", model, *RTN, "--kv", "kvquant-3bit", *FEW)["kv"]
    assert found["fp16_bytes_per_token"] == 2 * 2 * 2 * 2 * 8  # bytes, keys and values, layers, heads, channels
    assert found["ratio"] == found["bytes_per_token"] / found["fp16_bytes_per_token"]
    assert found["context"]["tokens"] == 128
    assert found["context"]["bytes"] < found["context"]["fp16_bytes"] == 128 * found["fp16_bytes_per_token"]
    assert found["calibration"]["seconds"] > 0
    assert found["calibration"]["peak_rss_bytes"] > 0
    other = answer("plan", model, *RTN, "--kv", "kivi-2bit", "-s", "kv.residual_window=0")["kv"]
    assert other["calibration"] is None
    assert other["options"]["residual_window"] == 0
    assert answer("plan", model, *RTN)["kv"] is None


def test_plan_predicts_what_a_cache_takes(model: Path, packed: Path) -> None:
    import torch

    import qexport

    planned = answer("plan", model, *RTN, "--kv", "kivi-2bit", "-s", "kv.residual_window=0")["kv"]
    answer("quantize", packed, "--kv", "kivi-2bit", "-s", "kv.residual_window=0")
    loaded: Any = qexport.load(packed, dtype="float16")
    cache = qexport.kv_cache(loaded)
    loaded(torch.arange(2, 130)[None], past_key_values=cache)
    assert cache.nbytes == planned["context"]["bytes"]


def test_inspect_and_formats_state_the_cache(packed: Path) -> None:
    assert answer("inspect", packed)["kv"] is None
    answer("quantize", packed, "--kv", "kvquant-3bit", *FEW)
    found = answer("inspect", packed)["kv"]
    assert (found["name"], found["format"], found["layers"], found["calibrated"]) == (
        "kvquant-3bit",
        "nuq",
        [0, 1],
        True,
    )
    assert found["options"]["bits"] == 3
    assert found["calibration"]["source"] == "builtin"
    assert found["bytes_per_token"] < found["fp16_bytes_per_token"]
    listed = answer("formats")["caches"]
    assert set(listed) == set(PRESETS)
    assert listed["kvquant-3bit"]["calibrated"]
    assert 2 < listed["kivi-2bit"]["bits"]["keys"] < 4


def test_inspect_refuses_figures_that_are_none(packed: Path) -> None:
    answer("quantize", packed, "--kv", "kivi-2bit")
    data = read_json(packed / "qexport.json")
    data["kv"]["bits"] = "many"
    write_text(packed / "qexport.json", json.dumps(data))
    result = call("inspect", packed)
    assert result.exit_code == 1
    assert "kv needs a name, bits" in result.stderr


def test_the_model_card_says_it_and_is_renewed_unless_somebody_edited_it(packed: Path) -> None:
    text = card.render(facts.card_facts(packed, "you/tiny"))
    assert "past_key_values" not in text
    write_text(packed / "README.md", text)
    answer("quantize", packed, "--kv", "kvquant-3bit", *FEW)
    text = (packed / "README.md").read_text()
    assert card.is_generated(text)
    for wanted in (
        "| cache | `kvquant-3bit` (bits 3",
        "of float16",
        "| calibration of the cache | builtin, 4 x 32 tokens",
    ):
        assert wanted in text
    assert 'AutoModelForCausalLM.from_pretrained("you/tiny")' in text
    assert "model.generate(ids, max_new_tokens=100)" in text
    write_text(packed / "README.md", text + "\nmine\n")
    answer("quantize", packed, "--kv", "none")
    assert (packed / "README.md").read_text().endswith("\nmine\n")


def test_an_export_says_nothing_of_a_cache(packed: Path) -> None:
    answer("quantize", packed, "--kv", "kivi-2bit")
    own = facts.card_facts(packed, "you/tiny")
    assert "| cache |" in card.render(own)
    assert "| cache |" not in card.render_export(own, "somebody", "so", None)
