"""describe(): the numbers against closed forms, simulations and the optimizer itself; the words against what they claim."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from optim_runs import KINDS, METHODS, L, assert_equal, backward, counters, small_model, snapshot, walk
from torch import nn

from deeprelax_cuda.optim import SGLD, EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.optim import constants as c
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.describe import number, setting, suggestion
from deeprelax_cuda.optim.scoping import gamma_of

pytestmark = pytest.mark.filterwarnings("ignore:lr=")

MOMENTA = [
    c.Momentum(mu, damp1, nesterov, sees_coupling)
    for mu, damp1, nesterov, sees_coupling in itertools.product((0.0, 0.5, 0.9), (1.0, 0.4), (False, True), (False, True))
]


# The numbers.


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


# The words.

#: Settings of which nothing is to be said.
QUIET: dict[str, Any] = {"gamma": 1.0, "scoping": 0.0, "temperature": 0.0, "inner_momentum": 0.0, "seed": 0}


def read(text: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return the lines of a text by their names, as number and words, and the advice."""
    assert max(map(len, text.splitlines())) < 110
    body, _, advice = text.partition("\nAdvice")
    lines: dict[str, tuple[str, str]] = {}
    name = ""
    for line in body.splitlines()[1:]:
        if line.startswith(" " * 20):
            lines[name] = (lines[name][0], f"{lines[name][1]} {line.strip()}")
        elif line.startswith(" " * 10):
            name = f"{name}'"
            lines[name] = tuple(line.split(maxsplit=1))
        elif line.startswith("  "):
            name, figure, words = re.match(r"  (.{13}) (.*?)  +(.*)", line).groups()
            name = name.strip()
            lines[name] = (figure, words)
        else:
            lines[line.split(":")[0]] = ("", line.partition(": ")[2])
    return lines, re.sub(r"\n    ", " ", advice).replace("  * ", "").splitlines()[1:]


def told(grad: float | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[dict[str, Any], list[str]]:
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = None if grad is None else torch.full_like(p, grad)
    return read(EntropySGD([p], **{**QUIET, **options}).describe())


BF16, HALF, SINGLE = {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float32}
SEEN = {"inner_momentum": 0.5, "temperature": 1e-4}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lr=0.0099 hardly moves the anchor", {"lr": 0.0099}, {"lr": 0.01}),
    ("lr=5e-5 hardly moves the anchor", {"lr": torch.tensor(5e-5, dtype=torch.float64)}, {"lr": torch.tensor(0.1)}),
    ("lr=0.21 with momentum=0.9 goes 2.1 times .*lr=0.1 goes it once", {"lr": 0.21}, {"lr": 0.2}),
    ("gamma=2.01: .*hardly acts.*act with gamma=2.$", {"gamma": 2.01}, {"gamma": 2.0}),
    (
        "gamma=21: .*hardly acts.*act with gamma=20.$",
        {"gamma": 21.0, "inner_momentum": 0.9},
        {"gamma": 20.0, "inner_momentum": 0.9},
    ),
    (
        "gamma=3: .*hardly acts.*act with gamma=2.$",
        {"gamma": 3.0, "inner_momentum": 0.9, "coupling_in_momentum": False},
        {"gamma": 2.0, "inner_momentum": 0.9, "coupling_in_momentum": False},
    ),
    (
        "gamma=3: .*gamma=2, where scoping=0.1 brings it at outer step 5 .gradient evaluation 100.",
        {"gamma": 3.0, "scoping": 0.1, "gamma_min": 0.5},
        {"gamma": 2.0, "scoping": 0.1, "gamma_min": 0.5},
    ),
    (
        "gamma=3: .*gamma=2, where gamma_total=3 brings it at outer step 1 .gradient evaluation 20.",
        {"gamma_total": 3.0, "gamma_min": 0.5},
        {"gamma_total": 2.0, "gamma_min": 0.5},
    ),
    ("gamma=inf: nothing couples", {"gamma": math.inf}, {"gamma": 2.0}),
    ("gamma=0.05: the coupling makes.*diverge.*is not below 2. Set gamma=0.1 or more", {"gamma": 0.05}, {"gamma": 0.0509}),
    ("gamma=0.0507: .*y swings about x for 35.7 .*has 20; gamma=2 would", {"gamma": 0.0507}, {"gamma": 0.0509}),
    (
        "Set gamma_min=0.1 or more",
        {"gamma": 0.05, "scoping": 0.01},
        {"gamma": 0.06, "scoping": 0.01, "gamma_min": 0.0501},
    ),
    (
        "scoping=0.01: .*diverge from outer step 302 .*passes 2. .*set gamma_min=0.1 or more",
        {"scoping": 0.01, "gamma_min": 0.0499},
        {"scoping": 0.01, "gamma_min": 0.0501},
    ),
    (
        "gamma_total=0.5: .*diverge from outer step 1 .gradient evaluation 5.* on",
        {"gamma_total": 0.5, "gamma_min": 0.04, "inner_steps": 5, "gamma": 0.5, "averaging": 0.5, "inner_lr": 0.1},
        {"gamma_total": 0.5, "gamma_min": 0.06, "inner_steps": 5, "gamma": 0.5, "averaging": 0.5, "inner_lr": 0.1},
    ),
    ("scoping=6.9e-6 does nothing", {"scoping": 6.9e-6, "gamma_min": 0.5}, {"scoping": 7e-6, "gamma_min": 0.5}),
    ("gamma is at its floor, gamma_min=1", {"scoping": 0.01, "gamma_min": 1.0}, {"scoping": 0.01, "gamma_min": 0.99}),
    ("gamma_min=0.5 does nothing", {"gamma_min": 0.5}, {"gamma_min": 0.5, "scoping": 0.1}),
    ("averaging=0: nothing is averaged", {"averaging": 0.0}, {"averaging": 0.01}),
    ('averaging="last": nothing is averaged', {"averaging": "last"}, {"averaging": "linear"}),
    (
        "^inner_steps=1: nothing is averaged",
        {"inner_steps": 1, "gamma": 0.1, "averaging": "linear"},
        {"inner_steps": 2, "gamma": 0.1, "averaging": "linear"},
    ),
    ("averaging=0.966: .*still 50.1 % x", {"averaging": 0.966}, {"averaging": 0.965}),
    ("nesterov=True is ignored", {"momentum": 0.0}, {"momentum": 0.0, "nesterov": False}),
    ("^dampening: without effect", {"dampening": 0.5}, {"dampening": 0.5, "inner_momentum": 0.5}),
    (
        "^dampening and reset_inner_momentum: without effect",
        {"reset_inner_momentum": True, "dampening": 1.0},
        {"reset_inner_momentum": True, "inner_momentum": 0.5},
    ),
    (
        "dampening=1 without nesterov: no gradient",
        {"dampening": 1.0, "inner_momentum": 0.5, "nesterov": False},
        {"dampening": 1.0, "inner_momentum": 0.5, "nesterov": True},
    ),
    (
        "reset_inner_momentum: .*ends before inner_momentum=0.96 has built up, which takes 25",
        {"reset_inner_momentum": True, "inner_momentum": 0.96, "coupling_in_momentum": False},
        {"reset_inner_momentum": True, "inner_momentum": 0.95, "coupling_in_momentum": False},
    ),
    ("inner_momentum=0.5: temperature is that of u only", SEEN, {**SEEN, "inner_momentum": 0.0}),
    ("inner_momentum=0.5: temperature is that of u only", SEEN, {**SEEN, "temperature": 0.0}),
    (
        "inner_momentum=0.9 is remembered for .* inner steps and a period has 5",
        {"inner_momentum": 0.9, "inner_steps": 5},
        {"inner_momentum": 0.9, "inner_steps": 15},
    ),
    ("inner_lr=0: the inner loop stands still", {"inner_lr": 0.0, "temperature": 1.0, "grad": 1.0}, {"grad": 1.0}),
    (
        "temperature=4.9e-8: .* 0.00099 of its drift; it might as well be 0. temperature=0.0005 ",
        {"grad": 1.0, "temperature": 4.9e-8},
        {"grad": 1.0, "temperature": 5.1e-8},
    ),
    (
        "temperature=0.051: .* 1.01 of its drift; y wanders.*temperature=0.0005 ",
        {"grad": 1.0, "temperature": 0.051},
        {"grad": 1.0, "temperature": 0.049},
    ),
    (
        "the noise .0.00387. of.*bfloat16 is 0.00391; rounding=",
        {**BF16, "temperature": 7.5e-5},
        {**BF16, "temperature": 7.7e-5},
    ),
    ("the noise .*bfloat16", {**BF16, "temperature": 7.5e-5}, {**BF16, "temperature": 7.5e-5, "rounding": "stochastic"}),
    ("the noise .*bfloat16", {**BF16, "temperature": 7.5e-5}, {**BF16, "temperature": 7.5e-5, "master_weights": True}),
    ("the drift .*bfloat16", {**BF16, "grad": 0.038}, {**BF16, "grad": 0.04}),
    (
        "the noise .0.000775. and drift .0.001. of",
        {**BF16, "grad": 0.01, "temperature": 3e-6},
        {**BF16, "grad": 1.0, "temperature": 1e-3},
    ),
    ("the noise .*float16 is 0.000488; master_weights=True", {**HALF, "temperature": 1.1e-6}, {**HALF, "temperature": 1.3e-6}),
    ("the noise .*float32 is 5.96e-8; it wants", {**SINGLE, "temperature": 1e-15}, {**SINGLE, "temperature": 1e-13}),
    (
        "the noise .*float32",
        {**BF16, "temperature": 1e-15, "master_weights": True},
        {**BF16, "temperature": 1e-13, "master_weights": True},
    ),
]


@pytest.mark.parametrize(("sentence", "holds", "does_not"), CASES, ids=[case[0][:40] for case in CASES])
def test_advice_is_given_exactly_where_it_holds(sentence: str, holds: dict[str, Any], does_not: dict[str, Any]) -> None:
    _, advice = told(**holds)
    assert len(advice) == 1
    assert re.search(sentence, advice[0]), advice[0]
    assert told(**does_not)[1] == []


def test_nothing_to_say_is_said() -> None:
    p = nn.Parameter(torch.ones(4))
    assert EntropySGD([p], **QUIET).describe().splitlines()[-1].startswith("Advice: none")
    assert EntropySGD([p]).describe().count("Advice\n") == 1


def test_numbers_of_the_defaults() -> None:
    p, q = nn.Parameter(torch.ones(30)), nn.Parameter(torch.ones(10))
    p.grad, q.grad = torch.full((30,), 0.02), torch.zeros(10)
    lines, advice = read(EntropySGD([p, q]).describe())
    assert lines["run"] == ("0 of 20", "inner steps of this period taken, 0 in all; 0 outer steps done")
    assert lines["group 0"][1] == "2 parameters, 40 elements, float32"
    assert lines["inner step"][0] == "0.1"
    assert "with Nesterov momentum 0.9 effectively 1; stable for curvatures of the loss up to 13.6" in lines["inner step"][1]
    rms = 0.02 * math.sqrt(0.75)
    assert lines["drift"][0] == number(0.1 * rms) == "0.00173"
    assert f"root mean square {number(rms)} of the gradients; with momentum up to 0.0173" in lines["drift"][1]
    assert lines["noise"][0] == "4.47e-5"
    for part in ("1/beta = 1e-8", "sqrt(T) = 0.0001", "sqrt(L) = 0.0002 a period", "0.00258 of the drift with momentum"):
        assert part in lines["noise"][1]
    assert lines["T_eff"] == ("1e-9", "= 0.1 T, the temperature of y in the end where inner_lr*h << (1-inner_momentum)^2")
    for mark, q_h in (("'", 0.01), ("''", 0.1), ("'''", 1.0)):
        ratio = c.effective_temperature(c.Momentum(0.9, nesterov=True), q_h, 1e-5)
        h = number(q_h / 0.1)
        assert lines["T_eff" + mark] == (number(1e-8 * ratio), f"= {number(ratio)} T at h = {q_h:g}/inner_lr = {h}")
    assert lines["coupling"] == ("0.0001", "stiffness 1/gamma; its step is inner_lr/gamma = 1e-5, stable below 1.36")
    assert lines["relaxation"][0] == "9,990"
    assert "gamma*(1-inner_momentum)/inner_lr where it is weak; a period has 20" in lines["relaxation"][1]
    assert lines["average"] == ("4", "inner steps count in m, 1/(1 - averaging) for averaging=0.75")
    assert lines["gamma"] == ("10,000", "halves in 693 outer steps, ln 2/ln(1 + scoping) for scoping=0.001; no floor")
    assert lines["outer step"][0] == "0.1"
    assert lines["outer step"][1].endswith("with momentum 0.9 effectively 1")
    assert lines["cost"] == ("20", "gradient evaluations an outer step")
    assert lines["state"][0] == "16"
    assert "x 4, m 4, w 4, v 4; 640 bytes in all; eval() adds 4 for the copy of y" in lines["state"][1]
    assert [s.split(":")[0] for s in advice] == ["inner_momentum=0.9", "scoping=0.001", "gamma=10000"]


@pytest.mark.parametrize("rule", [{"scoping": 0.003}, {"gamma_total": 50.0, "gamma_min": 0.05}], ids=str)
def test_outer_steps_until_something_happens_are_those_of_the_schedule(rule: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = EntropySGD([p], gamma=30.0, inner_steps=4, **rule)
    text = " ".join(optimizer.describe().split())
    group, limit = optimizer.param_groups[0], c.stability_limit(c.Momentum(0.9, nesterov=True), coupling=True)
    gammas = [gamma_of({**group, "outer_steps": n}) for n in range(4000)]
    diverges = next(n for n, gamma in enumerate(gammas) if 0.1 / gamma >= limit)
    acts = next(n for n, gamma in enumerate(gammas) if gamma <= 4.0)
    assert f"diverge from outer step {diverges:,} (gradient evaluation {4 * diverges:,}) on" in text
    assert f"brings it at outer step {acts:,} (gradient evaluation {4 * acts:,})" in text
    if "gamma_total" in rule:
        floor = next(n for n, gamma in enumerate(gammas) if gamma == 0.05)
        assert (
            f"less 0.4 an outer step; gamma, scoping are ignored; at the floor gamma_min=0.05 from outer step {floor} " in text
        )


def test_gamma_that_was_set_by_hand_is_the_one_described() -> None:
    optimizer = EntropySGD([nn.Parameter(torch.ones(1))], **QUIET)
    optimizer.param_groups[0]["gamma"] = 0.5
    lines, _ = read(optimizer.describe())
    assert lines["gamma"] == ("0.5", "fixed: scoping=0")
    assert lines["coupling"][0] == "2"
    optimizer.param_groups[0].update(gamma=3.0, scoping=0.1, gamma_min=0.5)  # until the next outer step
    assert "where scoping=0.1 brings it at outer step 1 (gradient evaluation 20)" in " ".join(optimizer.describe().split())


def test_other_settings_have_their_lines() -> None:
    assert told(weight_decay=0.01)[0]["weight decay"] == ("0.01", "in the gradient: a part 0.001 of y a step, with momentum")
    assert told(outer_weight_decay=0.01)[0]["outer decay"][0] == "0.01"
    assert told(averaging="linear")[0]["average"] == ("20", "inner steps in m, the plain mean of the period: L/2 = 10 old")
    assert told(averaging="last")[0]["average"][0] == "1"
    assert "gamma/(inner_lr*5.5) where" in told(inner_momentum=0.9, dampening=0.5)[0]["relaxation"][1]
    free = told(inner_momentum=0.96, coupling_in_momentum=False)[0]["relaxation"]
    assert free == told()[0]["relaxation"], "momentum that does not see the coupling has no part in it"
    assert "gamma/inner_lr where" in told()[0]["relaxation"][1]
    assert told(gamma=0.01)[0]["relaxation"][0] == "inf"
    assert told(temperature=1.0, inner_lr=0.4, gamma=0.25)[0]["T_eff'''"] == ("inf", "diverges at h = 1/inner_lr = 2.5")
    assert "were the momentum not reset" in told(**SEEN, reset_inner_momentum=True)[0]["T_eff"][1]
    assert told()[0]["noise"] == ("0", "none: temperature=0")
    assert told(temperature=1.0, inner_lr=0.0)[0]["noise"] == ("0", "none: inner_lr=0")


# What is read, and that nothing is written.


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("steps", [0, L - 1, L])
def test_nothing_is_changed(kind: dict[str, Any], mode: str, steps: int) -> None:
    options = dict(kind)
    model = small_model(options.pop("dtype"))
    optimizer = METHODS["EntropySGD"](model.parameters(), **options)
    walk(model, optimizer, range(steps))
    backward(model, steps)
    next(model.parameters()).grad = None
    if mode == "eval":
        optimizer.eval()
    before, numbers, states = snapshot(model, optimizer), counters(optimizer), len(optimizer.state)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    versions = [t._version for p in model.parameters() for t in (p, p.grad) if t is not None]
    generator, other = torch.get_rng_state(), random.getstate()
    optimizer.describe()
    assert_equal(snapshot(model, optimizer), before)
    assert (counters(optimizer), len(optimizer.state)) == (numbers, states)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert [t._version for p in model.parameters() for t in (p, p.grad) if t is not None] == versions
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == other


@pytest.mark.parametrize("kind", [*KINDS, {"dtype": torch.float16}, {"dtype": torch.float32, "inner_momentum": 0.0}], ids=str)
def test_bytes_of_the_state_are_those_it_has(kind: dict[str, Any]) -> None:
    options = dict(kind)
    model = small_model(options.pop("dtype"))
    model[2].bias.requires_grad_(False)
    optimizer = METHODS["EntropySGD"](model.parameters(), **options)

    def said() -> tuple[int, int]:
        figure, words = read(optimizer.describe())[0]["state"]
        return int(figure), int(re.search(r"([\d,]+) bytes in all", words)[1].replace(",", ""))

    def real() -> int:
        states = optimizer.state.values()
        return sum(t.nbytes for state in states for role, t in state.items() if role != "period_steps")

    predicted = said()
    walk(model, optimizer, range(1))
    stepped = sum(p.numel() for p in optimizer.state)
    assert stepped == sum(p.numel() for p in model.parameters()) - 2
    assert predicted == said() == (real() // stepped, real())
    optimizer.eval()
    assert said() == (real() // stepped, real())
    assert said() > predicted


def test_where_the_run_is() -> None:
    model = small_model()
    optimizer = METHODS["EntropySGD"](model.parameters())
    walk(model, optimizer, range(L + 2))
    lines, _ = read(optimizer.describe())
    assert lines["run"] == ("2 of 3", "inner steps of this period taken, 5 in all; 1 outer step done")
    assert lines["mode"] == ("train", "the parameters hold the live weights y; eval() shows the anchor x")
    assert lines["gamma"][0] == number(2.0 / 1.1)
    optimizer.eval()
    assert read(optimizer.describe())[0]["mode"] == (
        "eval",
        "the parameters hold the anchor x; train() brings the live weights y back",
    )
    optimizer.train()
    walk(model, optimizer, range(1))
    assert read(optimizer.describe())[0]["mode"] == ("train", "the parameters hold y = x: a period begins")
    assert f"{optimizer.explain().split()[0]} " in optimizer.describe()


def test_live_weights_are_measured_in_eval_mode_too() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = EntropySGD([p], **{**QUIET, "temperature": 1e-6})
    p.grad = torch.full_like(p, -100.0)
    optimizer.step()
    (said,) = [s for s in read(optimizer.describe())[1] if s.startswith("Most")]
    assert "weights of size 11 in bfloat16 is 0.0312" in said
    optimizer.eval()
    assert float(p.detach()[0]) == 1.0
    assert said in read(optimizer.describe())[1]


def test_gradients_are_read_as_they_are() -> None:
    ps = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float16, torch.float64, torch.float32)]
    optimizer = EntropySGD(ps, **QUIET)
    assert read(optimizer.describe())[0]["drift"][0] == "?"
    ps[0].grad = torch.full((2,), 3e30)  # their squares are beyond float32
    ps[1].grad = torch.zeros(2, dtype=torch.float16)
    words = read(optimizer.describe())[0]["drift"]
    assert words[0] == number(0.1 * 3e30 / math.sqrt(2.0))
    assert "(of 2 of 4 parameters)" in words[1]
    ps[0].grad = None
    assert read(optimizer.describe())[0]["drift"][0] == "0"
    for value in (math.nan, math.inf):
        ps[2].grad = torch.tensor([1.0, value], dtype=torch.float64)
        lines, advice = read(optimizer.describe())
        assert lines["drift"] == ("nan", "gradients hold inf or nan: they are compared with nothing")
        assert advice == []
    ps[2].grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, dtype=torch.float64), (2,), check_invariants=True)
    assert read(optimizer.describe())[0]["drift"][0] == "0"


def test_groups_of_equal_numbers_share_a_block() -> None:
    ps = [nn.Parameter(torch.ones(i + 1)) for i in range(5)]
    lrs = [0.1, 0.001, torch.tensor(0.1, dtype=torch.float64), 0.1, 0.001]
    groups = [{"params": [(f"p{i}", p)], "lr": lr} for i, (p, lr) in enumerate(zip(ps, lrs, strict=True))]
    optimizer = EntropySGD(groups, **QUIET)
    for p in ps:
        p.grad = torch.full_like(p, float(len(p)))
    text = optimizer.describe()
    lines, advice = read(text)
    assert [line for line in text.splitlines() if line.startswith("group")] == [
        "groups 0, 2 to 3: 3 parameters, 8 elements, float32",
        "groups 1, 4: 2 parameters, 7 elements, float32",
    ]
    assert lines["drift"][0] == number(0.1 * math.sqrt((2 * 2**2 + 5 * 5**2) / 7)), "the block that comes last"
    assert len(advice) == 1
    assert advice[0].startswith("groups 1, 4: lr=0.001 hardly moves")
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
        group["nesterov"] = False
        group["averaging"] = "last"
    assert [s.split(":")[0] for s in read(optimizer.describe())[1]] == ['averaging="last"', "groups 1, 4"]


def test_empty_tensors_and_types_have_their_lines() -> None:
    ps = [
        nn.Parameter(torch.ones(0, 3)),
        nn.Parameter(torch.ones((), dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(2, device="meta")),
    ]
    ps[0].grad = torch.ones(0, 3)
    text = EntropySGD(ps, backend="eager", **QUIET).describe()
    assert "3 parameters, 3 elements, float32, bfloat16" in text
    assert len([line for line in text.splitlines() if line.startswith("  state")]) == 2
    assert read(text)[0]["drift"][0] == "0"


def test_backend_that_cannot_serve_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    optimizer = EntropySGD([nn.Parameter(torch.ones(2))], fused=True, **QUIET)
    number_, words = read(optimizer.describe())[0]["backend"]
    assert number_ == "none"
    assert words.startswith("fused: True refuses the eager backend")


def test_method_without_words_of_its_own_is_described() -> None:
    class Bare(EntropySGD):
        _notes = RelaxationOptimizer._notes

    lines, _ = read(Bare([nn.Parameter(torch.ones(2))], **QUIET).describe())
    assert "outer step" in lines
    assert "noise" not in lines


# The other methods.

#: Settings of each of which nothing is to be said.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fixed point": (HamiltonJacobi, {"gamma": 0.5, "scoping": 0.0, "seed": 0}),
    "prox": (HamiltonJacobi, {"inner": "prox", "gamma": 0.5, "inner_lr": 0.2, "scoping": 0.0, "seed": 0}),
    "heat": (HeatSGD, {"gamma": 0.5, "temperature": 2e-4, "scoping": 0.0, "seed": 0}),
    "sgld": (SGLD, {"lr": 0.1, "gamma": 2.0, "temperature": 1e-3, "seed": 0}),
    "free sgld": (SGLD, {"lr": 0.1, "temperature": 1e-3, "seed": 0}),
}


def other(method: str, grad: float | None = None, dtype: torch.dtype = torch.float64, n: int = 4, **options: Any) -> Any:
    """Return an optimizer, with its parameter of ones."""
    make, quiet = OTHERS[method]
    p = nn.Parameter(torch.ones(n, dtype=dtype))
    p.grad = None if grad is None else torch.full_like(p, grad)
    return make([p], **{**quiet, **options}), p


def told_of(method: str, *args: Any, **options: Any) -> tuple[dict[str, tuple[str, str]], list[str]]:
    return read(other(method, *args, **options)[0].describe())


def figures(words: str) -> list[float]:
    """Return the numbers in words, without those that belong to formulas."""
    return [float(text.replace(",", "")) for text in re.findall(r"(?<![\w/*(])-?\d[\d,]*\.?\d*(?:e-?\d+)?(?![\w*)])", words)]


OTHER_CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("fixed point", "^lr=0.00099 hardly moves the anchor.*the step along the gradient", {"lr": 0.00099}, {"lr": 0.001}),
    ("fixed point", "^inner_steps=1: p is the gradient at x", {"inner_steps": 1}, {"inner_steps": 2}),
    ("fixed point", "^scoping=6.9e-6 does nothing", {"scoping": 6.9e-6}, {"scoping": 7e-6}),
    ("fixed point", "drift gamma.p .0.0019. .*bfloat16 is 0.00391", {**BF16, "grad": 0.0038}, {**BF16, "grad": 0.0079}),
    ("fixed point", "drift gamma.p .0.0019. .*bfloat16", {**BF16, "grad": 0.0038, "master_weights": True}, {"grad": 0.0038}),
    ("fixed point", "^inner_lr: without effect, as inner=.fixed_point", {"inner_lr": 5.0}, {}),
    ("fixed point", "^inner_lr and inner_momentum: without", {"inner_lr": 5.0, "inner_momentum": 0.9}, {}),
    ("fixed point", "^nesterov=True is ignored, as momentum is 0", {"momentum": 0.0}, {"momentum": 0.0, "nesterov": False}),
    ("heat", "^nesterov=True is ignored, as momentum is 0", {"momentum": 0.0}, {"momentum": 0.0, "nesterov": False}),
    ("prox", "^inner_lr=0: the inner loop stands still", {"inner_lr": 0.0}, {}),
    ("prox", "^gamma=0.1: the coupling makes.*diverge.*is not below 2. Set gamma=0.2 or", {"gamma": 0.1}, {"gamma": 0.11}),
    (
        "prox",
        "^gamma=1.01: .*hardly acts.*So y does not come to the proximal point.*like Lookahead. It.*act with gamma=1.$",
        {"gamma": 1.01},
        {"gamma": 1.0},
    ),
    (
        "prox",
        "^inner_steps=1: y is one gradient step from x",
        {"inner_steps": 1, "gamma": 0.2},
        {"inner_steps": 2, "gamma": 0.2},
    ),
    ("prox", "^lr=0.21 with momentum=0.9 goes 2.1 times", {"lr": 0.21}, {"lr": 0.2}),
    ("heat", "^temperature=0: nothing is smoothed", {"temperature": 0.0}, {}),
    ("heat", "^The perturbation 1.01 is 1.01 times the size of the float64", {"temperature": 2.05}, {"temperature": 1.99}),
    (
        "heat",
        "^Most of the perturbation .0.00387. .*bfloat16 is 0.00391; it wants a larger temperature or wider",
        {**BF16, "temperature": 3e-5},
        {**BF16, "temperature": 3.1e-5},
    ),
    ("heat", "^Most of the perturbation", {**BF16, "temperature": 3e-5, "master_weights": True}, {"temperature": 3e-5}),
    ("heat", "^Most of the perturbation", {**BF16, "temperature": 3e-5, "rounding": "stochastic"}, {"temperature": 3e-5}),
    ("heat", "^gamma is at its floor, gamma_min=0.5", {"scoping": 0.1, "gamma_min": 0.5}, {"scoping": 0.1, "gamma_min": 0.4}),
    ("sgld", "^lr=0: the sample stands still", {"lr": 0.0}, {"lr": 1e-9}),
    ("sgld", "^temperature=0: there is no noise", {"temperature": 0.0}, {}),
    (
        "sgld",
        "^gamma=0.05: .*diverge, as lr/gamma = 2 is not below 2. Set gamma=0.1 or more",
        {"gamma": 0.05},
        {"gamma": 0.0501},
    ),
    (
        "free sgld",
        "^Most of the noise .0.00387. and drift .0.001. .*bfloat16 is 0.00391; rounding=",
        {**BF16, "grad": 0.01, "temperature": 7.5e-5},
        {**BF16, "grad": 1.0, "temperature": 7.7e-5},
    ),
    (
        "free sgld",
        "^Most of the noise",
        {**BF16, "temperature": 7.5e-5},
        {**BF16, "temperature": 7.5e-5, "master_weights": True},
    ),
]


@pytest.mark.filterwarnings("ignore:gamma.temperature")
@pytest.mark.parametrize(
    ("method", "sentence", "holds", "does_not"), OTHER_CASES, ids=[f"{case[0]} {case[1][:40]}" for case in OTHER_CASES]
)
def test_advice_of_the_other_methods(method: str, sentence: str, holds: dict[str, Any], does_not: dict[str, Any]) -> None:
    _, advice = told_of(method, **holds)
    assert len(advice) == 1
    assert re.search(sentence, advice[0]), advice[0]
    assert told_of(method, **does_not)[1] == []


@pytest.mark.parametrize("method", OTHERS)
def test_bytes_of_the_state_of_the_other_methods(method: str) -> None:
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"master_weights": True}), (torch.float64, {})):
        optimizer, p = other(method, 0.1, dtype, n=7, **options)
        predicted = read(optimizer.describe())[0]["state"]
        optimizer.step()
        figure, words = read(optimizer.describe())[0]["state"]
        assert predicted == (figure, words)
        own = sum(t.nbytes for role, t in optimizer.state[p].items() if role != "period_steps")
        assert (int(figure) * 7, f"{own:,} bytes in all" in words) == (own, True)
        optimizer.eval()
        figure, words = read(optimizer.describe())[0]["state"]
        own = sum(t.nbytes for role, t in optimizer.state[p].items() if role != "period_steps")
        assert (int(figure) * 7, f"{own:,} bytes in all" in words) == (own, True)


@pytest.mark.parametrize("method", ["fixed point", "prox", "heat"])
def test_lines_of_the_outer_loop(method: str) -> None:
    """Of a force that lasts, x takes the step that is said; gamma is halved when it is said."""
    optimizer, p = other(method, 0.0, n=1, scoping=1.0, lr=0.2, momentum=0.5, outer_weight_decay=0.1)
    lines, _ = read(optimizer.describe())
    assert lines["gamma"] == ("0.5", "halves in 1 outer steps, ln 2/ln(1 + scoping) for scoping=1; no floor")
    assert lines["cost"] == ("5", "gradient evaluations an outer step")
    words = "the part of the way from x to m that an outer step goes" if method == "prox" else "the step of x along p"
    assert lines["outer step"] == ("0.2", f"lr, {words}; with momentum 0.5 effectively 0.4")
    assert lines["outer decay"][0] == "0.04"
    for _ in range(5):
        optimizer.step()
    lines, _ = read(optimizer.describe())
    assert lines["gamma"][0] == "0.25"
    assert lines["run"] == ("0 of 5", "inner steps of this period taken, 5 in all; 1 outer step done")
    parameters_hold = "the live weights y; eval() shows the anchor x" if method == "heat" else "y = x: a period begins"
    assert lines["mode"] == ("train", f"the parameters hold {parameters_hold}")
    assert torch.equal(optimizer.state[p]["anchor"], p.detach()) == (method != "heat")


def test_effective_outer_step_along_p_is_measured() -> None:
    for nesterov in (False, True):
        optimizer, p = other("fixed point", n=1, lr=0.01, momentum=0.8, nesterov=nesterov)
        whole = figures(read(optimizer.describe())[0]["outer step"][1])[-1]
        anchors = []
        for _ in range(5 * 60):
            p.grad = torch.full_like(p, 2.0)
            optimizer.step()
            anchors.append(float(optimizer.state[p]["anchor"]))
        assert anchors[-6] - anchors[-1] == pytest.approx(whole * 2.0, rel=1e-3)


# Hamilton-Jacobi by its fixed point.


def distances(averaging: Any, gamma: float, h: float, length: int) -> list[float]:
    """Of p to its fixed point, after each step of a period."""
    optimizer, p = other("fixed point", n=1, gamma=gamma, averaging=averaging, inner_steps=length)
    found = []
    for _ in range(length):
        p.grad = h * p.detach()
        optimizer.step()
        found.append(abs(float(optimizer.state[p]["gradient_average"]) - h / (1.0 + gamma * h)))
    return found


@pytest.mark.parametrize("averaging", [None, 0.3, "last"])
def test_rates_of_the_fixed_point_are_measured(averaging: Any) -> None:
    lines, _ = told_of("fixed point", gamma=0.4, averaging=averaging, inner_steps=4)
    for mark, q in (("", 0.1), ("'", 1.0)):
        figure, words = lines[f"rate{mark}"]
        assert f"at h = {setting(q)}/gamma = {number(q / 0.4)}" in words
        found = distances(averaging, 0.4, q / 0.4, 4)
        assert float(figure) == pytest.approx(found[1] / found[0], rel=0.01)
        left = float(re.search(r"([\d.e-]+) after the 3 that follow the first", words)[1])
        assert left == pytest.approx(found[-1] / found[0], rel=0.01)


@pytest.mark.parametrize("averaging", [None, 0.3, "last"])
def test_limits_of_the_fixed_point_are_measured(averaging: Any) -> None:
    figure, words = told_of("fixed point", gamma=0.4, averaging=averaging)[0]["damping"]
    weight = {None: 0.25, "last": 1.0}.get(averaging) or 1.0 - averaging
    assert figure == number(weight)
    low, high = map(float, re.search(r"contracts for curvatures h from (\S+) to (\S+):", words).groups())
    for limit in (low, high):
        for share in (0.97, 1.03):
            found = distances(averaging, 0.4, share * limit, 8)
            assert (found[-1] < found[-2]) == (share < 1.0), (limit, share)


def test_of_the_plain_mean_no_rate_is_said() -> None:
    lines, _ = told_of("fixed point", averaging="linear", inner_steps=6)
    assert lines["damping"] == (
        "1/j",
        'averaging="linear": p is the plain mean of the 6 gradients of a period; the j-th multiplies the distance to p by 1 - '
        "(1 + gamma*h)/j",
    )
    assert "rate" not in lines


def test_drift_of_the_fixed_point_is_measured() -> None:
    optimizer, p = other("fixed point", n=6)
    assert read(optimizer.describe())[0]["drift"][0] == "?"
    p.grad = torch.arange(6.0, dtype=torch.float64)
    figure, words = read(optimizer.describe())[0]["drift"]
    optimizer.step()
    assert float(figure) == pytest.approx(float((p.detach() - 1.0).square().mean().sqrt()), rel=0.005)
    assert "gamma times the root mean square 3.03 of the gradients" in words
    p.grad.fill_(math.nan)
    assert read(optimizer.describe())[0]["drift"] == ("nan", "gradients hold inf or nan: they are compared with nothing")


def test_contraction_in_words() -> None:
    optimizer, p = other("fixed point", n=2, check_contraction=True, momentum=0.0)
    assert read(optimizer.describe())[0]["contraction"] == (
        "?",
        "the ratio of successive |d - p|: no period has been measured yet",
    )
    for _ in range(15):
        p.grad = 3.0 * p.detach()
        optimizer.step()
    words = "the ratio of |d - p| in the last two steps of a period, 0.375 by the last 3 periods: it contracts"
    assert read(optimizer.describe())[0]["contraction"] == ("0.375", words)
    assert "contraction" not in told_of("fixed point")[0]


# Its proximal loop.


def test_lines_of_the_proximal_loop() -> None:
    lines, _ = told_of("prox", 0.5, inner_lr=0.2, gamma=0.5)
    assert lines["inner step"] == ("0.2", "inner_lr, the step along the gradient; stable for curvatures of the loss up to 10")
    assert lines["drift"] == ("0.1", "a step, inner_lr times the root mean square 0.5 of the gradients")
    assert lines["coupling"] == ("2", "stiffness 1/gamma; its step is inner_lr/gamma = 0.4, stable below 2")
    assert lines["relaxation"][0] == number(-1.0 / math.log(1.0 - 0.4))
    for name in ("noise", "T_eff", "average"):
        assert name not in lines, "it has none"
    for h, grows in ((9.7, False), (10.3, True)):  # with next to no coupling
        optimizer, p = other("prox", n=1, inner_lr=0.2, gamma=1e9, inner_steps=40)
        for _ in range(39):
            p.grad = h * p.detach()
            optimizer.step()
        assert (abs(float(p.detach())) > 1.0) == grows
    optimizer, p = other("prox", n=1, inner_lr=0.01, gamma=0.5, inner_steps=100)
    steps = float(read(optimizer.describe())[0]["relaxation"][0])
    for _ in range(round(steps)):  # from a kick back to x
        p.grad = torch.full_like(p, -100.0 if not optimizer.state else 0.0)
        optimizer.step()
    assert float(p.detach() - 1.0) == pytest.approx(math.exp(-1.0), rel=0.03)


# HEAT.


def test_perturbation_is_measured() -> None:
    optimizer, p = other("heat", n=100_000, gamma=2.0, temperature=0.03, inner_steps=2)
    lines, _ = read(optimizer.describe())
    figure, words = lines["perturbation"]
    std, wave = float(figure), float(re.search(r"a wave of length (\S+) is damped to", words)[1])
    assert lines["perturbation'"] == (number(std), "of the size 1 of the float64 weights")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert std == pytest.approx(float((p.detach() - 1.0).std()), rel=0.01)
    k = 2.0 * math.pi / wave
    p.grad = torch.cos(k * (p.detach() - 1.0))  # of height 1 at x
    optimizer.step()
    assert "is damped to 0.61 of its height, a longer one less" in words
    assert float(optimizer.state[p]["gradient_average"].mean()) == pytest.approx(0.61, abs=0.01)
    assert "of length" not in told_of("heat", temperature=0.0)[0]["perturbation"][1]


def test_gradients_in_the_mean_are_counted() -> None:
    optimizer, p = other("heat", n=1, inner_steps=4)
    assert read(optimizer.describe())[0]["mean"] == (
        "4",
        "gradients in p; 3 in the first period, which does not count the one at x",
    )
    for period, of_one in ((0, 1.0 / 3.0), (1, 1.0 / 4.0)):
        for step in range(4):
            p.grad = torch.full_like(p, float(step == 3))
            optimizer.step()
        assert float(optimizer.state[p]["gradient_average"]) == pytest.approx(of_one), period


# SGLD.


def test_lines_of_sgld_are_measured() -> None:
    lr, temperature, gamma = 0.1, 0.02, 2.0
    optimizer, p = other("sgld", 0.5, n=100_000, lr=lr, temperature=temperature, gamma=gamma, weight_decay=0.25)
    lines, advice = read(optimizer.describe())
    assert advice == []
    assert "mode" not in lines
    assert lines["run"] == ("0", "steps taken; the parameters hold y, in eval mode too")
    assert lines["cost"] == ("1", "gradient evaluation a step")
    assert lines["step"] == ("0.1", "lr, the step along the gradient; stable for curvatures h + 1/gamma below 20")
    assert lines["weight decay"] == ("0.25", "in the gradient: a part 0.025 of y a step")
    assert lines["drift"] == ("0.05", "a step, lr times the root mean square 0.5 of the gradients")
    assert f"T = 1/beta = 0.02; {number(math.sqrt(2 * lr * temperature) / 0.05)} of the drift" in lines["noise"][1]
    optimizer.step()
    assert float(p.detach().mean()) == pytest.approx(1.0 - 0.05 - 0.025, abs=0.001)
    assert float(lines["noise"][0]) == pytest.approx(float(p.detach().std()), rel=0.01)
    assert lines["coupling"][0] == "0.5"
    assert f"samples lie within sqrt(gamma*T) = {number(math.sqrt(gamma * temperature))} of x" in lines["coupling"][1]
    assert lines["coupling"][1].endswith("forget where they were in gamma/lr = 20 steps")
    assert told_of("free sgld")[0]["coupling"] == ("0", "gamma=inf: y is free, and there is no x")
    optimizer.step()
    assert read(optimizer.describe())[0]["run"][0] == "2"


def test_where_the_loss_is_flat_samples_lie_about_x_as_said() -> None:
    optimizer, p = other("sgld", n=50_000, lr=0.02, temperature=0.3, gamma=0.4)
    within, steps = figures(read(optimizer.describe())[0]["coupling"][1])[-2:]
    p.grad = torch.zeros_like(p)
    for _ in range(int(5 * steps)):
        optimizer.step()
    assert float((p.detach() - 1.0).square().mean().sqrt()) == pytest.approx(within, rel=0.03)
    optimizer, p = other("sgld", n=1, lr=0.02, temperature=0.0, gamma=0.4)
    for step in range(1 + int(steps)):  # a kick, then back to x
        p.grad = torch.full_like(p, -50.0 if step == 0 else 0.0)
        optimizer.step()
    assert float(p.detach() - 1.0) == pytest.approx(math.exp(-1.0), rel=0.03)


def test_effective_temperature_of_sgld_is_the_stationary_variance() -> None:
    lr, temperature, gamma = 0.25, 0.3, 1.5
    optimizer, _ = other("sgld", lr=lr, temperature=temperature, gamma=gamma)
    lines, _ = read(optimizer.describe())
    for mark, q in (("", 0.01), ("'", 0.1), ("''", 1.0)):
        variance = 0.0
        for _ in range(4000):
            variance = (1.0 - q) ** 2 * variance + 2.0 * lr * temperature
        ratio = q / lr * variance / temperature
        words = f"= {number(ratio)} T, the temperature of the samples at H = h + 1/gamma = {setting(q)}/lr = {number(q / lr)}"
        assert lines[f"T_eff{mark}"] == (number(ratio * temperature), words)


def test_sgld_diverges_beyond_the_limit() -> None:
    gamma, lr = 0.8, 0.1
    limit = float(re.search(r"h \+ 1/gamma below (\S+)", told_of("sgld", gamma=gamma, lr=lr)[0]["step"][1])[1])
    for share in (0.97, 1.03):
        optimizer, p = other("sgld", n=1, temperature=0.0, gamma=gamma, lr=lr)
        h = share * limit - 1.0 / gamma
        for _ in range(300):
            p.grad = h * (p.detach() - 1.0) + 1.0
            optimizer.step()
        assert (abs(float(p.detach()) - 1.0) > 1.0) == (share > 1.0)
