"""Where the noise of a step comes from: seeds, streams, and the place of a shard in its tensor.

Noise is a pure function of (seed, step, stream, element index); no `torch.Generator` is read or advanced. This module holds
the integers of that function; the backends hold the function.

Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

#: A stream is ``domain * STREAMS_PER_DOMAIN + tensor number``.
STREAMS_PER_DOMAIN = 2**28
DOMAIN_NOISE = 0
DOMAIN_ROUNDING = 1
#: The stream whose words seed the replicas.
SEED_STREAM = 0xFFFFFFFF

_MASK32 = 0xFFFFFFFF


class Place(NamedTuple):
    """Where the elements of a local tensor lie in the storage order of the logical, unsharded tensor.

    Local element ``j`` is global element ``offset + (j // run) * pitch + j % run``.
    """

    offset: int
    run: int
    pitch: int


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the four 32-bit words of Philox4x32-10 for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def derive_seed(seed: int, replica: int) -> int:
    """Return the seed of replica number ``replica`` of a run whose seed is ``seed``.

    Different replicas get independent noise, and every process computes the same seeds without talking to the others. Also the
    way to seed several optimizers of one program.

    Args:
        seed: the seed of the run, in [0, 2**64).
        replica: the replica's number, in [0, 2**32).

    Raises:
        ValueError: a number outside its range.
    """
    seed = check_seed(seed)
    replica = check_range("replica", replica, 2**32)
    w0, w1, _, _ = philox4x32((replica, 0, 0, SEED_STREAM), (seed & _MASK32, seed >> 32))
    return w0 | w1 << 32


def check_range(name: str, value: int, limit: int) -> int:
    """Return ``value`` as an int, refusing what is not an integer in [0, limit) by the name of the argument."""
    if not isinstance(value, int):  # a traced int stays one: operator.index would pin the graph to its value
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if not 0 <= value < limit:
        raise ValueError(f"{name}: expected an int in [0, 2**{limit.bit_length() - 1}), got {value}")
    return value


def check_seed(seed: int) -> int:
    """Return ``seed`` as an int in [0, 2**64) or raise."""
    return check_range("seed", seed, 2**64)


def check_step(step: int) -> int:
    """Return ``step``, the number of inner steps taken before this one, as an int in [0, 2**32) or raise."""
    return check_range("step", step, 2**32)


def as_place(name: str, place: int | Sequence[int], numel: int) -> Place:
    """Return the `Place` that an ``offset`` or an ``(offset, run, pitch)`` names for a local tensor of ``numel`` elements.

    Raises:
        ValueError: a negative offset, a run below 1, runs that overlap, or an index that does not fit in 63 bits.
    """
    if isinstance(place, Sequence):
        if len(place) != 3:
            raise ValueError(f"{name}: expected an offset or (offset, run, pitch), got {tuple(place)}")
        offset, run, pitch = (check_range(f"{name}, {part}", v, 2**63) for part, v in zip(Place._fields, place, strict=True))
    else:
        offset, run, pitch = check_range(name, place, 2**63), max(numel, 1), max(numel, 1)
    if run < 1:
        raise ValueError(f"{name}: expected a run of at least 1 element, got {run}")
    if numel > run and pitch < run:
        raise ValueError(f"{name}: runs of {run} elements at a pitch of {pitch} would overlap")
    last = max(numel - 1, 0)
    if offset + last // run * pitch + last % run >= 2**63:
        raise ValueError(f"{name}: the last element's index does not fit in 63 bits")
    return Place(offset, run, pitch)


def to_int64(seed: int) -> int:
    """Return the two's-complement int64 that carries a 64-bit seed through `torch.library`."""
    return seed - 2**64 if seed >= 2**63 else seed


def from_int64(seed: int) -> int:
    """Undo `to_int64`."""
    return seed % 2**64
