"""The control problem: the inequality for its two right pairs and not for a wrong one, and the value function found otherwise.

Each bound on an inequality is that it holds by more than the discretisation error, measured at half the spacing and step.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from scipy.sparse.linalg import expm_multiply

from deeprelax_cuda.pde import (
    Controlled,
    Grid,
    Landscape,
    control,
    double_well,
    generator,
    local_entropy,
    rugged,
    value_function,
)
from deeprelax_cuda.pde.grid import Array


def order(errors: list[float]) -> float:
    """Return the order of convergence that the last of errors tell, each at half the spacing and step of the one before."""
    return math.log2(abs(errors[-2]) / abs(errors[-1]))


def bowl(curvature: float) -> Landscape:
    return Landscape("bowl", lambda x: curvature * x * x / 2.0, lambda x: (curvature * x,))


def bump(grid: Grid, centre: list[float], deviation: float = 0.15) -> Array:
    away = grid.nodes - np.reshape(centre, (-1, *[1] * grid.dimensions))
    density: Array = np.exp(-np.sum(away**2, axis=0) / (2.0 * deviation**2))
    return density / grid.integrate(density)


class Case(NamedTuple):
    """dx = b ds - alpha ds + beta^(-1/2) dW from ``start`` for ``duration``, b = -grad f or 0, and the cost of its end."""

    f: Landscape | None
    terminal: Landscape
    beta: float
    start: list[float]
    duration: float = 0.5
    wall: float = 3.0

    def grid(self, points: int) -> Grid:
        return Grid([-self.wall] * len(self.start), [self.wall] * len(self.start), [points] * len(self.start))

    def drift(self, grid: Grid) -> Array | None:
        return None if self.f is None else -self.f.gradient_on(grid)

    def run(self, points: int, alpha: Array | None = None) -> Controlled:
        """With as many steps as half the points, so that h and the step fall together."""
        grid = self.grid(points)
        return control(
            self.terminal.on(grid), bump(grid, self.start), grid, self.duration, self.beta,
            drift=self.drift(grid), alpha=alpha, steps=points // 2,
        )  # fmt: skip


SGD = {
    "rugged": Case(rugged(), rugged(), 2.0, [1.3], 0.3),
    "rugged, cold": Case(rugged(), rugged(), 8.0, [-1.6], 0.3),
    "rugged, to a bowl": Case(rugged(), bowl(2.0), 1.0, [0.8], 0.3),
    "bowls": Case(bowl(1.0), bowl(3.0), 4.0, [1.0], 1.0),
    "double well": Case(double_well(), double_well(), 2.0, [1.0, 0.5], 0.5, 2.4),
}
BROWNIAN = {
    "rugged, Brownian": Case(None, rugged(), 2.0, [1.3], 0.3),
    "bowl, Brownian, hot": Case(None, bowl(2.0), 0.7, [-1.0], 0.5, 4.0),
    "bowl, Brownian": Case(None, bowl(2.0), 4.0, [1.0], 0.7),
    "double well, Brownian": Case(None, double_well(), 2.0, [0.3, 0.0], 0.3, 2.4),
}
CASES = {**SGD, **BROWNIAN}
#: The SDE descends f, which is steep; the control is for the one without drift, and pushes where there is nothing to gain.
WRONG = Case(bowl(5.0), bowl(1.0), 4.0, [1.0], 1.0, 2.0)

every_case = pytest.mark.parametrize("name", CASES)


@cache
def optimal(name: str, fine: bool) -> Controlled:
    case = CASES[name]
    points = 401 if len(case.start) == 1 else 61
    return case.run(2 * points - 1 if fine else points)


# ---- The inequality ----------------------------------------------------------------------------------------------------------


@every_case
def test_the_optimal_control_gains_more_than_its_effort(name: str) -> None:
    """E V(controlled) + effort <= E V(uncontrolled): SGD with the value function of its drift, Brownian motion without."""
    coarse, fine = optimal(name, False), optimal(name, True)
    assert fine.gain > 4.0 * abs(fine.gain - coarse.gain), (coarse.gain, fine.gain)
    assert fine.effort > 0.0


def wrong_pair(points: int) -> Controlled:
    """The gradient of the local entropy, put where the SDE has a drift."""
    grid = WRONG.grid(points)
    terminal = WRONG.terminal.on(grid)
    return WRONG.run(points, value_function(terminal, grid, WRONG.duration, WRONG.beta, steps=points // 2)[2])


def test_the_wrong_pair_costs_more_than_it_gains() -> None:
    """The same terminal cost, start and beta; with the drift's own value function, the control gains."""
    coarse, fine = wrong_pair(201), wrong_pair(401)
    assert fine.gain < -4.0 * abs(fine.gain - coarse.gain), (coarse.gain, fine.gain)
    right = WRONG.run(401)
    assert right.gain > 4.0 * abs(right.gain - WRONG.run(201).gain)
    assert fine.terminal_uncontrolled == right.terminal_uncontrolled


def test_the_wrong_pair_has_the_moments_of_its_closed_form() -> None:
    """alpha = x/(1 + T - s), b = -5x: mean' = -r mean, variance' = 1/beta - 2 r variance, with r = 5 + 1/(1 + T - s)."""
    count = 20_000
    ds = WRONG.duration / count
    mean, variance, effort = 1.0, 0.15**2, 0.0
    for i in range(count):
        alpha = 1.0 / (1.0 + WRONG.duration - (i + 0.5) * ds)
        effort += ds * alpha**2 * (mean**2 + variance) / 2.0
        mean, variance = mean - ds * (5.0 + alpha) * mean, variance + ds * (1.0 / WRONG.beta - 2.0 * (5.0 + alpha) * variance)
    want = [(mean**2 + variance) / 2.0, effort]
    errors = [np.abs([run.terminal_controlled - want[0], run.effort - want[1]]).max() for run in map(wrong_pair, (201, 401))]
    assert order(errors) > 0.8, errors
    assert errors[-1] < 0.05 * want[1], (errors, want)


# ---- What an alpha costs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_case
def test_the_optimal_cost_is_the_value_at_the_start(name: str) -> None:
    """E V + effort = E u(x, duration), with a gap that falls as h."""
    coarse, fine = optimal(name, False), optimal(name, True)
    gaps = [run.terminal_controlled + run.effort - run.least_cost for run in (coarse, fine)]
    assert order(gaps) > 0.7, gaps
    assert abs(gaps[-1]) < 0.03, gaps


@every_case
def test_without_control_the_excess_is_the_effort_that_was_due(name: str) -> None:
    """E V - E u(x, duration) = 1/2 E int |grad u|^2 ds along the paths without control."""
    gaps = []
    for fine in (False, True):
        run = optimal(name, fine)
        grid = CASES[name].grid(run.value.shape[-1])
        step = run.times[1]
        due = step * sum(grid.integrate(rho * (a * a).sum(0) / 2.0) for rho, a in zip(run.uncontrolled, run.alpha, strict=True))
        gaps.append(run.terminal_uncontrolled - run.least_cost - due)
        assert due > 0.0
    assert order(gaps) > 0.7, gaps


def test_another_control_costs_more_by_the_square_of_its_distance() -> None:
    """E V + effort - E u(x, duration) = 1/2 E int |alpha - grad u|^2 ds along its own paths."""
    case = CASES["rugged"]
    for size in (1.0, -0.5):
        gaps, excesses = [], []
        for points in (401, 801):
            grid = case.grid(points)
            best = optimal("rugged", points == 801)
            extra = size * np.cos(2.0 * grid.axes[0] + 5.0 * best.times[:, None])[:, None]
            run = case.run(points, best.alpha + extra)
            power = [grid.integrate(rho * e[0] ** 2 / 2.0) for rho, e in zip(run.controlled[1:], extra[1:], strict=True)]
            excesses.append(run.terminal_controlled + run.effort - best.terminal_controlled - best.effort)
            gaps.append(excesses[-1] - best.times[1] * sum(power))
        assert abs(gaps[-1]) < 0.03 * excesses[-1], (gaps, excesses)


@pytest.mark.slow
def test_paths_of_the_sde_have_these_costs() -> None:
    """Simulated with noise beta^(-1/2) dW, by as many Euler-Maruyama steps; within 4 standard errors and the order of both."""
    case, paths = CASES["rugged"], 10_000
    run, coarse = optimal("rugged", True), optimal("rugged", False)
    x_axis, step = case.grid(run.value.shape[-1]).axes[0], run.times[1]
    random = np.random.default_rng(0)
    for steered in (False, True):
        x = case.start[0] + 0.15 * random.normal(size=paths)
        effort = np.zeros(paths)
        for alpha in run.alpha[:-1, 0]:
            a = np.interp(x, x_axis, alpha) if steered else np.zeros(paths)
            effort += step * a * a / 2.0
            x = x - step * (case.f.gradient(x)[0] + a) + math.sqrt(step / case.beta) * random.normal(size=paths)
        names = ["terminal_controlled", "effort"] if steered else ["terminal_uncontrolled"]
        for name, sample in zip(names, [case.terminal.value(x), effort][: len(names)], strict=True):
            got, discretisation = getattr(run, name), abs(getattr(run, name) - getattr(coarse, name))
            bound = 4.0 * float(sample.std()) / math.sqrt(paths) + 3.0 * discretisation
            assert abs(got - float(sample.mean())) < bound < 0.2, (name, got, float(sample.mean()), bound)


# ---- The value function ------------------------------------------------------------------------------------------------------


@every_case
def test_the_value_function_is_that_of_hopf_and_cole(name: str) -> None:
    """-1/beta log exp(t q) exp(-beta V), q the generator of the SDE without control: linear, and of order 2."""
    case = CASES[name]
    errors = []
    for fine in (False, True):
        value = optimal(name, fine).value[0]
        grid = case.grid(len(value))
        v = np.exp(-case.beta * (case.terminal.on(grid) - case.terminal.on(grid).min()))
        q = generator(grid, case.drift(grid), 1.0 / (2.0 * case.beta))
        moved = expm_multiply(case.duration * q, v.ravel()).reshape(grid.shape)
        want = case.terminal.on(grid).min() - np.log(moved) / case.beta
        errors.append(float(np.abs(value - want).max()))
    assert order(errors) > 0.7, errors
    assert errors[-1] < 0.15, errors


@pytest.mark.parametrize("name", BROWNIAN)
def test_without_drift_the_least_cost_is_the_local_entropy(name: str) -> None:
    case = CASES[name]
    errors = []
    for fine in (False, True):
        run = optimal(name, fine)
        grid = case.grid(run.value.shape[-1])
        entropy = local_entropy(case.terminal.on(grid), grid, case.duration, case.beta).value
        errors.append(run.least_cost - grid.integrate(bump(grid, case.start) * entropy))
    assert order(errors) > 0.7, errors
    assert abs(errors[-1]) < 0.05, errors


@pytest.mark.parametrize("rate", [-1.5, 1.0])
def test_the_optimal_control_of_a_quadratic_is_of_order_1(rate: float) -> None:
    """With b = rate x, grad u = a x, where Riccati's a' = 2 rate a - a^2 in the time to go."""
    start, duration, errors = 1.2, 0.6, []
    for points in (121, 241, 481):
        grid = Grid(-6.0, 6.0, points)
        x = grid.axes[0]
        times, _, alpha = value_function(start * x * x / 2.0, grid, duration, 4.0, drift=rate * x[None], steps=3)
        growth = np.exp(2.0 * rate * (duration - times))
        a = start * growth / (1.0 + start * (growth - 1.0) / (2.0 * rate))
        errors.append(float(np.abs(alpha[:, 0] - a[:, None] * x)[:, np.abs(x) <= 1.0].max()))
    assert 0.8 < order(errors) < 1.2, errors
    assert errors[-1] < 0.02


# ---- What is handed out ------------------------------------------------------------------------------------------------------


def test_the_history_begins_at_the_start_and_ends_at_the_terminal_cost() -> None:
    case = CASES["double well"]
    run = optimal("double well", False)
    grid = case.grid(61)
    assert run.times[0] == 0.0
    assert run.times[-1] == case.duration
    assert run.value.shape == run.uncontrolled.shape == run.controlled.shape == (31, 61, 61)
    assert run.alpha.shape == (31, 2, 61, 61)
    assert np.array_equal(run.value[-1], case.terminal.on(grid))
    for densities in (run.uncontrolled, run.controlled):
        assert np.allclose(densities[0], bump(grid, case.start), rtol=1e-12, atol=0.0)
        assert np.allclose([grid.integrate(rho) for rho in densities], 1.0, rtol=1e-12, atol=0.0)
        assert (densities >= 0.0).all()


def test_no_control_is_the_uncontrolled_sde_and_the_start_is_of_mass_1() -> None:
    case = CASES["rugged"]
    grid = case.grid(101)
    law = {"drift": case.drift(grid), "alpha": np.zeros((21, 1, 101)), "steps": 20}
    run = control(case.terminal.on(grid), 7.0 * bump(grid, case.start), grid, case.duration, case.beta, **law)
    assert np.allclose(run.uncontrolled, run.controlled, rtol=1e-12, atol=0.0)
    assert run.effort == 0.0
    assert grid.integrate(run.uncontrolled[0]) == pytest.approx(1.0, abs=1e-14)


def test_a_start_of_any_size_is_brought_to_mass_1() -> None:
    case = CASES["rugged"]
    grid = case.grid(51)
    start = bump(grid, case.start, 0.5)
    start /= start.max()  # of mass 1.25, so that the largest below overflows
    runs = [control(case.terminal.on(grid), size * start, grid, 0.1, 2.0, steps=5) for size in (1.0, 1.7e308, 1e-300)]
    assert runs[0].gain > 0.0
    assert [run.gain for run in runs[1:]] == pytest.approx([runs[0].gain] * 2, rel=1e-9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"terminal": np.zeros(4)}, r"terminal: expected shape \(5,\), got \(4,\)"),
        ({"start": np.ones(4)}, r"start: expected shape \(5,\), got \(4,\)"),
        ({"start": np.zeros(5)}, "start: expected a density, .* got 0.0 to 0.0"),
        ({"start": np.array([1.0, 1.0, -1.0, 1.0, 1.0])}, "start: expected a density, .* got -1.0 to 1.0"),
        ({"drift": np.zeros(5)}, r"drift: expected shape \(1, 5\), got \(5,\)"),
        ({"alpha": np.zeros((2, 1, 5))}, r"alpha: expected shape \(4, 1, 5\), got \(2, 1, 5\)"),
        ({"beta": math.inf}, "beta: expected a finite number above 0, got inf"),
        ({"duration": 0.0}, "duration: expected a finite number above 0, got 0.0"),
        ({"steps": 0}, "steps: expected an int of 1 or more, got 0"),
        ({"steps": 20.5}, "steps: expected an int of 1 or more, got 20.5"),
        ({"steps": "20"}, "steps: expected an int of 1 or more, got '20'"),
        ({"steps": np.float64(20)}, "steps: expected an int of 1 or more, got "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changed: dict[str, object], message: str) -> None:
    arguments = {"terminal": np.zeros(5), "start": np.ones(5), "grid": Grid(0, 1, 5), "duration": 1.0, "beta": 1.0, "steps": 3}
    with pytest.raises(ValueError, match=f"^{message}"):
        control(**{**arguments, **changed})  # type: ignore[arg-type]
