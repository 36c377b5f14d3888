"""The local entropy, by the transformation of Hopf and Cole: a Gaussian average of exp(-beta f), taken in logarithms."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.gaussian_average import GaussianAverage
from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive


def local_entropy(f: ArrayLike, grid: Grid, t: float, beta: float) -> Jet:
    """Return the local entropy of f, which solves the viscous Hamilton-Jacobi equation, with its gradient and Hessian.

        u(x, t) = -(1/beta) log (G_{t/beta} * exp(-beta f))(x)          G_s the Gaussian density of variance s
        u_t = -|grad u|^2/2 + Lap u/(2 beta),  u(x, 0) = f(x)
        grad u = (x - <y>)/t,  Hess u = I/t - (beta/t^2) Cov(y)         under rho(y; x) ~ exp(-beta f(y) - beta |x - y|^2/(2t))

    The integrals are sums over the nodes and their mirror images beyond the walls, stable at any temperature. They converge
    faster than any power of the spacing h while rho is resolved (its standard deviation is 4/3 h or more), walls aside where
    the slope of f is not 0: there order 2. A narrower rho is sampled between the nodes, on the cubic spline through f: orders
    4, 3, 2 in h for value, gradient, Hessian, at any temperature, with `moreau_envelope` as the limit.

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
    average = _line if grid.dimensions == 1 else _plane
    log_mass, means, squares = average(-beta * f, grid, t / beta)
    covariances = squares - means[:, None] * means[None, :]
    unit = np.eye(grid.dimensions).reshape((grid.dimensions,) * 2 + (1,) * grid.dimensions)
    return Jet(-log_mass / beta, -means / t, unit / t - covariances * (beta / t) / t)


def _line(log_density: Array, grid: Grid, variance: float) -> tuple[Array, Array, Array]:
    """Return the logarithm of the mean of exp(log_density) around each node, and the moments of y - x under it."""
    log_mass, moments = GaussianAverage(grid, 0, variance)(log_density, np.ones((1, *grid.shape)))
    return log_mass, moments[1], moments[2][None]


def _plane(log_density: Array, grid: Grid, variance: float) -> tuple[Array, Array, Array]:
    """The same in two dimensions: the average along axis 1, then that of its results along axis 0."""
    rows, columns = grid.shape
    along, across = GaussianAverage(grid, 1, variance), GaussianAverage(grid, 0, variance)
    one = np.ones((1, columns))
    inner = np.empty((4, rows, columns))  # logarithm of the mass; 1, y_1 - x_1 and its square averaged
    for i in range(rows):
        inner[0, i], moments = along(log_density[i], one)
        inner[1:, i] = moments[:, 0]
    log_mass, means, squares = np.empty(grid.shape), np.empty((2, *grid.shape)), np.empty((2, 2, *grid.shape))
    for j in range(columns):
        log_mass[:, j], moments = across(inner[0, :, j], inner[1:, :, j])
        means[:, :, j] = moments[1, 0], moments[0, 1]
        squares[0, 0, :, j], squares[1, 1, :, j] = moments[2, 0], moments[0, 2]
        squares[0, 1, :, j] = squares[1, 0, :, j] = moments[1, 1]
    return log_mass, means, squares
