"""What `describe` says of the other methods: every number against a measurement or an independent computation."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import pytest
import torch
from described import read
from lone_replicas import LoneElasticSGD, LoneParle
from torch import nn

import deeprelax_cuda as dr
from deeprelax_cuda.optim import SGLD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.optim.describe import number, setting

pytestmark = pytest.mark.filterwarnings("ignore:lr=")


def two_of(kind: Any) -> Any:
    """A constructor of two replicas: of what it is given, and of a copy, with the same gradient."""

    def make(params: Any, **options: Any) -> Any:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        for p, q in zip(params, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        return kind(replicas=[params, others], **options)

    return make


#: Settings of each of which nothing is to be said.
BF16 = {"dtype": torch.bfloat16}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fixed point": (HamiltonJacobi, {"gamma": 0.5, "scoping": 0.0, "seed": 0}),
    "prox": (HamiltonJacobi, {"inner": "prox", "gamma": 0.5, "inner_lr": 0.2, "scoping": 0.0, "seed": 0}),
    "heat": (HeatSGD, {"gamma": 0.5, "temperature": 2e-4, "scoping": 0.0, "seed": 0}),
    "sgld": (SGLD, {"lr": 0.1, "gamma": 2.0, "temperature": 1e-3, "seed": 0}),
    "free sgld": (SGLD, {"lr": 0.1, "temperature": 1e-3, "seed": 0}),
    "parle": (
        two_of(dr.Parle),
        {"gamma": 1.0, "scoping": 0.0, "gamma_min": 0.0, "rho_scoping": 0.0, "rho_min": 0.0, "inner_momentum": 0.0, "seed": 0},
    ),
    "one of parle": (
        LoneParle,
        {"gamma": 1.0, "scoping": 0.0, "gamma_min": 0.0, "rho_scoping": 0.0, "rho_min": 0.0, "inner_momentum": 0.0, "seed": 0},
    ),
    "elastic": (two_of(dr.ElasticSGD), {"rho_scoping": 0.0, "rho_min": 0.0, "seed": 0}),
    "one of elastic": (LoneElasticSGD, {"rho": math.inf, "rho_scoping": 0.0, "rho_min": 0.0, "seed": 0}),
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
    ("parle", "^rho=inf: nothing couples the replicas", {"rho": math.inf}, {"rho": 1e9}),
    ("parle", "^rho_min=0.5 does nothing, as rho_scoping=0", {"rho_min": 0.5}, {"rho_min": 0.5, "rho_scoping": 0.1}),
    ("parle", "^rho is at its floor, rho_min=1", {"rho_min": 1.0, "rho_scoping": 0.1}, {"rho_min": 0.9, "rho_scoping": 0.1}),
    ("parle", "^rho_scoping=6.9e-6 does nothing: rho halves in", {"rho_scoping": 6.9e-6, "rho_min": 0.5}, {}),
    (
        "parle",
        r"^rho=0.079: the coupling .* diverge, as lr\*\(1 \+ 1/rho\) = 1.37 is not below 1.36; set rho higher or lr lower",
        {"rho": 0.079},
        {"rho": 0.08},
    ),
    (
        "parle",
        "^rho=0.05: .* diverge from outer step 27 .gradient evaluation 675. on, .* = 2.1 is not below 1.36; set rho_min higher",
        {"rho": 1.0, "rho_min": 0.05, "rho_scoping": 0.1},
        {"rho": 1.0, "rho_min": 0.08, "rho_scoping": 0.1},
    ),
    ("one of parle", "^rho does nothing, as there is one replica", {"consensus": "anchors"}, {"consensus": "averages"}),
    ("one of parle", "^rho does nothing, as there is one replica", {"consensus": "anchors", "rho": 0.01}, {}),
    ("elastic", "^rho=inf: nothing couples the replicas", {"rho": math.inf}, {"rho": 1e9}),
    ("elastic", "^rho=0.073: .* as lr/rho = 1.37 is not below 1.36; set rho higher or lr", {"rho": 0.073}, {"rho": 0.074}),
    (
        "elastic",
        "^rho=0.04: .* diverge from outer step 28 .gradient evaluation 28. on, as lr/rho = 2.5 .*; set rho_min higher",
        {"rho": 1.0, "rho_min": 0.04, "rho_scoping": 0.1},
        {"rho": 1.0, "rho_min": 0.074, "rho_scoping": 0.1},
    ),
    ("elastic", "^lr=0: the replicas stand still", {"lr": 0.0}, {"lr": 1e-9}),
    ("elastic", "^nesterov=True is ignored, as momentum is 0", {"momentum": 0.0}, {"momentum": 0.0, "nesterov": False}),
    ("elastic", "^dampening: without effect", {"momentum": 0.0, "nesterov": False, "dampening": 0.5}, {"dampening": 0.5}),
    ("elastic", "^dampening=1 without nesterov", {"dampening": 1.0, "nesterov": False}, {"dampening": 1.0}),
    (
        "elastic",
        "^Most of the noise .0.00387. .*bfloat16 is 0.00391; rounding=",
        {**BF16, "temperature": 7.5e-5},
        {**BF16, "temperature": 7.7e-5},
    ),
    ("one of elastic", "^rho does nothing, as there is one replica", {"rho": 0.01}, {}),
]


@pytest.mark.filterwarnings("ignore:gamma.temperature", "ignore:rho=")
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
        assert (int(figure) * 7, f"{own * len(optimizer.state):,} bytes in all" in words) == (own, True)
        optimizer.eval()
        figure, words = read(optimizer.describe())[0]["state"]
        own = sum(t.nbytes for role, t in optimizer.state[p].items() if role != "period_steps")
        assert (int(figure) * 7, f"{own * len(optimizer.state):,} bytes in all" in words) == (own, True)


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


# Replicas.


def test_lines_of_replicas() -> None:
    optimizer, p = other("parle", 0.1, gamma=0.4, rho=2.0, rho_scoping=1.0, rho_min=0.25, lr=0.2, inner_steps=4)
    lines, advice = read(optimizer.describe())
    assert advice == []
    assert lines["groups 0 to 1"] == ("", "2 parameters, 8 elements, float64")
    words = "the mean is taken every 4 steps, over 2 replicas; over ranks each sends 2(n - 1)/n = 1 times its parameters for it"
    assert lines["replicas"] == ("2", f"{words}, 4 bytes each (float64: 8)")
    floor = "at the floor rho_min=0.25 from outer step 3 (gradient evaluation 12) on"
    assert lines["rho"] == ("2", f"halves in 1 outer steps, ln 2/ln(1 + rho_scoping) for rho_scoping=1; {floor}")
    assert lines["pull"] == ("0.3", "lr*(1 + 1/rho), what a step takes off the way to the consensus; stable below 1.36")
    assert lines["mode"] == ("train", "the parameters hold y = x: a period begins")
    for _ in range(4):
        optimizer.step()
    lines, _ = read(optimizer.describe())
    assert (lines["rho"][0], lines["pull"][0]) == ("1", "0.4")
    assert "consensus" in optimizer.state[p]

    optimizer, p = other("elastic", 0.5, lr=0.2, rho=4.0, weight_decay=0.25, temperature=0.01, momentum=0.5)
    lines, advice = read(optimizer.describe())
    assert advice == []
    words = "lr, the step along the gradient; with momentum effectively 0.4; stable for curvatures of the loss up to 7.5"
    assert lines["step"] == ("0.2", words)
    assert lines["weight decay"] == ("0.25", "in the gradient: a part 0.1 of y a step, with momentum")
    assert lines["drift"][0] == "0.1"
    assert lines["noise"][0] == number(math.sqrt(2.0 * 0.2 * 0.01))
    assert lines["replicas"][1].startswith("the mean is taken every step, over 2 replicas; ")
    assert lines["rho"] == ("4", "fixed: rho_scoping=0")
    assert lines["pull"] == ("0.05", "lr/rho, what a step takes off the way to the consensus; stable below 1.5")
    assert lines["cost"][0] == "1"
    optimizer.step()
    lines, _ = read(optimizer.describe())
    assert lines["mode"] == ("train", "the parameters hold the live weights y; eval() shows the anchor x"), "y is never reset"

    lines, advice = told_of("one of parle", rho=0.5)
    assert (advice, lines["replicas"]) == ([], ("1", "the mean is taken every 25 steps, over 1 replica"))
    assert lines["pull"][0] == "0.3"


MOMENTA = [(0.9, True), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(0.9, False), (0.5, True), (0.0, False)])]


@pytest.mark.parametrize(("momentum", "nesterov"), MOMENTA)
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_outer_steps_of_parle_diverge_beyond_the_limit(momentum: float, nesterov: bool, n: int) -> None:
    """Where a period brings all replicas to one minimum, so that m is at c: here in one step, to 0."""
    lr, limit = 0.4, 2.0 * (1.0 + momentum) / (1.0 + 2.0 * momentum if nesterov else 1.0)
    for share in (0.98, 1.02):
        rho = 1.0 / (share * limit / lr - 1.0)
        params = [nn.Parameter(torch.tensor([float(a + 1)], dtype=torch.float64)) for a in range(n)]
        to_the_minimum = {"inner_steps": 1, "inner_lr": 1.0, "inner_momentum": 0.0, "gamma": math.inf, "averaging": "last"}
        with contextlib.nullcontext() if share < 1.0 else pytest.warns(UserWarning, match=r"diverge, as lr\*\(1 \+ 1/rho\) = "):
            optimizer = dr.Parle(
                replicas=[[p] for p in params],
                **{"lr": lr, "momentum": momentum, "nesterov": nesterov, "rho": rho, "rho_scoping": 0.0, "seed": 0},
                **to_the_minimum,
            )
        lines, advice = read(optimizer.describe())
        assert lines["pull"][0] == number(share * limit)
        assert lines["pull"][1].endswith(f"stable below {number(limit)}")
        assert any("makes their steps diverge" in one for one in advice) == (share > 1.0)
        for _ in range(200):
            for p in params:
                p.grad = p.detach().clone()
            optimizer.step()
        apart = float((params[0] - params[-1]).detach().abs())
        assert (apart > n - 1.0) == (share > 1.0)


@pytest.mark.parametrize("coupling_in_momentum", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("momentum", "nesterov"), MOMENTA)
def test_replicas_of_elastic_sgd_diverge_beyond_the_limit(momentum: float, nesterov: bool, coupling_in_momentum: bool) -> None:
    """Where the loss is flat; their mean stays."""
    seen = momentum if coupling_in_momentum else 0.0
    lr, limit = 0.1, 2.0 * (1.0 + seen) / (1.0 + 2.0 * seen if nesterov else 1.0)
    for share in (0.98, 1.02):
        params = [nn.Parameter(torch.tensor([1.0 + a], dtype=torch.float64)) for a in (-0.5, 0.5)]
        with contextlib.nullcontext() if share < 1.0 else pytest.warns(UserWarning, match="diverge, as lr/rho = "):
            optimizer = dr.ElasticSGD(
                replicas=[[p] for p in params],
                **{"lr": lr, "momentum": momentum, "nesterov": nesterov, "coupling_in_momentum": coupling_in_momentum},
                **{"rho": lr / (share * limit), "rho_scoping": 0.0, "seed": 0},
            )
        for step in range(200):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if step == 0:  # x of each began at itself: now it is the mean, and they are pulled to it from here on
                assert float(optimizer.state[params[0]]["anchor"]) == pytest.approx(1.0)
        assert (float((params[0] - params[1]).detach().abs()) > 1.0) == (share > 1.0)
        assert share > 1.0 or float((params[0] + params[1]).detach()) == pytest.approx(2.0)
