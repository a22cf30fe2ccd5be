"""A quantized cache in a checkpoint: written, found again, damaged, interrupted, exchanged and taken away."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import qexport
from qexport import checkpoint, container, events, kv, kvfile
from qexport.calibration import Calibration
from qexport.checkpoint import Reader, read_json
from qexport.errors import CheckpointError, LayoutError, QExportError, UsageError
from qexport.formats.kv.base import KVFormat, kv_json, make_kv
from qexport.hub import push
from qexport.models import heads_of
from qexport.runtime.cache import QuantCache, kept
from qexport.verify import verify
from tests import finished, tiny
from tests.hub_server import HubServer

REPO = "tester/tiny"
IDS = torch.arange(2, 42)[None]
JOB = kv.Job(Calibration("builtin", 4, 32))


def fmt(name: str, **options: Any) -> KVFormat:
    found = make_kv(name, options)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.write(tmp_path_factory.mktemp("plain") / "packed")


@pytest.fixture(scope="module")
def cached(plain: Path) -> Path:
    out = plain.parent / "cached"
    copy(plain, out)
    kv.change(out, fmt("kvquant-3bit"), JOB)
    return out


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return copy(plain, tmp_path / "packed")


@pytest.fixture
def with_cache(cached: Path, tmp_path: Path) -> Path:
    return copy(cached, tmp_path / "packed")


def copy(source: Path, to: Path) -> Path:
    to.mkdir()
    for path in source.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(("model", "tokenizer"))}


def rehash(folder: Path) -> None:
    data = read_json(folder / "qexport.json")
    data["files"] = {name: checkpoint.sha256(folder / name) for name in data["files"] if (folder / name).exists()}
    checkpoint.write_text(folder / "qexport.json", checkpoint.dump_json(data))


def found_in(folder: Path) -> tuple[KVFormat | None, dict[int, dict[str, Tensor]]]:
    """What loading would find, without the weights."""
    own = container.parse(read_json(folder / "config.json")["quantization_config"]).kv
    return own, {} if own is None else kvfile.read(folder, own, heads_of(folder))


def complaint(folder: Path) -> str | None:
    """What verify finds wrong."""
    try:
        verify(folder)
    except QExportError as error:
        return str(error)
    return None


# ---- written and found again -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kivi-2bit", "kvquant-3bit", "sdr-4bit"])
def test_a_cache_is_added_in_place_and_generate_uses_it(name: str, folder: Path) -> None:
    before = weights(folder)
    outcome = kv.change(folder, fmt(name), JOB)
    assert weights(folder) == before
    assert outcome.kv is not None
    assert outcome.kv["name"] == name
    assert verify(folder)["kv"] == name
    assert (folder / kvfile.FILE).exists() == (name == "kvquant-3bit")
    model: Any = qexport.load(folder)
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, QuantCache)
    assert out.past_key_values.fmt == fmt(name)


def test_options_are_stored_and_found(folder: Path) -> None:
    own = fmt("kivi-4bit", bits=3, residual_window=0, group_size=8)
    kv.change(folder, own, JOB)
    model: Any = qexport.load(folder)
    cache = qexport.kv_cache(model)
    assert cache.fmt == own
    assert qexport.kv_cache(model, residual_window=16).fmt == fmt("kivi-4bit", bits=3, group_size=8, residual_window=16)


def test_a_new_process_computes_the_same(cached: Path) -> None:
    program = (
        "import sys, torch, qexport\n"
        "torch.set_num_threads(1)\n"
        "model = qexport.load(sys.argv[1])\n"
        "ids = torch.arange(2, 42)[None]\n"
        "logits = [model(ids, past_key_values=qexport.kv_cache(model)).logits.double().sum().item()]\n"
        "print(logits, model.generate(ids, max_new_tokens=6, do_sample=False).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(cached)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    model: Any = qexport.load(cached)
    with torch.no_grad():
        logits = [model(IDS, past_key_values=qexport.kv_cache(model)).logits.double().sum().item()]
    assert done.stdout.strip() == f"{logits} {model.generate(IDS, max_new_tokens=6, do_sample=False).tolist()}"


def test_a_saved_copy_has_the_cache(cached: Path, tmp_path: Path) -> None:
    model: Any = qexport.load(cached)
    model.save_pretrained(tmp_path)
    own, there = found_in(tmp_path), found_in(cached)
    assert own[0] == there[0]
    assert all(torch.equal(own[1][i][name], t) for i, found in there[1].items() for name, t in found.items())
    again: Any = qexport.load(tmp_path)
    tokens = [m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (model, again)]
    assert torch.equal(*tokens)


def test_a_base_model_loads_and_saves_the_cache_too(cached: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(cached)
    assert kept(model) is not None
    assert not hasattr(model, "generate")
    model.save_pretrained(tmp_path)
    assert found_in(tmp_path)[0] == fmt("kvquant-3bit")


def test_without_its_own_cache_a_model_is_as_before(cached: Path, tmp_path: Path) -> None:
    how = qexport.QExportConfig(own_cache=False)
    assert kept(AutoModelForCausalLM.from_pretrained(cached, quantization_config=how)) is None
    model: Any = qexport.load(cached, own_cache=False)
    assert kept(model) is None
    model.save_pretrained(tmp_path)
    assert found_in(tmp_path) == (None, {})


def test_the_manifest_says_where_the_cache_comes_from_and_is_deterministic(cached: Path, folder: Path) -> None:
    kv.change(folder, fmt("kvquant-3bit"), JOB)
    for name in ("config.json", "qexport.json", kvfile.FILE):
        assert (folder / name).read_bytes() == (cached / name).read_bytes()
    facts = read_json(folder / "qexport.json")["kv"]
    assert facts["calibration"]["source"] == "builtin"
    assert {key: facts[key] for key in ("format", "version", "options")} == kv_json(fmt("kvquant-3bit"))
    assert facts["layers"] == [0, 1]


def test_the_folders_own_tokens_are_used_unless_others_are_named(folder: Path) -> None:
    ids = torch.randint(2, 200, (6, 24), dtype=torch.int32)
    written = checkpoint.write_tensors(folder / "calibration.safetensors", {"input_ids": ids})
    data = read_json(folder / "qexport.json")
    data["files"][written.name] = written.sha256
    checkpoint.write_text(folder / "qexport.json", checkpoint.dump_json(data))
    kv.change(folder, fmt("kvquant-2bit"), kv.Job(Calibration("builtin", 4, 32)))
    origin = read_json(folder / "qexport.json")["kv"]["calibration"]
    assert (origin["source"], origin["samples"], origin["seqlen"]) == ("calibration.safetensors", 4, 24)
    kv.change(folder, fmt("kvquant-2bit"), kv.Job(Calibration("builtin", 4, 32), own_tokens=False))
    assert read_json(folder / "qexport.json")["kv"]["calibration"]["source"] == "builtin"


def test_the_packed_model_writes_its_own_text(folder: Path) -> None:
    notes: list[str] = []
    observe = lambda event: notes.append(getattr(event, "text", ""))  # noqa: E731
    kv.change(folder, fmt("kvquant-4bit"), kv.Job(Calibration("self", 2, 16)), observer=observe)
    assert any("packed model writes" in note for note in notes)
    assert verify(folder)["kv"] == "kvquant-4bit"


def test_repeating_does_nothing_and_another_request_begins_anew(cached: Path, tmp_path: Path) -> None:
    folder, notes = copy(cached, tmp_path / "packed"), []

    def observe(event: Any) -> None:
        notes.append(event)

    kv.change(folder, fmt("kvquant-3bit"), JOB, observer=observe)
    assert ["nothing to do" in note.text for note in notes] == [True]
    kv.change(folder, fmt("kvquant-3bit"), kv.Job(Calibration("builtin", 3, 32)), observer=observe)
    assert any(isinstance(event, events.Started) for event in notes)


def test_caches_of_models_without_attention_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder that qexport packed"):
        kv.change(tiny.save("llama", tmp_path / "dense"), fmt("kivi-2bit"))
    (folder / "qexport.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no qexport\.json"):
        kv.change(folder, fmt("kivi-2bit"))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2", "opt", "gpt_neox", "phi3", "gemma3-wrapper"])
def test_heads_follow_from_any_config(name: str) -> None:
    from qexport.models import attention_layers

    model = tiny.make(name)
    out = model(input_ids=IDS, use_cache=True)
    layers = out.past_key_values.layers
    found = attention_layers(model.config)
    assert [(own.heads, own.dim) for own in found.values()] == [(x.keys.shape[1], x.keys.shape[3]) for x in layers]
    assert [own.window for own in found.values()] == [getattr(x, "sliding_window", None) for x in layers]


# ---- damaged, missing, foreign, too new ----------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    reader = Reader(folder, [kvfile.FILE])
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    about = json.loads(reader.metadata[kvfile.FILE]["qexport"])
    checkpoint.write_tensors(folder / kvfile.FILE, tensors, about)


def config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = read_json(folder / "config.json")
    change(data["quantization_config"])
    checkpoint.write_text(folder / "config.json", checkpoint.dump_json(data))


K = "cache.1.k_lut"
TENSORS: list[tuple[Callable[[dict[str, Tensor]], Any], type[QExportError], str]] = [
    (lambda t: t.pop(K), LayoutError, f"{K}: is missing"),
    (lambda t: [t.pop(n) for n in list(t) if n.startswith("cache.1.")], LayoutError, r"cache\.1\.\w+: is missing"),
    (lambda t: t.update({K: t[K].flip(0)}), LayoutError, f"{K}: expected sorted numbers"),
    (lambda t: t.update({K: t[K] * torch.nan}), LayoutError, f"{K}: expected finite"),
    (lambda t: t.update({K: t[K].float()}), LayoutError, rf"{K}: expected float16 \[8\], found float32"),
    (lambda t: t.update({K: t[K][:4]}), LayoutError, rf"{K}: expected float16 \[8\], found float16 \[4\]"),
    (lambda t: t.update({"cache.1.extra": t[K]}), LayoutError, r"cache\.1\.extra: does not belong"),
    (lambda t: t.update({"cache.2.k_lut": t[K]}), CheckpointError, r"cache\.2\.k_lut: .* no layer of the model"),
    (lambda t: t.update({"cache.01.k_lut": t[K]}), CheckpointError, r"cache\.01\.k_lut: .* no layer of the model"),
    (lambda t: t.update({"lm_head.weight": t[K]}), CheckpointError, r"lm_head\.weight: .* no layer of the model"),
]


@pytest.mark.parametrize("case", TENSORS, ids=[case[2] for case in TENSORS])
def test_a_damaged_tensor_is_refused_by_its_name(case: Any, with_cache: Path) -> None:
    change, error, message = case
    edit(with_cache, change)
    rehash(with_cache)
    for check in (qexport.load, verify):
        with pytest.raises(error, match=message):
            check(with_cache)


FILES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / kvfile.FILE).unlink(), r"cache\.safetensors: missing from .*kvquant-3bit.*--kv kvquant-3bit"),
    (lambda f: (f / kvfile.FILE).write_bytes(b"short"), r"cache\.safetensors: expected a safetensors header"),
    (lambda f: kvfile.write(f / kvfile.FILE, fmt("kvquant-2bit"), {}), "was found for kvquant-2bit .* kvquant-3bit"),
    (lambda f: checkpoint.write_tensors(f / kvfile.FILE, {}, {}), r"cache\.safetensors: expected a qexport table"),
    (lambda f: config(f, lambda q: q["kv"].update(version=99)), "version 99 needs a newer qexport"),
    (lambda f: config(f, lambda q: q["kv"].update(format="turbo")), "unknown cache format 'turbo'"),
    (lambda f: config(f, lambda q: q["kv"].update(options={"bits": 77})), "does not take these options"),
    (lambda f: config(f, lambda q: q.update(kv=True)), "kv needs format, version and options"),
]


@pytest.mark.parametrize("case", FILES, ids=[case[1] for case in FILES])
def test_missing_foreign_and_too_new_things_are_refused(case: Any, with_cache: Path) -> None:
    change, message = case
    change(with_cache)
    with pytest.raises(CheckpointError, match=message):
        qexport.load(with_cache)
    with pytest.raises(CheckpointError):
        verify(with_cache)


def test_verify_finds_a_cache_that_the_manifest_does_not_know(with_cache: Path) -> None:
    data = read_json(with_cache / "qexport.json")
    checkpoint.write_text(with_cache / "qexport.json", checkpoint.dump_json({**data, "kv": None}))
    with pytest.raises(CheckpointError, match=r"qexport\.json: names the cache none, config\.json kvquant-3bit"):
        verify(with_cache)
    data["files"].pop(kvfile.FILE)
    checkpoint.write_text(with_cache / "qexport.json", checkpoint.dump_json(data))
    with pytest.raises(CheckpointError, match=r"cache\.safetensors: qexport\.json does not list it"):
        verify(with_cache)


def test_a_damaged_cache_can_be_replaced_and_removed(with_cache: Path, plain: Path) -> None:
    (with_cache / kvfile.FILE).write_bytes(b"short")
    kv.change(with_cache, fmt("kvquant-3bit"), JOB)
    assert verify(with_cache)["kv"] == "kvquant-3bit"
    kv.change(with_cache, None)
    assert verify(with_cache)["kv"] is None
    assert not (with_cache / kvfile.FILE).exists()
    assert read_json(with_cache / "config.json") == read_json(plain / "config.json")
    assert kept(qexport.load(with_cache)) is None


# ---- interrupted ---------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Die before the n-th change of the folder."""
    left = [-1]

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise _Killed
            left[0] -= 1
            return act(*args, **options)

        return call

    monkeypatch.setattr(kv, "write_text", dying(kv.write_text))
    monkeypatch.setattr(kvfile, "write", dying(kvfile.write))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    yield lambda count: left.__setitem__(0, count)
    left[0] = -1


@pytest.mark.parametrize("before", ["none", "kivi-2bit", "kvquant-3bit"])
@pytest.mark.parametrize("after", ["none", "kivi-4bit", "kvquant-3bit", "kvquant-2bit"])
def test_whenever_a_change_is_killed_the_folder_loads_and_repeating_finishes_it(
    before: str, after: str, plain: Path, cached: Path, tmp_path: Path, kill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_kv(before), make_kv(after)
    start = cached if before == "kvquant-3bit" else plain
    tensors = {i: {n: t / 2 for n, t in own.items()} for i, own in found_in(cached)[1].items()}
    if new is not None and kvfile.calibrates(new):
        levels = 2**new.bits  # type: ignore[attr-defined]
        for own in tensors.values():
            own |= {name: torch.linspace(-1, 1, levels).half() for name in ("k_lut", "v_lut")}
            if new.qnorm:  # type: ignore[attr-defined]
                own |= {name: torch.tensor([1.0, 0.0]).half() for name in ("k_qnorm", "v_qnorm")}
    monkeypatch.setattr(kv, "_calibrated", lambda *_a: (tensors, {"source": "test", "sha256": ""}))
    job = kv.Job(Calibration("builtin", 3, 32))
    for count in range(40):
        folder = copy(start, tmp_path / str(count))
        if before == "kivi-2bit":
            kv.change(folder, old)
        kill(count)
        try:
            kv.change(folder, new, job)
        except _Killed:
            kill(-1)
        else:
            break
        found, own = found_in(folder)
        assert found in (old, new)
        for name in ("config.json", "qexport.json"):
            read_json(folder / name)
        found_wrong = complaint(folder)
        assert found_wrong is None or "cache" in found_wrong or "config.json" in found_wrong
        kv.change(folder, new, job)
        assert found_in(folder)[0] == new
        assert verify(folder)["kv"] == (None if new is None else after)
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".") or p.name.endswith((".new", ".tmp"))]
    assert 3 < count < 39


def test_a_model_loads_while_its_new_cache_waits_to_be_renamed(with_cache: Path) -> None:
    (with_cache / kvfile.FILE).rename(with_cache / kvfile.PENDING)
    assert kept(qexport.load(with_cache)) is not None
    kvfile.write(with_cache / kvfile.FILE, fmt("kvquant-2bit"), {})  # the one before
    own = kept(qexport.load(with_cache))
    assert own is not None
    assert own.fmt == fmt("kvquant-3bit")
    with pytest.raises(CheckpointError, match=r"cache\.safetensors\.new: left by a job that was interrupted"):
        verify(with_cache)


def test_a_killed_calibration_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    job = kv.Job(Calibration("builtin", 48, 128))
    whole = copy(folder, tmp_path / "whole")
    kv.change(whole, fmt("kvquant-2bit"), job)
    program = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from qexport import kv\n"
        "from qexport.calibration import Calibration\n"
        "from qexport.formats.kv.base import make_kv\n"
        "torch.set_num_threads(1)\n"
        "def observe(event):\n"
        "    if type(event).__name__ == 'Advanced':\n"
        "        print(event.done, flush=True)\n"
        "        time.sleep(30 if event.done == 4 else 0)\n"
        "job = kv.Job(Calibration('builtin', 48, 128))\n"
        "kv.change(Path(sys.argv[1]), make_kv('kvquant-2bit'), job, observer=observe)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "4":
                process.send_signal(signal.SIGKILL)
                break
    assert (folder / kvfile.WORK).exists()
    assert verify(folder)["kv"] is None  # hidden, and nothing else has changed
    seen: list[Any] = []
    other: list[Any] = []
    kv.change(copy(folder, tmp_path / "other"), fmt("kvquant-2bit", sink_tokens=2), job, observer=other.append)
    assert any("begins anew" in getattr(event, "text", "") for event in other)
    kv.change(folder, fmt("kvquant-2bit"), job, observer=seen.append)
    assert any("4 batches were calibrated before" in getattr(event, "text", "") for event in seen)
    assert not (folder / kvfile.WORK).exists()
    for name in ("config.json", "qexport.json", kvfile.FILE):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


# ---- the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with HubServer() as server:
        yield server


def test_the_hub_serves_the_cache_with_the_weights(with_cache: Path, hub: HubServer, tmp_path: Path) -> None:
    found = push(with_cache, REPO, token="hf_good", endpoint=hub.url, revision="other", sleep=lambda _s: None)
    assert kvfile.FILE in found["files"]
    assert "`kvquant-3bit`" in hub.repos[REPO].branches["other"]["README.md"].decode()
    program = (
        "import sys, torch, qexport\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "from qexport.runtime.cache import kept\n"
        "torch.set_num_threads(1)\n"
        "far = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision='other', token='hf_good')\n"
        "near = qexport.load(sys.argv[2])\n"
        "assert type(far.config) is LlamaConfig, type(far.config)\n"
        "ids = torch.arange(2, 42)[None]\n"
        "one, two = (m.generate(ids, max_new_tokens=4, do_sample=False) for m in (far, near))\n"
        "assert torch.equal(one, two)\n"
        "assert kept(far).fmt == kept(near).fmt\n"
        "for layer, own in kept(near).statics.items():\n"
        "    assert all(torch.equal(t, kept(far).statics[layer][name]) for name, t in own.items())\n"
    )
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def call(home: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, REPO, str(with_cache)], env={**os.environ, **own, "HF_HOME": home},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    done = call(str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.count("GET", kvfile.FILE) + hub.count("HEAD", kvfile.FILE) > 0
    del hub.repos[REPO].branches["other"][kvfile.FILE]
    done = call(str(tmp_path / "another"))
    assert done.returncode == 1
    assert "CheckpointError: cache.safetensors: missing from" in done.stderr
