"""Write the golden file of the numeric contract, or check that it is what the independent implementation gives.

    python tools/make_golden.py            write deeprelax_cuda/golden/contract_v1.json
    python tools/make_golden.py --check    exit status 1 if that file is not, byte for byte, what would be written

The format is described in deeprelax_cuda/golden/__init__.py; the values come from tests/oracle.py alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import oracle

GOLDEN = Path(__file__).resolve().parents[1] / "deeprelax_cuda" / "golden" / "contract_v1.json"
NUMEL = 17
CATCHES = 3  # word pairs kept for each coefficient and direction
SEED = 0x853C49E6748FEA9B

# Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Seed, step, stream and element: beyond 32 bits in each of seed and element, and at the ends of the ranges.
SAMPLES = [
    (0, 0, 0, 0),
    (1, 0, 0, 4),
    (0, 1, 0, 9),
    (0, 0, 2**28, 14),
    (2**32, 7, 3, 2**32 + 1),
    (2**32 + 1, 7, 2**28 + 3, 2**34 + 2),
    (2**63, 2**31, 2**28 - 1, 2**40 + 3),
    (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**63 - 9),
    (SEED, 123456789, 2**29 + 5, 10**15 + 1),
]


def encode(array: np.ndarray) -> str:
    """Return the bit patterns of an array's elements in hexadecimal."""
    digits = 2 * array.itemsize
    return " ".join(f"{int(bits):0{digits}x}" for bits in array.view(f"u{array.itemsize}"))


def quiet(array: np.ndarray) -> np.ndarray:
    """Return ``array`` with the plain quiet NaN for every NaN: which one arithmetic makes differs between processors."""
    if array.dtype == np.uint16:
        return np.where(array & 0x7FFF > 0x7F80, np.uint16(0x7FC0), array)
    return np.where(np.isnan(array), array.dtype.type(np.nan), array)


def floats(values: Any) -> list[str]:
    """Return float32 values as hexadecimal floats."""
    return [float(value).hex() for value in values]


# ---- Words and normals -------------------------------------------------------------------------------------------------------


def counter_of(words: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the counter that Philox4x32-10 turns into ``words``: its rounds, undone from the last to the first."""
    c0, c1, c2, c3 = words
    for r in reversed(range(10)):
        k0, k1 = (key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32
        a = c3 * pow(0xD2511F53, -1, 2**32) % 2**32
        b = c1 * pow(0xCD9E8D57, -1, 2**32) % 2**32
        c0, c1, c2, c3 = a, c0 ^ (b * 0xCD9E8D57 >> 32) ^ k0, b, c2 ^ (a * 0xD2511F53 >> 32) ^ k1
    return c0, c1, c2, c3


def pair(why: str, w0: int, w1: int, seed: int, step: int, stream: int, offset: int) -> dict[str, Any]:
    """Return the entry of a pair of words and its normals, having made sure that the elements at ``offset`` have them."""
    first, second = oracle.box_muller(np.array([w0], np.uint32), np.array([w1], np.uint32))
    both = np.concatenate([first, second])
    assert (oracle.normals([offset, offset + 1], seed, step, stream).view(np.uint32) == both.view(np.uint32)).all()
    place = {"seed": seed, "step": step, "stream": stream, "offset": offset}
    return {"why": why, **place, "words": [f"{w0:08x}", f"{w1:08x}"], "normals": floats(both)}


def corners() -> Iterator[dict[str, Any]]:
    """Yield pairs of words at the ends and seams of the Gaussian, with an element that has each."""
    seam = 0xB504F280  # rounds to the last v below sqrt(1/2); the next word to the first above, where e and g jump
    ends = (0, 1, 2**23 - 1, 2**23, seam, seam + 1, 2**32 - 129, 2**32 - 128, 2**32 - 1)
    angles = (0, 1, 2**29 - 1, 2**29, 2**30 - 1)
    quadrants = [angle + b * 2**30 for b in range(4) for angle in angles]
    key = (SEED % 2**32, SEED >> 32)
    for w0, w1 in [(w0, 0x12345678) for w0 in ends] + list(itertools.product((0, 0x9E3779B9, 2**32 - 1), quadrants)):
        for rest in itertools.count():  # any w2; one in eight counters lies below element 2^63
            q_low, q_high, step, stream = counter_of((w0, w1, rest, 0), key)
            if q_high < 2**29:
                break
        yield pair("corner", w0, w1, SEED, step, stream, 4 * (q_high << 32 | q_low))


def catches() -> Iterator[dict[str, Any]]:
    """Yield pairs of words whose normals change when a coefficient moves by one unit in the last place."""
    missing = {(name, to): CATCHES for name in oracle.COEFFICIENTS for to in ("up", "down")}
    for start in itertools.count(0, 2**20):
        words = oracle.words(np.arange(start, start + 2**20, 4, dtype=np.uint64), SEED, 0, 0)
        w0, w1 = (words[lane::2].T.reshape(-1) for lane in (0, 1))  # pairs in the order of their elements
        right = np.stack(oracle.box_muller(w0, w1))
        for name, to in missing:
            mutant = {**oracle.COEFFICIENTS, name: one_ulp(oracle.COEFFICIENTS[name], to)}
            wrong = (np.stack(oracle.box_muller(w0, w1, mutant)) != right).any(axis=0)
            for j in np.flatnonzero(wrong)[: missing[name, to]]:
                missing[name, to] -= 1
                yield pair(f"{name} {to}", int(w0[j]), int(w1[j]), SEED, 0, 0, start + 2 * int(j))
        missing = {key: count for key, count in missing.items() if count}
        if not missing:
            return


def one_ulp(value: np.float32, to: str) -> np.float32:
    """Return the next float32 up or down."""
    return np.nextafter(value, np.float32(np.inf if to == "up" else -np.inf))


# ---- Updates -----------------------------------------------------------------------------------------------------------------

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.float16}
NARROW = ("bfloat16", "float16")


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round values of the compute type to nearest in the storage type."""
    return oracle.round_bfloat16(values) if dtype == "bfloat16" else values.astype(DTYPES[dtype])


def ordinary(dtype: str) -> dict[str, np.ndarray]:
    """Return tensors of ordinary size, with all bits of their types in use."""

    def values(number: int, scale: float) -> np.ndarray:
        z = oracle.normals(np.arange(2 * NUMEL), 0, 0, number)
        if dtype != "float64":
            return z[:NUMEL] * np.float32(scale)
        z = z.astype(np.float64)
        return (z[:NUMEL] + z[NUMEL:] * 2.0**-30) * scale

    master = values(0, 1.0)
    x = master + values(1, 0.1)
    near = {name: x + values(number, 0.05) for number, name in enumerate(("m", "consensus"), 2)}
    rest = {name: values(number, 0.5) for number, name in enumerate(("p", "v", "w"), 4)}
    tensors = {"y": narrow(master, dtype), "g": narrow(values(7, 0.7), dtype), "x": x, **near, **rest}
    return tensors | ({"master": master} if dtype in NARROW else {})


def edges(dtype: str) -> dict[str, np.ndarray]:
    """Return tensors at the edges of the storage types: zeros, subnormals, ties, the largest, infinities, NaN."""
    patterns = [0, 0x80000000, 1, 0x80000001, 0x00400000, 0x807FFFFF, 0x00018000, 0x33000000, 0x33000001, 0x387FF000]
    patterns += [0x3F808000, 0x3F818000, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF, 0xFF800000, 0x7FFFFFFF]
    x = np.array(patterns, np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        y = narrow(x, dtype)
    return {"y": y, "g": y[::-1].copy(), "x": x, "m": x[::-1].copy(), "p": x[::-1].copy()}


LANGEVIN = {"eta": 0.1, "k": 0.25, "s": 0.02, "a": 0.25}
LANGEVIN_ALL = {**LANGEVIN, "wd": 0.01, "mu": 0.9, "damp1": 0.875, "maximize": True}
AVERAGE = {"c": 0.3, "a": 0.25}
AVERAGE_ALL = {"c": 0.3, "a": 1 / 3, "s": 0.02, "wd": 0.01, "maximize": True}
OUTER = {"lr": 0.1}
OUTER_ALL = {"lr": 0.7, "mu_o": 0.9, "wd_o": 0.01, "kr": 0.15}
FAR = {"place": [2**33 + 7, 5, 11], "number": 2**28 - 1}
A, B = "langevin", "gradient_average"

# Name, family, (inner, outer), tensors, scalars, and what else the call takes.
CASES: list[tuple[str, str, tuple[bool, bool], str, dict[str, Any], dict[str, Any]]] = [
    ("plain", A, (True, False), "y g x m", LANGEVIN, {}),
    ("all, heavy ball, coupling in momentum", A, (True, False), "y g x m v", LANGEVIN_ALL, {"inv_scale": 0.3, **FAR}),
    ("all, nesterov, coupling in momentum", A, (True, False), "y g x m v", {**LANGEVIN_ALL, "nesterov": True}, {}),
    ("all, heavy ball", A, (True, False), "y g x m v", {**LANGEVIN_ALL, "coupling_in_momentum": False}, {}),
    ("all, nesterov", A, (True, False), "y g x m v", {**LANGEVIN_ALL, "coupling_in_momentum": False, "nesterov": True}, {}),
    ("no noise, last iterate", A, (True, False), "y g x m", {**LANGEVIN, "s": 0.0, "a": 1.0}, {}),
    ("no noise, no coupling, no average", A, (True, False), "y g", {"eta": 0.1}, {}),
    ("found_inf 2", A, (True, False), "y g x m v", LANGEVIN_ALL, {"inv_scale": 0.3, "found_inf": 2.0}),
    ("found_inf 0", A, (True, False), "y g x m", LANGEVIN, {"inv_scale": 0.3, "found_inf": 0.0}),
    ("fixed point", B, (True, False), "y g x p", AVERAGE, {}),
    ("fixed point, first", B, (True, False), "y g x p", {**AVERAGE, "a": 1.0}, {}),
    ("heat", B, (True, False), "y g x p", {"s": 0.02, "a": 1 / 3}, {}),
    ("heat, first", B, (True, False), "y g x p", {"s": 0.02, "a": 0.0}, {}),
    ("all", B, (True, False), "y g x p", AVERAGE_ALL, {"inv_scale": 0.3, **FAR}),
    ("found_inf 1", B, (True, False), "y g x p", AVERAGE_ALL, {"found_inf": 1.0}),
    ("plain", A, (False, True), "y x m", OUTER, {}),
    ("all, heavy ball", A, (False, True), "y x m w consensus", OUTER_ALL, {}),
    ("all, nesterov", A, (False, True), "y x m w consensus", {**OUTER_ALL, "nesterov_o": True}, FAR),
    ("no noise", B, (False, True), "y x p", OUTER, {}),
    ("all, heavy ball", B, (False, True), "y x p w consensus", {**OUTER_ALL, "s": 0.02}, FAR),
    ("found_inf 2", B, (False, True), "y x p w", {"lr": 0.7, "mu_o": 0.9}, {"found_inf": 2.0}),
    ("plain", A, (True, True), "y g x m", {**LANGEVIN, **OUTER}, {}),
    ("all", A, (True, True), "y g x m v w consensus", {**LANGEVIN_ALL, **OUTER_ALL, "nesterov": True, "nesterov_o": True}, FAR),
    ("fixed point", B, (True, True), "y g x p", {**AVERAGE, **OUTER}, {}),
    ("all", B, (True, True), "y g x p w consensus", {**AVERAGE_ALL, **OUTER_ALL}, {"inv_scale": 0.3, **FAR}),
]
EDGE_CASES: list[tuple[str, str, tuple[bool, bool], str, dict[str, Any], dict[str, Any]]] = [
    ("edges", A, (True, False), "y g x m", {"eta": 0.5, "k": 0.25, "a": 0.5}, {}),
    ("edges", B, (True, False), "y g x p", {"a": 0.5}, {}),
]


def update(inputs: dict[str, dict[str, np.ndarray]], dtype: str, case: tuple[Any, ...], **storage: Any) -> dict[str, Any]:
    """Return one entry: what the call is made of, and what it gives."""
    name, family, (inner, outer), tensors, scalars, call = case
    source = f"{dtype} edges" if name == "edges" else dtype
    names = [*tensors.split(), *(["master"] if storage.get("master") else [])]
    real = oracle.compute_type(inputs[source]["y"])
    scalars = {key: value if isinstance(value, bool) else float(real(value)) for key, value in scalars.items()}
    scalars |= {"seed": SEED, "step": 3_000_000_000, "rounding": storage.get("rounding", "nearest")}
    call = {"number": 3, "place": [1, NUMEL, NUMEL], **call}
    out = oracle.update(
        {key: inputs[source][key] for key in names}, family, inner, outer, **scalars, **{**call, "place": tuple(call["place"])}
    )
    written = {key: encode(quiet(out[key])) for key in names if key not in ("g", "consensus")}
    kind = {"name": name, "inputs": source, "dtype": dtype, "family": family, "inner": inner, "outer": outer, "tensors": names}
    return {**kind, "scalars": scalars, **call, "out": written}


def updates(inputs: dict[str, dict[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    """Yield all entries: every case for every type, with the roundings and masters that the type has."""
    for dtype in DTYPES:
        cases = CASES + (EDGE_CASES if dtype != "float64" else [])
        for case in cases:
            yield update(inputs, dtype, case)
            if dtype == "bfloat16":
                yield update(inputs, dtype, case, rounding="stochastic")
            if dtype in NARROW and case[0] in ("plain", "all", "heat", "found_inf 2"):
                yield update(inputs, dtype, case, master=True)


def golden() -> dict[str, Any]:
    """Return the whole content."""
    inputs = {dtype: ordinary(dtype) for dtype in DTYPES}
    inputs |= {f"{dtype} edges": edges(dtype) for dtype in DTYPES if dtype != "float64"}
    return {
        "version": oracle.VERSION,
        "philox": [dict(zip(("counter", "key", "words"), map(str.split, known), strict=True)) for known in KNOWN_ANSWERS],
        "words": [
            {"seed": seed, "step": step, "stream": stream, "index": index, "words": [f"{int(w[0]):08x}" for w in words]}
            for seed, step, stream, index in SAMPLES
            for words in [oracle.words([index], seed, step, stream)]
        ],
        "normals": [
            {"seed": seed, "step": step, "stream": stream, "offset": index, "normals": floats(z)}
            for seed, step, stream, index in SAMPLES
            for z in [oracle.normals(oracle.place_index(8, index), seed, step, stream)]
        ],
        "pairs": [*corners(), *catches()],
        "inputs": {name: {key: encode(array) for key, array in tensors.items()} for name, tensors in inputs.items()},
        "updates": list(updates(inputs)),
    }


def layout(content: dict[str, Any]) -> str:
    """Return JSON with one entry a line."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            body = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        elif isinstance(value, dict):
            body = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()) + "\n }"
        else:
            body = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write or check the golden file of the numeric contract.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the file is not up to date")
    args = parser.parse_args()
    text = layout(golden())
    if not args.check:
        GOLDEN.write_text(text, encoding="utf-8")
        print(f"wrote {GOLDEN} ({len(text):,} bytes)")
        return 0
    same = GOLDEN.exists() and GOLDEN.read_text(encoding="utf-8") == text
    print(f"{GOLDEN}: {'is' if same else 'IS NOT'} what the independent implementation gives")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
