"""Hamilton-Jacobi equations, viscous or not, with or without a drift, by a monotone scheme.

With the drift b of an SDE they are the Hamilton-Jacobi-Bellman equation of its control, in the time to go.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.grid import Array, Grid, check_positive
from deeprelax_cuda.pde.times import check_computed, check_times, equal_steps


def hamilton_jacobi(
    f: ArrayLike,
    grid: Grid,
    times: ArrayLike,
    beta: float = math.inf,
    *,
    drift: ArrayLike | None = None,
    step: float | None = None,
) -> Array:
    """Return the viscosity solution u(., t) at each of ``times``, shape (len(times), \\*shape).

        u_t = b . grad u - |grad u|^2/2 + Lap u/(2 beta),   u(., 0) = f

    Explicit Euler steps in time. In space, the three-point Laplacian and Godunov's flux of the Hamiltonian, which is
    |p - b|^2/2 - |b|^2/2: in each dimension, with the one-sided differences D- and D+ of u,

        s^2/2 - b^2/2,   s = max(D- u - b, b - D+ u, 0)

    A step changes the weight of u at a node in its own new value by -s/h - 1/(beta h^2) for each dimension, and gives the
    neighbours theirs. Steps up to `largest_step`, where that weight has come to 0, make the scheme **monotone**: two solutions
    of the same steps keep their order and their distance max|u - v| never grows, so it converges to the viscosity solution,
    through shocks too. u itself (by s) moves the bound, so it is found anew for each step. Without drift the steepest slope of
    each dimension never grows. In one dimension the bound then never falls; in two it falls to no less than half, as it is the
    sum of both slopes at one node that counts, and steep slopes of both dimensions may come to meet there.

    Order 1 in h and in the step where u is smooth and where it forms shocks: the flux adds a viscosity of s h/2, or a little
    less, to 1/(2 beta). Where a kink of f opens into a fan, as that of |x|, the error is about h log 1/h: an order of 3/4
    between grids in use. Viscosity rounds the kink, which gives back order 1 once h is small against 1/beta; before, the order
    is lower still (0.5 to 0.6 for 1/beta = 0.01 and h = 0.06 to 0.0075). Proven is 1/2, in the maximum norm.

    **Gradient and Hessian**, by `differences`. The gradient has order 1 away from kinks, with viscosity and without. The
    Hessian has order 1 with viscosity; **without, it does not converge at minima**: at a node, a curvature lambda of f comes to
    lambda/(1 + t lambda/4) as h falls, where lambda/(1 + t lambda) is right (1.6 instead of 1, from f = x^2 at t = 1/2), since
    its neighbours go by the slope half-way to it, and so by a quarter of the squares of their own. `moreau_envelope` has the
    Hessian for beta = inf.

    Cost: as the steps are explicit, of the order of t (sum over the dimensions of 1/(beta h^2) + max s/h) of them, each linear
    in the nodes: with viscosity, half the spacing is 4 times as many.

    Args:
        f: the start, shape ``grid.shape``.
        times: t >= 0, increasing; 0 is f.
        beta: the inverse temperature; infinity for no viscosity.
        drift: b at the nodes, shape (dimensions, \\*shape), the same at all times; none by default.
        step: upper limit of the time steps; by default the largest that is monotone for u and for a constant. An interval
            of ``times`` is divided evenly.

    Raises:
        ValueError: an argument of another shape or range, or so large or small that u overflows; ``step`` above the bound.

    Source: Deep Relaxation, on Hamilton-Jacobi equations and on stochastic control; M. G. Crandall, P.-L. Lions, "Two
    approximations of solutions of Hamilton-Jacobi equations", Math. Comp. 43 (1984).
    """
    u, beta, b = _checked(f, grid, beta, drift)
    # Where grad u is b nothing bounds a step, and yet u moves on: the steps that resolve the drift alone, u = 0, then do.
    limit = _change(np.zeros_like(u), beta, b, grid)[1] if step is None else check_positive("step", step)
    solution, t = [], 0.0
    for target in check_times(times):
        while t < target:
            change, bound = _change(u, beta, b, grid)
            if step is not None and step > bound * (1.0 + 1e-9):
                raise ValueError(f"step: expected at most {bound}, where the scheme is monotone at t = {t}, got {step}")
            dt = (target - t) / equal_steps(target - t, min(limit, bound))
            u = u + dt * change
            t += dt
        solution.append(check_computed("f, beta, drift", "u", u))
    return np.stack(solution)


def largest_step(f: ArrayLike, grid: Grid, beta: float = math.inf, *, drift: ArrayLike | None = None) -> float:
    """Return the largest time step from f at which `hamilton_jacobi` is monotone; infinite where nothing moves.

    1/max(sum over the dimensions of s/h + 1/(beta h^2)). The bound is sharp: above it, at the node of the maximum, a larger u
    gives a smaller u one step later. Without drift all later steps stay monotone with this one in one dimension, with half of
    it in two.

    Raises:
        ValueError: as in `hamilton_jacobi`.
    """
    return _change(*_checked(f, grid, beta, drift), grid)[1]


def _checked(f: ArrayLike, grid: Grid, beta: float, drift: ArrayLike | None) -> tuple[Array, float, Array]:
    """Return f, beta and the drift, zeros where there is none."""
    b = np.zeros((grid.dimensions, *grid.shape)) if drift is None else grid.check("drift", drift, (grid.dimensions,))
    return grid.check("f", f), check_positive("beta", beta, infinite=True), b


def _change(u: Array, beta: float, drift: Array, grid: Grid) -> tuple[Array, float]:
    """Return u_t, shape ``grid.shape``, and the largest time step at which an Euler step along it is monotone."""
    change, own_weight = np.zeros_like(u), np.zeros_like(u)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for axis, (h, b) in enumerate(zip(grid.spacing, drift, strict=True)):
            slope = np.diff(u, axis=axis) / h
            first, last = np.take(slope, [0], axis), np.take(slope, [-1], axis)
            slope = np.concatenate([-first, slope, -last], axis)  # the mirror: u beyond a wall is u before it
            backward, forward = np.split(slope, [-1], axis)[0], np.split(slope, [1], axis)[1]
            s = np.maximum(np.maximum(backward - b, b - forward), 0.0)
            change += (b * b - s * s) / 2.0 + (forward - backward) / (2.0 * beta * h)
            own_weight += s / h + 1.0 / (beta * h * h)
    most = float(own_weight.max())
    check_computed("f, beta, drift", "u_t and the weights of a step", np.append(change, most))
    return change, 1.0 / most if most > 0.0 else math.inf
