"""Local entropy, heat smoothing and the Moreau envelope on grids: closed forms, orders of convergence, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from deeprelax_cuda.pde import (
    Grid,
    Jet,
    differences,
    double_well,
    heat,
    heated_cosine,
    local_entropy,
    lower_envelope,
    moreau_envelope,
    relaxed_quadratic,
    rugged,
    valleys,
    widened,
)

A = np.array([[2.0, 0.5], [0.5, 1.0]])
LINE, PLANE = Grid(-6.0, 6.0, 241), Grid((-6.0, -5.0), (6.0, 5.0), (121, 101))
#: Temperatures for which the density is wide, narrow, and far narrower than the spacing.
TEMPERATURES = (0.2, 1e-3, 1e-8)


def quadratic(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return a quadratic's matrix and values."""
    a = A[: grid.dimensions, : grid.dimensions]
    return a, np.einsum("i...,ij,j...->...", grid.nodes, a, grid.nodes) / 2.0


def inside(grid: Grid, half: float) -> np.ndarray:
    return np.all(np.abs(grid.nodes) <= half, axis=0)


def worst(got: Jet, want: Jet, where: np.ndarray) -> list[float]:
    """Return the largest errors of value, gradient and Hessian among the nodes ``where``."""
    return [float(np.abs(a - b)[..., where].max()) for a, b in zip(got, want, strict=True)]


# ---- closed forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [LINE, PLANE], ids=["1-D", "2-D"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_local_entropy_of_a_quadratic(grid: Grid, temperature: float) -> None:
    a, f = quadratic(grid)
    got, want = local_entropy(f, grid, 0.7, 1.0 / temperature), relaxed_quadratic(a, grid.nodes, 0.7, 1.0 / temperature)
    value, gradient, hessian = worst(got, want, inside(grid, 2.0))
    assert value < 1e-13
    assert gradient < 1e-11
    assert hessian < max(1e-10, 1e-13 / temperature)  # rounding of f over the variance


@pytest.mark.parametrize("grid", [LINE, PLANE], ids=["1-D", "2-D"])
def test_moreau_envelope_of_a_quadratic(grid: Grid) -> None:
    a, f = quadratic(grid)
    got, want = moreau_envelope(f, grid, 0.7), relaxed_quadratic(a, grid.nodes, 0.7)
    assert max(worst(got, want, inside(grid, 2.0))) < 1e-11


@pytest.mark.parametrize("grid", [LINE, PLANE], ids=["1-D", "2-D"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_heat_of_a_quadratic_adds_half_the_trace(grid: Grid, temperature: float) -> None:
    a, f = quadratic(grid)
    got, x = heat(f, grid, 0.7, 1.0 / temperature), grid.nodes
    hessian = np.broadcast_to(a.reshape(*a.shape, *(1,) * grid.dimensions), (*a.shape, *grid.shape))
    want = Jet(f + 0.7 * temperature * np.trace(a) / 2.0, np.tensordot(a, x, 1), hessian)
    value, gradient, second = worst(got, want, inside(grid, 2.0))
    assert value < 1e-12
    assert gradient < max(1e-12, 1e-11 / math.sqrt(temperature))
    assert second < max(1e-10, 1e-11 / temperature)


@pytest.mark.parametrize("temperature", [2.0, 0.05])
def test_heat_of_a_cosine_decays(temperature: float) -> None:
    """exp(-w^2 t/(2 beta)) cos(w x), walls at its extrema: exact."""
    grid = Grid(-math.pi, 2.0 * math.pi, 241)
    for frequency in (1.0, 3.0):
        wave = heated_cosine(frequency, grid.axes[0], 0.8, 1.0 / temperature)
        got = heat(np.cos(frequency * grid.axes[0]), grid, 0.8, 1.0 / temperature)
        assert max(worst(got, wave, np.full(grid.shape, True))) < 1e-12


def test_heat_is_a_product_in_two_dimensions() -> None:
    grid = Grid((0.0, 0.0), (math.pi, math.pi), (81, 61))
    x, y = grid.axes
    got = heat(np.multiply.outer(np.cos(x), np.cos(2.0 * y)), grid, 0.5, 2.0)
    one, two = heated_cosine(1.0, x, 0.5, 2.0), heated_cosine(2.0, y, 0.5, 2.0)
    outer = np.multiply.outer
    mixed = outer(one.gradient[0], two.gradient[0])
    want = Jet(
        outer(one.value, two.value),
        np.array([outer(one.gradient[0], two.value), outer(one.value, two.gradient[0])]),
        np.array([[outer(one.hessian[0, 0], two.value), mixed], [mixed, outer(one.value, two.hessian[0, 0])]]),
    )
    assert max(worst(got, want, np.full(grid.shape, True))) < 1e-12


def test_the_closed_form_of_a_quadratic_is_its_own_integral() -> None:
    """Against an integral that shares nothing with it, where f falls in one direction too."""
    y, h = np.linspace(-12.0, 12.0, 1201, retstep=True)
    a, x, t, beta = np.array([[1.5, -0.4], [-0.4, -0.3]]), np.array([0.7, -0.4]), 0.6, 1.7
    u, v = np.meshgrid(y, y, indexing="ij")
    f = (a[0, 0] * u**2 + 2.0 * a[0, 1] * u * v + a[1, 1] * v**2) / 2.0
    mass = np.exp(-beta * (f + ((u - x[0]) ** 2 + (v - x[1]) ** 2) / (2.0 * t))) * beta / (2.0 * math.pi * t)
    assert relaxed_quadratic(a, x, t, beta).value == pytest.approx(-math.log(mass.sum() * h * h) / beta, abs=1e-10)
    with pytest.raises(ValueError, match="positive definite, got an eigenvalue -"):
        relaxed_quadratic(a, x, 10.0)


# ---- orders of convergence ---------------------------------------------------------------------------------------------------

T = 0.1
FINE = 2401


def errors(solve: Callable[[np.ndarray, Grid], Jet], points: list[int], quantile: float = 0.9) -> np.ndarray:
    """Return the errors of value, gradient and Hessian on the rugged function, for each number of nodes, from a fine grid.

    They are quantiles over the nodes: a node beside a kink of u would decide on the largest.
    """
    reference = solve(*rough(FINE))
    found = []
    for n in points:
        got, stride = solve(*rough(n)), (FINE - 1) // (n - 1)
        found.append([np.quantile(np.abs(a - b[..., ::stride]), quantile) for a, b in zip(got, reference, strict=True)])
    return np.array(found)


def rough(n: int) -> tuple[np.ndarray, Grid]:
    grid = Grid(-3.0, 3.0, n)
    return rugged().on(grid), grid


@pytest.mark.slow
@pytest.mark.parametrize("solve", [lambda f, grid: local_entropy(f, grid, T, 1e8), lambda f, grid: moreau_envelope(f, grid, T)])
def test_between_the_nodes_the_orders_are_4_3_2(solve: Callable[[np.ndarray, Grid], Jet]) -> None:
    first, last = errors(solve, [151, 601])
    measured = np.log2(first / last) / 2.0
    assert np.all(measured > [3.5, 2.6, 1.7]), measured


@pytest.mark.slow
def test_the_orders_of_heat_below_the_spacing() -> None:
    """At the nodes f is known, and the spline's slope better than between them; of f'' a share of t/beta is in the value."""
    first, last = errors(lambda f, grid: heat(f, grid, T, 1e6), [151, 601])
    measured = np.log2(first / last) / 2.0
    assert np.all(measured > [1.8, 2.7, 1.8]), measured
    assert np.all(last < [1e-7 * 0.1, 1e-3, 0.2])


@pytest.mark.parametrize("solve", [local_entropy, heat])
def test_a_density_that_the_nodes_resolve_is_averaged_as_well_as_float64_can(solve: Callable[..., Jet]) -> None:
    """Five times the nodes take the error from where it can be seen to rounding."""
    first, last = errors(lambda f, grid: solve(f, grid, T, 10.0), [61, 301], quantile=0.6)
    assert np.all(first > 1e6 * last)  # order 8 would be 4e5 times less
    assert np.all(last < [1e-12, 1e-11, 1e-9])


def test_two_narrow_valleys_far_apart_are_both_found() -> None:
    """At a node x the two minima of f(y) + (x - y)^2/(2t) are made equally low, neither of them at a node.

    The density is a thousandth of the spacing wide; of the two nodes beside the minima one is lower by thousands of T.
    """
    grid, t, temperature = Grid(-2.0, 2.0, 41), 0.8, 1e-7
    nodes, at = grid.axes[0], 21
    x, wells = nodes[at], (nodes + 0.97) ** 2 * (nodes - 0.93) ** 2 * (1.0 + 0.2 * nodes)
    left, right = (np.linspace(*ends, 1_000_001) for ends in ((-1.3, -0.6), (0.6, 1.3)))
    spline = CubicSpline(nodes, wells)  # what the solver sees between the nodes

    def energy(y: np.ndarray, tilt: float) -> np.ndarray:
        return spline(y) + tilt * y + (x - y) ** 2 / (2.0 * t)

    tilt = brentq(lambda tilt: energy(left, tilt).min() - energy(right, tilt).min(), -1.0, 1.0, xtol=1e-15)
    y = np.concatenate([left, right])
    energies = energy(y, tilt)
    weights = np.exp((energies.min() - energies) / temperature)
    mass = weights.sum() * (left[1] - left[0]) / math.sqrt(2.0 * math.pi * t * temperature)
    mean = np.average(y, weights=weights)
    assert abs(mean) < 0.6  # both count
    f = wells + tilt * nodes
    nearest = [min(f[i] + (x - nodes[i]) ** 2 / (2.0 * t) for i in side) for side in (range(5, 15), range(25, 35))]
    assert abs(nearest[0] - nearest[1]) > 1000.0 * temperature

    jet = local_entropy(f, grid, t, 1.0 / temperature)
    assert jet.value[at] == pytest.approx(energies.min() - temperature * math.log(mass), abs=1e-12)
    assert jet.gradient[0, at] == pytest.approx((x - mean) / t, abs=1e-6)
    variance = np.average((y - mean) ** 2, weights=weights)
    assert jet.hessian[0, 0, at] == pytest.approx(1.0 / t - variance / (temperature * t**2), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1e-4, 1e-8])
def test_a_curved_valley_of_two_variables(temperature: float) -> None:
    """The mean of y bends with x: u is the envelope all the same, but for T, and nowhere more curved than 1/t."""
    t, errors = 0.05, []
    for n in (41, 81):
        grid = Grid((-2.0, -2.0), (2.0, 2.0), (n, n))
        x, y = grid.nodes
        f = x**2 / 2.0 + (y - np.sin(2.0 * x)) ** 2
        u = local_entropy(f, grid, t, 1.0 / temperature)
        off = [np.abs(a - b)[..., inside(grid, 1.0)] for a, b in zip(u, moreau_envelope(f, grid, t), strict=True)]
        errors.append([np.median(part) for part in off])
        assert off[2].max() < 0.1
        eigenvalues = np.linalg.eigvalsh(np.moveaxis(u.hessian, (0, 1), (-2, -1)))
        assert eigenvalues[inside(grid, 1.0)].max() < 1.0 / t
    assert np.all(np.array(errors[-1]) < [5e-8 + temperature, 2e-6 + 2.0 * temperature, 1e-4 + 2.0 * temperature])
    assert errors[0][2] > 2.0 * errors[1][2]


def test_a_narrow_hole_beside_a_wide_valley() -> None:
    """At x the hole is as deep as makes both weigh the same: the valley is summed over the nodes, the hole between them."""
    x, t, temperature = -0.15, 1.0, 2e-3
    y = np.linspace(-3.0, 3.0, 600_001)

    def f(y: np.ndarray, depth: float) -> np.ndarray:
        return 0.1 * (y + 1.0) ** 2 + depth * valleys([[1.0]], depths=[1.0], widths=[0.12]).value(y)

    def energies(depth: float) -> np.ndarray:
        return f(y, depth) + (x - y) ** 2 / (2.0 * t)

    def weights(depth: float) -> np.ndarray:
        return np.exp((energies(depth).min() - energies(depth)) / temperature)

    depth = brentq(lambda depth: np.sum(np.where(y > 0.5, 1.0, -1.0) * weights(depth)), 0.5, 2.0)
    mass = weights(depth).sum() * 1e-5 / math.sqrt(2.0 * math.pi * t * temperature)
    value = energies(depth).min() - temperature * math.log(mass)
    mean = np.average(y, weights=weights(depth))
    off = []
    for n in (161, 321, 641):
        grid = Grid(-3.0, 3.0, n)
        at = int(np.argmin(np.abs(grid.axes[0] - x)))
        u = local_entropy(f(grid.axes[0], depth), grid, t, 1.0 / temperature)
        off.append([u.value[at] - value, u.gradient[0, at] - (x - mean) / t])
    assert np.all(np.abs(off) < [[1e-4, 0.05], [1e-5, 5e-3], [1e-6, 5e-4]]), off


@pytest.mark.parametrize("t", [1e-3, 1e-9, 1e-15])
def test_a_short_time_changes_little(t: float) -> None:
    """To first order in t, u = f - t |f'|^2/2 + t f''/(2 beta): gradient and Hessian are f's, and not those of rounding."""
    grid = Grid(-math.pi, math.pi, 241)
    f = np.cos(grid.axes[0])
    slope, bend = -np.sin(grid.axes[0]), -f
    for beta in (1.0, 1e8):
        for solve in (local_entropy, heat, lambda f, grid, t, beta: moreau_envelope(f, grid, t)):
            if t / beta < 1e-18:
                continue
            jet = solve(f, grid, t, beta)
            assert np.abs(jet.value - f).max() < 2.0 * t + 1e-7
            assert np.abs(jet.gradient[0] - slope).max() < 2.0 * t + 1e-4
            assert np.abs(jet.hessian[0, 0] - bend).max() < 2.0 * t + 0.01


def test_a_slope_at_a_wall_makes_it_second_order() -> None:
    first, last = errors(lambda f, grid: local_entropy(f, grid, T, 1.0), [151, 601], quantile=1.0)
    assert np.allclose(np.log2(first / last) / 2.0, 2.0, atol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(("t", "beta"), [(0.3, 4.0), (0.3, 1e5)])
def test_in_two_dimensions_gradient_and_hessian_are_those_of_the_value(t: float, beta: float) -> None:
    grid = Grid((-2.0, -1.7), (2.1, 2.0), (165, 149))
    f = double_well().on(grid)
    for solve in (local_entropy, heat, lambda f, grid, t, beta: moreau_envelope(f, grid, t)):
        jet = solve(f, grid, t, beta)
        off = [np.abs(a - b) for a, b in zip(jet, differences(jet.value, grid), strict=True)]
        # The quantile leaves out walls, and the kink between the wells that u of low temperature has.
        assert np.quantile(off[1], 0.9) < 0.01, solve
        assert np.quantile(off[2], 0.9) < 0.02, solve


# ---- the lower envelope ------------------------------------------------------------------------------------------------------


@given(
    arrays(np.float64, st.integers(3, 40), elements=st.integers(-5, 5).map(float) | st.floats(-1e3, 1e3)),
    st.sampled_from([1e-6, 0.01, 0.5, 3.0, 1e6]),
)
def test_the_lower_envelope_is_the_minimum_over_the_nodes(f: np.ndarray, t: float) -> None:
    grid = Grid(-1.0, 2.0, len(f))
    x = grid.axes[0]
    every = f + (x[:, None] - x) ** 2 / (2.0 * t)
    value, index = lower_envelope(f, grid, t)
    assert np.allclose(value, every.min(1), rtol=1e-9, atol=1e-9)
    assert np.allclose(every[np.arange(len(f)), index[0]], every.min(1), rtol=1e-9, atol=1e-9)


@given(arrays(np.float64, st.tuples(st.integers(3, 7), st.integers(3, 7)), elements=st.floats(-3.0, 3.0)))
def test_the_lower_envelope_in_two_dimensions(f: np.ndarray) -> None:
    grid = Grid((0.0, -1.0), (1.0, 1.0), f.shape)
    nodes = grid.nodes.reshape(2, -1)
    every = f.ravel() + np.sum((nodes[:, :, None] - nodes[:, None]) ** 2, axis=0) / 0.6
    value, index = lower_envelope(f, grid, 0.3)
    assert np.allclose(value.ravel(), every.min(1), rtol=0.0, atol=1e-12)
    flat = np.ravel_multi_index(tuple(index), f.shape).ravel()
    assert np.allclose(every[np.arange(f.size), flat], every.min(1), rtol=0.0, atol=1e-12)


def test_the_lower_envelope_takes_linear_time() -> None:
    """Of 200,000 nodes there are 4*10^10 pairs: a method that looks at all of them does not come back."""
    n = 200_000
    grid = Grid(0.0, float(n - 1), n)
    for f in (np.zeros(n), -grid.axes[0], np.random.default_rng(0).normal(size=n) * 1e3):
        value, index = lower_envelope(f, grid, 50.0)
        assert np.all(value <= f)
        assert np.allclose(value, f[index[0]] + (grid.axes[0] - index[0]) ** 2 / 100.0)


def test_a_kink_of_f_is_found_between_its_neighbours() -> None:
    """|x| becomes Huber's function; the spline rings at the kink, by no more than the order that is stated."""
    bounds = []
    for n in (201, 801):
        grid = Grid(-2.0, 2.0, n)
        x = grid.axes[0]
        huber = np.where(np.abs(x) < 0.5, x**2, np.abs(x) - 0.25)
        got = moreau_envelope(np.abs(x), grid, 0.5)
        bounds.append([np.abs(got.value - huber).max(), np.abs(got.gradient[0] - np.clip(2.0 * x, -1.0, 1.0)).max()])
    assert np.all(np.divide(*bounds) > 3.5)
    assert np.all(np.array(bounds[-1]) < [0.002, 0.02])


@pytest.mark.slow
def test_the_envelope_near_a_tie_of_two_valleys() -> None:
    """The nodes may tell the wrong one of two valleys as the lower; over many tilts the value is of order 4 all the same."""
    worst_of, t = [], 0.8
    for n in (41, 81):
        grid, off = Grid(-2.0, 2.0, n), []
        fine = np.linspace(-1.5, 1.5, 30_001)
        middle = float(grid.axes[0][n // 2])
        for tilt in np.linspace(-0.16, -0.04, 121):
            f = double_well(tilt=float(tilt))
            u = moreau_envelope(f.value(grid.axes[0], 0.5 * grid.axes[0]) + 0.1 * grid.axes[0] ** 3, grid, t)
            near = f.value(fine, 0.5 * fine) + 0.1 * fine**3 + (middle - fine) ** 2 / (2.0 * t)
            off.append(abs(u.value[n // 2] - near.min()))
        worst_of.append(max(off))
    assert worst_of[0] < 3e-5
    assert worst_of[1] < 3e-6


def test_a_bent_valley_on_few_nodes_is_followed_to_its_minimum() -> None:
    """p = grad f(x - t p), and no curvature above 1/t, where Newton's iteration has far to go."""
    grid = Grid((-2.0, -2.0), (2.0, 2.0), (11, 81))
    x, y = grid.nodes
    for t in (0.5, 5.0):
        u = moreau_envelope((x - 1.0) ** 2 / 4.0 + 4.0 * (y - x**2) ** 2, grid, t)
        eigenvalues = np.linalg.eigvalsh(np.moveaxis(u.hessian, (0, 1), (-2, -1)))
        assert eigenvalues.max() <= (1.0 + 1e-9) / t
    saddle = moreau_envelope(-(grid.nodes[0] ** 2) / 2.0, grid, 1.0)  # E has no curvature
    assert np.isfinite(saddle.hessian).all()


def test_a_wall_holds_the_minimiser() -> None:
    """f falls towards both walls: y stays at a wall, p = (x - y)/t."""
    grid = Grid((-1.0, 0.0), (1.0, 1.0), (41, 31))
    x, y = grid.nodes
    got = moreau_envelope(-3.0 * x + 0.5 * y**2, grid, 0.5)
    assert np.allclose(got.gradient[0][x > -0.4], (x[x > -0.4] - 1.0) / 0.5, atol=1e-12)
    assert np.allclose(got.hessian[0, 0][x > -0.4], 2.0, atol=1e-12)
    assert np.allclose(got.gradient[1], y / 1.5, atol=1e-9)
    assert np.allclose(got.hessian[1, 1], 1.0 / 1.5, atol=1e-8)
    assert np.allclose(got.hessian[0, 1], 0.0, atol=1e-12)


def test_coupled_variables_on_nodes_of_unlike_spacing() -> None:
    """Nodes 73 times as far apart in y as in x: the lowest one is several of x's spacings from the minimiser."""
    grid = Grid((-1.75, -1.75), (1.75, 1.75), (1025, 15))
    got = moreau_envelope(double_well().on(grid), grid, 0.025)
    y = grid.nodes - 0.025 * got.gradient
    want = np.stack(double_well().gradient(*y))  # p = grad f(x - t p); of degree 2 in y, so that the spline is exact there
    assert np.abs(got.gradient - want)[:, inside(grid, 1.5)].max() < 1e-5


# ---- properties that every smoothing has -------------------------------------------------------------------------------------

GRID = Grid(-1.0, 2.0, 61)
SMOOTH: dict[str, Callable[..., Jet]] = {
    "local entropy": local_entropy,
    "heat": heat,
    "Moreau envelope": lambda f, grid, t, beta: moreau_envelope(f, grid, t),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("beta", [0.3, 20.0, 1e8])
def test_a_constant_stays_and_one_that_is_added_passes_through(name: str, beta: float) -> None:
    solve, f = SMOOTH[name], rugged().on(GRID)
    jet = solve(np.full(GRID.shape, 3.0), GRID, 0.2, beta)
    assert np.allclose(jet.value, 3.0, rtol=1e-13)
    assert np.abs(jet.gradient).max() < 1e-6
    shifted, plain = solve(f + 100.0, GRID, 0.2, beta), solve(f, GRID, 0.2, beta)
    assert np.allclose(shifted.value, plain.value + 100.0, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 5.0, 200.0, 1e8])
def test_the_three_are_ordered(beta: float) -> None:
    """min f <= local entropy <= heat (Jensen); min f <= Moreau envelope <= f.

    Where f'' <= C, f(y) + |x - y|^2/(2t) is at most the envelope's minimum and (1/t + C)|y - y*|^2/2: the Gaussian integral of
    that says local entropy <= envelope + log(1 + tC)/(2 beta).
    """
    grid = Grid(-3.0, 3.0, 601)
    f, t = rugged().on(grid), 0.15
    lowest = rugged().on(Grid(-3.0, 3.0, 60_001)).min()
    u, w, m = (SMOOTH[name](f, grid, t, beta).value for name in ("local entropy", "heat", "Moreau envelope"))
    assert np.all(lowest - 1e-5 <= u)
    assert np.all(u <= w + 1e-12)
    assert np.all(m >= lowest - 1e-5)
    assert np.all(m <= f + 1e-12)
    highest = differences(f, grid).hessian.max()
    assert np.all(u <= m + math.log1p(t * highest) / (2.0 * beta) + 1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_smoothing_for_a_time_and_another_is_smoothing_for_both(name: str) -> None:
    """The solution operators are a semigroup."""
    solve, grid = SMOOTH[name], Grid(-2.0, 2.0, 601)
    f = double_well().value(grid.axes[0], 0.4 * grid.axes[0])
    twice = solve(solve(f, grid, 0.05, 3.0).value, grid, 0.1, 3.0).value
    once = solve(f, grid, 0.15, 3.0).value
    assert np.abs(twice - once).max() < 1e-6
    assert np.abs(twice - solve(f, grid, 0.14, 3.0).value).max() > 1e-3


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1.0]))
def test_the_smoothings_keep_order_and_distance(seed: int, beta: float) -> None:
    """f <= g gives u_f <= u_g, and the largest distance never grows: even of noise, where the density is resolved."""
    random = np.random.default_rng(seed)
    f = random.normal(size=GRID.shape)
    g = f + random.uniform(size=GRID.shape)
    for solve in (local_entropy, heat):
        u, v = solve(f, GRID, 0.2, beta).value, solve(g, GRID, 0.2, beta).value
        assert np.all(u <= v + 1e-12)
        assert np.abs(u - v).max() <= np.abs(f - g).max() + 1e-12
    lower = lower_envelope(f, GRID, 0.1)[0], lower_envelope(g, GRID, 0.1)[0]
    assert np.all(lower[0] <= lower[1])
    assert np.abs(lower[0] - lower[1]).max() <= np.abs(f - g).max() + 1e-12


@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
def test_a_gaussian_wider_than_the_box_is_thrown_back_by_its_walls(spread: float) -> None:
    """Heat comes to the mean over the box, local entropy to -T log of the mean of exp(-f/T)."""
    grid = Grid(-1.0, 1.0, 101)
    f = np.cos(math.pi * grid.axes[0])  # decays by exp(-(pi*spread)^2/2)
    got = heat(f, grid, spread**2, 1.0).value
    assert np.allclose(got, math.exp(-((math.pi * spread) ** 2) / 2.0) * f, rtol=0.0, atol=1e-13)
    if spread > 2.0:
        entropy = local_entropy(f, grid, spread**2, 1.0)
        assert np.allclose(entropy.value, -math.log(grid.integrate(np.exp(-f)) / 2.0), rtol=0.0, atol=1e-12)
        assert np.abs(entropy.gradient).max() < 1e-12


def test_the_widened_curvature() -> None:
    assert np.allclose(widened([0.0, 1.0, 4.0], 0.5), [0.0, 2.0 / 3.0, 4.0 / 3.0])
    assert widened(3.0, 0.0) == 3.0


# ---- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
def test_a_time_out_of_range_is_refused(name: str, t: float) -> None:
    with pytest.raises(ValueError, match="t: expected a finite number above 0, got"):
        SMOOTH[name](np.zeros(GRID.shape), GRID, t, 1.0)


@pytest.mark.parametrize("solve", [local_entropy, heat])
def test_a_temperature_out_of_range_is_refused(solve: Callable[..., Any]) -> None:
    for beta in (0.0, -2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta: expected a finite number above 0, got"):
            solve(np.zeros(GRID.shape), GRID, 1.0, beta)
    with pytest.raises(ValueError, match=r"t, beta: .* is lost in a box of width 3: expected 1e-10 of it"):
        solve(np.zeros(GRID.shape), GRID, 1.0, 1e30)


@pytest.mark.parametrize("f", [np.cos(GRID.axes[0]) + 1e10, 1e307 * GRID.axes[0]], ids=["an offset", "huge"])
def test_what_float64_does_not_know_to_within_the_temperature_is_refused(f: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"f, beta: float64 knows f = .* only, too little for 1/beta = 1e-08"):
        local_entropy(f, GRID, 0.1, 1e8)


def test_what_overflows_is_refused() -> None:
    for f, t in ((1e307 * GRID.axes[0], 1.0), (GRID.axes[0], 1e308)):
        with pytest.raises(ValueError, match=r"f, t: expected f t/h\^2 within float64"):
            moreau_envelope(f, GRID, t)


@pytest.mark.parametrize(("t", "beta"), [(1e4, 1.0), (1e12, 1e-3), (1e300, 1e-300)])
def test_a_gaussian_of_any_width_is_one_of_a_few_boxes(t: float, beta: float) -> None:
    f = rugged().on(GRID)
    mean = GRID.integrate(f) / 3.0
    assert np.allclose(heat(f, GRID, t, beta).value, mean, rtol=1e-12)
    entropy = local_entropy(f, GRID, t, beta)
    assert np.allclose(entropy.value * beta, -math.log(GRID.integrate(np.exp(-beta * f)) / 3.0), rtol=1e-9, atol=1e-15)
    assert np.abs(entropy.gradient).max() < 1e-9 * max(1.0, 1.0 / beta)


@pytest.mark.parametrize("name", SMOOTH)
def test_values_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"f: expected shape \(61,\), got \(60,\)"):
        SMOOTH[name](np.zeros(60), GRID, 1.0, 1.0)
    with pytest.raises(ValueError, match="f: expected finite numbers, got inf"):
        SMOOTH[name](np.full(GRID.shape, math.inf), GRID, 1.0, 1.0)
