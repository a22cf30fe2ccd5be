"""The documents name commands, options and files that exist."""

import re
from pathlib import Path

import pytest
import typer

from qexport import plugins, report
from qexport.cli import app
from qexport.formats.base import bits_per_weight
from qexport.recipe import load_recipe, with_options, with_parts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def _options() -> dict[str, set[str]]:
    """Options of every command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
        | {"--help", "-h"}
        for name, command in commands.items()
    }


def _code(text: str) -> list[str]:
    """Code spans, and lines of code blocks."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return spans + re.findall(r"^    (\S.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_code_exist_with_their_options(page: Path) -> None:
    options = _options()
    for code in _code(page.read_text()):
        words = code.split("#")[0].split()
        if len(words) < 2 or words[0] != "qexport" or not words[1].isalpha():
            continue
        assert words[1] in options, code
        for word in words[2:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in options[words[1]], code


def test_every_option_on_our_side_of_coming_from_exists() -> None:
    known = set().union(*_options().values())
    keys = {
        key
        for table in (report.methods(), report.formats())
        for kind in ("methods", "formats", "transforms")
        for entry in table.get(kind, {}).values()
        for key in entry["options"]
    }
    rows = re.findall(r"^\| .+? \| (.+) \|$", (ROOT / "docs" / "coming-from.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    for row in rows:
        for code in re.findall(r"`([^`]+)`", row):
            words = code.replace("'", "").split()
            if words[0] == "qexport":
                continue  # checked above
            for i, word in enumerate(words):
                if "/-" in word:
                    assert set(word.split("/")) <= known, code
                elif word.startswith("-") and word[1:2] != "1":
                    assert word in known, code
                if word == "-s":
                    assert words[i + 1].split("=")[0] in keys, code


def test_readme_names_every_recipe_and_format() -> None:
    text = (ROOT / "README.md").read_text()
    for name in report.methods()["recipes"]:
        assert f"--method {name}" in text
    for name in plugins.names("formats"):
        assert f"`{name}`" in text


def test_stored_bits_in_the_readme_are_those_of_the_layouts() -> None:
    rows = re.findall(
        r"`--method (\S+?)((?: --\S+ \S+?)*)` \| (?:about )?([\d.]+) \|", (ROOT / "README.md").read_text()
    )
    assert len(rows) >= 4
    for name, rest, bits in rows:
        words = rest.split()
        given = {key[2:].replace("-", "_"): value for key, value in zip(words[::2], words[1::2], strict=True)}
        chosen = with_parts(load_recipe(name), format=given.pop("format", None))
        chosen = with_options(chosen, [(f"format.{key}", value) for key, value in given.items()])
        method = plugins.get("methods", chosen.method)(**chosen.method_options)
        grid = plugins.get("formats", chosen.format)(**chosen.format_options)
        stored = bits_per_weight(grid, 4096, 4096, method.expected_extents(grid, 4096, 4096))
        assert float(bits) == pytest.approx(stored, abs=0.006), name
