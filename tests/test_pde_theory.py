"""The theorems behind the optimizers, on the solvers: each holds, and fails for what it is not said of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import fixed_point, minimize_scalar

from deeprelax_cuda.pde import (
    Grid,
    Jet,
    differences,
    double_well,
    heat,
    local_entropy,
    moreau_envelope,
    rugged,
    widened,
)

LINE = Grid(-3.0, 3.0, 601)
PLANE = Grid((-2.0, -2.0), (2.0, 2.0), (81, 81))
ROUGH, WELLS = rugged().on(LINE), double_well().on(PLANE)
FUNCTIONS = {"rugged": (ROUGH, LINE), "double well": (WELLS, PLANE)}


def laplacian(jet: Jet) -> np.ndarray:
    return np.trace(jet.hessian)


def residual(solve: Callable[[float], Jet], equation: Callable[[Jet], np.ndarray], t: float) -> np.ndarray:
    """Return u_t - equation(u), u_t by a central difference of order 4 in time."""
    step = 0.02 * t
    around = [solve(t + k * step).value for k in (-2, -1, 1, 2)]
    return (around[0] - 8.0 * around[1] + 8.0 * around[2] - around[3]) / (12.0 * step) - equation(solve(t))


# ---- each solver solves its equation -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_local_entropy_solves_the_viscous_hamilton_jacobi_equation(name: str) -> None:
    """u_t = -|grad u|^2/2 + Lap u/(2 beta); the terms are of the order of 1 and more."""
    f, grid = FUNCTIONS[name]
    beta, t = 3.0, 0.15

    def equation(u: Jet) -> np.ndarray:
        return -(u.gradient**2).sum(0) / 2.0 + laplacian(u) / (2.0 * beta)

    off = np.abs(residual(lambda t: local_entropy(f, grid, t, beta), equation, t))
    assert np.quantile(off, 0.5) < 1e-5
    assert off.max() < 0.02  # walls, and thin layers where two valleys are equally low
    for wrong in (beta / 2.0, beta * 2.0):  # the factor-2 trap: noise of another variance belongs to another equation
        off = np.abs(residual(lambda t, wrong=wrong: local_entropy(f, grid, t, wrong), equation, t))
        assert np.quantile(off, 0.5) > 0.05


@pytest.mark.parametrize("name", FUNCTIONS)
def test_heat_solves_the_heat_equation(name: str) -> None:
    f, grid = FUNCTIONS[name]
    beta = 3.0
    off = np.abs(residual(lambda t: heat(f, grid, t, beta), lambda w: laplacian(w) / (2.0 * beta), 0.15))
    assert np.quantile(off, 0.5) < 1e-6
    assert off.max() < 0.02


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_moreau_envelope_solves_the_hamilton_jacobi_equation_but_at_kinks(name: str) -> None:
    f, grid = FUNCTIONS[name]
    off = np.abs(residual(lambda t: moreau_envelope(f, grid, t), lambda u: -(u.gradient**2).sum(0) / 2.0, 0.15))
    assert np.quantile(off, 0.8) < 1e-4
    assert np.mean(off > 0.01) < 0.06


def test_the_momentum_solves_burgers_equation() -> None:
    """p = grad u: p_t = -p p_x + p_xx/(2 beta)."""
    beta, t, step = 3.0, 0.15, 0.003
    before, now, after = (local_entropy(ROUGH, LINE, time, beta) for time in (t - step, t, t + step))
    rate = (after.gradient[0] - before.gradient[0]) / (2.0 * step)
    third = differences(now.hessian[0, 0], LINE).gradient[0]
    for viscosity, at_most, at_least in ((1.0, 0.05, 0.0), (2.0, np.inf, 0.1)):
        off = np.abs(rate - (-now.gradient[0] * now.hessian[0, 0] + viscosity * third / (2.0 * beta)))
        assert at_least <= np.median(off) <= at_most
        assert np.quantile(off, 0.8) <= 2.0 * at_most


# ---- regularity --------------------------------------------------------------------------------------------------------------

TIMES = (0.003, 0.02, 0.1, 0.5, 2.0)


@pytest.mark.parametrize("beta", [0.5, 5.0, 500.0, None], ids=str)
def test_relaxation_bounds_curvature_from_above(beta: float | None) -> None:
    """sup u_xx <= 1/(1/C + t) for the largest curvature C of f: ever flatter, while -u_xx may grow to form kinks."""
    highest = differences(ROUGH, LINE).hessian.max()
    suprema = []
    for t in TIMES:
        u = local_entropy(ROUGH, LINE, t, beta) if beta else moreau_envelope(ROUGH, LINE, t)
        suprema.append(u.hessian[0, 0, 30:-30].max())
    bound = 1.0 / (1.0 / highest + np.array(TIMES))
    assert np.all(suprema <= bound * (1.0 + 1e-3))
    assert suprema[0] > 0.5 * bound[0]  # near enough to be one that another constant breaks
    if beta is None:
        assert np.all(suprema > 0.9 * bound)


def test_heat_does_not_bound_curvature_so() -> None:
    assert heat(ROUGH, LINE, 2.0, 500.0).hessian[0, 0, 30:-30].max() > 3.0 / (
        1.0 / differences(ROUGH, LINE).hessian.max() + 2.0
    )


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 20.0])
def test_in_more_dimensions_the_laplacian_is_bounded(beta: float) -> None:
    """Lap u <= 1/(1/C_L + t/d), C_L the largest Laplacian of f."""
    highest = laplacian(differences(WELLS, PLANE))[4:-4, 4:-4].max()
    for t in (0.02, 0.2, 1.0):
        u = local_entropy(WELLS, PLANE, t, beta)
        assert laplacian(u)[4:-4, 4:-4].max() <= 1.0 / (1.0 / highest + t / 2.0)


def test_minima_widen_as_they_should() -> None:
    """A global minimiser of f is one of the Moreau envelope, as high, its curvature lambda/(1 + t lambda)."""
    f = rugged()
    lowest = LINE.axes[0][ROUGH.argmin()]
    found = minimize_scalar(f.value, bounds=(lowest - 0.01, lowest + 0.01), method="bounded", options={"xatol": 1e-12})
    grid = Grid(found.x - 2.0, found.x + 2.0, 1601)  # the minimiser is node 800
    values = f.on(grid)
    curvature = float(differences(f.on(Grid(found.x - 1e-3, found.x + 1e-3, 3)), Grid(-1e-3, 1e-3, 3)).hessian[0, 0, 1])
    for t in TIMES:
        u = moreau_envelope(values, grid, t)
        assert u.value[800] == pytest.approx(found.fun, abs=1e-9)
        assert u.value.min() == pytest.approx(found.fun, abs=1e-9)
        assert abs(u.gradient[0, 800]) < 1e-4
        assert u.hessian[0, 0, 800] == pytest.approx(widened(curvature, t), rel=1e-3)
    # Viscosity moves minima, and heat raises the narrow more than the wide.
    assert abs(local_entropy(values, grid, 0.5, 3.0).gradient[0, 800]) > 0.01


def test_local_entropy_lies_between_the_envelope_and_heat() -> None:
    """beta to infinity gives the Moreau envelope at the rate 1/beta; beta to 0 at fixed t/beta the Gaussian average."""
    t = 0.15
    envelope = moreau_envelope(ROUGH, LINE, t).value
    off = [np.abs(local_entropy(ROUGH, LINE, t, beta).value - envelope)[30:-30].max() for beta in (1e2, 1e3, 1e4, 1e6)]
    assert np.all(np.array(off) < 5.0 / np.array([1e2, 1e3, 1e4, 1e6]))
    average = heat(ROUGH, LINE, 1.0, 20.0).value
    far = [np.abs(local_entropy(ROUGH, LINE, beta / 20.0, beta).value - average).max() for beta in (0.1, 0.01, 0.001)]
    assert np.allclose(np.divide(far[:-1], far[1:]), 10.0, rtol=0.3)


# ---- one gradient, three ways ------------------------------------------------------------------------------------------------


def test_fixed_point_prox_and_hopf_lax_gradient_are_one() -> None:
    """p = grad f(x - t p) [Steffensen's iteration], (x - argmin)/t [golden section], grad u [the solver], where t Lip < 1."""
    f = rugged()
    highest = np.abs(differences(ROUGH, LINE).hessian).max()
    t = 0.6 / highest
    grid = Grid(-3.0, 3.0, 4801)
    u = moreau_envelope(f.on(grid), grid, t)
    for i in range(400, 4401, 500):
        x = grid.axes[0][i]
        p = float(fixed_point(lambda p, x=x: f.gradient(x - t * p)[0], f.gradient(x)[0], xtol=1e-12, maxiter=1000))
        near = {"bounds": (x - 0.5, x + 0.5), "method": "bounded", "options": {"xatol": 1e-12}}
        prox = minimize_scalar(lambda y, x=x: f.value(y) + (x - y) ** 2 / (2.0 * t), **near)
        assert u.gradient[0, i] == pytest.approx(p, rel=1e-6)
        assert (x - prox.x) / t == pytest.approx(p, rel=1e-4)
        assert u.value[i] == pytest.approx(prox.fun, abs=1e-8)
        assert abs(p - f.gradient(x)[0]) > 1e-3 * abs(p)


def test_grad_u_is_the_mean_gradient_under_the_gibbs_density() -> None:
    """(x - <y>)/t = <grad f(y)>, by quadrature that shares nothing with the solver's."""
    f, t, beta = rugged(), 0.15, 3.0
    y = np.linspace(-3.0, 3.0, 60_001)
    u = local_entropy(ROUGH, LINE, t, beta)
    trap = []
    for i in range(150, 451, 50):
        x = LINE.axes[0][i]
        energies = f.value(y) + (x - y) ** 2 / (2.0 * t)
        weights = np.exp(-beta * (energies - energies.min()))
        assert u.gradient[0, i] == pytest.approx(np.average(f.gradient(y)[0], weights=weights), abs=1e-7)
        assert u.gradient[0, i] == pytest.approx((x - np.average(y, weights=weights)) / t, abs=1e-7)
        wrong = np.exp(-2.0 * beta * (energies - energies.min()))  # noise beta^(-1/2) would sample this
        trap.append(abs(u.gradient[0, i] - (x - np.average(y, weights=wrong)) / t))
    assert max(trap) > 0.1


def test_heat_averages_the_gradient() -> None:
    """grad w = E grad f(x + sqrt(t/beta) z), by Gauss-Hermite quadrature, exact for polynomials."""
    f, t, beta = double_well(), 0.04, 2.0
    w = heat(WELLS, PLANE, t, beta)
    z, share = np.polynomial.hermite_e.hermegauss(8)
    steps, weights = np.sqrt(t / beta) * np.stack(np.meshgrid(z, z)), np.outer(share, share) / share.sum() ** 2
    for i, j in ((50, 44), (45, 38), (30, 50)):
        x, y = PLANE.nodes[:, i, j]
        want = [np.sum(weights * g) for g in f.gradient(x + steps[0], y + steps[1])]
        assert np.allclose(w.gradient[:, i, j], want, rtol=0.0, atol=1e-9)
        assert not np.allclose(w.gradient[:, i, j], f.gradient(x, y), rtol=0.0, atol=1e-3)
