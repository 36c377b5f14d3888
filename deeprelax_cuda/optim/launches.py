"""From parameters to fused calls: the checks of a step, and the plans that are kept as long as its tensors stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.checks import check_disjoint, check_grads, check_tensors
from deeprelax_cuda.clock import follows
from deeprelax_cuda.noise import Place
from deeprelax_cuda.optim.buckets import Bucket, split
from deeprelax_cuda.optim.clocks import share_count
from deeprelax_cuda.optim.options import select_backend
from deeprelax_cuda.optim.weights import complete_state
from deeprelax_cuda.steps import ROLES, Family, Plan, Tensors
from deeprelax_cuda.watch import Watch, make_watch

#: What the tensors in the state of a parameter are called among `Tensors`.
FIELDS = {
    "anchor": "anchors",
    "average": "averages",
    "gradient_average": "averages",
    "momentum": "momenta",
    "master": "masters",
    "outer_momentum": "outer_momenta",
    "consensus": "consensus",
}

Group = dict[str, Any]
State = dict[str, Any]


class Needs(NamedTuple):
    """What decides, beside the tensors, whether a plan serves a group's parameters of one type.

    ``first_count`` is what "period_steps" begins with.
    """

    family: Family
    roles: list[str]
    first_count: int
    options: list[Any]


@dataclass(slots=True)
class Call:
    """A plan that has been checked, and the state of its parameters; gradients are not held."""

    bucket: Bucket
    needs: Needs
    plan: Plan
    tensors: Tensors
    states: list[State]

    @property
    def period_steps(self) -> Tensor | None:
        """The samples in the average of this period, a tensor for all parameters; None where nobody counts them."""
        return self.states[0]["period_steps"] if "period_steps" in self.needs.roles else None

    @property
    def count(self) -> int | None:
        """The samples in the average of this period after the coming step; None where nobody counts them."""
        return None if self.period_steps is None else int(self.period_steps) + self.bucket.inner


class Launch(NamedTuple):
    """A call with its gradients, and with their addresses where these are known."""

    call: Call
    grads: list[Tensor]
    addresses: bytes | None


class Launches:
    """The calls of the last step, which serve again while everything that they follow from stays the same.

    What a step does not use is dropped, so that no tensor outlives its optimizer's use of it by more than a step.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._watch: Watch | None = None
        # With a parameter that has state but no gradient, an outer step has other calls than an inner one.
        self._idle = self._outer = False

    def prepare(
        self,
        groups: Sequence[Group],
        state: Mapping[Tensor, State],
        outer: bool,
        needs: Callable[[Group, torch.dtype], Needs],
        labels: Callable[[], list[str]],
    ) -> list[Launch]:
        """Return the launches of a step; nothing has been changed then, and `commit` says that the step is taken.

        Without a gradient a parameter takes no inner step; the outer step is for all that have state, and in the gradient
        average for those that a gradient of this period counts for.

        Args:
            groups: the param groups of the optimizer.
            state: its state.
            outer: whether the step is the last of its period.
            needs: what a group's parameters of a type need.
            labels: gives the names of all parameters of the optimizer, for errors.

        Raises:
            TypeError, ValueError: a tensor that cannot be served, by name.
            RuntimeError: no backend, or not the one that was asked for, can serve.
        """
        launches = self._same_as_before(groups, state, outer, needs)
        if launches is None:
            self._watch = None  # until the new calls are committed
            self._calls, grads = _make_calls(groups, state, outer, needs, labels)
            self._outer = outer
            self._idle = any(g is None and bool(state.get(p)) for p, g in zip(_params(groups), grads, strict=True))
            launches = _checked(self._calls, grads)
        return launches

    def commit(self, groups: Sequence[Group], state: dict[Tensor, State]) -> None:
        """Put the state that `prepare` has completed into ``state``, and keep the calls for the steps to come."""
        if self._watch is not None:
            return
        for call in self._calls:
            state.update(zip(call.bucket.params, call.states, strict=True))
        written = [t for call in self._calls for role in ROLES for t in getattr(call.tensors, role)]
        self._watch = make_watch([group["params"] for group in groups], state, written)

    def _same_as_before(
        self, groups: Sequence[Group], state: Mapping[Tensor, State], outer: bool, needs: Callable[[Group, torch.dtype], Needs]
    ) -> list[Launch] | None:
        """Return the launches of the calls that are kept, None where they do not serve."""
        if self._watch is None or (self._idle and outer != self._outer):
            return None
        look = self._watch.look([group["params"] for group in groups], state)
        if look is None:
            return None
        for call in self._calls:
            if needs(groups[call.bucket.group], call.bucket.dtype) != call.needs:
                return None
        if not look.fit:
            return _checked(self._calls, look.grads)
        if len(self._calls) == 1 and len(look.grads) == len(self._calls[0].bucket.numbers):
            return [Launch(self._calls[0], look.grads, look.addresses)]  # type: ignore[arg-type]
        return [Launch(call, _pick(look.grads, call.bucket), None) for call in self._calls]


def _params(groups: Sequence[Group]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def _pick(grads: list[Tensor | None], bucket: Bucket) -> list[Tensor]:
    return [grads[i] for i in bucket.numbers] if bucket.inner else []  # type: ignore[misc]


def _make_calls(
    groups: Sequence[Group],
    state: Mapping[Tensor, State],
    outer: bool,
    needs: Callable[[Group, torch.dtype], Needs],
    labels: Callable[[], list[str]],
) -> tuple[list[Call], list[Tensor | None]]:
    calls: list[Call] = []
    grads: list[Tensor | None] = []
    no_state: State = {}
    names = labels()
    streams: Counter[int] = Counter()  # of each replica: its tensors are numbered as if it were alone
    holders = Counter(id(state.get(p, no_state).get("period_steps")) for p in _params(groups))
    for number, group in enumerate(groups):
        params = group["params"]
        if group["capturable"] and len(devices := dict.fromkeys(p.device for p in params)) > 1:
            found = ", ".join(map(str, devices))
            raise ValueError(f"capturable: expected the parameters of a group on one device, got {found} in group {number}")
        states = [state.get(p, {}) for p in params]  # each a dict of its own, also of a method that puts nothing in
        grads_here = [p.grad for p in params]
        inner = [g is not None for g in grads_here]
        every = needs(group, params[0].dtype if params else torch.float32)  # what holds for all types
        counts = [int(own.get("period_steps", every.first_count)) for own in states]
        plays = inner
        if outer:  # with capturable only the device knows whether it is one, and for whom
            moves = [group["capturable"] or follows(every.family, count) for count in counts]
            plays = [a or (bool(own) and b) for a, own, b in zip(inner, states, moves, strict=True)]
        replica = group.get("replica", 0)
        for bucket in split(number, len(grads), streams[replica], params, inner, plays, counts):
            own = [states[i - len(grads)] for i in bucket.numbers]
            own_names = [names[i] for i in bucket.numbers]
            calls.append(_make_call(bucket, group, needs(group, bucket.dtype), own, own_names, holders))
        grads += grads_here
        streams[replica] += len(params)
    return calls, grads


def _make_call(
    bucket: Bucket, group: Group, needs: Needs, states: list[State], labels: list[str], holders: Mapping[int, int]
) -> Call:
    """Check the tensors of a call, their state completed, and make a plan for it."""
    for p, label in zip(bucket.params, labels, strict=True):  # said before state is made, which would hide it
        name = f"params[{label}] (shape {tuple(p.shape)}, {p.dtype})"
        if p.is_complex():
            raise TypeError(f"{name}: expected a real floating dtype")
        if p.is_meta:
            raise ValueError(f"{name}: expected a tensor with memory, got one on meta")
    states = [complete_state(own, p, needs.roles, needs.first_count) for own, p in zip(states, bucket.params, strict=True)]
    if "period_steps" in needs.roles:
        states = share_count(states, bucket.params[0].device if group["capturable"] else torch.device("cpu"), holders)
    lists: dict[str, Any] = {FIELDS[role]: [own[role] for own in states] for role in needs.roles if role in FIELDS}
    tensors = Tensors(
        params=bucket.params,
        numbers=bucket.streams,
        places=[Place(0, numel := max(p.numel(), 1), numel) for p in bucket.params],
        labels=labels,
        **lists,
    )
    check_tensors(tensors, outer=True, disjoint=False)
    name = select_backend(group, bucket.params[0].device, bucket.dtype).name
    return Call(bucket, needs, backends.make_plan(name, tensors), tensors, states)


def _checked(calls: list[Call], grads: list[Tensor | None]) -> list[Launch]:
    """Return the launches of the calls with their gradients checked.

    Overlaps are looked for among all launches, whose order would decide what is read.
    """
    launches = [
        Launch(call, check_grads(call.tensors, _pick(grads, call.bucket), disjoint=False) if call.bucket.inner else [], None)
        for call in calls
    ]
    lists: dict[str, list[Tensor]] = {role: [] for role in (*ROLES, "grads")}
    labels: dict[str, list[str]] = {role: [] for role in lists}
    for launch in launches:
        tensors = launch.call.tensors
        for role, items in [*((role, getattr(tensors, role)) for role in ROLES), ("grads", launch.grads)]:
            lists[role] += items
            labels[role] += tensors.labels if items else []
    read = {"grads": lists.pop("grads")}
    check_disjoint(lists, read, lambda role, i: f"{role}[{labels[role][i]}]")
    return launches
