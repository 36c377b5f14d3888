"""Standard normals from Philox words by the Box-Muller transform, in float32 with one rounding an operation;
csrc/core/gaussian.h, whose constants are binding.

`tl.randn4x` would not do: it clamps its uniforms at 1e-7, which cuts the tail at 5.7 sigma (ours reaches 6.7).
"""

import triton
import triton.language as tl

# -2 ln(1 - g) = g * (2 + g * (L0 + L1 g + ... + L6 g^6)) on [1 - sqrt(2), 1 - sqrt(1/2)];  NL2 = -2 ln 2
NL2 = tl.constexpr(float.fromhex("-0x1.62e43p+0"))
L0 = tl.constexpr(float.fromhex("0x1.00003ap+0"))
L1 = tl.constexpr(float.fromhex("0x1.555c5ap-1"))
L2 = tl.constexpr(float.fromhex("0x1.ff8102p-2"))
L3 = tl.constexpr(float.fromhex("0x1.970512p-2"))
L4 = tl.constexpr(float.fromhex("0x1.5fc3fep-2"))
L5 = tl.constexpr(float.fromhex("0x1.4faa02p-2"))
L6 = tl.constexpr(float.fromhex("0x1.adf5bep-3"))
# sine and cosine on [-pi/4, pi/4];  KA = 2 pi / 2^34
KA = tl.constexpr(float.fromhex("0x1.921fb6p-32"))
S1 = tl.constexpr(float.fromhex("-0x1.55554p-3"))
S2 = tl.constexpr(float.fromhex("0x1.1105bep-7"))
S3 = tl.constexpr(float.fromhex("-0x1.98dd16p-13"))
C1 = tl.constexpr(float.fromhex("-0x1.ffffbap-2"))
C2 = tl.constexpr(float.fromhex("0x1.553faap-5"))
C3 = tl.constexpr(float.fromhex("-0x1.64782ap-10"))


@triton.jit
def flip_sign(f, flag):
    """Flip the sign of float32 where bit 31 of the uint32 ``flag`` is set."""
    return (f.to(tl.uint32, bitcast=True) ^ (flag & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def box_muller(w0, w1):
    """Return two normals for each pair of words: rho(w0) * cos(theta(w1)) and rho(w0) * sin(theta(w1))."""
    # rho = sqrt(-2 ln u), u = (w0 + 1/2) / 2^32, from u = 2^e (1 - g) with 1 - g in [sqrt(1/2), sqrt(2))
    v = w0.to(tl.float32) + 0.5
    i = v.to(tl.int32, bitcast=True) - 0x4F3504F3
    e = (i >> 23).to(tl.float32)
    g = 1.0 - ((i & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    p = L6
    p = p * g + L5
    p = p * g + L4
    p = p * g + L3
    p = p * g + L2
    p = p * g + L1
    p = p * g + L0
    t = e * NL2 + g * (2.0 + g * p)
    rho = tl.sqrt_rn(t)

    # theta = quadrant * pi/2 + a: the top two bits of w1 are the quadrant, the others a
    a = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * KA
    z = a * a
    sn = a * (1.0 + z * (S1 + z * (S2 + z * S3)))
    cs = 1.0 + z * (C1 + z * (C2 + z * C3))
    odd = w1 << 1
    swap = odd.to(tl.int32, bitcast=True) < 0
    first = flip_sign(tl.where(swap, sn, cs), w1 ^ odd)
    second = flip_sign(tl.where(swap, cs, sn), w1)
    return rho * first, rho * second


@triton.jit
def in_order(a0, a1, a2, a3):
    """Put what belongs to the four lanes of each counter side by side: four blocks (n,) become one of (n, 4)."""
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (a0.shape[0], 4))


@triton.jit
def normals(w0, w1, w2, w3):
    """Return the normals of the elements 4q, 4q + 1, ... in storage order, float32 (n, 4) for words (n,)."""
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)
