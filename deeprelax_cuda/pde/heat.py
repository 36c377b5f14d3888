"""Heat smoothing: the Gaussian average of a function, by sums over the nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.gaussian_average import GaussianAverage
from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive


def heat(f: ArrayLike, grid: Grid, t: float, beta: float) -> Jet:
    """Return the Gaussian average of f, which solves the heat equation, with its gradient and Hessian.

        w(x, t) = (G_{t/beta} * f)(x) = E f(x + sqrt(t/beta) z)         z standard normal
        w_t = Lap w/(2 beta),  w(x, 0) = f(x);  grad w = E grad f(x + sqrt(t/beta) z)

    The integrals are sums over the nodes and their mirror images beyond the walls, which converge faster than any power of the
    spacing h while sqrt(t/beta) is 4/3 h or more, walls aside where the slope of f is not 0: there order 2. A narrower Gaussian
    is sampled between the nodes, on the cubic spline through f: orders 4, 3, 2 in h for value, gradient, Hessian, or better.

    Args:
        f: values at the nodes, shape ``grid.shape``.
        grid: the box, in one or two dimensions.
        t: the time, gamma of the optimizers; above 0.
        beta: the inverse temperature 1/T; above 0.

    Returns:
        Value of shape ``grid.shape``, gradient (d, \\*shape) and Hessian (d, d, \\*shape).

    Raises:
        ValueError: an argument out of range, or f of another shape or not finite.

    Source: Deep Relaxation, section 3 (heat equation as smoothing).
    """
    f = grid.check("f", f)
    variance = check_positive("t", t) / check_positive("beta", beta)
    # m has E (y - x)^a f, in two dimensions E (y_0 - x_0)^a (y_1 - x_1)^b f; y is normal, and Stein's identity makes them
    # derivatives.
    if grid.dimensions == 1:
        m = _averaged(grid, 0, variance, f[None])[:, 0]
        return Jet(m[0], m[1:2] / variance, ((m[2] / variance - m[0]) / variance)[None, None])
    inner = np.stack([_averaged(grid, 1, variance, row[None])[:, 0] for row in f], axis=1)
    m = np.stack([_averaged(grid, 0, variance, inner[:, :, j]) for j in range(grid.shape[1])], axis=-1)
    mixed = m[1, 1] / variance**2
    first, second = (m[2, 0] / variance - m[0, 0]) / variance, (m[0, 2] / variance - m[0, 0]) / variance
    return Jet(m[0, 0], np.stack([m[1, 0], m[0, 1]]) / variance, np.array([[first, mixed], [mixed, second]]))


def _averaged(grid: Grid, axis: int, variance: float, functions: Array) -> Array:
    """Return E (y - x)^j times each function, j = 0, 1, 2, for a normal y along an axis; shapes (k, n) to (3, k, n)."""
    return GaussianAverage(grid, axis, variance)(np.zeros(grid.shape[axis]), functions)[1]
