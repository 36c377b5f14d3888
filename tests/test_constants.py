"""The numbers that `describe` prints, against independent programs and measurements."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deeprelax_cuda.optim import EntropySGD
from deeprelax_cuda.optim import constants as c
from deeprelax_cuda.optim.describe import number, setting, suggestion

pytestmark = pytest.mark.filterwarnings("ignore:lr=")

MOMENTA = [
    c.Momentum(mu, damp1, nesterov, sees_coupling)
    for mu, damp1, nesterov, sees_coupling in itertools.product((0.0, 0.5, 0.9), (1.0, 0.4), (False, True), (False, True))
]


def step_matrix(momentum: c.Momentum, q: float, q_k: float) -> np.ndarray:
    """What one inner step, written out as in the contract with inner_lr = 1, makes of (y, v) = (1, 0) and (0, 1)."""
    columns = []
    for y, v in np.eye(2):
        d, e = q * y, q_k * y
        if momentum.sees_coupling:
            d = d + e
        if not momentum.mu:
            v = 0.0
        else:
            v = momentum.mu * v + momentum.damp1 * d
            d = d + momentum.mu * v if momentum.nesterov else v
        if not momentum.sees_coupling:
            d = d + e
        columns.append((y - d, v))
    return np.array(columns).T


def spectral_radius(momentum: c.Momentum, q: float, q_k: float) -> float:
    return float(abs(np.linalg.eigvals(step_matrix(momentum, q, q_k))).max())


def stationary_variance(momentum: c.Momentum, q: float, q_k: float) -> float:
    """Of y in the end, under noise of variance 2: the covariance iterated, by doubling the number of steps each time."""
    power, total = step_matrix(momentum, q, q_k), np.diag([2.0, 0.0])
    for _ in range(40):
        total, power = total + power @ total @ power.T, power @ power
    return float(total[0, 0])


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_effective_temperature_is_the_stationary_variance(momentum: c.Momentum) -> None:
    for q, q_k in [(0.01, 1e-5), (0.1, 0.0), (0.1, 0.2), (1.0, 1e-5), (1e-6, 1e-7), (0.5, 0.5), (1e-5, 0.3)]:
        want = (q + q_k) * stationary_variance(momentum, q, q_k)
        assert c.effective_temperature(momentum, q, q_k) == pytest.approx(want, rel=1e-6), (q, q_k)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 0.99])
def test_effective_temperature_is_the_closed_form(mu: float) -> None:
    for q in (1e-6, 1e-4, 0.1, 0.7, 1.2):
        b = 1.0 - q
        heavy = ((1 + mu) * (1 - mu) ** 2 + 2 * mu * q) / ((1 - mu) * (1 + mu - q / 2))
        nesterov = 2 * ((1 + mu**2) * (1 + mu * b) - 2 * mu * (1 + mu) * b) / ((1 - mu * b) * (1 + b + 2 * mu * b))
        for h in (q, 0.3 * q):  # only the sum of curvature and coupling counts
            assert c.effective_temperature(c.Momentum(mu), h, q - h) == pytest.approx(heavy, rel=1e-9)
            assert c.effective_temperature(c.Momentum(mu, nesterov=True), h, q - h) == pytest.approx(nesterov, rel=1e-9)
    for kind in (False, True):
        tiny = 1e-9 * (1 - mu) ** 2
        assert c.effective_temperature(c.Momentum(mu, nesterov=kind), tiny) == pytest.approx(1 - mu, rel=1e-6)


def test_effective_temperature_of_the_design() -> None:
    """0.10 and 0.59, as the design document gives them for mu = 0.9 and Nesterov."""
    momentum = c.Momentum(0.9, nesterov=True)
    assert c.effective_temperature(momentum, 1e-4) == pytest.approx(0.10, abs=0.005)
    assert c.effective_temperature(momentum, 0.1) == pytest.approx(0.59, abs=0.005)
    assert c.effective_temperature(momentum, 1.36) == math.inf


@pytest.mark.parametrize(
    "options",
    [
        {"inner_momentum": 0.0},
        {"inner_momentum": 0.8, "nesterov": True},
        {"inner_momentum": 0.8, "nesterov": False, "dampening": 0.3},
        {"inner_momentum": 0.8, "nesterov": True, "dampening": 0.3, "coupling_in_momentum": False},
    ],
    ids=str,
)
def test_optimizer_has_the_effective_temperature(options: dict[str, Any]) -> None:
    """10^5 independent coordinates of a quadratic: their variance is known to 0.45 %."""
    h, gamma, inner_lr, temperature = 2.0, 2.0, 0.1, 0.01
    p = nn.Parameter(torch.zeros(100_000))
    optimizer = EntropySGD(
        [p], inner_lr=inner_lr, gamma=gamma, scoping=0.0, temperature=temperature, inner_steps=1000, seed=5, **options
    )
    for _ in range(100):
        p.grad = h * p.detach()
        optimizer.step()
    momentum = c.Momentum(
        options["inner_momentum"],
        1.0 - options.get("dampening", 0.0),
        options.get("nesterov", True),
        options.get("coupling_in_momentum", True),
    )
    ratio = c.effective_temperature(momentum, inner_lr * h, inner_lr / gamma)
    assert float(p.detach().double().var()) * (h + 1 / gamma) / temperature == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("coupling", [False, True])
def test_stability_limit_is_where_the_spectral_radius_passes_1(momentum: c.Momentum, coupling: bool) -> None:
    limit = c.stability_limit(momentum, coupling=coupling)
    for share in (0.01, 0.5, 0.999, 1.001, 1.5):
        q, q_k = (0.0, share * limit) if coupling else (share * limit, 0.0)
        assert c.is_stable(momentum, q, q_k) == (share < 1.0)
        assert (spectral_radius(momentum, q, q_k) < 1.0) == (share < 1.0)
    assert not c.is_stable(momentum, math.inf)


def test_stability_limits_of_the_design() -> None:
    for mu in (0.5, 0.9):
        assert c.stability_limit(c.Momentum(mu), coupling=True) == pytest.approx(2 * (1 + mu))
        nesterov = c.Momentum(mu, nesterov=True)
        assert c.stability_limit(nesterov, coupling=True) == pytest.approx(2 * (1 + mu) / (1 + 2 * mu))
        assert c.stability_limit(c.Momentum(mu, nesterov=True, sees_coupling=False), coupling=True) == 2.0
    assert c.stability_limit(c.Momentum(0.0, 0.4, True), coupling=False) == 2.0
    assert c.stability_limit(c.Momentum(0.5, 0.0), coupling=False) == math.inf


@pytest.mark.filterwarnings("ignore:gamma=.* so stiff a coupling")
@pytest.mark.parametrize("averaging", [0.75, "linear"])
@pytest.mark.parametrize("options", [{"nesterov": True}, {"nesterov": False, "dampening": 0.5}], ids=str)
def test_optimizer_diverges_beyond_the_limit(options: dict[str, Any], averaging: Any) -> None:
    momentum = c.Momentum(0.9, 1.0 - options.get("dampening", 0.0), options["nesterov"])
    for share in (0.97, 1.03):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        gamma = 0.1 / (share * c.stability_limit(momentum, coupling=True))
        optimizer = EntropySGD([p], gamma=gamma, temperature=0.0, averaging=averaging, inner_steps=10**6, **options)
        for step in range(1500):  # a kick, and from then on the coupling alone
            p.grad = torch.full_like(p, float(step == 0))
            optimizer.step()
        assert (abs(float(p.detach())) > 1.0) == (share > 1.0)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_relaxation_time(momentum: c.Momentum) -> None:
    for q, q_k in [(0.0, 1e-3), (0.2, 0.0), (0.0, 1.2), (0.3, 0.3), (1e-4, 1e-5)]:
        radius = spectral_radius(momentum, q, q_k)
        assert c.relaxation_time(momentum, q, q_k) == pytest.approx(-1.0 / math.log(radius), rel=1e-6), (q, q_k)
    for q in (1e-6, 1e-9):  # slow: a gain times the plain step
        assert c.relaxation_time(momentum, q) == pytest.approx(1.0 / (c.momentum_gain(momentum) * q), rel=1e-3)
    assert c.relaxation_time(momentum, 0.0) == math.inf
    assert c.relaxation_time(momentum, 10.0 * c.stability_limit(momentum, coupling=False)) == math.inf
    assert c.relaxation_time(c.Momentum(), 1.0) == 0.0


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_momentum_gain_is_what_a_constant_force_gets(momentum: c.Momentum) -> None:
    d = v = 0.0
    for _ in range(500):
        v = momentum.mu * v + momentum.damp1
        d = 1.0 if not momentum.mu else 1.0 + momentum.mu * v if momentum.nesterov else v
    assert c.momentum_gain(momentum) == pytest.approx(d)


def test_plain_constants() -> None:
    assert c.noise_std(0.1, 1e-8) == pytest.approx(math.sqrt(2e-9))
    assert c.temperature_of_noise(c.noise_std(0.3, 0.07), 0.3) == pytest.approx(0.07)
    assert [c.averaging_window(a, 20) for a in (0.75, 0.0, "linear", "last")] == [4.0, 1.0, 20.0, 1.0]
    m = 1.0  # a period's average of y = 0, begun at x = 1
    for _ in range(7):
        m += (1.0 - 0.9) * (0.0 - m)
    assert c.weight_of_anchor(0.9, 7) == pytest.approx(m)
    assert c.weight_of_anchor("linear", 7) == c.weight_of_anchor("last", 7) == 0.0
    assert (1.0 + 1e-3) ** c.half_life(1e-3) == pytest.approx(2.0)
    assert c.half_life(0.0) == math.inf


def test_steps_until_below() -> None:
    for start, first in itertools.product((0, 3), (0, 1, 2, 3, 4, 1000, 2**40)):
        assert c.steps_until_below(lambda n, first=first: float(n < first), 0.5, start=start) == max(start, first)
    assert c.steps_until_below(lambda n: 1.0, 0.5) is None
    assert c.steps_until_below(lambda n: 1.0 / (1 + n), 0.25) == 3, "reaching the bound counts"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_ulp_decides_what_an_addition_keeps(dtype: torch.dtype) -> None:
    for value in (1.0, 1.5, -0.07421875, 192.0, 2.0**-14):
        least, x = c.half_ulp(value, dtype), torch.tensor(value, dtype=dtype)
        for share, kept in ((0.99, False), (1.01, True)):
            moved = (x.double() + math.copysign(share * least, value)).to(dtype)
            if dtype == torch.float64:  # the sum itself is rounded
                moved = x + math.copysign(share * least, value)
            assert (moved != x) == kept, (value, share)


def test_numbers_are_readable() -> None:
    written = [0.0, 0.1, 4.4721e-5, 13863.0, 999.6, 2.5e7, 1e6, -0.012345, math.inf, math.nan, 12.0, 1e-8]
    want = ["0", "0.1", "4.47e-5", "13,900", "1,000", "2.5e7", "1e6", "-0.0123", "inf", "nan", "12", "1e-8"]
    assert list(map(number, written)) == want
    assert [setting(v) for v in (1e4, 5e-5, 0.999, 1e8)] == ["10000", "5e-5", "0.999", "1e8"]
    assert [suggestion(v) for v in (0.147368, 12345.0)] == ["0.147", "12300"]
