"""The noise of the contract in torch ops: Philox4x32-10 and Box-Muller, the same bits on every device.

Torch has no unsigned 32-bit arithmetic, so a Philox word is an int64 in [0, 2**32): of a product that wraps at 2**64 the low
word and, shifted and masked, the high word are still exact. Every float op below rounds once to float32, in the order and with
the names of the contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deeprelax_cuda.noise import Place

_MASK32 = 0xFFFFFFFF
_SIGN = -(2**31)

_NL2 = float.fromhex("-0x1.62e43p+0")
_KA = float.fromhex("0x1.921fb6p-32")
_L0, _L1, _L2, _L3 = map(float.fromhex, ("0x1.00003ap+0", "0x1.555c5ap-1", "0x1.ff8102p-2", "0x1.970512p-2"))
_L4, _L5, _L6 = map(float.fromhex, ("0x1.5fc3fep-2", "0x1.4faa02p-2", "0x1.adf5bep-3"))
_S1, _S2, _S3 = map(float.fromhex, ("-0x1.55554p-3", "0x1.1105bep-7", "-0x1.98dd16p-13"))
_C1, _C2, _C3 = map(float.fromhex, ("-0x1.ffffbap-2", "0x1.553faap-5", "-0x1.64782ap-10"))


def normals(place: Place, numel: int, *, seed: int, step: int, stream: int, device: torch.device) -> Tensor:
    """Return float32 standard normals, shape ``(numel,)``, for local elements 0..numel-1 of ``place``."""
    quads, lane = _quads(place, numel, device)
    return _elements(_box_muller(*_philox4x32(quads, seed, step, stream)), lane, numel)


def rounding_bits(place: Place, numel: int, *, seed: int, step: int, stream: int, device: torch.device) -> Tensor:
    """Return the upper halves of the elements' words, int32 in [0, 2**16), shape ``(numel,)``: what rounds down to bfloat16."""
    quads, lane = _quads(place, numel, device)
    words = torch.stack(_philox4x32(quads, seed, step, stream), dim=-1)
    return _elements((words >> 16).to(torch.int32), lane, numel)


def _quads(place: Place, numel: int, device: torch.device) -> tuple[Tensor, Tensor | int]:
    """Return the Philox counters q that cover the elements, one row a run, and where in its row each run's elements lie.

    The second is one int for a single run, whose elements follow each other, and an int64 index ``(rows, width)`` otherwise.
    """
    if numel <= place.run:
        first, last = place.offset // 4, (place.offset + numel - 1) // 4
        return torch.arange(first, last + 1, dtype=torch.int64, device=device)[None], place.offset % 4
    rows = -(-numel // place.run)
    start = torch.arange(rows, dtype=torch.int64, device=device)[:, None] * place.pitch + place.offset
    width = (place.run + 6) // 4  # counters that cover a run wherever in a counter it starts
    return (start >> 2) + torch.arange(width, device=device), (start & 3) + torch.arange(place.run, device=device)


def _elements(lanes: Tensor, lane: Tensor | int, numel: int) -> Tensor:
    """Pick the elements out of the lanes ``(rows, counters, 4)`` that `_quads` asked for."""
    lanes = lanes.flatten(1)
    if isinstance(lane, int):
        return lanes[0, lane : lane + numel]
    return lanes.gather(1, lane).flatten()[:numel]


def _philox4x32(q: Tensor, seed: int, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words, int64 in [0, 2**32), of counter (q mod 2**32, q >> 32, step, stream), shaped like ``q``."""
    k0, k1 = seed & _MASK32, seed >> 32
    c0, c1, c2, c3 = q & _MASK32, q >> 32, torch.full_like(q, step), torch.full_like(q, stream)
    p0, p1 = torch.empty_like(q), torch.empty_like(q)
    for _ in range(10):
        torch.mul(c0, 0xD2511F53, out=p0)
        torch.mul(c2, 0xCD9E8D57, out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK32)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK32)
        # The low words, and the buffers for the next products. The upper halves stay: an xor may carry them, a product may not.
        c1, c3, p0, p1 = p1, p0, c3, c1
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1.bitwise_and_(_MASK32), c2, c3.bitwise_and_(_MASK32)


def _box_muller(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Return the lanes ``(*q.shape, 4)``: two from the words (w0, w1), two from (w2, w3); each op takes both pairs at once."""
    v = torch.stack((w0.float(), w2.float())).add_(0.5)
    w = torch.stack((w1.to(torch.int32), w3.to(torch.int32)))  # the word mod 2**32, two's complement

    i = v.view(torch.int32) - 0x4F3504F3
    e = (i >> 23).float()
    g = i.bitwise_and_(0x7FFFFF).add_(0x3F3504F3).view(torch.float32).neg_().add_(1.0)
    p = g * _L6
    for coefficient in (_L5, _L4, _L3, _L2, _L1):
        p.add_(coefficient).mul_(g)
    p.add_(_L0)
    t = e.mul_(_NL2).add_(p.mul_(g).add_(2.0).mul_(g))
    rho = t.double().sqrt_().float()  # torch.sqrt of float32 is not correctly rounded on the CPU

    a = (w << 2).float().mul_(_KA)
    z = a * a
    sn = (z * _S3).add_(_S2).mul_(z).add_(_S1).mul_(z).add_(1.0).mul_(a)
    cs = (z * _C3).add_(_C2).mul_(z).add_(_C1).mul_(z).add_(1.0)

    # Swap where bit 30 is set, then flip the signs: as bits, because torch.where on random bits mispredicts every other branch.
    first, second = cs.view(torch.int32), sn.view(torch.int32)
    swap = ((w << 1) >> 31).bitwise_and_(first ^ second)
    first.bitwise_xor_(swap).bitwise_xor_((w ^ (w << 1)).bitwise_and_(_SIGN))
    second.bitwise_xor_(swap).bitwise_xor_(w & _SIGN)

    lanes = torch.empty(*w0.shape, 2, 2, dtype=torch.float32, device=w0.device)  # pair, lane of the pair
    for pair in (0, 1):
        torch.mul(rho[pair], cs[pair], out=lanes[..., pair, 0])
        torch.mul(rho[pair], sn[pair], out=lanes[..., pair, 1])
    return lanes.flatten(-2)
