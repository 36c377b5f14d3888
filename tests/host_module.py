"""Steps of the module that has a host in the place of the GPU, compared with those of its CPU backend: see host_program.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import contract_cases
import torch
from contract_cases import CPU, DTYPES, Case, Guarded, inputs_for, run, same, where, whole
from torch import Tensor

from deeprelax_cuda.native import module as native
from deeprelax_cuda.noise import Place

F32, F64, BF16, F16 = DTYPES
#: The device's index of the host.
HOST = 0

Test = tuple[str, Callable[[], object]]
Offset = Callable[[int, int, str], int]

_host = ctypes.CDLL(native.__file__)
_process = ctypes.CDLL(None)
_POISON, _UNPOISON = (getattr(_process, f"__asan_{what}_memory_region", None) for what in ("poison", "unpoison"))


class Poisoned(Guarded):
    """A tensor whose surroundings AddressSanitizer guards as it guards those of an allocation, so that reading them shows too.

    But for up to seven bytes before the tensor, as poison comes in units of eight that end with their poison.
    """

    def __init__(self, values: Tensor, offset: int, device: torch.device = CPU) -> None:
        super().__init__(values, offset, device)
        self._surround(_POISON)

    def intact(self) -> bool:
        self._surround(_UNPOISON)
        return super().intact()

    def _surround(self, change: Callable[..., None]) -> None:
        size, end = self._buffer.element_size(), self._offset + self._numel
        for first, last in ((0, self._offset), (end, self._buffer.numel())):
            change(ctypes.c_void_p(self._buffer.data_ptr() + first * size), ctypes.c_size_t((last - first) * size))


if _POISON is not None:
    contract_cases.Guarded = Guarded = Poisoned  # type: ignore[misc]


def watch(only: int = -1, first: int = 0, end: int = 0) -> None:
    """Forget what was launched; from now on run all of it, or of launch number ``only`` some blocks."""
    _host.host_watch(*map(ctypes.c_int64, (only, first, end)))


def launched() -> list[int]:
    """Return the numbers of blocks of the launches."""
    most = 64
    blocks = (ctypes.c_int64 * most)()
    count = _host.host_launches(blocks, ctypes.c_int64(most))
    assert count <= most
    return list(blocks[:count])


def rows() -> list[int]:
    """Return how many rows had aligned state, aligned y, aligned g, packets of whole noise counters."""
    counts = (ctypes.c_int64 * 4)()
    _host.host_rows(counts)
    return list(counts)


def read_packet(address: int) -> None:
    """Read 16 bytes as the kernels do, wherever that is."""
    _host.host_read(ctypes.c_void_p(address))


def compare(
    case: Case,
    dtype: torch.dtype,
    sizes: list[int],
    offset: Offset,
    places: list[Place] | None = None,
    numbers: list[int] | None = None,
) -> None:
    """Take a step on the host and on the CPU, on copies of the same tensors, and compare everything."""
    inputs = inputs_for(case, dtype, sizes)
    places = places or [whole(n) for n in sizes]
    numbers = numbers or [3 * i + 1 for i in range(len(sizes))]
    want, _ = run("cpu", case, dtype, inputs, numbers, places, offset)
    watch()
    got, guards = run("cuda", case, dtype, inputs, numbers, places, offset)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for key in b:
            assert same(a[key], b[key]), f"{key} of tensor {i} with {sizes[i]} elements, {where(a[key], b[key])}"
    assert all(guard.intact() for guard in guards)
