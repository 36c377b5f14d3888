"""Every backend returns the bits of the numpy oracle and of the golden file, whatever the sizes, offsets, places and splits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import oracle
import pytest
import torch
from contract_cases import (
    BACKENDS,
    BY_NAME,
    CASES,
    CPU_SETS,
    DTYPES,
    NUMPY,
    SIZES,
    Case,
    arrays_of,
    backend,
    expected,
    run,
    same,
    to_torch,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprelax_cuda import backends, golden
from deeprelax_cuda.backends import cpu
from deeprelax_cuda.golden import selftest
from deeprelax_cuda.noise import Place, as_place
from deeprelax_cuda.steps import Tensors

GOLDEN = golden.load()
CPU = torch.device("cpu")


def check(label: str, case: Case, dtype: torch.dtype, inputs, wanted, numbers, places) -> None:
    """Run one call and compare everything: written tensors, read ones, and what lies around them."""
    outputs, guards = run(label, case, dtype, inputs, numbers, places)
    for i, (out, want) in enumerate(zip(outputs, wanted, strict=True)):
        for key, tensor in out.items():
            assert same(tensor, to_torch(want[key])), f"{key} of tensor {i} with {tensor.numel()} elements"
    assert all(guard.intact() for guard in guards)


@lru_cache(maxsize=4)
def all_sizes(name: str, dtype: torch.dtype):
    """Return one call on tensors of all sizes, and what the oracle makes of it."""
    case = BY_NAME[name]
    inputs = [arrays_of(n, dtype, 100 + n, case) for n in SIZES]
    numbers = [3 * i + 1 for i in range(len(SIZES))]
    places = [whole(n) for n in SIZES]
    wanted = [expected(a, case, dtype, n, p) for a, n, p in zip(inputs, numbers, places, strict=True)]
    return inputs, wanted, numbers, places


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize(
    ("name", "dtype"), [pytest.param(c.name, d, id=f"{c.name}-{str(d)[6:]}") for c in CASES for d in c.dtypes]
)
def test_steps_equal_the_oracle_at_all_sizes(name, dtype, label):
    # An interpreter takes its time: the largest sizes are for these there.
    all_of_them = label != "triton" or name in ("langevin", "fused-outer-all", "stochastic")
    some = slice(None) if all_of_them else slice(SIZES.index(65535))
    inputs, wanted, numbers, places = (part[some] for part in all_sizes(name, dtype))
    check(label, BY_NAME[name], dtype, inputs, wanted, numbers, places)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_moves(dtype):
    inputs, wanted, *_ = all_sizes("langevin", dtype)
    for before, after in zip(inputs, wanted, strict=True):
        for key in ("y", "m"):
            still = np.mean(before[key] == after[key]) if before[key].size else 0.0
            assert still < (0.2 if before[key].dtype.itemsize == 2 else 1e-3), key  # a narrow y may round back


# ---- Places, threads, splits, layouts ----------------------------------------------------------------------------------------

PLACES = [
    1,
    2,
    3,
    2**32 - 5,
    2**34 - 517,  # the upper half of the counter changes inside
    2**40 + 3,
    (0, 1, 1),
    (5, 1, 3),
    (7, 3, 3),
    (2, 4, 9),
    (1, 5, 8),
    (2**34 - 300, 7, 64),
    (3, 127, 130),
    (0, 128, 1000),
    (9, 129, 129),
    (11, 700, 2**33 + 1),
]


@pytest.mark.parametrize("label", [label for label in BACKENDS if label != "triton"])  # tests/test_triton.py has these
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fused-outer", torch.float32),
        ("stochastic", torch.bfloat16),
        ("gradient-average", torch.float64),
        ("masters", torch.float16),
    ],
)
def test_a_shard_gets_its_slice_of_the_global_noise(name, dtype, place, label):
    case, sizes = BY_NAME[name], (1, 6, 700, 1031)
    inputs = [arrays_of(n, dtype, n, case) for n in sizes]
    places = [as_place("place", place, n) for n in sizes]
    wanted = [expected(a, case, dtype, 5, p) for a, p in zip(inputs, places, strict=True)]
    check(label, case, dtype, inputs, wanted, [5] * len(sizes), places)


@pytest.mark.parametrize("count", [1, 2, 35, 252, 253, 1000, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("label", BACKENDS)
def test_any_number_of_tensors(count, label):
    if label == "triton" and count == 5000:
        pytest.skip("an interpreter takes its time; tests/test_triton.py looks at the launch")
    case = BY_NAME["fused-outer" if label != "triton" or count < 1000 else "noise-free"]  # an interpreter takes its time
    sizes = [(7 * i) % 23 for i in range(count)]
    kinds = {n: arrays_of(n, torch.float32, n, case) for n in set(sizes)}
    numbers = [(11 * i) % count for i in range(count)]
    wanted = [expected(kinds[n], case, torch.float32, k, whole(n)) for n, k in zip(sizes, numbers, strict=True)]
    check(label, case, torch.float32, [kinds[n] for n in sizes], wanted, numbers, [whole(n) for n in sizes])


@pytest.mark.skipif(not CPU_SETS, reason="the native module is not built")
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    case = BY_NAME["nesterov"]
    sizes = (100003, 3, 17, 40961, 0, 5)
    inputs = [arrays_of(n, dtype, n, case) for n in sizes]
    numbers, places = range(len(sizes)), [whole(n) for n in sizes]
    wanted = [expected(a, case, dtype, i, whole(n)) for i, (a, n) in enumerate(zip(inputs, sizes, strict=True))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("cpu", case, dtype, inputs, wanted, numbers, places)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("label", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_into_calls_and_any_case(label, data):
    """Calls on consecutive pieces of a tensor, each in its place, are one call on the whole."""
    case = data.draw(st.sampled_from(CASES))
    dtype = data.draw(st.sampled_from(case.dtypes))
    numel = data.draw(st.integers(0, 900))
    start = data.draw(st.integers(0, 2**40))
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    arrays = arrays_of(numel, dtype, numel, case)
    want = expected(arrays, case, dtype, 2, Place(start, max(numel, 1), max(numel, 1)))
    for lo, hi in zip([0, *cuts], [*cuts, numel], strict=True):
        part = {key: a[lo:hi] for key, a in arrays.items()}
        piece = {key: a[lo:hi] for key, a in want.items()}
        check(label, case, dtype, [part], [piece], [2], [Place(start + lo, max(hi - lo, 1), max(hi - lo, 1))])


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.reshape(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        lambda t: t.reshape(14, 15).t(),
        lambda t: t.reshape(7, 2, 15).permute(2, 0, 1),
    ],
    ids=["channels_last", "transposed", "permuted"],
)
def test_dense_strides_are_walked_in_storage_order(layout, label):
    """Also DeepSpeed's CPU Adam: a channels_last parameter must not be taken for a contiguous one."""
    generator = torch.Generator().manual_seed(0)
    roles = [layout(torch.randn(210, generator=generator)) for _ in range(4)]
    flat = [t.as_strided((210,), (1,)).clone() for t in roles]
    scalars = BY_NAME["langevin"].rounded(torch.float32)
    with backend(label) as name:
        for y, g, x, m in (roles, flat):
            tensors = Tensors([y], anchors=[x], averages=[m], numbers=[1], places=[whole(210)])
            backends.make_plan(name, tensors).run([g], scalars)
    for strided, plain in zip(roles, flat, strict=True):
        assert torch.equal(strided.as_strided((210,), (1,)), plain)


# ---- Rounding: every bit pattern ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "nearest")],
    ids=str,
)
def test_rounding_of_every_exponent(dtype, rounding, label):
    """y = x in family B without noise is rounding alone: of all upper halves of float32 with the lower halves that matter."""
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    patterns = (np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16) | lower).ravel()
    x = patterns.view(np.float32)
    zeros = np.zeros(x.size, NUMPY[dtype])
    case = Case("rounding", {"family": "gradient_average", "rounding": rounding})
    arrays = {"y": zeros, "g": zeros, "x": x, "p": np.zeros(x.size, np.float32)}
    want = expected(arrays, case, dtype, 4, whole(x.size))
    check(label, case, dtype, [arrays], [want], [4], [whole(x.size)])


# ---- The golden file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", BACKENDS)
def test_golden_normals(label):
    with backend(label) as name:
        for entry in GOLDEN["normals"] + GOLDEN["pairs"]:
            assert selftest.check_normals(entry, name, CPU) is None


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize("entry", GOLDEN["updates"], ids=lambda e: f"{e['name']}-{e['inputs']}")
def test_golden_updates(entry, label):
    with backend(label) as name:
        assert selftest.check_update(entry, GOLDEN["inputs"][entry["inputs"]], name, CPU) is None


@pytest.mark.parametrize("label", BACKENDS)
def test_the_self_test_asks_for_every_entry(label):
    with backend(label) as name:
        assert selftest.run(name, CPU) == (sum(len(GOLDEN[kind]) for kind in ("normals", "pairs", "updates")), [])


@pytest.mark.parametrize("kind", ["normals", "pairs"])
def test_one_wrong_bit_of_normals_is_told(kind):
    for entry in GOLDEN[kind]:
        *others, last = map(float.fromhex, entry["normals"])
        changed = {**entry, "normals": [*map(float.hex, others), float(np.nextafter(np.float32(last), np.float32(9))).hex()]}
        said = selftest.check_normals(changed, "eager", CPU)
        assert said is not None
        assert f"seed {entry['seed']}, " in said
        assert f"element {len(others)}: expected " in said


def test_one_wrong_bit_of_any_tensor_of_an_update_is_told():
    for entry in GOLDEN["updates"]:
        inputs = GOLDEN["inputs"][entry["inputs"]]
        for key in entry["tensors"]:
            *others, last = entry["out"].get(key, inputs[key]).split()
            bit = 4 * len(last) - 2 if "edges" in entry["inputs"] else 0  # of the exponent: NaNs are all the same
            flipped = f"{int(last, 16) ^ 1 << bit:0{len(last)}x}"
            changed = {**entry, "out": {**entry["out"], key: " ".join([*others, flipped])}}
            said = selftest.check_update(changed, inputs, "eager", CPU)
            wanted = f'update "{entry["name"]}" of {entry["inputs"]}, {key}: element 16: expected {flipped}, got '
            assert (said or "").startswith(wanted)


# ---- Many normals ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("label", BACKENDS)
def test_sixteen_million_normals(label):
    """So many that one unit in the last place of any coefficient shows."""
    chunk, seed, step, stream = 2**20, 2**63 + 17, 9, 5
    with backend(label) as name:
        for offset in range(0, 2**24 if label != "triton" else 2**22, chunk):
            got = backends.load(name).gaussian(chunk, seed=seed, step=step, stream=stream, offset=offset, device=CPU)
            want = oracle.normals(np.arange(offset, offset + chunk, dtype=np.uint64), seed, step, stream)
            assert torch.equal(got, torch.from_numpy(want))


@pytest.mark.skipif(not CPU_SETS, reason="the native module is not built")
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 5, 127, 128, 129, 1000, 100001])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**34 - 65])
@pytest.mark.parametrize("label", BACKENDS)
def test_gaussian_of_any_length_from_any_element(label, offset, numel):
    with backend(label) as name:
        got = backends.load(name).gaussian(numel, seed=3, step=1, stream=2**32 - 1, offset=offset, device=CPU)
    index = np.uint64(offset) + np.arange(numel, dtype=np.uint64)
    assert torch.equal(got, torch.from_numpy(oracle.normals(index, 3, 1, 2**32 - 1)))


def test_instruction_sets_are_named():
    assert cpu._native.use_instruction_set("no such thing") is False
    assert cpu.build_info()["instruction_set"] == CPU_SETS[0]
