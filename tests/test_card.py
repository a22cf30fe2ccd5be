"""The model card states facts, and knows whether anyone has edited it."""

from typing import Any

import pytest
import yaml

from qexport.card import Facts, is_generated, render

BASE: dict[str, Any] = {
    "name": "me/tiny-spqr",
    "base": "someone/tiny",
    "base_on_hub": True,
    "commit": "0123456789abcdef",
    "recipe": "spqr",
    "methods": ["`spqr` (damp 0.01)"],
    "formats": ["`spqr` (bits 3)"],
    "tags": ["qexport", "3-bit"],
    "bits_per_weight": 4.2941,
    "bits_per_parameter": 7.5,
    "nbytes": 12345678,
    "modules": 14,
}


def line(**changes: Any) -> dict[str, Any]:
    entry = {"value": 28.6284, "tokens": 8188, "losses": [3.3] * 4, "seqlen": 2048, "stride": 2048, "bos": False}
    fidelity = {
        "kl": {"mean": 0.12344, "se": 0.002, "median": 0.1, "p99": 1.0, "max": 2.0},
        "top1": {"value": 0.81, "se": 0.004},
        "ln_ppl_ratio": {"value": 0.17, "se": None},
        "tokens": 8188,
    }
    out = {
        "time": "2026-01-02T03:04:05+00:00",
        "protocol": {"dtype": "float32", "device": "cpu", "against": "someone/tiny", "limit": 10, "bos": "auto"},
        "result": {
            "perplexity": {"wiki.txt": entry},
            "fidelity": fidelity,
            "tasks": {"quiz": {"acc": 0.5, "acc_stderr": 0.1}},
        },
    }
    return {**out, **changes}


def test_header_is_yaml_with_the_quantized_relation() -> None:
    header = yaml.safe_load(render(Facts(**BASE)).split("---\n")[1])
    assert header["base_model"] == "someone/tiny"
    assert header["base_model_relation"] == "quantized"
    assert header["library_name"] == "transformers"
    assert header["tags"] == ["qexport", "3-bit"]


def test_local_base_is_named_but_not_linked() -> None:
    text = render(Facts(**{**BASE, "base": "odd: name", "base_on_hub": False}))
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert "`odd: name`" in text
    assert "huggingface.co" not in text


def test_body_states_bits_method_format_and_how_to_load() -> None:
    text = render(Facts(**BASE))
    for wanted in (
        "4.294",
        "12,345,678 bytes",
        "`spqr` (damp 0.01)",
        "`spqr` (bits 3)",
        "import qexport",
        '"me/tiny-spqr"',
    ):
        assert wanted in text
    assert "at `0123456789ab`" in text
    assert "never run on a GPU" in text
    assert "Nothing yet" in text


def test_rounded_inputs_have_a_row_and_floats_none() -> None:
    assert "inputs" not in render(Facts(**BASE))
    text = render(Facts(**{**BASE, "inputs": ["int8, a scale for each token"]}))
    assert "| inputs | multiplied as integers: int8, a scale for each token |" in text


def test_results_stand_with_errors_and_protocol() -> None:
    text = render(Facts(**BASE, results=[line()]))
    row = next(r for r in text.splitlines() if r.startswith("| wiki.txt"))
    for wanted in (
        "28.628",
        "0.1234 ± 0.0020",
        "0.8100 ± 0.0040",
        "0.1700 |",
        "4 windows of 2048, stride 2048",
        "no BOS",
    ):
        assert wanted in row
    assert "float32 on cpu, original someone/tiny, 2026-01-02" in row
    assert "| quiz | acc | 0.5000 ± 0.1000 | first 10 |" in text


def test_newest_result_of_a_protocol_counts() -> None:
    again = line()
    again["result"]["perplexity"]["wiki.txt"]["value"] = 27.5
    other = line()
    other["result"]["perplexity"]["wiki.txt"].update(seqlen=512, value=40.25)
    rows = [r for r in render(Facts(**BASE, results=[line(), other, again])).splitlines() if r.startswith("| wiki.txt")]
    assert len(rows) == 2
    assert "27.500" in rows[0]
    assert "40.250" in rows[1]


def test_fidelity_over_several_texts_has_its_own_row() -> None:
    several = line()
    entry = several["result"]["perplexity"]["wiki.txt"]
    several["result"]["perplexity"]["c4"] = {**entry, "value": 30.5}
    rows = [
        r for r in render(Facts(**BASE, results=[several])).splitlines() if r.startswith("| ") and " windows of " in r
    ]
    assert ["0.1234" in row for row in rows] == [False, True, False] or ["0.1234" in row for row in rows].count(
        True
    ) == 1
    assert any(row.startswith("| wiki.txt + c4 |  |") for row in rows)


def test_a_run_on_a_gpu_is_not_denied() -> None:
    on_gpu = line(protocol={"dtype": "float16", "device": "Some GPU"})
    text = render(Facts(**BASE, results=[on_gpu]))
    assert "Some GPU" in text
    assert "never run on a GPU" not in text


def test_incomplete_results_do_not_break_a_card() -> None:
    render(Facts(**BASE, results=[{"result": {}}, {"result": {"tasks": {"quiz": {"acc": None}}}}]))


def test_pipes_and_newlines_do_not_break_tables() -> None:
    text = render(Facts(**{**BASE, "recipe": "a|b\nc"}))
    assert "| recipe | `a\\|b c` |" in text


def test_card_is_deterministic_and_knows_its_edits() -> None:
    text = render(Facts(**BASE))
    assert text == render(Facts(**BASE))
    assert is_generated(text)
    assert is_generated(text.replace("\n", "\r\n"))
    assert is_generated(text + "\n")
    for edited in (text.replace("4.294", "3.0"), text + "more\n", text.replace("sha256:", "sha256:0"), "# mine\n", ""):
        assert not is_generated(edited)


@pytest.mark.parametrize("tag", ['with "quotes"', "no", "1.5", "ü: x"])
def test_tags_stay_strings(tag: str) -> None:
    assert yaml.safe_load(render(Facts(**{**BASE, "tags": [tag]})).split("---\n")[1])["tags"] == [tag]
