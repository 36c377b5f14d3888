"""Whether the optimizers estimate grad u: their own steps on a landscape, held against the gradients of the solvers.

One period at lr = 1 moves an anchor x by what the method takes for grad u, or for gamma*grad u. So parameters hold the nodes of a
solver's grid, each as often as noise asks for; their gradients are those of the landscape, set by hand; and after the period
`eval` shows where the anchors are. Copies of a node are independent of each other, as noise differs from element to element:
their mean is the estimate and their spread its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deeprelax_cuda import backends as serving
from deeprelax_cuda.noise import derive_seed
from deeprelax_cuda.optim import EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.pde import Grid, Jet, Landscape, double_well, heat, local_entropy, moreau_envelope, rugged
from deeprelax_cuda.pde.grid import Array

#: In standard errors, for estimates by chance.
BOUND = 4.0
#: Relative to grad u, for estimates without chance.
EXACT = 1e-6
#: Copies of an anchor in a quick verification are fewer by this factor.
QUICK = 16

_SEED = 0
#: Of `HeatSGD`, whose first gradient is at x and does not count.
_HEAT_STEPS = 65
#: Of `HamiltonJacobi`: where gamma*abs(h) <= 3/4 for the curvatures h, a step leaves 15/16 of the error or less.
_FIXED_POINT_STEPS = 400
#: One outer step takes the anchor all the way, and nothing else does.
_PERIOD: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "scoping": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Case:
    """A landscape, what is asked of it, and what is spent on the answer.

    `EntropySGD` has two errors besides chance: y begins at x and not under its stationary law, and Euler's steps have another
    stationary law than the equation, by an error of order one in inner_lr. ``inner_steps`` and ``inner_lr`` are such that what
    `entropy_sgd` leaves of them is a third of the standard error or less.

    Attributes:
        grid: of the solvers.
        anchors: for each dimension the coordinates of the anchors, which are nodes of the grid that float32 holds exactly.
        t: the time gamma of `EntropySGD` and `HeatSGD`; beta: their inverse temperature.
        inner_lr: of `EntropySGD`; inner_steps: L, its steps until y has forgotten x.
        copies: of each anchor.
        width: the time gamma of `HamiltonJacobi`, with gamma*Lip(grad f) < 1 where it goes from nodes within ``reach``.
        reach: it begins from all nodes with no coordinate beyond this.
    """

    landscape: Landscape
    grid: Grid
    anchors: tuple[tuple[float, ...], ...]
    t: float
    beta: float
    inner_lr: float
    inner_steps: int
    copies: int
    width: float
    reach: float


#: At beta = 2/3 y crosses the ripples, whose barriers are 3, within a period.
RUGGED = Case(
    rugged(),
    Grid(-4.0, 4.0, 8193),
    anchors=((-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75),),
    t=0.1,
    beta=2.0 / 3.0,
    inner_lr=0.004,
    inner_steps=250,
    copies=16_384,
    width=0.01,
    reach=2.0,
)
DOUBLE_WELL = Case(
    double_well(),
    Grid((-3.0, -3.0), (3.0, 3.0), (385, 385)),
    anchors=((-1.25, -0.5, 0.0, 0.75), (-0.75, 0.5)),
    t=0.5,
    beta=4.0,
    inner_lr=0.03,
    inner_steps=100,
    copies=32_768,
    width=0.03,
    reach=1.5,
)
CASES = (RUGGED, DOUBLE_WELL)


# ---- The estimates ----------------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where an estimate begins and what serves it: anchors, shape (dimensions, anchors), and the copies of each."""

    case: Case
    anchors: Array
    copies: int
    backend: str
    device: torch.device


def entropy_sgd(start: Start) -> Tensor:
    """Return (x - <y>)/gamma by `EntropySGD`, shape (dimensions, anchors, copies), from 9*inner_steps gradients a copy.

    With averaging="linear", m_L is the mean of y over the steps 1 to L. The mean over L + 1 to 2L, where y has forgotten that it
    began at x, is then 2 m_2L - m_L, from periods of L and of 2L steps with the same noise. Two such means at inner_lr = eta and
    eta/2, over the same time and with noises of their own, make one without the error of order eta: 2 p(eta/2) - p(eta).
    """
    case = start.case

    def settled(inner_lr: float, length: int, seed: int) -> Tensor:
        """Return x minus the mean of y over the second half of 2*length steps."""
        steps = {"inner_lr": inner_lr, "inner_momentum": 0.0, "averaging": "linear", "seed": derive_seed(_SEED, seed)}
        method = partial(EntropySGD, gamma=case.t, temperature=1.0 / case.beta, **steps)
        return 2.0 * _period(start, method, 2 * length) - _period(start, method, length)

    fine = settled(case.inner_lr / 2.0, 2 * case.inner_steps, 1)
    return (2.0 * fine - settled(case.inner_lr, case.inner_steps, 0)) / case.t


def heat_sgd(start: Start) -> Tensor:
    """Return the mean of grad f(x + sqrt(gamma/beta) z) by `HeatSGD`, shape (dimensions, anchors, copies)."""
    case = start.case
    return _period(start, partial(HeatSGD, gamma=case.t, temperature=1.0 / case.beta, seed=derive_seed(_SEED, 2)), _HEAT_STEPS)


def hamilton_jacobi(start: Start) -> Tensor:
    """Return p = grad f(x - gamma*p) by the fixed point of `HamiltonJacobi`, shape (dimensions, anchors, 1), in float64."""
    return _period(start, partial(HamiltonJacobi, gamma=start.case.width, seed=_SEED), _FIXED_POINT_STEPS, torch.float64)


def _period(start: Start, method: Callable[..., Any], length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Take a period of ``length`` steps; return what the anchors have moved by, x before minus x after, in float64."""
    case, anchors, copies, backend, device = start
    places = torch.tensor(anchors, dtype=dtype, device=device)[:, :, None].repeat(1, 1, copies)
    params = [nn.Parameter(place.clone()) for place in places]
    optimizer = method(params, inner_steps=length, backend=backend, **_PERIOD)
    for _ in range(length):
        for p, g in zip(params, case.landscape.gradient(*(p.detach() for p in params)), strict=True):
            p.grad = g
        optimizer.step()
    optimizer.eval()
    return places.double() - torch.stack([p.detach().double() for p in params])


class Method(NamedTuple):
    """An optimizer's estimate of grad u, by chance or not, the gradients it takes, and the u that it is of."""

    estimate: Callable[[Start], Tensor]
    by_chance: bool
    gradients: Callable[[Case], int]
    relaxed: Callable[[Case, Array, float], Jet]


METHODS = {
    "EntropySGD": Method(
        entropy_sgd,
        by_chance=True,
        gradients=lambda case: 9 * case.inner_steps,
        relaxed=lambda case, f, beta: local_entropy(f, case.grid, case.t, beta),
    ),
    "HeatSGD": Method(
        heat_sgd,
        by_chance=True,
        gradients=lambda case: _HEAT_STEPS,
        relaxed=lambda case, f, beta: heat(f, case.grid, case.t, beta),
    ),
    "HamiltonJacobi": Method(
        hamilton_jacobi,
        by_chance=False,
        gradients=lambda case: _FIXED_POINT_STEPS,
        relaxed=lambda case, f, _: moreau_envelope(f, case.grid, case.width),
    ),
}


# ---- The verification -------------------------------------------------------------------------------------------------------


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
        ValueError, RuntimeError: a backend that there is not, or not there.
    """
    device = torch.device(device)
    names = serving.available(device) if backends is None else list(backends)
    rows = []
    for case in cases:
        case = replace(case, copies=max(2, case.copies // QUICK)) if quick else case
        f = case.landscape.on(case.grid)
        for name, method in METHODS.items():
            compared = _Compared.of(case, method, f)
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
    def of(case: Case, method: Method, f: Array) -> _Compared:
        axes = case.grid.axes
        lines = case.anchors if method.by_chance else [axis[np.abs(axis) <= case.reach] for axis in axes]
        numbers = [np.rint((np.asarray(line) - axis[0]) / h) for line, axis, h in zip(lines, axes, case.grid.spacing, strict=True)]
        nodes = tuple(index.ravel().astype(int) for index in np.meshgrid(*numbers, indexing="ij"))

        def there(values: Array) -> Array:
            return values[(slice(None), *nodes)]

        def relaxed(beta: float) -> Array:
            return there(method.relaxed(case, f, beta).gradient)

        half = relaxed(2.0 * case.beta) if method.by_chance else None
        return _Compared(method, there(case.grid.nodes), relaxed(case.beta), half, there(case.landscape.gradient_on(case.grid)))

    def row(self, case: Case, name: str, backend: str, estimate: Array, same_bits: bool | None) -> Row:
        """Compare estimates of shape (dimensions, anchors, copies)."""
        dimensions, anchors, copies = estimate.shape
        mean = estimate.mean(axis=2)
        error = estimate.std(axis=2, ddof=1) / math.sqrt(copies) if self.method.by_chance else np.zeros_like(mean)

        def distance(gradient: Array) -> float:
            if self.method.by_chance:
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
    head = ["", "", "", "t", "beta", "anchors", "copies", "gradients", "s.e., %", "error", "bound", "from f", "from T/2", "bits", ""]
    lines = [head, *map(_line, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [*map(str.ljust, line[:3], widths[:3]), *map(str.rjust, line[3:-1], widths[3:-1]), line[-1]]
        text.append("   ".join(cells).rstrip())
    wrong = [row for row in rows if not row.agrees]
    return "\n".join([*text, "", *_legend(rows), "", f"{len(wrong)} of {len(rows)} rows do not agree" if wrong else "all agree"])


def _line(row: Row) -> list[str]:
    return [
        row.landscape,
        row.method,
        row.backend,
        f"{row.t:g}",
        f"{row.beta:.3g}",
        str(row.anchors),
        str(row.copies),
        str(row.gradients),
        f"{100.0 * row.precision:.2f}" if row.precision else "-",
        f"{row.error:.3g}",
        f"{row.bound:.3g}",
        f"{row.from_f:.3g}",
        "-" if row.from_half is None else f"{row.from_half:.3g}",
        {None: "-", True: "same", False: "differ"}[row.same_bits],
        "agrees" if row.agrees else "DOES NOT AGREE",
    ]


def _legend(rows: Sequence[Row]) -> list[str]:
    backends = {row.backend: sum(r.numbers for r in rows if r.backend == row.backend and r.precision) for row in rows}
    numbers = max(backends.values(), default=0)
    chance = -math.expm1(numbers * math.log1p(-math.erfc(BOUND / math.sqrt(2.0))))
    return [
        "error     largest distance of an estimate from the solver's grad u: in standard errors, for HamiltonJacobi relative",
        f"bound     one of {numbers} right estimates would be beyond {BOUND:g} standard errors by chance at {100.0 * chance:.1g} % of seeds",
        "from f    the same distance from grad f; from T/2: from grad u at half the temperature",
        "s.e.      of grad u, root mean squares over the anchors",
        "gradients gradient evaluations of a copy",
        "bits      of every copy's estimate, against the first backend",
    ]
