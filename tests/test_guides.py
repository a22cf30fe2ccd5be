"""The tutorial and the guides run as they are written, on a tiny model."""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from os.path import expandvars
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qexport import plugins, schema
from qexport.cli import app
from tests import tiny

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory whose Python files can be imported, and a tiny model as `$MODEL`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MODEL", str(tiny.save("llama", tmp_path.parent / f"{tmp_path.name}-model")))
    monkeypatch.setenv("COLUMNS", "200")
    # Shapes of 70B parameters are planned in memory that is only reserved: filling it would take it.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    yield tmp_path
    for name in {path.stem for path in tmp_path.glob("*.py")} & set(sys.modules):
        del sys.modules[name]
    _forget()


def _forget() -> None:
    """Let entry points be looked for again."""
    plugins.names.cache_clear()
    plugins._installed.cache_clear()


def _install(folder: Path, project: dict[str, Any]) -> None:
    """What `pip install -e .` would leave behind of entry points."""
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    _forget()


def _call(line: str) -> str:
    """The output of a command line of ours, which must end well."""
    program, *arguments = shlex.split(expandvars(line))
    assert program == "qexport", line
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.stderr}\n{result.exception!r}"
    return result.stdout


def follow(page: Path, folder: Path) -> dict[str, str]:
    """Do what a page says, block by block: what each command printed."""
    said: dict[str, str] = {}
    for kind, title, text in BLOCK.findall(page.read_text()):
        if title:
            (folder / title).write_text(text)
            if title == "pyproject.toml":
                _install(folder, tomllib.loads(text)["project"])
        elif kind == "python":
            exec(compile(text, str(page), "exec"), {"__name__": page.stem})
        else:
            assert kind == "bash", f"{page.name}: a block of {kind} is neither run nor kept"
            said |= {line: _call(line) for line in text.splitlines()}
    return said


def _tutorial(folder: Path, said: dict[str, str]) -> None:
    assert len(said) == 9
    assert json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]["kv"]["format"] == "kivi"
    assert [*(folder / "dense").glob("*.safetensors")]
    assert not (folder / "dense" / "qexport.json").exists()


def _large_model(folder: Path, said: dict[str, str]) -> None:
    """The page states the sizes that the plan does; memory and time are those of a machine."""
    (table,) = said.values()
    page = (DOCS / "howto" / "large-model.md").read_text()
    for line in re.findall(r"^    ((?:bits|size) \S.*)", page, re.MULTILINE):
        name, figure = re.split(r"\s{2,}", line)
        assert re.search(rf"{name}\W+{figure}\s", table), line
    assert (folder / "llama-70b" / "model.safetensors").stat().st_blocks < 1000


def _method(folder: Path, said: dict[str, str]) -> None:
    assert "diffuse" in said["qexport methods"]
    plan = json.loads((folder / "diffused" / "qexport.json").read_text())["plan"]
    assert "diffuse" in json.dumps(plan)
    grid, w = (
        plugins.get("formats", "uniform")(group_size=-1),
        torch.randn(8, 64, generator=torch.Generator().manual_seed(0)),
    )
    made, rng = plugins.get("methods", "diffuse"), torch.Generator()
    for share, name in ((0.0, "rtn"), (1.0, "diffuse")):
        found = grid.decode(made(share=share).quantize(w, {}, grid, rng).fields)
        nearest = grid.decode(plugins.get("methods", "rtn")().quantize(w, {}, grid, rng).fields)
        assert torch.equal(found, nearest) == (name == "rtn")
    assert ((found - w).sum(1).abs() < (nearest - w).sum(1).abs()).float().mean() > 0.5


def _format(folder: Path, said: dict[str, str]) -> None:
    assert "octets" in said["qexport formats"]
    assert "the CPU's kernel of 'octets'" in " ".join(said["qexport inspect octets-out"].split())
    fmt, rng = plugins.get("formats", "octets")(), torch.Generator().manual_seed(0)
    for n, k in ((1, 1), (5, 7), (37, 131)):
        fields = fmt.random(n, k, rng)
        packed = fmt.pack(fields)
        schema.check(packed, fmt.layout(n, k), "here")
        assert all(torch.equal(t, fields[name]) for name, t in fmt.unpack(packed, n, k).items())
        part = fmt.slice(packed, n, k, (0, n), (k // 2, k))
        assert torch.equal(fmt.decode(fmt.unpack(part, n, k - k // 2)), fmt.decode(fields)[:, k // 2 :])


CHECKS: dict[str, Callable[[Path, dict[str, str]], None]] = {
    "tutorial.md": _tutorial,
    "howto/large-model.md": _large_model,
    "howto/add-method.md": _method,
    "howto/add-format.md": _format,
}


def test_every_guide_with_code_is_followed() -> None:
    pages = [DOCS / "tutorial.md", *DOCS.glob("howto/*.md")]
    assert {path.relative_to(DOCS).as_posix() for path in pages if BLOCK.search(path.read_text())} == set(CHECKS)


@pytest.mark.parametrize("page", CHECKS)
def test_following_a_guide_ends_where_it_says(page: str, folder: Path) -> None:
    CHECKS[page](folder, follow(DOCS / page, folder))


def test_figures_of_the_choice_are_measured_ones() -> None:
    rows = re.findall(
        r"^\| .+? \| `.+?` \| ([\d.]+) \| ([\d.]+) \| (.+) \|$",
        (DOCS / "howto" / "choose.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > 7
    lines = [json.loads(line) for line in (DOCS.parent / "benchmarks" / "results" / "quality.jsonl").open()]
    for bits, perplexity, case in rows:
        found = {(f"{d['bits_per_weight']:.2f}", f"{d['perplexity']:.2f}") for d in lines if d["case"] == case}
        assert (bits, perplexity) in found, case
