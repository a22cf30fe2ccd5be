"""The page of cache formats shows the layouts that the code has."""

from pathlib import Path

import pytest

from qexport import schema
from qexport.formats.kv.base import make_kv

PAGE = (Path(__file__).parents[3] / "docs" / "formats" / "kv.md").read_text()


@pytest.mark.parametrize("name", ["kivi-2bit", "kvquant-3bit", "sdr-4bit"])
def test_every_layout_is_on_the_page(name: str) -> None:
    fmt = make_kv(name)
    assert fmt is not None
    for layout in (fmt.keys.layout(3, 64), fmt.values.layout(3, 64), fmt.static(3, 64)):
        assert not layout or schema.markdown_table(layout) in PAGE
    assert f"## {fmt.name}, version {fmt.version}" in PAGE
