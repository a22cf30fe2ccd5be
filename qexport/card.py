"""The model card: what a directory says of itself, as Markdown. Pure: facts in, text out.

The last line carries a hash of what stands above it. A card whose text no longer fits its hash, or that has none, was
written or edited by hand, and is never overwritten.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

IMPORTED = "import"
"""The recipe of a checkpoint that another library made."""
# What the Hub calls the texts that it has: id, configuration, split.
_DATA_SETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
    "c4-new": ("allenai/c4", "en", "validation"),
}
_MARK = re.compile(r"<!-- qexport card sha256:([0-9a-f]{64}) -->\s*\Z")


@dataclass(frozen=True)
class Facts:
    """What a card states.

    Attributes:
        name: of the repository, as `from_pretrained` takes it.
        base: what the model was made from: a Hub id, or another name.
        base_on_hub: whether `base` is a Hub id.
        commit: of the base model, if known.
        recipe: name of the recipe.
        methods: distinct methods with their options, for people.
        formats: distinct formats with their options, for people.
        tags: for the Hub.
        inputs: distinct ways in which linears round their inputs, for people.
        bits_per_weight: stored bits of the quantized modules.
        bits_per_parameter: stored bits of everything.
        nbytes: of the weight files.
        modules: number of quantized modules.
        embeddings: those among them that are embeddings.
        dense: linears that stayed dense.
        calibration: one line, or None when the method needs no data.
        kv: the quantized cache and its options, for people; None if there is none.
        kv_bytes: that it stores for a token, and that float16 would.
        kv_calibration: as `calibration`, for the cache.
        writer: version of qexport that wrote the files.
        results: sound lines of results.jsonl, oldest first.
    """

    name: str
    base: str
    base_on_hub: bool
    commit: str | None
    recipe: str
    methods: Sequence[str]
    formats: Sequence[str]
    tags: Sequence[str]
    bits_per_weight: float
    bits_per_parameter: float
    nbytes: int
    modules: int
    inputs: Sequence[str] = ()
    embeddings: Sequence[str] = ()
    dense: Sequence[str] = ()
    calibration: str | None = None
    kv: str | None = None
    kv_bytes: tuple[float, float] | None = None
    kv_calibration: str | None = None
    writer: str | None = None
    results: Sequence[Mapping[str, Any]] = field(default=())


def is_generated(text: str) -> bool:
    """Whether a card is as `render` left it."""
    text = text.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(body: str) -> str:
    return hashlib.sha256(body.rstrip().encode()).hexdigest()


def render(facts: Facts) -> str:
    """The card; equal facts give equal text."""
    how = _loading(facts) + _caching(facts)
    parts = [_header(facts), _summary(facts), how, _measured(facts.results), _limits(facts.results)]
    body = "\n\n".join(part.strip() for part in parts)
    return f"{body}\n\n<!-- qexport card sha256:{_digest(body)} -->\n"


def render_export(facts: Facts, source: str, how: str, proof: Mapping[str, Any] | None) -> str:
    """The card of an export.

    Args:
        facts: of the packed checkpoint; bits are those that it stores.
        source: the library and version that the files are written for.
        how: Markdown that says how to load them.
        proof: figures of the check; see `export`. None: it was left out.
    """
    facts = replace(facts, kv=None)  # no other library has such a cache
    parts = [_header(facts), _summary(facts), how, _proven(source, proof), _measured(facts.results)]
    body = "\n\n".join(part.strip() for part in parts)
    return f"{body}\n\n<!-- qexport card sha256:{_digest(body)} -->\n"


def _proven(source: str, proof: Mapping[str, Any] | None) -> str:
    if proof is None:
        return f"## Exported\n\nWritten for {source} and **not checked** with it."
    same, allowed = f"{proof['top1']:.1%} of the first choices are the same", f"{proof['tolerance']:.0e}"
    weights = (
        f"Products of its decoded weights differ by at most {proof['weights']:.0e}. " if "weights" in proof else ""
    )
    rounded = proof.get("rounding")
    if rounded:
        weights += (
            "Both were run without rounding inputs for that. With it logits differ by "
            f"{rounded['logits']:.2f} of what the rounding itself changes, and products of single linears by at most "
            f"{rounded['products']:.2f}. "
        )
    return (
        f"## Exported\n\nWritten for {source} and loaded by it in a process of its own. Over {proof['tokens']} tokens "
        "its logits differ from those of the packed checkpoint by at most "
        f"{proof['max_difference']:.1e} of the largest logit (allowed: {allowed}), and {same}. "
        f"{weights}Bits above and the tables below are those of the packed checkpoint."
    )


def _header(facts: Facts) -> str:
    own: dict[str, Any] = {"base_model": facts.base, "base_model_relation": "quantized"} if facts.base_on_hub else {}
    found = list(_index(facts.results))
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=list(facts.tags),
        model_name=facts.name.rpartition("/")[2] if found else None, eval_results=found or None, **own,
    )  # fmt: skip
    return f"---\n{data.to_yaml().strip()}\n---"


def _index(results: Sequence[Mapping[str, Any]]) -> Iterator[EvalResult]:
    """What the Hub shows as results: of every text the perplexity and what lies between it and the original; tasks."""
    for line in _latest(results):
        details, name = line["details"], str(line["name"])
        kind, config, split = _DATA_SETS.get(name, (name, None, None))
        figures: list[tuple[str, str, Any]] = []
        if line["what"] == "perplexity":
            figures = [("perplexity", f"perplexity, {_protocol(line)}", line["figure"])]
        elif line["what"] == "fidelity":
            kl, top1 = ("kl", "KL(original || quantized), nats"), ("top1", "same first choice as the original")
            figures = [(*kl, details["kl"]["mean"]), (*top1, details["top1"]["value"])]
        elif line["what"] == "task" and details["metric"]:
            figures = [(details["metric"], f"{details['metric']}, {_amount(line)}", line["figure"])]
        for metric, spelled, value in figures:
            if value is not None:
                yield EvalResult(
                    task_type="text-generation", dataset_type=kind, dataset_name=name, dataset_config=config,
                    dataset_split=split, metric_type=metric, metric_name=spelled, metric_value=round(value, 6),
                )  # fmt: skip


def _summary(facts: Facts) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base_on_hub else f"`{facts.base}`"
    commit = f" at `{facts.commit[:12]}`" if facts.commit else ""
    dense = f"; {len(facts.dense)} linear layers stayed dense" if facts.dense else ""
    imported = facts.recipe == IMPORTED
    tables = f", {' and '.join(facts.embeddings)} among them" if facts.embeddings else ""
    rows = [
        ("base model", base + commit),
        ("recipe", f"`{facts.recipe}`"),
        ("method", "; ".join(facts.methods)),
        ("format", "; ".join(facts.formats)),
        *([("inputs", "multiplied as integers: " + "; ".join(facts.inputs))] if facts.inputs else []),
        ("bits per weight", f"{facts.bits_per_weight:.3f} ({facts.modules} quantized modules{tables}{dense})"),
        ("bits per parameter", f"{facts.bits_per_parameter:.3f} (the whole model)"),
        ("size of the weights", f"{facts.nbytes:,} bytes"),
        *_cache_rows(facts),
        ("calibration", facts.calibration or ("not recorded" if imported else "none: the method needs no data")),
    ]
    writer = f" {facts.writer}" if facts.writer else ""
    made = "quantized by another library, imported with" if imported else "quantized with"
    return (
        f"# {facts.name.rpartition('/')[2]}\n\n"
        f"{base}, {made} qexport{writer} and stored packed. Bits are stored bytes x 8 / number of weights: "
        "scales, zeros, outliers and all other tensors count.\n\n| | |\n|---|---|\n"
        + "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)
    )


def _cache_rows(facts: Facts) -> list[tuple[str, str]]:
    if facts.kv is None or facts.kv_bytes is None:
        return []
    own, whole = facts.kv_bytes
    rows = [("cache", f"{facts.kv}: {own:,.0f} bytes per token, {own / whole:.3f} of float16")]
    return rows + ([("calibration of the cache", facts.kv_calibration)] if facts.kv_calibration else [])


def _caching(facts: Facts) -> str:
    if facts.kv is None:
        return ""
    return """

Keys and values of past tokens are stored in few bits too: `model.generate` uses the cache that `config.json` names.

```python
from transformers import DynamicCache

ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=100)  # with the quantized cache
model.generate(ids, max_new_tokens=100, past_key_values=DynamicCache(config=model.config))  # with transformers' own
```

`qexport.kv_cache(model)` makes such a cache for other callers of the model."""


def _loading(facts: Facts) -> str:
    return f"""## How to load

```
pip install qexport
```

```python
import qexport  # registers the format; without it from_pretrained refuses to load these files
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(facts.name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(facts.name)})
```

The weights stay packed in memory. `qexport.json` states how every module was made and the SHA-256 of every file, which
`qexport verify` checks. `calibration.safetensors`, where there is one, holds the token ids that were used."""


def _measured(results: Sequence[Mapping[str, Any]]) -> str:
    lines = _latest(results)
    tables = [_text_table(lines), _task_table([line for line in lines if line["what"] == "task"])]
    found = [table for table in tables if table]
    if not found:
        return "## Measured\n\nNothing yet. `qexport eval` measures perplexity, fidelity to the original, and tasks."
    return "\n\n".join(["## Measured", *found])


def _latest(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest line of each text or task, protocol, device and cache, in the order of their first appearance."""
    newest: dict[str, Mapping[str, Any]] = {}
    for line in results:
        how = [line["setting"].get(key) for key in ("device", "kv")]
        newest[json.dumps([line["what"], line["name"], line["protocol"], how], sort_keys=True)] = line
    return list(newest.values())


def _text_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for each perplexity with the fidelity on the same windows, and one for each that is pooled."""
    rows: dict[str, list[Mapping[str, Any] | None]] = {}
    for line in lines:
        if line["what"] in ("perplexity", "fidelity"):
            protocol = {key: value for key, value in line["protocol"].items() if key != "against"}
            how = [line["setting"].get(key) for key in ("device", "kv")]
            row = rows.setdefault(json.dumps([line["name"], protocol, how], sort_keys=True), [None, None])
            row[line["what"] == "fidelity"] = line
    if not rows:
        return ""
    out = [
        "| text | perplexity | ln ratio to original | KL, nats | same top-1 | protocol |",
        "|---|---|---|---|---|---|",
    ]
    for measured, fidelity in rows.values():
        either = measured or fidelity
        assert either is not None
        own = fidelity["details"] if fidelity else {}
        value = f"{measured['figure']:.3f}" if measured and measured["figure"] is not None else ""
        ratio, kl = _with_error(own.get("ln_ppl_ratio")), _with_error(own.get("kl"), "mean")
        against = f", original {own['against']}" if own else ""
        spelled = f"{_protocol(either)}{against}, {str(either.get('time'))[:10]}"
        cells = [_cell(either["name"]), value, ratio, kl, _with_error(own.get("top1")), _cell(spelled)]
        out.append(f"| {' | '.join(cells)} |")
    return (
        "\n".join(out) + "\n\nKL is KL(original || quantized), mean over predicted tokens; ± is one standard error; "
        "perplexity is exp of the mean loss in nats. Figures compare only under one protocol."
    )


def _protocol(line: Mapping[str, Any]) -> str:
    own, setting = line["protocol"], line["setting"]
    where = f"{own.get('dtype')} on {setting.get('device')}"
    cache = (line["details"].get("kv") or {}).get("name")
    read = f", read through the cache {cache}" if cache else ""
    if "texts" in own:
        return f"both texts together, {where}{read}" if len(own["texts"]) == 2 else f"all together, {where}{read}"
    bos = "BOS before each window" if own.get("bos") else "no BOS before windows"
    return (
        f"{own.get('windows')} windows of {own.get('seqlen')}, stride {own.get('stride')}, "
        f"{line['details'].get('tokens')} predictions, {bos}, {where}{read}"
    )


def _task_table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| task | metric | value | documents |", "|---|---|---|---|"]
    for line in lines:
        for name, metrics in line["details"]["metrics"].items():
            for metric, value in metrics.items():
                if value is not None and "_stderr" not in metric:
                    base, slash, filtered = metric.partition("/")
                    error = metrics.get(f"{base}_stderr{slash}{filtered}")
                    cells = [_cell(name), metric, _with_error({"value": value, "se": error}), _amount(line)]
                    rows.append(f"| {' | '.join(cells)} |")
    if len(rows) == 2:
        return ""
    return "\n".join(rows) + "\n\nTasks run through lm-eval, with as many examples as the task asks for unless stated."


def _amount(line: Mapping[str, Any]) -> str:
    limit, shots = (line["protocol"].get(key) for key in ("limit", "fewshot"))
    return (f"first {limit}" if limit else "all") + (f", {shots} examples" if shots is not None else "")


def _with_error(entry: Mapping[str, Any] | None, key: str = "value") -> str:
    if not entry:
        return ""
    error = f" ± {entry['se']:.4f}" if entry.get("se") is not None else ""
    return f"{entry[key]:.4f}{error}"


def _limits(results: Sequence[Mapping[str, Any]]) -> str:
    devices = sorted({str(line["setting"].get("device")) for line in results})
    gpus = [device for device in devices if device not in ("cpu", "None")]
    if gpus:
        ran = f"Results above come from {', '.join(devices)}. On other devices these files were never run."
    else:
        ran = (
            "These files were never run on a GPU, and nothing above says how fast they are there. The GPU kernels of "
            "their formats were compared with the formats' definition in an interpreter, and compiled."
        )
    rest = "Only what the tables show was measured; licence and intended use are those of the base model."
    return f"## Limits\n\n{ran} {rest}"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
