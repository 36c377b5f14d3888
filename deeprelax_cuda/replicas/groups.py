"""Where replicas live, and how they come to their mean: all in this process, or one on each rank of a process group.

Before anything of a replica changes, all say how far they are and whether their numbers are finite. Then the mean is computed,
which every replica gets with the same bits, in one process or over ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deeprelax_cuda.noise import to_int64
from deeprelax_cuda.replicas.layout import Layout, add_, digest_of, divide_, is_finite, shapes_of

#: That of the messages before an exchange, for process groups that are talked over otherwise too.
TAG = 0x6472


class Facts(NamedTuple):
    """What replicas must have in common when they exchange, and whether the numbers of one are finite."""

    steps: int
    seed: int
    inner_steps: int
    parameters: int
    finite: bool


#: What is said where replicas differ in one of them.
DIFFERENCES = {
    "steps": "{theirs} steps taken on {others}, {ours} on {first}: were some skipped, or another checkpoint loaded?",
    "seed": "seed {theirs} on {others}, {ours} on {first}: pass that of the run, from which each replica derives its own.",
    "inner_steps": "inner_steps={theirs} on {others}, {ours} on {first}.",
    "parameters": "other parameters on {others} than on {first}, or others that have had a gradient.",
}


class Group(Protocol):
    """The replicas of a run."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def here(self) -> range:
        """The numbers of those in this process."""

    def mean(self, lists: Sequence[list[Tensor]], facts: Facts) -> list[Tensor]:
        """Return the mean over all replicas of each tensor; it stays as it is until the next call.

        Args:
            lists: for each replica that is here, its tensors, of float32 or float64.
            facts: what the replicas here say of themselves; "parameters" and "finite" are found out from the tensors.

        Raises:
            RuntimeError: a replica does not answer, differs in what all have in common, or has numbers that are not finite.
        """


class InProcess:
    """All replicas in this process, each on any device."""

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def here(self) -> range:
        """The numbers of all."""
        return range(self.size)

    def mean(self, lists: Sequence[list[Tensor]], facts: Facts) -> list[Tensor]:
        """Return the mean; see `Group.mean`."""
        layout = Layout(lists[0], 1)
        device = lists[0][0].device if lists[0] else torch.device("cpu")
        told: dict[int, Facts] = {}
        total = layout.new_buffer(device)
        buffer = total
        for replica, tensors in enumerate(lists):
            shapes = shapes_of(tensors)
            fits, finite = shapes == layout.shapes, True
            if fits:
                torch._foreach_copy_(layout.views(buffer), tensors)
                finite = is_finite(layout.parts(buffer))
                if replica:
                    add_(layout.parts(total), layout.parts(buffer))
                elif self.size > 1:
                    buffer = layout.new_buffer(device)
            told[replica] = facts._replace(parameters=digest_of(shapes), finite=finite)
        check_all(told, lambda replica: f"replica {replica}")
        divide_(layout.parts(total), self.size)
        return layout.views(total)


class OverRanks:
    """One replica on each rank of a process group; a rank's number in the group is that of its replica.

    An exchange is a message of 40 bytes to each other rank, with the facts, and then two collectives on one flat buffer: an
    all-to-all of slices, which every rank adds up in the order of the replicas, and an all-gather of the means. For a byte of
    parameters a rank of n sends 2(n - 1)/n bytes, as in a ring all-reduce, whose sums however depend on n and on the slices.

    Two buffers as long as the parameters are kept between exchanges.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        if self._rank < 0:
            raise ValueError("group: expected one that this rank belongs to")
        self._buffers: tuple[Layout, int, Tensor, Tensor] | None = None

    @property
    def here(self) -> range:
        """The rank's own."""
        return range(self._rank, self._rank + 1)

    def mean(self, lists: Sequence[list[Tensor]], facts: Facts) -> list[Tensor]:
        """Return the mean; see `Group.mean`."""
        (tensors,) = lists
        layout, digest, sent, received = self._prepare(tensors)
        torch._foreach_copy_(layout.views(sent), tensors)
        facts = facts._replace(parameters=digest, finite=is_finite(layout.parts(sent)))
        check_all(self._roll_call(facts, sent.device), self._name)
        try:
            dist.all_to_all_single(received, sent, group=self._group)
            begin = self._rank * layout.slice_bytes
            rows = received.view(self.size, layout.slice_bytes)
            own = sent[begin : begin + layout.slice_bytes].copy_(rows[0])
            for row in rows[1:]:
                add_(layout.parts(own, begin), layout.parts(row, begin))
            divide_(layout.parts(own, begin), self.size)
            mean = self._gather(own, sent, rows)
        except RuntimeError as error:
            raise RuntimeError(
                f"replicas: the exchange after {facts.steps} steps failed, although all ranks were there when it began: "
                f"{_said(error)}. {REMEDY}"
            ) from error
        return layout.views(mean)

    def _gather(self, own: Tensor, sent: Tensor, rows: Tensor) -> Tensor:
        """Return the slices of all ranks, of which this rank's is in ``sent``; both buffers are written."""
        received = rows.view(-1)
        if _backend(self._group, own.device) == "gloo":
            # Its all-gather allocates the result once more and copies it, which takes longer than the messages.
            rows.copy_(own)
            dist.all_to_all_single(sent, received, group=self._group)
            return sent
        _all_gather(received, own, self._group)
        return received

    def _prepare(self, tensors: list[Tensor]) -> tuple[Layout, int, Tensor, Tensor]:
        """Return the layout of the tensors, its digest, and two buffers."""
        device = tensors[0].device if tensors else torch.device("cpu")
        device = device if _serves(self._group, device) else torch.device("cpu")
        if self._buffers is None or self._buffers[0].shapes != shapes_of(tensors) or self._buffers[2].device != device:
            layout = Layout(tensors, self.size)
            buffers = layout.new_buffer(device), layout.new_buffer(device)
            self._buffers = layout, digest_of(layout.shapes), *buffers
        return self._buffers

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
        return {rank: Facts._make(told.tolist()) for rank, told in enumerate(received)}

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
REMEDY = "Nothing has changed here; start all ranks again from the last checkpoint, as torchrun --max-restarts does"


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
            raise RuntimeError(f"replicas: {said} No replica has taken this step; start all again from one checkpoint")
    if lost := [name(replica) for replica, facts in told.items() if not facts.finite]:
        raise RuntimeError(
            f"replicas: not all numbers are finite on {_list(lost)} after {first.steps} steps. No replica has taken this step: "
            "if its gradient alone was at fault, step() with another one goes on; if not, go back to the last checkpoint, "
            "with a smaller inner_lr or with gradients that are clipped"
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
