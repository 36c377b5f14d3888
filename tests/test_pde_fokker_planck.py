"""The Fokker-Planck solver: mass, sign, what stands still, and closed forms with the orders at which it comes to them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, solve_continuous_lyapunov
from scipy.sparse.linalg import expm_multiply

from deeprelax_cuda.pde import Grid, differences, double_well, fokker_planck, generator, rugged
from deeprelax_cuda.pde.grid import Array


def order(errors: list[float]) -> float:
    """Return the order of convergence that the last of errors tell, each at half the spacing or step of the one before."""
    return math.log2(errors[-2] / errors[-1])


def normal(grid: Grid, mean: Array, covariance: Array) -> Array:
    away = grid.nodes - np.reshape(mean, (-1, *[1] * grid.dimensions))
    exponent = np.einsum("i...,ij,j...", away, np.linalg.inv(covariance), away) / 2.0
    density: Array = np.exp(-exponent) / math.sqrt(np.linalg.det(2.0 * math.pi * covariance))
    return density


def gibbs(values: Array, grid: Grid, diffusion: float) -> Array:
    """exp(-V/D), of mass 1."""
    density: Array = np.exp(-(values - values.min()) / diffusion)
    return density / grid.integrate(density)


# ---- Closed forms ------------------------------------------------------------------------------------------------------------

#: dx = -M x ds + sqrt(2 D) dW: a decay, and in two dimensions a decay that turns, so that no potential has it.
DECAYS = [[[1.3]], [[1.0, 1.2], [-0.8, 0.7]]]
DIFFUSION = 0.1


def ornstein_uhlenbeck(matrix: Array, mean: Array, covariance: Array, s: float) -> tuple[Array, Array]:
    """Return mean and covariance at s: exp(-M s) mean, and S + exp(-M s)(covariance - S)exp(-M's), where MS + SM' = 2 D I."""
    flow = expm(-matrix * s)
    rest = solve_continuous_lyapunov(matrix, 2.0 * DIFFUSION * np.eye(len(matrix)))
    return flow @ mean, rest + flow @ (covariance - rest) @ flow.T


@pytest.mark.parametrize("matrix", DECAYS, ids=["1-D", "2-D"])
def test_orders_1_in_the_step_and_2_in_the_spacing_on_ornstein_uhlenbeck(matrix: list[list[float]]) -> None:
    """With a quarter of the step at half the spacing, densities, means and variances come four times nearer."""
    d, s = len(matrix), 0.8
    start = np.array([0.6, -0.4])[:d], 0.06 * np.eye(d)
    mean, covariance = ornstein_uhlenbeck(np.array(matrix), *start, s)
    errors: dict[str, list[float]] = {"density": [], "mean": [], "covariance": []}
    for points, step in ((49, 0.02), (97, 0.005)):
        grid = Grid([-2.4] * d, [2.4] * d, [points] * d)
        drift = -np.einsum("ij,j...->i...", np.array(matrix), grid.nodes)
        rho = fokker_planck(normal(grid, *start), grid, [s], drift, DIFFUSION, step=step)[0]
        mass = (rho * grid.weights).ravel()
        x = grid.nodes.reshape(d, -1)
        errors["density"].append(float(np.abs(rho - normal(grid, mean, covariance)).max()))
        errors["mean"].append(float(np.abs(x @ mass - mean).max()))
        errors["covariance"].append(float(np.abs((x * mass) @ x.T - np.outer(x @ mass, x @ mass) - covariance).max()))
    for name, pair in errors.items():
        assert 1.8 < order(pair) < 2.4, (name, pair)
        assert pair[-1] < 0.02, (name, pair)


@pytest.mark.parametrize("matrix", DECAYS, ids=["1-D", "2-D"])
def test_gradient_and_hessian_of_the_density_are_of_order_2(matrix: list[list[float]]) -> None:
    """By differences, with a quarter of the step at half the spacing; in the Gaussian's closed form G = C^-1(m - x) rho."""
    d, s = len(matrix), 0.4
    start = np.array([0.4, -0.3])[:d], 0.1 * np.eye(d)
    mean, covariance = ornstein_uhlenbeck(np.array(matrix), *start, s)
    inverse = np.linalg.inv(covariance)
    errors: dict[str, list[float]] = {"gradient": [], "hessian": []}
    for points, step in ((61, 0.02), (121, 0.005)):
        grid = Grid([-2.4] * d, [2.4] * d, [points] * d)
        drift = -np.einsum("ij,j...->i...", np.array(matrix), grid.nodes)
        got = differences(fokker_planck(normal(grid, *start), grid, [s], drift, DIFFUSION, step=step)[0], grid)
        rho = normal(grid, mean, covariance)
        pull = np.einsum("ij,j...->i...", inverse, mean.reshape(-1, *[1] * d) - grid.nodes)
        want = {"gradient": pull * rho, "hessian": (pull[:, None] * pull - inverse.reshape(d, d, *[1] * d)) * rho}
        for name, values in errors.items():
            values.append(float(np.abs(getattr(got, name) - want[name]).max() / np.abs(want[name]).max()))
    for name, pair in errors.items():
        assert 1.7 < order(pair) < 2.3, (name, pair)
        assert pair[-1] < 0.03, (name, pair)


@pytest.mark.parametrize("diffusion", [0.05, 0.2])
def test_order_2_in_the_spacing(diffusion: float) -> None:
    """Of the difference between one grid and the next, exactly in time, by the exponential of the generator; |b| h/D up to 1.5.

    The drift is not linear, and piles mass up at a wall.
    """
    densities = []
    for points in (41, 81, 161, 321):
        grid = Grid(0.0, 2.0, points)
        x = grid.axes[0]
        q = generator(grid, np.cos(3.0 * x)[None] + 0.5, diffusion)
        start = 1.0 + np.cos(math.pi * x)
        densities.append((expm_multiply(0.5 * q.T, start * grid.weights) / grid.weights)[:: (points - 1) // 40])
    errors = [float(np.abs(finer - density).max()) for density, finer in itertools.pairwise(densities)]
    assert 1.8 < order(errors) < 2.2, errors
    assert errors[-1] < 0.01 * densities[-1].max(), errors


@pytest.mark.parametrize(("diffusion", "want"), [(0.2, 2.0), (1e-4, 1.0)], ids=["resolved", "upwind"])
def test_the_order_in_the_spacing_is_2_below_2_D_of_drift_and_1_above(diffusion: float, want: float) -> None:
    """|b| h/D of at most 0.4 and 0.1, then of 750 and 190: of the generator, and of a density that it moves smoothly."""
    errors: dict[str, list[float]] = {"generator": [], "density": []}
    densities = []
    for points in (41, 81, 161, 321):
        grid = Grid(0.0, 2.0, points)
        x = grid.axes[0]
        b = (0.2 + np.sin(math.pi * x / 2.0) ** 2) * np.sin(math.pi * x / 2.0)
        q = generator(grid, b[None], diffusion)
        v, slope = np.cos(math.pi * x), -math.pi * np.sin(math.pi * x)
        errors["generator"].append(float(np.abs(q @ v - b * slope + diffusion * math.pi**2 * v)[1:-1].max()))
        rho = fokker_planck(2.0 + v, grid, [0.3], b[None], diffusion, step=0.01)[0]
        densities.append(rho[:: (points - 1) // 40])
    errors["density"] = [float(np.abs(finer - rho).max()) for rho, finer in itertools.pairwise(densities)]
    for name, values in errors.items():
        assert want - 0.25 < order(values) < want + 0.25, (name, values)


@pytest.mark.parametrize("d", [1, 2])
def test_order_1_in_the_step(d: int) -> None:
    """On one grid, against the exponential of the generator."""
    grid = Grid([-1.0] * d, [1.0] * d, [15] * d)
    drift = np.stack([np.sin(2.0 * x + x[::-1].T) for x in grid.nodes])
    start = normal(grid, np.full(d, 0.3), 0.1 * np.eye(d))
    want = expm_multiply(0.4 * generator(grid, drift, 0.3).T, (start * grid.weights).ravel()).reshape(grid.shape) / grid.weights
    errors = [
        float(np.abs(fokker_planck(start, grid, [0.4], drift, 0.3, step=step)[0] - want).max()) for step in (0.04, 0.02, 0.01)
    ]
    assert 0.9 < order(errors) < 1.1, errors
    assert errors[-1] < 0.03


def test_one_step_is_the_backward_euler_step_of_the_generator() -> None:
    grid = Grid(-1.0, 2.0, 12)
    drift = np.random.default_rng(0).normal(size=(1, 12)) * 5.0
    start = np.random.default_rng(1).random(12)
    system = np.eye(12) - 0.3 * generator(grid, drift, 0.4).toarray().T
    got = fokker_planck(start, grid, [0.3], drift, 0.4, step=1.0)[0]
    assert np.allclose(got, np.linalg.solve(system, start * grid.weights) / grid.weights, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("d", [1, 2])
def test_the_heat_kernel(d: int) -> None:
    """Without drift: a normal law whose variance grows by 2 D s; and cosines, which the walls reflect into themselves."""
    variance, s, diffusion = 0.04, 0.1, 0.5
    errors: dict[str, list[float]] = {"normal": [], "cosine": []}
    for points, step in ((61, 0.004), (121, 0.001)):
        grid = Grid([-2.0] * d, [2.0] * d, [points] * d)
        rho = fokker_planck(normal(grid, np.zeros(d), variance * np.eye(d)), grid, [s], None, diffusion, step=step)[0]
        spread = (variance + 2.0 * diffusion * s) * np.eye(d)
        errors["normal"].append(float(np.abs(rho - normal(grid, np.zeros(d), spread)).max()))
        wave = np.prod(np.cos(math.pi * grid.nodes), axis=0)
        rho = fokker_planck(1.0 + wave, grid, [s], np.zeros((d, *grid.shape)), diffusion, step=step)[0]
        errors["cosine"].append(float(np.abs(rho - 1.0 - wave * math.exp(-d * math.pi**2 * diffusion * s)).max()))
    for name, pair in errors.items():
        assert 1.8 < order(pair) < 2.2, (name, pair)
        assert pair[-1] < 0.02, (name, pair)


def test_a_drift_that_moves_with_time() -> None:
    """b = -k(x - c s) carries the mean to c s - c/k + (mean + c/k) exp(-k s), and the variance as if c were 0."""
    k, c, mean, s = 2.0, 1.0, -0.5, 0.7
    want = c * s - c / k + (mean + c / k) * math.exp(-k * s)
    variance = DIFFUSION / k + (0.05 - DIFFUSION / k) * math.exp(-2.0 * k * s)
    grid = Grid(-2.5, 2.5, 401)
    x = grid.axes[0]
    start = normal(grid, np.array([mean]), np.array([[0.05]]))
    errors = []
    for step in (0.02, 0.01):
        rho = fokker_planck(start, grid, [0.2, s], lambda s: -k * (x - c * s)[None], DIFFUSION, step=step)[1]
        got = grid.integrate(x * rho)
        errors.append(max(abs(got - want), abs(grid.integrate((x - got) ** 2 * rho) - variance)))
    assert 0.8 < order(errors) < 1.3, errors
    assert errors[-1] < 0.005


# ---- What stands still -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.01, 10.0])
@pytest.mark.parametrize("d", [1, 2])
def test_gibbs_of_a_quadratic_stands_still(d: int, step: float) -> None:
    """To rounding, walls and all, as the half-way drift is then the difference of V: a tilted bowl, cut by the walls."""
    grid = Grid([-1.0, -0.5][:d], [0.6, 1.0][:d], [23, 17][:d])
    scale = np.array([1.5, 0.7])[:d].reshape(-1, *[1] * d)
    density = gibbs(np.sum(scale * grid.nodes**2 / 2.0 + 0.4 * grid.nodes, axis=0), grid, 0.2)
    rho = fokker_planck(density, grid, [100.0 * step], -scale * grid.nodes - 0.4, 0.2, step=step)[0]
    assert np.allclose(rho, density, rtol=1e-11, atol=0.0)


def test_every_start_ends_in_gibbs_with_order_2() -> None:
    """exp(-V/D) of the rugged function and of the double well, in a few very long steps."""
    for landscape, d, sizes in ((rugged(), 1, (81, 161, 321)), (double_well(), 2, (21, 41, 81))):
        errors = []
        for points in sizes:
            grid = Grid([-1.8] * d, [1.6] * d, [points] * d)
            start = gibbs(grid.nodes[0] * 0.3, grid, 1.0)
            rho = fokker_planck(start, grid, [1e7], -landscape.gradient_on(grid), 0.7, step=1e6)[0]
            errors.append(float(np.abs(rho - gibbs(landscape.on(grid), grid, 0.7)).max()))
        assert order(errors) > 1.8, (landscape.name, errors)
        assert errors[-1] < 0.01


# ---- Mass and sign -----------------------------------------------------------------------------------------------------------


def test_mass_stays_over_hundreds_of_steps() -> None:
    """To 1e-12, with drifts that stay and that change, in both dimensions, against walls too."""
    for landscape, grid in ((rugged(), Grid(-2.0, 2.0, 1601)), (double_well(), Grid((-1.5, -1.0), (1.5, 1.0), (61, 41)))):
        drift = -landscape.gradient_on(grid)
        start = normal(grid, np.full(grid.dimensions, 0.5), 0.05 * np.eye(grid.dimensions))
        mass = grid.integrate(start)
        for law in (None, drift, lambda s, b=drift: b * (1.0 + math.sin(9.0 * s))):
            for step in (0.003, 0.1):
                rho = fokker_planck(start, grid, step * np.array([1.0, 100.0, 400.0]), law, 0.5, step=step)
                assert np.allclose([grid.integrate(row) for row in rho], mass, rtol=1e-12, atol=0.0)


@settings(deadline=None, max_examples=100)
@given(
    d=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
    strength=st.sampled_from([0.0, 1.0, 30.0, 1e5]),
    diffusion=st.sampled_from([1e-4, 0.1, 10.0]),
    step=st.sampled_from([1e-3, 0.1, 1e4]),
    point=st.booleans(),
)
def test_no_drift_and_no_step_makes_densities_negative(
    d: int, seed: int, strength: float, diffusion: float, step: float, point: bool
) -> None:
    """Nor loses mass, for densities that are rough, empty in places, or all in one node."""
    random = np.random.default_rng(seed)
    grid = Grid([-1.0] * d, [1.0] * d, [9, 6][:d])
    start = np.maximum(random.normal(size=grid.shape), 0.0)
    if point:
        start = np.where(np.arange(start.size).reshape(grid.shape) == random.integers(start.size), 1.0, 0.0)
    drift = strength * random.normal(size=(d, *grid.shape))
    rho = fokker_planck(start, grid, step * np.array([1.0, 30.0]), drift, diffusion, step=step)
    assert (rho >= 0.0).all()
    assert np.allclose([grid.integrate(row) for row in rho], grid.integrate(start), rtol=1e-12, atol=0.0)


# ---- The generator -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2])
def test_the_generator_is_one_of_a_markov_chain(d: int) -> None:
    grid = Grid([-1.0] * d, [1.0] * d, [9, 6][:d])
    q = generator(grid, np.random.default_rng(0).normal(size=(d, *grid.shape)) * 40.0, 0.3).toarray()
    assert q.shape == (grid.weights.size,) * 2
    assert np.abs(q.sum(axis=1)).max() < 1e-12 * np.abs(q).max()
    assert (q[~np.eye(len(q), dtype=bool)] >= 0.0).all()


def test_the_generator_is_drift_and_laplacian_with_order_2() -> None:
    errors = []
    for points in (21, 41, 81):
        grid = Grid((-1.0, 0.0), (1.0, 2.0), (points, points + 10))
        x, y = grid.nodes
        v, b = np.exp(x) * np.sin(2.0 * y), np.stack([y * y, np.cos(x)])
        got = (generator(grid, b, 0.3) @ v.ravel()).reshape(grid.shape)
        want = b[0] * v + b[1] * 2.0 * np.exp(x) * np.cos(2.0 * y) - 3.0 * 0.3 * v
        errors.append(float(np.abs(got - want)[1:-1, 1:-1].max()))
    assert order(errors) > 1.8, errors


# ---- Arguments ---------------------------------------------------------------------------------------------------------------


def test_densities_are_handed_out_at_each_time() -> None:
    grid = Grid(-1.0, 1.0, 21)
    start = gibbs(grid.axes[0], grid, 1.0)
    drift = np.sin(grid.axes[0])[None]
    rho = fokker_planck(start, grid, [0.0, 0.1, 0.25], drift, 0.5, step=0.03)
    assert rho.shape == (3, 21)
    assert np.allclose(rho[0], start, rtol=1e-15, atol=0.0)
    assert np.allclose(rho[2], fokker_planck(rho[1], grid, [0.15], lambda s: drift, 0.5, step=0.03)[0], rtol=1e-12, atol=0.0)
    assert np.abs(rho[1] - rho[2]).max() > 0.01


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"density": np.zeros(4)}, r"density: expected shape \(5,\), got \(4,\)"),
        ({"density": np.array([1.0, 0.0, -0.5, 0.0, 0.0])}, "density: expected numbers of 0 or more, got -0.5"),
        ({"drift": np.zeros(5)}, r"drift: expected shape \(1, 5\), got \(5,\)"),
        ({"drift": lambda s: np.zeros(5)}, r"drift: expected shape \(1, 5\), got \(5,\)"),
        ({"diffusion": 0.0}, "diffusion: expected a finite number above 0, got 0.0"),
        ({"step": -0.1}, "step: expected a finite number above 0, got -0.1"),
        ({"times": [1.0, 0.5]}, r"times: expected .*, got \[1.0, 0.5\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changed: dict[str, object], message: str) -> None:
    arguments = {"density": np.ones(5), "grid": Grid(0, 1, 5), "times": [1.0], "drift": None, "diffusion": 0.5, "step": 0.1}
    with pytest.raises(ValueError, match=f"^{message}"):
        fokker_planck(**{**arguments, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drift": np.full((1, 5), 1e308)}, "drift, diffusion: expected the rates of jumps to be finite in float64, got inf"),
        ({"diffusion": 1e308}, "drift, diffusion: expected the rates of jumps to be finite in float64, got inf"),
        ({"diffusion": 1e-320}, "drift, diffusion: expected the rates of jumps to be finite in float64, got (inf|nan)"),
        ({"diffusion": 1e300}, "drift, diffusion, step: expected a system to solve in float64, got a singular one"),
        ({"diffusion": 1e300, "step": 1e100, "times": [1e100]}, "density, drift, diffusion, step: expected the density to be"),
        (
            {"density": np.full(5, 1.7e308)},
            "density, drift, diffusion, step: expected the density to be finite in float64, got",
        ),
        ({"step": 1e-320}, r"times: expected times that 2\^53 steps reach, got 1.0 to go in steps of at most 1e-320"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_overflows_is_refused(changed: dict[str, object], message: str) -> None:
    drift = np.sin(np.linspace(0.0, 3.0, 5))[None]
    arguments = {"density": np.ones(5), "grid": Grid(0, 1, 5), "times": [1.0], "drift": drift, "diffusion": 0.5, "step": 0.1}
    with pytest.raises(ValueError, match=f"^{message}"):
        fokker_planck(**{**arguments, **changed})  # type: ignore[arg-type]


def test_rates_that_overflow_are_refused_by_the_generator_too() -> None:
    with pytest.raises(ValueError, match=r"^drift, diffusion: expected the rates of jumps to be finite in float64, got inf"):
        generator(Grid(0, 1, 5), None, 1e308)
