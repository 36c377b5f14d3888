"""The numeric contract, version 1, as one plain numpy program: what every backend must return, bit for bit.

Written from the contract's text alone and shared with no backend. Nothing here is fast or changes its arguments. Arrays are
flat, in storage order; float32, float64 and float16 parameters are numpy arrays of that type, bfloat16 ones are uint16 arrays
of bit patterns. Names are the contract's: live parameter ``y``, gradient ``g``, anchor ``x``, averages ``m`` and ``p``, momenta
``v`` and ``w``, noise ``z``. Scalars arrive in binary64 and are rounded once.

numpy evaluates one ufunc at a time, so each operation below is one rounding; scalars are made float32 explicitly, because what
a Python float or a float64 scalar does to a float32 array depends on the version of numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy import float32 as f32
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Place = int | tuple[int, int, int]

VERSION = 1

#: The binding constants of the Gaussian; a mutated copy can be handed to `box_muller`.
COEFFICIENTS = {
    name: f32(float.fromhex(text))
    for name, text in {
        "NL2": "-0x1.62e43p+0",
        "KA": "0x1.921fb6p-32",
        "L0": "0x1.00003ap+0",
        "L1": "0x1.555c5ap-1",
        "L2": "0x1.ff8102p-2",
        "L3": "0x1.970512p-2",
        "L4": "0x1.5fc3fep-2",
        "L5": "0x1.4faa02p-2",
        "L6": "0x1.adf5bep-3",
        "S1": "-0x1.55554p-3",
        "S2": "0x1.1105bep-7",
        "S3": "-0x1.98dd16p-13",
        "C1": "-0x1.ffffbap-2",
        "C2": "0x1.553faap-5",
        "C3": "-0x1.64782ap-10",
    }.items()
}

# ---- Noise -----------------------------------------------------------------------------------------------------------------


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Return the four words of Philox4x32-10 as uint32 arrays; counter words are 32-bit ints or arrays of them."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(c, np.uint64)) for c in counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def words(index: Any, seed: int, step: int, stream: int) -> Array:
    """Return the words w0..w3 of the counters of elements ``index``, uint32 of shape (4, n)."""
    q = np.asarray(index, np.uint64) // np.uint64(4)
    counter = (q % np.uint64(2**32), q >> np.uint64(32), step, stream)
    return np.stack(philox4x32(counter, (seed % 2**32, seed >> 32)))


def place_index(numel: int, place: Place = 0) -> Array:
    """Return the global element numbers (uint64) of a shard of ``numel`` elements at an offset or (offset, run, pitch)."""
    offset, run, pitch = (place, max(numel, 1), 0) if isinstance(place, int) else place
    j = np.arange(numel, dtype=np.uint64)
    return np.uint64(offset) + j // np.uint64(run) * np.uint64(pitch) + j % np.uint64(run)


def derive_seed(seed: int, replica: int) -> int:
    """Return the seed of one of several replicas."""
    w0, w1, _, _ = philox4x32((replica, 0, 0, 0xFFFFFFFF), (seed % 2**32, seed >> 32))
    return int(w0[0]) + 2**32 * int(w1[0])


def minus_two_log(w0: Array, c: Mapping[str, f32] = COEFFICIENTS) -> Array:
    """Return t = -2 ln u of u = (w0 + 1/2) / 2^32."""
    v = w0.astype(np.uint32).astype(f32) + f32(0.5)
    i = v.view(np.int32) - np.int32(0x4F3504F3)
    e = (i >> np.int32(23)).astype(f32)
    g = f32(1) - ((i & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(f32)
    p = c["L6"]
    for k in (5, 4, 3, 2, 1, 0):
        p = p * g + c[f"L{k}"]
    return e * c["NL2"] + g * (f32(2) + g * p)


def sin_cos(w1: Array, c: Mapping[str, f32] = COEFFICIENTS) -> tuple[Array, Array]:
    """Return sine and cosine of the angle in [-pi/4, pi/4] that the lower 30 bits of ``w1`` name."""
    a = (w1.astype(np.uint32) << np.uint32(2)).view(np.int32).astype(f32) * c["KA"]
    z = a * a
    sn = a * (f32(1) + z * (c["S1"] + z * (c["S2"] + z * c["S3"])))
    cs = f32(1) + z * (c["C1"] + z * (c["C2"] + z * c["C3"]))
    return sn, cs


def box_muller(w0: Array, w1: Array, c: Mapping[str, f32] = COEFFICIENTS) -> tuple[Array, Array]:
    """Return the two normals (float32) of each pair of words."""
    rho = np.sqrt(minus_two_log(w0, c))
    sn, cs = sin_cos(w1, c)
    b = w1.astype(np.uint32) >> np.uint32(30)
    odd = b % np.uint32(2) == 1
    first, second = np.where(odd, sn, cs), np.where(odd, cs, sn)
    first = np.where((b == 1) | (b == 2), np.negative(first), first)
    second = np.where(b >= 2, np.negative(second), second)
    return rho * first, rho * second


def normals(index: Any, seed: int, step: int, stream: int) -> Array:
    """Return the normals (float32) of the elements ``index``."""
    index = np.asarray(index, np.uint64)
    w0, w1, w2, w3 = words(index, seed, step, stream)
    lane = index % np.uint64(4)
    first, second = box_muller(np.where(lane < 2, w0, w2), np.where(lane < 2, w1, w3))
    return np.where(lane % np.uint64(2) == 0, first, second)


# ---- Storage types ---------------------------------------------------------------------------------------------------------


def compute_type(y: Array) -> Any:
    """Return the type in which parameters stored like ``y`` are updated."""
    return np.float64 if y.dtype == np.float64 else f32


def widen(y: Array) -> Array:
    """Return stored values in the compute type."""
    if y.dtype == np.uint16:
        return (y.astype(np.uint32) << np.uint32(16)).view(f32)
    return y.astype(compute_type(y))


def round_bfloat16(value: Array, w: Array | None = None) -> Array:
    """Round float32 to bfloat16 bit patterns (uint16): to nearest even, or stochastically with the words ``w``."""
    bits = value.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if w is None:
        upper = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    else:
        upper = (bits + (w >> np.uint32(16))) >> np.uint32(16)
        overflows = (magnitude < 0x7F800000) & (upper & np.uint32(0x7F80) == 0x7F80)
        upper = np.where(overflows, (bits >> np.uint32(16) & np.uint32(0x8000)) | np.uint32(0x7F7F), upper)
    quiet = (bits | np.uint32(0x400000)) >> np.uint32(16)
    return np.where(magnitude > 0x7F800000, quiet, upper).astype(np.uint16)


def store(value, old, master, rounding, seed, step, number, place) -> Arrays:
    """Return the new ``y`` (stored like ``old``), and the new ``master`` where there is one."""
    w = None
    if rounding == "stochastic" and old.dtype in (np.uint16, np.float16):
        if old.dtype == np.float16 or master is not None:
            raise ValueError("stochastic rounding is for bfloat16 parameters without masters")
        index = place_index(value.size, place)
        lane = (index % np.uint64(4)).astype(np.intp)
        w = words(index, seed, step, 2**28 + number)[lane, np.arange(value.size)]
    y = round_bfloat16(value, w) if old.dtype == np.uint16 else value.astype(old.dtype)
    return {"y": y} if master is None else {"y": y, "master": value}


# ---- The three updates -----------------------------------------------------------------------------------------------------
# Each returns the arrays that it writes. `number` is the tensor number of the streams, `master` the float32 y of a narrow one.


def skipped(found_inf: float | None) -> bool:
    """Whether a call writes nothing; 2.0 and NaN count."""
    return found_inf is not None and found_inf != 0


def given(**arrays: Array | None) -> Arrays:
    """Return the arrays that there are."""
    return {name: array for name, array in arrays.items() if array is not None}


def noise(like: Array, seed: int, step: int, number: int, place: Place) -> Array:
    """Return z for the elements of a tensor in its compute type."""
    return normals(place_index(like.size, place), seed, step, number).astype(compute_type(like))


def descent(g: Array, y: Array, wd: Any, maximize: bool, inv_scale: float | None) -> Array:
    """Return d before coupling and momentum."""
    d = widen(g)
    if inv_scale is not None:
        d = d * d.dtype.type(inv_scale)
    if maximize:
        d = np.negative(d)
    if wd != 0:
        d = d + wd * y
    return d


@np.errstate(all="ignore")
def langevin_step(
    y, g, x=None, m=None, v=None, master=None, *,
    eta, k=0.0, s=0.0, a=0.0, wd=0.0, mu=0.0, damp1=1.0, nesterov=False, coupling_in_momentum=True, maximize=False,
    inv_scale=None, found_inf=None, seed=0, step=0, number=0, place=0, rounding="nearest",
) -> Arrays:  # fmt: skip
    """Family A: return the new y, m, v and master, as far as there are any."""
    if skipped(found_inf):
        return given(y=y, m=m, v=v, master=master)
    old, y = y, widen(y) if master is None else master
    eta, k, s, a, wd, mu, damp1 = map(compute_type(old), (eta, k, s, a, wd, mu, damp1))
    d = descent(g, y, wd, maximize, inv_scale)
    if k != 0 and coupling_in_momentum:
        d = d + k * (y - x)
    if mu != 0:
        v = mu * v + damp1 * d
        d = d + mu * v if nesterov else v
    if k != 0 and not coupling_in_momentum:
        d = d + k * (y - x)
    y = y - eta * d
    if s != 0:
        y = y + s * noise(old, seed, step, number, place)
    new = store(y, old, master, rounding, seed, step, number, place)
    y = new["master"] if "master" in new else widen(new["y"])
    if a == 1:
        m = y
    elif a != 0:
        m = m + a * (y - m)
    return new | given(m=m, v=v)


@np.errstate(all="ignore")
def gradient_average_step(
    y, g, x, p=None, master=None, *,
    a, c=0.0, s=0.0, wd=0.0, maximize=False,
    inv_scale=None, found_inf=None, seed=0, step=0, number=0, place=0, rounding="nearest",
) -> Arrays:  # fmt: skip
    """Family B: return the new y, p and master, as far as there are any."""
    if skipped(found_inf):
        return given(y=y, p=p, master=master)
    old, y = y, widen(y) if master is None else master
    a, c, s, wd = map(compute_type(old), (a, c, s, wd))
    d = descent(g, y, wd, maximize, inv_scale)
    if a == 1:
        p = d
    elif a != 0:
        p = p + a * (d - p)
    y = x - c * p if c != 0 else x
    if s != 0:
        y = y + s * noise(old, seed, step, number, place)
    return store(y, old, master, rounding, seed, step, number, place) | given(p=p)


@np.errstate(all="ignore")
def outer_step(
    family, y, x, average, w=None, consensus=None, master=None, *,
    lr, mu_o=0.0, wd_o=0.0, kr=0.0, nesterov_o=False, s=0.0,
    found_inf=None, seed=0, step=0, number=0, place=0, rounding="nearest",
) -> Arrays:  # fmt: skip
    """Return the new y, x, w, master and, in family "langevin", m; ``average`` is m there and p in "gradient_average".

    ``step`` and ``s`` are those of the inner step that ends the period; family "langevin" has no noise here, whatever ``s``.
    """
    name = "m" if family == "langevin" else "p"
    if skipped(found_inf):
        return given(y=y, x=x, w=w, master=master, **{name: average})
    lr, mu_o, wd_o, kr, s = map(compute_type(y), (lr, mu_o, wd_o, kr, s))
    d = x - average if name == "m" else average
    if wd_o != 0:
        d = d + wd_o * x
    if kr != 0:
        d = d + kr * (x - consensus)
    if mu_o != 0:
        w = mu_o * w + d
        d = d + mu_o * w if nesterov_o else w
    x = x - lr * d
    live = x
    if name == "p" and s != 0:
        live = x + s * noise(y, seed, step, number, place)
    average = x if name == "m" else average
    return store(live, y, master, rounding, seed, step, number, place) | given(x=x, w=w, **{name: average})


COMMON = ("seed", "step", "number", "place", "rounding", "found_inf")
GRADIENT = ("s", "a", "wd", "maximize", "inv_scale")
LANGEVIN = ("eta", "k", "mu", "damp1", "nesterov", "coupling_in_momentum", *GRADIENT, *COMMON)
GRADIENT_AVERAGE = ("c", *GRADIENT, *COMMON)
OUTER = ("lr", "mu_o", "wd_o", "kr", "nesterov_o", "s", *COMMON)


def update(tensors: Mapping[str, Array], family: str, inner: bool = True, outer: bool = False, **scalars: Any) -> Arrays:
    """Take the inner step, the outer step, or both in turn, and return all tensors as they are afterwards.

    Args:
        tensors: arrays by name, of y, g, x, m, p, v, w, consensus, master; only those that play a part need be there.
        family: "langevin" or "gradient_average".
        scalars: keywords of the steps above; each step takes its own.
    """

    def taken(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: scalars[name] for name in names if name in scalars}

    def arrays(*names: str) -> list[Array | None]:
        return [now.get(name) for name in names]

    now = dict(tensors)
    if inner and family == "langevin":
        now |= langevin_step(*arrays("y", "g", "x", "m", "v", "master"), **taken(LANGEVIN))
    elif inner:
        now |= gradient_average_step(*arrays("y", "g", "x", "p", "master"), **taken(GRADIENT_AVERAGE))
    if outer:
        average = "m" if family == "langevin" else "p"
        now |= outer_step(family, *arrays("y", "x", average, "w", "consensus", "master"), **taken(OUTER))
    return now
