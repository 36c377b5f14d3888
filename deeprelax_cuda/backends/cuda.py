"""The CUDA backend: hand-written kernels, one launch for up to 288 tensors, on the stream that torch uses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from deeprelax_cuda.backends import tables
from deeprelax_cuda.clock import Clock
from deeprelax_cuda.native import missing
from deeprelax_cuda.native import module as _native
from deeprelax_cuda.steps import STORED, Scalars, Tensors

NAME = "cuda"

#: In place of a device's index: a step does everything but launch, which times the host's part of it.
NO_DEVICE = -1


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot serve parameters of that device and type, or None where it can."""
    if device.type != "cuda":
        return f"the cuda backend serves CUDA tensors, not {device.type}"
    if dtype not in STORED:
        return f"the cuda backend has no {dtype}"
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if missing is not None:
        return f"the native module was not built or does not load: {missing}"
    if not hasattr(_native, "cuda_unavailable"):
        return "the native module was built without CUDA code (DEEPRELAX_BUILD_CUDA=1 says why)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _no_kernels(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _no_kernels(index: int) -> str | None:
    return _native.cuda_unavailable(index) or None


class CudaPlan:
    """The native launches for a call's tensors: their arguments are ready but for gradients and scalars."""

    CAPTURABLE: ClassVar[bool] = True

    def __init__(self, tensors: Tensors) -> None:
        self._table = tables.make_table(tensors)
        device = tensors.params[0].device if tensors.params else torch.device("cpu")
        self._device = device if device.type == "cuda" else None

    def run(
        self,
        grads: Sequence[Tensor],
        scalars: Scalars,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        addresses: bytes | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Take the step; see `deeprelax_cuda.steps.Plan`."""
        if self._table is None:
            return
        index, stream = NO_DEVICE, 0
        if self._device is not None:
            current = torch.cuda.current_stream(self._device)
            index, stream = current.device_index, current.cuda_stream
        self._table.run_cuda(
            tables.gradient_addresses(grads) if addresses is None else addresses,
            scalars,
            0 if inv_scale is None else inv_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            None if clock is None else tables.native_clock(clock),
            index,
            stream,
        )


make_plan = CudaPlan


def gaussian(numel: int, *, seed: int, step: int, stream: int, offset: int, device: torch.device) -> Tensor:
    """Return the float32 normals of elements ``offset`` to ``offset + numel`` of a stream (the whole counter word)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    current = torch.cuda.current_stream(out.device)
    _native.cuda_gaussian(out.data_ptr(), numel, seed, step, stream, offset, current.device_index, current.cuda_stream)
    return out
