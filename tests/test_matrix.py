"""What `qexport methods` prints is what happens: every cell of method, format and transform, on a tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qexport import plugins, report
from qexport.calibration import Calibration
from qexport.checkpoint import read_json
from qexport.errors import PlanError
from qexport.models import anatomy, open_source
from qexport.plan import make_plan
from qexport.quantize import quantize
from qexport.recipe import Recipe
from qexport.verify import verify
from tests import tiny

TABLE = report.methods()


def cells() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Method, format, transforms, and what the tables say of them."""
    for method, entry in TABLE["methods"].items():
        for fmt, cell in entry["formats"].items():
            yield method, fmt, (), cell
            after = {name: t["pairs"][method][fmt] for name, t in TABLE["transforms"].items()}
            for name, found in after.items():
                yield method, fmt, (name,), found
            refused = [found for found in after.values() if found.startswith("refused")]
            scaling_first = sorted(after, key=lambda name: plugins.get("transforms", name)().steps.hadamard)
            yield method, fmt, tuple(scaling_first), refused[0] if refused else "runs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("matrix") / "model")


@pytest.mark.parametrize(("method", "fmt", "transforms", "cell"), list(cells()))
def test_cell(method: str, fmt: str, transforms: tuple[str, ...], cell: str, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} bottles and {i * i} glasses" for i in range(200)))
    source = open_source(str(model))
    few = {"awq": {"grid": 2}}  # how many scales are tried decides nothing here
    recipe = Recipe("cell", "", "", method, fmt, transforms=tuple((name, few.get(name, {})) for name in transforms))
    calibration = Calibration(str(text), samples=4, seqlen=32)
    if cell.startswith("refused: "):
        with pytest.raises(PlanError) as refusal:
            make_plan(source, anatomy(source), recipe, calibration=calibration)
        assert cell.removeprefix("refused: ") in str(refusal.value)
        return
    plan = make_plan(source, anatomy(source), recipe, calibration=calibration)
    quantize(plan, source, tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found["modules"] == len(plan.modules)
    if method != "spqr":  # the number of its outliers is known only afterwards
        stored = read_json(tmp_path / "out" / "qexport.json")["modules"]
        assert {name: m.nbytes for name, m in plan.modules.items()} == {n: f["nbytes"] for n, f in stored.items()}
