"""The density of a diffusion: the Fokker-Planck equation by positive, conservative finite volumes.

On a grid a diffusion is a Markov chain: the mass of a node jumps to its neighbours. `generator` has the rates q of the jumps;
masses go by m' = q^T m, and expectations of a function of the end (the backward equation) by v' = q v.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, solve_banded
from scipy.sparse import coo_array, csr_array
from scipy.special import exprel

from deeprelax_cuda.pde.grid import Array, Grid, check_positive
from deeprelax_cuda.pde.times import check_computed, check_times, equal_steps

#: None, b at the nodes, shape (dimensions, \*shape), or a function of the time s that returns it.
Drift = ArrayLike | Callable[[float], ArrayLike] | None


def fokker_planck(density: ArrayLike, grid: Grid, times: ArrayLike, drift: Drift, diffusion: float, *, step: float) -> Array:
    """Return the density rho(., s) of dx = b ds + sqrt(2 D) dW at each of ``times``, shape (len(times), \\*shape).

        rho_s = -div(b rho) + D Lap rho,   rho(., 0) = density

    **Which D.** Langevin sampling of exp(-beta V) is b = -grad V with D = 1/beta; the SDE of the control problem, with the
    noise beta^(-1/2) dW, has D = 1/(2 beta).

    Finite volumes about the nodes, half ones at the walls, through which nothing flows: the mass is ``grid.integrate`` of the
    density, and stays. Between neighbouring nodes the flux is fitted exponentially, to be exact where b and the flux are
    constant, so that rho stays >= 0 for every drift, and for b = -grad V a Gibbs density exp(-V/D) stands still: exactly for
    quadratic V, else up to O(h^2). Backward Euler in time, one dimension after the other: tridiagonal systems, positive and
    conservative for every step, which leave Gibbs densities alone as each dimension's flux vanishes for them.

    Order 1 in the step. In h, order 2 while |b| h is below 2 D or so, and the gradient and Hessian by `differences` too; above
    it, order 1. For the fitted flux is the central one with D (z/2) coth(z/2), z = b h/D, in place of D: D + b^2 h^2/(12 D)
    for small z, and for large ones |b| h/2, the flux upwind.

    Cost: an interval of ``times`` over ``step`` solutions of a tridiagonal system in each dimension, linear in the nodes; a
    drift that is a function of s is looked up for each.

    Args:
        density: rho at s = 0, shape ``grid.shape``, 0 or more; smooth on the scale of h.
        times: s >= 0, increasing; 0 is ``density``.
        drift: b at the nodes, shape (dimensions, \\*shape), or a function of s that returns it, or None for no drift.
        diffusion: D, above 0.
        step: upper limit of the time steps; an interval of ``times`` is divided evenly.

    Raises:
        ValueError: an argument of another shape or range, or so large or small that the density overflows.

    Source: D. Scharfetter, H. Gummel, IEEE Trans. Electron Devices 16 (1969); J. Chang, G. Cooper, J. Comput. Phys. 6 (1970).
    """
    rho = grid.check("density", density)
    if (rho < 0.0).any():
        raise ValueError(f"density: expected numbers of 0 or more, got {rho.min()}")
    diffusion, step = check_positive("diffusion", diffusion), check_positive("step", step)
    fixed = [] if callable(drift) else _rates(grid, drift, diffusion)
    mass = rho * grid.weights
    solution, s = [], 0.0
    for target in check_times(times):
        while s < target:
            dt = (target - s) / equal_steps(target - s, step)
            s += dt
            rates = _rates(grid, drift(s), diffusion) if callable(drift) else fixed
            for axis, (up, down) in enumerate(rates):
                mass = _step(mass, dt, up, down, axis)
        with np.errstate(over="ignore", invalid="ignore"):
            rho = mass / grid.weights
        solution.append(check_computed("density, drift, diffusion, step", "the density", rho))
    return np.stack(solution)


def generator(grid: Grid, drift: ArrayLike | None, diffusion: float) -> csr_array:
    """Return the generator of dx = b ds + sqrt(2 D) dW on the grid: a sparse matrix of nodes by nodes, in C order.

        q v = b . grad v + D Lap v,   of order 2 in h while |b| h is below 2 D or so, else of order 1 (`fokker_planck` has why)

    Its rows sum to 0 and only its diagonal is negative: q[i, j] is the rate of jumps from node i to node j, the fluxes of
    `fokker_planck`. Its transpose acts on masses: q^T(rho weights) = (-div(b rho) + D Lap rho) weights.

    Args:
        drift: b at the nodes, shape (dimensions, \\*shape), or None for no drift.
        diffusion: D, above 0.

    Raises:
        ValueError: an argument of another shape or range, or so large or small that the rates overflow.
    """
    number = np.arange(grid.weights.size).reshape(grid.shape)
    here, there, rate = [], [], []
    for axis, (up, down) in enumerate(_rates(grid, drift, check_positive("diffusion", diffusion))):
        line = np.moveaxis(number, axis, -1)
        low, high = line[..., :-1].ravel(), line[..., 1:].ravel()
        for start, end, jumps in ((low, high, up[..., :-1].ravel()), (high, low, down[..., 1:].ravel())):
            here += [start, start]
            there += [end, start]
            rate += [jumps, -jumps]
    entries = np.concatenate(rate), (np.concatenate(here), np.concatenate(there))
    return coo_array(entries, shape=(number.size, number.size)).tocsr()


def _rates(grid: Grid, drift: ArrayLike | None, diffusion: float) -> list[tuple[Array, Array]]:
    """Return for each axis the rates of jumps from each node up and down that axis, which is moved to the end; 0 at walls.

    The fitted flux is D/h (B(-z) rho_i - B(z) rho_{i+1}), with the Bernoulli function B(z) = z/(exp(z) - 1), z = b h/D and b
    half-way. It moves a part of the mass rho w, w the width of the cell that the mass leaves.
    """
    d = grid.dimensions
    drift = np.zeros((d, *grid.shape)) if drift is None else grid.check("drift", drift, (d,))
    rates = []
    for axis, h in enumerate(grid.spacing):
        b = np.moveaxis(drift[axis], axis, -1)
        up, down = np.zeros_like(b), np.zeros_like(b)
        width = np.full(b.shape[-1], h)
        width[[0, -1]] = h / 2.0
        with np.errstate(
            over="ignore", invalid="ignore", divide="ignore"
        ):  # exprel(z) may be infinite: B(z) = 1/exprel(z) is 0
            z = (b[..., :-1] + b[..., 1:]) * (h / (2.0 * diffusion))
            up[..., :-1] = diffusion / (h * width[:-1] * exprel(-z))
            down[..., 1:] = diffusion / (h * width[1:] * exprel(z))
        check_computed("drift, diffusion", "the rates of jumps", np.stack([up, down]))
        rates.append((up, down))
    return rates


def _step(mass: Array, dt: float, up: Array, down: Array, axis: int) -> Array:
    """Return (I - dt q^T)^-1 mass, q with the jumps along one axis only; a single tridiagonal system for all of its lines.

    Its columns sum to 1 and only its diagonal is positive, so that Gauss's elimination takes no pivots and subtracts nothing
    from what is positive: masses >= 0 stay so in floating point too.
    """
    old = np.moveaxis(mass, axis, -1)
    with np.errstate(over="ignore"):  # the density is then not finite, which its caller reports
        bands = np.stack([-dt * down, 1.0 + dt * (up + down), -dt * up]).reshape(3, -1)
    try:
        new = solve_banded((1, 1), bands, old.ravel(), overwrite_ab=True, check_finite=False).reshape(old.shape)
    except LinAlgError as error:  # the 1 of the diagonal is below the rounding of the rates
        raise ValueError("drift, diffusion, step: expected a system to solve in float64, got a singular one") from error
    # Each line keeps its mass, but for the diagonal's rounding, dt D/h^2 1e-16 a step: that is taken out before it adds up.
    tiny = np.finfo(np.float64).tiny  # a line may be empty
    with np.errstate(over="ignore", invalid="ignore"):
        new *= (old.sum(-1, keepdims=True) + tiny) / (new.sum(-1, keepdims=True) + tiny)
    return np.moveaxis(new, -1, axis)
