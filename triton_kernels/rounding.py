"""Storage types and their rounding; csrc/core/rounding.h. A narrow value is handled as the float32 it widens to.

A bfloat16 is carried as the uint16 of its bits and rounded in integers, as no cast can be relied upon: the interpreter's
truncates, and a GPU's may flush denormals.
"""

import triton
import triton.language as tl


#   float32   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
#   bfloat16  s eeeeeeee mmmmmmm                    the lower 16 bits decide: > half up, half to even (bit 16 zero)
# Both functions return the float32 pattern of the bfloat16. The sums never carry beyond the exponent of a finite number, and a
# NaN is cut, not added to: adding would turn some NaNs into -0.
@triton.jit
def nearest_bfloat16(b):
    """Round the patterns of float32, uint32, to nearest even."""
    rounded = tl.add(b, 0x7FFF + ((b >> 16) & 1), sanitize_overflow=False)
    return tl.where((b & 0x7FFFFFFF) > 0x7F800000, b | 0x400000, rounded) & 0xFFFF0000


@triton.jit
def stochastic_bfloat16(b, w):
    """Round the patterns up with the probability of what is cut off; ``w`` are random words, uint32.

    The largest finite number is never rounded to infinity.
    """
    magnitude = b & 0x7FFFFFFF
    rounded = tl.add(b, w >> 16, sanitize_overflow=False)
    rounded = tl.where((rounded & 0x7FFFFFFF) > 0x7F7FFFFF, (b & 0x80000000) | 0x7F7F0000, rounded)
    rounded = tl.where(magnitude > 0x7F7FFFFF, b, rounded)  # infinity
    return tl.where(magnitude > 0x7F800000, b | 0x400000, rounded) & 0xFFFF0000


@triton.jit
def widen(stored):
    """Return what is stored, in its compute type; uint16 is bfloat16."""
    if stored.dtype == tl.uint16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif stored.dtype == tl.float16:
        return stored.to(tl.float32)
    else:
        return stored


@triton.jit
def narrow(f, STORED: tl.constexpr):
    """Return the nearest of ``STORED`` to a float32, which it is exactly where it has been rounded before."""
    if STORED == tl.uint16:
        return (nearest_bfloat16(f.to(tl.uint32, bitcast=True)) >> 16).to(tl.uint16)
    else:
        return f.to(STORED)


@triton.jit
def stored_as(f, w, STORED: tl.constexpr):
    """Return what ``f`` becomes when it is stored; ``w`` are random words for stochastic rounding to bfloat16, or None."""
    if STORED == tl.uint16:
        b = f.to(tl.uint32, bitcast=True)
        if w is None:
            b = nearest_bfloat16(b)
        else:
            b = stochastic_bfloat16(b, w)
        return b.to(tl.float32, bitcast=True)
    elif STORED == tl.float16:
        return f.to(tl.float16).to(tl.float32)
    else:
        return f
