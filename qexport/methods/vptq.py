"""VPTQ: vectors of a few rows take the nearest entry of a codebook, column by column, with error feedback."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from qexport.errors import UsageError
from qexport.formats.base import Format
from qexport.formats.vector import Vector
from qexport.methods._columns import Factor, Visit, column_loop, factor, loop_effort, plan_visit
from qexport.methods._kmeans import kmeans, kmeans_effort, search_effort
from qexport.methods._vectors import Books, Coder, Coding, coder, descend, normalisation, recentre, refit
from qexport.methods.base import Effort, Result, Stats
from qexport.schema import Extents
from qexport.statistics import Hessian, Statistic

_LLOYD = 3  # steps between two passes of the loop
_CG = 2  # steps of conjugate gradients in a round
_LIMITS = {"iterations": (1, 1000), "sample": (0, 10**6), "passes": (1, 20), "rounds": (0, 100), "tries": (1, 256)}


@dataclass(frozen=True)
class Vptq:
    """Liu et al., VPTQ, arXiv:2409.17066: k-means for a codebook, GPTQ's loop for the choice of its entries.

    Columns are normalised to w' = (w - b_j) / s_j for the codebook's sake. The error at the output is then that of w'
    with H' = S H S, so a vector of column j weighs s_j^2 H_jj in k-means. The factor of the loop belongs to H' too. It
    is U S^-1 with U that of H, both damped before the scaling, and its pivots take a scale away that the error has
    gained: the loop may as well run on the columns as they are, with U. So it does, and damping means what it means
    in GPTQ. One factor would do for all linears that share an input, but for the order of visits, which is each one's
    own; it pays more than the factor costs.

    What is ours: the order is that of s_j^2 H_jj; between `passes` of the loop, entries move to the means of the
    vectors that the loop really coded, errors of earlier columns included; then `rounds` of exact descent on
    tr(D H D^T), in turn over entries, column scales and codes. Outlier columns come last and hold what is left there.

    Attributes:
        damp: as in GPTQ.
        iterations: of k-means.
        sample: vectors an entry that k-means looks at; 0: all of them.
        passes: of the loop; with a residual codebook, so many without and with it.
        rounds: of descent after the loop.
        tries: nearest main entries that are tried, each with its nearest residual entry.
        feedback: False takes the nearest entry to each vector as it is.
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Hessian})
    permutes: ClassVar[bool] = False
    source: ClassVar[str] = "Liu et al., VPTQ, arXiv:2409.17066"

    damp: float = 0.01
    iterations: int = 12
    sample: int = 64
    passes: int = 3
    rounds: int = 4
    tries: int = 4
    feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 10:
            raise UsageError(f"method 'vptq': damp must be 0 to 10, got {self.damp}.")
        for option, (low, high) in _LIMITS.items():
            value = getattr(self, option)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"method 'vptq': {option} must be a whole number from {low} to {high}, got {value!r}.")

    def reject(self, fmt: Format) -> str | None:
        """Only codebooks of vectors will do."""
        return None if isinstance(fmt, Vector) else "it codes vectors, for which this format has no codebook"

    def expected_extents(self, fmt: Format, n: int, k: int) -> Extents:
        """None: the format says how many columns are kept."""
        return {}

    def effort(self, fmt: Format, n: int, k: int) -> Effort:
        """k-means, passes of the loop with Lloyd's steps between them, and rounds of descent."""
        assert isinstance(fmt, Vector)
        own, size = fmt.sized(n, k), n * k
        vectors = -(-n // own.vector_length) * k
        searches = [search_effort(vectors, 2**own.index_bits, k)]
        out = kmeans_effort(vectors, 2**own.index_bits, self.iterations, self.sample)
        if own.residual_bits:
            found = search_effort(self.tries * vectors, 2**own.residual_bits, k)
            searches.append(searches[0] + found + Effort(touched=10 * size, calls=14 * k))
            out += kmeans_effort(vectors, 2**own.residual_bits, self.iterations, self.sample)
        code, line = Effort(touched=5 * size, calls=9 * k), Effort(touched=3 * size, calls=22 * k)
        if not self.feedback:
            return out + code + searches[-1]
        loop = loop_effort(n, k, -1, fit=Effort(), code=Effort())
        for search in searches:
            out += self.passes * (loop + search + code) + (self.passes - 1) * line
        if not own.residual_bits:
            out += (self.passes - 1) * _LLOYD * search_effort(vectors, 2**own.index_bits, 4)
        products = Effort(flops=(6 + 2 * _CG) * n * k**2, touched=(80 + 6 * _CG) * size, calls=10 * k + 100)
        return out + self.rounds * (products + searches[-1] + code + line)

    def quantize(self, w: Tensor, stats: Stats, fmt: Format, rng: torch.Generator) -> Result:
        """One linear.

        Args:
            w: float32 [n, k].
            stats: `Hessian`, float32 [k, k].
            fmt: a `vector` format.
            rng: for k-means.

        Raises:
            CalibrationError: the damped Hessian is not positive definite.

        Cost: O(n k^2) time, and 2^index_bits n k for each search of all vectors; 8 k^2 + 24 n k bytes.
        """
        assert isinstance(fmt, Vector)
        task = _begin(w, stats[Hessian], fmt.sized(*w.shape), self.damp)
        books = self._chosen(task, rng)
        for _ in range(self.rounds):
            books = refit(task.w, task.hessian, task.coding, books, rows=w.shape[0], steps=_CG)
            descend(task.w, task.hessian, task.coding, coder(task.coding, books, tries=self.tries, again=True))
        raised = {} if task.factor.damp == self.damp else {"damp": task.factor.damp}
        return Result(_fields(task, books), None, {"dead_columns": float(task.factor.dead.sum()), **raised})

    def quantize_group(
        self, weights: Sequence[Tensor], stats: Stats, fmts: Sequence[Format], rng: torch.Generator
    ) -> list[Result]:
        """Linears that share an input, each with codebooks of its own; see `quantize`."""
        return [self.quantize(w, stats, fmt, rng) for w, fmt in zip(weights, fmts, strict=True)]

    def _chosen(self, task: "_Task", rng: torch.Generator) -> Books:
        """Codebooks after the last pass; the choice of codes is in the task's coding."""
        seen, books = torch.empty_like(task.w), cast(Books, ())
        for count in task.counts:
            rest = task.w if not books else seen - task.coding.values
            offsets = task.coding.offsets if not books else torch.zeros_like(task.coding.offsets)
            x = ((rest - offsets.unsqueeze(1)) / task.coding.scales.unsqueeze(1)).view(*task.cost.shape, -1)
            books = (*books, self._codebooks(x, task, count, rng))
            again = False
            for number in range(self.passes if self.feedback else 1):
                if number:
                    books = recentre(seen, task.loop_cost(), task.coding, books, _LLOYD)
                code = coder(task.coding, books, tries=self.tries, again=again, seen=seen)
                _run(task, code, self.feedback)
                again = self.feedback
        return books

    def _codebooks(self, x: Tensor, task: "_Task", count: int, rng: torch.Generator) -> Tensor:
        """A codebook [groups, count, v] for vectors x [k, V, v] in units of the codebook."""
        out, cost = [], task.loop_cost() if self.feedback else task.cost
        for g in range(max(task.coding.groups) + 1):
            steps = [j for j in range(task.coding.coded) if task.coding.groups[j] == g]
            if not steps:
                out.append(x.new_zeros(count, x.shape[2]))
                continue
            points, weight = x[steps].flatten(0, 1), cost[steps].flatten()
            out.append(kmeans(points, weight, count, self.iterations, self.sample, rng))
        return task.coding.rounded(torch.stack(out))


@dataclass(frozen=True)
class _Task:
    """One linear in visiting order; see `_vectors`.

    Attributes:
        w: float32 [k, m].
        rows: n.
        hessian: damped, float32 [k, k].
        visit: the order.
        factor: of the Hessian's inverse.
        coding: what is chosen.
        cost: weight of each vector in k-means, float32 [k, V].
        counts: entries of the main codebook, and of the residual one if there is any.
    """

    w: Tensor
    rows: int
    hessian: Tensor
    visit: Visit
    factor: Factor
    coding: Coding
    cost: Tensor
    counts: tuple[int, ...]

    def loop_cost(self) -> Tensor:
        """What a squared error in a vector costs in the loop: s_j^2 / U_jj^2, float32 [k, V]."""
        cost = (self.coding.scales / self.factor.upper.diagonal()).square()
        return cost.unsqueeze(1).expand_as(self.cost)


def _begin(w: Tensor, hessian: Tensor, fmt: Vector, damp: float) -> _Task:
    n, k = w.shape
    v = fmt.vector_length
    offsets, scales = normalisation(w, fmt.dtype if fmt.normalize else None)
    importance = hessian.diagonal() * (w - w.mean(0)).square().sum(0)
    outliers = importance.topk(fmt.outlier_columns).indices
    importance[outliers] = -1.0
    visit = plan_visit(importance, -1, "group")
    inverse = factor(hessian, visit, damp)
    order = visit.columns
    damped = hessian[order][:, order]
    damped.diagonal().add_(inverse.damp * (float(hessian.diagonal().mean()) or 1.0))
    damped.diagonal()[inverse.dead] += 1.0
    filled = torch.cat([w, w[-1:].expand(-n % v, -1)]).T[order].contiguous()
    size = k if fmt.group_size == -1 else fmt.group_size
    codes = torch.zeros(2 if fmt.residual_bits else 1, k, filled.shape[1] // v, dtype=torch.int64, device=w.device)
    groups = tuple((order // size).tolist())
    coding = Coding(
        scales[order], offsets[order], codes, torch.zeros_like(filled), groups, len(outliers), fmt.dtype, fmt.normalize
    )
    cost = (hessian.diagonal()[order] * coding.scales.square()).unsqueeze(1).repeat(1, codes.shape[2])
    cost[:, -1] *= 1 - (-n % v) / v
    counts = (2**fmt.index_bits, 2**fmt.residual_bits) if fmt.residual_bits else (2**fmt.index_bits,)
    return _Task(filled, n, damped, visit, inverse, coding, cost, counts)


def _run(task: _Task, code: Coder, feedback: bool) -> None:
    """Code all columns, with error feedback or without."""
    if not feedback:
        for step in range(task.w.shape[0]):
            code(step, task.w[step])
        return
    codes = torch.zeros(task.w.shape[1], 1, dtype=torch.uint8, device=task.w.device)  # `code` keeps its own

    def one(column: Tensor, _pivot: Tensor, _params: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
        return codes, code(step, column.squeeze(1)).unsqueeze(1)

    natural = torch.empty_like(task.w)
    natural[task.visit.columns] = task.w
    column_loop(natural.T, task.visit, task.factor.upper, lambda *_: {}, one)


def _fields(task: _Task, books: Books) -> dict[str, Tensor]:
    """Fields of the format, in the model's order of columns."""
    coding, order = task.coding, task.visit.columns
    back = torch.argsort(order)
    out = {"rows": torch.tensor(task.rows)}
    for name, book, codes in zip(("", "residual_"), books, coding.codes, strict=False):
        out[f"{name}indices"] = codes[back].T.int().contiguous()
        out[f"{name}codebook"] = book
    if coding.normalize:
        out["column_scales"], out["column_offsets"] = coding.scales[back], coding.offsets[back]
    if coding.kept:
        index, place = order[coding.coded :].sort()
        out["outlier_index"] = index.int()
        out["outlier_values"] = coding.values[coding.coded :][place, : task.rows].T.contiguous()
    return out


plugin = Vptq
