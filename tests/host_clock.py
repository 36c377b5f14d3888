"""Steps with a clock, on a host in the place of the GPU: see host_program.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from clock_cases import LAWS, RULES, Timing, compare
from contract_cases import DTYPES
from host_module import F32, F64, Test

from deeprelax_cuda.backends import cpu, cuda, eager

MAKERS = {"cuda": cuda.make_plan, "cpu": cpu.make_plan, "eager": eager.make_plan}


def clock() -> Iterator[Test]:
    for rule, dtype, lr, linear in product(RULES, DTYPES, (F32, F64), (False, True)):
        for name in ("fused-outer-all", "gradient-average-fused"):
            label = f"{name}, {rule}, {dtype}, lr {lr}{', linear' if linear else ''}"
            yield label, partial(compare, MAKERS, Timing(name, RULES[rule], dtype=dtype, lr=lr, counted=linear))
    for label, timing in LAWS.items():
        yield label, partial(compare, MAKERS, timing)
