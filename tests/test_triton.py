"""The triton backend without a GPU: its kernels in Triton's interpreter beside the CPU's, and the host's part of a launch.

tests/test_contract.py puts the backend to the oracle together with all others. What is here is what only its kernels have:
blocks that go by whole packets, tables, clocks; and for that, blocks that are smaller than the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from clock_cases import LAWS, RULES, Timing, a_clock, compare
from contract_cases import (
    BY_NAME,
    CASES,
    DTYPES,
    TRITON,
    Guarded,
    arrays_of,
    assert_equal,
    inputs_for,
    plan_inputs,
    run,
    scales,
    tensors_of,
    to_torch,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_histories import Clocked, Method, Player, every, histories, over_capturable_methods, over_methods, play_alike

from deeprelax_cuda.backends import cpu, triton, triton_launch
from deeprelax_cuda.noise import Place, as_place
from deeprelax_cuda.steps import Tensors
from deeprelax_cuda.triton_kernels import kernels, sizes
from deeprelax_cuda.triton_kernels.table import COLUMNS, ROW, _first_packet, rows_of

F32, F64, BF16, F16 = DTYPES
BLOCK = 64

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton's interpreter does not serve here")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tensor of a hundred elements have whole blocks, and ends."""
    monkeypatch.setattr(sizes, "_INTERPRETER", dict.fromkeys((2, 4, 8), sizes.Size(BLOCK, 1)))


# ---- Whole packets and ends --------------------------------------------------------------------------------------------------

FOUR = [("fused-outer-all", F32), ("stochastic", BF16), ("gradient-average", F64), ("masters", F16)]
Offset = Callable[[int, int, str], int]
OFFSETS: dict[str, Offset] = {
    "aligned": lambda i, j, key: 0,
    "together at 1": lambda i, j, key: 1,
    "together at 3": lambda i, j, key: 3,
    "together at 6": lambda i, j, key: 6,
    "gradient alone": lambda i, j, key: 3 if key == "g" else 0,
    "parameter alone": lambda i, j, key: 1 if key == "y" else 0,
    "momentum alone": lambda i, j, key: 1 if key == "v" else 0,
    "scattered": lambda i, j, key: (5 * i + 3 * j) % 13,
}
PLACES = [
    *(0, 1, 2, 3, 6, 2**32 - 5, 2**34 - 30, 2**34 - 31, 2**40 + 3),  # from 2**34 on the counter's upper word is not 0
    *((0, 1, 1), (5, 1, 3), (2, 4, 9), (3, 127, 130), (9, 129, 129), (2**34 - 30, 7, 64), (2, 2000, 2001)),
]


def check(name: str, dtype: torch.dtype, lengths: list[int], offset: Offset, places: list[Place] | None = None) -> None:
    case = BY_NAME[name]
    call = inputs_for(case, dtype, lengths), range(len(lengths)), places or [whole(n) for n in lengths]
    want, _ = run("cpu", case, dtype, *call, offset=offset)
    got, guards = run("triton", case, dtype, *call, offset=offset)
    assert_equal(got, want, name)
    assert all(guard.intact() for guard in guards)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("name", "dtype"), [(case.name, dtype) for case in CASES for dtype in case.dtypes])
def test_whole_packets(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, [3, BLOCK, 2 * BLOCK - 3], OFFSETS["aligned"])


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("fused-outer-all", F32), ("stochastic", BF16), ("gradient-average", F64), ("masters", F16)]
)
def test_any_alignment(name: str, dtype: torch.dtype, kind: str) -> None:
    check(name, dtype, [1, BLOCK - 1, BLOCK, 2 * BLOCK + 9], OFFSETS[kind])


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), FOUR)
def test_any_place(name: str, dtype: torch.dtype, place: Any) -> None:
    lengths = [5, 2 * BLOCK, 2 * BLOCK + 9]
    for kind in ("aligned", "together at 3"):
        check(name, dtype, lengths, OFFSETS[kind], [as_place("place", place, n) for n in lengths])


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lists(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    dtype = data.draw(st.sampled_from(case.dtypes))
    lengths = data.draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=4))
    shifts = data.draw(st.lists(st.integers(0, 9), min_size=5, max_size=5))
    starts = [data.draw(st.integers(0, 2**36)) for _ in lengths]
    places = [Place(start, *[data.draw(st.integers(1, 200))] * 2) for start in starts]
    check(case.name, dtype, lengths, lambda i, j, key: shifts[(i + j) % 5], places)


@pytest.mark.parametrize(
    ("kind", "offset", "start", "aligned"),
    [
        ("aligned", 0, 0, True),
        ("together at 1", 1, -1, True),
        ("together at 3", 3, -3, True),
        ("gradient alone", 0, 0, True),  # looked at when the step is taken
        ("parameter alone", 0, 0, False),
        ("momentum alone", 0, 0, False),
        ("aligned", 1, -1, False),  # noise goes by counters
        ("aligned", (1, 7, 9), 0, True),  # but not where they are cut anyway
    ],
)
def test_packets_begin_where_counters_and_then_addresses_do(kind: str, offset: Any, start: int, aligned: bool) -> None:
    case = BY_NAME["heavy-ball"]
    arrays = arrays_of(700, F32, 0, case)
    guards = {key: Guarded(to_torch(a), OFFSETS[kind](0, j, key)) for j, (key, a) in enumerate(arrays.items())}
    tensors = tensors_of(case, [{key: guard.tensor for key, guard in guards.items()}], [7], [as_place("place", offset, 700)])
    row = dict(zip(COLUMNS, rows_of(tensors, BLOCK)[0], strict=False))
    assert (row["start"], bool(row["aligned"]), row["number"], row["numel"]) == (start, aligned, 7, 700)


@pytest.mark.parametrize("place", [0, 1, 2, 4, 7, (1, 7, 9), (2, 1000, 1000)], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_the_usual_roles_alone_begin_there_too(shift: int, place: Any) -> None:
    """A short cut serves where all is aligned, as nearly always."""
    tensors = [Guarded(torch.zeros(700), shift).tensor for _ in range(4)]
    place = as_place("place", place, 700)
    call = Tensors(tensors[:1], anchors=tensors[1:2], averages=tensors[2:3], momenta=tensors[3:], numbers=[0], places=[place])
    row = dict(zip(COLUMNS, rows_of(call, BLOCK)[0], strict=False))
    assert (row["start"], bool(row["aligned"])) == _first_packet([(t.data_ptr(), 4) for t in tensors], place, 700, 4)


def test_a_row_for_each_tensor_and_a_number_for_each_block() -> None:
    lengths = [5, 0, 2 * BLOCK, 2 * BLOCK + 1]
    tensors = Tensors([torch.zeros(n) for n in lengths], numbers=range(4), places=[whole(n) for n in lengths])
    rows, counts = rows_of(tensors, BLOCK)
    assert counts == [1, 0, 2, 3]
    assert len(rows) == 4 * ROW
    assert rows[COLUMNS.index("first_block") :: ROW] == [0, 1, 1, 3]


# ---- Tensors that are too large to exist -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("numel", [2**31 + 5, 2**33 + 1029, 2**40 + 3])
@pytest.mark.parametrize(("name", "dtype"), [("fused-outer-all", F32), ("stochastic", BF16), ("langevin", F64)])
def test_the_last_blocks_of_a_huge_tensor_are_a_shard_of_it(name: str, dtype: torch.dtype, numel: int) -> None:
    case, place = BY_NAME[name], Place(2**34 - 5, numel, numel)
    start = -(place.offset % 4)
    blocks = -(-(numel - start) // BLOCK)
    first = start + (blocks - 3) * BLOCK  # of the elements that are in memory
    inputs = inputs_for(case, dtype, [numel - first])
    want, _ = run("cpu", case, dtype, inputs, [3], [whole(numel - first)._replace(offset=place.offset + first)])

    roles = [{key: to_torch(a) for key, a in inputs[0].items()}]
    plan = triton.TritonPlan(tensors_of(case, roles, [3], [place]))
    row = dict(zip(COLUMNS, plan._rows.tolist(), strict=False))
    for role in ("y", "x", "m", "v", "w", "c", "master"):  # where element 0 would lie
        row[role] -= first * (dtype.itemsize if role == "y" else max(4, dtype.itemsize)) if row[role] else 0
    row |= {"numel": numel, "start": start, "aligned": 0, "first_block": 3 - blocks}  # those of the launch are the last ones
    plan._rows, plan._blocks = torch.tensor([*row.values(), 0]), torch.zeros(3, dtype=torch.int32)
    address = roles[0]["g"].data_ptr() - first * dtype.itemsize
    plan.run([], case.rounded(dtype), addresses=address.to_bytes(8, "little"))
    assert_equal(roles, want, name)


# ---- Clocks ------------------------------------------------------------------------------------------------------------------

MAKERS = {"triton": triton.make_plan, "cpu": cpu.make_plan}
infinite_elements = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.slow
@infinite_elements
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("lr", [F32, F64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_clock_counts_as_the_cpu_does(rule: str, lr: torch.dtype, linear: bool) -> None:
    compare(MAKERS, Timing("fused-outer-all", RULES[rule], lr=lr, counted=linear))


@pytest.mark.slow
@infinite_elements
@pytest.mark.parametrize("law", LAWS)
def test_a_clock_follows_its_law(law: str) -> None:
    compare(MAKERS, LAWS[law])


@pytest.mark.slow
@infinite_elements
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fused-outer-all", "gradient-average-fused"])
def test_a_clock_in_every_type(name: str, dtype: torch.dtype, linear: bool) -> None:
    compare(MAKERS, Timing(name, RULES["scoping"], dtype=dtype, counted=linear))


# ---- Whole optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@over_methods
@every(4)
@given(data=st.data())
def test_histories_of_an_optimizer(method: Method, data: st.DataObject) -> None:
    history = data.draw(histories(method, most_groups=2))
    play_alike(Player(history, backend="cpu"), Player(history, backend="triton"))


@pytest.mark.slow
@over_capturable_methods
@every(4)
@given(data=st.data())
def test_histories_of_an_optimizer_with_clocks(method: Method, data: st.DataObject) -> None:
    history = data.draw(histories(method, most_groups=2))
    play_alike(Player(history, backend="cpu"), Clocked(history, backend="triton"))


# ---- The host's part ---------------------------------------------------------------------------------------------------------


def launches(plan: Any, name: str, dtype: torch.dtype, grads: list[torch.Tensor], **changes: Any) -> list[triton.Launch]:
    case = BY_NAME[name]
    scalars = replace(case.rounded(dtype), **changes)
    return list(plan.launches(grads if scalars.inner else [], scalars, *scales(dtype, case.inv_scale, case.found_inf)))


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_one_launch_for_any_number_of_tensors(count: int) -> None:
    params, grads, anchors, averages = ([torch.zeros(i % 7) for i in range(count + 1)] for _ in range(4))
    tensors = Tensors(params, anchors, averages, numbers=range(count + 1), places=[whole(p.numel()) for p in params])
    plan = triton.TritonPlan(tensors)
    (launch,) = launches(plan, "langevin", F32, grads)
    assert launch.kernel == "step_kernel"
    assert launch.blocks == sum(p.numel() > 0 for p in params)
    clock = a_clock(RULES["scoping"], F64, linear=True)
    names = [launch.kernel for launch in plan.launches(grads, BY_NAME["langevin"].rounded(F32), clock=clock)]
    assert names == ["advance_kernel", "step_kernel"]


def test_nothing_is_launched_for_nothing() -> None:
    empty = triton.TritonPlan(Tensors([torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)], numbers=[0], places=[whole(0)]))
    assert launches(empty, "langevin", F32, [torch.zeros(0)]) == []
    assert launches(triton.TritonPlan(Tensors([])), "langevin", F32, []) == []
    roles, tensors = plan_inputs("langevin", F32, [5])
    assert launches(triton.TritonPlan(tensors), "langevin", F32, [roles[0]["g"]], inner=False) == []


def test_one_plan_takes_steps_of_all_kinds() -> None:
    """Kernels, numbers and the gradients' addresses change from step to step; the tables follow."""
    (got, mine), (want, theirs) = (plan_inputs("fused-outer-all", F32, [5, 0, 700]) for _ in range(2))
    plan, other = triton.make_plan(mine), cpu.make_plan(theirs)
    for step, name in enumerate(["langevin", "fused-outer-all", "heavy-ball", "outer", "noise-free", "scaled", "nesterov"]):
        case = BY_NAME[name]
        scalars = case.rounded(F32)
        grads = [Guarded(t["g"] * (step + 1), step * (i + 1) % 9).tensor for i, t in enumerate(want)] if scalars.inner else []
        for one in (plan, other):
            one.run(grads, scalars, *scales(F32, case.inv_scale, None))
        assert_equal(got, want, name)


def test_tables_are_written_only_when_addresses_change() -> None:
    roles, tensors = plan_inputs("langevin", F32, [5, 700])
    plan, grads = triton.TritonPlan(tensors), [t["g"] for t in roles]
    (first,), (second,) = (launches(plan, "langevin", F32, grads) for _ in range(2))
    (third,) = launches(plan, "langevin", F32, [grads[0].clone(), grads[1]])
    rows, addresses, blocks = range(3)
    assert first.arguments[addresses] is second.arguments[addresses] is not third.arguments[addresses]
    assert first.arguments[rows] is third.arguments[rows]
    assert first.arguments[blocks] is third.arguments[blocks]
    assert third.arguments[addresses][1] == grads[1].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_numbers_need_no_other_kernel(dtype: torch.dtype) -> None:
    roles, tensors = plan_inputs("fused-outer-all", dtype, [70])
    plan, grads = triton.TritonPlan(tensors), [t["g"] for t in roles]
    (known,) = launches(plan, "fused-outer-all", dtype, grads)
    half = {
        name: value / 2
        for name in ("k", "s", "eta", "lr", "mu")
        if (value := getattr(BY_NAME["fused-outer-all"].rounded(dtype), name))
    }
    for changes in ({"seed": 0}, {"seed": 2**64 - 1}, {"step": 0}, {"step": 1}, {"step": 2**32 - 1}, half):
        (other,) = launches(plan, "fused-outer-all", dtype, grads, **changes)
        assert other.key == known.key
        assert (other.arguments[6:], other.integers) != (known.arguments[6:], known.integers)


@pytest.mark.parametrize("name", ["s", "k", "a", "mu", "wd_o", "kr", "mu_o"])
def test_a_number_that_is_zero_is_left_out(name: str) -> None:
    roles, tensors = plan_inputs("fused-outer-all", F32, [70])
    plan, grads = triton.TritonPlan(tensors), [t["g"] for t in roles]
    (known,), (without,) = (
        launches(plan, "fused-outer-all", F32, grads),
        launches(plan, "fused-outer-all", F32, grads, **{name: 0.0}),
    )
    absent = [sum(argument is None for argument in launch.arguments) for launch in (known, without)]
    assert absent[1] == absent[0] + (2 if name == "mu" else 1)  # damp1 goes with mu
    assert without.key != known.key


class Compiler:
    """In the place of a kernel that Triton compiles for a GPU, and of what it returns: notes what is compiled and launched."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.served: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Compiler:
            if options:
                assert options == {"num_warps": 4, "enable_fp_fusion": False}
            (self.made if options else self.served).append((grid, *arguments))
            return self

        return call


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(kernels, "step_kernel", compiler)
    monkeypatch.setattr(triton_launch, "_ready", {})
    monkeypatch.setattr(triton_launch, "compiled", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return compiler


def test_a_compiled_kernel_is_found_by_what_can_differ(compiler: Compiler) -> None:
    """Triton compiles each kind of call once; what it returned serves from then on."""
    _, tensors = plan_inputs("langevin", F32, [700])
    plan, grads = triton.TritonPlan(tensors, target="cuda"), [torch.zeros(700)]
    wanted = []
    for name, step in (("langevin", 1), ("langevin", 2), ("noise-free", 3), ("langevin", 4)):
        (launch,) = launches(plan, name, F32, grads, step=step)
        triton_launch.start(launch, torch.device("cuda", 0))
        wanted.append((*launch.arguments, *launch.integers, *launch.settled))
    assert compiler.made == [((2,), *wanted[0]), ((2,), *wanted[2])]
    assert compiler.served == [((2, 1, 1), *wanted[1]), ((2, 1, 1), *wanted[3])]
    assert len(triton_launch.compiled) == 2
    triton_launch.start(launch, torch.device("cuda", 1))
    assert len(compiler.made) == 3, "another device has kernels of its own"


def test_a_capture_does_not_compile(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = plan_inputs("langevin", F32, [700])
    (launch,) = launches(triton.TritonPlan(tensors, target="cuda"), "langevin", F32, [torch.zeros(700)])
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for refused in (triton_launch.start, lambda launch, gpu: triton_launch.check_capture(launch.kernel, launch.key, gpu)):
        with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured: take a step .* or call deeprelax_cuda"):
            refused(launch, gpu)
    assert compiler.made == compiler.served == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    triton_launch.start(launch, gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    triton_launch.start(launch, gpu)
    assert (len(compiler.made), len(compiler.served)) == (1, 1)


def test_the_bits_of_a_small_float64_are_a_short_int_to_triton() -> None:
    roles, tensors = plan_inputs("heavy-ball", F64, [70])
    plan, grads = triton.TritonPlan(tensors), [t["g"] for t in roles]
    keys = {launches(plan, "heavy-ball", F64, grads, damp1=damp1)[0].key for damp1 in (0.5, -0.25, 1e-300, 0.0)}
    assert len(keys) == 2, "0 needs a kernel of its own"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that counts as pinned, and a capture, in which no more of it can be had."""
    empty = torch.empty

    def not_really_pinned(*size: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", not_really_pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pytest.fail("no memory can be pinned in a capture"))
    monkeypatch.setattr(triton_launch, "_reserve", triton_launch._Reserve())
    monkeypatch.setattr(triton_launch, "_read_by_graphs", {})
    triton_launch._reserve.refill(torch.zeros(1))


@pytest.mark.usefixtures("captured")
def test_captures_have_memory_of_their_own_that_stays() -> None:
    tables = [torch.arange(i, i + 5, dtype=torch.int64) for i in range(3)]
    first, second, third = (triton_launch._reserve.take(table) for table in tables)
    assert all(torch.equal(a, b) for a, b in zip((first, second, third), tables, strict=True))
    assert all(t.data_ptr() % 16 == 0 for t in (first, second, third))
    assert list(triton_launch._read_by_graphs.values()) == [first, second, third]
    first.zero_()
    assert torch.equal(second, tables[1])
    reserve = triton_launch._reserve
    left = reserve._free.numel()
    reserve.refill(tables[0])
    assert reserve._free.numel() == left, "there is enough"
    reserve.take(torch.zeros(left // 2 + 16, dtype=torch.uint8))
    reserve.refill(tables[0])
    assert reserve._free.numel() == reserve.SMALLEST
    large = torch.zeros(2**20, dtype=torch.int32)
    reserve.refill(large)
    for _ in range(8):
        reserve.take(large)  # of one that has been seen there are as many


def test_block_sizes_are_whole_packets_and_powers_of_two() -> None:
    for target, itemsize in itertools.product(("cuda", "hip", "interpreter"), (2, 4, 8)):
        block, warps = sizes.size_of(itemsize, target)
        assert block & (block - 1) == warps & (warps - 1) == 0
        assert block >= 64
