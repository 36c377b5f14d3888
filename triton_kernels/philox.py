"""Philox4x32-10: the counter-based generator behind all noise; csrc/core/philox.h.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import triton
import triton.language as tl

#: Domains of streams: stream = domain * 2**28 + tensor number.
DOMAIN_ROUNDING = tl.constexpr(1 << 28)


@triton.jit
def philox4x32(seed, q, step, stream):
    """Return the four words of the counters (q mod 2**32, q >> 32, step, stream).

    ``q`` is a block of int64, the words are blocks of uint32; ``seed`` (two's complement), ``step`` and ``stream`` are int64.
    """
    low = q.to(tl.uint32)
    high = (q >> 32).to(tl.uint32)
    nothing = tl.zeros_like(low)
    return tl.philox(seed, low, high, nothing + step.to(tl.uint32), nothing + stream.to(tl.uint32), 10)
