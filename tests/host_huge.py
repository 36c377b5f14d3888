"""Tensors that are too large to exist, on a host in the place of the GPU: see host_program.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from contract_cases import BY_NAME, CPU, assert_equal, inputs_for, run, to_torch, whole
from host_cases import OFFSETS
from host_module import BF16, F16, F32, F64, HOST, Guarded, Test, launched, native, watch

from deeprelax_cuda.backends import cpu
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Scalars

#: Elements of tensors of which the last few blocks alone are in memory.
LARGE = (2**31 + 5, 2**33 + 1029, 2**40 + 3)


def huge() -> Iterator[Test]:
    for numel, start, (name, dtype) in product(
        LARGE, (0, -1, -3), [("fused-outer-all", F32), ("langevin", F64), ("stochastic", BF16), ("masters", F16)]
    ):
        if (dtype, start) == (F64, -3):
            continue  # sixteen bytes are two elements: packets begin at -1
        for place in (Place(-start, numel, numel), Place(2**34 + 1, numel, numel), Place(3, 7, 11)):
            yield f"{name}, {dtype}, {numel} elements from {start} at {place}", partial(large, name, dtype, numel, start, place)
    yield "more blocks than a launch has", many_blocks
    for first in (0, 1):
        yield f"normals of two launches from {first}", partial(many_normals, first)


def large(name: str, dtype: torch.dtype, numel: int, start: int, place: Place, before: tuple[int, ...] = ()) -> None:
    """The last blocks of a tensor, behind others of a launch that do not run, are a shard of it in its place.

    ``start`` is the element, not after the first, at whose address the packets begin; sixteen divides it.
    """
    per_block = 256 * (8 if dtype in (BF16, F16) else 4)
    last = (numel - start - 1) // per_block
    block = last - 2
    while (place.run < numel) and (start + block * per_block) % place.run:  # so that the piece begins with a run
        block -= 1
    first = start + block * per_block
    at = place.offset + first // place.run * place.pitch + first % place.run
    piece = Place(at, place.run, place.pitch) if place.run < numel else whole(numel - first)._replace(offset=at)

    case = BY_NAME[name]
    inputs = inputs_for(case, dtype, [numel - first])
    want, _ = run("cpu", case, dtype, inputs, [9], [piece], OFFSETS["aligned"])
    guards = {key: Guarded(to_torch(a), 64) for key, a in inputs[0].items()}

    def address(key: str) -> int:
        tensor = guards[key].tensor
        return tensor.data_ptr() - first * tensor.element_size()

    average = "m" if "m" in guards else "p"
    roles = ("y", "x", average, "v", "master", "w", "consensus")
    others = [[(1 << 40)] * len(before)] * len(roles)  # addresses that nobody looks at
    table = native.Table(
        getattr(native.Dtype, str(dtype).removeprefix("torch.")),
        [*before, numel],
        [0] * len(before) + [9],
        [*(whole(n) for n in before), place],
        *([*other, address(key)] if key in guards else [] for other, key in zip(others, roles, strict=True)),
    )
    skipped = sum((n + per_block - 1) // per_block for n in before)
    watch(0, skipped + block, skipped + last + 1)
    grads = np.array([1 << 40] * len(before) + [address("g")], np.uint64).tobytes()
    table.run_cuda(grads, case.rounded(dtype), 0, 0, None, HOST, 0)
    assert_equal([{key: guard.tensor for key, guard in guards.items()}], want, "the last blocks")
    assert all(guard.intact() for guard in guards.values())
    assert launched() == [skipped + last + 1]


def many_blocks() -> None:
    """Two tensors of 2**30 blocks, but for one in which the third lies, fill a launch; the next one goes to the next."""
    large("fused-outer-all", F32, 5000, 0, whole(5000), before=(2**40, 2**40 - 6 * 1024))
    sizes = [2**40, 2**40 - 1024, 1, 5]
    none = [[]] * 6
    table = native.Table(native.Dtype.float32, sizes, [0] * 4, [whole(n) for n in sizes], [1 << 41] * 4, *none)
    watch(7)
    scalars = Scalars(eta=0.5)
    table.run_cuda(np.full(4, 1 << 41, np.uint64).tobytes(), scalars, 0, 0, None, HOST, 0)
    assert launched() == [2**31 - 1, 2]


def many_normals(first: int) -> None:
    """More than a launch has blocks for: the second one goes on where the first ends."""
    most = (2**31 - 1) * 1024 - 4
    want = cpu.gaussian(3000, seed=1, step=2, stream=3, offset=first + most, device=CPU)
    out = Guarded(torch.zeros(3000), 64)
    watch(1, 0, 4)
    native.cuda_gaussian(out.tensor.data_ptr() - 4 * most, most + 3000, 1, 2, 3, first, HOST, 0)
    assert torch.equal(out.tensor, want)
    assert out.intact()
    assert launched() == [2**31 - 1, 3]
