"""`qexport report` on tiny models: what it says, what it can't, and how the page looks in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from qexport.checkpoint import Reader, read_json
from qexport.cli import app
from qexport.evaluate.size import packed_modules
from qexport.models import load_dense, open_source
from qexport.models.fetch import cached
from qexport.reporting import Sample
from qexport.reporting.comparison import dominated
from qexport.reporting.facts import place, read
from qexport.reporting.measure import measure, rotation_back
from qexport.reporting.page import labels
from qexport.stored import stored_tensors
from tests import browser, finished, tiny

SAMPLE = Sample("builtin", 2, 32)
SHORT = ("--samples", "2", "--seqlen", "32")
FIGURES = ("bytes", "bits", "errors", "kinds", "states", "weights", "inputs", "outliers")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def line(what: str, figure: float, **extra: object) -> str:
    """A line of results.jsonl."""
    entry = {"what": what, "name": "text", "figure": figure, "se": 0.01, "protocol": {"seqlen": 32}, "setting": {}}
    details = {
        "perplexity": {"tokens": 62, "losses": [3.0], "observations": {}},
        "fidelity": {
            "kl": {"mean": figure}, "top1": {"value": 0.875}, "ln_ppl_ratio": {"value": 0.1}, "tokens": 62,
            "against": "original", "observations": {},
        },
    }  # fmt: skip
    known = details.get(what, {})
    return json.dumps({**entry, "details": known, "time": "2030-01-02T03:04:05", **extra}) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("report") / "llama")


def quantized(model: Path, name: str, *options: str) -> Path:
    out = model.parent / name
    text = model.parent / "text.txt"
    text.write_text(" ".join(f"{i} bottles and {i * i} glasses" for i in range(300)))
    data = ("--calibration", str(text), "--samples", "4", "--seqlen", "32", "--group-size", "8")
    result = call("quantize", model, "-o", out, *options, *(data if "rtn" not in options else data[-2:]))
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def rtn(model: Path) -> Path:
    return quantized(model, "rtn", "--method", "rtn")


@pytest.fixture(scope="module")
def gptq(model: Path) -> Path:
    return quantized(model, "gptq", "--method", "gptq", "--bits", "3")


# ---- figures -----------------------------------------------------------------------------------


def test_place_is_the_layer_and_what_follows_it() -> None:
    assert place("model.layers.12.mlp.up_proj") == (12, "mlp.up_proj")
    assert place("model.layers.3.mlp.experts.gate_up_proj.7") == (3, "mlp.experts.gate_up_proj.*")
    assert place("lm_head") == (None, "lm_head")


def test_output_errors_are_those_of_the_linears_on_the_originals_inputs(model: Path, rtn: Path) -> None:
    source = open_source(str(model))
    found = measure(rtn, source, SAMPLE, device="cpu", observer=lambda _: None)
    assert found.notes == []
    assert len(found.outputs) == 14
    reader = Reader(rtn)
    modules = packed_modules(reader)
    dense = load_dense(source, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name in modules:
        dense.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0]))
    from qexport.calibration import encode
    from qexport.evaluate.windows import cut, read_text

    ids = cut("t", encode(source.tokenizer(), read_text("builtin").content), seqlen=32, limit=2).ids
    dense(ids)
    for name, (spec, n, k) in modules.items():
        w = spec.decoded(stored_tensors(reader, spec, name, n, k), n, k)
        right = dense.get_submodule(name)(seen[name])
        mse = float((F.linear(seen[name], w) - right).square().mean())
        assert found.outputs[name]["mse"] == pytest.approx(mse, rel=1e-3), name
        assert found.outputs[name]["relative"] == pytest.approx(mse / float(right.square().mean()), rel=1e-3)
    packed = load_dense(source, dtype=torch.float32)
    for name, (spec, n, k) in modules.items():
        packed.get_submodule(name).weight.copy_(spec.decoded(stored_tensors(reader, spec, name, n, k), n, k))
    ours, theirs = (m.model(ids, output_hidden_states=True).hidden_states[1] for m in (dense, packed))
    assert found.states[0]["mse"] == pytest.approx(float((ours - theirs).square().mean()), rel=1e-3)


def test_distributions_are_shares_and_know_the_outlier(model: Path, rtn: Path) -> None:
    found = measure(rtn, open_source(str(model)), SAMPLE, device="cpu", observer=lambda _: None)
    for table in (found.weights, found.inputs):
        for sides in table.values():
            assert set(sides) == {"before", "after"}
            for shares in sides.values():
                assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert list(found.inputs) == [
        "self_attn.q_proj, k_proj, v_proj", "self_attn.o_proj", "mlp.gate_proj, up_proj", "mlp.down_proj",
    ]  # fmt: skip
    rows = found.outliers["mlp.down_proj"]["before"]
    assert len(rows) == 2
    assert all(len(row) == 72 and max(row) > 1 for row in rows)


def test_rotation_of_the_states_is_found_from_the_embeddings() -> None:
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(200, 24, generator=rng)
    q, _ = torch.linalg.qr(torch.randn(24, 24, generator=rng))
    back = rotation_back(table, table @ q)
    assert back is not None
    assert torch.allclose(table @ q @ back, table, atol=1e-4)
    assert rotation_back(table, torch.randn(200, 24, generator=rng)) is None


@pytest.mark.parametrize(("transform", "rotated"), [(("-t", "awq"), False), (("--method", "gptq-rotation"), True)])
def test_folded_transforms_leave_states_to_compare_but_no_single_linears(
    transform: tuple[str, ...], rotated: bool, model: Path
) -> None:
    method = () if "--method" in transform else ("--method", "rtn")
    folder = model.parent / f"folded-{rotated}"
    text = model.parent / "own.txt"
    text.write_text(" ".join(f"{i} bottles and {i * i} glasses" for i in range(300)))
    data = ("--calibration", text, "--samples", "4", "--seqlen", "32", "--group-size", "8", "--bits", "8")
    result = call("quantize", model, "-o", folder, *method, *transform, *data)
    assert result.exit_code == 0, result.stderr
    found = measure(folder, open_source(str(model)), SAMPLE, device="cpu", observer=lambda _: None)
    assert found.outputs == {}
    assert len(found.notes) == 1
    assert "moved factors or a rotation" in found.notes[0]
    assert len(found.states) == 2
    assert all(state["relative"] < 1e-3 for state in found.states)  # 8 bits: the same function in another basis


@pytest.mark.parametrize(
    ("sizes", "values", "expected"),
    [
        ([1, 2, 3], [3.0, 2.0, 1.0], [False, False, False]),
        ([1, 2, 3], [1.0, 2.0, 3.0], [False, True, True]),
        ([2, 2, 1], [1.0, 1.0, None], [False, False, False]),
        ([2, 2, 3], [1.0, 1.5, 1.0], [False, True, True]),
    ],
)
def test_dominated_is_who_another_beats(sizes: list[int], values: list[float | None], expected: list[bool]) -> None:
    assert dominated(sizes, values) == expected


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]


# ---- the command -------------------------------------------------------------------------------


def test_page_has_every_figure_and_the_document_every_module(model: Path, gptq: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = call("report", gptq, "--original", model, *SHORT, "-o", out, "--png", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    text = out.read_text()
    for name in FIGURES:
        assert f'id="{name}"' in text, name
        assert (tmp_path / f"page-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert found["pictures"] == [str(tmp_path / f"page-{name}.png") for name in FIGURES]
    (checkpoint,) = found["checkpoints"]
    manifest = read_json(gptq / "qexport.json")["modules"]
    assert {n: m["error"] for n, m in checkpoint["modules"].items()} == {n: m["error"] for n, m in manifest.items()}
    assert set(checkpoint["measured"]["outputs"]) == set(manifest)
    assert "http://" not in re.sub(r'xmlns[:\w]*="[^"]*"', "", text)
    assert "https://" not in text
    assert "<script" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_without_the_original_the_page_says_what_is_missing_and_why(rtn: Path, tmp_path: Path) -> None:
    result = call("report", rtn, "-o", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert "--original MODEL" in result.stderr
    text = (tmp_path / "page.html").read_text()
    assert "needs the model that this was made from; name it with --original MODEL" in text
    assert 'id="weights"' not in text
    assert text.count("run qexport eval DIR") == 3
    assert text.count("not measured") == 4
    assert json.loads(result.stdout)["checkpoints"][0]["measured"] is None


def test_page_lies_in_the_folder_and_disturbs_nobody(rtn: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rtn, tmp_path / "rtn")
    assert call("report", folder, "--png").exit_code == 0
    assert {"report.html", "report-bytes.png"} <= {path.name for path in folder.iterdir()}
    assert call("verify", folder).exit_code == 0
    sent = json.loads(call("push", folder, "someone/tiny", "--dry-run", "--json").stdout)["files"]
    assert not any("report" in name for name in sent)


def test_bytes_of_the_picture_are_all_bytes_of_the_tensors(tmp_path: Path) -> None:
    model = tiny.save("gpt2", tmp_path / "gpt2")
    assert call("quantize", model, "--method", "rtn", "-o", tmp_path / "out").exit_code == 0
    checkpoint = read(tmp_path / "out", "out")
    reader = Reader(tmp_path / "out")
    stored = sum(reader.meta(name).nbytes for name in reader.names)
    assert sum(m.nbytes for m in checkpoint.modules) + sum(checkpoint.dense.values()) == stored
    assert checkpoint.dense["attn.c_attn.bias"] > 0


def test_original_in_the_cache_of_the_hub_is_found_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    packed = finished.write(tmp_path / "packed", base="someone/tiny-llama")
    commit = read_json(packed / "qexport.json")["plan"]["commit"]
    assert cached("someone/tiny-llama", revision=commit) is None
    snapshots = tmp_path / "hub" / "models--someone--tiny-llama" / "snapshots"
    snapshots.mkdir(parents=True)
    tiny.save("llama", snapshots / commit)
    assert cached("someone/tiny-llama", revision=commit) == snapshots / commit
    result = call("report", packed, *SHORT, "-o", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["checkpoints"]
    assert len(found["measured"]["outputs"]) == 14
    assert found["measured"]["original"] == "someone/tiny-llama"


def test_another_model_than_the_one_it_was_made_from_is_said(rtn: Path, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", dtype=torch.bfloat16)
    result = call("report", rtn, "--original", other, *SHORT, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    assert "another fingerprint" in result.stderr
    assert "another fingerprint" in (tmp_path / "page.html").read_text()


def test_results_are_shown_the_newest_of_each_protocol(rtn: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rtn, tmp_path / "rtn")
    lines = line("perplexity", 77.0), line("perplexity", 23.456), "damaged {\n", line("speed", 61.5, name="decode")
    kl = line("fidelity", 0.0321)
    (folder / "results.jsonl").write_text("".join((*lines, kl)))
    result = call("report", folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "page.html").read_text()
    for shown in ("23.46", "0.0321", "87.5%", "61.5"):
        assert f"<b>{shown}</b>" in text
    assert "77" not in re.findall(r"<b>([^<]*)</b>", text)
    assert "not measured" not in text


@pytest.mark.parametrize(
    ("name", "options", "outputs"),
    [
        ("gpt2", ("--method", "rtn"), 8),
        ("mixtral", ("--method", "rtn"), 8),
        ("llama", ("--method", "smoothquant-w8a8"), 0),
        ("llama", ("--method", "zeroquant-w8a8", "--lm-head", "8", "--embeddings", "8"), 14),
    ],
)
def test_other_models_and_rounded_inputs(name: str, options: tuple[str, ...], outputs: int, tmp_path: Path) -> None:
    model = tiny.save(name, tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} bottles and {i * i} glasses" for i in range(300)))
    data = ("--calibration", text, "--samples", "4", "--seqlen", "32")
    assert call("quantize", model, "-o", tmp_path / "out", *options, *data).exit_code == 0
    result = call("report", tmp_path / "out", "--original", model, *SHORT, "-o", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["checkpoints"]
    assert len(found["measured"]["outputs"]) == outputs
    assert len(found["measured"]["states"]) == 2
    assert set(found["measured"]["weights"]) == {m["kind"] for m in found["modules"].values() if m["layer"] is not None}
    assert all(entry["relative"] < 0.2 for entry in found["measured"]["outputs"].values())


def test_several_are_compared_and_the_beaten_ones_grey(rtn: Path, gptq: Path, tmp_path: Path) -> None:
    small, large, lost = (shutil.copytree(a, tmp_path / n) for a, n in ((gptq, "small"), (rtn, "large"), (rtn, "lost")))
    (small / "results.jsonl").write_text(line("fidelity", 0.1))
    (large / "results.jsonl").write_text(line("fidelity", 0.2))
    (lost / "results.jsonl").write_text(line("fidelity", 0.01, protocol={"seqlen": 64}))
    result = call("report", small, large, lost, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "page.html").read_text()
    assert 'id="all-pareto"' in text
    assert "lost: not measured by this protocol" in text
    assert re.findall(r'<tr class="worse"><td>(\w+)</td>', text) == ["large"]
    assert 'id="all-layers"' not in text  # errors of outputs and of weights are no lines of one picture
    assert call("report", large, lost, "-o", tmp_path / "page.html", "--png").exit_code == 0
    assert 'id="all-layers"' in (tmp_path / "page.html").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "page-layers.png", *(f"page-{i}-{name}.png" for i in (1, 2) for name in ("bytes", "bits", "errors", "kinds")),
    }  # fmt: skip


def test_errors_name_the_folder_and_what_is_wrong(rtn: Path, model: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(rtn, tmp_path / "damaged")
    (damaged / "qexport.json").write_text("{")
    for arguments, code, message in (
        ((model,), 1, "expected a quantization_config"),
        ((tmp_path / "none",), 1, "found no folder"),
        ((damaged,), 1, "is not JSON"),
        ((rtn, rtn), 2, "each once"),
        ((rtn, "-o", "page.txt"), 2, "FILE.html"),
        ((rtn, "--original", tmp_path / "none"), 1, "SourceError"),
        ((rtn, "--original", tiny.save("gpt2", tmp_path / "gpt2")), 2, "found none of that name"),
        ((" ",), 2, "name is empty"),
    ):
        result = call("report", *arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr
        assert result.stdout == ""


def test_names_from_files_can_not_become_markup(rtn: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rtn, tmp_path / "rtn")
    manifest = read_json(folder / "qexport.json")
    manifest["plan"]["recipe"] = "<img src=x onerror=alert(1)>"
    (folder / "qexport.json").write_text(json.dumps(manifest))
    (folder / "results.jsonl").write_text(line("perplexity", 1.0, name="<b>&"))
    assert call("report", folder, "-o", tmp_path / "page.html").exit_code == 0
    text = (tmp_path / "page.html").read_text()
    assert "<img" not in text
    assert "&lt;b&gt;&amp;" in text


def test_command_of_the_job_is_recorded_without_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from qexport.cli.called import called

    monkeypatch.setattr("sys.argv", ["x", "quantize", "a b", "--token", "hf_s", "--token=hf_t", "--bits", "3"])
    assert called() == "qexport quantize 'a b' --token '***' '--token=***' --bits 3"


# ---- in a browser ------------------------------------------------------------------------------


@pytest.mark.skipif(browser.PATH is None, reason="no chromium on this machine")
def test_pages_fit_and_speak_in_light_and_dark(model: Path, rtn: Path, gptq: Path, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "build" / "report"
    pair = [shutil.copytree(source, tmp_path / source.name) for source in (rtn, gptq)]
    for i, copy in enumerate(pair):
        lines = line("fidelity", 0.2 - 0.1 * i), line("perplexity", 20.0 + i), line("task", 0.5, name="arc_challenge")
        (copy / "results.jsonl").write_text("".join(lines))
    for name, folders in {"one": (gptq,), "two": pair}.items():
        result = call("report", *folders, "--original", model, *SHORT, "-o", folder / f"{name}.html")
        assert result.exit_code == 0, result.stderr
    with browser.started() as page:
        for name in ("one", "two"):
            backgrounds = {}
            for width in (800, 1440):
                for dark in (False, True):
                    page.open(folder / f"{name}.html", width=width, dark=dark)
                    page.screenshot(folder / f"{name}-{width}-{'dark' if dark else 'light'}.png")
                    assert page.value("document.documentElement.scrollWidth") <= width
                    assert page.value(FEWEST_TEXTS) > 3
                    assert page.value(CLIPPED) == 0
                    assert page.value(NARROWEST_CELL) > 30
                    assert page.value(LEAST_CONTRAST) > 4.5
                    backgrounds[dark] = page.value(BACKGROUND)
            assert backgrounds[False] == "rgb(255, 255, 255)" != backgrounds[True]
            page.call("Emulation.setEmulatedMedia", media="print")
            assert page.value(BACKGROUND) == "rgb(255, 255, 255)"
            page.pdf(folder / f"{name}.pdf")
        assert page.complaints == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}


BACKGROUND = "getComputedStyle(document.body).backgroundColor"
FEWEST_TEXTS = (
    """Math.min(...[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('svg text').length))"""
)
NARROWEST_CELL = """Math.min(...[...document.querySelectorAll('td, th')].map(e => e.offsetWidth).filter(w => w))"""

# Texts of figures that stick out of their figure.
CLIPPED = """[...document.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(t => {
        const b = t.getBoundingClientRect();
        return b.width && (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1
            || b.bottom > box.bottom + 1);
    }).length;
}).reduce((a, b) => a + b, 0)"""

# Least contrast, by WCAG 2, of text that is read with the page behind it.
LEAST_CONTRAST = """(() => {
    const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
    const back = light(getComputedStyle(document.body).backgroundColor);
    return Math.min(...[...document.querySelectorAll('p, figcaption, td, th, svg text')].map(e => {
        const s = getComputedStyle(e), c = light(e.closest('svg') ? s.fill : s.color);
        return (Math.max(c, back) + 0.05) / (Math.min(c, back) + 0.05); }));
})()"""
