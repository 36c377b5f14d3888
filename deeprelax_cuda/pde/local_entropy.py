"""The local entropy, by the transformation of Hopf and Cole: a Gaussian average of exp(-beta f), taken in logarithms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive

#: Numbers of a block of the kernel's matrix that are worked on at once: 16 MiB in float64.
BLOCK = 2**21


def local_entropy(f: ArrayLike, grid: Grid, t: float, beta: float) -> Jet:
    """Return the local entropy of f, which solves the viscous Hamilton-Jacobi equation, with its gradient and Hessian.

        u(x, t) = -(1/beta) log (G_{t/beta} * exp(-beta f))(x)          G_s the Gaussian density of variance s
        u_t = -|grad u|^2/2 + Lap u/(2 beta),  u(x, 0) = f(x)
        grad u = (x - <y>)/t,  Hess u = I/t - (beta/t^2) Cov(y)         under rho(y; x) ~ exp(-beta f(y) - beta |x - y|^2/(2t))

    The integrals are trapezoidal sums over the nodes and their mirror images beyond the walls, weights normalised to 1, so that
    u is exact for constants, monotone in f, and between the minimum of f and its Gaussian average. They converge faster than
    any power of the spacing h once rho is resolved (its standard deviation is h or more), walls aside where the slope of f is
    not 0: there order 2. As 1/beta goes to 0 the value becomes the minimum over the nodes, stable at any temperature and at
    most (1/t + C) h^2/8 too high for curvatures up to C, while gradient and Hessian become those of a staircase, off by up to
    h/(2t) and 1/t: there take `moreau_envelope`, the limit itself.

    Args:
        f: values at the nodes, shape ``grid.shape``.
        grid: the box, in one or two dimensions.
        t: the time, gamma of the optimizers; above 0.
        beta: the inverse temperature 1/T; above 0.

    Returns:
        Value of shape ``grid.shape``, gradient (d, \\*shape) and Hessian (d, d, \\*shape).

    Raises:
        ValueError: an argument out of range, or f of another shape or not finite.

    Source: Deep Relaxation, sections 3 and 4; Chaudhari et al., Entropy-SGD.
    """
    f = grid.check("f", f)
    t, beta = check_positive("t", t), check_positive("beta", beta)
    log_mass, means, moments = (_one if grid.dimensions == 1 else _two)(-beta * f, grid, t / beta)
    covariances = moments - means[:, None] * means[None, :]
    unit = np.eye(grid.dimensions).reshape((grid.dimensions,) * 2 + (1,) * grid.dimensions)
    return Jet(-log_mass / beta, -means / t, unit / t - covariances * (beta / t) / t)


def _one(log_density: Array, grid: Grid, variance: float) -> tuple[Array, Array, Array]:
    """Return the log of the mean of exp(log_density) around each node, and the moments of y - x under what it averages."""
    line = _Line(grid, 0, variance)
    out = np.empty((3, *grid.shape))
    for rows, log_mass, weights, steps in line.averages(log_density):
        out[:, rows] = log_mass, (weights * steps).sum(1), (weights * steps**2).sum(1)
    return out[0], out[1:2], out[2].reshape(1, 1, *grid.shape)


def _two(log_density: Array, grid: Grid, variance: float) -> tuple[Array, Array, Array]:
    """The same in two dimensions: the Gaussian is a product, so that it can be averaged along one axis, then the other."""
    inner = np.empty((3, *grid.shape))
    along = _Line(grid, 1, variance)
    for i in range(grid.shape[0]):
        for rows, log_mass, weights, steps in along.averages(log_density[i]):
            inner[:, i, rows] = log_mass, (weights * steps).sum(1), (weights * steps**2).sum(1)
    value, means, moments = np.empty(grid.shape), np.empty((2, *grid.shape)), np.empty((2, 2, *grid.shape))
    across = _Line(grid, 0, variance)
    for j in range(grid.shape[1]):
        mean, square = across.mirrored(inner[1, :, j]), across.mirrored(inner[2, :, j])
        for rows, log_mass, weights, steps in across.averages(inner[0, :, j]):
            value[rows, j] = log_mass
            means[:, rows, j] = (weights * steps).sum(1), weights @ mean
            moments[0, 0, rows, j] = (weights * steps**2).sum(1)
            moments[1, 1, rows, j] = weights @ square
            moments[0, 1, rows, j] = moments[1, 0, rows, j] = (weights * steps) @ mean
    return value, means, moments


class _Line:
    """Gaussian averages along an axis of the grid, over its nodes and their mirror images."""

    def __init__(self, grid: Grid, axis: int, variance: float) -> None:
        self._nodes, self._variance = grid.axes[axis], variance
        count, h = grid.points[axis], grid.spacing[axis]
        # An image counts beside the node in the box that it mirrors until it is farther by the 74 variances that exp(-37) is.
        width = (count - 1) * h
        self._beyond = math.ceil((count - 1) * math.sqrt(1.0 + 74.0 * variance / width**2))
        self._sources = self._nodes[0] + h * np.arange(-self._beyond, count + self._beyond)

    def mirrored(self, values: Array) -> Array:
        """Return values at the nodes with those at their images to both sides."""
        return np.pad(values, self._beyond, mode="reflect")

    def averages(self, log_density: Array) -> Iterator[tuple[slice, Array, Array, Array]]:
        """Yield, for a few nodes x at a time: which, log of the mean of the density, weights of all sources y, and y - x."""
        logs = self.mirrored(log_density)
        count = max(1, BLOCK // len(self._sources))
        for first in range(0, len(self._nodes), count):
            rows = slice(first, first + count)
            steps = self._sources[None, :] - self._nodes[rows, None]
            kernel = steps**2 * (-0.5 / self._variance)
            terms = logs[None, :] + kernel
            top = terms.max(axis=1, keepdims=True)
            weights = np.exp(terms - top)
            total = weights.sum(axis=1, keepdims=True)
            unit = np.exp(kernel).sum(axis=1, keepdims=True)  # 1 or more: the node itself is a source
            yield rows, (top + np.log(total / unit))[:, 0], weights / total, steps
