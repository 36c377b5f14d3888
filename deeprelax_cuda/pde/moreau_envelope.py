"""The Moreau envelope, by the formula of Hopf and Lax: the lower envelope of parabolas, in linear time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import NdBSpline, make_interp_spline

from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive

#: Newton's iterations at most, and how often one of them is shortened; three or four from near a minimum are enough.
ITERATIONS, SHORTENED = 40, 6


def moreau_envelope(f: ArrayLike, grid: Grid, t: float) -> Jet:
    """Return the Moreau envelope of f, the viscosity solution of the Hamilton-Jacobi equation, with its gradient and Hessian.

        u(x, t) = min_y f(y) + |x - y|^2/(2t)                           y in the box
        u_t = -|grad u|^2/2,  u(x, 0) = f(x)
        grad u = p = (x - y)/t = grad f(x - t p),  Hess u = f''(y) (I + t f''(y))^-1       at the minimiser y

    `lower_envelope` finds the lowest node, and Newton's iteration from there the minimiser y, of the cubic spline through f; of
    the valleys that neighbouring x have chosen the lowest is kept. Orders in the spacing: value 4, gradient 3, Hessian 2 where
    f is smooth; 1 where y lies at a kink of f. At a kink of u, where two minimisers are equally low, gradient and Hessian are
    those of one of them.

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
    _, index = lower_envelope(f, grid, t)
    energy = _Energy(f, grid, t)
    x = np.moveaxis(grid.nodes, 0, -1).reshape(-1, grid.dimensions)
    start = np.stack([axis[i] for axis, i in zip(grid.axes, index, strict=True)])
    y, value = energy.minimised(x, np.moveaxis(start, 0, -1).reshape(x.shape))
    for axis in range(grid.dimensions):
        for shift in (1, -1):
            # Of two valleys about as low the nodes may tell the wrong one: so try that of a neighbour, where it is another.
            other = np.roll(index, shift, axis + 1)
            elsewhere = np.any(np.abs(other - index) > 2, axis=0).ravel()
            theirs = np.moveaxis(np.roll(start, shift, axis + 1), 0, -1).reshape(x.shape)
            found, low = energy.minimised(x[elsewhere], theirs[elsewhere])
            better = np.flatnonzero(elsewhere)[low < value[elsewhere]]
            y[better], value[better] = found[low < value[elsewhere]], low[low < value[elsewhere]]
    gradient, hessian = energy.envelope(x, y)
    return Jet(
        value.reshape(grid.shape),
        gradient.T.reshape(-1, *grid.shape),
        np.moveaxis(hessian, 0, -1).reshape(grid.dimensions, grid.dimensions, *grid.shape),
    )


class _Energy:
    """E(y; x) = f(y) + |x - y|^2/(2t) on the cubic spline through f. Points have shape (count, dimensions)."""

    def __init__(self, f: Array, grid: Grid, t: float) -> None:
        self._spline, self._t = _Spline(f, grid), t
        self._low, self._high = np.array(grid.lower), np.array(grid.upper)
        # Nodes that are coarse in one of two coupled variables put the minimiser that far from the lowest in the other.
        self._reach = 2.0 * max(grid.spacing)
        self._rounding = 16.0 * np.finfo(np.float64).eps * float(np.abs(f).max())
        self._unit = np.eye(grid.dimensions)

    def __call__(self, x: Array, y: Array) -> Array:
        value: Array = self._spline.value(y) + np.sum((x - y) ** 2, axis=-1) / (2.0 * self._t)
        return value

    def minimised(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Return a minimum of E(.; x) that lies downhill from y, and E there, by Newton's iteration."""
        y, value = y.copy(), self(x, y)
        moving = np.arange(len(y))
        for _ in range(ITERATIONS):
            at, here = y[moving], x[moving]
            slope = self._spline.gradient(at) + (at - here) / self._t
            held = ((at <= self._low) & (slope > 0.0)) | ((at >= self._high) & (slope < 0.0))  # by a wall
            curvatures, directions = np.linalg.eigh(_hold(self._spline.hessian(at) + self._unit / self._t, held))
            curvatures = np.maximum(np.abs(curvatures), 1e-3 / self._t)  # downhill where E curves down too
            along = np.einsum("nij,ni->nj", directions, np.where(held, 0.0, slope)) / curvatures
            step = np.einsum("nij,nj->ni", directions, along)
            step *= np.minimum(1.0, self._reach / np.maximum(np.linalg.norm(step, axis=1), 1e-300))[:, None]
            bound = value[moving] + self._rounding
            for _ in range(SHORTENED):
                trial = np.clip(at - step, self._low, self._high)
                level = self(here, trial)
                step[level > bound] /= 4.0
                if np.all(level <= bound):
                    break
            down = level <= bound
            y[moving[down]], value[moving[down]] = trial[down], level[down]
            far = np.abs(trial - at).max(axis=1) > 1e-14 * np.max(self._high - self._low)
            moving = moving[down & far]
            if len(moving) == 0:
                break
        return y, value

    def envelope(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Return gradient and Hessian of the envelope at x, whose minimiser is y."""
        p, bend = self._spline.gradient(y), self._spline.hessian(y)
        curvature = self._unit + self._t * bend
        width = np.max(self._high - self._low)
        off = x - self._t * p - y  # 0 at a minimum, but for one at a wall, which stays there as x moves, or at a kink of f
        held = np.abs(off) > 1e-10 * width
        held[np.linalg.eigvalsh(_hold(curvature, held)).min(axis=1) <= 0.0] = True
        free = ~held
        inverse = np.linalg.inv(_hold(curvature, held))
        moves = inverse * free[:, :, None] * free[:, None, :]  # dy/dx
        any_held = held.any(axis=1)[:, None, None]
        hessian = np.where(any_held, (self._unit - moves) / self._t, bend @ inverse)  # the same, but for rounding
        return np.where(held, (x - y) / self._t, p), hessian


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
    if not math.isfinite(float(np.abs(value).max()) * (2.0 * t / min(grid.spacing) ** 2) * 4.0):
        raise ValueError(f"f, t: expected f t/h^2 within float64, got f up to {np.abs(value).max():.3g}, t = {t:.3g}")
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
