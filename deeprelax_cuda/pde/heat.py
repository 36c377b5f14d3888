"""Heat smoothing: the Gaussian average of a function."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive
from deeprelax_cuda.pde.line import LOST, RESOLVED, Line

#: Places at which a Gaussian is sampled that is narrower than the spacing.
SAMPLES = 129


def heat(f: ArrayLike, grid: Grid, t: float, beta: float) -> Jet:
    """Return the Gaussian average of f, which solves the heat equation, with its gradient and Hessian.

        w(x, t) = (G_{t/beta} * f)(x) = E f(x + sqrt(t/beta) z)         z standard normal
        w_t = Lap w/(2 beta),  w(x, 0) = f(x);  grad w = E grad f(x + sqrt(t/beta) z)

    The integrals are sums over the nodes and their mirror images beyond the walls. For smooth f they converge faster than any
    power of the spacing h while sqrt(t/beta) is 4/3 h or more, walls aside where the slope of f is not 0: there, and at kinks
    of f, order 2. A narrower Gaussian is sampled between the nodes, on the cubic spline through f: orders 2, 3, 2 in h for
    value, gradient, Hessian, the error of the value being t/(2 beta) times that of f''.

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
    t, beta = check_positive("t", t), check_positive("beta", beta)
    # w, w_x, w_xx along the last axis; then, in two dimensions, the same of each of these along the first.
    along = _averaged(f.T, Line(grid, grid.dimensions - 1, t, beta))
    if grid.dimensions == 1:
        return Jet(along[0], along[1:2], along[2][None, None])
    (w, w_x, w_xx), (w_y, w_xy, _), (w_yy, _, _) = (_averaged(part.T, Line(grid, 0, t, beta)) for part in along)
    return Jet(w, np.stack([w_x, w_y]), np.array([[w_xx, w_xy], [w_xy, w_yy]]))


def _averaged(f: Array, line: Line) -> Array:
    """Return averages around the nodes of a line, and their first and second derivatives; shapes (n, ...) to (3, n, ...)."""
    deviation = math.sqrt(line.variance)
    if deviation < RESOLVED * line.h:
        spread = np.linspace(-1.0, 1.0, SAMPLES) * math.sqrt(2.0 * LOST)
        weights = np.exp(-(spread**2) / 2.0)
        places = line.nodes[:, None] + deviation * spread
        smooth = line.spline(f)
        return np.stack([np.tensordot(weights / weights.sum(), smooth(places, order), (0, 1)) for order in range(3)])
    # For a normal y, E f'(y) = E (y - x) f(y)/variance and so on (Stein's identity).
    steps = line.sources - line.nodes[:, None]
    weights = np.exp(steps**2 * (-0.5 / line.variance))
    weights /= weights.sum(axis=1, keepdims=True)
    first = weights * steps / line.variance
    second = (weights * steps**2 / line.variance - weights) / line.variance
    mirrored = line.mirrored(f.T).T
    return np.stack([np.tensordot(kernel, mirrored, 1) for kernel in (weights, first, second)])
