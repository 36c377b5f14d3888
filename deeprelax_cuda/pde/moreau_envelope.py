"""The Moreau envelope, by the formula of Hopf and Lax: the lower envelope of parabolas, in linear time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import NdBSpline, make_interp_spline

from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive

#: Newton's iterations for a minimiser between the nodes; it starts within a spacing or two and doubles its digits.
ITERATIONS = 8


def moreau_envelope(f: ArrayLike, grid: Grid, t: float) -> Jet:
    """Return the Moreau envelope of f, the viscosity solution of the Hamilton-Jacobi equation, with its gradient and Hessian.

        u(x, t) = min_y f(y) + |x - y|^2/(2t)                           y in the box
        u_t = -|grad u|^2/2,  u(x, 0) = f(x)
        grad u = p = (x - y)/t = grad f(x - t p),  Hess u = f''(y) (I + t f''(y))^-1       at the minimiser y

    `lower_envelope` finds the node nearest to the minimiser, and Newton's iteration the minimiser itself, of the cubic spline
    through f. Orders in the spacing: value 4, gradient 3, Hessian 2 where f is smooth; 1 for the value where the minimiser lies
    at a kink of f. At a kink of u, where two minimisers are equally low, gradient and Hessian are those of one of them.

    Args:
        f: values at the nodes, shape ``grid.shape``.
        grid: the box, in one or two dimensions.
        t: the time, gamma of the optimizers; above 0.

    Returns:
        Value of shape ``grid.shape``, gradient (d, \\*shape) and Hessian (d, d, \\*shape).

    Raises:
        ValueError: t out of range, or f of another shape or not finite.

    Source: Deep Relaxation, section 3 (Hopf-Lax formula); L. C. Evans, Partial Differential Equations, section 3.3.
    """
    f = grid.check("f", f)
    t = check_positive("t", t)
    value, index = lower_envelope(f, grid, t)
    x = np.moveaxis(grid.nodes, 0, -1)
    node = np.moveaxis(np.stack([axis[i] for axis, i in zip(grid.axes, index, strict=True)]), 0, -1)
    low, high = np.array(grid.lower), np.array(grid.upper)
    # The minimiser is within a spacing of the lowest node in each variable by itself; where variables are coupled, coarse nodes
    # of one put it farther off in the other.
    reach = 2.0 * max(grid.spacing)
    spline = _Spline(f, grid)
    unit = np.eye(grid.dimensions)

    y = node
    for _ in range(ITERATIONS):
        slope = spline.gradient(y) + (y - x) / t
        curvature = spline.hessian(y) + unit / t
        held = ((y <= low) & (slope > 0.0)) | ((y >= high) & (slope < 0.0))  # by a wall
        step = np.linalg.solve(_hold(curvature, held), np.where(held, 0.0, slope)[..., None])[..., 0]
        before, y = y, np.clip(y - step, np.maximum(low, node - reach), np.minimum(high, node + reach))
        if np.allclose(y, before, rtol=0.0, atol=1e-15 * np.max(high - low)):
            break
    refined = spline.value(y) + np.sum((x - y) ** 2, axis=-1) / (2.0 * t)
    better = refined <= value  # not so where the spline has no minimum near the node, as at a kink
    y = np.where(better[..., None], y, node)

    beyond, slack = x - t * spline.gradient(y), 1e-12 * (high - low)  # where y would be if it could, and the rounding of that
    held = ((y <= low) & (beyond < y - slack)) | ((y >= high) & (beyond > y + slack))
    moves = np.linalg.inv(_hold(unit + t * spline.hessian(y), held)) * (~held)[..., None] * (~held)[..., None, :]  # dy/dx
    return Jet(
        np.where(better, refined, value),
        np.moveaxis((x - y) / t, -1, 0),
        np.moveaxis((unit - moves) / t, (-2, -1), (0, 1)),
    )


def lower_envelope(f: ArrayLike, grid: Grid, t: float) -> tuple[Array, NDArray[np.intp]]:
    """Return min over the nodes y of f(y) + |x - y|^2/(2t) at each node x, and the index of that y.

    In a time proportional to the number of nodes: along each axis in turn, the parabolas that are lowest somewhere are kept in
    a stack, and read off from left to right. Exact for the nodes; at most (1/t + C) h^2/8 above the envelope in each dimension,
    for curvatures of f up to C.

    Args:
        f: values at the nodes, shape ``grid.shape``.
        grid: the box, in one or two dimensions.
        t: the width; above 0.

    Returns:
        The minima, shape ``grid.shape``, and the indices, shape (d, \\*shape).

    Raises:
        ValueError: t out of range, or f of another shape or not finite.

    Source: P. Felzenszwalb and D. Huttenlocher, Distance Transforms of Sampled Functions, Theory of Computing 8 (2012).
    """
    value = grid.check("f", f)
    t = check_positive("t", t)
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"))
    for axis, h in enumerate(grid.spacing):
        lines = np.moveaxis(value, axis, -1)
        nearest = np.empty(lines.shape, dtype=np.intp)
        for place in np.ndindex(lines.shape[:-1]):
            nearest[place] = _lowest(lines[place], 2.0 * t / h**2)
        nearest = np.moveaxis(nearest, -1, axis)
        steps = nearest - np.moveaxis(np.broadcast_to(np.arange(grid.shape[axis]), lines.shape), -1, axis)
        value = np.take_along_axis(value, nearest, axis) + (h * steps) ** 2 / (2.0 * t)
        index = np.take_along_axis(index, nearest[None], axis + 1)
    return value, index


def _lowest(f: Array, width: float) -> NDArray[np.intp]:
    """Return, for each integer i, the j that minimises f[j] + (i - j)^2/width."""
    heights = (width * f).tolist()  # Python's own numbers: numpy's are slower one by one
    vertices, begins = [0], [-np.inf]  # the parabolas kept, and from where each is lowest
    for j in range(1, len(heights)):
        while True:
            k = vertices[-1]
            begin = ((heights[j] - heights[k]) / (j - k) + (j + k)) / 2.0
            if begin > begins[-1]:
                break
            vertices.pop()
            begins.pop()
        vertices.append(j)
        begins.append(begin)
    return np.array(vertices)[np.searchsorted(begins, np.arange(len(heights)), side="right") - 1]


def _hold(matrix: Array, held: NDArray[np.bool_]) -> Array:
    """Return matrices with the rows and columns of what is held replaced by those of the identity."""
    free = ~held
    return np.where(free[..., None] & free[..., None, :], matrix, np.eye(matrix.shape[-1]))


class _Spline:
    """The cubic spline through values at the nodes: tensor product, not-a-knot ends. Points have shape (..., d)."""

    def __init__(self, values: Array, grid: Grid) -> None:
        self._dimensions = grid.dimensions
        knots = []
        for axis, nodes in enumerate(grid.axes):
            line = make_interp_spline(nodes, values, k=min(3, len(nodes) - 1), axis=axis)
            knots.append(line.t)
            values = np.moveaxis(line.c, 0, axis)
        degrees = tuple(min(3, count - 1) for count in grid.points)
        self._spline = NdBSpline(tuple(knots), np.ascontiguousarray(values), degrees)

    def value(self, points: Array) -> Array:
        return self._derivative(points, ())

    def gradient(self, points: Array) -> Array:
        return np.stack([self._derivative(points, (i,)) for i in range(self._dimensions)], axis=-1)

    def hessian(self, points: Array) -> Array:
        out = np.empty((*points.shape, self._dimensions))
        for i in range(self._dimensions):
            for j in range(i + 1):
                out[..., i, j] = out[..., j, i] = self._derivative(points, (i, j))
        return out

    def _derivative(self, points: Array, variables: tuple[int, ...]) -> Array:
        orders = np.bincount(np.array(variables, dtype=np.intp), minlength=self._dimensions)
        return np.asarray(self._spline(points, nu=orders), dtype=np.float64)
