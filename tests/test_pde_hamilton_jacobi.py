"""The Hamilton-Jacobi scheme: monotone up to its bound and not above, and of order 1 against solutions found in other ways."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr

from deeprelax_cuda.pde import Grid, differences, hamilton_jacobi, largest_step, local_entropy, relaxed_quadratic, rugged
from deeprelax_cuda.pde.grid import Array
from deeprelax_cuda.pde.hamilton_jacobi import _change

BETAS = (math.inf, 4.0)


def order(errors: list[float]) -> float:
    """Return the order of convergence that the last of errors tell, each at half the spacing of the one before."""
    return math.log2(errors[-2] / errors[-1])


def kinked(x: Array) -> Array:
    """Minima of two depths and widths, between which the solution has a shock; even about the walls at -2 and 2."""
    return np.minimum(1.5 * (x - 1.0) ** 2 + 0.2, 3.0 * (x + 0.8) ** 2) * np.cos(np.pi * x / 4.0) ** 2


def envelope(x: Array, t: float) -> Array:
    """min over y of kinked(y) + (x - y)^2/(2t), by trying every y."""
    y = np.linspace(-2.0, 2.0, 8001)
    return np.min(kinked(y) + (x[:, None] - y) ** 2 / (2.0 * t), axis=1)


def wave(x: Array) -> Array:
    """Even about the walls at -2 and 2, so that its reflections are itself."""
    return np.cos(np.pi * x / 2.0) + 0.4 * np.cos(np.pi * x)


def entropy(x: Array, t: float, beta: float) -> Array:
    """-1/beta log of E exp(-beta wave(x + sqrt(t/beta) z)), z standard normal, by the trapezoidal rule in z."""
    z = np.linspace(-9.0, 9.0, 721)
    law = np.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi) * (z[1] - z[0])
    return -np.log(np.exp(-beta * wave(x[:, None] + math.sqrt(t / beta) * z)) @ law) / beta


def quadratic(grid: Grid, matrix: Array, t: float, beta: float) -> Array:
    """x'A(I + tA)^-1 x/2 + log det(I + tA)/(2 beta)."""
    moved = np.eye(len(matrix)) + t * matrix
    value: Array = np.einsum("i...,ij,j...", grid.nodes, matrix @ np.linalg.inv(moved), grid.nodes) / 2.0
    return value + math.log(np.linalg.det(moved)) / (2.0 * beta)


# ---- Against other ways to the solution --------------------------------------------------------------------------------------


def test_order_1_through_a_shock() -> None:
    errors = []
    for points in (201, 401, 801):
        grid = Grid(-2.0, 2.0, points)
        x, times = grid.axes[0], [0.05, 0.4]
        u = hamilton_jacobi(kinked(x), grid, times)
        errors.append(max(np.abs(row - envelope(x, t)).max() for row, t in zip(u, times, strict=True)))
    assert order(errors) > 0.8, errors
    assert errors[-1] < 0.02


def test_order_1_with_viscosity() -> None:
    beta, times = 2.0, [0.1, 0.5]
    errors = []
    for points in (51, 101, 201):
        grid = Grid(-2.0, 2.0, points)
        x = grid.axes[0]
        u = hamilton_jacobi(wave(x), grid, times, beta)
        errors.append(max(np.abs(row - entropy(x, t, beta)).max() for row, t in zip(u, times, strict=True)))
    assert order(errors) > 0.9, errors
    assert errors[-1] < 0.02


def test_order_1_in_the_step() -> None:
    """On one grid, against its own solution at a small step; a short time, as what is of order h is the same for both."""
    grid = Grid(-2.0, 2.0, 81)
    f = wave(grid.axes[0])
    step = largest_step(f, grid, 8.0)
    fine = hamilton_jacobi(f, grid, [0.3], 8.0, step=step / 64.0)
    errors = [np.abs(hamilton_jacobi(f, grid, [0.3], 8.0, step=step / n) - fine).max() for n in (1.0, 2.0, 4.0)]
    assert 0.9 < order(errors) < 1.2, errors


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("matrix", [[[2.0]], [[-0.6]], [[2.0, 0.6], [0.6, 1.0]], [[1.0, 0.5], [0.5, -0.4]]], ids=str)
def test_quadratics(matrix: list[list[float]], beta: float) -> None:
    """Away from walls, in one dimension and two, minima and saddles."""
    d, t = len(matrix), 0.5
    errors = []
    for points in (61, 121) if d == 2 else (161, 321):
        grid = Grid([-4.0] * d, [4.0] * d, [points] * d)
        u = hamilton_jacobi(quadratic(grid, np.array(matrix), 0.0, beta), grid, [t], beta)[0]
        inside = (np.abs(grid.nodes) <= 1.0).all(axis=0)
        errors.append(float(np.abs(u - quadratic(grid, np.array(matrix), t, beta))[inside].max()))
    assert order(errors) > 0.85, errors
    assert errors[-1] < 0.05


def test_a_kink_that_opens_into_a_fan_costs_order() -> None:
    """|x| becomes Huber's function; about h log 1/h is left, which is order 3/4 between these grids."""
    t, errors = 0.5, []
    for points in (101, 201, 401, 801):
        grid = Grid(-2.0, 2.0, points)
        x = np.abs(grid.axes[0])
        huber = np.where(x < t, x * x / (2.0 * t), x - t / 2.0)
        errors.append(float(np.abs(hamilton_jacobi(x, grid, [t])[0] - huber)[x <= 1.4].max()))
    assert 0.65 < order(errors) < 0.9, errors
    assert errors[-1] < 0.004


@pytest.mark.parametrize(
    ("temperature", "sizes", "low", "high"), [(0.5, (101, 201, 401), 0.85, 1.0), (0.01, (101, 201, 401, 801), 0.5, 0.75)]
)
def test_viscosity_gives_a_fan_order_1_once_the_spacing_resolves_it(
    temperature: float, sizes: tuple[int, ...], low: float, high: float
) -> None:
    """|x| by Hopf-Cole: the averages of exp(-y/T) over y > 0 and exp(y/T) over y < 0, both by the normal law."""
    t, errors = 0.5, []
    for points in sizes:
        grid = Grid(-3.0, 3.0, points)
        x = grid.axes[0]
        halves = [t / (2.0 * temperature) + side / temperature for side in (-x, x)]
        tails = [log_ndtr((side - t) / math.sqrt(t * temperature)) for side in (x, -x)]
        want = -temperature * np.logaddexp(halves[0] + tails[0], halves[1] + tails[1])
        got = hamilton_jacobi(np.abs(x), grid, [t], 1.0 / temperature)[0]
        errors.append(float(np.abs(got - want)[np.abs(x) < 1.5].max()))
    assert low < order(errors) < high, errors
    assert errors[-1] < 0.005


@pytest.mark.parametrize("rate", [-1.5, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_quadratic_with_drift(rate: float, beta: float) -> None:
    """b = rate x, u = a x^2/2 + c: a' = 2 rate a - a^2 is a logistic equation, and c' = a/(2 beta)."""
    start, t = 1.2, 0.6

    def a(s: Array) -> Array:
        growth = np.exp(2.0 * rate * s)
        return start * growth / (1.0 + start * (growth - 1.0) / (2.0 * rate))

    s = np.linspace(0.0, t, 2001)
    c = float(np.sum((a(s)[1:] + a(s)[:-1]) / 2.0) * (s[1] - s[0])) / (2.0 * beta)
    errors = []
    for points in (241, 481):
        grid = Grid(-6.0, 6.0, points)
        x = grid.axes[0]
        u = hamilton_jacobi(start * x * x / 2.0, grid, [t], beta, drift=rate * x[None])[0]
        errors.append(float(np.abs(u - a(np.array(t)) * x * x / 2.0 - c)[np.abs(x) <= 1.0].max()))
    assert order(errors) > 0.85, errors
    assert errors[-1] < 0.04


def test_default_steps_resolve_the_drift() -> None:
    """From grad f = b the bound of a monotone step is infinite, at first."""
    errors = []
    for points in (101, 201, 401):
        grid = Grid(-1.0, 1.0, points)
        x = grid.axes[0]
        f, drift = -np.cos(np.pi * x) / np.pi, np.sin(np.pi * x)[None]
        u = hamilton_jacobi(f, grid, [0.5], drift=drift)[0]
        fine = hamilton_jacobi(f, grid, [0.5], drift=drift, step=0.5 / points / 16.0)[0]
        errors.append(float(np.abs(u - fine).max()))
    assert order(errors) > 0.9, errors
    assert errors[-1] < 0.005


def test_the_residual_falls_with_the_spacing() -> None:
    """u_t - b . grad u + |grad u|^2/2 - Lap u/(2 beta), by central differences in x, y and t."""
    beta, t, dt = 3.0, 0.3, 1e-3
    residuals = []
    for points in (31, 61, 121):
        grid = Grid((-2.0, -2.0), (2.0, 2.0), (points, points))
        x, y = grid.nodes
        drift = np.stack([np.sin(np.pi * x / 2.0), 0.3 * np.sin(np.pi * y / 2.0) * np.cos(np.pi * x / 2.0)])
        before, now, after = hamilton_jacobi(0.4 * wave(x) * wave(y), grid, [t - dt, t, t + dt], beta, drift=drift)
        _, p, hessian = differences(now, grid)
        right = (drift * p).sum(0) - (p * p).sum(0) / 2.0 + np.trace(hessian) / (2.0 * beta)
        residuals.append(float(np.abs((after - before) / (2.0 * dt) - right)[2:-2, 2:-2].max()))
    assert order(residuals) > 0.7, residuals
    assert residuals[-1] < 0.1


# ---- Gradients and Hessians --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("matrix", [[[2.0]], [[2.0, 0.6], [0.6, 1.0]], [[1.0, 0.5], [0.5, -0.4]]], ids=str)
def test_the_gradient_of_quadratics_is_of_order_1_and_with_viscosity_the_hessian(
    matrix: list[list[float]], beta: float
) -> None:
    d, t = len(matrix), 0.5
    errors: dict[str, list[float]] = {"gradient": [], "hessian": []}
    for points in (41, 81, 161) if d == 2 else (161, 321, 641):
        grid = Grid([-4.0] * d, [4.0] * d, [points] * d)
        inside = (np.abs(grid.nodes) <= 1.0).all(axis=0)
        got = differences(hamilton_jacobi(quadratic(grid, np.array(matrix), 0.0, beta), grid, [t], beta)[0], grid)
        want = relaxed_quadratic(matrix, grid.nodes, t, beta)
        for name, values in errors.items():
            values.append(float(np.abs(getattr(got, name) - getattr(want, name))[..., inside].max()))
    assert 0.8 < order(errors["gradient"]) < 1.2, errors
    assert errors["gradient"][-1] < 0.08
    if math.isfinite(beta):
        assert 0.75 < order(errors["hessian"]) < 1.3, errors
        assert errors["hessian"][-1] < 0.15


@pytest.mark.parametrize(("curvature", "t"), [(2.0, 0.5), (5.0, 1.0)])
def test_without_viscosity_the_hessian_of_a_minimum_does_not_converge(curvature: float, t: float) -> None:
    """A documented limit of the scheme: lambda/(1 + t lambda/4), 1.6 for the first, where lambda/(1 + t lambda) is right."""
    errors = []
    for points in (161, 321, 641):
        grid = Grid(-4.0, 4.0, points)
        u = hamilton_jacobi(curvature * grid.axes[0] ** 2 / 2.0, grid, [t])[0]
        errors.append(differences(u, grid).hessian[0, 0, points // 2] - curvature / (1.0 + t * curvature / 4.0))
    assert order(np.abs(errors).tolist()) > 0.8, errors
    assert abs(errors[-1]) < 0.01, errors


def test_with_viscosity_gradient_and_hessian_of_a_wave_are_of_order_1() -> None:
    """Where u has maxima, minima and bends, up to the walls."""
    t, beta = 0.3, 2.0
    errors: dict[str, list[float]] = {"gradient": [], "hessian": []}
    for points in (51, 101, 201):
        grid = Grid(-2.0, 2.0, points)
        f = wave(grid.axes[0])
        got, want = differences(hamilton_jacobi(f, grid, [t], beta)[0], grid), local_entropy(f, grid, t, beta)
        for name, values in errors.items():
            exact = getattr(want, name)
            values.append(float(np.abs(getattr(got, name) - exact).max() / np.abs(exact).max()))
    for name, values in errors.items():
        assert 0.75 < order(values) < 1.3, (name, values)
        assert values[-1] < 0.1, (name, values)


def test_without_viscosity_the_gradient_is_of_order_1_away_from_a_shock() -> None:
    """The one near 0.09; the minimisers of kinked are known to 1/4000."""
    t, errors = 0.4, []
    y = np.linspace(-2.0, 2.0, 16001)
    for points in (201, 401, 801):
        grid = Grid(-2.0, 2.0, points)
        x = grid.axes[0]
        p = differences(hamilton_jacobi(kinked(x), grid, [t])[0], grid).gradient[0]
        nearest = y[np.argmin(kinked(y) + (x[:, None] - y) ** 2 / (2.0 * t), axis=1)]
        errors.append(float(np.abs(p - (x - nearest) / t)[(np.abs(x - 0.09) > 0.2) & (np.abs(x) < 1.3)].max()))
    assert 0.8 < order(errors) < 1.3, errors
    assert errors[-1] < 0.02


# ---- Symmetries --------------------------------------------------------------------------------------------------------------


def test_no_drift_is_the_drift_zero_and_axes_are_alike() -> None:
    square = Grid((-2.0, -2.0), (2.0, 2.0), (41, 31))
    turned = Grid((-2.0, -2.0), (2.0, 2.0), (31, 41))
    x, y = square.nodes
    f = wave(x) + 0.5 * x * y
    drift = np.stack([y, np.sin(x)])
    plain = hamilton_jacobi(f, square, [0.2], 5.0)
    assert np.array_equal(plain, hamilton_jacobi(f, square, [0.2], 5.0, drift=np.zeros((2, 41, 31))))
    u = hamilton_jacobi(f, square, [0.2], 5.0, drift=drift)[0]
    v = hamilton_jacobi(f.T, turned, [0.2], 5.0, drift=np.stack([drift[1].T, drift[0].T]))[0]
    assert np.allclose(u, v.T, rtol=0.0, atol=1e-12)
    assert np.abs(u - plain).max() > 0.1


def test_what_varies_in_one_dimension_is_the_solution_of_that_dimension() -> None:
    line, square = Grid(-2.0, 2.0, 41), Grid((-2.0, 0.0), (2.0, 1.0), (41, 5))
    f = wave(line.axes[0])
    step = largest_step(np.repeat(f[:, None], 5, axis=1), square, 5.0)
    u = hamilton_jacobi(f, line, [0.2], 5.0, step=step)[0]
    v = hamilton_jacobi(np.repeat(f[:, None], 5, axis=1), square, [0.2], 5.0, step=step)[0]
    assert np.allclose(v, u[:, None], rtol=0.0, atol=1e-12)


def test_walls_are_mirrors() -> None:
    """The solution of one half is that of the whole, for an f that is even about the middle and a drift that is odd."""
    half, whole = Grid((0.0, -1.0), (1.5, 1.0), (11, 9)), Grid((-1.5, -1.0), (1.5, 1.0), (21, 9))
    f = np.random.default_rng(0).normal(size=half.shape)
    drift = np.stack([half.nodes[0], np.cos(half.nodes[0] + half.nodes[1])])
    both = np.concatenate([f[:0:-1], f])
    both_drift = np.concatenate([drift[:, :0:-1] * np.array([-1.0, 1.0])[:, None, None], drift], axis=1)
    for beta in BETAS:
        u = hamilton_jacobi(f, half, [0.1], beta, drift=drift, step=1e-3)[0]
        v = hamilton_jacobi(both, whole, [0.1], beta, drift=both_drift, step=1e-3)[0]
        assert np.allclose(u, v[10:], rtol=0.0, atol=1e-12)


# ---- Monotone ----------------------------------------------------------------------------------------------------------------

POINTS = {1: (7,), 2: (4, 5)}
numbers = st.integers(-300, 300).map(lambda hundredths: hundredths / 100.0)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Grid, Array, Array, float, Array, float]:
    """Two functions on a grid, beta, a drift, and a step that both allow."""
    d = draw(st.sampled_from([1, 2]))
    grid = Grid([-1.0] * d, [0.5] * d, POINTS[d])
    size = math.prod(grid.shape)
    f, g, *b = (np.array(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(grid.shape) for _ in range(2 + d))
    beta = draw(st.sampled_from([math.inf, 20.0, 1.0]))
    drift = np.stack(b) * draw(st.sampled_from([0.0, 1.0, 5.0]))
    step = min(largest_step(function, grid, beta, drift=drift) for function in (f, g))
    return grid, f, g, beta, drift, min(step, 1.0)


def one_step(f: Array, grid: Grid, beta: float, drift: Array, step: float) -> Array:
    return hamilton_jacobi(f, grid, [step], beta, drift=drift, step=step)[0]


@settings(deadline=None, max_examples=150)
@given(pairs())
def test_a_step_keeps_order_and_distance_and_carries_constants(case: tuple[Grid, Array, Array, float, Array, float]) -> None:
    grid, f, g, beta, drift, step = case
    u, v = one_step(f, grid, beta, drift, step), one_step(g, grid, beta, drift, step)
    assert np.abs(u - v).max() <= np.abs(f - g).max() + 1e-12
    lower, upper = np.minimum(f, g), np.maximum(f, g)
    step = min(step, *(largest_step(function, grid, beta, drift=drift) for function in (lower, upper)))
    assert (one_step(lower, grid, beta, drift, step) <= one_step(upper, grid, beta, drift, step) + 1e-12).all()
    assert np.allclose(
        one_step(f + 2.5, grid, beta, drift, step), one_step(f, grid, beta, drift, step) + 2.5, rtol=0, atol=1e-12
    )
    assert one_step(f, grid, beta, drift, step).max() <= f.max() + step * (drift**2).sum(0).max() / 2.0 + 1e-12


@settings(deadline=None, max_examples=60)
@given(pairs())
def test_without_drift_many_steps_keep_order_slopes_and_bounds(case: tuple[Grid, Array, Array, float, Array, float]) -> None:
    """With the step that the start allows, in 2-D half of it: it stays allowed, as u grows no steeper in either dimension."""
    grid, f, g, beta, _, _ = case
    low, high = np.minimum(f, g), np.maximum(f, g)
    step = min(1.0, *(largest_step(function, grid, beta) / grid.dimensions for function in (low, high)))
    times = step * np.array([0.5, 3.0, 20.0])
    u, v = (hamilton_jacobi(function, grid, times, beta, step=step) for function in (low, high))
    assert (u <= v + 1e-12).all()
    assert (u >= low.min() - 1e-12).all()
    assert (v <= high.max() + 1e-12).all()
    for axis, row in itertools.product(range(grid.dimensions), u):
        assert np.abs(np.diff(row, axis=axis)).max() <= np.abs(np.diff(low, axis=axis)).max() + 1e-12


def test_in_two_dimensions_the_bound_may_fall_without_drift() -> None:
    """Steep slopes of both dimensions come to meet: after one step the bound is 2/3 of the first, and never below a half."""
    grid = Grid((0.0, 0.0), (2.0, 2.0), (3, 3))
    f = np.array([[13.0, 7.0, 2.0], [8.0, 7.0, 0.0], [-2.0, 0.0, -14.0]])
    step = largest_step(f, grid)
    assert largest_step(hamilton_jacobi(f, grid, [step], step=step)[0], grid) == pytest.approx(2.0 / 3.0 * step)
    with pytest.raises(ValueError, match=r"^step: expected at most 0\.\d+, where the scheme is monotone"):
        hamilton_jacobi(f, grid, [3.0 * step], step=step)
    hamilton_jacobi(f, grid, [30.0 * step], step=step / 2.0)


@settings(deadline=None, max_examples=100)
@given(pairs())
def test_a_step_above_the_bound_is_not_monotone(case: tuple[Grid, Array, Array, float, Array, float]) -> None:
    """At 1.02 of the bound some node's new value falls as its own old value rises; at 0.98, none does."""
    grid, f, _, beta, drift, _ = case
    bound = largest_step(f, grid, beta, drift=drift)
    if math.isinf(bound):
        return

    def steepest_fall(step: float) -> float:
        rise, falls = 1e-7, []
        for node in np.ndindex(grid.shape):
            raised = f.copy()
            raised[node] += rise
            before, after = (u + step * _change(u, beta, drift, grid)[0] for u in (f, raised))
            falls.append((before - after)[node] / rise)
        return max(falls)

    assert steepest_fall(0.98 * bound) < 0.0
    assert steepest_fall(1.02 * bound) > 0.0
    with pytest.raises(ValueError, match=f"^step: expected at most {bound}"):
        hamilton_jacobi(f, grid, [2.0 * bound], beta, drift=drift, step=1.02 * bound)


def test_a_step_is_refused_when_the_bound_falls_below_it() -> None:
    """A drift away from 0 makes u steeper."""
    grid = Grid(-1.0, 1.0, 41)
    x = grid.axes[0]
    f, drift = -np.cos(np.pi * x), 3.0 * np.sin(np.pi * x)[None]
    step = 0.999 * largest_step(f, grid, drift=drift)
    hamilton_jacobi(f, grid, [step], drift=drift, step=step)
    with pytest.raises(ValueError, match=r"^step: expected at most 0\.02.* at t = 0\.1\d*, got 0\.1\d*"):
        hamilton_jacobi(f, grid, [1.0], drift=drift, step=step)


# ---- Times and arguments -----------------------------------------------------------------------------------------------------


def test_the_solution_is_handed_out_at_each_time() -> None:
    grid = Grid(-2.0, 2.0, 41)
    f = rugged().on(grid)
    at_once = hamilton_jacobi(f, grid, [0.0, 0.1, 0.25])
    assert at_once.shape == (3, 41)
    assert np.array_equal(at_once[0], f)
    assert np.array_equal(at_once[1], hamilton_jacobi(f, grid, [0.1])[0])
    assert np.allclose(at_once[2], hamilton_jacobi(at_once[1], grid, [0.15])[0], rtol=0.0, atol=1e-12)


def test_a_constant_stays() -> None:
    """Also where nothing bounds the step."""
    grid = Grid((0.0, 0.0), (1.0, 1.0), (5, 5))
    f = np.full(grid.shape, 2.5)
    assert math.isinf(largest_step(f, grid))
    for beta in (math.inf, 1.0):
        assert np.array_equal(hamilton_jacobi(f, grid, [1.0, 7.0], beta), [f, f])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"f": np.zeros(4)}, r"f: expected shape \(5,\), got \(4,\)"),
        ({"f": np.array([0.0, 1.0, np.nan, 0.0, 0.0])}, "f: expected finite numbers, got nan"),
        ({"beta": 0.0}, "beta: expected a number above 0, got 0.0"),
        ({"drift": np.zeros(5)}, r"drift: expected shape \(1, 5\), got \(5,\)"),
        ({"step": 0.0}, "step: expected a finite number above 0, got 0.0"),
        ({"times": []}, r"times: expected .*, got \[\]"),
        ({"times": [0.2, 0.2]}, r"times: expected .*, got \[0.2, 0.2\]"),
        ({"times": [-0.1, 0.2]}, r"times: expected .*, got \[-0.1, 0.2\]"),
        ({"times": [0.1, math.inf]}, r"times: expected .*, got \[0.1, inf\]"),
        ({"times": [[0.1]]}, r"times: expected .*, got \[\[0.1\]\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"f": np.zeros(5), "grid": Grid(0.0, 1.0, 5), "times": [1.0], **changed}
    with pytest.raises(ValueError, match=f"^{message}"):
        hamilton_jacobi(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"f": 1e200}, "f, beta, drift: expected u_t and the weights of a step to be finite in float64, got -?inf"),
        ({"f": 1e307 * 13.0}, "f, beta, drift: expected u_t and the weights of a step to be finite in float64, got"),
        ({"beta": 1e-320}, "f, beta, drift: expected u_t and the weights of a step to be finite in float64, got"),
        (
            {"drift": np.full((1, 5), 1e200)},
            "f, beta, drift: expected u_t and the weights of a step to be finite in float64, got",
        ),
        ({"times": [1e300]}, r"times: expected times that 2\^53 steps reach, got 1e\+300 to go in steps of at most 0\.\d+"),
        ({"step": 1e-320}, r"times: expected times that 2\^53 steps reach, got 1.0 to go in steps of at most 1e-320"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_overflows_is_refused(changed: dict[str, object], message: str) -> None:
    grid = Grid(-1.0, 1.0, 5)
    arguments: dict[str, object] = {"f": 1.0, "grid": grid, "times": [1.0], **changed}
    arguments["f"] = arguments["f"] * grid.axes[0] ** 2  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"^{message}"):
        hamilton_jacobi(**arguments)  # type: ignore[arg-type]
