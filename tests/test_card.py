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


def protocol(**changes: Any) -> dict[str, Any]:
    own = {"text": "0" * 64, "ids": "1" * 64, "windows": 4, "seqlen": 2048, "stride": 2048, "bos": False}
    return {**own, "dtype": "float32", **changes}


def line(what: str, name: str, figure: float, details: dict[str, Any], **changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "what": what, "name": name, "figure": figure, "se": None, "protocol": protocol(), "details": details,
        "setting": {"device": "cpu", "kv": None}, "time": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return {**own, **changes}


def perplexity(value: float = 28.6284, name: str = "wiki.txt", **changes: Any) -> dict[str, Any]:
    return line("perplexity", name, value, {"tokens": 8188}, **changes)


def fidelity(name: str = "wiki.txt", **changes: Any) -> dict[str, Any]:
    details = {
        "kl": {"mean": 0.12344, "se": 0.002, "median": 0.1, "p99": 1.0, "max": 2.0},
        "top1": {"value": 0.81, "se": 0.004},
        "ln_ppl_ratio": {"value": 0.17, "se": None},
        "tokens": 8188, "against": "someone/tiny",
    }  # fmt: skip
    return line("fidelity", name, 0.12344, details, **{"protocol": protocol(against="2" * 64), **changes})


def task() -> dict[str, Any]:
    details = {"metrics": {"quiz": {"acc": 0.5, "acc_stderr": 0.1}}, "metric": "acc", "documents": {"quiz": "01"}}
    return line("task", "quiz", 0.5, details, protocol={"limit": 10, "fewshot": None, "bos": "auto"})


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
    text = render(Facts(**BASE, results=[perplexity(), fidelity(), task()]))
    (row,) = (r for r in text.splitlines() if r.startswith("| wiki.txt"))
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


def test_results_are_metadata_that_the_hub_shows() -> None:
    header = yaml.safe_load(
        render(Facts(**BASE, results=[perplexity(name="wikitext2"), fidelity(name="wikitext2"), task()])).split(
            "---\n"
        )[1]
    )
    (index,) = header["model-index"]
    assert index["name"] == "tiny-spqr"
    wikitext, quiz = index["results"]
    assert wikitext["dataset"] == {
        "name": "wikitext2", "type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test",
    }  # fmt: skip
    found = {metric["type"]: metric["value"] for metric in wikitext["metrics"]}
    assert found == {"perplexity": 28.6284, "kl": 0.12344, "top1": 0.81}
    assert wikitext["metrics"][0]["name"].startswith("perplexity, 4 windows of 2048")
    assert quiz["metrics"] == [{"type": "acc", "value": 0.5, "name": "acc, first 10"}]
    assert "model-index" not in render(Facts(**BASE))


def test_newest_result_of_a_protocol_counts() -> None:
    results = [perplexity(), perplexity(40.25, protocol=protocol(seqlen=512)), perplexity(27.5)]
    rows = [r for r in render(Facts(**BASE, results=results)).splitlines() if r.startswith("| wiki.txt")]
    assert len(rows) == 2
    assert "27.500" in rows[0]
    assert "40.250" in rows[1]


def test_fidelity_over_several_texts_has_its_own_row() -> None:
    pooled = fidelity("wiki.txt + c4", protocol={"texts": {"wiki.txt": {}, "c4": {}}, "against": "2" * 64})
    text = render(Facts(**BASE, results=[perplexity(), perplexity(30.5, "c4"), fidelity(), pooled]))
    assert [line.split(" | ")[0] for line in text.splitlines() if "0.1234" in line and line.startswith("|")] == [
        "| wiki.txt", "| wiki.txt + c4",
    ]  # fmt: skip
    assert "| wiki.txt + c4 |  |" in text


def test_a_run_on_a_gpu_is_not_denied() -> None:
    text = render(Facts(**BASE, results=[perplexity(setting={"device": "Some GPU", "kv": None})]))
    assert "Some GPU" in text
    assert "never run on a GPU" not in text


def test_figures_that_are_missing_do_not_break_a_card() -> None:
    nothing = task()
    nothing["details"] = {"metrics": {"quiz": {"acc": None}}, "metric": None, "documents": {}}
    text = render(Facts(**BASE, results=[{**perplexity(), "figure": None}, {**nothing, "figure": None}]))
    assert "model-index" not in text
    assert "| quiz" not in text


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
