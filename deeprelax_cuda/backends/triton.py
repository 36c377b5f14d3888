"""The Triton backend: one launch for any number of tensors, on NVIDIA and AMD GPUs, compiled on first use without a compiler.

The kernels are those of `deeprelax_cuda.triton_kernels`, which are imported, and Triton with them, when this backend is first
asked to serve. With TRITON_INTERPRET=1 in the environment they run in numpy, for CPU tensors: to test them, not to train.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.clock import Clock
from deeprelax_cuda.noise import to_int64
from deeprelax_cuda.steps import STORED, Scalars, Tensors

NAME = "triton"

#: How long this process has waited for each kernel, seconds; some milliseconds where Triton had it on disk.
compiled: list[float] = []


# ---- Whether it can serve ---------------------------------------------------------------------------------------------------


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Return the module of the kernels, or else why there is none: a Triton that is broken breaks nobody else."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    except Exception as error:
        return None, f"triton cannot be imported: {type(error).__name__}: {error}"
    try:
        return importlib.import_module("deeprelax_cuda.triton_kernels.kernels"), None
    except Exception as error:
        return None, f"the triton kernels cannot be loaded: {type(error).__name__}: {error}"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when they were loaded."""
    kernels, _ = _load()
    return kernels is not None and not hasattr(kernels.step_kernel, "device_caches")


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot serve parameters of that device and type, or None where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"the triton backend serves CUDA and HIP tensors, not {device.type}"
    if dtype not in STORED:
        return f"the triton backend has no {dtype}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return "the triton backend serves CPU tensors only with TRITON_INTERPRET=1, to test its kernels"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA or HIP device"
    if reason := _load()[1]:
        return reason
    if interpreted() != (device.type == "cpu"):
        return f"TRITON_INTERPRET was {'' if interpreted() else 'not '}set when the kernels were loaded"
    if device.type == "cpu":
        return None
    return _no_driver(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _no_driver(index: int) -> str | None:
    try:
        with torch.cuda.device(index):
            target = importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:
        return f"triton cannot use the device: {type(error).__name__}: {error}"
    if target.backend == "cuda" and target.arch < 80:
        return f"triton compiles for compute capability 8.0 and later, this device has {target.arch / 10}"
    return None


# ---- Launching --------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel by name, how many blocks of it, and its arguments in their order: ``integers`` are int64 whatever they are.

    ``settled`` are those for whose values a kernel is compiled.
    """

    kernel: str
    blocks: int
    warps: int
    arguments: tuple[Any, ...]
    integers: tuple[int, ...]
    settled: tuple[Any, ...]


_ready: dict[Any, Any] = {}


def _launch(launch: Launch, device: torch.device) -> None:
    """Start a kernel on the current stream of a device.

    Triton finds a compiled kernel by the types and values of all its arguments, which takes longer than to launch it; so those
    that are ready are kept here by what can differ.
    """
    name, blocks, warps, arguments, integers, settled = launch
    kernel = getattr(_load()[0], name)
    if device.type == "cpu":
        kernel[blocks,](*arguments, *integers, *settled)
        return
    key = name, device.index, settled, tuple(map(_type_of, arguments))
    with _on(device):
        if (ready := _ready.get(key)) is not None:
            ready[blocks, 1, 1](*arguments, *integers, *settled)
            return
        began = time.perf_counter()
        _ready[key] = kernel[blocks,](*arguments, *integers, *settled, num_warps=warps, enable_fp_fusion=False)
        compiled.append(time.perf_counter() - began)


def _type_of(argument: Any) -> Any:
    """Return what of an argument a kernel is compiled for; an int, which is the bits of a float64, has 32 bits where it can."""
    if isinstance(argument, int):
        return -(2**31) <= argument < 2**31
    return argument.dtype if isinstance(argument, Tensor) else type(argument)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _target(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# What graphs that have been captured read, and nothing says when the last of them is gone: tables on the device, and the memory
# of the host that the copies in a graph read at each replay.
_read_by_graphs: dict[int, Tensor] = {}


def _keep_for_graphs(*tensors: Tensor) -> None:
    _read_by_graphs.update((id(t), t) for t in tensors)


def _upload(values: array[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an array as a tensor on the device, without waiting for the copy, which in capture becomes a part of the graph."""
    here = torch.frombuffer(values, dtype=dtype)
    if device.type == "cpu":
        return here
    if _capturing(device):
        _keep_for_graphs(here)
    else:
        here = here.pin_memory()
    return here.to(device, non_blocking=True)


class TritonPlan:
    """The table of a call's tensors, on the device from the first step on.

    Only the gradients' addresses change from step to step: they have a table of their own, which is written anew where one of
    them has. A step that is captured has its own, that no later step writes to.
    """

    CAPTURABLE: ClassVar[bool] = True

    def __init__(self, tensors: Tensors, target: str | None = None) -> None:
        """``target``: what the launches are for in place of the tensors' device, see `sizes.size_of`."""
        from deeprelax_cuda.triton_kernels.sizes import size_of
        from deeprelax_cuda.triton_kernels.table import rows_of

        first = tensors.params[0] if tensors.params else torch.empty(0)
        self._device, self._dtype = first.device, first.dtype
        self._block, self._warps = size_of(first.element_size(), target or _target(first.device))
        rows, counts = rows_of(tensors, self._block)
        self._rows = array("q", rows)
        self._blocks = array("i", torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).tolist())
        self._has_master = bool(tensors.masters)
        self._pitched = any(p.numel() > place.run for p, place in zip(tensors.params, tensors.places, strict=True))
        self._table: tuple[Tensor, Tensor] | None = None
        self._grads: tuple[bytes, Tensor] | None = None
        self._stream: torch.cuda.Stream | None = None

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
        for launch in self.launches(grads, scalars, inv_scale, found_inf, addresses, clock):
            _launch(launch, self._device)

    def launches(
        self,
        grads: Sequence[Tensor],
        scalars: Scalars,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        addresses: bytes | None = None,
        clock: Clock | None = None,
    ) -> Iterator[Launch]:
        """Yield what `run` launches."""
        if clock is not None:
            yield self._advance(clock, scalars.inner, found_inf)
        elif not (scalars.inner or scalars.outer):
            return
        if self._blocks:
            if addresses is None:
                addresses = array("Q", map(Tensor.data_ptr, grads)).tobytes()
            yield self._step(addresses, scalars, inv_scale, found_inf, clock)
            self._share_tables()

    def _step(
        self, addresses: bytes, sc: Scalars, inv_scale: Tensor | None, found_inf: Tensor | None, clock: Clock | None
    ) -> Launch:
        inner, langevin = sc.inner, sc.family == "langevin"
        outer = sc.outer or clock is not None  # with a clock, it may be one
        noisy = sc.s != 0.0 and (inner or not langevin)
        stochastic = sc.rounding == "stochastic" and self._dtype == torch.bfloat16
        plain_mean = clock is not None and clock.period_steps is not None
        momentum = inner and langevin and sc.mu != 0.0

        def number(value: float, plays: bool) -> Any:
            return self._encoded(value) if plays else None

        rows, blocks = self._tables()
        arguments = (
            rows,
            self._table_of(addresses) if inner else None,
            blocks,
            None if clock is None else clock.numbers,
            inv_scale if inner else None,
            found_inf,
            number(sc.eta, inner and langevin),
            number(sc.k, inner and langevin and sc.k != 0.0 and clock is None),
            number(sc.s, noisy),
            number(sc.a, inner and sc.a != 0.0 and not plain_mean),
            number(sc.c, inner and not langevin and sc.c != 0.0),
            number(sc.wd, inner and sc.wd != 0.0),
            number(sc.mu, momentum),
            number(sc.damp1, momentum),
            number(sc.lr, outer and clock is None),
            number(sc.mu_o, outer and sc.mu_o != 0.0),
            number(sc.wd_o, outer and sc.wd_o != 0.0),
            number(sc.kr, outer and sc.kr != 0.0),
        )
        settled = (
            _stored(self._dtype),
            self._block,
            langevin,
            inner,
            sc.outer,
            sc.maximize,
            momentum and sc.nesterov,
            not momentum or sc.coupling_in_momentum,  # without a momentum the coupling has one place
            outer and sc.mu_o != 0.0 and sc.nesterov_o,
            sc.a == 1.0 and not plain_mean,
            plain_mean,
            stochastic,
            self._has_master,
            self._pitched and (noisy or stochastic),
        )
        return Launch("step_kernel", len(self._blocks), self._warps, arguments, (to_int64(sc.seed), sc.step), settled)

    def _advance(self, clock: Clock, inner: bool, found_inf: Tensor | None) -> Launch:
        addresses = clock.step, clock.position, clock.outer_steps, clock.gamma, clock.lr, clock.period_steps, clock.numbers
        rule = clock.rule.inner_steps, *map(_bits, clock.rule[1:])
        settled = _stored(self._dtype), inner, clock.counts
        return Launch("advance_kernel", 1, 1, (*addresses, found_inf), rule, settled)

    def _encoded(self, value: float) -> float | int:
        """Return a scalar as a kernel takes it: Triton's own are float32, so one of float64 goes as its bits."""
        return _bits(value) if self._dtype == torch.float64 else value

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Return the rows and which of them each block works on, on the device."""
        table = self._table
        if table is None:
            table = (
                _upload(self._rows, torch.int64, self._device),
                _upload(self._blocks, torch.int32, self._device),
            )
            if not _capturing(self._device):  # what is captured is not there yet
                self._table = table
        elif _capturing(self._device):
            _keep_for_graphs(*table)
        return table

    def _table_of(self, addresses: bytes) -> Tensor:
        """Return the addresses of the gradients on the device."""
        if self._grads is not None and self._grads[0] == addresses and not _capturing(self._device):
            return self._grads[1]
        table = _upload(array("q", addresses), torch.int64, self._device)
        if not _capturing(self._device):
            self._grads = addresses, table
        return table

    def _share_tables(self) -> None:
        """Have torch know of all streams that read the tables, so that it gives their memory to nobody too early."""
        if self._device.type == "cpu" or _capturing(self._device):
            return
        current = torch.cuda.current_stream(self._device)
        if self._stream is not None and current != self._stream:
            for table in (*(self._table or ()), *(self._grads or ())[1:]):
                table.record_stream(current)
        self._stream = current


make_plan = TritonPlan


def _bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@functools.cache
def _stored(dtype: torch.dtype) -> Any:
    """Return Triton's name of a stored type; a bfloat16 goes as its bits."""
    language = importlib.import_module("triton.language")
    return language.uint16 if dtype == torch.bfloat16 else getattr(language, str(dtype).removeprefix("torch."))


def gaussian(numel: int, *, seed: int, step: int, stream: int, offset: int, device: torch.device) -> Tensor:
    """Return the float32 normals of elements ``offset`` to ``offset + numel`` of a stream (the whole counter word)."""
    from deeprelax_cuda.triton_kernels.sizes import size_of

    out = torch.empty(numel, dtype=torch.float32, device=device)
    block, warps = size_of(4, _target(out.device))
    if numel:
        blocks = -(-(numel + offset % 4) // block)
        integers = numel, to_int64(seed), step, stream, offset
        _launch(Launch("gaussian_kernel", blocks, warps, (out,), integers, (block,)), out.device)
    return out
