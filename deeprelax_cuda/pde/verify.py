"""Whether the optimizers estimate grad u: their estimates held against the gradients of the solvers.

Copies of an anchor are independent, as noise differs from element to element: their mean is the estimate and their spread its
standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deeprelax_cuda import backends as serving
from deeprelax_cuda.pde.estimates import CASES, METHODS, Case, Method, Start
from deeprelax_cuda.pde.grid import Array

#: In standard errors, for estimates by chance.
BOUND = 4.0
#: Relative to grad u, for estimates without chance.
EXACT = 1e-6
#: Copies of an anchor in a quick verification are fewer by this factor.
QUICK = 16


@dataclass(frozen=True)
class Row:
    """An optimizer's estimates on one landscape by one backend, against the gradient of the solver.

    Attributes:
        t, beta: of u; beta is inf for `HamiltonJacobi`.
        anchors, copies: where it was estimated, and how many times at each.
        gradients: gradient evaluations of a copy.
        numbers: that were compared: a coordinate of an anchor each.
        precision: the standard errors, root mean square over that of grad u; 0 without chance.
        error: the largest distance of the estimate from grad u: in standard errors, or without chance relative to grad u.
        bound: what the error must be below.
        from_f, from_half: the same distance from grad f, and from grad u at the temperature T/2, which noise of the deviation
            sqrt(inner_lr*T) would give. The second is None without chance. Where these are large, the bound excludes much.
        same_bits: whether each copy's estimate has the bits of the first backend's; None for the first.
    """

    landscape: str
    method: str
    backend: str
    t: float
    beta: float
    anchors: int
    copies: int
    gradients: int
    numbers: int
    precision: float
    error: float
    bound: float
    from_f: float
    from_half: float | None
    same_bits: bool | None

    @property
    def agrees(self) -> bool:
        """Whether the error is below the bound, and the bits are those of the first backend."""
        return self.error < self.bound and self.same_bits is not False  # a NaN is not below


def verify(
    device: torch.device | str = "cpu",
    backends: Sequence[str] | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda what: None,
    cases: Iterable[Case] = CASES,
) -> list[Row]:
    """Let every optimizer estimate grad u on the landscapes, and compare it with the solvers' grad u.

    Args:
        device: where the optimizers work; the solvers work in numpy.
        backends: names of `deeprelax_cuda.backends`; by default all that serve there.
        quick: a sixteenth of the copies, and four times the standard errors.
        progress: is told what comes next, in words, before each of the rows.
        cases: the landscapes and settings.

    Raises:
        ValueError, RuntimeError: no backend, or one that does not serve there.
    """
    device = torch.device(device)
    names = serving.available(device) if backends is None else list(backends)
    if not names:
        raise ValueError("backends: expected one name or more, got none")
    rows = []
    for case in cases:
        case = replace(case, copies=max(2, case.copies // QUICK)) if quick else case
        for name, method in METHODS.items():
            compared = _Compared.of(case, method)
            first: Tensor | None = None
            for backend in names:
                progress(f"{case.landscape.name}: {name}, {backend}")
                copies = case.copies if method.by_chance else 1
                estimate = method.estimate(Start(case, compared.anchors, copies, backend, device))
                same = None if first is None else torch.equal(estimate, first)
                first = estimate if first is None else first
                rows.append(compared.row(case, name, backend, estimate.cpu().numpy(), same))
    return rows


@dataclass(frozen=True)
class _Compared:
    """The anchors of a method on a landscape and the gradients there, each of shape (dimensions, anchors)."""

    method: Method
    anchors: Array
    relaxed: Array
    half: Array | None
    plain: Array

    @staticmethod
    def of(case: Case, method: Method) -> _Compared:
        grid = case.grid if method.by_chance else case.sharp
        lines = case.anchors if method.by_chance else [axis[np.abs(axis) <= case.reach] for axis in grid.axes]
        places = [np.searchsorted(axis, np.asarray(line)) for axis, line in zip(grid.axes, lines, strict=True)]
        nodes = np.ravel_multi_index(np.ix_(*places), grid.shape).ravel()

        def there(values: Array) -> Array:
            return values.reshape(grid.dimensions, -1)[:, nodes]

        def relaxed(beta: float) -> Array:
            return there(method.relaxed(case, beta).gradient)

        half = relaxed(2.0 * case.beta) if method.by_chance else None
        return _Compared(method, there(grid.nodes), relaxed(case.beta), half, there(case.landscape.gradient_on(grid)))

    def row(self, case: Case, name: str, backend: str, estimate: Array, same_bits: bool | None) -> Row:
        """Compare estimates of shape (dimensions, anchors, copies)."""
        dimensions, anchors, copies = estimate.shape
        mean = estimate.mean(axis=2)
        error = estimate.std(axis=2, ddof=1) / math.sqrt(copies) if self.method.by_chance else np.zeros_like(mean)

        def distance(gradient: Array) -> float:
            if self.method.by_chance:
                with np.errstate(divide="ignore"):  # copies that are all the same are not by chance, and infinitely far
                    return float(np.max(np.abs(mean - gradient) / error))
            return float(np.max(np.linalg.norm(mean - gradient, axis=0) / np.linalg.norm(gradient, axis=0)))

        return Row(
            landscape=case.landscape.name,
            method=name,
            backend=backend,
            t=case.t if self.method.by_chance else case.width,
            beta=case.beta if self.method.by_chance else math.inf,
            anchors=anchors,
            copies=copies,
            gradients=self.method.gradients(case),
            numbers=dimensions * anchors,
            precision=float(np.linalg.norm(error) / np.linalg.norm(self.relaxed)),
            error=distance(self.relaxed),
            bound=BOUND if self.method.by_chance else EXACT,
            from_f=distance(self.plain),
            from_half=None if self.half is None else distance(self.half),
            same_bits=same_bits,
        )


# ---- The table --------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return what was verified: a line for each row, what the columns mean, and whether all agree."""
    lines = [list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    names = 3  # columns of words, which begin at the left
    text = [
        "   ".join([*map(str.ljust, line[:names], widths), *map(str.rjust, line[names:], widths[names:])]).rstrip()
        for line in lines
    ]
    wrong = sum(not row.agrees for row in rows)
    verdict = f"{wrong} of {len(rows)} do not agree" if wrong else "all agree"
    return "\n".join([*text, "", *_legend(rows), "", verdict])


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "landscape": lambda row: row.landscape,
    "method": lambda row: row.method,
    "backend": lambda row: row.backend,
    "t": lambda row: f"{row.t:g}",
    "beta": lambda row: f"{row.beta:.3g}",
    "anchors": lambda row: str(row.anchors),
    "copies": lambda row: str(row.copies),
    "gradients": lambda row: str(row.gradients),
    "s.e., %": lambda row: f"{100.0 * row.precision:.2f}" if row.precision else "-",
    "error": lambda row: f"{row.error:.3g}",
    "bound": lambda row: f"{row.bound:.3g}",
    "from f": lambda row: f"{row.from_f:.3g}",
    "from T/2": lambda row: "-" if row.from_half is None else f"{row.from_half:.3g}",
    "bits": lambda row: {None: "-", True: "same", False: "differ"}[row.same_bits],
    "verdict": lambda row: "agrees" if row.agrees else "DIFFERS",
}


def _legend(rows: Sequence[Row]) -> list[str]:
    drawn = [row.numbers for row in rows if row.precision and row.backend == rows[0].backend]  # by the others the same
    chance = -math.expm1(sum(drawn) * math.log1p(-math.erfc(BOUND / math.sqrt(2.0))))
    return [
        "gradients  gradient evaluations of a copy",
        "s.e.       of the means over the copies, relative to grad u, root mean squares",
        "error      the largest distance from the solver's grad u, in s.e., or of HamiltonJacobi relative to grad u",
        f"bound      of {sum(drawn)} right numbers, one is beyond {BOUND:g} s.e. by chance for {100.0 * chance:.1g} % of seeds",
        "from f     the same distance from grad f: what the bound would say of no relaxation",
        "from T/2   the same distance from grad u at half the temperature",
        "bits       of every copy's estimate, beside those of the first backend",
    ]
