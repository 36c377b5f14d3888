"""Repeat the derivation of the constants of the contract's Gaussian, and check it on every input that there is.

    python tools/derive_gaussian.py [--skip-derivation] [--skip-check]

The constants in the contract are binding; the derivation shows where they come from, and its distance from them in ulp is only
reported. The check runs the independent implementation in tests/oracle.py over all words against float64 logarithm, root, sine
and cosine of the same float32 argument. The exit status is 1 if a bound of the contract is violated. 15 seconds on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import oracle

Array = NDArray[np.float64]

RHO_BOUND = 2.3  # ulp of rho
SINE_BOUND = 0.9  # ulp of 1, which is 2^-23
CHUNK = 2**21  # words at a time: a few dozen MiB
NODES = 4001


def lawson(basis: Array, target: Array, weight: Array, iterations: int) -> Array:
    """Return the coefficients that minimise max |weight * (basis @ c - target)|.

    Lawson's iteration: least squares whose own weights grow where the residual is large; their limit levels the residual.
    """
    basis, target = basis * weight[:, None], target * weight
    scale = np.abs(basis).max(axis=0)
    share = np.full(len(target), 1 / len(target))
    best, smallest = np.zeros(basis.shape[1]), math.inf
    for _ in range(iterations):
        root = np.sqrt(share)
        orthogonal, triangular = np.linalg.qr(basis / scale * root[:, None])
        c = np.linalg.solve(triangular, orthogonal.T @ (target * root)) / scale
        residual = np.abs(basis @ c - target)
        if residual.max() < smallest:
            best, smallest = c, residual.max()
        share = share * residual
        share /= share.sum()
    return best


def fit(labels: list[str], powers: Array, target: Array, weight: Array, iterations: int) -> None:
    """Fit one coefficient a column of ``powers``, rounding them to float32 one by one, and print them."""
    rest = target.copy()
    for k, label in enumerate(labels):
        c = np.float32(lawson(powers[:, k:], rest, weight, iterations)[0])
        rest -= float(c) * powers[:, k]
        report(label, c)
    binding = np.array([float(oracle.COEFFICIENTS[label]) for label in labels])
    derived, bound = (np.abs(weight * r).max() for r in (rest, target - powers @ binding))
    print(f"  largest weighted error {derived:.4e}; of the binding constants {bound:.4e}", flush=True)


def report(label: str, c: np.float32) -> None:
    """Print a constant beside the binding one."""
    binding = oracle.COEFFICIENTS[label]
    distance = int(c.view(np.int32)) - int(binding.view(np.int32))
    print(f"  {label:3}  {float(c).hex():>24}  binding {float(binding).hex():>24}  distance {distance:+d} ulp", flush=True)


def chebyshev(low: float, high: float) -> Array:
    """Return the Chebyshev nodes of an interval."""
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)


def derive(iterations: int) -> None:
    """Print all constants as derived, beside the binding ones."""
    print("derivation: weighted minimax, rounded to float32 one by one, the rest refitted", flush=True)
    report("NL2", np.float32(-2 * math.log(2)))
    report("KA", np.float32(math.pi / 2**33))
    g = chebyshev(1 - math.sqrt(2), 1 - math.sqrt(0.5))
    log = -2 * np.log1p(-g)
    # The error is relative to the smallest t = -2 ln u that this g occurs in: e = 0 for g >= 0, e = -1 for g < 0, where u < 1.
    t = log + np.where(g < 0, 2 * math.log(2), 0)
    fit([f"L{k}" for k in range(7)], g[:, None] ** np.arange(2, 9), log - 2 * g, 1 / t, iterations)
    a = chebyshev(0, math.pi / 4)
    z = (a * a)[:, None] ** np.arange(1, 4)
    fit(["S1", "S2", "S3"], z, np.sin(a) / a - 1, a, iterations)
    fit(["C1", "C2", "C3"], z, np.cos(a) - 1, np.ones_like(a), iterations)


def radius_words() -> Iterator[NDArray[np.uint32]]:
    """Yield words w0 that name every float32 v that any w0 names.

    Below 2^24 all words are taken. From there on 1/2 is at most a quarter of an ulp and w0 itself is rounded, so v is every
    float32 integer up to 2^32, and each of them below 2^32 is a word of its own; 2^32 is what the largest word rounds to.
    """
    for start in range(0, 2**24, CHUNK):
        yield np.arange(start, start + CHUNK, dtype=np.uint32)
    low, high = (int(np.float32(v).view(np.uint32)) for v in (2**24, 2**32))
    for start in range(low, high, CHUNK):
        yield np.arange(start, min(start + CHUNK, high), dtype=np.uint32).view(np.float32).astype(np.uint32)
    yield np.array([2**32 - 1], np.uint32)


def angle_words() -> Iterator[NDArray[np.uint32]]:
    """Yield words w1 whose lower 30 bits name every float32 angle that any do; the upper two bits are the quadrant's."""
    for sign in (1, -1):
        for start in range(0, 2**24, CHUNK):
            yield (sign * np.arange(start, start + CHUNK, dtype=np.int64) % 2**30).astype(np.uint32)
        low, high = (int(np.float32(v).view(np.uint32)) for v in (2**24, 2**29))
        for start in range(low, high, CHUNK):
            n = np.arange(start, min(start + CHUNK, high), dtype=np.uint32).view(np.float32).astype(np.int64)
            yield (sign * n % 2**30).astype(np.uint32)
    yield np.array([2**29 - 1, 2**29], np.uint32)


def check_radius() -> bool:
    """Check rho over all w0."""
    worst, count, sound = 0.0, 0, True
    for chunk, w0 in enumerate(radius_words()):
        t = oracle.minus_two_log(w0)
        sound &= not bool((np.isnan(t) | np.signbit(t)).any())
        v = w0.astype(np.float32) + np.float32(0.5)
        exact = np.sqrt(-2 * np.log(v.astype(np.float64) / 2**32))
        ulp = np.spacing(np.maximum(exact, np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
        worst = max(worst, float((np.abs(np.sqrt(t) - exact) / ulp).max()))
        count += len(w0)
        if chunk % 8 == 7:
            print(f"  rho: {count:,} words, worst error {worst:.4f} ulp", flush=True)
    ones = np.arange(2**32 - 129, 2**32, dtype=np.uint64).astype(np.uint32)
    t = oracle.minus_two_log(ones)
    largest = bool((t[1:] == 0).all() and t[0] > 0)
    print(f"  rho: {count:,} words name every u; worst error {worst:.4f} ulp (< {RHO_BOUND})")
    print(f"  rho: a negative number, NaN or -0 under the root: {'never' if sound else 'YES'}")
    print(f"  rho: +0 for exactly the 128 largest words: {'yes' if largest else 'NO'}", flush=True)
    return sound and largest and worst <= RHO_BOUND


def check_angle() -> bool:
    """Check sine and cosine over all w1."""
    worst_sn, worst_cs, widest, count = 0.0, 0.0, 0.0, 0
    for chunk, w1 in enumerate(angle_words()):
        sn, cs = oracle.sin_cos(w1)
        a = ((w1 << np.uint32(2)).view(np.int32).astype(np.float32) * oracle.COEFFICIENTS["KA"]).astype(np.float64)
        worst_sn = max(worst_sn, float(np.abs(sn - np.sin(a)).max()) * 2**23)
        worst_cs = max(worst_cs, float(np.abs(cs - np.cos(a)).max()) * 2**23)
        widest = max(widest, float(np.abs(a).max()))
        count += len(w1)
        if chunk % 8 == 7:
            print(f"  angle: {count:,} words, worst error sin {worst_sn:.4f}, cos {worst_cs:.4f} ulp of 1", flush=True)
    inside = widest <= float(np.float32(math.pi / 4))
    print(f"  angle: {count:,} words name every a; worst error sin {worst_sn:.4f}, cos {worst_cs:.4f} ulp (< {SINE_BOUND})")
    print(f"  angle: |a| <= fl(pi/4): {'yes' if inside else 'NO'}", flush=True)
    return inside and max(worst_sn, worst_cs) <= SINE_BOUND


def main() -> int:
    parser = argparse.ArgumentParser(description="Derive and check the constants of the contract's Gaussian.")
    parser.add_argument("--skip-derivation", action="store_true", help="only check")
    parser.add_argument("--skip-check", action="store_true", help="only derive")
    parser.add_argument("--iterations", type=int, default=300, help="Lawson iterations a fit (default 300)")
    args = parser.parse_args()
    if not args.skip_derivation:
        derive(args.iterations)
    if args.skip_check:
        return 0
    print("check over all words")
    results = [check_radius(), check_angle()]
    print("all bounds hold" if all(results) else "A BOUND IS VIOLATED")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
