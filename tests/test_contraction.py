"""check_contraction of HamiltonJacobi: the ratio it measures, when it warns and when not, and the gamma that it names.

On f = h/2 y^2 the distance of p to the fixed point falls by the factor 1 - a*(1 + gamma*h) a step, and d - p with it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optim_runs import assert_equal, backward, small_model, snapshot
from torch import Tensor, nn

from deeprelax_cuda.optim import HamiltonJacobi

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:lr=0 hardly moves", "error:check_contraction"),
]
#: With lr 0 x stays, and all periods of a deterministic loss are one and the same.
STILL: dict[str, Any] = {"lr": 0.0, "momentum": 0.0, "scoping": 0.0, "check_contraction": True, "seed": 0}
#: Periods within which a ratio of 1.2 that does not scatter is known not to be chance.
SOON = 20


def spread(*curvatures: float, each: int = 3) -> Tensor:
    """The curvatures of ``each`` coordinates of every kind."""
    return torch.tensor(curvatures, dtype=torch.float64).repeat_interleave(each)


def play(
    curvatures: Sequence[Tensor],
    groups: Sequence[dict[str, Any]],
    periods: int,
    noise: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[HamiltonJacobi, list[str]]:
    """Take periods on quadratics, a parameter a group; return the optimizer and the warnings, after the first of which it ends.

    ``noise`` is the standard deviation of the noise of a gradient.
    """
    params = [nn.Parameter(torch.linspace(1.0, 2.0, len(h), dtype=h.dtype)) for h in curvatures]
    optimizer = HamiltonJacobi(
        [{"params": [p], **own} for p, own in zip(params, groups, strict=True)], **{**STILL, "inner_steps": 5, **options}
    )
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(periods * optimizer.param_groups[0]["inner_steps"]):
            for p, h in zip(params, curvatures, strict=True):
                p.grad = h * p.detach()
                if noise:
                    p.grad += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
            if caught:
                break
    return optimizer, [str(w.message) for w in caught]


def factor(averaging: Any, length: int, gamma_h: float) -> float:
    """What the distance of p is multiplied by in the last step but one, which the last two residuals are about."""
    a = {None: 0.25, "last": 1.0, "linear": 1.0 / (length - 1)}.get(averaging) or 1.0 - averaging
    return 1.0 - a * (1.0 + gamma_h)


# ---- The ratio ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", [None, 0.4, "last", "linear"])
@pytest.mark.parametrize("length", [3, 4, 9])
@pytest.mark.parametrize("gamma_h", [0.5, 2.5, -0.6, -1.5])
def test_the_ratio_is_that_of_the_curvature(averaging: Any, length: int, gamma_h: float) -> None:
    optimizer, _ = play([spread(gamma_h / 0.2)], [{}], 1, gamma=0.2, averaging=averaging, inner_steps=length)
    assert optimizer.stats()["contraction"] == pytest.approx(abs(factor(averaging, length, gamma_h)), rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"maximize": True}, {"weight_decay": 0.7}, {"maximize": True, "weight_decay": 0.7}], ids=str
)
def test_the_ratio_is_that_of_what_is_descended(options: dict[str, Any]) -> None:
    optimizer, _ = play([spread(1.5)], [{}], 1, gamma=0.3, **options)
    h = (-1.5 if "maximize" in options else 1.5) + options.get("weight_decay", 0.0)
    assert optimizer.stats()["contraction"] == pytest.approx(abs(factor(None, 5, 0.3 * h)), rel=1e-9)


def test_the_ratio_is_that_of_the_masters() -> None:
    """Of narrow weights the decay takes the exact ones; the others stay where they are before the residuals are this small."""
    p = nn.Parameter(torch.linspace(1.0, 2.0, 9).bfloat16())
    options = {**STILL, "lr": 0.5, "inner_steps": 15, "gamma": 0.3, "weight_decay": 1.0, "master_weights": True}
    optimizer = HamiltonJacobi([p], **options)
    for _ in range(15):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.stats()["contraction"] == pytest.approx(abs(factor(None, 15, 0.3)), rel=1e-3)


def residual_ratio(params: Sequence[Tensor], gamma: float, a: float, length: int, slope: Callable[..., Tensor]) -> float:
    """|d - p| of the last step of a period over that of the step before, by the formulas alone."""
    sizes = []
    p: list[Tensor] = []
    for _ in range(length):
        d = [slope(i, x - gamma * p[i] if p else x) for i, x in enumerate(params)]
        if p:
            sizes.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(d, p, strict=True))))
        p = [b + a * (c - b) for b, c in zip(p, d, strict=True)] if p else d
    return sizes[-1] / sizes[-2]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_of_several_curvatures_the_ratio_is_that_of_all_coordinates_together(dtype: torch.dtype, close: float) -> None:
    hs = [spread(0.3, 2.0).to(dtype), spread(-1.0, 7.0, each=40).to(dtype)]
    optimizer, _ = play(hs, [{}, {"lr": 0.1}], 1, gamma=0.25, inner_steps=4)
    starts = [torch.linspace(1.0, 2.0, len(h), dtype=torch.float64) for h in hs]
    want = residual_ratio(starts, 0.25, 0.25, 4, lambda i, y: hs[i].double() * y)
    assert optimizer.stats()["contraction"] == pytest.approx(want, rel=close)


def test_once_an_outer_step() -> None:
    h = spread(1.0)
    p = nn.Parameter(torch.ones(len(h), dtype=h.dtype))
    optimizer = HamiltonJacobi([p], **{**STILL, "lr": 0.5, "inner_steps": 3, "gamma": 0.5})
    seen = []
    for _ in range(9):
        p.grad = h * p.detach() ** 3
        optimizer.step()
        seen.append(optimizer.stats()["contraction"])
    assert all(map(math.isnan, seen[:2]))
    assert seen[2] == seen[3] == seen[4] != seen[5] == seen[6] == seen[7] != seen[8]
    assert "contraction" not in HamiltonJacobi([p]).stats()


# ---- The warning -------------------------------------------------------------------------------------------------------------

#: averaging, inner_steps, gamma*h of what does not contract, and where that begins.
BEYOND: list[tuple[Any, int, float, float]] = [
    ("last", 3, 1.5, 1.0),
    ("last", 5, 4.0, 1.0),
    (None, 3, 9.0, 7.0),
    (None, 8, 8.0, 7.0),
    (0.5, 4, 4.5, 3.0),
    ("linear", 5, 9.0, 7.0),
    ("last", 4, -1.5, -1.0),
    (None, 5, -2.0, -1.0),
    (None, 3, -6.0, -1.0),
    (0.9, 6, -5.0, -1.0),
    ("linear", 4, -2.0, -1.0),
]


@pytest.mark.parametrize(("averaging", "length", "gamma_h", "limit"), BEYOND)
def test_where_it_does_not_contract_a_gamma_is_named_at_which_it_does(
    averaging: Any, length: int, gamma_h: float, limit: float
) -> None:
    options = {"averaging": averaging, "inner_steps": length}
    # Beside a mild curvature, which contracts and is forgotten.
    h = torch.cat([spread(gamma_h / 0.7), spread(0.05)])
    optimizer, (said,) = play([h], [{}], SOON, gamma=0.7, **options)
    text = " ".join(optimizer.describe().split())
    assert said.startswith("check_contraction: the fixed point does not contract at gamma=0.7: |d - p| grows ")
    assert "it does not contract" in text
    named = float(re.search(r"would contract at gamma=([\d.e-]+), noise", said)[1])
    assert named == pytest.approx(0.9 * 0.7 * limit / gamma_h, rel=0.02)

    optimizer, none = play([h], [{}], SOON, gamma=named, **options)
    assert none == []
    assert optimizer.stats()["contraction"] < 1.0
    assert "it contracts" in " ".join(optimizer.describe().split())
    optimizer, _ = play([h], [{}], 1, gamma=1.2 * named, **options)
    assert optimizer.stats()["contraction"] > 1.0


@pytest.mark.parametrize(
    ("averaging", "length", "gamma_h"), [(None, 5, 7.2), ("last", 4, 1.03), ("last", 3, -1.1), (0.5, 8, 3.1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_first_residuals_tell(averaging: Any, length: int, gamma_h: float, dtype: torch.dtype) -> None:
    """However slowly they grow; two pairs of them, which periods of 3 steps have in two."""
    needed = 1 if length > 3 else 2
    options = {"gamma": 1.0, "averaging": averaging, "inner_steps": length}
    for periods in range(1, needed + 1):
        _, said = play([spread(gamma_h).to(dtype)], [{}], periods, **options)
        assert len(said) == (periods == needed)


def test_rounding_errors_of_an_iteration_that_has_converged_are_no_residuals() -> None:
    for h in torch.linspace(0.5, 6.5, 13).tolist():
        for seed in range(5):
            _, said = play([torch.tensor([h])], [{}], 5, gamma=1.0, inner_steps=40 + seed)
            assert said == []


@pytest.mark.parametrize("averaging", [None, "last", "linear"])
@pytest.mark.parametrize("share", [0.99, -0.99])
def test_just_inside_the_limit_nothing_is_said(averaging: Any, share: float) -> None:
    positive = {None: 7.0, "last": 1.0, "linear": 7.0}[averaging]
    h = share * (positive if share > 0.0 else 1.0) / 0.3
    optimizer, none = play([spread(h)], [{}], 100, gamma=0.3, averaging=averaging)
    assert none == []
    assert 0.9 < optimizer.stats()["contraction"] < 1.0


def test_it_is_said_once() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = HamiltonJacobi([p], **{**STILL, "inner_steps": 4, "gamma": 5.0, "averaging": "last"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4 * 40):
            p.grad = p.detach().clone()
            optimizer.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_groups_of_different_gammas_are_told_a_part_of_each() -> None:
    hs, gammas = [spread(2.0), spread(0.4)], [0.8, 1.0]
    _, (said,) = play(hs, [{"gamma": gamma} for gamma in gammas], SOON, averaging="last")
    part = float(re.search(r"would contract at ([\d.e-]+) times every gamma, noise", said)[1])
    optimizer, none = play(hs, [{"gamma": part * gamma} for gamma in gammas], SOON, averaging="last")
    assert none == []
    assert 0.8 < optimizer.stats()["contraction"] < 1.0


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("h", "averagings"), [(2.0, ["last", 0.75]), (-3.0, [0.5, 0.9]), (-3.0, [0.9, 0.5])], ids=str)
def test_groups_of_different_damping_contract_too_where_they_are_told(h: float, averagings: list[Any], order: int) -> None:
    """The second group's curvature does nothing, so the first group's damping decides."""
    hs, groups = [spread(h), spread(0.01)][::order], [{"averaging": each} for each in averagings][::order]
    _, (said,) = play(hs, groups, SOON, gamma=1.0)
    named = float(re.search(r"would contract at gamma=([\d.e-]+), noise", said)[1])
    optimizer, none = play(hs, groups, SOON, gamma=named)
    assert none == []
    assert optimizer.stats()["contraction"] < 1.0


def test_the_gamma_of_the_measured_period_is_the_one_said() -> None:
    """Scoping has moved on when it is said."""
    _, (said,) = play([spread(20.0)], [{}], 1, gamma=1.0, averaging="last", scoping=0.5)
    assert "does not contract at gamma=1: |d - p| grows 20 times" in said
    assert "contract at gamma=0.045, noise" in said


def test_every_groups_gamma_is_judged_by_its_own_periods() -> None:
    params = [nn.Parameter(torch.ones(40)) for _ in range(2)]
    groups = [{"params": params[:1], "gamma": 0.001}, {"params": params[1:], "gamma": 9.0}]
    optimizer = HamiltonJacobi(groups, **{**STILL, "inner_steps": 5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            if step == 5:
                optimizer.param_groups[1]["gamma"] = 0.5
            for p in params:
                p.grad = p.detach().clone()
            optimizer.step()
    (said,) = (str(w.message) for w in caught)
    assert re.search(r"does not contract at gamma=0.001, 9: .* times every gamma", said)
    assert "by the last 1 period: it contracts" in " ".join(optimizer.describe().split())


def test_another_gamma_is_judged_by_its_own_periods() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HamiltonJacobi([p], **{**STILL, "inner_steps": 5, "gamma": 0.2, "averaging": "last"})
    said = []
    for period in range(36):
        if period == 32:
            optimizer.param_groups[0]["gamma"] = 6.0
        for _ in range(5):
            p.grad = p.detach().clone()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            said += [(period, str(w.message)) for w in caught]
    assert len(said) == 1
    assert said[0][0] <= 34
    assert "at gamma=6: |d - p| grows 6 times an inner step" in said[0][1]


# ---- Noise -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("averaging", "length"), [(None, 5), ("last", 5), (0.5, 4), ("linear", 10)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_noise_of_few_dimensions_is_often_one_line_and_yet_no_reason(averaging: Any, length: int, size: int) -> None:
    for seed in range(5):
        options = {"gamma": 1.0, "averaging": averaging, "inner_steps": length}
        _, said = play([spread(0.5, each=size)], [{}], 150, noise=1.0, seed=seed, **options)
        assert said == [], seed


@pytest.mark.slow
@pytest.mark.parametrize("averaging", [None, "last", "linear"])
@pytest.mark.parametrize(("length", "size"), [(3, 400), (5, 400), (3, 20)])
@pytest.mark.parametrize("gamma_h", [0.9, 0.0, -0.5])
def test_noise_alone_is_no_reason_to_warn(averaging: Any, length: int, size: int, gamma_h: float) -> None:
    """Gradients that are noise, hundreds of periods of it: what it adds to a period's p grows for a while, and stays."""
    for seed in range(3):
        options = {"gamma": 0.5, "averaging": averaging, "inner_steps": length}
        _, said = play([spread(gamma_h / 0.5, each=size)], [{}], 200, noise=100.0, seed=seed, **options)
        assert said == [], seed


@pytest.mark.slow
@pytest.mark.parametrize("averaging", [None, "last"])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_minibatches_are_no_reason_to_warn(averaging: Any, batch: int) -> None:
    """A model in training: the norms of its gradients vary by half their size and more from batch to batch."""
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(256, 6)
        target = torch.sin(x @ torch.randn(6, 1)) + 0.5 * torch.randn(256, 1)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = HamiltonJacobi(
            model.parameters(), **{**STILL, "lr": 0.02, "gamma": 0.02, "inner_steps": 3, "averaging": averaging}
        )
        for _ in range(3 * 100):
            chosen = torch.randint(256, (batch,))
            model.zero_grad()
            (model(x[chosen]) - target[chosen]).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize(("averaging", "gamma_h"), [("last", 2.5), (None, 12.0), (None, -4.0)])
def test_through_noise_it_is_seen_in_the_end(averaging: Any, gamma_h: float) -> None:
    for seed in range(3):
        _, said = play([spread(gamma_h, each=20)], [{}], 60, noise=1.0, seed=seed, gamma=1.0, averaging=averaging)
        assert len(said) == 1, seed


# ---- What it leaves alone, and what it does without --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "weight_decay": 0.1},
        {"dtype": torch.float64, "maximize": True, "averaging": "linear"},
        {"dtype": torch.bfloat16, "weight_decay": 0.1},
        {"dtype": torch.bfloat16, "rounding": "stochastic"},
        {"dtype": torch.bfloat16, "master_weights": True, "weight_decay": 0.1},
        {"dtype": torch.float16, "averaging": "last"},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_steps_are_the_same_bits(options: dict[str, Any], backend: str) -> None:
    options = dict(options)
    dtype = options.pop("dtype")
    ends = []
    for check in (False, True):
        model = small_model(dtype)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "gamma": 0.3}]
        optimizer = HamiltonJacobi(
            groups, inner_steps=4, gamma=0.2, scoping=0.1, seed=3, backend=backend, check_contraction=check, **options
        )
        for step in range(11):
            backward(model, step)
            if step in (2, 6, 7):
                model[0].bias.grad = None
            grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            optimizer.step()
            for p, grad in zip(model.parameters(), grads, strict=True):
                assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
        ends.append(snapshot(model, optimizer))
        if check:
            assert 0.0 < optimizer._contraction.last < 1.5
    assert_equal(*ends)


@pytest.mark.parametrize("absent", [{1}, {3}, {4}, {3, 4}, {0}, {0, 1, 2}, {0, 1, 2, 3}], ids=str)
def test_parameters_that_sit_steps_out(absent: set[int]) -> None:
    """The ratio is that of the parameters with both residuals; where these are not the same twice, there is none."""
    hs = spread(1.0), spread(-0.5)
    params = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in hs]
    optimizer = HamiltonJacobi(params, **{**STILL, "inner_steps": 5, "gamma": 0.5})
    for step in range(5):
        for p, h in zip(params, hs, strict=True):
            p.grad = h * p.detach()
        if step in absent:
            params[0].grad = None
        optimizer.step()
    only = abs(factor(None, 5, -0.25))
    ratio = optimizer.stats()["contraction"]
    if absent in ({3}, {4}) or absent == {0, 1, 2}:  # a residual in one of the last two steps
        assert math.isnan(ratio)
    elif absent in ({3, 4}, {0, 1, 2, 3}):
        assert ratio == pytest.approx(only, rel=1e-9)
    else:
        assert abs(factor(None, 5, 0.5)) < ratio < only


def test_nothing_finite_and_nothing_at_all_are_no_ratio() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HamiltonJacobi([p], **{**STILL, "inner_steps": 3, "gamma": 0.5})
    for value in (0.0, math.nan, math.inf):
        for _ in range(3):
            p.grad = torch.full_like(p, value)
            optimizer.step()
        assert math.isnan(optimizer.stats()["contraction"])
        assert "no period has been measured yet" in " ".join(optimizer.describe().split())
        p.data.fill_(1.0)
        optimizer.reset_anchors_()
    for _ in range(3):
        p.grad = p.detach().clone()
        optimizer.step()
    assert optimizer.stats()["contraction"] == pytest.approx(abs(factor(None, 3, 0.5)), rel=1e-9)
    for value in (1.0, 2.0, math.inf):
        p.grad = torch.full_like(p, value)
        optimizer.step()
    assert math.isnan(optimizer.stats()["contraction"]), "neither what was measured nor that of a period before"


@pytest.mark.parametrize("gamma", [0.1, 9.0])
def test_launches_that_join_in_mid_period_are_not_compared(gamma: float) -> None:
    """A parameter that came late has a launch of its own, until the launches are made anew."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = HamiltonJacobi(params, **{**STILL, "gamma": gamma, "inner_steps": 5})
    ratios = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(15):
            for i, p in enumerate(params):
                p.grad = p.detach().clone() if i == 0 or step > 1 else None
            if step == 9:
                optimizer.eval()
                optimizer.train()
            optimizer.step()
            if optimizer.at_outer_boundary:
                ratios.append(optimizer.stats()["contraction"])
    assert ratios[-1] == pytest.approx(abs(1.0 - 0.25 * (1.0 + gamma)), rel=1e-3)


@pytest.mark.parametrize("when", ["consolidate_", "reset_anchors_", "reload"])
def test_a_period_that_is_broken_off_is_not_mixed_with_the_next(when: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HamiltonJacobi([p], **{**STILL, "inner_steps": 4, "gamma": 0.5})
    for step in range(3 + 4):
        if step == 3:
            if when == "reload":
                saved = optimizer.state_dict()
                saved["param_groups"][0]["position"] = 0
                for own in saved["state"].values():
                    own["period_steps"] = 0
                optimizer.load_state_dict(saved)
            else:
                getattr(optimizer, when)()
        p.grad = p.detach().clone()
        optimizer.step()
    assert optimizer.stats()["contraction"] == pytest.approx(abs(factor(None, 4, 0.5)), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": "prox"}, 'check_contraction: expected False with inner="prox", which has no p'),
        ({"capturable": True}, "check_contraction: expected False with capturable=True, as it reads the device"),
        ({"inner_steps": 2}, "check_contraction: expected False with fewer than 3 inner_steps"),
        ({"inner_steps": 1}, "check_contraction: expected False with fewer than 3 inner_steps"),
        ({"check_contraction": 1}, "check_contraction: expected one of False, True, got 1"),
    ],
    ids=str,
)
def test_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        HamiltonJacobi([nn.Parameter(torch.ones(2))], **{"check_contraction": True, **options})


def test_a_group_that_differs_is_refused() -> None:
    optimizer = HamiltonJacobi([nn.Parameter(torch.ones(2))], check_contraction=True)
    with pytest.raises(ValueError, match="check_contraction: expected the same check_contraction in all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "check_contraction": False})


def test_a_rehearsal_says_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = HamiltonJacobi([p], **{**STILL, "gamma": 100.0, "averaging": "last"})
    optimizer.rehearse()
    assert math.isnan(optimizer.stats()["contraction"])
