"""Steps on a GPU give the bits of the C++ backend on the CPU, which others compare with the oracle."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from contract_cases import CASES, CPU, DTYPES, SIZES, Case, arrays_of, to_torch, whole
from device_runs import BACKENDS, DEVICE, KERNELS, NEEDS_GPU, NEEDS_TRITON, assert_lists_equal, differences, lists_on, on_both
from hypothesis import given, settings
from hypothesis import strategies as st
from step_lists import BF16, F16, F32, F64, PLACES, SHAPES, STEPS, STREAMS, Lists

from deeprelax_cuda import backends, functional, golden
from deeprelax_cuda.golden import selftest
from deeprelax_cuda.noise import Place, as_place
from deeprelax_cuda.steps import Tensors

pytestmark = NEEDS_GPU

BY_NAME = {case.name: case for case in CASES}
#: Triton compiles a kernel for each, which takes a second: one type a case, all types in turn.
TRITON_TYPES = {case.name: case.dtypes[i % len(case.dtypes)] for i, case in enumerate(CASES)}
KINDS = [
    pytest.param(c.name, d, label, id=f"{c.name}-{str(d)[6:]}-{label}", marks=NEEDS_TRITON if label == "triton" else ())
    for label in ("cuda", "triton", "eager")
    for c in CASES
    for d in c.dtypes
    if label != "triton" or d == TRITON_TYPES[c.name]
]
#: Those for compute-sanitizer; of Triton's a few that have every term, each way of memory and each type.
LITTLE = [kind for kind in KINDS if kind.values[2] == "cuda"]
LITTLE += [
    pytest.param(name, dtype, "triton", id=f"{name}-{str(dtype)[6:]}-triton", marks=NEEDS_TRITON)
    for name, dtype in [
        ("fused-outer-all", torch.float32),
        ("gradient-average-fused", torch.float64),
        ("masters", torch.bfloat16),
        ("stochastic-fused", torch.bfloat16),
        ("langevin", torch.float16),
    ]
]
#: Where in memory tensors begin: anywhere; at full alignment; there but for y and g; all one element behind it.
OFFSETS = {
    "scattered": lambda i, j, key: (5 * i + 3 * j) % 13,
    "aligned": lambda i, j, key: 0,
    "y and g apart": lambda i, j, key: 3 if key in ("y", "g") else 0,
    "one behind": lambda i, j, key: 1,
}


def test_the_cuda_backend_serves() -> None:
    assert backends.available(DEVICE)[0] == "cuda"
    for dtype in DTYPES:
        assert backends.select(DEVICE, dtype) == backends.Selection("cuda", "preferred for cuda tensors")


@pytest.mark.parametrize("label", KERNELS)
def test_a_backend_serves_who_asks_for_it(label: str) -> None:
    for dtype in DTYPES:
        assert backends.select(DEVICE, dtype, label).name == label


@lru_cache(maxsize=4)
def inputs_of(name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> Any:
    inputs = [arrays_of(n, dtype, 100 + n, BY_NAME[name]) for n in sizes]
    return inputs, [3 * i + 1 for i in range(len(sizes))], [whole(n) for n in sizes]


@pytest.mark.parametrize(("name", "dtype", "label"), KINDS)
def test_all_cases_at_all_sizes(name: str, dtype: torch.dtype, label: str) -> None:
    case, call = BY_NAME[name], inputs_of(name, dtype, SIZES)
    triples = on_both(case, dtype, label, *call)
    assert differences(triples) == []
    # Not a comparison of two things that nobody has touched: y moves unless the step is skipped.
    before = torch.cat([to_torch(a["y"]) for a in call[0]])
    after = torch.cat([got for name, _, got in triples if name.startswith("y ")])
    still = (before == after).float().mean().item()
    if case.found_inf:
        assert still == 1.0
    else:
        assert still < (0.2 if dtype.itemsize == 2 else 1e-3)  # a narrow y may round back


@pytest.mark.parametrize(("name", "dtype", "label"), LITTLE)
def test_a_little_of_everything(name: str, dtype: torch.dtype, label: str) -> None:
    """No kernel is started but the backend's: this is what bench/gpu.sh puts to compute-sanitizer."""
    call = inputs_of(name, dtype, (0, 1, 5, 17, 129, 1031))
    for offset in ("scattered", "aligned"):
        assert differences(on_both(BY_NAME[name], dtype, label, *call, offset=OFFSETS[offset])) == []


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fused-outer", F32), ("nesterov", BF16), ("stochastic", BF16), ("masters", F16), ("gradient-average", F64)],
)
def test_any_alignment_of_memory_and_of_noise(name: str, dtype: torch.dtype, start: int, offset: Any, label: str) -> None:
    """Packets of 16 bytes and counters of four normals may begin at different elements, or at the same."""
    sizes = (1, 3, 8, 31, 256, 2049)
    inputs, numbers, _ = inputs_of(name, dtype, sizes)
    places = [as_place("place", start, n) for n in sizes]
    assert differences(on_both(BY_NAME[name], dtype, label, inputs, numbers, places, offset=offset)) == []


SHARDS = [
    1,
    2**32 - 5,
    2**34 - 517,
    2**40 + 3,
    (0, 1, 1),
    (2, 4, 9),
    (2**34 - 300, 7, 64),
    (0, 128, 1000),
    (11, 700, 2**33 + 1),
]


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize("place", SHARDS, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [("fused-outer", F32), ("stochastic", BF16), ("gradient-average", F64), ("masters", F16)]
)
def test_a_shard_gets_its_slice_of_the_noise(name: str, dtype: torch.dtype, place: Any, label: str) -> None:
    sizes = (1, 6, 700, 1031)
    inputs = [arrays_of(n, dtype, n, BY_NAME[name]) for n in sizes]
    places = [as_place("place", place, n) for n in sizes]
    for offset in (OFFSETS["scattered"], OFFSETS["aligned"]):
        assert differences(on_both(BY_NAME[name], dtype, label, inputs, [5] * 4, places, offset=offset)) == []


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("count", [1, 2, 35, 251, 252, 253, 287, 288, 289, 576, 577, 1000, 5000])
def test_any_number_of_tensors(count: int, label: str) -> None:
    case = BY_NAME["fused-outer"]
    sizes = [(7 * i) % 23 for i in range(count)]
    kinds = {n: arrays_of(n, F32, n, case) for n in set(sizes)}
    numbers = [(11 * i) % count for i in range(count)]
    call = [kinds[n] for n in sizes], numbers, [whole(n) for n in sizes]
    assert differences(on_both(case, F32, label, *call)) == []


@pytest.mark.parametrize("label", KERNELS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_list_in_any_case(label: str, data: Any) -> None:
    case = data.draw(st.sampled_from(CASES))
    dtype = data.draw(st.sampled_from(case.dtypes)) if label == "cuda" else TRITON_TYPES[case.name]
    sizes = data.draw(st.lists(st.integers(0, 3000), max_size=6))
    starts = data.draw(st.lists(st.integers(0, 2**40), min_size=len(sizes), max_size=len(sizes)))
    shifts = data.draw(st.lists(st.integers(0, 16), min_size=5, max_size=5))
    inputs = [arrays_of(n, dtype, n, case) for n in sizes]
    places = [Place(start, max(n, 1), max(n, 1)) for start, n in zip(starts, sizes, strict=True)]
    call = inputs, list(range(len(sizes))), places
    assert differences(on_both(case, dtype, label, *call, offset=lambda i, j, key: shifts[(i + j) % 5])) == []


# ---- The public steps -------------------------------------------------------------------------------------------------------


def for_kinds(kinds: dict[str, list[Any]]) -> list[Any]:
    """Return (backend, kind) for the kinds of each backend."""
    return [
        pytest.param(label, *kind, id=f"{label}-{'-'.join(map(str, kind))}", marks=NEEDS_TRITON if label == "triton" else ())
        for label, these in kinds.items()
        for kind in these
    ]


NARROW_OR_NOT = [(F32, False), (F64, False), (BF16, False), (F16, False), (BF16, True), (F16, True)]


@pytest.mark.parametrize(
    ("label", "dtype", "masters"),
    for_kinds({"cuda": NARROW_OR_NOT, "triton": [(F32, False), (BF16, True)], "eager": NARROW_OR_NOT}),
)
@pytest.mark.parametrize("name", STEPS)
def test_public_steps(name: str, dtype: torch.dtype, masters: bool, label: str) -> None:
    torch.manual_seed(0)
    here = Lists.of(dtype, (*SHAPES[:3], (300, 70)), masters=masters)
    there = lists_on(here, DEVICE)
    before = here.clone()
    for where, backend in ((here, "cpu"), (there, label)):
        STEPS[name](where, streams=STREAMS, places=PLACES, backend=backend)
    assert_lists_equal(there, here)
    assert not torch.equal(here.params[3], before.params[3])


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0, float("nan")])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", [name for name in STEPS if not name.startswith("outer")])
@pytest.mark.parametrize(
    ("label", "dtype"), for_kinds({"cuda": [(F32,), (BF16,)], "triton": [(F32,)], "eager": [(F32,), (BF16,)]})
)
def test_scales_on_the_device(label: str, name: str, dtype: torch.dtype, scale: float | None, found: float) -> None:
    torch.manual_seed(1)
    here = Lists.of(dtype, ((5, 3), (1030,)))
    there, before = lists_on(here, DEVICE), here.clone()
    for where, backend, device in ((here, "cpu", CPU), (there, label, DEVICE)):
        inv_scale = None if scale is None else torch.tensor(scale, device=device)
        found_inf = torch.tensor(found, device=device)
        STEPS[name](where, inv_scale=inv_scale, found_inf=found_inf, backend=backend)
    assert_lists_equal(there, here)
    assert torch.equal(here.params[1], before.params[1]) == (found != 0.0)


@pytest.mark.parametrize("label", BACKENDS)
def test_stochastic_rounding(label: str) -> None:
    torch.manual_seed(2)
    here = Lists.of(BF16, ((5, 3), (4099,)))
    there = lists_on(here, DEVICE)
    nearest = here.clone()
    for where, backend, rounding in ((here, "cpu", "stochastic"), (there, label, "stochastic"), (nearest, "cpu", "nearest")):
        STEPS["langevin, fused"](where, rounding=rounding, backend=backend)
    assert_lists_equal(there, here)
    assert not torch.equal(here.params[1], nearest.params[1])


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "permuted"])
def test_dense_strides_are_walked_in_storage_order(layout: str, label: str) -> None:
    made = {
        "channels_last": lambda t: t.reshape(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.reshape(14, 15).t(),
        "permuted": lambda t: t.reshape(7, 2, 15).permute(2, 0, 1),
    }[layout]
    torch.manual_seed(3)
    here = [made(torch.randn(210)) for _ in range(4)]
    there = [t.clone(memory_format=torch.preserve_format).to(DEVICE) for t in here]
    assert there[0].stride() == here[0].stride()
    scalars = BY_NAME["langevin"].rounded(F32)
    for name, (y, g, x, m) in (("cpu", here), (label, there)):
        backends.make_plan(name, Tensors([y], anchors=[x], averages=[m], numbers=[1], places=[whole(210)])).run([g], scalars)
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(BF16, "nearest"), (BF16, "stochastic"), (F16, "nearest")], ids=str)
def test_rounding_of_every_exponent(dtype: torch.dtype, rounding: str, label: str) -> None:
    """y = x in family B without noise is rounding alone: of all upper halves of float32 with the lower halves that matter."""
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16) | lower).ravel().view(np.float32)
    zeros = np.zeros(x.size, np.uint16 if dtype == BF16 else np.float16)
    case = Case("rounding", {"family": "gradient_average", "rounding": rounding})
    arrays = {"y": zeros, "g": zeros, "x": x, "p": np.zeros(x.size, np.float32)}
    for offset in (OFFSETS["scattered"], OFFSETS["aligned"]):
        assert differences(on_both(case, dtype, label, [arrays], [4], [whole(x.size)], offset=offset)) == []


# ---- Normals and the golden file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", BACKENDS)
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 5, 127, 128, 129, 1000, 100001])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**34 - 65])
def test_gaussian_of_any_length_from_any_element(offset: int, numel: int, label: str) -> None:
    options = {"seed": 3, "step": 1, "stream": 2**32 - 1, "offset": offset}
    got = functional.gaussian(numel, **options, device=DEVICE, backend=label)
    assert got.device.type == DEVICE.type
    assert torch.equal(got.cpu(), functional.gaussian(numel, **options, backend="cpu"))


@pytest.mark.parametrize("label", BACKENDS)
def test_millions_of_normals(label: str) -> None:
    """So many that one unit in the last place of any coefficient shows; the first of them against the oracle too."""
    options = {"seed": 2**63 + 17, "step": 9, "stream": 5}
    got = functional.gaussian(2**24, **options, device=DEVICE, backend=label).cpu()
    assert torch.equal(got, functional.gaussian(2**24, **options, backend="cpu"))
    assert torch.equal(got[: 2**18], torch.from_numpy(oracle.normals(np.arange(2**18, dtype=np.uint64), 2**63 + 17, 9, 5)))


@pytest.mark.parametrize("label", BACKENDS)
def test_the_golden_file(label: str) -> None:
    known = golden.load()
    entries = sum(len(known[kind]) for kind in ("normals", "pairs", "updates"))
    assert selftest.run(label, DEVICE) == (entries, [])
