"""Calls that hypothesis draws, on a host in the place of the GPU: see host_program.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from contract_cases import DTYPES, Case
from host_module import F16, Offset, Test, compare
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprelax_cuda.noise import as_place
from deeprelax_cuda.steps import NARROW


def drawn() -> Iterator[Test]:
    yield "400 calls", partial(draw_calls, 400)


def draw_calls(examples: int) -> None:
    switch = st.sampled_from
    numbers = {"eta": (0.1, -0.3), "k": (0.0, 0.4), "s": (0.0, 0.2), "a": (0.0, 0.3, 1.0), "c": (0.0, 0.2), "wd": (0.0, 0.01)}
    numbers |= {"mu": (0.0, 0.8), "damp1": (1.0, 0.6), "lr": (0.5,), "mu_o": (0.0, 0.7), "wd_o": (0.0, 0.02), "kr": (0.0, 0.3)}
    options = {key: switch(values) for key, values in numbers.items()}
    options |= {key: st.booleans() for key in ("outer", "nesterov", "coupling_in_momentum", "maximize", "nesterov_o", "inner")}
    options |= {"family": switch(("langevin", "gradient_average")), "rounding": switch(("nearest", "stochastic"))}
    options |= {"seed": st.integers(0, 2**64 - 1), "step": st.integers(0, 2**32 - 1)}
    place = st.tuples(st.integers(0, 2**40), st.integers(1, 1200), st.integers(0, 9))
    tensor = st.tuples(st.integers(0, 1200), st.booleans(), place, st.integers(0, 2**28 - 1))

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(
        scalars=st.fixed_dictionaries(options),
        dtype=switch(DTYPES),
        masters=st.booleans(),
        inv_scale=switch((None, 0.3)),
        found_inf=switch((None, None, 0.0, 2.0)),
        tensors=st.lists(tensor, min_size=1, max_size=6),
        offsets=st.lists(st.integers(0, 15), min_size=7, max_size=7),
        together=st.booleans(),
    )
    def agree(scalars, dtype, masters, inv_scale, found_inf, tensors, offsets, together) -> None:
        masters = masters and dtype in NARROW
        if dtype == F16 or masters:
            scalars["rounding"] = "nearest"
        case = Case("drawn", scalars, masters, inv_scale, found_inf)
        sizes = [n for n, *_ in tensors]
        places = [as_place("place", at[0] if is_whole else (at[0], at[1], at[1] + at[2]), n) for n, is_whole, at, _ in tensors]
        offset: Offset = lambda i, j, key: offsets[i % 7] if together else offsets[(i + j) % 7]  # noqa: E731
        compare(case, dtype, sizes, offset, places, [number for *_, number in tensors])

    agree()
