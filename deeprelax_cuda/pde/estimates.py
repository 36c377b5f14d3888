"""The optimizers' estimates of grad u: their own steps on a landscape, through the public API.

One period at lr = 1 moves an anchor x by what the method takes for grad u, or for gamma*grad u. So parameters hold nodes of a
solver's grid, each as often as noise asks for; their gradients are those of the landscape, set by hand; and after the period
`eval` shows where the anchors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deeprelax_cuda.noise import derive_seed
from deeprelax_cuda.optim import EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.pde import Grid, Jet, Landscape, double_well, heat, local_entropy, moreau_envelope, rugged
from deeprelax_cuda.pde.grid import Array

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
