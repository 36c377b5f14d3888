"""What ``capturable=True`` is made of: the counters, gamma and lr of every group as tensors on the device of its parameters.

A captured step counts on by itself at each replay, ends its periods and moves gamma, because the device works out the numbers
of the step. The host sees tensors where it otherwise sees numbers, and reads them only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.clock import NUMBERS, Clock
from deeprelax_cuda.noise import Place
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


def set_number(holder: dict[str, Any], name: str, value: int) -> None:
    """Set a counter of a group or of a parameter's state, wherever it lies."""
    if isinstance(holder[name], Tensor):
        holder[name].fill_(value)
    else:
        holder[name] = value


def is_capturing(groups: Sequence[Group]) -> bool:
    """Whether what is done now to the parameters goes into a CUDA graph."""
    for group in groups:  # one parameter of each: this is asked at every step
        if group["params"] and group["params"][0].is_cuda:
            return torch.cuda.is_current_stream_capturing()
    return False


class Clocks:
    """The tensors behind the groups of one optimizer, at the same addresses as long as the parameters stay on their device."""

    def __init__(self) -> None:
        self._own: dict[tuple[int, str], Tensor] = {}
        self._scratch: dict[tuple[int, int, torch.device], Tensor] = {}
        self._idle: dict[tuple[int, str], tuple[Tensor, Plan]] = {}

    def settle(self, groups: Sequence[Group]) -> None:
        """Put tensors on the device in the place of numbers that were put in theirs: by a user, or by loading.

        Raises:
            RuntimeError: a number was, and a graph is being captured, in which it would be set at every replay.
        """
        for index, group in enumerate(groups):
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            for name, dtypes in ON_DEVICE.items():
                value, own = group[name], self._own.get((index, name))
                if value is not own or own is None or own.device != device:
                    self._adopt(groups, index, name, dtypes, device)

    def _adopt(
        self, groups: Sequence[Group], index: int, name: str, dtypes: tuple[torch.dtype, ...], device: torch.device
    ) -> None:
        if is_capturing(groups):
            raise RuntimeError(
                f"{name}: group {index} has {groups[index][name]!r} since the last step, which would be set at every replay of "
                "the graph that is being captured; take a step before the capture, or use fill_() on the tensor that was there"
            )
        value, own = groups[index][name], self._own.get((index, name))
        if own is not None and own.device == device:
            own.fill_(value)
        elif isinstance(value, Tensor) and value.device == device and value.dtype in dtypes and value.dim() == 0:
            elsewhere = any(value is t for t in self._own.values())  # groups may start from one tensor, but go their own ways
            own = value.detach().clone() if elsewhere else value
        else:
            own = torch.full((), value, dtype=dtypes[0], device=device)
        self._own[index, name] = groups[index][name] = own

    def clock(self, groups: Sequence[Group], index: int, ordinal: int, period_steps: Tensor | None, *, counts: bool) -> Clock:
        """Return the clock of a group's call; ``ordinal`` tells its calls apart, with ``counts`` it is the last of them."""
        group = groups[index]
        own = {name: self._own[index, name] for name in ON_DEVICE}
        device = own["step"].device
        scratch = self._scratch.get((index, ordinal, device))
        if scratch is None:
            scratch = self._scratch[index, ordinal, device] = torch.empty(NUMBERS, dtype=torch.uint8, device=device)
        return Clock(**own, period_steps=period_steps, numbers=scratch, counts=counts, rule=rule_of(group))

    def count_alone(self, groups: Sequence[Group], index: int, backend: str) -> None:
        """Count the step in a group none of whose parameters takes one."""
        device = self._own[index, "step"].device
        if (index, backend) not in self._idle:
            nothing = torch.empty(0, device=device)
            tensors = Tensors([nothing], [nothing], [nothing], numbers=[0], places=[Place(0, 1, 1)])
            self._idle[index, backend] = nothing, backends.make_plan(backend, tensors)
        _, plan = self._idle[index, backend]
        plan.run([], Scalars(inner=False), clock=self.clock(groups, index, 0, None, counts=True))


def share_count(states: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Return the states of a call's parameters with one tensor for all as their "period_steps", which are equal."""
    first = states[0]["period_steps"]
    if isinstance(first, Tensor) and all(own["period_steps"] is first for own in states):
        return list(states)
    shared = torch.full((), int(first), dtype=torch.int64, device=device)
    return [{**own, "period_steps": shared} for own in states]
