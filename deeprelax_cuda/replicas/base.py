"""What the methods with replicas share: who they are, their seeds, and steps that all take after an exchange, or none."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.clock import Clock
from deeprelax_cuda.noise import check_seed, derive_seed
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.launches import Launch, Launches
from deeprelax_cuda.optim.options import check_number
from deeprelax_cuda.optim.scoping import rho_of
from deeprelax_cuda.replicas.groups import Facts, Group, InProcess, OverRanks
from deeprelax_cuda.replicas.layout import digest_of
from deeprelax_cuda.steps import Scalars


class Member(NamedTuple):
    """A parameter that has state, with it, and its place among the parameters of its replica."""

    p: Tensor
    state: dict[str, Any]
    place: int


class ReplicaOptimizer(RelaxationOptimizer):
    """All replicas of a run in one process, or one on each rank of a process group, with the same bits.

    A param group belongs to one replica, whose number is its "replica"; "replicas" is how many the run has.
    """

    SHARED: ClassVar[tuple[str, ...]] = (*RelaxationOptimizer.SHARED, "replicas")

    _group: Group | None

    def __init__(
        self,
        params: ParamsT | None,
        replicas: Sequence[ParamsT] | None,
        group: dist.ProcessGroup | None,
        options: dict[str, Any],
    ) -> None:
        self._group, params = _make_group(params, replicas, group)
        super().__init__(params, {**options, "replicas": self._group.size})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from a state; a copy of a replica over ranks has no process group, which only `copy.deepcopy` hands on."""
        super().__setstate__(state)
        if "_group" not in self.__dict__:  # torch loads a state_dict by this too
            count = self.param_groups[0]["replicas"]
            complete = {group["replica"] for group in self.param_groups} == set(range(count))
            self._group = InProcess(count) if complete else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaOptimizer:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._group = self._group
        return other

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in mid-training; of several replicas in one process its "replica" says whose it is.

        Each of the other replicas needs a group like it before the next exchange.

        Raises:
            ValueError, TypeError: an option outside its range, or one that must be equal in all groups and is not.
        """
        if isinstance(param_group, dict):
            here = self._present_group().here
            if param_group.setdefault("replica", here[0] if len(here) == 1 else None) not in here:
                expected = f"expected the number of a replica in this process, {', '.join(map(str, here))}"
                raise ValueError(f"replica: {expected}, got {param_group['replica']!r}")
        super().add_param_group(param_group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves its steps to us: over ranks, to be refused, as the others would not see it skip one."""
        return isinstance(self._group, OverRanks)

    def _check_call(self) -> None:
        super()._check_call()
        if "found_inf" in self.__dict__:
            del self.found_inf, self.grad_scale  # type: ignore[attr-defined]
            raise RuntimeError(
                "group: a GradScaler skips steps, which the other ranks do not see; bfloat16 under autocast needs no scaler"
            )
        for group in self.param_groups:
            _check_capturable(group)

    def _take_step(self, from_eval: bool) -> bool:
        self.train()  # whatever a closure has left behind
        first = self.param_groups[0]
        ends = first["position"] + 1 >= first["inner_steps"]
        states = dict(self.state) if ends else {}
        try:
            return super()._take_step(from_eval)
        except BaseException:
            if ends:  # the states are replaced, not changed, where a step completes them
                self.state.clear()
                self.state.update(states)
                self._launches = Launches()
            raise

    def _run(self, launches: list[Launch], scalars: list[Scalars], clocks: list[Clock] | None) -> None:
        """Take the step; at the end of a period an inner step, the exchange and an outer step, all of them or none."""
        if not any(numbers.outer for numbers in scalars):
            super()._run(launches, scalars, clocks)
            return
        inner = [
            (launch, replace(numbers, outer=False)) for launch, numbers in zip(launches, scalars, strict=True) if numbers.inner
        ]
        alone = self.param_groups[0]["replicas"] == 1  # then there is nobody to fail
        with nullcontext() if alone else _as_before_if_it_fails(inner):
            super()._run([launch for launch, _ in inner], [numbers for _, numbers in inner], None)
            members = self._members()
            means = self._agree(members)
        self._move(launches, scalars, members, means)

    def _members(self) -> dict[int, list[Member]]:
        """Return the parameters that have state, and it, of each replica in this process."""
        members: dict[int, list[Member]] = {}
        places: Counter[int] = Counter()
        for group in self.param_groups:
            replica, params = group["replica"], group["params"]
            own = members.setdefault(replica, [])
            own += [Member(p, state, i) for i, p in enumerate(params, places[replica]) if (state := self.state.get(p))]
            places[replica] += len(params)
        return dict(sorted(members.items()))

    def _agree(self, members: dict[int, list[Member]]) -> list[list[Tensor]]:
        """Return for each replica here the mean over all replicas of what each has of its parameters: the same for all."""
        lists = [[self._offered(p, state) for p, state, _ in own] for own in members.values()]
        if self._is_rehearsal:
            return lists
        first = self.param_groups[0]
        common = int(first["step"]), check_seed(first["seed"]), int(first["inner_steps"])
        facts = [
            Facts(*common, digest_of(f"{self._kind()} {[place for *_, place in own]}"), self._is_sound(own))
            for own in members.values()
        ]
        mean = self._present_group().mean(lists, facts)
        return [mean] * len(lists)

    def _present_group(self) -> Group:
        if self._group is None:
            raise RuntimeError(
                "group: this optimizer was unpickled or copied, and has no process group; make one with group=, and "
                "load_state_dict() into it"
            )
        return self._group

    def _kind(self) -> str:
        """Return what is exchanged, and by whom: all replicas must say the same."""
        return self.METHOD

    def _is_sound(self, own: list[Member]) -> bool:
        """Return whether what a replica does not offer is finite where it could be otherwise."""
        return True

    @abstractmethod
    def _offered(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """Return what the mean is taken of, in the compute type."""

    @abstractmethod
    def _move(
        self, launches: list[Launch], scalars: list[Scalars], members: dict[int, list[Member]], means: list[list[Tensor]]
    ) -> None:
        """Take the outer step towards the mean, after every replica has got it."""

    def _outer_steps(self, launches: list[Launch], scalars: list[Scalars]) -> None:
        """Take the outer steps of the formula."""
        alone = [Launch(launch.call, [], None) for launch in launches]
        super()._run(alone, [replace(numbers, inner=False) for numbers in scalars], None)

    def _seed(self, group: dict[str, Any]) -> int:
        seed = super()._seed(group)
        return _derived(seed, group["replica"]) if group["replicas"] > 1 else seed

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("rho", group["rho"], "(0, inf]")
        _check_rho_rule(group)
        _check_capturable(group)

    def _initial_values(self, group: dict[str, Any]) -> dict[str, float]:
        return {**super()._initial_values(group), "initial_rho": float(group["rho"])}

    def _check_rules(self, group: dict[str, Any]) -> None:
        super()._check_rules(group)
        check_number("rho", group["rho"], "(0, inf]")
        _check_rho_rule(group)

    def _follow_rules(self, group: dict[str, Any]) -> None:
        super()._follow_rules(group)
        group["rho"] = rho_of(group)

    def _check_incoming(self, incoming: dict[str, Any]) -> None:
        super()._check_incoming(incoming)
        for number, (ours, theirs) in enumerate(zip(self.param_groups, incoming["param_groups"], strict=False)):
            own, other = ((group.get("replica"), group.get("replicas")) for group in (ours, theirs))
            if own != other:
                expected = f"expected the state of replica {own[0]} of {own[1]} in group {number}"
                raise ValueError(f"state_dict: {expected}, got that of replica {other[0]} of {other[1]}")


@lru_cache(maxsize=256)
def _derived(seed: int, replica: int) -> int:
    return derive_seed(seed, replica)


@contextmanager
def _as_before_if_it_fails(steps: Sequence[tuple[Launch, Scalars]]) -> Iterator[None]:
    """Put back what these steps write, should they or what follows fail."""
    written = [getattr(launch.call.tensors, role) for launch, numbers in steps for role in sorted(numbers.writes)]
    written = [tensors for tensors in written if tensors]
    kept = [torch._foreach_mul(tensors, 1.0) for tensors in written]  # copies, in one launch on a GPU
    try:
        yield
    except BaseException:
        for tensors, copies in zip(written, kept, strict=True):
            torch._foreach_copy_(tensors, copies)
        raise


def _make_group(
    params: ParamsT | None, replicas: Sequence[ParamsT] | None, group: dist.ProcessGroup | None
) -> tuple[Group, ParamsT]:
    """Return where the replicas live, and the parameters of those that are here."""
    if replicas is not None:
        if params is not None or group is not None:
            raise ValueError("replicas: expected neither params nor group= beside them; those are for one replica a rank")
        for number, own in enumerate(replicas):
            if isinstance(own, Tensor):
                raise TypeError(f"replicas[{number}]: expected the parameters of a replica, got one tensor")
        lists = [list(own) for own in replicas]
        if not lists:
            raise ValueError("replicas: expected the parameters of at least one replica, got none")
        return InProcess(len(lists)), [one for number, own in enumerate(lists) for one in _groups_of(own, number)]
    if params is None:
        raise TypeError("params: expected the parameters of this rank's replica, or replicas=[params_1, ...], got neither")
    found: Any = group
    if dist.is_available() and found == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected one that this rank belongs to; new_group() has made one of other ranks")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group: expected a process group of which each rank is a replica, such as torch.distributed.group.WORLD after "
            f"init_process_group(), or replicas=[params_1, ...] in place of params; got {group!r}"
        )
    if dist.get_world_size(group) == 1:
        return InProcess(1), params
    return OverRanks(group), params


def _groups_of(params: list[Any], replica: int) -> list[dict[str, Any]]:
    """Return the param groups of a replica's parameters, which may be groups already."""
    if not params:
        raise ValueError(f"replicas[{replica}]: expected parameters, got none")
    if isinstance(params[0], dict):
        return [{**group, "replica": replica} for group in params]
    return [{"params": params, "replica": replica}]


def _check_rho_rule(group: dict[str, Any]) -> None:
    check_number("rho_scoping", group["rho_scoping"], "[0, inf)")
    check_number("rho_min", group["rho_min"], "[0, inf)")


def _check_capturable(group: dict[str, Any]) -> None:
    if group["capturable"]:
        raise ValueError("capturable: expected False, as the host has to see that all replicas are there; got True")
