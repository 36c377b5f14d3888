"""The Triton backend: one launch for any number of tensors, on NVIDIA and AMD GPUs, compiled on first use; no nvcc is needed.

The kernels are those of `deeprelax_cuda.triton_kernels`, which are imported, and Triton with them, when this backend is first
asked to serve. With TRITON_INTERPRET=1 in the environment they run in numpy, for CPU tensors: to test them, not to train.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deeprelax_cuda.backends.triton_launch import Launch, capturing, check_capture, compiled, keep_for_graphs, on, start, upload
from deeprelax_cuda.clock import Clock, Law, Rule
from deeprelax_cuda.noise import to_int64
from deeprelax_cuda.steps import STORED, Scalars, Tensors

__all__ = ["NAME", "TritonPlan", "compiled", "gaussian", "interpreted", "make_plan", "unavailable"]

NAME = "triton"


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


# ---- Steps ------------------------------------------------------------------------------------------------------------------


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

        first = tensors.params[0] if tensors.params else torch.empty(0, device="cpu")
        self._device, self._dtype = first.device, first.dtype
        self._block, self._warps = size_of(first.element_size(), target or _target(first.device))
        rows, counts = rows_of(tensors, self._block)
        # On the CPU, whatever torch.set_default_device says.
        self._rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self._blocks = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu")).to(torch.int32)
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
        with on(self._device):
            for launch in self.launches(grads, scalars, inv_scale, found_inf, addresses, clock):
                start(launch, self._device)
            if self._device.type == "cuda":
                self._share_tables()

    def launches(
        self,
        grads: Sequence[Tensor],
        scalars: Scalars,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        addresses: bytes | None = None,
        clock: Clock | None = None,
    ) -> Iterator[Launch]:
        """Yield what `run` launches; the plan's device is the current one."""
        if clock is not None:
            yield self._advance(clock, scalars, found_inf)
        if self._blocks.numel() and (scalars.inner or _may_end(scalars, clock)):
            if addresses is None:
                addresses = array("Q", map(Tensor.data_ptr, grads)).tobytes()
            yield self._step(addresses, scalars, inv_scale, found_inf, clock)

    def _step(
        self, addresses: bytes, sc: Scalars, inv_scale: Tensor | None, found_inf: Tensor | None, clock: Clock | None
    ) -> Launch:
        inner, outer, langevin = sc.inner, _may_end(sc, clock), sc.family == "langevin"
        gamma, lr = ("", "") if clock is None else clock.law[:2]  # what they are; the numbers are then on the device
        s_follows = clock is not None and _is_noisy(clock.law)
        noisy = (s_follows or (sc.s != 0.0 and gamma != "variance" and lr != "inner")) and (inner or not langevin)
        stochastic = sc.rounding == "stochastic" and self._dtype == torch.bfloat16
        counted = clock is not None and clock.period_steps is not None
        momentum = inner and langevin and sc.mu != 0.0

        def number(value: float, plays: bool) -> Any:
            return self._encoded(value) if plays else None

        others = (
            None if clock is None else clock.numbers,
            inv_scale if inner else None,
            found_inf,
            number(sc.eta, inner and langevin and lr != "inner"),
            number(sc.k, inner and langevin and sc.k != 0.0 and gamma != "stiffness"),
            number(sc.s, noisy and not s_follows),
            number(sc.a, inner and sc.a != 0.0 and not counted),
            number(sc.c, inner and not langevin and sc.c != 0.0 and gamma != "drift"),
            number(sc.wd, inner and sc.wd != 0.0),
            number(sc.mu, momentum),
            number(sc.damp1, momentum),
            number(sc.lr, outer and lr != "outer"),
            number(sc.mu_o, outer and sc.mu_o != 0.0),
            number(sc.wd_o, outer and sc.wd_o != 0.0),
            number(sc.kr, outer and sc.kr != 0.0),
        )
        flags = (
            self._block,
            langevin,
            inner,
            outer,
            sc.maximize,
            momentum and sc.nesterov,
            not momentum or sc.coupling_in_momentum,  # without a momentum the coupling has one place
            outer and sc.mu_o != 0.0 and sc.nesterov_o,
            sc.a == 1.0 and not counted,
            gamma,
            lr,
            s_follows,
            counted,
            stochastic,
            self._has_master,
            self._pitched and (noisy or stochastic),
        )
        # An int among them is the bits of a float64, which Triton takes for one of 32 bits where it fits.
        narrow = self._dtype == torch.float64 and tuple(type(v) is int and -(2**31) <= v < 2**31 for v in others)
        key = self._dtype, flags, tuple(map(type, others)), narrow
        check_capture("step_kernel", key, self._device)
        rows, blocks = self._tables()
        arguments = rows, self._table_of(addresses) if inner else None, blocks, *others
        integers, settled = (to_int64(sc.seed), sc.step), (_stored(self._dtype), *flags)
        return Launch("step_kernel", self._blocks.numel(), self._warps, arguments, integers, settled, key)

    def _advance(self, clock: Clock, sc: Scalars, found_inf: Tensor | None) -> Launch:
        law, own = clock.law, (clock.step, clock.position, clock.outer_steps, clock.gamma, clock.lr, clock.period_steps)
        arguments = (*own, clock.numbers, found_inf)
        flags = (sc.family == "langevin", sc.inner, *law[:3], _is_noisy(law), clock.counts)
        key = self._dtype, clock.lr.dtype, flags, tuple(map(type, arguments))
        integers = *_integers(clock.rule), _bits(law.temperature), _bits(sc.a)
        return Launch("advance_kernel", 1, 1, arguments, integers, (_stored(self._dtype), *flags), key)

    def _encoded(self, value: float) -> float | int:
        """Return a scalar as a kernel takes it: Triton's own are float32, so one of float64 goes as its bits."""
        return _bits(value) if self._dtype == torch.float64 else value

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Return the rows and which of them each block works on, on the device."""
        table = self._table
        if table is None:
            table = (
                upload(self._rows, self._device),
                upload(self._blocks, self._device),
            )
            if not capturing(self._device):  # what is captured is not there yet
                self._table = table
        elif capturing(self._device):
            keep_for_graphs(*table)
        return table

    def _table_of(self, addresses: bytes) -> Tensor:
        """Return the addresses of the gradients on the device."""
        captured = capturing(self._device)
        if self._grads is not None and self._grads[0] == addresses and not captured:
            return self._grads[1]
        table = upload(torch.frombuffer(array("q", addresses), dtype=torch.int64), self._device)
        if not captured:
            self._grads = addresses, table
        return table

    def _share_tables(self) -> None:
        """Have torch know of all streams that read the tables, so that it gives their memory to nobody too early."""
        if capturing(self._device):
            return
        current = torch.cuda.current_stream(self._device)
        if self._stream is not None and current != self._stream:
            for table in (*(self._table or ()), *(self._grads or ())[1:]):
                table.record_stream(current)
        self._stream = current


make_plan = TritonPlan


def _may_end(sc: Scalars, clock: Clock | None) -> bool:
    """Whether there may be an outer step: with a clock, the device decides."""
    return sc.outer if clock is None else clock.rule.inner_steps > 0


def _is_noisy(law: Law) -> bool:
    """Whether there is noise by a law, whose strength the device works out."""
    return law.temperature != 0.0 and (law.gamma == "variance" or law.lr == "inner")


def _bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@functools.lru_cache(maxsize=256)
def _integers(rule: Rule) -> tuple[int, ...]:
    return rule.inner_steps, *map(_bits, rule[1:])


def _target(device: torch.device) -> str:
    """Return whose block sizes serve on a device."""
    if device.type == "cpu":
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


@functools.cache
def _stored(dtype: torch.dtype) -> Any:
    """Return Triton's name of a stored type; a bfloat16 goes as its bits."""
    language = importlib.import_module("triton.language")
    return language.uint16 if dtype == torch.bfloat16 else getattr(language, str(dtype).removeprefix("torch."))


def gaussian(numel: int, *, seed: int, step: int, stream: int, offset: int, device: torch.device) -> Tensor:
    """Return the float32 normals of elements ``offset`` to ``offset + numel`` of a stream (the whole counter word)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    if numel:
        with on(out.device):
            start(launch_of_normals(out, seed, step, stream, offset, _target(out.device)), out.device)
    return out


def launch_of_normals(out: Tensor, seed: int, step: int, stream: int, offset: int, target: str) -> Launch:
    """Return the launch that fills ``out``, of at least one element."""
    from deeprelax_cuda.triton_kernels.sizes import size_of

    block, warps = size_of(4, target)
    integers = out.numel(), to_int64(seed), step, stream, offset
    return Launch("gaussian_kernel", -(-(out.numel() + offset % 4) // block), warps, (out,), integers, (block,), block)
