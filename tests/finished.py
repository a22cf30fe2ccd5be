"""A finished packed checkpoint of a tiny Llama, as the job leaves it, without the job."""

from pathlib import Path

from torch import nn

from qexport import checkpoint, container
from qexport.formats.specs import LinearSpec, to_json
from tests import tiny
from tests.packing import SPQR, UNIFORM, pack_weight


def write(folder: Path, *, base: str = "someone/tiny-llama", metadata: bool = True) -> Path:
    """Layers in two files, the rest in a third; `metadata=False` writes shards that don't explain themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.make("llama")
    model.config.architectures = [type(model).__name__]
    state = dict(model.state_dict())
    specs: dict[str, LinearSpec | None] = {}
    shapes, extents, packed = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            specs[name] = None
            if name != "lm_head":
                spec = SPQR if name.endswith("down_proj") else UNIFORM
                found = pack_weight(state.pop(f"{name}.weight"), spec)
                specs[name], shapes[name], extents[name] = spec, tuple(module.weight.shape), found.extents
                packed |= {f"{name}.{field}": tensor for field, tensor in found.tensors.items()}
    tensors = packed | state
    hashes, index = {}, {}
    prefixes = ("model.layers.0.", "model.layers.1.", "")
    for i, prefix in enumerate(prefixes):
        file = f"model-{i + 1:05d}-of-{len(prefixes):05d}.safetensors"
        own = {n: t.contiguous() for n, t in tensors.items() if n.startswith(prefix) and n not in index}
        inside = {n: (specs[n], *shape) for n, shape in shapes.items() if prefix and n.startswith(prefix)}
        table = container.shard_metadata(inside) if metadata else None
        hashes[file] = checkpoint.write_tensors(folder / file, own, table).sha256
        index |= dict.fromkeys(own, file)
    config = model.config.to_dict()
    config |= {
        "quantization_config": container.describe(specs, extents),
        "transformers_weights": container.FORGOTTEN_IMPORT,
    }
    for file, content in {
        "config.json": config,
        "model.safetensors.index.json": {"metadata": {}, "weight_map": index},
    }.items():
        hashes[file] = checkpoint.write_text(folder / file, checkpoint.dump_json(content)).sha256
    tiny.tokenizer().save_pretrained(folder)
    hashes |= {p.name: checkpoint.sha256(p) for p in folder.glob("tokenizer*")}
    method = {"name": "rtn", "clip": False}
    kinds = [(spec, [n for n in shapes if specs[n] == spec]) for spec in (UNIFORM, SPQR)]
    groups = [{"spec": to_json(spec), "method": method, "names": names} for spec, names in kinds]
    facts = {}
    for name, (n, k) in shapes.items():
        nbytes = sum(t.nbytes for field, t in packed.items() if field.startswith(f"{name}."))
        facts[name] = {"n": n, "k": k, "nbytes": nbytes, "bits_per_weight": 8 * nbytes / (n * k)}
    manifest = {
        "files": hashes,
        "modules": facts,
        "bits_per_weight": 8 * sum(f["nbytes"] for f in facts.values()) / sum(n * k for n, k in shapes.values()),
        "dense": ["lm_head"],
        "writer": "0.1.0",
        "plan": {"model": base, "commit": "0" * 40, "recipe": "rtn", "modules": groups, "calibration": None},
        "calibration": None,
    }
    checkpoint.write_text(folder / "qexport.json", checkpoint.dump_json(manifest))
    checkpoint.write_text(folder / "run.json", checkpoint.dump_json({"seconds": 1.0, "host": "somewhere"}))
    return folder
