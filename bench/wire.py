"""The bytes that ranks on this machine send, counted by the system: those of each process's sockets, those on the loopback."""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
#: Seconds after which what was sent is acknowledged and counted.
SETTLE = 0.02


def handed_to_tcp() -> int | None:
    """Return the bytes that this process's open TCP connections have sent, repeats left out; None where nothing tells."""
    if not hasattr(socket, "TCP_INFO") or not Path("/proc/self/fd").exists():
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
        except OSError:  # that of the listing itself
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                continue
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) < 216:  # Linux before 4.19
            return None
        sent, repeated = struct.unpack_from("QQ", info, 200)
        total += sent - repeated
    return total


def on_loopback() -> int | None:
    """Return the bytes that went over the loopback since the system started; None where nothing tells."""
    return int(LOOPBACK.read_text()) if LOOPBACK.exists() else None


def count_bytes(work: Callable[[], object], times: int = 3) -> dict[str, float | None]:
    """Return the bytes that a rank sends for ``work`` done once: a mean over the ranks and some times, by both counters.

    On the loopback an interval of the same length without work, before it, is taken off.
    """
    counters = (handed_to_tcp, on_loopback)
    dist.barrier()
    time.sleep(SETTLE)
    idle, began = [counter() for counter in counters], time.monotonic()
    time.sleep(5 * SETTLE)
    before, middle = [counter() for counter in counters], time.monotonic()
    for _ in range(times):
        work()
    time.sleep(SETTLE)
    after, end = [counter() for counter in counters], time.monotonic()
    means: list[torch.Tensor | None] = []
    for first, second, third in zip(idle, before, after, strict=True):
        if first is None or second is None or third is None:
            means.append(None)
            continue
        apart = (second - first) * (end - middle) / (middle - began)
        means.append(torch.tensor((third - second - apart) / times, dtype=torch.float64))
    for mean in means:
        if mean is not None:
            dist.all_reduce(mean)
    ranks = dist.get_world_size()
    tcp, loopback = (None if mean is None else float(mean) / ranks for mean in means)
    return {"tcp": tcp, "loopback": None if loopback is None else loopback / ranks}
