"""All cases at all sizes, places and addresses, on a host in the place of the GPU: see host_program.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from contract_cases import BY_NAME, CASES, CPU, DTYPES, SIZES, Case
from host_module import BF16, F16, F32, F64, HOST, Guarded, Offset, Test, compare, native, rows

from deeprelax_cuda.backends import cpu
from deeprelax_cuda.noise import as_place

OFFSETS: dict[str, Offset] = {
    "independent": lambda i, j, key: (5 * i + 3 * j) % 13,
    "aligned": lambda i, j, key: 0,
    "together at 1": lambda i, j, key: 1,
    "together at 3": lambda i, j, key: 3,
    "together at 6": lambda i, j, key: 6,
    "gradient alone": lambda i, j, key: 3 if key == "g" else 0,
    "parameter alone": lambda i, j, key: 1 if key == "y" else 0,
    "parameter and gradient": lambda i, j, key: {"y": 2, "g": 7}.get(key, 5),
}
SMALL = [n for n in SIZES if n < 1000]
#: More of CASES: that the device's memory says whether a step is taken, for kernels of every kind.
SKIPS = [
    Case(f"{name} with found_inf {found}", BY_NAME[name].scalars, found_inf=found, masters=BY_NAME[name].masters,
         dtypes=BY_NAME[name].dtypes)
    for name in ("langevin", "nesterov", "gradient-average", "outer", "fused-outer", "stochastic-fused")
    for found in (0.0, 1.0, 2.0, float("nan"))
]  # fmt: skip
EDGES = [
    Case("nothing", {"eta": 0.1, "inner": False, "outer": False}),
    Case("dampened nesterov", {"eta": 0.1, "k": 0.3, "s": 0.02, "a": 1.0, "mu": 0.7, "damp1": 0.4, "nesterov": True}),
    Case("noise-free momentum", {"eta": 0.1, "k": 0.3, "a": 0.3, "mu": 0.7, "coupling_in_momentum": False}),
    Case("last step number", {"eta": 0.1, "s": 0.2, "a": 0.3, "step": 2**32 - 1, "seed": 2**64 - 1}),
]


# Those that also go through the sizes of many blocks; by the element, which takes longer, in float32 alone.
LONG = ("langevin", "fused-outer-all", "stochastic")


def cases() -> Iterator[Test]:
    for case in [*CASES, *SKIPS, *EDGES]:
        for dtype, kind in product(case.dtypes, ("independent", "aligned")):
            sizes = SIZES if case.name in LONG and (kind == "aligned" or dtype == F32) else SMALL
            yield f"{case.name}, {dtype}, {kind}", partial(compare, case, dtype, list(sizes), OFFSETS[kind])


# ---- Addresses and places

PLACES = [
    *(0, 1, 2, 3, 6, 2**32 - 5, 2**34 - 517, 2**34 - 516, 2**40 + 3),  # above 2**34 the counter's upper word is not 0
    *((0, 1, 1), (5, 1, 3), (7, 3, 3), (2, 4, 9), (1, 5, 8), (3, 127, 130), (0, 128, 1000), (9, 129, 129)),
    *((2**34 - 300, 7, 64), (11, 700, 2**33 + 1), (2, 2000, 2001)),
]
PLACED = [("fused-outer-all", F32), ("stochastic", BF16), ("gradient-average", F64), ("masters", F16), ("noise-free", BF16)]
PLACED_SIZES = [1, 6, 700, 1031]


def offsets() -> Iterator[Test]:
    for (name, dtype), place, kind in product(PLACED, PLACES, OFFSETS):
        case, places = BY_NAME[name], [as_place("place", place, n) for n in PLACED_SIZES]
        yield f"{name} at {place}, {kind}", partial(compare, case, dtype, PLACED_SIZES, OFFSETS[kind], places)
    for (name, dtype), role in product([*PLACED, ("fused-outer-all", BF16)], (*"ygxmpvw", "consensus", "master")):
        one = partial(one_role_off, role)
        yield f"{name}, {role} alone unaligned", partial(compare, BY_NAME[name], dtype, PLACED_SIZES, one)
    for dtype in DTYPES:
        yield f"packets, {dtype}", partial(packets, dtype)
    for numel, first, at in product((0, 1, 2, 3, 5, 127, 1023, 1024, 1025, 5000), (0, 1, 2, 3, 2**34 - 65), (0, 1, 2)):
        yield f"{numel} normals of {first} to memory at {at}", partial(normals, numel, first, at)


def one_role_off(role: str, i: int, j: int, key: str) -> int:
    return int(key == role)


def packets(dtype: torch.dtype) -> None:
    """One odd element does not send a tensor to the slow path: the state decides, with heads and tails of their own."""
    case, sizes, n = BY_NAME["langevin"], [700], 1
    for kind, offset, aligned in (
        ("aligned", 0, [n, n, n, n]),
        ("together at 1", 1, [n, n, n, n]),
        ("together at 3", 3, [n, n, n, n]),
        ("together at 6", 6, [n, n, n, n]),
        ("gradient alone", 0, [n, n, 0, n]),
        ("parameter alone", 0, [n, 0, n, n]),
    ):
        place = as_place("place", offset, 700)
        compare(case, dtype, sizes, OFFSETS[kind], [place])
        assert rows() == aligned, (kind, rows())


def normals(numel: int, first: int, at: int) -> None:
    """The native function's memory may begin anywhere; that of the Python function is always aligned."""
    want = cpu.gaussian(numel, seed=2**63 + 5, step=7, stream=2**32 - 1, offset=first, device=CPU)
    out = Guarded(torch.zeros(numel), at)
    native.cuda_gaussian(out.tensor.data_ptr(), numel, 2**63 + 5, 7, 2**32 - 1, first, HOST, 0)
    assert torch.equal(out.tensor, want)
    assert out.intact()
