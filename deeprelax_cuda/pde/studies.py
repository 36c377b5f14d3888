"""The numbers behind the pictures of `deeprelax pde`: each study solves equations and has its results as a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import minimum_filter

from deeprelax_cuda.pde.closed_forms import widened
from deeprelax_cuda.pde.control import control
from deeprelax_cuda.pde.grid import Array, Grid, Jet
from deeprelax_cuda.pde.heat import heat
from deeprelax_cuda.pde.landscapes import rugged, valleys
from deeprelax_cuda.pde.local_entropy import local_entropy
from deeprelax_cuda.pde.moreau_envelope import moreau_envelope

#: Columns of a table by name, all of one length.
Columns = dict[str, Array]


class Study(ABC):
    """What a picture is drawn from."""

    @abstractmethod
    def columns(self) -> Columns:
        """The numbers, as a table."""

    @abstractmethod
    def summary(self) -> str:
        """What the numbers show, in a line."""

    def tables(self) -> dict[str, Columns]:
        """All tables, by what is added to the name of the picture."""
        return {"": self.columns()}


def minima(values: ArrayLike, grid: Grid) -> tuple[NDArray[np.intp], ...]:
    """Return the indices of the nodes that are lower than all their neighbours, 2 or 8 of them; none is on a wall."""
    u = grid.check("values", values)
    ring = np.ones((3,) * grid.dimensions, dtype=bool)
    ring[(1,) * grid.dimensions] = False
    # Beyond a wall is the wall itself, which is not lower than itself.
    return np.nonzero(u < minimum_filter(u, footprint=ring, mode="nearest"))


# ---- Relaxations of a function of one variable ------------------------------------------------------------------------------


#: By name, as functions of f, the grid, t and beta.
RELAXATIONS: dict[str, Callable[[Array, Grid, float, float], Jet]] = {
    "heat": heat,
    "local_entropy": local_entropy,
    "moreau_envelope": lambda f, grid, t, beta: moreau_envelope(f, grid, t),
}


@dataclass(frozen=True)
class Relaxations(Study):
    """A function of one variable and what it is relaxed to.

    Attributes:
        times: of the relaxations; at 0 they are f.
        f: shape (n,).
        relaxed: by the name of the relaxation, shape (times, n).
    """

    grid: Grid
    beta: float
    times: tuple[float, ...]
    f: Array
    relaxed: dict[str, Array]

    def columns(self) -> Columns:
        """A row for each time and node."""
        count = len(self.times)
        columns = {
            "beta": np.full(count * len(self.f), self.beta),
            "t": np.repeat(self.times, len(self.f)),
            "x": np.tile(self.grid.axes[0], count),
            "f": np.tile(self.f, count),
        }
        return columns | {name: values.ravel() for name, values in self.relaxed.items()}

    def summary(self) -> str:
        x = self.grid.axes[0]
        lowest = (f"{name.replace('_', ' ')} {x[np.argmin(values[-1])]:.2f}" for name, values in self.relaxed.items())
        return f"lowest point of f at x = {x[np.argmin(self.f)]:.2f}; at t = {self.times[-1]:g}, {', '.join(lowest)}"


def relaxations(times: Sequence[float], beta: float, names: Sequence[str] = tuple(RELAXATIONS), *, points: int) -> Relaxations:
    """Relax the `rugged` function on [-4, 4] by the ``names`` of `RELAXATIONS`."""
    grid = Grid(-4.0, 4.0, points)
    f = rugged().on(grid)
    relaxed = {name: np.stack([RELAXATIONS[name](f, grid, t, beta).value if t else f for t in times]) for name in names}
    return Relaxations(grid, beta, tuple(times), f, relaxed)


# ---- A function of two variables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane(Study):
    """A function of two variables and its local entropy, shape ``grid.shape``."""

    grid: Grid
    t: float
    beta: float
    f: Array
    local_entropy: Array

    def columns(self) -> Columns:
        """A row for each node, with whether f and u have a minimum there (1) or not (0)."""
        x, y = self.grid.nodes
        columns = {name: np.full(x.size, value) for name, value in (("beta", self.beta), ("t", self.t))}
        columns |= {"x": x.ravel(), "y": y.ravel()}
        for name, values in (("f", self.f), ("local_entropy", self.local_entropy)):
            minimum = np.zeros(self.grid.shape)
            minimum[minima(values, self.grid)] = 1.0
            columns |= {name: values.ravel(), f"minimum_of_{name}": minimum.ravel()}
        return columns

    def summary(self) -> str:
        x, y = self.grid.nodes
        parts = []
        for name, values in (("f", self.f), ("local entropy", self.local_entropy)):
            count, lowest = len(minima(values, self.grid)[0]), np.unravel_index(np.argmin(values), values.shape)
            parts.append(f"{name} has {count} minima, the lowest {values[lowest]:.3f} at ({x[lowest]:.2f}, {y[lowest]:.2f})")
        return "; ".join(parts)


def plane(t: float, beta: float, *, points: int) -> Plane:
    """Relax a landscape with a wide valley, a narrow hole that is deeper, and ripples."""
    grid = Grid((-1.75, -1.75), (1.75, 1.75), (points, points))  # walls on ridges of the ripples
    f = valleys([(-0.5, 0.25), (1.0, -1.0)], depths=[1.0, 1.3], widths=[0.6, 0.13], ripple=0.1, length=0.5).on(grid)
    return Plane(grid, t, beta, f, local_entropy(f, grid, t, beta).value)


# ---- SGD and controlled SGD -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steering(Study):
    """SGD's SDE on a loss V from one start, and the same under its optimal control.

    Attributes:
        start: where both begin.
        times: s, shape (times,).
        loss: V, shape (n,).
        sgd, controlled, alpha: the densities and the control at each time, shape (times, n).
        loss_of_sgd, loss_of_controlled: E V(x(s)), shape (times,).
        effort: 1/2 E int |alpha|^2 from 0 to s, shape (times,).
    """

    grid: Grid
    beta: float
    start: float
    times: Array
    loss: Array
    sgd: Array
    controlled: Array
    alpha: Array
    loss_of_sgd: Array
    loss_of_controlled: Array
    effort: Array

    def columns(self) -> Columns:
        """A row for each time and node."""
        n = len(self.loss)
        return {
            "beta": np.full(n * len(self.times), self.beta),
            "s": np.repeat(self.times, n),
            "x": np.tile(self.grid.axes[0], len(self.times)),
            "V": np.tile(self.loss, len(self.times)),
            "density_sgd": self.sgd.ravel(),
            "density_controlled": self.controlled.ravel(),
            "alpha": self.alpha.ravel(),
            "E_V_sgd": np.repeat(self.loss_of_sgd, n),
            "E_V_controlled": np.repeat(self.loss_of_controlled, n),
            "effort": np.repeat(self.effort, n),
        }

    def summary(self) -> str:
        sgd, controlled, effort = self.loss_of_sgd[-1], self.loss_of_controlled[-1], self.effort[-1]
        return f"E V of SGD {sgd:.2f}, of controlled SGD {controlled:.2f} + effort {effort:.2f} = {controlled + effort:.2f}"


def steering(
    duration: float, beta: float, start: float, *, points: int, steps: int, shown: int = 40, every: int = 1
) -> Steering:
    """Run dx = -grad V ds - alpha ds + beta^(-1/2) dW for a rugged V, with alpha = 0 and with the optimal alpha.

    Kept are ``shown`` of the steps and each ``every``-th of the points, which are 1 more than a multiple of that.
    """
    grid = Grid(-2.5, 2.5, points)
    landscape = rugged(ripple=0.6, noise=0.2, seed=7)
    loss = landscape.on(grid)
    bump = np.exp(-0.5 * ((grid.axes[0] - start) / (3.0 * grid.spacing[0])) ** 2)
    made = control(loss, bump, grid, duration, beta, drift=-landscape.gradient_on(grid), steps=steps)
    at = np.linspace(0, steps, shown + 1).astype(int)
    power = (made.controlled * made.alpha[:, 0] ** 2 / 2.0) @ grid.weights
    effort = np.concatenate([[0.0], np.cumsum(power[1:])]) * (duration / steps)
    sgd, controlled = made.uncontrolled[at], made.controlled[at]
    mean = grid.weights * loss
    kept = slice(None, None, every)
    return Steering(
        grid=Grid(grid.lower, grid.upper, len(loss[kept])),
        beta=beta,
        start=start,
        times=made.times[at],
        loss=loss[kept],
        sgd=sgd[:, kept],
        controlled=controlled[:, kept],
        alpha=made.alpha[at, 0][:, kept],
        loss_of_sgd=sgd @ mean,
        loss_of_controlled=controlled @ mean,
        effort=effort[at],
    )


# ---- How minima widen -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widening(Study):
    """Minima of a function and of its Moreau envelopes.

    Attributes:
        times: shape (times,).
        f: shape (n,).
        envelopes: u at each time, shape (times, n).
        nodes: of the minima of f, shape (minima,).
        lambdas: curvatures of f there, shape (minima,).
        ends: when each stops to be a minimum of u, infinity for the global one, shape (minima,).
        curvatures: of u there, not a number where u has no minimum there any more, shape (minima, times).
    """

    grid: Grid
    times: Array
    f: Array
    envelopes: Array
    nodes: NDArray[np.intp]
    lambdas: Array
    ends: Array
    curvatures: Array

    def predicted(self) -> Array:
        """lambda/(1 + t lambda), shape (minima, times)."""
        return np.stack([widened(self.lambdas, t) for t in self.times], axis=1)

    def columns(self) -> Columns:
        """A row for each minimum of u at each time."""
        there = np.isfinite(self.curvatures)
        minimum, time = np.nonzero(there)
        return {
            "x": self.grid.axes[0][self.nodes[minimum]],
            "lambda": self.lambdas[minimum],
            "t": self.times[time],
            "curvature": self.curvatures[there],
            "lambda/(1+t*lambda)": self.predicted()[there],
            "end": self.ends[minimum],
        }

    def tables(self) -> dict[str, Columns]:
        """Beside the minima, f and its envelopes: a row for each time and node."""
        count, n = self.envelopes.shape
        lines = {"t": np.repeat(self.times, n), "x": np.tile(self.grid.axes[0], count), "f": np.tile(self.f, count)}
        shown = {name: line.reshape(count, n)[::5, ::4].ravel() for name, line in (lines | {"u": self.envelopes}).items()}
        return {"": self.columns(), "-envelopes": shown}

    def error(self) -> float:
        """The largest relative error of a curvature."""
        return float(np.nanmax(np.abs(self.curvatures / self.predicted() - 1.0)))

    def summary(self) -> str:
        ends = ", ".join(f"{end:.3g}" for end in np.sort(self.ends[np.isfinite(self.ends)]))
        law = f"curvatures are within {100.0 * self.error():.2g} % of lambda/(1 + t lambda)"
        return f"{law}; the lowest minimum of f stays, the others go at t = {ends}"


def widening(times: ArrayLike, *, points: int) -> Widening:
    """Follow three minima of different curvature through the Moreau envelopes.

    Where grad f(y) = 0, the characteristic x = y + t grad f(y) stands still: a minimum does not move, u(y, t) = f(y), and its
    curvature is lambda/(1 + t lambda), for as long as y is the minimiser of f(z) + |y - z|^2/(2t). That is until

        t = min over f(z) < f(y) of |y - z|^2/(2(f(y) - f(z))),

    when a lower valley takes over, and for ever where f(y) is lowest.
    """
    times = np.asarray(times, dtype=np.float64)
    grid = Grid(-2.0, 2.0, points)
    x = grid.axes[0]
    landscape = valleys([(-1.0,), (0.1,), (0.5,)], depths=[2.0, 1.0, 0.5], widths=[0.4, 0.1, 0.025])
    f = landscape.on(grid)
    (nodes,) = minima(f, grid)
    h = 1e-5
    lambdas = (landscape.gradient(x[nodes] + h)[0] - landscape.gradient(x[nodes] - h)[0]) / (2.0 * h)
    ends = [np.min((x - x[y])[f < f[y]] ** 2 / (2.0 * (f[y] - f[f < f[y]])), initial=np.inf) for y in nodes]
    jets = [moreau_envelope(f, grid, t) for t in times]
    found = [np.isin(nodes, minima(u.value, grid)) for u in jets]
    curvatures = [np.where(there, u.hessian[0, 0, nodes], np.nan) for u, there in zip(jets, found, strict=True)]
    envelopes = np.stack([u.value for u in jets])
    return Widening(grid, times, f, envelopes, nodes, lambdas, np.array(ends), np.stack(curvatures, axis=1))
