"""`qexport.load`: any model, and stated errors only."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from qexport.errors import CheckpointError, QExportError, SourceError
from qexport.load import load
from qexport.runtime.packed import quantized
from tests import packing, tiny


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    packing.pack_model(tiny.make("qwen3"), tmp_path / "packed", shards=2)
    return tmp_path / "packed"


def test_a_packed_model_comes_in_eval_mode_and_its_own_dtype(packed: Path) -> None:
    model = load(str(packed))
    assert not model.training
    assert model.dtype == torch.float32
    assert len(quantized(model)) == 14


def test_dtype_is_obeyed_and_scales_keep_theirs(packed: Path) -> None:
    model = load(str(packed), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, module in quantized(model).items():
        module.check(name)


def test_a_config_without_a_dtype_means_float32(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    del config["dtype"]
    (packed / "config.json").write_text(json.dumps(config))
    assert load(str(packed)).dtype == torch.float32


def test_a_wrapper_with_another_tower_loads_whole(tmp_path: Path) -> None:
    packing.pack_model(tiny.make("gemma3-wrapper"), tmp_path / "packed")
    model = load(str(tmp_path / "packed"))
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"


def test_a_dense_model_loads_too(tmp_path: Path) -> None:
    assert not quantized(load(str(tiny.save("opt", tmp_path / "dense"))))


def test_a_dense_model_is_never_filled_up_at_random(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* is missing"):
        load(str(folder))


def test_a_model_that_does_not_exist_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        load(str(tmp_path / "nowhere"))


def test_a_missing_file_is_a_checkpoint_error(packed: Path) -> None:
    (packed / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: can't be read"):
        load(str(packed))
    (packed / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read"):
        load(str(packed))


def test_a_config_of_nonsense_is_a_checkpoint_error(packed: Path) -> None:
    (packed / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "wide"}')
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load(str(packed))


def test_two_sets_of_weights_in_one_folder_are_refused(packed: Path) -> None:
    shutil.copy(packed / "model-00001-of-00002.safetensors", packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors or .*, found both"):
        load(str(packed))
    with pytest.raises(CheckpointError, match=r"model\.safetensors or .*, found both"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)


def test_pickled_weights_are_refused_with_the_next_step(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    torch.save(tiny.make("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"the weights are in pytorch_model\.bin, which can run code"):
        load(str(folder))


def test_a_folder_of_something_else_is_a_stated_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read"):
        load(str(tmp_path))
    folder = tiny.save("llama", tmp_path / "dense")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected \d+ bytes"):
        load(str(folder))


@pytest.mark.parametrize("text", ["2", "[" * 20000, '{"text_config": 3}', '{"model_type": "llama", "hidden_size": -4}'])
def test_a_config_that_is_none_is_a_stated_error(tmp_path: Path, text: str) -> None:
    folder = tiny.save("llama", tmp_path / "dense")
    (folder / "config.json").write_text(text)
    with pytest.raises(QExportError):
        load(str(folder))


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"a": {}}}', "[" * 20000])
def test_an_index_that_is_none_is_a_stated_error(packed: Path, text: str) -> None:
    (packed / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        load(str(packed))
