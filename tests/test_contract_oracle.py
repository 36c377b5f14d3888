"""The independent implementation of the contract: its generator, normals and roundings, and the golden file made from it."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from scipy import stats

from deeprelax_cuda import golden, noise

GOLDEN = golden.load()
TOOLS = Path(__file__).resolve().parents[1] / "tools"
COUNT = 2**22
SIGMAS = 4.5  # every bound below is in standard errors; the noise is fixed, so that a test passes always or never


def hexadecimal(items: list[str]) -> list[int]:
    return [int(item, 16) for item in items]


def from_hex(normals: list[str]) -> np.ndarray:
    return np.array([float.fromhex(text) for text in normals], np.float32)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype == np.float32 and bool((left.view(np.uint32) == right.view(np.uint32)).all())


@functools.lru_cache(maxsize=4)
def normals(seed: int = 2024, step: int = 0, stream: int = 0, count: int = COUNT) -> np.ndarray:
    """Return the first normals of a stream, widened; each counter is used for its four lanes, which is what takes time."""
    w0, w1, w2, w3 = oracle.words(np.arange(0, count, 4), seed, step, stream)
    return np.stack([*oracle.box_muller(w0, w1), *oracle.box_muller(w2, w3)], axis=1).reshape(-1).astype(np.float64)


# ---- The generator -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", GOLDEN["philox"], ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers_of_random123(known):
    counter, key, words = (hexadecimal(known[name]) for name in ("counter", "key", "words"))
    assert [int(w[0]) for w in oracle.philox4x32(tuple(counter), tuple(key))] == words
    assert list(noise.philox4x32(counter, key)) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("replica", [0, 1, 77, 2**32 - 1])
def test_derived_seeds_are_the_first_two_words_of_their_counter(seed, replica):
    assert noise.derive_seed(seed, replica) == oracle.derive_seed(seed, replica)


def test_a_place_is_a_slice_of_the_whole():
    whole = np.arange(1000).reshape(20, 50)
    shard = whole[3:9, 10:17]
    assert (oracle.place_index(shard.size, (3 * 50 + 10, 7, 50)) == shard.reshape(-1)).all()
    assert (oracle.place_index(5, 2**33 + 1) == 2**33 + 1 + np.arange(5)).all()
    assert len(oracle.place_index(0)) == 0


# ---- numpy itself ------------------------------------------------------------------------------------------------------------


def test_numpy_rounds_each_float32_operation_once():
    """binary64 has more than twice the bits of binary32, so rounding its result again is harmless for these operations."""
    rng = np.random.default_rng(0)
    a, b = (np.ldexp(rng.uniform(1, 2, 2**20), rng.integers(-20, 20, 2**20)).astype(np.float32) for _ in range(2))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for narrow, wide in [(a + b, wide_a + wide_b), (a - b, wide_a - wide_b), (a * b, wide_a * wide_b)]:
        assert same_bits(narrow, wide.astype(np.float32))
    assert same_bits(np.sqrt(a), np.sqrt(wide_a).astype(np.float32))


def test_numpy_keeps_subnormals():
    smallest = np.array([1], np.uint32).view(np.float32)
    assert (smallest + smallest).view(np.uint32)[0] == 2
    assert (np.float32(2**-126) * np.full(1, 0.5, np.float32)).view(np.uint32)[0] == 2**22


# ---- Roundings ---------------------------------------------------------------------------------------------------------------


def all_kinds_of_bits() -> np.ndarray:
    """Return float32 values of every sign and exponent, with ties, and both kinds of NaN."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).reshape(-1).view(np.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_nearest_is_that_of_torch(dtype):
    values = all_kinds_of_bits()
    with np.errstate(over="ignore"):
        ours = oracle.round_bfloat16(values) if dtype == torch.bfloat16 else values.astype(np.float16)
    theirs = torch.from_numpy(values).to(dtype)
    widened = torch.from_numpy(oracle.widen(ours))
    assert torch.equal(torch.isnan(widened), torch.isnan(theirs))
    number = ~torch.isnan(widened)
    assert torch.equal(torch.from_numpy(ours.view(np.int16))[number], theirs.view(torch.int16)[number])


def test_stochastic_rounding_takes_a_neighbour_with_the_right_odds():
    value = np.full(2**16, 1 + 0.3 * 2**-7, np.float32)  # 0.3 of the way from 1 to the next bfloat16
    every = np.arange(2**16, dtype=np.uint32) << 16 | 0xFFFF  # the lower half of the word must not matter
    rounded = oracle.round_bfloat16(value, every)
    assert set(rounded.tolist()) == {0x3F80, 0x3F81}
    assert (rounded == 0x3F81).mean() == pytest.approx(0.3, abs=2**-16)


@pytest.mark.parametrize("word", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_stochastic_rounding_keeps_what_is_finite_infinite_or_nan(word):
    values = all_kinds_of_bits()
    rounded = oracle.widen(oracle.round_bfloat16(values, np.full(len(values), word, np.uint32)))
    assert (np.isnan(rounded) == np.isnan(values)).all()
    assert (np.isinf(rounded) == np.isinf(values)).all()
    number = ~np.isnan(values)
    assert (np.signbit(rounded) == np.signbit(values))[number].all()
    finite = np.isfinite(values)
    exact = values.view(np.uint32) % 2**16 == 0
    assert (rounded == values)[finite & exact].all()
    assert (np.abs(rounded) <= np.abs(values))[finite & (word == 0)].all()


# ---- The golden file ---------------------------------------------------------------------------------------------------------


def test_the_golden_file_is_what_the_oracle_gives():
    result = subprocess.run([sys.executable, TOOLS / "make_golden.py", "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_golden_words_normals_and_pairs():
    for entry in GOLDEN["words"]:
        words = oracle.words([entry["index"]], entry["seed"], entry["step"], entry["stream"])
        assert words[:, 0].tolist() == hexadecimal(entry["words"])
    for entry in GOLDEN["normals"]:
        index = oracle.place_index(len(entry["normals"]), entry["offset"])
        assert same_bits(oracle.normals(index, entry["seed"], entry["step"], entry["stream"]), from_hex(entry["normals"]))
    for entry in GOLDEN["pairs"]:
        index = oracle.place_index(2, entry["offset"])
        assert same_bits(oracle.normals(index, entry["seed"], entry["step"], entry["stream"]), from_hex(entry["normals"]))


@pytest.mark.parametrize("to", ["up", "down"])
@pytest.mark.parametrize("name", oracle.COEFFICIENTS)
def test_the_golden_pairs_catch_one_ulp_in_a_coefficient(name, to):
    pairs = [entry for entry in GOLDEN["pairs"] if entry["why"] == f"{name} {to}"]
    assert len(pairs) >= 2
    words = np.array([hexadecimal(entry["words"]) for entry in pairs], np.uint32)
    normals = np.stack([from_hex(entry["normals"]) for entry in pairs])
    assert same_bits(np.stack(oracle.box_muller(words[:, 0], words[:, 1]), axis=1), normals)
    value = oracle.COEFFICIENTS[name]
    mutant = {**oracle.COEFFICIENTS, name: np.nextafter(value, np.float32(math.inf if to == "up" else -math.inf))}
    wrong = np.stack(oracle.box_muller(words[:, 0], words[:, 1], mutant), axis=1)
    assert (wrong.view(np.uint32) != normals.view(np.uint32)).any(axis=1).all()


# ---- The noise is normal and independent -------------------------------------------------------------------------------------


def test_the_normals_below_are_those_of_the_oracle():
    assert (normals()[:4096] == oracle.normals(oracle.place_index(4096), 2024, 0, 0)).all()


def test_moments():
    z = normals()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - mean) < SIGMAS * math.sqrt(variance / len(z)), power


def test_kolmogorov_smirnov_distance():
    distance = stats.kstest(normals(), "norm").statistic
    assert distance * math.sqrt(COUNT) < 2.2  # exceeded with probability 1.3e-4


@pytest.mark.parametrize("sigmas", [3, 4, 5])
def test_tail_counts(sigmas):
    z = normals()
    for tail in (z > sigmas, z < -sigmas):
        expected = COUNT * stats.norm.sf(sigmas)
        assert abs(tail.sum() - expected) < SIGMAS * math.sqrt(expected) + 1


@pytest.mark.parametrize("sigmas", [4, 5, 6])
@pytest.mark.slow
def test_tail_mass_from_every_word_that_reaches_it(sigmas):
    """All w0 whose radius can exceed ``sigmas``, each with many angles, weigh the tail far beyond what sampling shows."""
    reach = math.floor(2**32 * math.exp(-(sigmas**2) / 2)) + 64
    angles = max(1, COUNT // reach)
    w0 = np.repeat(np.arange(reach, dtype=np.uint32), angles)
    w1 = oracle.words(np.arange(len(w0), dtype=np.uint64) * 4, 7, 0, 0)[0]
    first, second = oracle.box_muller(w0, w1)
    mass = (np.abs(np.stack([first, second])) > sigmas).sum() / (2 * angles * 2**32)
    expected = 2 * stats.norm.sf(sigmas)
    assert abs(mass / expected - 1) < 0.02
    outside, _ = oracle.box_muller(np.array([reach], np.uint32), np.array([0], np.uint32))
    assert 0 < outside[0] < sigmas


def test_the_largest_normal():
    first, _ = oracle.box_muller(np.array([0], np.uint32), np.array([0], np.uint32))
    assert first[0] == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)


def correlated(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest correlation, in standard errors, of two samples' values, sizes, and value with size."""
    size_a, size_b = (a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2)
    products = [a * b, size_a * size_b, a * size_b, size_a * b]
    return max(abs(float(p.mean())) for p in products) * math.sqrt(len(a))


def test_lanes_are_independent():
    lanes = normals().reshape(-1, 4).T
    for i in range(4):
        for j in range(i):
            assert correlated(lanes[i], lanes[j]) < SIGMAS, (i, j)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 4096])
def test_elements_are_independent(lag):
    z = normals(count=2**20)
    assert correlated(z[lag:], z[:-lag]) < SIGMAS


OTHERS = {
    "next step": {"step": 1},
    "far step": {"step": 2**31},
    "next tensor": {"stream": 1},
    "rounding domain": {"stream": 2**28},
    "next seed": {"seed": 2025},
    "seed above 2^32": {"seed": 2024 + 2**32},
    "replica 0": {"seed": oracle.derive_seed(2024, 0)},
    "replica 1": {"seed": oracle.derive_seed(2024, 1)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_steps_tensors_seeds_and_replicas_are_independent(other):
    assert correlated(normals(), normals(**OTHERS[other])) < SIGMAS


def test_replicas_are_independent_of_each_other():
    replicas = [normals(seed=oracle.derive_seed(2024, r), count=2**20) for r in range(4)]
    for i in range(4):
        for j in range(i):
            assert correlated(replicas[i], replicas[j]) < SIGMAS, (i, j)
