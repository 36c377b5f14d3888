"""The C++ backend for CPU tensors: SIMD chosen at run time, as many threads as torch uses, one native call for all tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from deeprelax_cuda.backends import tables
from deeprelax_cuda.clock import Clock
from deeprelax_cuda.native import missing
from deeprelax_cuda.native import module as _native
from deeprelax_cuda.steps import STORED, Scalars, Tensors

NAME = "cpu"

#: What the native module may have been compiled for, the preferred first.
INSTRUCTION_SETS = ("avx512", "avx2", "portable")


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot serve parameters of that device and type, or None where it can."""
    if device.type != "cpu":
        return f"the cpu backend serves CPU tensors, not {device.type}"
    if dtype not in STORED:
        return f"the cpu backend has no {dtype}"
    if missing is not None:
        return f"the native module was not built or does not load: {missing}"
    return None


class CpuPlan:
    """A native table of the addresses of a call's tensors."""

    CAPTURABLE: ClassVar[bool] = False

    def __init__(self, tensors: Tensors) -> None:
        self._table = tables.make_table(tensors)

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
        self._table.run_cpu(
            tables.gradient_addresses(grads) if addresses is None else addresses,
            scalars,
            0 if inv_scale is None else inv_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            None if clock is None else tables.native_clock(clock),
            torch.get_num_threads(),
        )


make_plan = CpuPlan


def gaussian(numel: int, *, seed: int, step: int, stream: int, offset: int, device: torch.device) -> Tensor:
    """Return the float32 normals of elements ``offset`` to ``offset + numel`` of a stream (the whole counter word)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    _native.gaussian(out.data_ptr(), numel, seed, step, stream, offset, torch.get_num_threads())
    return out


def build_info() -> dict[str, Any]:
    """Return how the native module was built and which instruction set it uses; empty where it is missing."""
    if _native is None:
        return {}
    return {**_native.build_info(), "instruction_set": _native.instruction_set()}


def instruction_sets() -> list[str]:
    """Return the instruction sets that can be used here, the preferred first; none where the native module is missing."""
    if _native is None:
        return []
    before = _native.instruction_set()
    usable = [name for name in INSTRUCTION_SETS if _native.use_instruction_set(name)]
    _native.use_instruction_set(before)
    return usable


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one of `instruction_sets` meanwhile, in the whole process."""
    before = _native.instruction_set()
    if not _native.use_instruction_set(name):
        raise ValueError(f"instruction set: expected one of {', '.join(instruction_sets())}, got {name}")
    try:
        yield
    finally:
        _native.use_instruction_set(before)
