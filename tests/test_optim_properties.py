"""Properties of the optimizer, whatever its parameters, its options, and what a user does to both between the steps.

A history is drawn: parameters, options and actions. It is played twice in ways that must not matter, or once more by `ByHand`,
the method written down for one parameter at a time; everything must come out bit for bit the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest
import torch
from contract_cases import CPU_SETS, backend, same, to_torch
from hypothesis import given
from hypothesis import strategies as st
from optim_histories import (
    ALL,
    ELASTIC_SGD,
    ENTROPY_SGD,
    FIXED_POINT,
    HEAT,
    PARLE,
    PROX,
    SAMPLES,
    Clocked,
    Facts,
    History,
    Method,
    ParamSpec,
    Player,
    assert_same,
    every,
    histories,
    over_capturable_methods,
    over_methods,
    play_alike,
)
from torch import Tensor, nn

from deeprelax_cuda import backends

pytestmark = pytest.mark.usefixtures("one_thread")


# The same bits on every backend.


@pytest.mark.skipif(len(backends.available("cpu")) < 2, reason="there is one backend only")
@over_methods
@every(60)
@given(data=st.data())
@pytest.mark.slow
def test_backends_agree(method: Method, data: st.DataObject) -> None:
    history = data.draw(histories(method))
    play_alike(*(Player(history, backend=name) for name in backends.available("cpu")))


@over_capturable_methods
@every(25)
@given(data=st.data())
@pytest.mark.slow
def test_clocks_agree_with_the_host(method: Method, data: st.DataObject) -> None:
    history = data.draw(histories(method))
    play_alike(Player(history), *(Clocked(history, backend=name) for name in backends.available("cpu")))


class OnInstructionSet(Player):
    def __init__(self, history: History, name: str) -> None:
        self.label = f"cpu-{name}"
        super().__init__(history, backend="cpu")

    def act(self, name: str, *details: Any) -> None:
        with backend(self.label):
            super().act(name, *details)


@pytest.mark.skipif(len(CPU_SETS) < 2, reason="there is one instruction set only")
@every(60)
@given(histories())
def test_instruction_sets_agree(history: History) -> None:
    play_alike(*(OnInstructionSet(history, name) for name in CPU_SETS))


# The method, one parameter at a time.


class ByHand(Player):
    """The method as its definition says it, without an optimizer: the arithmetic of a step is the oracle's.

    A parameter's "period_steps" here is the number of its gradients in this period, of those that count: where it was put down
    anew, HEAT has had none yet at a point of its own, which -1 stands for.
    """

    ROLES: ClassVar = {
        "anchor": "x",
        "average": "m",
        "gradient_average": "p",
        "momentum": "v",
        "outer_momentum": "w",
        "consensus": "consensus",
        "master": "master",
    }

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
        if group.get("gamma_total") is not None:
            return max(group["gamma_min"], group["gamma_total"] - n * self.options["inner_steps"] * group["inner_lr"])
        if "gamma" not in group:
            return math.inf
        if group.get("scoping", 0.0) == 0.0 or group["gamma"] == math.inf:
            return group["gamma"]
        return max(group["gamma_min"], group["gamma"] / (1.0 + group["scoping"]) ** n)

    def rho(self, group: dict[str, Any]) -> float:
        if group["rho_scoping"] == 0.0 or group["rho"] == math.inf:
            return group["rho"]
        return max(group["rho_min"], group["rho"] / (1.0 + group["rho_scoping"]) ** self.outer_steps)

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
        ends = self.position + 1 == self.options.get("inner_steps") or self.history.method is ELASTIC_SGD
        for group in self.groups:
            for i in group["members"]:
                if self.grads[i] is not None or (ends and self.states[i]):
                    self.update(i, group, self.grads[i], ends)
        self.taken += 1
        self.position += 1
        if ends:
            self.outer_steps += 1
            self.end_period()

    def update(self, i: int, group: dict[str, Any], grad: Tensor | None, ends: bool) -> None:
        p, state = self.params[i].data, self.states[i]
        if not state:
            state |= self.beginning(p, group)
        if "period_steps" in state and grad is not None:
            state["period_steps"] += 1
        arrays = {"y": in_memory(p, p)} | ({} if grad is None else {"g": in_memory(grad, p)})
        arrays |= {name: in_memory(state[role], p) for role, name in self.ROLES.items() if role in state}
        numbers = self.formula(group, state.get("period_steps"), ends)
        common = {
            "wd": group["weight_decay"],
            "maximize": group["maximize"],
            "lr": group["lr"],
            "mu_o": group.get("momentum", 0.0),
            "wd_o": group.get("outer_weight_decay", 0.0),
            "nesterov_o": group.get("nesterov", False),
            "seed": self.options["seed"],
            "step": self.taken,
            "number": i,
            "rounding": self.options.get("rounding", "nearest") if p.dtype == torch.bfloat16 else "nearest",
        }
        if self.history.method in (PARLE, ELASTIC_SGD):
            arrays = oracle.update(arrays, **{**numbers, "outer": False}, **common, inner=grad is not None)
            y = arrays.get("master", oracle.widen(arrays["y"]))
            if ends and self.history.method is ELASTIC_SGD:  # the mean of one replica is that replica
                arrays["x"] = y
            elif ends:
                arrays["consensus"] = arrays["m" if self.options["consensus"] == "averages" else "x"]
            grad = None
        new = oracle.update(arrays, **numbers, **common, inner=grad is not None)
        p.copy_(out_of_memory(new["y"], p))
        state |= {role: out_of_memory(new[name], p) for role, name in self.ROLES.items() if role in state}

    def formula(self, group: dict[str, Any], count: int | None, ends: bool) -> dict[str, Any]:
        """What the inner step of each method is, for the ``count``-th gradient of a parameter's period."""
        method, gamma = self.history.method, self.gamma(group)
        plain_mean = 0.0 if count is None or count < 1 else 1.0 / count
        if method is SAMPLES:
            s = math.sqrt(2.0 * group["lr"] * group["temperature"])
            return {"family": "langevin", "outer": False, "eta": group["lr"], "k": 1.0 / gamma, "s": s}
        if method is PROX:
            pulled = {"eta": group["inner_lr"], "k": 1.0 / gamma, "mu": group["inner_momentum"], "nesterov": group["nesterov"]}
            return {"family": "langevin", "outer": ends, "a": 1.0, **pulled}
        if method is ELASTIC_SGD:
            return {
                "family": "langevin",
                "outer": False,
                "eta": group["lr"],
                "k": 1.0 / self.rho(group),
                "s": math.sqrt(2.0 * group["lr"] * group["temperature"]),
                "mu": group["momentum"],
                "damp1": 1.0 - group["dampening"],
                "nesterov": group["nesterov"],
                "coupling_in_momentum": self.options["coupling_in_momentum"],
            }
        if method in (ENTROPY_SGD, PARLE):
            averaging = {"linear": plain_mean, "last": 1.0}.get(group["averaging"])
            return {
                "family": "langevin",
                "outer": ends,
                "eta": group["inner_lr"],
                "k": 1.0 / gamma,
                "s": math.sqrt(2.0 * group["inner_lr"] * group["temperature"]),
                "a": 1.0 - group["averaging"] if averaging is None else averaging,
                "mu": group["inner_momentum"],
                "damp1": 1.0 - group["dampening"],
                "nesterov": group["nesterov"],
                "coupling_in_momentum": self.options["coupling_in_momentum"],
                **({"kr": 1.0 / self.rho(group)} if method is PARLE else {}),
            }
        moves = {"family": "gradient_average", "outer": ends and count >= 1}  # without a gradient there is nothing to go along
        if method is HEAT:
            return {**moves, "a": plain_mean, "s": math.sqrt(gamma * group["temperature"])}
        averaging = 0.75 if group["averaging"] is None else group["averaging"]
        damped = {"linear": plain_mean, "last": 1.0}.get(averaging)
        a = 1.0 if count == 1 else 1.0 - averaging if damped is None else damped
        return {**moves, "a": a, "c": gamma}

    def beginning(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        x = p.to(torch.float64 if p.dtype == torch.float64 else torch.float32, copy=True)
        method = self.history.method
        master = {"master": x.clone()} if self.options.get("master_weights") and p.dtype.itemsize == 2 else {}
        if method is SAMPLES:
            return master | ({} if group["gamma"] == math.inf else {"anchor": x})
        if method is ELASTIC_SGD:
            return master | {"anchor": x} | ({"momentum": torch.zeros_like(x)} if group["momentum"] else {})
        means = method in (FIXED_POINT, HEAT)
        counted = means or group["averaging"] == "linear"
        return {
            "anchor": x,
            **({"gradient_average": torch.zeros_like(x)} if means else {"average": x.clone()}),
            **({"momentum": torch.zeros_like(x)} if group.get("inner_momentum") else {}),
            **({"outer_momentum": torch.zeros_like(x)} if group["momentum"] else {}),
            **({"period_steps": -1 if method is HEAT else 0} if counted else {}),
            **({"consensus": x.clone()} if method is PARLE else {}),
            **master,
        }

    def end_period(self) -> None:
        self.position = 0
        for _, state in self.stepped():
            if state.get("period_steps", -1) >= 0:
                state["period_steps"] = 0
            if "momentum" in state and self.options.get("reset_inner_momentum"):
                state["momentum"].zero_()

    def begin_anew(self) -> None:
        self.end_period()
        for _, state in self.stepped():
            if "period_steps" in state and self.history.method is HEAT:
                state["period_steps"] = -1

    def eval(self) -> None:
        for p, state in self.stepped() if self.training and self.history.method.evaluates else ():
            state["live"] = p.clone()
            p.copy_(state["anchor"])
        self.training = not self.history.method.evaluates

    def train(self) -> None:
        for p, state in self.stepped() if not self.training else ():
            p.copy_(state.pop("live"))
        self.training = True

    def consolidate(self) -> None:
        if not self.history.method.evaluates:
            return
        for p, state in self.stepped():
            p.copy_(state["anchor"])
            for role in state.keys() & {"average", "master", "live"}:
                state[role].copy_(state["anchor"])
        self.begin_anew()

    def reset(self) -> None:
        for p, state in self.stepped():
            for role in state.keys() & {"anchor", "average", "consensus", "master", "live"}:
                state[role].copy_(p)
        self.begin_anew()

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
            shown |= {"rho": self.rho(group)} if "rho" in group else {}
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


@over_methods
@every(60)
@given(data=st.data())
@pytest.mark.slow
def test_step_is_the_method_of_each_parameter(method: Method, data: st.DataObject) -> None:
    history = data.draw(histories(method))
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
@pytest.mark.slow
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
        samples = [p.detach().clone() for p in self.params]
        for _ in range(self.trips):
            self.optimizer.eval()
            for p, sample in zip(self.params, samples, strict=True):
                if state := self.optimizer.state.get(p):
                    shown = state["anchor"].to(p.dtype) if self.history.method.evaluates else sample
                    assert same(p.detach(), shown)
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
        spoilt = self.history.method.refused if how == "own option" else OPTIONS_THAT_ARE_REFUSED.get(how, {})
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
    "lr": {"lr": math.inf},
    "backend": {"backend": "abacus"},
}
SPOILERS = st.tuples(
    st.sampled_from(["type", "shape", "sparse", "overlap", "gaps", "own option", *OPTIONS_THAT_ARE_REFUSED]), st.integers(0, 7)
)


@every(60)
@given(histories(), st.lists(SPOILERS, min_size=1, max_size=5))
def test_refused_step_changes_nothing_and_is_forgotten(history: History, spoilers: list[tuple[str, int]]) -> None:
    play_alike(Player(history), Refused(history, spoilers))
