"""A checkpoint is verified to the last byte; whatever is wrong is named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport import checkpoint, container
from qexport.errors import CheckpointError, LayoutError
from qexport.verify import verify
from tests.packing import SPQR, UNIFORM, pack_weight

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHAPES = {"layers.0.up": (24, 40), "layers.0.down": (40, 24), "layers.1.up": (24, 40), "layers.1.down": (40, 24)}


def write(folder: Path, change: Callable[[dict[str, Tensor]], None] | None = None, **config: Any) -> Path:
    """Four packed linears in two files, as the job leaves them; `change` edits the tensors before they are written."""
    folder.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    specs = {name: SPQR if name.endswith("down") else UNIFORM for name in SHAPES}
    packings = {name: pack_weight(torch.randn(shape, generator=rng), specs[name]) for name, shape in SHAPES.items()}
    extents = {name: p.extents for name, p in packings.items()}
    tensors = {f"{name}.{field}": t for name, p in packings.items() for field, t in p.tensors.items()}
    tensors |= {f"layers.{i}.norm.weight": torch.ones(40) for i in range(2)}
    if change is not None:
        change(tensors)
    files = {A: "layers.0.", B: "layers.1."}
    hashes, index = {}, {}
    for file, prefix in files.items():
        inside = {name: (specs[name], *SHAPES[name]) for name in SHAPES if name.startswith(prefix)}
        own = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        hashes[file] = checkpoint.write_tensors(folder / file, own, container.shard_metadata(inside)).sha256
        index |= dict.fromkeys(own, file)
    quantization = container.describe(specs, extents) | config
    texts = {
        "config.json": {"quantization_config": quantization},
        "model.safetensors.index.json": {"weight_map": index},
    }
    for file, content in texts.items():
        hashes[file] = checkpoint.write_text(folder / file, checkpoint.dump_json(content)).sha256
    facts = {}
    for name, (n, k) in SHAPES.items():
        nbytes = sum(t.nbytes for t in packings[name].tensors.values())
        facts[name] = {"n": n, "k": k, "nbytes": nbytes, "bits_per_weight": 8 * nbytes / (n * k)}
    bits = 8 * sum(f["nbytes"] for f in facts.values()) / sum(n * k for n, k in SHAPES.values())
    said = {"files": hashes, "modules": facts, "bits_per_weight": bits}
    checkpoint.write_text(folder / "qexport.json", checkpoint.dump_json(said))
    return folder


def manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "qexport.json").read_text())
    edit(data)
    (folder / "qexport.json").write_text(json.dumps(data))


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files, as someone would who wants to deceive."""
    manifest(folder, lambda data: data.update(files={name: checkpoint.sha256(folder / name) for name in data["files"]}))


def test_untouched_checkpoint_is_in_order(tmp_path: Path) -> None:
    found = verify(write(tmp_path))
    assert (found["files"], found["modules"]) == (4, 4)
    assert found["bytes"] == sum(
        (tmp_path / name).stat().st_size for name in (A, B, "config.json", "model.safetensors.index.json")
    )
    assert 4 < found["bits_per_weight"] < 8


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(bits_per_weight=0.001), "all modules: qexport.json says bits_per_weight 0.001"),
        (lambda data: data["modules"]["layers.0.up"].update(nbytes=7), "layers.0.up: qexport.json says nbytes 7"),
        (lambda data: data["modules"]["layers.1.down"].pop("bits_per_weight"), "bits_per_weight None, the files hold"),
    ],
)
def test_bytes_and_bits_of_the_manifest_are_counted_again(tmp_path: Path, edit: Any, message: str) -> None:
    manifest(write(tmp_path), edit)
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path)


def test_progress_covers_every_file_and_module(tmp_path: Path) -> None:
    events: list[Any] = []
    verify(write(tmp_path), observer=events.append)
    assert [event.done for event in events[1:]] == list(range(1, events[0].total + 1))


@pytest.mark.parametrize("file", [A, B])
@pytest.mark.parametrize("place", [0.0, 0.03, 0.3, 0.6, 0.9999])
def test_flipped_byte_is_found_anywhere(tmp_path: Path, file: str, place: float) -> None:
    path = write(tmp_path) / file
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises((CheckpointError, LayoutError), match=r"model-0000|layers\."):
        verify(tmp_path)


def test_flipped_bytes_of_json_files_are_found(tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors.index.json"):
        path = write(tmp_path) / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x01
        path.write_bytes(data)
        with pytest.raises((CheckpointError, LayoutError)):
            verify(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path) / A
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=A):
        verify(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / B).unlink()
    with pytest.raises(CheckpointError, match=B):
        verify(tmp_path)


def test_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    (write(tmp_path) / "qexport.json").unlink()
    with pytest.raises(CheckpointError, match=r"qexport\.json: missing.*repeat its command"):
        verify(tmp_path)


def test_swapped_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / A).rename(tmp_path / "x")
    (tmp_path / B).rename(tmp_path / A)
    (tmp_path / "x").rename(tmp_path / B)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.\S+: expected in {A}, found in {B}"):
        verify(tmp_path)


def test_weights_that_the_manifest_does_not_list_are_foreign(tmp_path: Path) -> None:
    manifest(write(tmp_path), lambda data: data["files"].pop(B))
    with pytest.raises(CheckpointError, match=rf"{B}: .*does not list it"):
        verify(tmp_path)


def _edit(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value(tensors[name])

    return change


def _with(t: Tensor, where: int, value: int) -> Tensor:
    t = t.clone()
    t.view(-1)[where] = value
    return t


DOWN = "layers.0.down"
CONTENT: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a row pointer beyond the values": (f"{DOWN}.outlier_rows", lambda t: _with(t, -1, 10_000)),
    "a negative row pointer": (f"{DOWN}.outlier_rows", lambda t: _with(t, 1, -5)),
    "row pointers that go back": (f"{DOWN}.outlier_rows", lambda t: _with(t, 5, int(t[-1]))),
    "a column beyond k": (f"{DOWN}.outlier_columns", lambda t: _with(t, 0, 60_000)),
    "an infinite scale": ("layers.1.up.scales", lambda t: torch.full_like(t, float("inf"))),
}


@pytest.mark.parametrize("case", CONTENT)
def test_content_that_could_mislead_a_reader_is_refused_though_hashes_agree(tmp_path: Path, case: str) -> None:
    name, value = CONTENT[case]
    write(tmp_path, _edit(name, value))
    with pytest.raises(LayoutError, match=name.rpartition(".")[0].replace(".", r"\.")):
        verify(tmp_path)


def test_wrong_dtype_names_the_tensor(tmp_path: Path) -> None:
    write(tmp_path, _edit("layers.0.up.scales", lambda t: t.float()))
    with pytest.raises(LayoutError, match=r"layers\.0\.up\.scales: expected torch\.float16 .*found torch\.float32"):
        verify(tmp_path)


def test_wrong_shape_names_the_tensor(tmp_path: Path) -> None:
    write(tmp_path, _edit("layers.0.up.qweight", lambda t: t[:-1].contiguous()))
    with pytest.raises(LayoutError, match=r"layers\.0\.up\.qweight: expected"):
        verify(tmp_path)


def test_outliers_without_extents_in_the_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, extents={})
    with pytest.raises(LayoutError, match=r"layers\.0\.down\.outlier_"):
        verify(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path, lambda tensors: tensors.__delitem__("layers.0.up.scales"))
    with pytest.raises(LayoutError, match=r"layers\.0\.up\.scales: is missing"):
        verify(tmp_path)


def test_tensor_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    index = write(tmp_path) / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["layers.0.gate.qweight"] = A
    index.write_text(json.dumps(data))
    rehash(tmp_path)
    with pytest.raises(LayoutError, match=r"layers\.0\.gate\.qweight: missing"):
        verify(tmp_path)


def test_module_that_only_the_manifest_knows_is_named(tmp_path: Path) -> None:
    manifest(write(tmp_path), lambda data: data["modules"].update({"layers.2.up": {"n": 1, "k": 1}}))
    with pytest.raises(CheckpointError, match=r"layers\.2\.up: is missing"):
        verify(tmp_path)


def test_size_of_a_module_must_be_the_manifests(tmp_path: Path) -> None:
    manifest(write(tmp_path), lambda data: data["modules"].update({"layers.0.up": {"n": 24, "k": 41}}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.up: expected \[n, k\] = \[24, 41\]"):
        verify(tmp_path)


def test_newer_or_unknown_formats_and_containers_are_refused(tmp_path: Path) -> None:
    for change, message in [
        ({"schema": 99}, "needs a newer qexport"),
        ({"required": ["teleport"]}, "required features"),
        ({"specs": [{"format": "uniform", "version": 99, "options": {}, "input": {}}]}, "newer qexport"),
        ({"specs": [{"format": "trellis", "version": 1, "options": {}, "input": {}}]}, "unknown format 'trellis'"),
    ]:
        config: dict[str, Any] = dict(change)
        if "specs" in config:
            config["modules"] = {"layers.*.up": 0}
        with pytest.raises(CheckpointError, match=message):
            verify(write(tmp_path, **config))


def test_config_and_shard_must_describe_a_module_alike(tmp_path: Path) -> None:
    config = json.loads((write(tmp_path) / "config.json").read_text())["quantization_config"]
    spec = next(s for s in config["specs"] if s["format"] == "uniform")
    spec["options"]["group_size"] = 8
    with pytest.raises(CheckpointError, match=rf"{A}: describes layers\.0\.up otherwise than config\.json"):
        verify(write(tmp_path, specs=config["specs"]))


def test_not_a_folder_and_not_ours_are_stated(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no folder"):
        verify(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="quant_method 'qexport'"):
        verify(tmp_path)


def test_file_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    manifest(write(tmp_path), lambda data: data["files"].update({"../elsewhere": "0" * 64}))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "extra.safetensors", "tokenizer.json", "chat_template.jinja", "adapter_config.json",
     "generation_config.json", "pytorch_model.bin", "custom_generate"],
)  # fmt: skip
def test_what_a_loader_might_take_and_nobody_lists_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    checkpoint.write_tensors(tmp_path / name, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=name):
        verify(tmp_path)


def test_what_no_loader_reads_may_lie_there(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("README.md", "results.jsonl", "run.json", ".gitattributes", "notes.txt", "LICENSE"):
        (tmp_path / name).write_text("{}")
    assert verify(tmp_path)["files"] == 4
