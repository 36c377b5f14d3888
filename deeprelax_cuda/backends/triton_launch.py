"""Starting Triton's kernels: which compiled one serves a launch, and the memory that launches and captured graphs read."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: How long this process has waited for each kernel, seconds; some milliseconds where Triton had it on disk.
compiled: list[float] = []


class Launch(NamedTuple):
    """A kernel by name, how many blocks of it, and its arguments, in their order.

    ``integers`` are int64 whatever they are, ``settled`` those for whose values a kernel is compiled. ``key`` tells apart what
    is compiled differently.
    """

    kernel: str
    blocks: int
    warps: int
    arguments: tuple[Any, ...]
    integers: tuple[int, ...]
    settled: tuple[Any, ...]
    key: Hashable


# Triton finds a compiled kernel by the types and values of all its arguments, which takes longer than to launch it: those that
# have been launched are kept here by device and key.
_ready: dict[Hashable, Any] = {}


def find(launch: Launch, device: torch.device) -> Any:
    """Return what launches the kernel if it has been launched before on the device, else None."""
    return _ready.get((device.index, launch.kernel, launch.key))


def start(launch: Launch, device: torch.device) -> None:
    """Start a kernel on the current stream of ``device``, which is the current device; on the CPU, interpret it.

    Raises:
        RuntimeError: see `check_capture`.
    """
    arguments = *launch.arguments, *launch.integers, *launch.settled
    if (ready := find(launch, device)) is not None:
        ready[launch.blocks, 1, 1](*arguments)
        return
    kernel = getattr(importlib.import_module("deeprelax_cuda.triton_kernels.kernels"), launch.kernel)
    if device.type == "cpu":
        kernel[launch.blocks,](*arguments)
        return
    check_capture(launch.kernel, launch.key, device)
    began = time.perf_counter()
    ready = kernel[launch.blocks,](*arguments, num_warps=launch.warps, enable_fp_fusion=False)
    _ready[device.index, launch.kernel, launch.key] = ready
    compiled.append(time.perf_counter() - began)


def check_capture(kernel: str, key: Hashable, device: torch.device) -> None:
    """Refuse what is to be captured in a graph before its kernel has been compiled and loaded, which a capture does not allow.

    Raises:
        RuntimeError: with what to do.
    """
    if capturing(device) and (device.index, kernel, key) not in _ready:
        raise RuntimeError(
            "a Triton kernel cannot be compiled or loaded while a CUDA graph is captured: take a step of each kind before, or "
            "call deeprelax_cuda.backends.warm_up"
        )


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one meanwhile."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """Whether what is done now on ``device``, which is the current device, goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- Memory -----------------------------------------------------------------------------------------------------------------
# A graph holds addresses, and nothing says when the last graph is gone. So what graphs read is kept for good: tables on the
# device, and the memory of the host that their copies read at each replay. Before torch 2.11 no pinned memory can be had during
# a capture, so some of it lies ready.

_read_by_graphs: dict[int, Tensor] = {}


def keep_for_graphs(*tensors: Tensor) -> None:
    """Never free the memory of these tensors."""
    _read_by_graphs.update((id(t), t) for t in tensors)


class _Reserve:
    """Pinned memory that lies ready for captures."""

    SMALLEST = 2**20  # bytes: the gradients' addresses of 131,072 tensors
    TABLES = 16  # as large as the largest so far

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._size = self.SMALLEST

    def refill(self, here: Tensor) -> None:
        """Get more where it is running out; ``here`` is a table that may be captured later."""
        with self._lock:
            self._size = max(self._size, self.TABLES * _padded(here))
            if self._free.numel() < self._size // 2:
                self._free = torch.empty(self._size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def take(self, here: Tensor) -> Tensor:
        """Return a pinned copy, which is kept for graphs."""
        with self._lock:
            if _padded(here) > self._free.numel():
                pinned = here.pin_memory()
            else:
                pinned, self._free = self._free[: here.nbytes].view(here.dtype).copy_(here), self._free[_padded(here) :]
            keep_for_graphs(pinned)
        return pinned


def _padded(here: Tensor) -> int:
    return -(-here.nbytes // 16) * 16


_reserve = _Reserve()


def upload(here: Tensor, device: torch.device) -> Tensor:
    """Copy a one-dimensional tensor of the CPU to the current device without waiting; in a capture, the graph has the copy."""
    if device.type == "cpu":
        return here
    if capturing(device):
        pinned = _reserve.take(here)
    else:
        _reserve.refill(here)
        pinned = here.pin_memory()
    return pinned.to(device, non_blocking=True)
