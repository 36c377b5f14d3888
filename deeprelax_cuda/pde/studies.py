"""The numbers behind the pictures of `deeprelax pde`: each study solves equations, and has its results as columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import minimum_filter

from deeprelax_cuda.pde.grid import Array, Grid
from deeprelax_cuda.pde.heat import heat
from deeprelax_cuda.pde.landscapes import Landscape, rugged, valleys
from deeprelax_cuda.pde.local_entropy import local_entropy
from deeprelax_cuda.pde.moreau_envelope import moreau_envelope

#: Columns of a table by name, all of one length.
Columns = dict[str, Array]


def minima(values: ArrayLike, grid: Grid) -> tuple[NDArray[np.intp], ...]:
    """Return the indices of the nodes that are lower than all their neighbours, 2 or 8 of them; none is on a wall."""
    u = grid.check("values", values)
    ring = np.ones((3,) * grid.dimensions, dtype=bool)
    ring[(1,) * grid.dimensions] = False
    lowest = u < minimum_filter(u, footprint=ring, mode="nearest")
    inside = np.zeros(grid.shape, dtype=bool)
    inside[(slice(1, -1),) * grid.dimensions] = True
    return np.nonzero(lowest & inside)


# ---- Relaxations of a function of one variable ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relaxations:
    """A function of one variable, shape (n,), and what it is relaxed to at each time, shape (times, n)."""

    grid: Grid
    beta: float
    times: tuple[float, ...]
    f: Array
    heat: Array
    local_entropy: Array
    moreau_envelope: Array

    def columns(self) -> Columns:
        """A row for each time and node."""
        count = len(self.times)
        return {
            "t": np.repeat(self.times, len(self.f)),
            "x": np.tile(self.grid.axes[0], count),
            "f": np.tile(self.f, count),
            "heat": self.heat.ravel(),
            "local_entropy": self.local_entropy.ravel(),
            "moreau_envelope": self.moreau_envelope.ravel(),
        }


def relaxations(times: Sequence[float], beta: float, *, landscape: Landscape | None = None, points: int = 1025) -> Relaxations:
    """Relax a landscape, by default `rugged`, on [-4, 4]; at t = 0 all is f itself."""
    grid = Grid(-4.0, 4.0, points)
    f = (landscape or rugged()).on(grid)
    return Relaxations(
        grid,
        beta,
        tuple(times),
        f,
        np.stack([heat(f, grid, t, beta).value if t else f for t in times]),
        np.stack([local_entropy(f, grid, t, beta).value if t else f for t in times]),
        np.stack([moreau_envelope(f, grid, t).value if t else f for t in times]),
    )


# ---- A function of two variables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """A function of two variables and its local entropy, shape ``grid.shape``."""

    grid: Grid
    t: float
    beta: float
    f: Array
    local_entropy: Array

    def columns(self) -> Columns:
        """A row for each node, with whether f and u have a minimum there (1) or not (0)."""
        x, y = self.grid.nodes
        columns = {"x": x.ravel(), "y": y.ravel()}
        for name, values in (("f", self.f), ("local_entropy", self.local_entropy)):
            minimum = np.zeros(self.grid.shape)
            minimum[minima(values, self.grid)] = 1.0
            columns |= {name: values.ravel(), f"minimum_of_{name}": minimum.ravel()}
        return columns


def plane(t: float, beta: float, *, points: int = 161) -> Plane:
    """Relax a landscape with a wide valley, a narrow hole that is deeper, and ripples."""
    grid = Grid((-2.0, -2.0), (2.0, 2.0), (points, points))
    f = valleys([(-0.7, -0.2), (1.0, 0.6)], depths=[1.0, 1.35], widths=[0.65, 0.13], ripple=0.12, length=0.5).on(grid)
    return Plane(grid, t, beta, f, local_entropy(f, grid, t, beta).value)


# ---- How minima widen -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widening:
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
        return self.lambdas[:, None] / (1.0 + self.times * self.lambdas[:, None])

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
        }


def widening(times: ArrayLike, *, points: int = 4097) -> Widening:
    """Follow three minima of different curvature through the Moreau envelopes.

    Where grad f(y) = 0, the characteristic x = y + t grad f(y) stands still: a minimum does not move, u(y, t) = f(y), and its
    curvature is lambda/(1 + t lambda), for as long as y is the minimiser of f(z) + |y - z|^2/(2t). That is until

        t = min over f(z) < f(y) of |y - z|^2/(2(f(y) - f(z))),

    when a lower valley takes over, and for ever where f(y) is lowest.
    """
    times = np.asarray(times, dtype=np.float64)
    grid = Grid(-3.0, 3.0, points)
    x = grid.axes[0]
    landscape = valleys([(-1.5,), (0.0,), (1.5,)], depths=[1.0, 0.9, 0.8], widths=[0.4, 0.12, 0.04])
    f = landscape.on(grid)
    (nodes,) = minima(f, grid)
    h = 1e-5
    lambdas = (landscape.gradient(x[nodes] + h)[0] - landscape.gradient(x[nodes] - h)[0]) / (2.0 * h)
    with np.errstate(divide="ignore"):
        reach = [np.where(f < f[node], (x - x[node]) ** 2 / (2.0 * (f[node] - f)), np.inf) for node in nodes]
    jets = [moreau_envelope(f, grid, t) for t in times]
    found = [np.isin(nodes, minima(u.value, grid)) for u in jets]
    curvatures = [np.where(there, u.hessian[0, 0, nodes], np.nan) for u, there in zip(jets, found, strict=True)]
    return Widening(
        grid, times, f, np.stack([u.value for u in jets]), nodes, lambdas, np.min(reach, axis=1), np.stack(curvatures, axis=1)
    )
