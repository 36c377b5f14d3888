"""Whether the optimizers estimate grad u: their own steps on a landscape, held against the gradients of the solvers.

One period at lr = 1 moves an anchor x by what the method takes for grad u, or for gamma*grad u. So parameters hold nodes of a
solver's grid, each as often as noise asks for; their gradients are those of the landscape, set by hand; and after the period
`eval` shows where the anchors are. Copies of a node are independent, as noise differs from element to element: their mean is
the estimate and their spread its standard error.
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
#: Of `HamiltonJacobi`: where gamma*h >= -0.8 for the curvatures h, a step leaves 0.95 of the error or less.
_FIXED_POINT_STEPS = 400
#: One outer step takes the anchor all the way, and nothing else does.
_PERIOD: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "scoping": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Case:
    """A landscape, what is asked of it, and what is spent on the answer.

    `EntropySGD` has two errors besides chance: y begins at x and not under its stationary law, and Euler's steps have another
    stationary law than the equation, by an error of order one in inner_lr. ``inner_steps`` and ``inner_lr`` are such that what
    `entropy_sgd` leaves of them is at most half a standard error.

    Attributes:
        grid: of `local_entropy` and `heat`.
        anchors: for each dimension the coordinates of the anchors, which are nodes of the grid that float32 holds exactly.
        t: the time gamma of `EntropySGD` and `HeatSGD`; beta: their inverse temperature.
        inner_lr: of `EntropySGD`; inner_steps: L, its steps until y has forgotten x.
        copies: of each anchor.
        sharp: the grid of `moreau_envelope`; reach: anchors of `HamiltonJacobi` are its nodes with no coordinate beyond this.
        width: the time gamma there, with gamma*Lip(grad f) < 1 on the box of the grid.
    """

    landscape: Landscape
    grid: Grid
    anchors: tuple[tuple[float, ...], ...]
    t: float
    beta: float
    inner_lr: float
    inner_steps: int
    copies: int
    sharp: Grid
    reach: float
    width: float


#: At beta = 2/3 y crosses the ripples, whose barriers are 3, within a period.
RUGGED = Case(
    rugged(),
    Grid(-4.0, 4.0, 1025),
    anchors=((-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75),),
    t=0.1,
    beta=2.0 / 3.0,
    inner_lr=0.004,
    inner_steps=250,
    copies=16_384,
    sharp=Grid(-2.25, 2.25, 18433),
    reach=2.0,
    width=0.01,
)
#: Of degree 2 in y, where the splines of `moreau_envelope` are exact at any spacing.
DOUBLE_WELL = Case(
    double_well(),
    Grid((-4.0, -4.0), (4.0, 4.0), (129, 129)),
    anchors=((-1.25, -0.5, 0.0, 0.75), (-0.75, 0.5)),
    t=0.5,
    beta=2.0,
    inner_lr=0.02,
    inner_steps=150,
    copies=16_384,
    sharp=Grid((-1.75, -1.75), (1.75, 1.75), (1025, 57)),
    reach=1.5,
    width=0.025,
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
    """Return (x - <y>)/gamma by `EntropySGD`, shape (dimensions, anchors, copies), from 6*inner_steps gradients a copy.

    With averaging="linear", m_L is the mean of y over the steps 1 to L. The mean over L + 1 to 2L, where y has forgotten that
    it began at x, is then 2 m_2L - m_L, from periods of L and of 2L steps with the same noise. Two such means, at inner_lr eta
    and eta/2, over the same time and with noises of their own, make one without the error of order eta: 2 p(eta/2) - p(eta).
    """
    case = start.case

    def settled(inner_lr: float, length: int, seed: int) -> Tensor:
        """Return x minus the mean of y over the second half of 2*length steps."""
        langevin: dict[str, Any] = {"inner_lr": inner_lr, "inner_momentum": 0.0, "averaging": "linear"}
        noise: dict[str, Any] = {"temperature": 1.0 / case.beta, "seed": derive_seed(_SEED, seed)}
        method = partial(EntropySGD, gamma=case.t, **langevin, **noise)
        half, whole = _periods(start, method, (length, 2 * length))
        return 2.0 * whole - half

    fine = settled(case.inner_lr / 2.0, 2 * case.inner_steps, 1)
    return (2.0 * fine - settled(case.inner_lr, case.inner_steps, 0)) / case.t


def heat_sgd(start: Start) -> Tensor:
    """Return the mean of grad f(x + sqrt(gamma/beta) z) by `HeatSGD`, shape (dimensions, anchors, copies)."""
    case = start.case
    method = partial(HeatSGD, gamma=case.t, temperature=1.0 / case.beta, seed=derive_seed(_SEED, 2))
    return _periods(start, method, (_HEAT_STEPS,))[0]


def hamilton_jacobi(start: Start) -> Tensor:
    """Return p = grad f(x - gamma*p) by the fixed point of `HamiltonJacobi`, shape (dimensions, anchors, 1), in float64."""
    method = partial(HamiltonJacobi, gamma=start.case.width, seed=_SEED)
    return _periods(start, method, (_FIXED_POINT_STEPS,), torch.float64)[0]


def _periods(
    start: Start, method: Callable[..., Any], lengths: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Take a period of each length; return what each has moved the anchors by, x before minus x after, in float64.

    The steps of a shorter period are the first ones of a longer, so all take the gradients of the last, the longest.
    """
    case, anchors, copies, backend, device = start
    x = torch.tensor(anchors, dtype=dtype, device=device)[:, :, None].repeat(1, 1, copies)
    params = [[nn.Parameter(line.clone()) for line in x] for _ in lengths]
    optimizers = [
        method(own, inner_steps=length, backend=backend, **_PERIOD) for own, length in zip(params, lengths, strict=True)
    ]
    for step in range(lengths[-1]):
        gradient = case.landscape.gradient(*(p.detach() for p in params[-1]))
        for own, optimizer, length in zip(params, optimizers, lengths, strict=True):
            if step < length:
                for p, g in zip(own, gradient, strict=True):
                    p.grad = g
                optimizer.step()
    for optimizer in optimizers:
        optimizer.eval()
    return [x.double() - torch.stack([p.detach().double() for p in own]) for own in params]


class Method(NamedTuple):
    """An optimizer's estimate of grad u, by chance or not, the gradients it takes, and the u that it is of."""

    estimate: Callable[[Start], Tensor]
    by_chance: bool
    gradients: Callable[[Case], int]
    relaxed: Callable[[Case, float], Jet]


METHODS = {
    "EntropySGD": Method(
        entropy_sgd,
        by_chance=True,
        gradients=lambda case: 6 * case.inner_steps,
        relaxed=lambda case, beta: local_entropy(case.landscape.on(case.grid), case.grid, case.t, beta),
    ),
    "HeatSGD": Method(
        heat_sgd,
        by_chance=True,
        gradients=lambda case: _HEAT_STEPS,
        relaxed=lambda case, beta: heat(case.landscape.on(case.grid), case.grid, case.t, beta),
    ),
    "HamiltonJacobi": Method(
        hamilton_jacobi,
        by_chance=False,
        gradients=lambda case: _FIXED_POINT_STEPS,
        relaxed=lambda case, beta: moreau_envelope(case.landscape.on(case.sharp), case.sharp, case.width),
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
