"""The documents as a site: `make docs` without a warning, links that hold, and nothing loaded over a network."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import pytest

from qexport import plugins, recipe
from qexport.cli import app

ROOT = Path(__file__).parents[1]
LOADING = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src"), ("use", "href")}

pytestmark = pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material")), reason="needs the extra `docs`: pip install -e '.[docs]'"
)


class Page(HTMLParser):
    """What a page links to, loads, and calls its places."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.places: set[str] = set()
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.places |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        if found.get("rel") not in {"next", "prev", "canonical"}:
            self.loaded |= {value for key, value in found.items() if (tag, key) in LOADING}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def _inside(pages: dict[str, Page]) -> Iterator[tuple[str, str, str]]:
    """Page, target and place of every link that stays in the site."""
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc:
                target = normpath(join(dirname(name), unquote(parts.path))) if parts.path else name
                yield name, target, unquote(parts.fragment)


def test_every_document_is_a_page_that_can_be_reached_from_the_first(pages: dict[str, Page]) -> None:
    expected = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    expected |= {"project/index.html", "project/CHANGELOG.html", "project/CONTRIBUTING.html", "results.html"}
    assert expected <= set(pages)
    reached, waiting = {"index.html"}, ["index.html"]
    while waiting:
        own = waiting.pop()
        found = {target for name, target, _ in _inside({own: pages[own]})} - reached
        reached |= found
        waiting += found & set(pages)
    assert set(pages) <= reached


def test_links_inside_lead_to_files_and_to_places_in_them(pages: dict[str, Page], site: Path) -> None:
    for name, target, place in _inside(pages):
        assert (site / target).is_file(), f"{name}: {target}"
        if place and target in pages:
            assert place in pages[target].places, f"{name}: {target}#{place}"


def test_pages_load_nothing_over_a_network(pages: dict[str, Page], site: Path) -> None:
    for name, page in pages.items():
        assert page.loaded, name
        assert not [url for url in page.loaded if urlsplit(url).netloc], name
        assert 'class="mermaid"' not in page.text, f"{name}: the theme would fetch what draws this"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style.name


PLACES = {
    "methods": "methods",
    "transforms": "methods",
    "blocks": "methods",
    "caches": "methods",
    "formats": "formats",
    "inputs": "inputs-and-caches",
    "export": "exports",
}


@pytest.mark.parametrize("kind", PLACES)
def test_reference_says_what_every_option_of_every_plugin_means(pages: dict[str, Page], kind: str) -> None:
    text = pages[f"reference/{PLACES[kind]}.html"].text
    for name in plugins.names(kind):
        part = re.search(rf'<h3 id="{name}(_\d)?".*?(?=<h[23]|\Z)', text, re.DOTALL)
        assert part, name
        for option in fields(plugins.get(kind, name)):
            cells = re.search(rf"<td><code>{option.name}</code></td>(.*?)</tr>", part[0], re.DOTALL)
            assert cells, f"{name}: {option.name}"
            assert "<td></td>" not in cells[1], f"{name}: {option.name} is not explained"


def test_reference_has_every_recipe_and_command(pages: dict[str, Page]) -> None:
    assert {*recipe.recipe_names()} <= pages["reference/recipes.html"].places
    assert {command.name or command.callback.__name__ for command in app.registered_commands if command.callback} <= (
        pages["reference/commands.html"].places
    )


def test_results_have_a_row_for_every_line_and_the_command_of_each_file(pages: dict[str, Page]) -> None:
    text = pages["results.html"].text
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    assert text.count("<tr>") - text.count("<thead>") == sum(len(path.read_text().splitlines()) for path in files)
    for path in files:
        part = text.split(f'<h2 id="{path.stem}"')[1].split("<h2")[0]
        assert re.search(rf"benchmarks[./]{path.stem}", part), path.name
