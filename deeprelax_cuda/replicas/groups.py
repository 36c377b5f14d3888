"""Where replicas live, and how they come to their mean: all in this process, or one on each rank of a process group.

Before anything of a replica changes, all say how far they are and whether their numbers are finite. Then the mean is computed,
which every replica gets with the same bits, in one process or over ranks.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deeprelax_cuda.noise import from_int64, to_int64
from deeprelax_cuda.replicas.layout import Buffer, Layout, add_, digest_of, divide_

#: That of the messages before an exchange, for process groups that are talked over otherwise too.
TAG = 0x6472


class Facts(NamedTuple):
    """What replicas must have in common when they exchange, and whether the numbers of one are finite."""

    steps: int
    seed: int
    inner_steps: int
    parameters: int
    finite: bool = True

    def seen(self, layout: Layout, finite: bool) -> Facts:
        """Return the facts with what was seen of the tensors."""
        return self._replace(parameters=digest_of(f"{self.parameters} {layout.digest}"), finite=self.finite and finite)


#: What is said where replicas differ in one of them.
DIFFERENCES = {
    "steps": "{theirs} steps taken on {others}, {ours} on {first}: were some skipped, or another checkpoint loaded? "
    "Start all again from one",
    "seed": "seed {theirs} on {others}, {ours} on {first}: pass that of the run, from which each replica derives its own",
    "inner_steps": "inner_steps={theirs} on {others}, {ours} on {first}: it is the same in all replicas",
    "parameters": "other parameters on {others} than on {first}: each replica needs gradients for the same ones, of the same "
    "shapes and types, and steps by the same method to the same kind of consensus",
}


class Group(Protocol):
    """The replicas of a run."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def here(self) -> range:
        """The numbers of those in this process."""

    def mean(self, lists: Sequence[list[Tensor]], facts: Sequence[Facts]) -> list[Tensor]:
        """Return the mean over all replicas of each tensor; it stays as it is until the next call.

        Args:
            lists: for each replica that is here, its tensors, of float32 or float64.
            facts: what each of these says of itself; whether the tensors are finite and of the same shapes is seen here.

        Raises:
            RuntimeError: a replica does not answer, differs in what all have in common, or has numbers that are not finite.
        """


class InProcess:
    """All replicas in this process, each on any device. Two buffers of float32 (or float64) parameters are kept."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: tuple[Layout, Buffer, Buffer] | None = None

    @property
    def here(self) -> range:
        """The numbers of all."""
        return range(self.size)

    def mean(self, lists: Sequence[list[Tensor]], facts: Sequence[Facts]) -> list[Tensor]:
        """Return the mean; see `Group.mean`. That of one replica is what it has, whatever that is."""
        if self.size == 1:
            return lists[0]
        layout, total, buffer = self._kept = self._fitting(lists[0])
        told: dict[int, Facts] = {}
        for replica, (tensors, own) in enumerate(zip(lists, facts, strict=True)):
            if not layout.fits(tensors):
                told[replica] = own.seen(Layout(tensors, 1), True)
                continue
            told[replica] = own.seen(layout, (buffer if replica else total).fill(tensors))
            if replica:
                add_(total.parts, buffer.parts)
        check_all(told, lambda replica: f"replica {replica}")
        divide_(total.parts, self.size)
        return total.tensors

    def _fitting(self, tensors: list[Tensor]) -> tuple[Layout, Buffer, Buffer]:
        device = tensors[0].device if tensors else torch.device("cpu")
        if self._kept is not None and self._kept[0].fits(tensors) and self._kept[1].bytes.device == device:
            return self._kept
        layout = Layout(tensors, 1)
        return layout, Buffer(layout, device), Buffer(layout, device)


class OverRanks:
    """One replica on each rank of a process group; a rank's number in the group is that of its replica.

    An exchange is a message of 40 bytes to each other rank, with the facts, and then two collectives on one flat buffer: an
    all-to-all of slices, which every rank adds up in the order of the replicas, and an all-gather of the means. For a parameter
    a rank of n sends 2(n - 1)/n times 4 bytes (8 for float64), as in a ring all-reduce of float32, whose sums however depend on
    n and on the slices.

    Two buffers of float32 (or float64) parameters are kept.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._held_by_torch = weakref.ref(group)  # held here too it would outlive destroy_process_group(), with its threads
        self.size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._kept: tuple[Layout, Buffer, Buffer] | None = None

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._held_by_torch()
        if group is None:
            raise RuntimeError(
                "group: the process group of this optimizer was destroyed; make one anew, and load its state_dict()"
            )
        return group

    @property
    def here(self) -> range:
        """The rank's own."""
        return range(self._rank, self._rank + 1)

    def mean(self, lists: Sequence[list[Tensor]], facts: Sequence[Facts]) -> list[Tensor]:
        """Return the mean; see `Group.mean`."""
        (tensors,), (own,) = lists, facts
        layout, sent, received = self._kept = self._fitting(tensors)
        own = own.seen(layout, sent.fill(tensors))
        check_all(self._roll_call(own, sent.bytes.device), self._name)
        try:
            self._add_up(layout, sent.bytes, received.bytes)
        except RuntimeError as error:
            raise RuntimeError(
                f"replicas: the exchange after {own.steps} steps failed, although all were there when it began: "
                f"{_said(error)}. {REMEDY}"
            ) from error
        return received.tensors

    def _add_up(self, layout: Layout, sent: Tensor, received: Tensor) -> None:
        """Let ``received`` be the mean of what all ranks have ``sent``, which is overwritten."""
        dist.all_to_all_single(received, sent, group=self._group)
        total, *others = received.view(self.size, layout.slice_bytes)
        begin = self._rank * layout.slice_bytes
        parts = layout.parts(total, begin)
        for row in others:
            add_(parts, layout.parts(row, begin))
        divide_(parts, self.size)
        slices = sent.view(self.size, layout.slice_bytes)
        if _backend(self._group, sent.device) == "gloo":
            # Its all-gather allocates the result once more and copies it, which takes longer than the messages.
            slices.copy_(total)
            dist.all_to_all_single(received, sent, group=self._group)
        else:
            _all_gather(received, slices[0].copy_(total), self._group)

    def _fitting(self, tensors: list[Tensor]) -> tuple[Layout, Buffer, Buffer]:
        device = tensors[0].device if tensors else torch.device("cpu")
        device = device if _serves(self._group, device) else torch.device("cpu")
        if self._kept is not None and self._kept[0].fits(tensors) and self._kept[1].bytes.device == device:
            return self._kept
        layout = Layout(tensors, self.size)
        return layout, Buffer(layout, device), Buffer(layout, device)

    def _roll_call(self, facts: Facts, device: torch.device) -> dict[int, Facts]:
        """Return what each rank says of itself."""
        numbers = [to_int64(facts.seed) if name == "seed" else int(value) for name, value in facts._asdict().items()]
        sent = torch.tensor(numbers)
        if _serves(self._group, sent.device):
            received = self._messages(sent, facts.steps)
        else:  # as with NCCL, which ends the process where a rank is missing
            gathered = torch.empty(self.size * len(sent), dtype=sent.dtype, device=device)
            _all_gather(gathered, sent.to(device), self._group)
            received = list(gathered.view(self.size, len(sent)).cpu())
        told = {rank: Facts._make(numbers.tolist()) for rank, numbers in enumerate(received)}
        return {rank: facts._replace(seed=from_int64(facts.seed)) for rank, facts in told.items()}

    def _messages(self, sent: Tensor, steps: int) -> list[Tensor]:
        """Return what each rank has sent to all: pair by pair, so that one that does not answer is known by its number."""
        received = [sent.clone() for _ in range(self.size)]
        silent: dict[int, str] = {}
        works = []
        for rank in range(self.size):
            if rank == self._rank:
                continue
            try:
                works.append((rank, dist.irecv(received[rank], group=self._group, group_src=rank, tag=TAG)))
                works.append((rank, dist.isend(sent, group=self._group, group_dst=rank, tag=TAG)))
            except RuntimeError as error:
                silent[rank] = _said(error)
        for rank, work in works:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError as error:
                silent[rank] = _said(error)
        if silent:
            who = ", ".join(f"{self._name(rank)} ({said})" for rank, said in sorted(silent.items()))
            raise RuntimeError(f"replicas: no answer after {steps} steps from {who}. {REMEDY}")
        return received

    def _name(self, replica: int) -> str:
        rank = dist.get_global_rank(self._group, replica)
        return f"rank {rank}" if rank == replica else f"rank {rank} (replica {replica})"


#: What to do where the process group is broken; the step that could not be taken has changed nothing.
REMEDY = "Nothing has changed here; start all ranks again from the last checkpoint, as torchrun --max-restarts can"


def check_all(told: Mapping[int, Facts], name: Callable[[int], str]) -> None:
    """Refuse to go on where replicas differ or one has left the finite numbers; every replica comes to the same answer.

    Raises:
        RuntimeError: it names those replicas.
    """
    first = told[0]
    for field, words in DIFFERENCES.items():
        others: dict[int, list[str]] = defaultdict(list)
        for replica, facts in told.items():
            if (value := getattr(facts, field)) != getattr(first, field):
                others[value].append(name(replica))
        for value, names in others.items():
            said = words.format(theirs=value, others=_list(names), ours=getattr(first, field), first=name(0))
            raise RuntimeError(f"replicas: {said}. No replica has taken this step")
    if lost := [name(replica) for replica, facts in told.items() if not facts.finite]:
        raise RuntimeError(
            f"replicas: not all numbers are finite on {_list(lost)} after {first.steps} steps. No replica has taken this step: "
            "if its gradient alone was at fault, step() with another one goes on; if not, go back to the last checkpoint, "
            "with smaller steps or with gradients that are clipped"
        )


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _serves(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors on the device are exchanged from there; gloo has not all of it for others than the CPU's."""
    backend = _backend(group, device)
    return backend is not None and (device.type == "cpu" or backend != "gloo")


def _backend(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the name of what serves a device's tensors."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(",")).get(device.type)


def _all_gather(output: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.12
    gather(output, own, group=group)


def _said(error: BaseException) -> str:
    """Return the first sentence of what a backend says, without its place in the source."""
    return str(error).partition("] ")[2].partition(". ")[0] or str(error)
