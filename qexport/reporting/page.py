"""The page: summary first, then pictures, then tables; several checkpoints are compared before each is shown."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from qexport.reporting import comparison, figures, html
from qexport.reporting.facts import Checkpoint, decibel
from qexport.reporting.html import Code
from qexport.reporting.measure import Measured
from qexport.reporting.results import Result, of

_OUTPUTS = ("output MSE>", "SQNR, dB>")
_SHOWN = 12  # figures that are not folded away
_APART = (
    "what the jobs noted is of outputs for some and of weights for others, or these are too many lines: --original "
    "MODEL measures all alike, for up to 6 checkpoints."
)
_ORIGINAL_FIGURES = "Weights and activations before and after, output errors, outliers"


def render(checkpoints: Sequence[Checkpoint], measured: Sequence[Measured | str], made: Mapping[str, Any]) -> str:
    """The document.

    Args:
        checkpoints: in the order of the command.
        measured: what the original was asked for each, or why it was not.
        made: version, time and command of this report.
    """
    style = (resources.files("qexport.reporting") / "page.css").read_text()
    known = [own if isinstance(own, Measured) else None for own in measured]
    if len(checkpoints) == 1:
        title = f"Report: {checkpoints[0].label}"
        body = f"<h1>{html.text(title)}</h1>" + _one(checkpoints[0], measured[0], "")
    else:
        title = f"Comparison of {len(checkpoints)} checkpoints"
        body = f"<h1>{title}</h1>" + _compared(checkpoints, known)
        for i, (checkpoint, own) in enumerate(zip(checkpoints, measured, strict=True)):
            body += html.details(f"{checkpoint.label}: its own report", _one(checkpoint, own, f"c{i}-"))
    command = Code(made["command"]) if made["command"] else None
    footer = f"<footer>qexport {html.text(made['version'])}, {html.text(made['time'])}: {html.text(command)}</footer>"
    return html.page(title, style, body + footer)


# ---- one checkpoint ----------------------------------------------------------------------------


def _one(checkpoint: Checkpoint, measured: Measured | str, prefix: str) -> str:
    about, known = checkpoint.about, measured if isinstance(measured, Measured) else None
    made = f"Made from {about['model'] or 'an unknown model'} by recipe {about['recipe'] or 'unknown'}."
    parts = [f'<p class="lead">{html.text(made)}</p>', _tiles(checkpoint), _results(checkpoint)]
    parts += [html.figure(picture, prefix) for picture in figures.pictures(checkpoint, known)]
    notes = [measured] if isinstance(measured, str) else measured.notes
    parts += [html.missing(_ORIGINAL_FIGURES if known is None else "Not shown", note) for note in notes]
    parts += [_kinds(checkpoint, known), _modules(checkpoint, known), _job(checkpoint, known)]
    return "\n".join(part for part in parts if part)


def _tiles(checkpoint: Checkpoint) -> str:
    about = checkpoint.about
    rows: list[tuple[str, str | None, str]] = [
        ("bits a weight", f"{about['bits_per_weight']:.3f}", f"{len(checkpoint.modules)} packed modules"),
        ("bits a parameter", _number(about["bits_per_parameter"]), "the whole model"),
        ("size", f"{about['bytes'] / 1e6:,.1f} MB", "of the weight files"),
    ]
    return html.tiles([*rows, *_quality(checkpoint.results)])


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _quality(results: Sequence[Result]) -> list[tuple[str, str | None, str]]:
    """The newest perplexity, KL, agreement and speed."""
    last = {what: found[-1] for what in ("perplexity", "fidelity", "speed") if (found := of(results, what))}
    text, kl, speed = (last.get(what) for what in ("perplexity", "fidelity", "speed"))
    top1 = kl.details.get("top1") if kl is not None else None
    share = top1.get("value") if isinstance(top1, dict) else None
    rows = [
        ("perplexity", None if text is None else f"{text.figure:.2f}", "" if text is None else text.name),
        ("KL to the original", None if kl is None else f"{kl.figure:.4f}", "" if kl is None else f"nats, {kl.name}"),
        ("same first choice", f"{share:.1%}" if isinstance(share, float) else None, "" if kl is None else kl.name),
        ("tokens a second", None if speed is None else f"{speed.figure:.1f}", "" if speed is None else speed.name),
    ]
    advice = {"perplexity": "run qexport eval DIR", "tokens a second": "qexport bench DIR measures it"}
    other = "run qexport eval DIR --against MODEL"
    return [(what, figure, note if figure is not None else advice.get(what, other)) for what, figure, note in rows]


def _results(checkpoint: Checkpoint) -> str:
    """The figures in results.jsonl, one a row."""
    if not checkpoint.results:
        return ""
    rows = [(r.what, r.name, r.figure, r.se, r.time[:10], r.how) for r in checkpoint.results]
    columns = ("measured", "of", "figure>", "standard error>", "on", "protocol")
    table = html.table(columns, rows)
    return table if len(rows) <= _SHOWN else html.details(f"{len(rows)} figures from results.jsonl", table)


def _kinds(checkpoint: Checkpoint, measured: Measured | None) -> str:
    outputs = {} if measured is None else measured.outputs
    rows = []
    for kind in dict.fromkeys(m.kind for m in checkpoint.modules):
        own = [m for m in checkpoint.modules if m.kind == kind]
        found = {key: _mean([outputs.get(m.name, {}).get(key) for m in own]) for key in ("mse", "relative")}
        nbytes, weights = sum(m.nbytes for m in own), sum(m.weights for m in own)
        row = (kind, len(own), 8 * nbytes / weights, nbytes / 1e6, _mean([m.error for m in own]))
        rows.append((*row, *_outputs(found)) if outputs else row)
    noted = "of outputs on calibration text" if checkpoint.calibrated else "of weights"
    how = f"The noted error is the mean relative squared error {noted}, from the job."
    how += " MSE and SQNR are of outputs on the original's own inputs." if outputs else ""
    columns = ("kind", "modules>", "bits>", "MB>", "noted error>", *(_OUTPUTS if outputs else ()))
    return f'<h2>By kind of module</h2><p class="how">{html.text(how)}</p>' + html.table(columns, rows)


def _outputs(found: Mapping[str, float | None]) -> tuple[float | None, float | None]:
    return found.get("mse"), decibel(found.get("relative"))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _modules(checkpoint: Checkpoint, measured: Measured | None) -> str:
    outputs = {} if measured is None else measured.outputs
    rows = [
        (m.name, m.bits, m.nbytes, m.error, *(_outputs(outputs.get(m.name, {})) if outputs else ()))
        for m in checkpoint.modules
    ]
    columns = ("module", "bits>", "bytes>", "noted error>", *(_OUTPUTS if outputs else ()))
    return html.details(f"All {len(rows)} packed modules", html.table(columns, rows))


def _job(checkpoint: Checkpoint, measured: Measured | None) -> str:
    about = checkpoint.about
    run = about["run"] or {}
    plan, origin = about["calibration"]["plan"] or {}, about["calibration"]["origin"] or {}
    calibration = ", ".join(f"{key} {value}" for key, value in {**plan, **origin}.items() if value is not None)
    versions = run.get("versions")
    command = run.get("command")
    specs = "; ".join(
        f"{s['format']} {', '.join(f'{k} {v}' for k, v in s['options'].items())} ({s['modules']} modules)"
        for s in about["specs"]
    )
    sample = None
    if measured is not None:
        t = measured.text
        sample = f"{measured.original}, {t['sequences']} x {t['seqlen']} tokens of {t['name']}"
    rows = {
        "made from": f"{about['model'] or 'unknown'}" + (f" at {about['commit']}" if about["commit"] else ""),
        "recipe": about["recipe"],
        "formats": specs,
        "cache": None if about["kv"] is None else about["kv"]["name"],
        "calibration": calibration or "none: no data was needed",
        "time of the job": None if run.get("seconds") is None else f"{run['seconds']:,.0f} s",
        "peak memory of the job": None
        if run.get("peak_rss_bytes") is None
        else f"{run['peak_rss_bytes'] / 1e6:,.0f} MB",
        "finished": run.get("finished"),
        "threads": run.get("threads"),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "written by": f"qexport {about['writer'] or 'unknown'}",
        "seed": about["seed"],
        "compared with": sample,
        "command": Code(command) if isinstance(command, str) else "not recorded",
    }
    return "<h2>How it was made</h2>" + html.facts(rows)


# ---- several -----------------------------------------------------------------------------------


def _compared(checkpoints: Sequence[Checkpoint], measured: Sequence[Measured | None]) -> str:
    shared, found = comparison.judge(checkpoints), comparison.qualities(checkpoints)
    values = shared.values if shared is not None else (None,) * len(checkpoints)
    worse = comparison.dominated([c.about["bytes"] for c in checkpoints], values)
    rows = []
    for i, checkpoint in enumerate(checkpoints):
        about, run = checkpoint.about, checkpoint.about["run"] or {}
        sizes = about["bits_per_weight"], about["bits_per_parameter"], about["bytes"] / 1e6
        rows.append((checkpoint.label, about["recipe"], *sizes, *(q.values[i] for q in found), run.get("seconds")))
    columns = ("checkpoint", "recipe", "bits a weight>", "bits a parameter>", "MB>", *(f"{q.title}>" for q in found))
    parts = [html.table((*columns, "job, s>"), rows, worse=worse)]
    picture = comparison.pareto(checkpoints, shared)
    if picture is None:
        why = "no two of these were measured by one protocol: run qexport eval DIR with equal options for each."
        parts.append(html.missing("Quality against bytes", why))
    else:
        if any(worse):
            parts.append('<p class="how">Grey: another checkpoint is at most as large and at least as good.</p>')
        lost = [c.label for c, value in zip(checkpoints, values, strict=True) if value is None]
        parts.append(html.figure(picture, "all-"))
        if lost:
            parts.append(html.missing("Not in the picture", f"{', '.join(lost)}: not measured by this protocol."))
    lines = comparison.layers(checkpoints, measured)
    parts.append(html.missing("Error by layer", _APART) if lines is None else html.figure(lines, "all-"))
    return "\n".join(parts)


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its last part, or as much of its path as tells it from the others."""
    for length in range(1, max(len(f.resolve().parts) for f in folders) + 1):
        found = ["/".join(f.resolve().parts[-length:]) for f in folders]
        if len(set(found)) == len(found):
            return found
    return [str(f) for f in folders]
