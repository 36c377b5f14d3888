"""What the ranks of the tests of `deeprelax train` run: the command itself, with a fault on one of them, or talk among them."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from deeprelax_cuda.cli import UsageError, main
from deeprelax_cuda.train.data import Batches
from deeprelax_cuda.train.ranks import SHORT, Broken, CommonError, Ranks
from deeprelax_cuda.train.stopping import Stopped

#: Of texts around what fits into the first message, with what they are packed into.
LENGTHS = (*range(470, 515), 5000)
#: The gradient evaluation with the fault, on rank 1.
AT = 30


def be_rank(rank: int, port: int, folder: Path) -> None:
    """Be one of two ranks, with what torchrun sets, and say everything into a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr = (folder / f"rank{rank}.txt").open("w", buffering=1)


def command(options: list[str], fault: str = "") -> int:
    """Run `deeprelax train` as a rank, the second one with a fault."""
    real, rank = Batches.__getitem__, int(os.environ["RANK"])

    def batch(batches: Batches, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = real(batches, step)
        if step == AT and rank == 1:
            if fault == "raises":
                raise ArithmeticError("the data are gone")
            inputs = inputs * torch.nan
        return inputs, targets

    if fault:
        Batches.__getitem__ = batch  # type: ignore[method-assign]
    return main(["train", *options])


def example(path: str, folder: Path) -> int:
    """Run the example as a rank."""
    runpy.run_path(path)["main"](folder)
    return 0


def work(rank: int, port: int, folder: Path, program: Callable[..., int], *args: Any) -> None:
    """Run a program as one of two ranks."""
    be_rank(rank, port, folder)
    sys.exit(program(*args))


def talk(rank: int) -> dict[str, Any]:
    """Use all ways in which ranks talk; return what came of each."""
    ranks, found = Ranks(), {}
    found["gathered"] = ranks.gather({"rank": rank, "text": "x" * 1000 * rank})
    collected = ranks.collect({"rank": rank, "t": torch.full((5000,), float(rank), dtype=torch.float64)})
    found["collected"] = [(state["rank"], state["t"].sum().item(), state["t"].dtype) for state in collected]
    parts = [{"part": torch.full((3,), i)} for i in range(ranks.size)]
    found["scattered"] = ranks.scatter(lambda: parts if rank == 0 else [])["part"].tolist()
    for length in LENGTHS:
        found[f"of {length}"] = len(ranks.from_first(lambda length=length: "y" * length))  # type: ignore[misc]
    found["from first"] = ranks.from_first(lambda: rank)
    found["together"] = ranks.together(lambda: 10 * rank)

    def refuse(*who: int, same: bool = True) -> int:
        if rank in who:
            raise UsageError("--x: no" if same else f"--x: not on {rank}")
        return rank

    def stop() -> None:
        raise Stopped(15)

    attempts = {
        "first refuses": lambda: ranks.from_first(lambda: refuse(0)),
        "scatter refuses": lambda: ranks.scatter(lambda: refuse(0)),  # type: ignore[arg-type,return-value]
        "first stops": lambda: ranks.from_first(stop),
        "all refuse": lambda: ranks.together(lambda: refuse(0, 1, 2)),
        "one refuses": lambda: ranks.together(lambda: refuse(2)),
        "all differ": lambda: ranks.together(lambda: refuse(0, 1, 2, same=False)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (CommonError, Stopped) as error:
            found[name] = f"{type(error).__name__}: {error}"

    class Optimizer:
        at_outer_boundary = False
        param_groups: ClassVar = [{"inner_steps": 10, "step": 29}]

    found["within a period"] = ranks.agree(Optimizer(), 2, True)  # type: ignore[arg-type]
    Optimizer.at_outer_boundary, Optimizer.param_groups = True, [{"inner_steps": 10, "step": 20}]
    found["after a short period"] = ranks.agree(Optimizer(), 2, True)  # type: ignore[arg-type]
    Optimizer.param_groups = [{"inner_steps": 10, "step": 60}]
    wishes = [(None, False), (15 if rank == 1 else None, False), (None, rank == 0), (None, rank == 1)]
    found["agreed"] = [ranks.agree(Optimizer(), *wish) for wish in wishes]  # type: ignore[arg-type]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.gather(0)
    except Broken as broken:
        found["after a rank has gone"] = str(broken)
    return found


def lost_while_receiving(rank: int) -> tuple[str, float]:
    """Send rank 0 what it does not live to receive; say what is said, and after how many seconds."""
    ranks = Ranks()
    begin = time.monotonic()
    if rank == 0:
        real = dist.recv

        def recv(message: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(message) > SHORT:
                threading.Timer(0.002, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return real(message, *args, **kwargs)

        with mock.patch.object(dist, "recv", recv):
            ranks.collect({})
        return "not lost", 0.0
    with pytest.raises(Broken) as caught:
        ranks.collect({"large": torch.zeros(50_000_000)})
    return str(caught.value), time.monotonic() - begin
