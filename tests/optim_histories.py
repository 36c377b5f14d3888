"""Histories of an optimizer, drawn by hypothesis, and how they are played: parameters, options, and what is done to both."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from contract_cases import same
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from lone_replicas import LoneElasticSGD, LoneParle
from torch import Tensor, nn

from deeprelax_cuda.optim import SGLD, EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.optim.base import RelaxationOptimizer

Action = tuple[Any, ...]
Facts = dict[str, Any]
ALL = 2**16 - 1


# What is drawn.


@dataclass(frozen=True)
class ParamSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: int


@dataclass(frozen=True)
class Method:
    """An optimizer, and the options that are drawn for a group of it and for all groups.

    ``elsewhere`` are options of one that gets another's state, and ``refused`` such that a step with them is. ``evaluates``:
    whether the weights that `eval` shows are others than those of training. ``capturable``: whether a graph may capture its
    steps.
    """

    name: str
    make: Callable[..., RelaxationOptimizer]
    numbers: st.SearchStrategy[dict[str, Any]]
    shared: st.SearchStrategy[dict[str, Any]]
    elsewhere: dict[str, Any]
    refused: dict[str, Any]
    evaluates: bool = True
    capturable: bool = True


@dataclass(frozen=True)
class History:
    """Parameters, dealt out to groups in order, and what is done with them; ``late`` is the group that an action may add."""

    method: Method = field(repr=False)
    groups: tuple[tuple[ParamSpec, ...], ...]
    numbers: tuple[dict[str, Any], ...]
    shared: dict[str, Any]
    actions: tuple[Action, ...]
    late: tuple[ParamSpec, ...] = ()


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (3,), (7,), (17,), (0, 2), (3, 5), (4, 1), (2, 3, 2, 2), (1, 2, 3, 1), (33, 5)]


@st.composite
def param_specs(draw: Any, dtypes: Sequence[torch.dtype], most: int) -> tuple[ParamSpec, ...]:
    spec = st.builds(ParamSpec, st.sampled_from(SHAPES), st.sampled_from(dtypes), st.integers(0, 3))
    return tuple(draw(st.lists(spec, min_size=1, max_size=most)))


#: Numbers of one group that every method has.
NUMBERS: dict[str, Any] = {
    "lr": st.sampled_from([0.1, 0.5, 1.0]),
    "weight_decay": st.sampled_from([0.0, 0.01]),
    "maximize": st.booleans(),
}
#: And those of periods and outer steps. The powers of 1 + scoping are exact in any order of their products.
LOOP: dict[str, Any] = {
    **NUMBERS,
    "gamma": st.sampled_from([0.5, 2.0, 0.03, 9.0]),
    "scoping": st.sampled_from([0.0, 0.25, 0.5]),
    "gamma_min": st.sampled_from([0.25, 0.5]),
    "momentum": st.sampled_from([0.9, 0.5, 0.0]),
    "nesterov": st.booleans(),
    "outer_weight_decay": st.sampled_from([0.0, 0.01]),
}
INNER: dict[str, Any] = {"inner_lr": st.sampled_from([0.1, 0.03]), "inner_momentum": st.sampled_from([0.9, 0.5, 0.0])}
TEMPERATURE = st.sampled_from([0.0, 1e-3, 0.1])
AVERAGING = [0.75, 0.0, 0.3, "linear", "last"]
SEED = st.sampled_from([0, 11, 2**63 + 5, 2**64 - 1])
ELSEWHERE = {"lr": 0.9, "gamma": 77.0, "seed": 99}


def drawn(options: dict[str, Any], **others: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({**options, **others})


ENTROPY_SGD = Method(
    "EntropySGD",
    EntropySGD,
    drawn(
        {**LOOP, **INNER},
        gamma=st.sampled_from([0.5, 2.0, 1e4, math.inf]),
        gamma_total=st.sampled_from([None, None, 3.0]),
        temperature=TEMPERATURE,
        averaging=st.sampled_from(AVERAGING),
        dampening=st.sampled_from([0.0, 0.25]),
    ),
    drawn(
        {"inner_steps": st.integers(1, 4), "seed": SEED},
        coupling_in_momentum=st.booleans(),
        reset_inner_momentum=st.booleans(),
    ),
    {**ELSEWHERE, "inner_lr": 0.9, "temperature": 0.9},
    {"inner_lr": math.inf},
)
FIXED_POINT = Method(
    "HamiltonJacobi fixed point",
    HamiltonJacobi,
    drawn(LOOP, averaging=st.sampled_from([None, *AVERAGING])),
    drawn({"inner_steps": st.integers(1, 4), "seed": SEED}, inner=st.just("fixed_point")),
    {**ELSEWHERE, "inner": "prox"},
    {"averaging": "mean"},
)
PROX = Method(
    "HamiltonJacobi prox",
    HamiltonJacobi,
    drawn({**LOOP, **INNER}, gamma=st.sampled_from([0.5, 2.0, 1e4]), averaging=st.sampled_from([None, "last"])),
    drawn({"inner_steps": st.integers(1, 4), "seed": SEED}, inner=st.just("prox")),
    {**ELSEWHERE, "inner_lr": 0.9},
    {"inner_lr": math.inf},
)
HEAT = Method(
    "HeatSGD",
    HeatSGD,
    drawn(LOOP, temperature=TEMPERATURE),
    drawn({"inner_steps": st.integers(2, 4), "seed": SEED}),
    {**ELSEWHERE, "temperature": 0.9},
    {"temperature": -1.0},
)
SAMPLES = Method(
    "SGLD",
    SGLD,
    drawn(NUMBERS, gamma=st.sampled_from([0.5, 2.0, math.inf]), temperature=TEMPERATURE),
    drawn({"seed": SEED}),
    {**ELSEWHERE, "temperature": 0.9},
    {"temperature": -1.0},
    evaluates=False,
)
#: So wide that a step stays far from where the coupling makes it diverge, and float16 can hold what comes out.
RHO: dict[str, Any] = {
    "rho": st.sampled_from([2.0, 9.0, math.inf]),
    "rho_scoping": st.sampled_from([0.0, 0.25, 0.5]),
    "rho_min": st.sampled_from([1.0, 1.5]),
}
PARLE = Method(
    "Parle",
    LoneParle,
    drawn(
        {**LOOP, **INNER, **RHO},
        gamma_total=st.sampled_from([None, None, 3.0]),
        temperature=TEMPERATURE,
        averaging=st.sampled_from(AVERAGING),
        dampening=st.sampled_from([0.0, 0.25]),
    ),
    drawn(
        {"inner_steps": st.integers(1, 4), "seed": SEED},
        coupling_in_momentum=st.booleans(),
        reset_inner_momentum=st.booleans(),
        consensus=st.sampled_from(["averages", "anchors"]),
    ),
    {**ELSEWHERE, "inner_lr": 0.9, "temperature": 0.9, "rho": 7.0},
    {"inner_lr": math.inf},
    capturable=False,
)
ELASTIC_SGD = Method(
    "ElasticSGD",
    LoneElasticSGD,
    drawn(
        {**NUMBERS, **RHO},
        temperature=TEMPERATURE,
        momentum=st.sampled_from([0.9, 0.5, 0.0]),
        nesterov=st.booleans(),
        dampening=st.sampled_from([0.0, 0.25]),
    ),
    drawn({"seed": SEED}, coupling_in_momentum=st.booleans()),
    {"lr": 0.9, "seed": 99, "temperature": 0.9, "rho": 7.0},
    {"temperature": -1.0},
    capturable=False,
)
METHODS = [ENTROPY_SGD, FIXED_POINT, HEAT, PROX, SAMPLES, PARLE, ELASTIC_SGD]
over_methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
over_capturable_methods = pytest.mark.parametrize(
    "method", [method for method in METHODS if method.capturable], ids=lambda method: method.name
)
STEP = st.tuples(st.just("step"), st.one_of(st.just(ALL), st.integers(0, 255)), st.integers(0, 3))
BETWEEN = st.one_of(
    st.tuples(st.just("eval")),
    st.tuples(st.just("train")),
    st.tuples(st.just("consolidate")),
    st.tuples(st.just("reset")),
    st.tuples(st.just("reload")),
    st.tuples(st.just("lr"), st.integers(0, 2), st.sampled_from([0.05, 0.25, 0.75])),
    st.tuples(st.just("add")),
    st.tuples(st.just("zero_grad"), st.booleans()),
    st.tuples(st.just("replace"), st.integers(0, 7)),
    st.tuples(st.just("lay out"), st.integers(0, 7), st.integers(0, 3)),
    st.tuples(st.just("move state"), st.integers(0, 7)),
)


@st.composite
def histories(draw: Any, method: Method | None = None, most_groups: int = 3) -> History:
    """Of ``method``, or of one that is drawn."""
    method = method or draw(st.sampled_from(METHODS))
    shared = dict(draw(method.shared))
    storage = draw(st.sampled_from(["nearest", "stochastic", "masters"]))
    shared |= {"rounding": "stochastic"} if storage == "stochastic" else {"master_weights": storage == "masters"}
    dtypes = DTYPES[:3] if storage == "stochastic" else DTYPES  # there is no stochastic rounding to float16
    groups = draw(st.lists(param_specs(dtypes, 4), min_size=1, max_size=most_groups))
    between = st.tuples(st.sampled_from([(), (), (("eval",),)]), st.lists(BETWEEN, max_size=2))  # often in eval mode
    acted = draw(st.lists(st.tuples(STEP, between), min_size=3, max_size=9))
    return History(
        method=method,
        groups=tuple(groups),
        numbers=tuple(draw(method.numbers) for _ in range(len(groups) + 1)),
        shared=shared,
        actions=tuple(action for step, (mode, others) in acted for action in (step, *mode, *others)),
        late=draw(param_specs(dtypes, 2)),
    )


def every(examples: int) -> Callable[[Any], Any]:
    """The settings of all tests here: the same examples on every machine, however slow it is."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


# How it is played.


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(t: Tensor, layout: int) -> Tensor:
    """A copy of ``t`` that lies in memory in one of four orders, all dense."""
    if layout == 3 and t.ndim == 4:
        return t.clone(memory_format=torch.channels_last)
    dims = list(range(t.ndim))
    order = {0: dims, 1: dims[::-1], 2: dims[1:] + dims[:1], 3: dims[-1:] + dims[:-1]}[layout]
    back = [order.index(dim) for dim in dims]
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


class Player:
    """Plays a history with the optimizer; what subclasses and fields change must not matter."""

    def __init__(self, history: History, **options: Any) -> None:
        self.history = history
        self.params: list[nn.Parameter] = []
        self.options = {**history.shared, **options}
        self.optimizer = self.construct(self.initial_groups())
        self.acted = 0

    def new_params(self, specs: tuple[ParamSpec, ...]) -> list[nn.Parameter]:
        start = len(self.params)
        new = [
            nn.Parameter(laid_out(values(spec.shape, spec.dtype, 1000 + i), spec.layout)) for i, spec in enumerate(specs, start)
        ]
        self.params += new
        return new

    def initial_groups(self) -> list[dict[str, Any]]:
        pairs = zip(self.history.groups, self.history.numbers, strict=False)
        return [{"params": self.new_params(specs), **numbers} for specs, numbers in pairs]

    def construct(self, groups: list[dict[str, Any]]) -> Any:
        return self.history.method.make(groups, **{**self.history.method.elsewhere, **self.options})

    def act(self, name: str, *details: Any) -> None:
        self.acted += 1
        getattr(self, name.replace(" ", "_"))(*details)

    def gradients(self, mask: int) -> list[Tensor | None]:
        """The gradients of this action; which parameters have one is in the bits of ``mask``."""
        return [
            values(tuple(p.shape), p.dtype, 7919 * self.acted + i) if mask >> i & 1 else None for i, p in enumerate(self.params)
        ]

    def step(self, mask: int, layout: int) -> None:
        grads = self.gradients(mask)
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None if grad is None else laid_out(grad, layout)
        self.take_step()

    def take_step(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="step.. in eval mode")
            self.optimizer.step()

    def eval(self) -> None:
        self.optimizer.eval()

    def train(self) -> None:
        self.optimizer.train()

    def consolidate(self) -> None:
        self.optimizer.consolidate_()

    def reset(self) -> None:
        self.optimizer.reset_anchors_()

    def reload(self) -> None:
        """Go on with another optimizer of the same parameters, which has other defaults and gets the state."""
        state = pickle.loads(pickle.dumps(self.optimizer.state_dict()))
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer = self.history.method.make(groups, **self.history.method.elsewhere)
        self.optimizer.load_state_dict(state)

    def lr(self, index: int, value: float) -> None:
        groups = self.optimizer.param_groups
        groups[index % len(groups)]["lr"] = value

    def add(self) -> None:
        if len(self.optimizer.param_groups) == len(self.history.groups):
            self.optimizer.add_param_group({"params": self.new_params(self.history.late), **self.history.numbers[-1]})

    def zero_grad(self, set_to_none: bool) -> None:
        """Take a step besides with what gradients are left: zeros are gradients, None are not."""
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.take_step()

    def replace(self, index: int) -> None:
        p = self.params[index % len(self.params)]
        p.data = p.data.clone()

    def lay_out(self, index: int, layout: int) -> None:
        p = self.params[index % len(self.params)]
        p.data = laid_out(p.data, layout)

    def move_state(self, index: int) -> None:
        state = self.optimizer.state.get(self.params[index % len(self.params)], {})
        state.update({role: value.clone() for role, value in state.items() if isinstance(value, Tensor)})

    def facts(self) -> Facts:
        """Copies of all that a step may change, by parameter: how they are dealt out to groups is not among it."""
        facts: Facts = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                facts |= self.facts_of(p, self.optimizer.state.get(p, {}), group)
        return facts

    def facts_of(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Facts:
        number = next(i for i, q in enumerate(self.params) if q is p)
        values = {"param": p, **state, **{name: group[name] for name in GROUP_FACTS if name in group}}
        if "period_steps" in state:
            values["period_steps"] = int(state["period_steps"])  # in a tensor or in a number
        return {f"{name} of {number}": v.detach().clone() if isinstance(v, Tensor) else v for name, v in values.items()}


class Clocked(Player):
    """Has its counters, gamma and lr on the device; SGLD then keeps an anchor where nothing is coupled to it, too."""

    def __init__(self, history: History, **options: Any) -> None:
        super().__init__(history, capturable=True, **options)

    def facts_of(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Facts:
        idle = self.history.method is SAMPLES and group["gamma"] == math.inf
        return super().facts_of(p, {role: t for role, t in state.items() if role != "anchor"} if idle else state, group)


GROUP_FACTS = ("step", "position", "outer_steps", "gamma", "rho", "lr", "train_mode", "seed")


def assert_same(got: Facts, want: Facts) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert same(got[name], value) if isinstance(value, Tensor) else got[name] == value, name


def play_alike(*players: Player) -> None:
    """Play the same history with all players, and compare them with the first after each action."""
    first, *others = players
    for action in first.history.actions:
        for player in players:
            player.act(*action)
        want = first.facts()
        for player in others:
            assert_same(player.facts(), want)
