"""Makes a site of Markdown that is written for the repository: navigation, pages from outside docs/, and links."""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = "project"  # where the site has what lies outside docs/
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> None:
    """Put pages in the place of the patterns in `nav`; each page has one place."""
    named = set(_strings(config.nav))
    config.nav = _expanded(config.nav, Path(config.docs_dir), named)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add every file of the repository that a page links to, and what those link to."""
    waiting = [_home(file.src_uri) for file in files.documentation_pages() if file.generated_by is None]
    while waiting:
        page = waiting.pop()
        for link in LINK.findall((ROOT / page).read_text()):
            found = normpath(join(dirname(page), link))
            outside = not found.startswith(("docs/", "../")) and (ROOT / found).is_file()
            if outside and files.get_file_from_path(f"{OUTSIDE}/{found}") is None:
                files.append(File.generated(config, f"{OUTSIDE}/{found}", abs_src_path=str(ROOT / found)))
                waiting += [found] * found.endswith(".md")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where the site has what they name; a folder is its first page."""

    def place(match: re.Match[str]) -> str:
        found = normpath(join(dirname(_home(page.file.src_uri)), match[1]))
        if (ROOT / found).is_dir():
            inner = (path for file in files if (path := _home(file.src_uri)).startswith(f"{found}/"))
            found = min(inner, default=found)
        inside = found.removeprefix("docs/") if found.startswith("docs/") else f"{OUTSIDE}/{found}"
        return relpath(inside, dirname(page.file.src_uri) or ".")

    return LINK.sub(place, markdown)


def _home(page: str) -> str:
    """Where the repository has what the site has under `page`."""
    return page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"docs/{page}"


def _expanded(entries: Any, docs: Path, named: set[str]) -> Any:
    if isinstance(entries, dict):
        return {title: _expanded(inner, docs, named) for title, inner in entries.items()}
    if isinstance(entries, list):
        return [page for entry in entries for page in _listed(_expanded(entry, docs, named))]
    if "*" not in entries:
        return entries
    found = sorted(path.relative_to(docs).as_posix() for path in docs.glob(entries))
    return [page for page in found if page not in named]


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _strings(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
        return
    for entry in entries.values() if isinstance(entries, dict) else entries:
        yield from _strings(entry)
