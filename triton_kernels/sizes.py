"""How many elements a block works on, and with how many warps: one table, and no autotuning.

Tuning at run time would run a kernel that works in place many times, on the parameters in training. The bits do not depend on
what stands here. docs/performance.md has the counts behind the choice.
"""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """The elements of a block, and its warps."""

    block: int
    warps: int


#: By bytes of the stored type; a thread has one packet of 16 bytes (of float64 two). A warp is 32 threads, on AMD's CDNA 64.
_NVIDIA = {2: Size(1024, 4), 4: Size(512, 4), 8: Size(512, 4)}
_AMD = {2: Size(2048, 4), 4: Size(1024, 4), 8: Size(1024, 4)}
#: The interpreter works in numpy, a block at a time.
_INTERPRETER = {2: Size(16384, 1), 4: Size(16384, 1), 8: Size(16384, 1)}


def size_of(itemsize: int, target: str) -> Size:
    """Return the size of blocks for parameters of ``itemsize`` bytes; ``target`` is "cuda", "hip" or "interpreter"."""
    return {"cuda": _NVIDIA, "hip": _AMD, "interpreter": _INTERPRETER}[target][itemsize]
