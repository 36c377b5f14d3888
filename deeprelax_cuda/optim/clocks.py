"""What ``capturable=True`` is made of: the counters, gamma and lr of every group as tensors on the device of its parameters.

A captured step counts on by itself at each replay, ends its periods and moves gamma, because the device works out the numbers
of the step. The host sees tensors where it otherwise sees numbers, and reads them only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.clock import COUPLED, NUMBERS, Clock, Law
from deeprelax_cuda.noise import Place
from deeprelax_cuda.optim.captures import is_capturing
from deeprelax_cuda.optim.options import check_number
from deeprelax_cuda.optim.scoping import rule_of
from deeprelax_cuda.steps import Plan, Scalars, Tensors

Group = dict[str, Any]

#: By name, the values of a group that lie on the device, and the types they may have there, the usual one first.
ON_DEVICE: dict[str, tuple[torch.dtype, ...]] = {
    "step": (torch.int64,),
    "position": (torch.int64,),
    "outer_steps": (torch.int64,),
    "gamma": (torch.float64,),
    "lr": (torch.float64, torch.float32),
}


def in_numbers(group: Group) -> Group:
    """Return the group with the values that lie on a device as plain numbers, for which the host waits."""
    found = {name: value for name in ON_DEVICE if isinstance(value := group.get(name), Tensor)}
    return {**group, **{name: value.item() for name, value in found.items()}}


def counts_in_numbers(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the states with plain numbers for "period_steps", each tensor of which is read once."""
    read: dict[int, int] = {}

    def plain(own: Any) -> Any:
        count = own.get("period_steps") if isinstance(own, dict) else None
        if not isinstance(count, Tensor):
            return own
        if id(count) not in read:
            read[id(count)] = int(count)
        return {**own, "period_steps": read[id(count)]}

    return {key: plain(own) for key, own in state.items()}


def set_number(holder: dict[str, Any], name: str, value: int) -> None:
    """Set a counter of a group, wherever it lies."""
    if isinstance(holder[name], Tensor):
        holder[name].fill_(value)
    else:
        holder[name] = value


class Clocks:
    """The tensors behind the groups of one optimizer, at the same addresses as long as the parameters stay on their device."""

    def __init__(self, gammas: str) -> None:
        """``gammas``: the interval of gamma."""
        self._intervals = {"gamma": gammas, "lr": "[0, inf)"}  # of the values that a user may set
        self._own: dict[tuple[int, str], Tensor] = {}
        self._scratch: dict[tuple[int, int, torch.device], Tensor] = {}
        self._idle: dict[tuple[int, str, torch.device], tuple[Tensor, Plan]] = {}
        self._in_graphs: dict[int, Tensor] = {}  # the counts that captured steps write to, by their ids

    def settle(self, groups: Sequence[Group]) -> None:
        """Put tensors on the device in the place of numbers that were put in theirs: by a user, or by loading.

        Raises:
            ValueError: a gamma or an lr outside its range.
            RuntimeError: a number was put in, and a graph is being captured, in which it would be set at every replay.
        """
        changed = [
            (index, name, device)
            for index, group in enumerate(groups)
            for device in [device_of(group, groups)]
            for name in ON_DEVICE
            if (own := self._own.get((index, name))) is None or group[name] is not own or own.device != device
        ]
        if not changed:
            return
        for index, name, _ in changed:
            value = groups[index][name]
            if is_capturing(groups):
                raise RuntimeError(
                    f"{name}: group {index} has {value!r} since the last step, which would be set at every replay of the graph "
                    "that is being captured; take a step before the capture, or use fill_() on the tensor that was there"
                )
            if name in self._intervals:
                check_number(name, value, self._intervals[name])
        values = [groups[index][name] for index, name, _ in changed]
        for (index, name, device), value in zip(changed, values, strict=True):
            self._own[index, name] = groups[index][name] = self._adopted(index, name, value, device)

    def _adopted(self, index: int, name: str, value: Any, device: torch.device) -> Tensor:
        own = self._own.get((index, name))
        if own is not None and own.device == device:
            # A new tensor on the old address, which graphs know; the old one keeps its value, elsewhere, for who put it aside.
            value = float(value) if own.is_floating_point() else int(value)
            there: Tensor = torch.empty_like(own).set_(own)  # type: ignore[call-overload]
            own.set_(own.clone())  # type: ignore[call-overload]
            return there.fill_(value)
        fits = isinstance(value, Tensor) and value.device == device and value.dtype in ON_DEVICE[name] and value.dim() == 0
        if fits:  # groups may start from one tensor, but go their own ways
            taken = any(value is t for t in self._own.values())
            return value.detach().clone() if taken else value  # type: ignore[no-any-return]
        dtype = ON_DEVICE[name][0]
        return torch.full((), float(value) if dtype.is_floating_point else int(value), dtype=dtype, device=device)

    def clock(
        self,
        groups: Sequence[Group],
        index: int,
        law: Law,
        *,
        ordinal: int = 0,
        period_steps: Tensor | None = None,
        counts: bool = True,
    ) -> Clock:
        """Return the clock of a group's call; ``ordinal`` tells its calls apart, with ``counts`` it is the last of them."""
        group = groups[index]
        own = {name: self._own[index, name] for name in ON_DEVICE}
        device = own["step"].device
        scratch = self._scratch.get((index, ordinal, device))
        if scratch is None:
            scratch = self._scratch[index, ordinal, device] = torch.empty(NUMBERS, dtype=torch.uint8, device=device)
        if period_steps is not None and is_capturing(groups):
            self._in_graphs[id(period_steps)] = period_steps  # later steps may count in another
        return Clock(**own, period_steps=period_steps, numbers=scratch, counts=counts, rule=rule_of(group), law=law)

    def count_alone(self, groups: Sequence[Group], index: int, backend: str) -> None:
        """Count the step in a group none of whose parameters takes one."""
        key = index, backend, self._own[index, "step"].device
        if key not in self._idle:
            nothing = torch.empty(0, device=key[-1])
            tensors = Tensors([nothing], [nothing], [nothing], numbers=[0], places=[Place(0, 1, 1)])
            self._idle[key] = nothing, backends.make_plan(backend, tensors)
        _, plan = self._idle[key]
        plan.run([], Scalars(inner=False), clock=self.clock(groups, index, COUPLED))


def device_of(group: Group, groups: Sequence[Group]) -> torch.device:
    """Return where the values of a group lie: with its parameters or, where it has none, with those of another."""
    for params in (group["params"], *(other["params"] for other in groups)):
        if params:
            device: torch.device = params[0].device
            return device
    return torch.device("cpu")


def share_count(states: Sequence[dict[str, Any]], device: torch.device, holders: Mapping[int, int]) -> list[dict[str, Any]]:
    """Return the states of a call's parameters with one tensor for all as their "period_steps", which are equal.

    So a step counts once, however many parameters it has. ``holders`` says how many states hold each tensor, by its id: one
    that others hold too would count for them.
    """
    first = states[0]["period_steps"]
    whole = isinstance(first, Tensor) and first.device == device and all(own["period_steps"] is first for own in states)
    if not whole or holders[id(first)] != len(states):
        first = torch.full((), int(first), dtype=torch.int64, device=device)
        states = [{**own, "period_steps": first} for own in states]
    return list(states)
