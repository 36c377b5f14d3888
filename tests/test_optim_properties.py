"""Properties of the optimizer, whatever its parameters, its options, and what a user does to both between the steps.

A history is drawn: parameters, options and actions. It is played twice in ways that must not matter, or once more by `ByHand`,
the method written down for one parameter at a time; everything must come out bit for bit the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest
import torch
from contract_cases import BACKENDS, backend, same, to_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deeprelax_cuda import backends
from deeprelax_cuda.optim import EntropySGD

Action = tuple[Any, ...]
Facts = dict[str, Any]
ALL = 2**16 - 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads are a matter of the tests that ask for them; for small tensors they only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What is drawn.


@dataclass(frozen=True)
class ParamSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: int


@dataclass(frozen=True)
class History:
    """Parameters, dealt out to groups in order, and what is done with them; ``late`` is the group that an action may add."""

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


#: Numbers of one group. The powers of 1 + scoping are exact in any order of their products.
NUMBERS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.1, 0.5, 1.0]),
        "inner_lr": st.sampled_from([0.1, 0.03]),
        "gamma": st.sampled_from([0.5, 2.0, 1e4, math.inf]),
        "scoping": st.sampled_from([0.0, 0.25, 0.5]),
        "gamma_min": st.sampled_from([0.25, 0.5]),
        "gamma_total": st.sampled_from([None, None, 3.0]),
        "temperature": st.sampled_from([0.0, 1e-3, 0.1]),
        "averaging": st.sampled_from([0.75, 0.0, 0.3, "linear", "last"]),
        "momentum": st.sampled_from([0.9, 0.5, 0.0]),
        "inner_momentum": st.sampled_from([0.9, 0.5, 0.0]),
        "nesterov": st.booleans(),
        "dampening": st.sampled_from([0.0, 0.25]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "outer_weight_decay": st.sampled_from([0.0, 0.01]),
        "maximize": st.booleans(),
    }
)
SHARED = st.fixed_dictionaries(
    {
        "inner_steps": st.integers(1, 4),
        "seed": st.sampled_from([0, 11, 2**63 + 5, 2**64 - 1]),
        "coupling_in_momentum": st.booleans(),
        "reset_inner_momentum": st.booleans(),
    }
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
def histories(draw: Any, most_groups: int = 3) -> History:
    shared = dict(draw(SHARED))
    storage = draw(st.sampled_from(["nearest", "stochastic", "masters"]))
    shared |= {"rounding": "stochastic"} if storage == "stochastic" else {"master_weights": storage == "masters"}
    dtypes = DTYPES[:3] if storage == "stochastic" else DTYPES  # there is no stochastic rounding to float16
    groups = draw(st.lists(param_specs(dtypes, 4), min_size=1, max_size=most_groups))
    between = st.tuples(st.sampled_from([(), (), (("eval",),)]), st.lists(BETWEEN, max_size=2))  # often in eval mode
    acted = draw(st.lists(st.tuples(STEP, between), min_size=3, max_size=9))
    return History(
        groups=tuple(groups),
        numbers=tuple(draw(NUMBERS) for _ in range(len(groups) + 1)),
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

    def construct(self, groups: list[dict[str, Any]]) -> EntropySGD:
        return EntropySGD(groups, **self.options)

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
        self.optimizer = EntropySGD(groups, lr=0.9, inner_lr=0.9, gamma=77.0, temperature=0.9, seed=99)
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
        values = {"param": p, **state, **{name: group[name] for name in GROUP_FACTS}}
        return {f"{name} of {number}": v.detach().clone() if isinstance(v, Tensor) else v for name, v in values.items()}


GROUP_FACTS = ("step", "position", "outer_steps", "gamma", "lr", "train_mode", "seed")


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


# The same bits on every backend.


@pytest.mark.skipif(len(backends.available("cpu")) < 2, reason="there is one backend only")
@every(120)
@given(histories())
def test_backends_agree(history: History) -> None:
    play_alike(*(Player(history, backend=name) for name in backends.available("cpu")))


class OnInstructionSet(Player):
    def __init__(self, history: History, label: str) -> None:
        self.label = label
        super().__init__(history, backend=label.partition("-")[0])

    def act(self, name: str, *details: Any) -> None:
        with backend(self.label):
            super().act(name, *details)


@pytest.mark.skipif(len(BACKENDS) < 3, reason="there is one instruction set only")
@every(60)
@given(histories())
def test_instruction_sets_agree(history: History) -> None:
    play_alike(*(OnInstructionSet(history, label) for label in BACKENDS if label != "eager"))


# The method, one parameter at a time.


class ByHand(Player):
    """The method as its definition says it, without an optimizer: the arithmetic of a step is the oracle's."""

    ROLES: ClassVar = {"anchor": "x", "average": "m", "momentum": "v", "outer_momentum": "w", "master": "master"}

    def construct(self, groups: list[dict[str, Any]]) -> None:
        self.taken = self.position = self.outer_steps = 0
        self.training = True
        self.states: list[dict[str, Any]] = []
        self.grads: list[Tensor | None] = []
        self.groups: list[dict[str, Any]] = []
        for group in groups:
            self.join(group)

    def join(self, group: dict[str, Any]) -> None:
        first = len(self.states)
        self.states += [{} for _ in group["params"]]
        self.grads += [None for _ in group["params"]]
        self.groups.append({**group, "members": range(first, len(self.states))})

    def stepped(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p.data, state) for p, state in zip(self.params, self.states, strict=True) if state)

    def gamma(self, group: dict[str, Any]) -> float:
        n = self.outer_steps
        if group["gamma_total"] is not None:
            return max(group["gamma_min"], group["gamma_total"] - n * self.options["inner_steps"] * group["inner_lr"])
        if group["scoping"] == 0.0 or group["gamma"] == math.inf:
            return group["gamma"]
        return max(group["gamma_min"], group["gamma"] / (1.0 + group["scoping"]) ** n)

    def step(self, mask: int, layout: int) -> None:
        self.grads = self.gradients(mask)
        self.take()

    def zero_grad(self, set_to_none: bool) -> None:
        self.grads = [None if g is None or set_to_none else torch.zeros_like(g) for g in self.grads]
        self.take()

    def take(self) -> None:
        if all(g is None for g in self.grads):
            return
        self.train()
        ends = self.position + 1 == self.options["inner_steps"]
        for group in self.groups:
            for i in group["members"]:
                if self.grads[i] is not None or (ends and self.states[i]):
                    self.update(i, group, self.grads[i], ends)
        self.taken += 1
        self.position += 1
        if ends:
            self.outer_steps += 1
            self.start_period()

    def update(self, i: int, group: dict[str, Any], grad: Tensor | None, ends: bool) -> None:
        p, state = self.params[i].data, self.states[i]
        if not state:
            state |= self.beginning(p, group)
        if group["averaging"] == "linear" and grad is not None:
            state["period_steps"] += 1
        a = {"linear": 1.0 / max(state.get("period_steps", 1), 1), "last": 1.0}.get(group["averaging"])
        arrays = {"y": in_memory(p, p)} | ({} if grad is None else {"g": in_memory(grad, p)})
        arrays |= {name: in_memory(state[role], p) for role, name in self.ROLES.items() if role in state}
        new = oracle.update(
            arrays,
            "langevin",
            inner=grad is not None,
            outer=ends,
            eta=group["inner_lr"],
            k=1.0 / self.gamma(group),
            s=math.sqrt(2.0 * group["inner_lr"] * group["temperature"]),
            a=1.0 - group["averaging"] if a is None else a,
            wd=group["weight_decay"],
            mu=group["inner_momentum"],
            damp1=1.0 - group["dampening"],
            nesterov=group["nesterov"],
            coupling_in_momentum=self.options["coupling_in_momentum"],
            maximize=group["maximize"],
            lr=group["lr"],
            mu_o=group["momentum"],
            wd_o=group["outer_weight_decay"],
            nesterov_o=group["nesterov"],
            seed=self.options["seed"],
            step=self.taken,
            number=i,
            rounding=self.options.get("rounding", "nearest") if p.dtype == torch.bfloat16 else "nearest",
        )
        p.copy_(out_of_memory(new["y"], p))
        state |= {role: out_of_memory(new[name], p) for role, name in self.ROLES.items() if role in state}

    def beginning(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        x = p.to(torch.float64 if p.dtype == torch.float64 else torch.float32, copy=True)
        return {
            "anchor": x,
            "average": x.clone(),
            **({"momentum": torch.zeros_like(x)} if group["inner_momentum"] else {}),
            **({"outer_momentum": torch.zeros_like(x)} if group["momentum"] else {}),
            **({"master": x.clone()} if self.options.get("master_weights") and p.dtype.itemsize == 2 else {}),
            **({"period_steps": 0} if group["averaging"] == "linear" else {}),
        }

    def start_period(self) -> None:
        self.position = 0
        for _, state in self.stepped():
            if "period_steps" in state:
                state["period_steps"] = 0
            if "momentum" in state and self.options["reset_inner_momentum"]:
                state["momentum"].zero_()

    def eval(self) -> None:
        for p, state in self.stepped() if self.training else ():
            state["live"] = p.clone()
            p.copy_(state["anchor"])
        self.training = False

    def train(self) -> None:
        for p, state in self.stepped() if not self.training else ():
            p.copy_(state.pop("live"))
        self.training = True

    def consolidate(self) -> None:
        for p, state in self.stepped():
            p.copy_(state["anchor"])
            for role in state.keys() & {"average", "master", "live"}:
                state[role].copy_(state["anchor"])
        self.start_period()

    def reset(self) -> None:
        for p, state in self.stepped():
            for role in state.keys() & {"anchor", "average", "master", "live"}:
                state[role].copy_(p)
        self.start_period()

    def reload(self) -> None:
        """Nothing of the method changes."""

    def move_state(self, index: int) -> None:
        """Nor here."""

    def lr(self, index: int, value: float) -> None:
        self.groups[index % len(self.groups)]["lr"] = value

    def add(self) -> None:
        if len(self.groups) == len(self.history.groups):
            self.join({"params": self.new_params(self.history.late), **self.history.numbers[-1]})

    def facts(self) -> Facts:
        facts: Facts = {}
        for group in self.groups:
            shown = {"lr": group["lr"], "gamma": self.gamma(group), "seed": self.options["seed"], "train_mode": self.training}
            shown |= {"step": self.taken, "position": self.position, "outer_steps": self.outer_steps}
            for i in group["members"]:
                facts |= self.facts_of(self.params[i], self.states[i], shown)
        return facts


def in_memory(t: Tensor, p: Tensor) -> np.ndarray:
    """The elements of ``t`` in the order in which those of ``p`` lie in memory, which is the noise's order."""
    like_p = torch.empty_strided(p.shape, p.stride(), dtype=t.dtype).copy_(t).as_strided((p.numel(),), (1,))
    return (like_p.view(torch.uint16) if t.dtype == torch.bfloat16 else like_p).numpy()


def out_of_memory(array: np.ndarray, p: Tensor) -> Tensor:
    flat = to_torch(array)
    t = torch.empty_strided(p.shape, p.stride(), dtype=flat.dtype)
    t.as_strided((p.numel(),), (1,)).copy_(flat)
    return t


@every(120)
@given(histories())
def test_step_is_the_method_of_each_parameter(history: History) -> None:
    play_alike(ByHand(history), Player(history))


# Looking changes nothing.


class Looking(Player):
    """Looks at everything after each action, and at the anchor ``trips`` times."""

    def __init__(self, history: History, trips: int) -> None:
        self.trips = trips
        super().__init__(history)

    def act(self, name: str, *details: Any) -> None:
        super().act(name, *details)
        optimizer = self.optimizer
        there_and_back = (
            (optimizer.eval, optimizer.train) if optimizer.param_groups[0]["train_mode"] else (optimizer.train, optimizer.eval)
        )
        for _ in range(self.trips):
            for go in there_and_back:
                go()
                self.look()

    def look(self) -> None:
        optimizer = self.optimizer
        optimizer.explain(), optimizer.stats(), optimizer.state_dict(), repr(optimizer), optimizer.at_outer_boundary
        copied = copy.deepcopy(optimizer)
        copied.train()
        copied.consolidate_()
        for p in self.params:
            optimizer.state[p]  # leaves an empty dict behind


@every(50)
@given(histories())
def test_looking_changes_nothing(history: History) -> None:
    play_alike(Player(history), Looking(history, trips=1))


class Evaluating(Player):
    """After each step shows the anchor ``trips`` times, and checks that it does."""

    def __init__(self, history: History, trips: int) -> None:
        self.trips = trips
        super().__init__(history)

    def step(self, mask: int, layout: int) -> None:
        super().step(mask, layout)
        in_training = self.optimizer.param_groups[0]["train_mode"]
        for _ in range(self.trips):
            self.optimizer.eval()
            for p in self.params:
                if state := self.optimizer.state.get(p):
                    assert same(p.detach(), state["anchor"].to(p.dtype))
            self.optimizer.train()
        if not in_training:
            self.optimizer.eval()


@every(50)
@given(histories())
def test_evaluating_never_changes_training(history: History) -> None:
    play_alike(*(Evaluating(history, trips) for trips in (0, 1, 7)))


# How parameters are dealt out, and where gradients lie.


class Split(Player):
    """Cuts groups in two wherever there is a 1 in the bits of ``cuts``."""

    def __init__(self, history: History, cuts: int) -> None:
        self.cuts = cuts
        self.origins: list[int] = []
        super().__init__(history)

    def cut(self, origin: int, specs: tuple[ParamSpec, ...]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for p in self.new_params(specs):
            if not groups or self.cuts >> len(self.params) - len(specs) + sum(len(g["params"]) for g in groups) & 1:
                groups.append({"params": [], **self.history.numbers[origin]})
                self.origins.append(origin)
            groups[-1]["params"].append(p)
        return groups

    def initial_groups(self) -> list[dict[str, Any]]:
        return [group for origin, specs in enumerate(self.history.groups) for group in self.cut(origin, specs)]

    def add(self) -> None:
        late = len(self.history.groups)
        if late not in self.origins:
            for group in self.cut(late, self.history.late):
                self.optimizer.add_param_group(group)

    def lr(self, index: int, value: float) -> None:
        chosen = index % (max(self.origins) + 1)
        for origin, group in zip(self.origins, self.optimizer.param_groups, strict=True):
            if origin == chosen:
                group["lr"] = value


@every(50)
@given(histories(most_groups=2), st.integers(1, ALL))
def test_parameters_of_equal_options_may_be_dealt_out_to_any_groups(history: History, cuts: int) -> None:
    play_alike(Player(history), Split(history, ALL), Split(history, cuts))


class Bucketed(Player):
    """Has its gradients in one allocation, in gaps of 8 bytes, the last one first, and steps with other threads."""

    def __init__(self, history: History, threads: int) -> None:
        self.threads = threads
        super().__init__(history)

    def take_step(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            super().take_step()
        finally:
            torch.set_num_threads(before)

    def gradients(self, mask: int) -> list[Tensor | None]:
        grads = super().gradients(mask)
        buffer, end, placed = bytearray(sum(g.nbytes + 24 for g in grads if g is not None) + 24), 8, []
        for g in reversed(grads):
            if g is not None and g.numel():
                view = torch.frombuffer(buffer, dtype=g.dtype, count=g.numel(), offset=end).view(g.shape)
                end += -(-g.nbytes // 8) * 8 + 8
                g = view.copy_(g)
            placed.append(g)
        return placed[::-1]

    def step(self, mask: int, layout: int) -> None:
        for p, grad in zip(self.params, self.gradients(mask), strict=True):
            p.grad = grad
        self.take_step()


LARGE = ParamSpec((211, 300), torch.float32, 0)  # enough for three threads


@every(12)
@given(histories(most_groups=2))
def test_threads_and_places_of_gradients_do_not_matter(history: History) -> None:
    history = replace(history, groups=((LARGE, *history.groups[0]), *history.groups[1:]))
    play_alike(*(Player(history), *(Bucketed(history, threads) for threads in (1, 3))))


# A refused step.


class Refused(Player):
    """Tries a step that has to be refused before each step that it takes."""

    def __init__(self, history: History, spoilers: list[tuple[str, int]]) -> None:
        self.spoilers = spoilers
        super().__init__(history)

    def step(self, mask: int, layout: int) -> None:
        how, index = self.spoilers[self.acted % len(self.spoilers)]
        self.try_in_vain(how, index)
        super().step(mask, layout)

    def try_in_vain(self, how: str, index: int) -> None:
        grads = self.gradients(ALL)
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        p, group = self.params[index % len(self.params)], self.optimizer.param_groups[-1]
        in_training, options, data, before = group["train_mode"], dict(group), p.data, self.facts()
        if how == "gaps":  # live weights that are brought back into another tensor are gone
            self.optimizer.train()
        with self.spoilt(how, p, group), pytest.raises((ValueError, TypeError, RuntimeError)):
            self.take_step()
        if how == "gaps" and not in_training:
            self.optimizer.eval()
        assert_same(self.facts(), before)
        assert p.data_ptr() == data.data_ptr()
        assert {name: value for name, value in group.items() if name != "params"} == {
            name: value for name, value in options.items() if name != "params"
        }

    @contextlib.contextmanager
    def spoilt(self, how: str, p: nn.Parameter, group: dict[str, Any]) -> Iterator[None]:
        """Make the step impossible meanwhile, by ``p`` or its gradient, or by the numbers of ``group``."""
        spoilt = OPTIONS_THAT_ARE_REFUSED.get(how, {})
        options, data = {name: group[name] for name in spoilt}, p.data
        group.update(spoilt)
        if how == "type":
            p.grad.data = p.grad.data.to(torch.float32 if p.dtype == torch.float64 else torch.float64)
        elif how == "shape" or (not spoilt and p.numel() < 2):
            p.grad.data = torch.ones(*p.shape, 2, dtype=p.dtype)
        elif how == "sparse":
            p.grad = p.grad.to_sparse()
        elif how == "overlap":
            p.grad.data = p.data
        elif how == "gaps":
            p.data = torch.ones(*p.shape, 2, dtype=p.dtype)[..., 0]
        try:
            yield
        finally:
            group.update(options)
            p.data = data


OPTIONS_THAT_ARE_REFUSED = {
    "rounding": {"rounding": "up"},
    "gamma": {"gamma": 0.0},
    "inner_lr": {"inner_lr": math.inf},
    "backend": {"backend": "abacus"},
}
SPOILERS = st.tuples(
    st.sampled_from(["type", "shape", "sparse", "overlap", "gaps", *OPTIONS_THAT_ARE_REFUSED]), st.integers(0, 7)
)


@every(60)
@given(histories(), st.lists(SPOILERS, min_size=1, max_size=5))
def test_refused_step_changes_nothing_and_is_forgotten(history: History, spoilers: list[tuple[str, int]]) -> None:
    play_alike(Player(history), Refused(history, spoilers))
