"""Gradient descent with noise as a control problem: the value function, the optimal control, and what it gains.

    dx = b ds - alpha ds + beta^(-1/2) dW,   cost  E V(x at the end) + 1/2 E int |alpha|^2 ds

With b = -grad f and alpha = 0 that is SGD's SDE; with b = 0, Brownian motion. The least cost from x with the time t to go is
u(x, t), which solves the Hamilton-Jacobi equation with drift b from V, and alpha = grad u attains it. As alpha = 0 costs no
less,

    E V(x controlled) + 1/2 E int |alpha|^2 ds <= E V(x uncontrolled)

for alpha = grad u with the drift of u. Without drift u is the local entropy of V; its gradient is not the optimal control of an
SDE that has a drift, and with one it may cost more than it gains.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.fokker_planck import fokker_planck
from deeprelax_cuda.pde.grid import Array, Grid, check_positive
from deeprelax_cuda.pde.hamilton_jacobi import hamilton_jacobi


class Controlled(NamedTuple):
    """An SDE with and without a control, at ``times``, shape (steps + 1,).

    Attributes:
        times: s from 0 to the duration.
        value: u(x, duration - s), the least cost that is still to come, shape (steps + 1, \\*shape).
        alpha: the control that was used, shape (steps + 1, dimensions, \\*shape).
        uncontrolled, controlled: the densities of x, shape (steps + 1, \\*shape).
        terminal_uncontrolled, terminal_controlled: E V at the end.
        effort: 1/2 E int |alpha|^2 ds.
        least_cost: E u(x, duration) over the start, the least E V + effort of all controls.
    """

    times: Array
    value: Array
    alpha: Array
    uncontrolled: Array
    controlled: Array
    terminal_uncontrolled: float
    terminal_controlled: float
    effort: float
    least_cost: float

    @property
    def gain(self) -> float:
        """What the control saves, net of its effort: not negative for the optimal one."""
        return self.terminal_uncontrolled - self.terminal_controlled - self.effort


def control(
    terminal: ArrayLike,
    start: ArrayLike,
    grid: Grid,
    duration: float,
    beta: float,
    *,
    drift: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    steps: int = 200,
) -> Controlled:
    """Control dx = b ds - alpha ds + beta^(-1/2) dW optimally, or by a given alpha.

    Order 1 in the spacing h and in duration/steps: u and alpha = grad u of the former (`hamilton_jacobi`), densities of both
    (`fokker_planck`).

    Args:
        terminal: V, shape ``grid.shape``.
        start: the density of x at s = 0, shape ``grid.shape``, brought to mass 1; a point is a bump of a few h.
        duration: the time that the SDE runs, above 0.
        beta: the inverse temperature, above 0; the diffusion is D = 1/(2 beta).
        drift: b at the nodes, shape (dimensions, \\*shape); -grad f for SGD, None for Brownian motion.
        alpha: a control at the times n*duration/steps, n = 0, ..., steps, shape (steps + 1, dimensions, \\*shape); the optimal
            one by default.
        steps: number of time steps of the SDE's densities, an int of 1 or more. Those of u are explicit, as many as
            `hamilton_jacobi` says.

    Raises:
        ValueError: an argument of another shape or range.

    Source: Deep Relaxation, on stochastic control.
    """
    begin = grid.check("start", start)
    if begin.min() < 0.0 or begin.max() == 0.0:
        raise ValueError(f"start: expected a density, 0 or more and not 0 everywhere, got {begin.min()} to {begin.max()}")
    begin = begin / begin.max()  # whose integral cannot overflow
    begin /= grid.integrate(begin)
    times, value, optimal = value_function(terminal, grid, duration, beta, drift=drift, steps=steps)
    used = optimal if alpha is None else grid.check("alpha", alpha, (steps + 1, grid.dimensions))
    b = np.zeros(used.shape[1:]) if drift is None else np.asarray(drift)
    step, diffusion = duration / steps, 1.0 / (2.0 * beta)
    uncontrolled = fokker_planck(begin, grid, times, drift, diffusion, step=step)
    controlled = fokker_planck(begin, grid, times, lambda s: b - used[round(s / step)], diffusion, step=step)
    # At the end of each step, where backward Euler takes its drift.
    power = [grid.integrate(rho * (a * a).sum(axis=0) / 2.0) for rho, a in zip(controlled[1:], used[1:], strict=True)]
    return Controlled(
        times,
        value,
        used,
        uncontrolled,
        controlled,
        terminal_uncontrolled=grid.integrate(uncontrolled[-1] * value[-1]),
        terminal_controlled=grid.integrate(controlled[-1] * value[-1]),
        effort=step * sum(power),
        least_cost=grid.integrate(begin * value[0]),
    )


def value_function(
    terminal: ArrayLike, grid: Grid, duration: float, beta: float, *, drift: ArrayLike | None = None, steps: int = 200
) -> tuple[Array, Array, Array]:
    """Return times s, the value function u(x, duration - s), and the optimal control grad u, by central differences.

        u_t = b . grad u - |grad u|^2/2 + Lap u/(2 beta),   u(., 0) = V

    Args, Raises and order as in `control`; shapes (steps + 1,), (steps + 1, \\*shape), (steps + 1, dimensions, \\*shape).
    """
    duration, beta = check_positive("duration", duration), check_positive("beta", beta)
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps: expected an int of 1 or more, got {steps!r}")
    times = np.linspace(0.0, duration, steps + 1)
    value = hamilton_jacobi(grid.check("terminal", terminal), grid, times, beta, drift=drift)[::-1]
    gradient = [np.gradient(value, h, axis=axis, edge_order=2) for axis, h in enumerate(grid.spacing, start=1)]
    return times, value, np.stack(gradient, axis=1)
