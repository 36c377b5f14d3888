"""Who trains: this process alone, with all replicas, or the ranks that torchrun has started, with one replica each.

The first rank reads and writes files, validates, and is the only one that is heard.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.train.stopping import Stopped

T = TypeVar("T")


class Broken(RuntimeError):
    """The replicas cannot go on together: a rank is gone, or one has numbers that are not finite. What was saved is left."""


class CommonError(UsageError):
    """One that every rank raises, so that it is enough if one says it."""


class Alone:
    """This process alone, which agrees with itself."""

    rank = 0
    size = 1
    group: dist.ProcessGroup | None = None
    #: The start of a command line like this one.
    launcher = "deeprelax"

    @property
    def restarts(self) -> int:
        """How often torchrun has started this job again, after a rank had failed."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def device(self, name: str) -> torch.device:
        """Return the device of this process where the settings say ``name``."""
        return torch.device(name)

    def homes(self, replicas: int) -> list[range]:
        """Return the numbers of the replicas on each rank, of so many in all."""
        return [range(replicas)]

    def gather(self, own: T) -> list[T]:
        """Return what each rank has, on every rank."""
        return [own]

    def collect(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the states, which may be large, of all ranks on the first one; nothing on the others."""
        return [own]

    def scatter(self, make: Callable[[], Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """Return this rank's own of the states that ``make`` returns on the first one; see `from_first` for its errors."""
        return make()[0]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every rank what ``make`` returns on the first one, and raise what it raises of `UsageError`, `Stopped`."""
        return make()

    def together(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns on each rank, or raise on all the `UsageError` that it raises on some."""
        return make()

    def agree(self, optimizer: Optimizer, signum: int | None, due: bool) -> tuple[int | None, bool]:
        """Return the signal to stop by, if one has come on any rank, and whether it is time to save, on the first one's clock.

        Over ranks that waits for the end of a period, of `AGREE_EVERY` steps or more, when they wait for each other anyway.
        """
        return signum, due


ALONE = Alone()
#: Bytes of the first message of what ranks tell each other, and of the only one for little: each costs a latency.
SHORT = 512
#: That of the byte by which a rank says that it has received a longer message.
RECEIVED = 1
#: Of a method whose periods are shorter, the steps after which the ranks agree.
AGREE_EVERY = 25


class Ranks(Alone):
    """The ranks of the default process group. They talk in a star around the first one, whose parts know each other by rank."""

    def __init__(self) -> None:
        self.rank, self.size, self.group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        nodes = f"--nnodes {self.size // local} " if local < self.size else ""
        self.launcher = f"torchrun {nodes}--nproc-per-node {local} -m deeprelax_cuda"

    def device(self, name: str) -> torch.device:
        return torch.device(name, int(os.environ.get("LOCAL_RANK", self.rank))) if name == "cuda" else torch.device(name)

    def homes(self, replicas: int) -> list[range]:
        return [range(rank, rank + 1) for rank in range(self.size)]

    def gather(self, own: T) -> list[T]:
        if self.rank:
            self._send(0, pickle.dumps(own))
            found: list[T] = pickle.loads(self._receive(0))
            return found
        all_own = [own, *(pickle.loads(self._receive(rank)) for rank in self._others)]
        self._tell(pickle.dumps(all_own))
        return all_own

    def collect(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        if self.rank:
            self._send(0, _packed(own))
            return []
        return [own, *(_unpacked(self._receive(rank)) for rank in self._others)]

    def scatter(self, make: Callable[[], Sequence[dict[str, Any]]]) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        self.from_first(lambda: parts.extend(make()))
        if self.rank:
            return _unpacked(self._receive(0))
        for rank in self._others:
            self._send(rank, _packed(parts[rank]))
        return parts[0]

    def from_first(self, make: Callable[[], T]) -> T:
        outcome: tuple[str, Any]
        if self.rank:
            outcome = pickle.loads(self._receive(0))
        else:
            try:
                outcome = "made", make()
            except UsageError as error:
                outcome = "refused", str(error)
            except Stopped as stopped:
                outcome = "stopped", stopped.signum
            self._tell(pickle.dumps(outcome))
        kind: str = outcome[0]
        value: Any = outcome[1]
        if kind == "refused":
            raise CommonError(value)
        if kind == "stopped":
            raise Stopped(value)
        made: T = value
        return made

    def together(self, make: Callable[[], T]) -> T:
        refusal = None
        try:
            result = make()
        except UsageError as error:
            refusal = str(error)
        refusals = {rank: said for rank, said in enumerate(self.gather(refusal)) if said is not None}
        if len(refusals) == self.size and len(set(refusals.values())) == 1:
            raise CommonError(refusal)
        if refusals:
            rank, said = next(iter(refusals.items()))
            raise CommonError(f"rank {rank}: {said}")
        return result

    def agree(self, optimizer: Optimizer, signum: int | None, due: bool) -> tuple[int | None, bool]:
        # Only methods with replicas train over ranks.
        length, step = optimizer.param_groups[0]["inner_steps"], optimizer.param_groups[0]["step"]
        if not optimizer.at_outer_boundary or step % (-(-AGREE_EVERY // length) * length):  # type: ignore[attr-defined]
            return None, False
        wishes = self.gather((signum, due))
        return next((number for number, _ in wishes if number is not None), None), wishes[0][1]

    @property
    def _others(self) -> range:
        return range(1, self.size)

    def _tell(self, content: bytes) -> None:
        for rank in self._others:
            self._send(rank, content)

    def _send(self, rank: int, content: bytes) -> None:
        framed = bytearray(len(content).to_bytes(8, "little") + content)
        framed += bytes(max(0, SHORT - len(framed)))
        message = torch.frombuffer(framed, dtype=torch.uint8)
        with self._answering(rank):
            dist.send(message[:SHORT], rank)
            if len(message) > SHORT:
                # gloo does not wake who is in the middle of sending to a rank that is lost, but it does who receives from it.
                received = dist.irecv(torch.empty(1, dtype=torch.uint8), rank, tag=RECEIVED)
                sent = dist.isend(message[SHORT:], rank)
                for work in (received, sent):
                    if work is not None:
                        work.wait()

    def _receive(self, rank: int) -> bytes:
        message = torch.empty(SHORT, dtype=torch.uint8)
        with self._answering(rank):
            dist.recv(message, rank)
            begin = message.numpy().tobytes()
            length = int.from_bytes(begin[:8], "little")
            rest = torch.empty(max(0, 8 + length - SHORT), dtype=torch.uint8)
            if len(rest):
                dist.recv(rest, rank)
                dist.send(torch.ones(1, dtype=torch.uint8), rank, tag=RECEIVED)
        return begin[8 : 8 + length] + rest.numpy().tobytes()

    @contextlib.contextmanager
    def _answering(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = ", which may have ended because another one was lost, and then says so" if self.rank else ""
            raise Broken(f"no answer from rank {rank}{why}: start all ranks again, from the last checkpoint") from error


def _packed(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


#: What torchrun tells a rank; a scheduler of jobs may set one or the other, which starts no ranks.
STARTED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@contextlib.contextmanager
def joined() -> Iterator[Alone]:
    """Be one of the ranks that the environment tells of, as torchrun sets it, or alone where there are none.

    All ranks but the first are silent meanwhile.
    """
    if not os.environ.keys() >= STARTED or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    from torch.distributed.distributed_c10d import PrefixStore  # here, as not every torch has it
    from torch.distributed.rendezvous import rendezvous

    found, rank, size = next(rendezvous("env://"))
    # Without --standalone torchrun leaves ranks that it starts again the old store, with the addresses of those that are gone.
    store = PrefixStore(f"start {ALONE.restarts}", found)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield Ranks()
    finally:
        dist.destroy_process_group()
