"""Results as tables. Each function takes what a command returns as JSON and gives tables and lines to print."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from qexport.recipe import TIERS

Drawings = Iterable[Table | str]


def _table(title: str, rows: Iterable[Iterable[Any]], *columns: str) -> Table:
    """A table; columns whose name ends with `>` are numbers, at the right."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_edge=False)
    for column in columns:
        number = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    return table


def _facts(title: str, facts: Mapping[str, Any]) -> Table:
    table = _table(title, facts.items(), "", "")
    table.show_header = False
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.0f}"
    return str(value)


def _bytes(count: float | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _sizes(result: Mapping[str, Any]) -> dict[str, Any]:
    """What every table of a model says of its size, in the same words."""
    return {
        "bits per weight, quantized modules": result["bits_per_weight"],
        "bits per parameter, whole model": result["bits_per_parameter"],
        "size of the files": _bytes(result["bytes"]),
    }


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# ---- one function a command --------------------------------------------------------------------


def plan(result: Mapping[str, Any]) -> Drawings:
    """The plan by kind of module, and what it will cost."""
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for name, entry in result["modules"].items():
        key = (_kind(name), f"{entry['n']} x {entry['k']}", entry["method"], entry["format"])
        kinds.setdefault(key, []).append(entry)
    rows = [
        (
            len(entries),
            *key,
            sum(e["bits_per_weight"] for e in entries) / len(entries),
            _bytes(sum(e["bytes"] for e in entries)),
        )
        for key, entries in kinds.items()
    ]
    after = f", after {', '.join(result['transforms'])}" if result["transforms"] else ""
    title = f"{result['model']}, recipe {result['recipe']}{after}"
    yield _table(title, rows, "count>", "module", "n x k", "method", "format", "bits>", "size>")
    yield _facts(
        "predicted",
        {
            **_sizes(result),
            "peak memory": _bytes(result["peak_rss_bytes"]),
            "time": _time(result["seconds"]),
        },
    )
    if result["kv"]:
        yield _planned_cache(result["kv"])
    if result["dense"]:
        yield f"dense: {_shortened(sorted({_kind(name) for name in result['dense']}))}"
    if result["towers"]:
        yield f"copied as they are: {_shortened(result['towers'])}"
    if result["calibration"]:
        yield "calibration: " + ", ".join(f"{key} {value}" for key, value in result["calibration"].items())
    yield from result["notes"]
    if "export" in result:
        yield from _outlook(result["export"])


def _cache_figures(kv: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache stores, in the same words everywhere."""
    return {
        "bits of keys and values": f"{_text(kv['bits']['keys'])} and {_text(kv['bits']['values'])}",
        "bytes per token": _cache_ratio(kv),
    }


def _cache_ratio(kv: Mapping[str, Any]) -> str:
    return f"{kv['bytes_per_token']:,.0f}, of float16 {kv['fp16_bytes_per_token']:,.0f}: {kv['ratio']:.3f}"


def _planned_cache(kv: Mapping[str, Any]) -> Table:
    """What a plan's cache stores, and what calibrating it takes."""
    facts = {"options": _pairs(kv["options"]), **_cache_figures(kv)}
    if kv["context"]:
        own, whole = _bytes(kv["context"]["bytes"]), _bytes(kv["context"]["fp16_bytes"])
        facts[f"a sequence of {kv['context']['tokens']} tokens"] = f"{own}, in float16 {whole}"
    if kv["calibration"]:
        facts["peak memory of its calibration"] = _bytes(kv["calibration"]["peak_rss_bytes"])
        facts["time of its calibration"] = _time(kv["calibration"]["seconds"])
    return _facts(f"cache {kv['name']}", facts)


def _outlook(export: Mapping[str, Any]) -> Iterable[str]:
    if not export["refused"]:
        yield f"for {export['for']}: can be exported, --to {export['to']}"
        yield from export["notes"]
        return
    yield f"for {export['for']}: --to {export['to']} will refuse it:"
    yield from (f"  {line}" for line in export["refused"])


def _shortened(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def quantized(result: Mapping[str, Any]) -> Drawings:
    """The outcome of a job."""
    kv = result.get("kv")
    yield _facts(
        "done",
        {
            "folder": result["out"],
            **_sizes(result),
            **({f"cache {kv['name']}, bytes per token": _cache_ratio(kv)} if kv else {}),
            "time": _time(result["seconds"]),
            "peak memory": _bytes(result["peak_rss_bytes"]),
        },
    )
    yield f"Next: qexport eval {result['out']} --text builtin"


def evaluation(result: Mapping[str, Any]) -> Drawings:
    """Sizes, perplexities and fidelity in one table, scores in another."""
    texts, fidelity = result["perplexity"], result["fidelity"]
    rows: list[tuple[Any, ...]] = [
        (name, value, "", "stored bytes, all tensors counted" if i == 0 else "")
        for i, (name, value) in enumerate(_sizes(result).items())
    ]
    for name, t in texts.items():
        protocol = (
            f"{t['tokens']} tokens, seqlen {t['seqlen']}, stride {t['stride']}, BOS {'yes' if t['bos'] else 'no'}"
        )
        rows.append((f"perplexity, {name}", t["value"], "", protocol))
        if fidelity and len(texts) == 1:
            original = t["value"] / math.exp(fidelity["ln_ppl_ratio"]["value"])
            rows.append((f"  of the original, {name}", original, "", "the same windows"))
    if fidelity:
        kl, top1, ratio = fidelity["kl"], fidelity["top1"], fidelity["ln_ppl_ratio"]
        tail = f"median {_text(kl['median'])}, 99 % {_text(kl['p99'])}, max {_text(kl['max'])}"
        rows += [
            ("KL(original || quantized), nats", kl["mean"], kl["se"], tail),
            ("top-1 agreement", top1["value"], top1["se"], f"{fidelity['tokens']} tokens"),
            ("ln(perplexity / original's)", ratio["value"], ratio["se"], "paired"),
        ]
    yield _table("evaluation", rows, "", "value>", "standard error>", "")
    if "needle" in result:
        yield from _needle(result["needle"])
    if "kv" in result:
        yield _through(result["kv"])
    if result["tasks"]:
        scores = [(task, *pair) for task, found in result["tasks"].items() for pair in _scores(found)]
        yield _table("tasks", scores, "task", "metric", "value>")


def _needle(found: Mapping[str, Any]) -> Drawings:
    """Scores by length and depth."""
    rows = [(length, *scores) for length, scores in zip(found["lengths"], found["score"], strict=True)]
    depths = [f"{depth:.0%} deep>" for depth in found["depths"]]
    title = f"needle in {found['text']}: part of the answer that is right, of {found['repeats']} questions each"
    yield _table(title, rows, "tokens>", *depths)
    yield f"mean {found['mean']:.3f}; heat map: {found['picture']}"


def _through(kv: Mapping[str, Any]) -> str:
    """What all of it was read through."""
    return (
        f"through the cache {kv['name']} ({_pairs(kv['options'])}): {kv['quantized_read_fraction']:.1%} of the keys "
        f"that queries read were quantized; {_bytes(kv['bytes'])} for {kv['tokens']} tokens, "
        f"{kv['bytes'] / kv['fp16_bytes']:.3f} of float16's"
    )


def _scores(scores: Any) -> list[tuple[str, Any]]:
    return list(scores.items()) if isinstance(scores, Mapping) else [("score", scores)]


def bench(result: Mapping[str, Any]) -> Drawings:
    """Tokens and prompts of all sides, the linears of one token, and what ran."""
    sides = {"packed": result["packed"], **result["dense"]}
    rows = [
        (name, s["tokens_per_second"], s["decode_ms"], s.get("decode_ratio"), s["prefill_ms"], s.get("prefill_ratio"),
         f"{s['outside_share']:.1%}", _bytes(s["weight_bytes"]))
        for name, s in sides.items()
    ]  # fmt: skip
    yield _table(
        f"{result['directory']} and dense models: {result['tokens']} tokens after {result['prompt']}, medians",
        rows,
        "side", "tokens/s>", "ms a token>", "over packed>", "ms for the prompt>", "over packed>",
        "outside block linears>", "weights>",
    )  # fmt: skip
    lines = [
        (e["count"], e["kind"], f"{e['n']} x {e['k']}", _spelled(e), e["path"], e["packed_us"],
         *e["dense_us"].values(), _bytes(e["bytes"]), e["gbps"], f"{e['bandwidth_fraction']:.1%}")
        for e in result["linears"]
    ]  # fmt: skip
    yield _table(
        "linears as one token meets them, microseconds of a call, medians",
        lines,
        "count>", "linear", "n x k", "format", "path", "packed>", *(f"{name}>" for name in result["dense"]), "stored>",
        "GB/s>", "of read>",
    )  # fmt: skip
    fast = result["fastest_loop"]
    ratios = ", ".join(f"{name} {_text(ratio)}" for name, ratio in fast["dense_ratio"].items())
    yield f"fastest loop: {_text(fast['decode_ms'])} ms a token ({fast['path']}); eager dense over it: {ratios}"
    paths = ", ".join(f"{path} {count}" for path, count in result["paths"].items())
    yield f"loop: {result['loop']}; paths of the packed side, linears: {paths}; {_conditions(result)}"
    if result["kv"]:
        kv = result["kv"]
        size = f"{_bytes(kv['bytes'])} for {kv['tokens']} tokens, {kv['bytes'] / kv['fp16_bytes']:.3f} of float16's"
        yield f"packed side through the cache {kv['name']} ({_pairs(kv['options'])}): {size}; attention: {kv['path']}"
    own, whole = _bytes(result["packed"]["peak_rss_bytes"]), _bytes(result["peak_rss_bytes"])
    yield f"peak memory of the process: packed alone {own}, with the dense models {whole}"
    if result["picture"]:
        yield f"roofline: {result['picture']}"


def _spelled(line: Mapping[str, Any]) -> str:
    """Format of a linear in few words: `uniform 4`, or the dtype of a dense one."""
    options = line["options"]
    return (
        f"{line['format']} {options.get('bits', options.get('code', ''))}".strip()
        if line["format"]
        else options["dtype"]
    )


def _conditions(result: Mapping[str, Any]) -> str:
    """Device, threads and roofs."""
    rates = ", ".join(f"{name} {_text(rate)}" for name, rate in result["roofs"]["gflops"].items())
    place = f"{result['device']}, threads {result['threads']}, activations {result['dtype']}"
    return f"{place}; the machine reads {_text(result['roofs']['read_gbps'])} GB/s and does {rates} GFLOP/s"


def kernel(result: Mapping[str, Any]) -> Drawings:
    """One linear beside dense ones."""
    rows: list[tuple[Any, ...]] = [("packed", result["packed_us"], None)]
    rows += [(name, us, result["ratio"][name]) for name, us in result["dense_us"].items()]
    yield f"{result['format']} ({_pairs(result['options'])}), {result['n']} x {result['k']}, m = {result['m']}"
    yield _table("", rows, "side", "us>", "over packed>")
    yield f"path {result['path']}: {result['reason']}"
    yield (
        f"{_bytes(result['bytes'])} stored, read at {_text(result['gbps'])} GB/s, "
        f"{result['bandwidth_fraction']:.1%} of what the machine reads; error {result['error']:.1e}"
    )
    yield _conditions(result)


def inspection(result: Mapping[str, Any]) -> Drawings:
    """What a checkpoint holds."""
    calibration = result["calibration"]["plan"] or {}
    run = result["run"] or {}
    yield _facts(
        result["directory"],
        {
            "made from": (result["model"] or "unknown") + (f" @ {result['commit']}" if result["commit"] else ""),
            "recipe": result["recipe"],
            **_sizes(result),
            "calibration": ", ".join(f"{k} {v}" for k, v in calibration.items()) or "none",
            "written by": f"qexport {result['writer'] or 'unknown'}",
            "job": f"{_time(run.get('seconds'))}, {_bytes(run.get('peak_rss_bytes'))} at most",
        },
    )
    rows = [
        (e["modules"], kind, ", ".join(e["formats"]), e["bits_per_weight"], _bytes(e["bytes"]), e["error"],
         "; ".join(e["inputs"]))
        for kind, e in result["kinds"].items()
    ]  # fmt: skip
    yield _table("modules", rows, "count>", "module", "format", "bits>", "size>", "error>", "input")
    specs = [
        (f"{s['format']} {s['version']}", ", ".join(f"{k}={v}" for k, v in s["options"].items()),
         _steps(s["input"]), s["modules"], s["bits_per_weight"])
        for s in result["specs"]
    ]  # fmt: skip
    yield _table("specs", specs, "format", "options", "input", "modules>", "bits>")
    paths = [(p["modules"], p["format"], p["device"], p["path"], p["reason"]) for p in result["paths"]]
    yield _table("how it runs here", paths, "modules>", "format", "device", "path", "because")
    yield from _multiplied(result["inputs"])
    if result["kv"]:
        yield _inspected_cache(result["kv"])
    for entry in result["chosen"]:
        options = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "name")
        yield f"chosen for the whole model: {entry.get('name')}, {options}"
    if result["dense"]:
        yield f"dense: {_shortened(sorted({_kind(name) for name in result['dense']}))}"
    if result["towers"]:
        yield f"copied as they are: {_shortened(result['towers'])}"


def _inspected_cache(kv: Mapping[str, Any]) -> Table:
    facts = {"format": f"{kv['format']} {kv['version']}", "options": _pairs(kv["options"]), **_cache_figures(kv)}
    layers = f"{len(kv['layers'])} layers"
    if kv["calibrated"]:
        origin = kv["calibration"] or {}
        amount = f"{origin.get('samples', '?')} x {origin.get('seqlen', '?')} tokens"
        layers += f", calibrated on {amount}, {origin.get('source', 'unknown')}"
    return _facts(f"cache {kv['name']}", {**facts, "layers": layers})


def _steps(steps: Mapping[str, Any]) -> str:
    """What happens to an input, in words."""
    words = [key for key in steps if key != "quant"]
    if "quant" in steps:
        options = {key: value for key, value in steps["quant"].items() if key != "name"}
        words.append(f"{steps['quant']['name']} ({_pairs(options)})")
    return ", ".join(words) or "as it is"


def _multiplied(inputs: Mapping[str, int]) -> Iterable[str]:
    """What linears multiply here, if any rounds its input."""
    if inputs["integer"] + inputs["simulated"] == 0:
        return
    text = f"inputs: {inputs['integer']} modules multiply integers, {inputs['float']} floats"
    if inputs["simulated"]:
        text += f"; SIMULATED in {inputs['simulated']}: their integers are multiplied as floats here"
    if inputs["float_in_decoding"]:
        text += f"; {inputs['float_in_decoding']} of them floats while tokens are generated one by one"
    yield text + ". Attention's own products stay floats."


def verification(result: Mapping[str, Any]) -> Drawings:
    """What was found in order."""
    yield (
        f"{result['directory']}: in order. {result['files']} files ({_bytes(result['bytes'])}), {result['modules']} "
        f"packed modules, {result['tensors']} tensors, {_text(result['bits_per_weight'])} bits per weight"
        + (f", cache {result['kv']}." if result["kv"] else ".")
    )


def upload(result: Mapping[str, Any]) -> Drawings:
    """What was sent, or would be."""
    title = "would be sent" if result["dry_run"] else "sent"
    where = f"{result['repo']} ({result['url']})" + (f", branch {result['revision']}" if result["revision"] else "")
    yield f"{title} to {where}" + (f", commit {result['commit']}" if result["commit"] else "")
    rows = [(name, _bytes(size)) for name, size in result["files"].items()]
    yield _table(f"{len(rows)} files, {_bytes(result['bytes'])}", rows, "file", "size>")
    if result["dry_run"]:
        kept = result["card"]["action"] == "keep"
        yield (
            "model card: the one that is there was edited by hand and stays"
            if kept
            else f"model card:\n{result['card']['text']}"
        )


def exported(result: Mapping[str, Any]) -> Drawings:
    """Where an export is, and how it was proven."""
    yield f"{result['out']}: {result['modules']} modules for {result['source']}, {_bytes(result['bytes'])}"
    proof = result["check"]
    if proof is None:
        yield "not checked: leave out --no-check to load it with that library and compare logits."
    else:
        difference, allowed = f"{proof['max_difference']:.1e}", f"{proof['tolerance']:.0e}"
        yield (
            f"loaded by it in a process of its own: logits differ by {difference} of the largest (allowed {allowed}), "
            f"first choice the same for {proof['top1']:.1%} of {proof['tokens']} tokens"
        )
        rounding = proof.get("rounding")
        if rounding:
            yield (
                f"that was without rounding inputs. With it logits differ by {rounding['logits']:.2f} of what the "
                f"rounding changes (allowed {rounding['allowed']:g}), products of one linear by at most "
                f"{rounding['products']:.2f}"
            )


def imported(result: Mapping[str, Any]) -> Drawings:
    """Where an import is, and what it takes."""
    yield (
        f"{result['out']}: {result['modules']} modules from {result['from']}, {result['bits_per_weight']:.3f} bits per "
        f"weight, {result['bits_per_parameter']:.3f} per parameter, {_bytes(result['bytes'])}"
    )


def methods(result: Mapping[str, Any]) -> Drawings:
    """Recipes, methods, transforms, and what works with what."""
    ordered = sorted(result["recipes"].items(), key=lambda item: TIERS.index(item[1]["tier"]))
    rows = [
        (name, r["tier"], " + ".join([*r["transforms"], r["method"]]), r["format"],
         r["input"]["name"] if r["input"] else "", r["bits_per_weight"], r["summary"])
        for name, r in ordered
    ]  # fmt: skip
    yield _table("recipes (--method)", rows, "recipe", "tier", "method", "format", "input", "bits>", "what for")
    found = result["methods"]
    yield _table(
        "methods (-s key=value)",
        ((name, _pairs(m["options"]), ", ".join(m["needs"]) or "no data", m["source"]) for name, m in found.items()),
        "method", "options", "needs", "source",
    )  # fmt: skip
    names = sorted({fmt for m in found.values() for fmt in m["formats"]})
    cells = ((name, *(m["formats"][fmt] for fmt in names)) for name, m in found.items())
    yield _table("which method works with which format", cells, "method", *names)
    made = result["transforms"]
    yield _table(
        "transforms (-t NAME), before any method",
        ((name, _pairs(t["options"]), ", ".join(t["needs"]) or "no data", t["source"]) for name, t in made.items()),
        "transform", "options", "needs", "source",
    )  # fmt: skip
    own = result["blocks"]
    yield _table(
        "after the linears of a layer (-s NAME.key=value)",
        ((name, _pairs(b["options"]), b["source"]) for name, b in own.items()), "block method", "options", "source",
    )  # fmt: skip
    working = [(m, f) for m, entry in found.items() for f in names if not entry["formats"][f].startswith("refused")]
    cells = ((m, f, *(t["pairs"][m][f] for t in made.values())) for m, f in working)
    yield _table("which pair works after which transform", cells, "method", "format", *made)


def formats(result: Mapping[str, Any]) -> Drawings:
    """Formats, and the table of formats and methods."""
    found = result["formats"]
    n, k = result["shape"]
    yield _table(
        f"formats (--format), stored bits of a {n} x {k} matrix by default options",
        ((name, f["version"], f["bits_per_weight"], _pairs(f["options"]), "yes" if f["kernel"] else "no", f["source"])
         for name, f in found.items()),
        "format", "version>", "bits>", "options", "kernel", "source",
    )  # fmt: skip
    names = sorted({method for f in found.values() for method in f["methods"]})
    cells = ((name, *(f["methods"][method] for method in names)) for name, f in found.items())
    yield _table("which format works with which method", cells, "format", *names)
    inputs = result["inputs"]
    yield _table(
        "inputs (--input NAME), multiplied as integers",
        ((name, _pairs(q["options"]), "yes" if q["calibrated"] else "no",
          ", ".join(f for f, cell in q["formats"].items() if cell == "runs"), q["source"])
         for name, q in inputs.items()),
        "input", "options", "calibrated", "formats", "source",
    )  # fmt: skip
    yield _cached(result["caches"])


def _cached(caches: Mapping[str, Any]) -> Table:
    heads = next(iter(caches.values()))["heads"]
    return _table(
        f"caches (--kv NAME), stored bits of a number with {heads[0]} heads of {heads[1]} channels",
        ((name, f"{c['format']} {c['version']}", c["bits"]["keys"], c["bits"]["values"], _pairs(c["options"]),
          "yes" if c["calibrated"] else "no", c["source"])
         for name, c in caches.items()),
        "cache", "format", "bits of keys>", "bits of values>", "options", "calibrated", "source",
    )  # fmt: skip


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
