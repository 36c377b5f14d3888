"""Runs of a function on the ranks of a process group, each a process of its own; the functions are in `rank_programs`."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: A rank that waits for longer has lost the others.
PATIENCE = 60.0

# Forked from a server that has imported all and computed nothing: a rank starts at once, and without anybody's threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["deeprelax_cuda", "torch.distributed", "torch.nn.parallel", "numpy"])


def run_ranks(folder: Path, count: int, program: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """Return what ``program(rank, *args)`` returns on each rank; None of one that was killed.

    Raises:
        AssertionError: a rank raised, or did not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        _CONTEXT.Process(target=_work, args=(rank, count, str(folder), backend, program, args)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(2 * PATIENCE)
        if process.is_alive():
            for other in processes:
                other.kill()
            raise AssertionError(f"rank {rank} does not end")
    results = []
    for rank, process in enumerate(processes):
        path = folder / f"rank{rank}.pt"
        if process.exitcode and process.exitcode < 0:
            results.append(None)
            continue
        found = torch.load(path, weights_only=False)
        assert "raised" not in found, f"rank {rank}: {found['raised']}"
        results.append(found["returned"])
    return results


def _work(rank: int, count: int, folder: str, backend: str, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=PATIENCE),
        )
        found = {"returned": program(rank, *args)}
    except BaseException:  # pytest.fail among them
        found = {"raised": traceback.format_exc()}
    torch.save(found, f"{folder}/rank{rank}.pt")
