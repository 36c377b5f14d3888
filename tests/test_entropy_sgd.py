"""What EntropySGD computes: against its formula in plain torch ops, its schedules, and the defects of published versions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.backends import eager
from deeprelax_cuda.clock import Rule, power
from deeprelax_cuda.optim import EntropySGD

L = 4
OPTIONS: dict[str, Any] = {
    "lr": 0.3,
    "inner_lr": 0.1,
    "inner_steps": L,
    "gamma": 0.7,
    "scoping": 0.2,
    "temperature": 1e-3,
    "averaging": 0.75,
    "momentum": 0.8,
    "inner_momentum": 0.6,
    "nesterov": True,
    "dampening": 0.0,
    "weight_decay": 0.05,
    "outer_weight_decay": 0.0,
    "coupling_in_momentum": True,
    "reset_inner_momentum": False,
    "maximize": False,
    "seed": 2**63 + 5,
}


def gradient(y: Tensor) -> Tensor:
    """The gradient of a loss with two minima that grows linearly far out, so that no run of these tests leaves the numbers."""
    return (y * y * y - y).clamp(-2.0, 2.0) + 0.25


def run(optimizer: EntropySGD, p: Tensor, steps: int) -> Iterator[dict[str, Tensor]]:
    """Take steps with the gradient at the live weights; give a copy of the parameter and its state after each."""
    for _ in range(steps):
        p.grad = gradient(p.detach())
        optimizer.step()
        tensors = {"param": p, **optimizer.state[p]}
        yield {role: t.detach().clone() for role, t in tensors.items() if role != "period_steps"}


def by_the_formula(start: Tensor, steps: int, number: int = 0, **changes: Any) -> Iterator[SimpleNamespace]:
    """The run of tensor ``number`` as the method defines it, one torch op a rounding; yields p, y, x, m, v, w, gamma.

    The parameter ``p`` is ``y`` rounded to its type; without a master, ``y`` is what the parameter holds.
    """
    o = SimpleNamespace(**{**OPTIONS, "master_weights": False, **changes})
    wide = torch.float64 if start.dtype == torch.float64 else torch.float32
    y = x = m = start.to(wide)
    v, w, gamma = torch.zeros_like(y), torch.zeros_like(y), o.gamma

    def store(y: Tensor) -> Tensor:
        return y if o.master_weights else y.to(start.dtype).to(wide)

    for step in range(steps):
        j = step % L + 1
        d = gradient(y.to(start.dtype)).to(wide)
        d = -d if o.maximize else d
        d = d + o.weight_decay * y
        e = (1.0 / gamma) * (y - x)
        if o.coupling_in_momentum:
            d = d + e
        if o.inner_momentum:
            v = o.inner_momentum * v + (1.0 - o.dampening) * d
            d = d + o.inner_momentum * v if o.nesterov else v
        if not o.coupling_in_momentum:
            d = d + e
        y = y - o.inner_lr * d
        if o.temperature:
            z = eager.gaussian(y.numel(), seed=o.seed, step=step, stream=number, offset=0, device=y.device)
            y = y + math.sqrt(2.0 * o.inner_lr * o.temperature) * z.to(wide).view(y.shape)
        y = store(y)
        a = {"linear": 1.0 / j, "last": 1.0}.get(o.averaging) or 1.0 - o.averaging
        m = y if a == 1.0 else m + a * (y - m)
        if j == L:
            d = x - m + o.outer_weight_decay * x
            w = o.momentum * w + d
            d = d + o.momentum * w if o.nesterov else w
            x = x - o.lr * d
            m, y = x, store(x)
            v = torch.zeros_like(v) if o.reset_inner_momentum else v
            gamma = o.gamma / power(1.0 + o.scoping, (step + 1) // L)
        yield SimpleNamespace(p=y.to(start.dtype), y=y, x=x, m=m, v=v, w=w, gamma=gamma)


@pytest.fixture(params=backends.available("cpu"))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"averaging": "linear"},
        {"averaging": "last"},
        {"temperature": 0.0},
        {"nesterov": False, "dampening": 0.3, "outer_weight_decay": 0.02},
        {"coupling_in_momentum": False, "reset_inner_momentum": True},
        {"inner_momentum": 0.0, "momentum": 0.0},
        {"maximize": True, "scoping": 0.0},
        {"master_weights": True},
    ],
    ids=lambda changes: ",".join(changes) or "defaults",
)
def test_two_periods_are_the_formula_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    first = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    p = torch.nn.Parameter(torch.randn(37).to(dtype))
    start = p.detach().clone()
    optimizer = EntropySGD([first, p], **{**OPTIONS, **changes}, backend=backend)
    steps = zip(run(optimizer, p, 2 * L + 1), by_the_formula(start, 2 * L + 1, number=1, **changes), strict=True)
    for got, want in steps:
        expected = {"param": want.p, "anchor": want.x, "average": want.m}
        expected |= {"momentum": want.v} if changes.get("inner_momentum") != 0.0 else {}
        expected |= {"outer_momentum": want.w} if changes.get("momentum") != 0.0 else {}
        expected |= {"master": want.y} if "master_weights" in changes and dtype.itemsize == 2 else {}
        assert got.keys() == expected.keys()
        for role, tensor in expected.items():
            torch.testing.assert_close(got[role], tensor, rtol=0, atol=0, msg=lambda text, role=role: f"{role}: {text}")
        assert optimizer.param_groups[0]["gamma"] == want.gamma
    assert not torch.equal(got["param"], start)


def test_stochastic_rounding_moves_bfloat16_by_the_mean(backend: str) -> None:
    """A step of 1/8 of the distance to the next bfloat16: nearest loses it, stochastic takes it for 1/8 of the elements."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = torch.nn.Parameter(torch.ones(2**14, dtype=torch.bfloat16))
        optimizer = EntropySGD([p], rounding=rounding, backend=backend, inner_lr=2.0**-10, inner_momentum=0.0, temperature=0.0)
        p.grad = -torch.ones_like(p)
        optimizer.step()
        assert set(p.tolist()) <= {1.0, 1.0 + 2.0**-7}
        moved[rounding] = (p != 1.0).float().mean().item()
    assert moved == {"nearest": 0.0, "stochastic": pytest.approx(1 / 8, abs=0.015)}


def test_temperature_is_the_variance_over_twice_the_inner_lr() -> None:
    """The factor 2 under the root is what makes y sample exp(-V/T), and not exp(-2V/T)."""
    p = torch.nn.Parameter(torch.zeros(2**14))
    p.grad = torch.zeros_like(p)
    EntropySGD([p], inner_lr=0.02, temperature=0.25, seed=1).step()
    assert p.std().item() == pytest.approx(math.sqrt(2 * 0.02 * 0.25), rel=0.03)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 1000])
def test_power_squares_from_the_lowest_bit(n: int) -> None:
    factors, base = [], 1.001
    for bit in range(n.bit_length()):
        factors += [base] if n >> bit & 1 else []
        base = base * base
    assert power(1.001, n) == math.prod(factors, start=1.0)
    assert power(1.001, n) == pytest.approx(1.001**n, rel=1e-12)


def test_schedules_have_floors() -> None:
    def shrink(floor: float, n: int) -> float:
        return Rule(4, initial_gamma=8.0, scoping=1.0, gamma_min=floor, gamma_total=0.0, inner_lr=0.25).gamma(n, 8.0)

    assert shrink(0.0, 2) == 2.0
    assert shrink(3.0, 2) == 3.0
    assert shrink(0.5, 10**9) == 0.5, "an overflowing power leaves the floor"
    reverse_time = Rule(4, initial_gamma=8.0, scoping=1.0, gamma_min=0.5, gamma_total=10.0, inner_lr=0.25)
    assert reverse_time.gamma(3, 8.0) == 7.0
    assert reverse_time.gamma(30, 8.0) == 0.5


def gammas(outer_steps: int, **options: Any) -> list[float]:
    """Gamma at the start and after each outer step."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = EntropySGD([p], **{"inner_steps": 2, "temperature": 0.0, **options})
    values = [optimizer.param_groups[0]["gamma"]]
    for _ in range(outer_steps):
        for _ in run(optimizer, p, 2):
            pass
        values.append(optimizer.param_groups[0]["gamma"])
    return values


def test_gamma_follows_its_rule() -> None:
    assert gammas(3, gamma=8.0, scoping=1.0) == [8.0, 4.0, 2.0, 1.0]
    assert gammas(3, gamma=8.0, scoping=1.0, gamma_min=1.5) == [8.0, 4.0, 2.0, 1.5]
    assert gammas(2, gamma=8.0, scoping=0.0, gamma_min=9.0) == [8.0, 8.0, 8.0]
    assert gammas(2, gamma=math.inf, scoping=1.0) == [math.inf] * 3
    reversed_time = gammas(4, gamma=8.0, scoping=1.0, gamma_total=1.5, gamma_min=0.25, inner_lr=0.25)
    assert reversed_time == [1.5, 1.0, 0.5, 0.25, 0.25]


def test_time_runs_by_the_initial_inner_lr() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = EntropySGD([p], inner_steps=1, inner_lr=0.25, gamma_total=10.0, gamma_min=1.0)
    optimizer.param_groups[0]["inner_lr"] = 0.1
    list(run(optimizer, p, 2))
    assert optimizer.param_groups[0]["gamma"] == 9.5


def test_gamma_set_by_hand_lasts_while_no_rule_is_on() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    for scoping, expected in ((0.0, 5.0), (1.0, 4.0)):
        optimizer = EntropySGD([p], inner_steps=1, gamma=8.0, scoping=scoping)
        optimizer.param_groups[0]["gamma"] = 5.0
        list(run(optimizer, p, 1))
        assert optimizer.param_groups[0]["gamma"] == expected


@pytest.mark.parametrize("gamma_min", [0.0, 0.2])
def test_scoping_into_divergence_is_said_once_and_in_time(gamma_min: float) -> None:
    """Nesterov with 0.9 diverges from inner_lr/gamma = 1.357 on, so at inner_lr 0.1 below gamma 0.0737."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = EntropySGD([p], inner_steps=1, gamma=1.0, scoping=1.0, gamma_min=gamma_min, temperature=0.0)
    said_at = []
    for n in range(1, 8):
        p.grad = torch.ones(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        if caught:
            assert ["diverge from now on" in str(warning.message) for warning in caught] == [True]
            said_at.append(n)
    assert said_at == ([] if gamma_min else [4]), "1/2, 1/4, 1/8, 1/16 = 0.0625"


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("averaging", "mean"), ("gamma", -2.0), ("lr", math.inf)])
def test_numbers_set_by_hand_are_refused_by_name(name: str, value: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = EntropySGD([p], scoping=0.0)
    p.grad = torch.ones(3)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"^{name}: "):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore:gamma=.* diverge")
def test_gamma_that_scoping_shrank_to_nothing_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = EntropySGD([p], inner_steps=1, scoping=1e200)
    list(run(optimizer, p, 1))
    before = p.detach().clone()
    with pytest.raises(ValueError, match="1/gamma"):
        list(run(optimizer, p, 1))
    optimizer.param_groups[0]["gamma"] = 0.0
    with pytest.raises(ValueError, match=r"^gamma: .*gamma_min"):
        list(run(optimizer, p, 1))
    assert torch.equal(p, before)
    assert optimizer.stats()["steps"] == 1


# Defects of published implementations, each by its name.


def quiet(**changes: Any) -> tuple[torch.nn.Parameter, EntropySGD]:
    """A parameter and an optimizer without noise, momenta and decay."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    off = {"temperature": 0.0, "momentum": 0.0, "inner_momentum": 0.0, "weight_decay": 0.0}
    return p, EntropySGD([p], **{**OPTIONS, **off, **changes})


def test_defect_scoping_counter_never_advances() -> None:
    (p, scoped), (q, fixed) = quiet(scoping=1.0), quiet(scoping=0.0)
    *_, first = zip(run(scoped, p, L), run(fixed, q, L), strict=True)
    assert torch.equal(*(step["anchor"] for step in first))
    assert scoped.param_groups[0]["gamma"] == OPTIONS["gamma"] / 2
    *_, second = zip(run(scoped, p, L), run(fixed, q, L), strict=True)
    assert not torch.equal(*(step["anchor"] for step in second)), "the stiffer coupling must reach the inner steps"
    assert scoped.param_groups[0]["gamma"] == OPTIONS["gamma"] / 4


def test_defect_averaging_weight_reversed() -> None:
    p, optimizer = quiet(averaging=0.75)
    start = p.detach().clone()
    step = next(run(optimizer, p, 1))
    assert torch.equal(step["average"], start + 0.25 * (step["param"] - start))


def test_defect_outer_momentum_seeded_with_a_raw_gradient() -> None:
    p, optimizer = quiet(momentum=0.9)
    *_, before, after = run(optimizer, p, L)
    y = by_last_inner_step(before)
    average = before["average"] + 0.25 * (y - before["average"])
    assert torch.equal(after["outer_momentum"], before["anchor"] - average)


def by_last_inner_step(before: dict[str, Tensor]) -> Tensor:
    """The live weights after one more inner step of `quiet`."""
    y, x = before["param"], before["anchor"]
    return y - 0.1 * (gradient(y) + (1.0 / OPTIONS["gamma"]) * (y - x))


def test_defect_outer_step_taken_from_y_instead_of_x() -> None:
    p, optimizer = quiet(averaging="last", lr=0.25)
    *_, before, after = run(optimizer, p, L)
    x, y = before["anchor"], by_last_inner_step(before)
    assert not torch.equal(x, y)
    assert torch.equal(after["anchor"], x - 0.25 * (x - y))


def test_defect_only_the_first_parameter_group_is_updated() -> None:
    ps = [torch.nn.Parameter(torch.full((3,), 0.5)) for _ in range(3)]
    optimizer = EntropySGD([{"params": [p]} for p in ps], **OPTIONS)
    for _ in range(2 * L):
        for p in ps:
            p.grad = gradient(p.detach())
        optimizer.step()
    for p in ps:
        assert not torch.equal(optimizer.state[p]["anchor"], torch.full((3,), 0.5))
    assert {group["gamma"] for group in optimizer.param_groups} == {OPTIONS["gamma"] / power(1.2, 2)}


def test_defect_coupling_leaks_into_the_momentum_buffer() -> None:
    p, optimizer = quiet(inner_momentum=0.6, coupling_in_momentum=False, nesterov=False)
    first, second = run(optimizer, p, 2)
    assert torch.equal(second["momentum"], 0.6 * first["momentum"] + gradient(first["param"]))


@pytest.mark.parametrize("inner_steps", [1, 5])
def test_defect_weight_decay_is_lost(inner_steps: int) -> None:
    """Lost where there is no inner loop, in the published code; and here it acts in the inner step, not the outer."""
    p, optimizer = quiet(weight_decay=0.5, inner_steps=inner_steps, lr=1.0, averaging="last")
    start = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(p, start - 0.1 * 0.5 * start, rtol=1e-6, atol=0)


# Limits in which the method is another one.


@pytest.mark.parametrize("nesterov", [False, True])
def test_limit_is_torch_sgd(nesterov: bool) -> None:
    torch.manual_seed(0)
    start = torch.randn(100)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    shared = {"nesterov": nesterov, "weight_decay": 0.01}
    limit = {"gamma": math.inf, "temperature": 0.0, "inner_steps": 1, "averaging": "last", "lr": 1.0, "momentum": 0.0}
    optimizer = EntropySGD([p], inner_lr=0.1, inner_momentum=0.9, **limit, **shared)
    sgd = torch.optim.SGD([q], lr=0.1, momentum=0.9, **shared)
    for _ in range(20):
        for parameter, steps in ((p, optimizer), (q, sgd)):
            parameter.grad = gradient(parameter.detach())
            steps.step()
    torch.testing.assert_close(p, q, rtol=20 * torch.finfo(torch.float32).eps, atol=1e-6)
    assert (p - start).abs().max() > 0.1


def test_limit_is_lookahead_over_sgd() -> None:
    start = torch.linspace(-1, 1, 9)
    p, fast = torch.nn.Parameter(start.clone()), start.clone()
    optimizer = EntropySGD(
        [p], lr=0.5, gamma=math.inf, temperature=0.0, inner_steps=3, averaging="last", momentum=0.0, inner_momentum=0.0
    )
    slow = fast
    for step in range(9):
        fast = fast - 0.1 * gradient(fast)
        if step % 3 == 2:
            slow = fast = slow - 0.5 * (slow - fast)
        *_, last = run(optimizer, p, 1)
        assert torch.equal(last["param"], fast)
        assert torch.equal(last["anchor"], slow)


# Groups and seeds.


def test_groups_differ_in_their_numbers() -> None:
    """Without noise, each group walks as it would alone."""
    settings: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"lr": 0.7, "gamma": 2.0, "scoping": 0.0, "averaging": "linear", "momentum": 0.0},
    ]
    ps = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in settings]
    optimizer = EntropySGD([{"params": [p], **s} for p, s in zip(ps, settings, strict=True)], **{**OPTIONS, "temperature": 0.0})
    for _ in range(2 * L):
        for p in ps:
            p.grad = gradient(p.detach())
        optimizer.step()
    for p, setting in zip(ps, settings, strict=True):
        alone = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        *_, last = run(EntropySGD([alone], **{**OPTIONS, "temperature": 0.0, **setting}), alone, 2 * L)
        assert torch.equal(p, last["param"])
    assert not torch.equal(*ps)


def test_seed_alone_decides_the_noise() -> None:
    def walk(**options: Any) -> Tensor:
        p = torch.nn.Parameter(torch.zeros(2, 8))
        *_, last = run(EntropySGD([p], temperature=1e-2, **options), p, 5)
        return last["param"]

    generator = torch.get_rng_state()
    first = walk(seed=3)
    assert torch.equal(torch.get_rng_state(), generator), "no generator is advanced"
    torch.manual_seed(99)
    assert torch.equal(walk(seed=3), first), "no generator is read"
    assert not torch.equal(walk(seed=4), first)
    assert torch.equal(walk(), walk(seed=99)), "without a seed it is torch's initial seed"


def test_parameters_draw_their_own_noise_across_groups() -> None:
    ps = [torch.nn.Parameter(torch.zeros(8)) for _ in range(3)]
    optimizer = EntropySGD([{"params": ps[:2]}, {"params": ps[2:]}], temperature=1e-2, seed=7)
    for p in ps:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    scale = math.sqrt(2 * 0.1 * 1e-2)
    for number, p in enumerate(ps):
        assert torch.equal(p, scale * eager.gaussian(8, seed=7, step=0, stream=number, offset=0, device=p.device))
