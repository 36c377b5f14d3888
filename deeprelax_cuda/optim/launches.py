"""From parameters to fused calls: the checks of a step, and the plans that are kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.checks import check_disjoint, check_grads, check_tensors
from deeprelax_cuda.noise import Place
from deeprelax_cuda.optim.buckets import Bucket, Call
from deeprelax_cuda.optim.options import select_backend
from deeprelax_cuda.optim.weights import complete_state
from deeprelax_cuda.steps import ROLES, Plan, Scalars, Tensors

#: What the tensors in the state of a parameter are called among `Tensors`.
FIELDS = {
    "anchor": "anchors",
    "average": "averages",
    "momentum": "momenta",
    "master": "masters",
    "outer_momentum": "outer_momenta",
}


class Launch(NamedTuple):
    """A call that has been checked: nothing is written before every launch of a step is one."""

    call: Call
    plan: Plan
    grads: list[Tensor]
    scalars: Scalars


@dataclass(frozen=True, eq=False, slots=True)
class _Kept:
    plan: Plan
    tensors: Tensors
    roles: list[str]
    options: list[Any]

    def serves(self, call: Call) -> bool:
        """Whether the plan is for the very tensors and options of the call, whose bucket is the plan's."""
        if self.roles != call.roles or self.options != _options(call.group):
            return False
        try:
            return all(
                all(map(is_, [state[role] for state in call.states], getattr(self.tensors, FIELDS[role])))
                for role in call.roles
                if role in FIELDS
            )
        except KeyError:
            return False


class Plans:
    """The plans of the last step.

    A plan serves again as long as every tensor is the same and where it was. What a step does not use is dropped, so that no
    tensor outlives its optimizer's use of it by more than a step; gradients are never held.
    """

    def __init__(self) -> None:
        self._kept: Mapping[Bucket, _Kept] = {}
        self._ranges = _Ranges([], [])
        self._grad_addresses: list[int] = []

    def prepare(
        self, calls: list[tuple[Call, Scalars]], labels: Callable[[], list[str]]
    ) -> tuple[list[Launch], dict[Tensor, dict[str, Any]]]:
        """Return the launches of a step, checked, and the state of the parameters whose state was not complete.

        Args:
            calls: what is to be done, with which numbers.
            labels: gives the names of all parameters of the optimizer, for errors.

        Raises:
            TypeError, ValueError: a tensor that cannot be served, by name.
            RuntimeError: no backend, or not the one that was asked for, can serve.
        """
        kept: dict[Bucket, _Kept] = {}
        completed: dict[Tensor, dict[str, Any]] = {}
        launches = []
        for call, scalars in calls:
            entry = self._kept.get(call.bucket)
            if entry is None or not entry.serves(call):
                entry = _make(call, labels(), completed)
            kept[call.bucket] = entry
            grads = call.grads if call.bucket.inner else []
            if not call.bucket.fits(grads):
                grads = check_grads(entry.tensors, grads, disjoint=False)
            launches.append(Launch(call, entry.plan, grads, scalars))

        # Overlaps are looked for among all launches, whose order would decide what is read.
        addresses = [g.data_ptr() for launch in launches for g in launch.grads]
        if kept != self._kept:
            _check_overlaps(launches, kept)
            self._ranges = _Ranges(_owned(kept), [p for bucket in kept if bucket.inner for p in bucket.params])
        elif addresses != self._grad_addresses and not self._ranges.are_clear_of(addresses):
            _check_overlaps(launches, kept)
        self._kept, self._grad_addresses = kept, addresses
        return launches, completed


class _Ranges:
    """The memory of the tensors that launches write, to hold new gradients against: of the layout of ``params``."""

    def __init__(self, written: list[Tensor], params: list[Tensor]) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in written if t.nbytes)
        self._starts = torch.tensor([start for start, _ in spans] + [torch.iinfo(torch.int64).max])
        self._ends = torch.tensor([end for _, end in spans], dtype=torch.int64)
        self._sizes = torch.tensor([p.nbytes for p in params], dtype=torch.int64)

    def are_clear_of(self, addresses: list[int]) -> bool:
        """Whether gradients at these addresses overlap none of the tensors, which do not overlap each other."""
        start = torch.tensor(addresses, dtype=torch.int64)
        behind = self._starts[torch.searchsorted(self._ends, start, right=True)]
        return bool((start + self._sizes <= behind).all())


def _options(group: dict[str, Any]) -> list[Any]:
    return [group[name] for name in ("backend", "foreach", "fused")]


def _make(call: Call, labels: list[str], completed: dict[Tensor, dict[str, Any]]) -> _Kept:
    """Complete the state of a call, which goes into ``completed`` too, and make a plan for it."""
    bucket, states = call.bucket, call.states
    names = [labels[number] for number in bucket.numbers]
    for i, (p, label) in enumerate(zip(bucket.params, names, strict=True)):
        if p.is_complex():  # said before state is made, which is real
            raise TypeError(f"params[{label}] (shape {tuple(p.shape)}, {p.dtype}): expected a real floating dtype")
        whole = complete_state(states[i], p, call.roles)
        if whole is not states[i]:
            states[i] = completed[p] = whole
    lists: dict[str, Any] = {FIELDS[role]: [state[role] for state in states] for role in call.roles if role in FIELDS}
    tensors = Tensors(
        params=bucket.params,
        numbers=bucket.numbers,
        places=[Place(0, numel := max(p.numel(), 1), numel) for p in bucket.params],
        labels=names,
        **lists,
    )
    check_tensors(tensors, outer=True, disjoint=False)
    name = select_backend(call.group, bucket.params[0].device, bucket.dtype).name
    return _Kept(backends.make_plan(name, tensors), tensors, call.roles, _options(call.group))


def _owned(kept: Mapping[Bucket, _Kept]) -> list[Tensor]:
    return [t for entry in kept.values() for role in ROLES for t in getattr(entry.tensors, role)]


def _check_overlaps(launches: list[Launch], kept: Mapping[Bucket, _Kept]) -> None:
    """Refuse two tensors of a step that share memory, unless both are gradients."""
    lists: dict[str, list[Tensor]] = {role: [] for role in (*ROLES, "grads")}
    labels: dict[str, list[str]] = {role: [] for role in lists}
    for launch in launches:
        tensors = kept[launch.call.bucket].tensors
        for role, items in [*((role, getattr(tensors, role)) for role in ROLES), ("grads", launch.grads)]:
            lists[role] += items
            labels[role] += tensors.labels if items else []
    grads = {"grads": lists.pop("grads")}
    check_disjoint(lists, grads, lambda role, i: f"{role}[{labels[role][i]}]")
