"""Lists of any length, and plans that are used again, on a host in the place of the GPU: see host_program.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
from clock_cases import RULES, START, a_clock
from contract_cases import BY_NAME, DTYPES, assert_equal, plan_inputs, scales
from host_cases import OFFSETS
from host_module import F32, F64, HOST, Guarded, Test, compare, launched, watch

from deeprelax_cuda.backends import cpu, cuda, tables

#: Tensors of a launch.
ROWS = 288
COUNTS = (1, 2, 35, 251, 252, 253, 287, 288, 289, 1000, 5000)
EMPTY: dict[str, Callable[[int, int], bool]] = {
    "no": lambda i, count: False,
    "the first and the last": lambda i, count: i in (0, count - 1),
    "every other": lambda i, count: i % 2 == 0,
    "all but one": lambda i, count: i != count // 2,
    "all": lambda i, count: True,
}


def lists() -> Iterator[Test]:
    for count, which in product(COUNTS, EMPTY):
        for name in ("langevin", "outer") if count < 1000 else ("langevin",) if which == "every other" else ():
            yield f"{name}, {count} tensors, {which} empty", partial(many, name, count, which, 23)
    for count in (35, 289):
        yield f"{count} tensors of several blocks", partial(many, "gradient-average", count, "every other", 3001)
    for dtype in DTYPES:
        yield f"a plan's steps, {dtype}", partial(steps_of_one_plan, dtype)
    yield "no device", no_device
    yield "another device", another_device
    yield "no tensors", partial(compare, BY_NAME["langevin"], F32, [], OFFSETS["aligned"])


def many(name: str, count: int, which: str, most: int) -> None:
    sizes = [0 if EMPTY[which](i, count) else 1 + (397 * i) % most for i in range(count)]
    compare(BY_NAME[name], F32, sizes, OFFSETS["independent"], numbers=[(11 * i) % count for i in range(count)])
    assert len(launched()) == sum(any(sizes[i : i + ROWS]) for i in range(0, count, ROWS))


def steps_of_one_plan(dtype: torch.dtype) -> None:
    """Kernels, numbers and the gradients' addresses, aligned or not, change from step to step."""
    sizes = [5, 0, 700, 1031]
    (got, mine), (want, theirs) = (plan_inputs("fused-outer-all", dtype, sizes) for _ in range(2))
    host_plan, cpu_plan = cuda.make_plan(mine), cpu.make_plan(theirs)
    names = ("langevin", "fused-outer-all", "heavy-ball", "outer", "noise-free", "scaled", "outer-replicas", "nesterov")
    for step, name in enumerate(names):
        case = BY_NAME[name]
        scalars = case.rounded(dtype)
        grads = [Guarded(t["g"] * (step + 1), (step * (i + 1)) % 9).tensor for i, t in enumerate(want)] if scalars.inner else []
        for plan in (host_plan, cpu_plan):
            plan.run(grads, scalars, *scales(dtype, case.inv_scale, None))
        assert_equal(got, want, name)


def no_device() -> None:
    (got, mine), (want, _) = (plan_inputs("langevin", F32, [700]) for _ in range(2))
    watch()
    with_device, cuda.NO_DEVICE = cuda.NO_DEVICE, -1  # type: ignore[misc]
    try:
        clock = a_clock(RULES["scoping"], F64, linear=True)
        cuda.make_plan(mine).run([t["g"] for t in got], BY_NAME["langevin"].rounded(F32), clock=clock)
    finally:
        cuda.NO_DEVICE = with_device  # type: ignore[misc]
    assert launched() == []
    assert int(clock.step) == START
    assert_equal(got, want, "a step on no device")


def another_device() -> None:
    """What the runtime refuses is raised, and the plan still serves."""
    roles, mine = plan_inputs("langevin", F32, [700])
    table = tables.make_table(mine)
    call = (tables.gradient_addresses([t["g"] for t in roles]), BY_NAME["langevin"].rounded(F32), 0, 0, None)
    with pytest.raises(RuntimeError, match="no such device"):
        table.run_cuda(*call, 1, 0)
    table.run_cuda(*call, HOST, 0)
