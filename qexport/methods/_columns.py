"""The column loop that GPTQ and its relatives share: visit columns one by one, push each one's error onto the rest.

Weights are held transposed here, [k, n] in visiting order, so that a column of W is contiguous.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qexport.errors import CalibrationError, UsageError
from qexport.formats.base import Format, ScalarFormat, ScalarGrid
from qexport.methods._clip import check_clip
from qexport.methods.base import Effort, Result

BLOCK = 128


def check_options(method: str, damp: float, order: str, clip: int) -> None:
    """Raise `UsageError` unless the options that all column methods have make sense."""
    if order not in ("group", "act", "none"):
        raise UsageError(f"method {method!r}: order must be group, act or none, got {order!r}.")
    if not 0 <= damp <= 10:
        raise UsageError(f"method {method!r}: damp must be 0 to 10, got {damp}.")
    check_clip(method, clip)


@dataclass(frozen=True)
class Visit:
    """The order in which columns are coded.

    Attributes:
        columns: int64 [k], the column of W that each step visits.
        groups: (start, stop, number) of each group in steps; `number` is its place in the stored order.
        stored: whether the stored order is the visiting order, so that the result carries a permutation.
    """

    columns: Tensor
    groups: tuple[tuple[int, int, int], ...]
    stored: bool


def plan_visit(importance: Tensor, group_size: int, order: str) -> Visit:
    """Choose the visiting order.

    Args:
        importance: diagonal of the Hessian, float32 [k].
        group_size: columns of a group; -1 for one group.
        order: `"group"` visits whole groups by mean importance and columns inside one by importance, and stores them
            where they were; `"act"` sorts all columns by importance and forms groups in that order; `"none"` goes left
            to right.
    """
    k = importance.numel()
    size = k if group_size == -1 else group_size
    starts = range(0, k, size)
    if order == "group":
        means = torch.stack([importance[j : j + size].mean() for j in starts])
        ranked = torch.argsort(means, descending=True, stable=True).tolist()
        parts = [
            g * size + torch.argsort(importance[g * size : (g + 1) * size], descending=True, stable=True)
            for g in ranked
        ]
        ends = torch.tensor([p.numel() for p in parts]).cumsum(0).tolist()
        groups = tuple((e - p.numel(), e, g) for e, p, g in zip(ends, parts, ranked, strict=True))
        return Visit(torch.cat(parts), groups, stored=False)
    columns = torch.argsort(importance, descending=True, stable=True) if order == "act" else torch.arange(k)
    groups = tuple((j, min(j + size, k), i) for i, j in enumerate(starts))
    return Visit(columns.to(importance.device), groups, stored=order == "act")


@dataclass(frozen=True)
class Factor:
    """U, upper triangular float32 [k, k] in visiting order, with U^T U the inverse of the damped Hessian."""

    upper: Tensor
    dead: Tensor
    damp: float


def factor(hessian: Tensor, visit: Visit, damp: float) -> Factor:
    """Factor the inverse of the damped Hessian, raising the damping tenfold while it is not positive definite.

    The Hessian is factored from its last column up, H = R R^T with R upper triangular, so that U = R^-1 needs one
    Cholesky factorisation and one triangular inverse, where the usual route takes two factorisations and an inverse.

    Args:
        hessian: float32 [k, k], mean over tokens.
        visit: the visiting order.
        damp: fraction of the mean diagonal that is added to the diagonal.

    Raises:
        CalibrationError: it is not positive definite even at `damp` >= 1.
    """
    k = hessian.shape[0]
    back = visit.columns.flip(0)
    h = hessian[back][:, back]
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    diagonal[dead] = 1.0
    used, added = damp, 0.0
    while True:
        diagonal.add_(used * mean - added)
        added = used * mean
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            break
        if used >= 1:
            pivot = int(visit.columns[k - int(failed)])
            raise CalibrationError(
                f"the Hessian is not positive definite at input feature {pivot}, even with damp {used:g} "
                f"(mean diagonal {mean:.3g}). Use more calibration text, or look for NaN or huge activations."
            )
        used = max(used * 10, 1e-4)
    del h, diagonal
    # In reversed order R is the lower factor, so its inverse is lower; reversing both axes makes it upper.
    inverse = torch.eye(k, device=hessian.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return Factor(inverse.flip(0, 1), dead.flip(0), used)


def blocks(visit: Visit, width: int = BLOCK) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Runs of about `width` steps, with the groups that start in each; a group never starts inside one and ends beyond.

    So a group's columns have received every earlier error when it is entered.
    """
    out: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for start, stop, number in visit.groups:
        if out and stop - out[-1][0] <= width:
            out[-1] = (out[-1][0], stop, [*out[-1][2], (start, stop, number)])
            continue
        for j in range(start, stop, width):
            out.append((j, min(j + width, stop), [(start, stop, number)] if j == start else []))
    return out


FitGroup = Callable[[Tensor, Tensor, int], dict[str, Tensor]]
"""(w [n, g], U's diagonal at its columns [g], first step) -> parameters of the group."""

CodeColumn = Callable[[Tensor, Tensor, dict[str, Tensor], int], tuple[Tensor, Tensor]]
"""(w [n, 1], U_jj, parameters, step) -> codes [n, 1] and the value [n, 1] that stands for them."""


def column_loop(
    w: Tensor, visit: Visit, upper: Tensor, fit: FitGroup, code: CodeColumn
) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Code w column by column with error feedback.

    Args:
        w: float32 [n, k], columns as in the model; not changed.
        visit: the visiting order.
        upper: U of `factor`.
        fit: called when a group is entered, with its columns as they are by then.
        code: called for each column.

    Returns:
        codes uint8 [n, k] in stored order, the groups' parameters in stored order, and the loss of each row,
        tr(dW H dW^T) of the damped Hessian, float32 [n].

    Cost: O(n k^2) time; n k floats beside the inputs.
    """
    rest = w.T[visit.columns].contiguous()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    params: list[dict[str, Tensor]] = [{} for _ in visit.groups]
    pivots = upper.diagonal()
    loss = torch.zeros(w.shape[0], device=w.device)
    current: dict[str, Tensor] = {}
    for start, stop, starting in blocks(visit):
        errors = torch.empty(stop - start, w.shape[0], device=w.device)
        entering = {s: (e, number) for s, e, number in starting}
        for j in range(start, stop):
            if j in entering:
                end, number = entering[j]
                current = fit(rest[j:end].T, pivots[j:end], j)
                params[number] = {name: p for name, p in current.items() if not name.startswith("_")}
            column = rest[j].unsqueeze(1)
            codes[j], value = (t.squeeze(1) for t in code(column, pivots[j], current, j))
            error = errors[j - start]
            torch.sub(rest[j], value, out=error).div_(pivots[j])
            rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        loss += errors.square().sum(0)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    if visit.stored:
        return codes.T.contiguous(), params, loss
    natural = torch.empty_like(codes)
    natural[visit.columns] = codes
    return natural.T.contiguous(), params, loss


FitFormat = Callable[[ScalarFormat, Tensor, Tensor, object, int], dict[str, Tensor]]
"""(format, w [n, g], cost of each column's error [g], the format's state, first stored column) -> parameters."""


def solve(
    weights: Sequence[Tensor], hessian: Tensor, fmts: Sequence[Format], *, damp: float, order: str, fit: FitFormat
) -> list[Result]:
    """Code linears that share an input with error feedback, in one loop for each distinct format.

    Args:
        weights: float32 [n_i, k].
        hessian: float32 [k, k], mean over tokens.
        fmts: any scalar grids.
        damp: see `factor`.
        order: see `plan_visit`.
        fit: chooses a group's parameters when it is entered.

    Raises:
        CalibrationError: the damped Hessian is not positive definite.
    """
    results: list[Result] = [Result({})] * len(weights)
    for fmt, members in by_format(fmts):
        visit = plan_visit(hessian.diagonal(), fmt.group_size, order)
        inverse = factor(hessian, visit, damp)
        w, ranges = stack([weights[i] for i in members], fmt.row_block)
        dead = visit.columns[inverse.dead]
        if dead.numel():
            w = w.clone()
            w[:, dead] = 0.0
        codes, params, _ = _loop_over(w, visit, inverse.upper, fmt, fit)
        raised = {} if inverse.damp == damp else {"damp": inverse.damp}
        for i, fields in zip(members, unstack(codes, params, ranges, fmt.row_block), strict=True):
            results[i] = result(fields, visit, dead_columns=float(dead.numel()), **raised)
    return results


def _loop_over(
    w: Tensor, visit: Visit, upper: Tensor, fmt: ScalarFormat, fit: FitFormat
) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    stored = w[:, visit.columns] if visit.stored else w
    costs = upper.diagonal().square().reciprocal()
    natural = costs
    if not visit.stored:
        natural = torch.empty_like(costs)
        natural[visit.columns] = costs
    state = fmt.begin(stored, natural)
    first = {start: number for start, _, number in visit.groups}
    size = w.shape[1] if fmt.group_size == -1 else fmt.group_size

    def fit_group(part: Tensor, pivots: Tensor, step: int) -> dict[str, Tensor]:
        return fit(fmt, part, pivots.square().reciprocal(), state, first[step] * size)

    def code(column: Tensor, _pivot: Tensor, params: dict[str, Tensor], _step: int) -> tuple[Tensor, Tensor]:
        codes = fmt.nearest(column, params)
        return codes, fmt.value(codes, params)

    return column_loop(w, visit, upper, fit_group, code)


def loop_effort(n: int, k: int, group_size: int, *, fit: Effort, code: Effort) -> Effort:
    """What `factor` and `column_loop` take.

    Args:
        n: rows.
        k: columns.
        group_size: columns of a group; -1 for one group.
        fit: operations of fitting one group, and how often each of its weights is touched.
        code: likewise for coding one column; what the loop itself does comes on top.
    """
    groups = 1 if group_size == -1 else -(-k // group_size)
    touched = n * k * (fit.touched + code.touched + min(k, BLOCK) / 2 + 5)
    calls = groups * fit.calls + k * (code.calls + 5)
    return Effort(4 / 3 * k**3 + n * k**2, touched, calls)


def stack(weights: Sequence[Tensor], row_block: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Members below each other, each padded with its last row to a multiple of `row_block`, and their row ranges.

    Copies of a row leave every minimum and maximum of its block as they are.
    """
    parts, ranges, start = [], [], 0
    for w in weights:
        pad = -w.shape[0] % row_block
        parts.append(torch.cat([w, w[-1:].expand(pad, -1)]) if pad else w)
        ranges.append((start, start + w.shape[0]))
        start += w.shape[0] + pad
    return (torch.cat(parts) if len(parts) > 1 else parts[0]), ranges


def unstack(
    codes: Tensor, params: Sequence[dict[str, Tensor]], ranges: Sequence[tuple[int, int]], row_block: int
) -> list[dict[str, Tensor]]:
    """Fields of each member from those of the stack; parameters have n rows, or one for each `row_block` rows."""
    joined = {name: torch.cat([p[name] for p in params], 1) for name in params[0]}
    n = codes.shape[0]
    out = []
    for start, stop in ranges:
        fields = {"codes": codes[start:stop].contiguous()}
        for name, p in joined.items():
            shared = 1 if p.shape[0] == n else row_block
            fields[name] = p[start // shared : -(-stop // shared)].contiguous()
        out.append(fields)
    return out


def by_format(fmts: Sequence[Format]) -> list[tuple[ScalarFormat, list[int]]]:
    """Members with equal formats, so that each format needs one loop."""
    kinds: dict[ScalarFormat, list[int]] = {}
    for i, fmt in enumerate(fmts):
        kinds.setdefault(scalar(fmt), []).append(i)
    return list(kinds.items())


def scalar(fmt: Format) -> ScalarFormat:
    """The format, known to be a scalar grid because `reject` let it through."""
    return cast(ScalarFormat, fmt)


def refuse_unless_scalar(fmt: Format) -> str | None:
    """Why a method that codes one weight at a time can't use a format, or None."""
    return None if isinstance(fmt, ScalarGrid) else "it codes one weight at a time"


def result(fields: dict[str, Tensor], visit: Visit, **diagnostics: float) -> Result:
    """A method's result, with the permutation if the stored order is not the model's."""
    return Result(fields, visit.columns if visit.stored else None, diagnostics)
