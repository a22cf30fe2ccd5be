"""Nothing in a checkpoint is run, and nobody is asked whether it may."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import QExportError, UsageError
from qexport.evaluate.run import evaluate
from qexport.load import load
from qexport.models import open_source
from tests import finished, tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass Config: pass\nclass Tokens: pass\n"


def _spoil_config(folder: Path) -> None:
    """A model that transformers does not know, with code that does."""
    path = folder / "config.json"
    own = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.M"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


def _spoil_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["foreign.Tokens", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


USES: dict[str, Callable[[Path], Any]] = {
    "open": lambda folder: open_source(str(folder)).tokenizer(),
    "load": lambda folder: (load(folder), evaluate(folder, texts=[folder / "t.txt"], windows=1)),
    "eval": lambda folder: evaluate(folder, texts=[folder / "t.txt"], windows=1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spoil", [_spoil_config, _spoil_tokenizer])
@pytest.mark.parametrize("use", sorted(USES))
def test_code_of_a_checkpoint_neither_runs_nor_asks(
    use: str, spoil: Callable[[Path], None], packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use == "open" and packed:
        pytest.skip("refused before its code matters")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    folder = finished.write(tmp_path / "m") if packed else tiny.save("llama", tmp_path / "m")
    marker = tmp_path / "marker"
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker)))
    (folder / "t.txt").write_text(TEXT)
    spoil(folder)
    with pytest.raises(QExportError, match="runs no code from a checkpoint"):
        USES[use](folder)
    assert not asked
    assert not marker.exists()


def test_asking_for_code_from_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs no code from a checkpoint"):
        load(tiny.save("llama", tmp_path / "m"), trust_remote_code=True)


def test_code_beside_a_model_that_transformers_knows_is_passed_over(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    folder = tiny.save("llama", tmp_path / "m")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    shutil.copy(folder / "custom_generate" / "generate.py", folder / "foreign.py")
    path = folder / "config.json"
    auto_map = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.M"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    load(folder)
    assert not asked
    assert not (tmp_path / "marker").exists()
