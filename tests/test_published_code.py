"""EntropySGD.from_published_code: its trajectory beside that of the published loop, and its options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from optim_runs import assert_equal, backward, counters, small_model, snapshot, walk
from published_code import ALIASED, FIRST_GROUP, SEEDED, STUCK, Array, weights_of
from torch import nn

from deeprelax_cuda import backends
from deeprelax_cuda.optim import EntropySGD

CALLS = 5
#: Options of the published code under which every term has its part in the trajectory.
ALL: dict[str, Any] = {
    "lr": 0.3,
    "momentum": 0.9,
    "weight_decay": 0.02,
    "nesterov": True,
    "L": 4,
    "eps": 0.05,
    "g0": 0.5,
    "g1": 0.3,
    "seed": 2**63 + 5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "heavy ball": {**ALL, "nesterov": False},
    "no momentum": {**ALL, "momentum": 0.0},
    "damp without momentum": {**ALL, "momentum": 0.0, "damp": 0.4},
    "no decay": {**ALL, "weight_decay": 0.0},
    "no scoping": {**ALL, "g1": 0.0},
    "no noise": {**ALL, "eps": 0.0},
    "no coupling": {**ALL, "g0": 0.0},
    "L = 1": {**ALL, "L": 1},
    "L = 7": {**ALL, "L": 7, "nesterov": False},
    "other constants": {**ALL, "inner_lr": 0.05, "averaging": 0.4},
    "published defaults": {"L": 3, "seed": 0},
}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [{"params": weights[:2]}, {"params": weights[2:]}]


def witness(calls: int = CALLS, first_group: int = 2, **config: Any) -> list[list[Array]]:
    """The weights of `small_model` in the published loop; its groups are `two_groups`."""
    model = small_model(torch.float64)
    params = list(model.parameters())

    def gradient(weights: list[Array], batch: int) -> list[Array]:
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(torch.from_numpy(w))
        backward(model, batch)
        return [p.grad.numpy().copy() for p in params]  # type: ignore[union-attr]

    start = [p.detach().numpy().copy() for p in params]
    return list(weights_of(start, gradient, calls, first_group=first_group, **config))


def ours(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> Iterator[list[Array]]:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        yield [p.detach().numpy().astype(np.float64) for p in model.parameters()]


def published(dtype: torch.dtype = torch.float64, **config: Any) -> tuple[nn.Module, EntropySGD]:
    model = small_model(dtype)
    return model, EntropySGD.from_published_code(two_groups(model), **config)


def distance(some: list[list[Array]], others: list[list[Array]]) -> float:
    """The largest difference of two trajectories."""
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a, b, strict=True)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


# The trajectory.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("backend", backends.available("cpu"))
def test_every_step_is_the_published_loop(config: dict[str, Any], dtype: torch.dtype, tolerance: float, backend: str) -> None:
    model, optimizer = published(dtype, **config, backend=backend)
    want = witness(**config)
    got = list(ours(optimizer, model, CALLS * config["L"]))
    assert distance(got, want) < tolerance
    assert distance(got[-1:], want[:1]) > 1e-3, "a run in which something happens"


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_one_call_of_the_published_step_is_one_period(lr: float) -> None:
    """Every L-th of our steps stands at the weights that a published call leaves, the others at live weights inside it."""
    model, optimizer = published(**{**ALL, "lr": lr})
    boundaries = []
    for step, (got, want) in enumerate(zip(ours(optimizer, model, 12), witness(3, **{**ALL, "lr": lr}), strict=True), 1):
        if optimizer.at_outer_boundary:
            boundaries.append(step)
            anchors = [optimizer.state[p]["anchor"].numpy() for p in model.parameters()]
            assert distance([anchors], [want]) < 1e-14
        assert distance([got], [want]) < 1e-14
    assert boundaries == [4, 8, 12]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_inner_steps_the_published_code_is_sgd(momentum: float) -> None:
    """What the refusal of L = 0 says."""
    config: dict[str, Any] = {"L": 0, "lr": 0.2, "momentum": momentum, "weight_decay": 0.02, "nesterov": momentum > 0}
    model = small_model(torch.float64)
    sgd = torch.optim.SGD(model.parameters(), **{name: value for name, value in config.items() if name != "L"})
    assert distance(list(ours(sgd, model, 8)), witness(8, **config)) < 1e-14


# What the comparison sees: every change of an option that the mapping sets.

MUTANTS: dict[str, dict[str, Any]] = {
    "temperature is eps": {"temperature": ALL["eps"]},
    "temperature of the printed algorithm": {"temperature": ALL["eps"] ** 2 / 2},
    "gamma is g0": {"gamma": ALL["g0"]},
    "no scoping": {"scoping": 0.0},
    "scoping inverted": {"scoping": 1.0 / ALL["g1"]},
    "scoping 1 % too strong": {"scoping": ALL["g1"] * 1.01},
    "averaging reversed": {"averaging": 0.25},
    "plain mean": {"averaging": "linear"},
    "coupling in the momentum": {"coupling_in_momentum": True},
    "momentum kept": {"reset_inner_momentum": False},
    "no outer decay": {"outer_weight_decay": 0.0},
    "no inner decay": {"weight_decay": 0.0},
    "no outer momentum": {"momentum": 0.0},
    "no inner momentum": {"inner_momentum": 0.0},
    "dampening": {"dampening": 0.1},
    "the other nesterov": {"nesterov": None},
    "one step more": {"inner_steps": 5},
    "inner_lr is lr": {"inner_lr": ALL["lr"]},
    "lr is inner_lr": {"lr": 0.1},
    "the next seed": {"seed": ALL["seed"] + 1},
}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
@pytest.mark.filterwarnings("ignore:gamma=.* diverge")
def test_every_mutant_of_the_mapping_is_caught(change: dict[str, Any], nesterov: bool) -> None:
    config = {**ALL, "nesterov": nesterov}
    want = witness(**config)
    _, optimizer = published(**config)
    options = {name: optimizer.param_groups[0][name] for name in optimizer.defaults}

    def run(**options: Any) -> float:
        model = small_model(torch.float64)
        return distance(list(ours(EntropySGD(two_groups(model), **options), model, CALLS * ALL["L"])), want)

    assert run(**options) < 1e-14
    change = {name: not nesterov if name == "nesterov" else value for name, value in change.items()}
    assert run(**{**options, **change}) > 1e-4


# The defects of the published code: where each shows, and where it cannot.

SHOWS: list[tuple[str, dict[str, Any]]] = [
    (STUCK, ALL),
    (SEEDED, ALL),
    (SEEDED, {**ALL, "nesterov": False}),
    (ALIASED, {**ALL, "nesterov": False}),
    (ALIASED, {**ALL, "nesterov": False, "eps": 0.0}),
    (ALIASED, {**ALL, "nesterov": False, "g0": 0.0}),
    (FIRST_GROUP, ALL),
]
HIDES: list[tuple[str, dict[str, Any]]] = [
    (STUCK, {**ALL, "g1": 0.0}),
    (STUCK, {**ALL, "L": 1}),
    (SEEDED, {**ALL, "momentum": 0.0}),
    (ALIASED, ALL),
    (ALIASED, {**ALL, "nesterov": False, "momentum": 0.0}),
    (ALIASED, {**ALL, "nesterov": False, "eps": 0.0, "g0": 0.0}),
    (FIRST_GROUP, {**ALL, "first_group": 4}),
]


@pytest.mark.parametrize(("defect", "config"), SHOWS)
def test_we_do_not_have_the_defect(defect: str, config: dict[str, Any]) -> None:
    model, optimizer = published(**config)
    got = list(ours(optimizer, model, CALLS * config["L"]))
    assert distance(got, witness(**config)) < 1e-14
    assert distance(got, witness(**config, defects={defect})) > 1e-3


@pytest.mark.parametrize(("defect", "config"), HIDES)
def test_the_defect_cannot_show(defect: str, config: dict[str, Any]) -> None:
    """Each switch of the witness is its defect and nothing else."""
    assert distance(witness(**config, defects={defect}), witness(**config)) == 0.0


def test_the_stuck_counter_shows_from_the_second_period_on() -> None:
    right, stuck = witness(**ALL), witness(**ALL, defects={STUCK})
    assert distance(right[: ALL["L"]], stuck[: ALL["L"]]) == 0.0
    assert distance(right[ALL["L"] + 1 :][:1], stuck[ALL["L"] + 1 :][:1]) > 0.0


# The options.


def test_the_options_are_mapped() -> None:
    _, optimizer = published(**ALL)
    mapped = {
        "lr": 0.3,
        "inner_lr": 0.1,
        "inner_steps": 4,
        "gamma": 2.0,
        "scoping": 0.3,
        "temperature": 0.05**2,
        "averaging": 0.75,
        "momentum": 0.9,
        "inner_momentum": 0.9,
        "nesterov": True,
        "dampening": 0.0,
        "weight_decay": 0.02,
        "outer_weight_decay": 0.02,
        "coupling_in_momentum": False,
        "reset_inner_momentum": True,
        "seed": 2**63 + 5,
    }
    for group in optimizer.param_groups:
        assert {name: group[name] for name in mapped} == mapped
    _, uncoupled = published(L=1, g0=0.0)
    assert uncoupled.param_groups[0]["gamma"] == math.inf


def test_the_defaults_are_the_published_ones() -> None:
    _, spelt_out = published(
        L=2, lr=0.01, momentum=0, damp=0, weight_decay=0, nesterov=True, eps=1e-4, g0=1e-2, g1=0, inner_lr=0.1, averaging=0.75
    )
    assert counters(published(L=2)[1]) == counters(spelt_out)


def test_other_options_go_to_the_constructor() -> None:
    options = {"seed": 5, "backend": "eager", "gamma_min": 0.5, "maximize": True, "rounding": "stochastic", "fused": False}
    _, optimizer = published(L=2, **options)
    assert {name: optimizer.param_groups[0][name] for name in options} == options
    with pytest.raises(TypeError, match="betas"):
        published(L=2, betas=(0.9, 0.99))


def test_it_is_the_optimizer_that_its_options_make() -> None:
    """Its checkpoint goes on, bit for bit, in one that the constructor made from the same options."""
    model, optimizer = published(torch.float32, **ALL)
    twin = small_model()
    direct = EntropySGD(
        two_groups(twin),
        lr=0.3,
        inner_lr=0.1,
        inner_steps=4,
        gamma=2.0,
        scoping=0.3,
        temperature=0.05 * 0.05,
        averaging=0.75,
        momentum=0.9,
        inner_momentum=0.9,
        weight_decay=0.02,
        outer_weight_decay=0.02,
        coupling_in_momentum=False,
        reset_inner_momentum=True,
        seed=2**63 + 5,
    )
    assert type(optimizer) is EntropySGD
    assert optimizer.defaults == direct.defaults
    assert counters(optimizer) == counters(direct)
    walk(model, optimizer, range(6))
    twin.load_state_dict(model.state_dict())
    direct.load_state_dict(optimizer.state_dict())
    for steps in (range(6, 7), range(7, 15)):
        walk(model, optimizer, steps)
        walk(twin, direct, steps)
        assert_equal(snapshot(twin, direct), snapshot(model, optimizer))


def test_lr_may_be_a_tensor() -> None:
    model, optimizer = published(**{**ALL, "lr": torch.tensor(0.3, dtype=torch.float64)})
    assert distance(list(ours(optimizer, model, CALLS * ALL["L"])), witness(**ALL)) < 1e-14


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"L": 0}, ValueError, r"^L: .*torch\.optim\.SGD"),
    ({"L": -1}, ValueError, "^L: expected an int of at least 1, got -1"),
    ({"L": 2.5}, TypeError, "^L: expected an int, got 2.5"),
    (
        {"damp": 0.1, "momentum": 0.9},
        ValueError,
        "^damp: expected 0 where momentum is not: the outer momentum has no dampening",
    ),
    ({"damp": 1.5}, ValueError, r"^damp: expected a number in \[0, 1\], got 1.5"),
    ({"eps": -1e-4}, ValueError, r"^eps: expected a number in \[0, inf\), got -0.0001"),
    ({"eps": math.nan}, ValueError, "^eps: "),
    ({"g0": -1.0}, ValueError, "^g0: "),
    ({"g0": math.inf}, ValueError, "^g0: "),
    ({"g1": -0.5}, ValueError, "^g1: "),
    ({"g1": None}, ValueError, "^g1: "),
    ({"lr": -1.0}, ValueError, "^lr: "),
    ({"momentum": 1.0}, ValueError, "^momentum: "),
    ({"weight_decay": -1.0}, ValueError, "^weight_decay: "),
    ({"inner_lr": -1.0}, ValueError, "^inner_lr: "),
    ({"averaging": 1.0}, ValueError, "^averaging: "),
    ({"inner_steps": 5}, ValueError, "^inner_steps: .*sets it from L"),
    ({"inner_momentum": 0.5}, ValueError, "^inner_momentum: .*sets it from momentum"),
    ({"dampening": 0.0}, ValueError, "^dampening: .*sets it from damp"),
    ({"outer_weight_decay": 0.0}, ValueError, "^outer_weight_decay: .*sets it from weight_decay"),
    ({"temperature": 0.0}, ValueError, "^temperature: .*sets it from eps"),
    ({"gamma": 1.0}, ValueError, "^gamma: .*sets it from g0"),
    ({"scoping": 0.0}, ValueError, "^scoping: .*sets it from g1"),
    ({"gamma_total": None}, ValueError, "^gamma_total: .*sets it from g0 and g1"),
    ({"coupling_in_momentum": False}, ValueError, "^coupling_in_momentum: .*sets it from the published code"),
    ({"reset_inner_momentum": True}, ValueError, "^reset_inner_momentum: .*sets it from the published code"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[",".join(options) for options, _, _ in REFUSED])
def test_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        published(**{"L": 2, **options})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"weight_decay": 0.0}, "^outer_weight_decay: expected the same as weight_decay.* got 0.02 and 0.0 in group 1"),
        ({"momentum": 0.0}, "^momentum: expected the same as inner_momentum.* got 0.0 and 0.9 in group 1"),
        ({"g0": 1.0}, "^g0: not an option of a group, in group 1"),
        ({"damp": 0.5}, "^damp: not an option of a group, in group 1"),
    ],
    ids=lambda own: ",".join(own) if isinstance(own, dict) else "",
)
def test_a_group_that_would_leave_the_published_loop_is_refused(own: dict[str, Any], message: str) -> None:
    first, second = two_groups(small_model())
    with pytest.raises(ValueError, match=message):
        EntropySGD.from_published_code([first, {**second, **own}], **ALL)


def test_groups_may_differ_in_pairs() -> None:
    first, second = two_groups(small_model())
    own = {"weight_decay": 0.0, "outer_weight_decay": 0.0, "gamma": 4.0}
    optimizer = EntropySGD.from_published_code([first, {**second, **own}], **ALL)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
