"""Defects that optimizers in the field have, each a test of the right behaviour here.

The defects of published Entropy-SGD code are in test_entropy_sgd. Whoever is named below was seen with the defect; nothing of
theirs runs here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from contract_cases import BACKENDS, Guarded, backend, same
from optim_runs import METHODS, L, Method, assert_equal, backward, counters, small_model, snapshot, walk
from step_lists import BF16, F16, F32, F64, STEPS, Lists
from torch import Tensor, nn

from deeprelax_cuda import functional

DTYPES = [F32, F64, BF16, F16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend by its name in the registry, the C++ one with each instruction set of this machine."""
    with backend(request.param) as registered:
        yield registered


def bits(lists: Lists) -> list[Tensor]:
    return [t for items in vars(lists).values() for t in items]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert same(a, b)


# Narrow types.


@pytest.mark.parametrize("numel", [16, 32, 63, 64, 65, 100, 128])
def test_defect_bfloat16_parameters_stay_where_they_are(name: str, numel: int) -> None:
    """torch's fused SGD on the CPU (2.13) moves none of 64 bfloat16 elements: only those beyond the last whole vector."""
    for dtype in (BF16, F16):
        lists = Lists.of(dtype, [(numel,)])
        p, before = lists.params[0], lists.params[0].clone()
        lists.grads[0].fill_(2.0)
        functional.langevin_step_(
            lists.params, lists.grads, None, None, lr=2.0, stiffness=0.0, noise_std=0.0, averaging=0.0, backend=name
        )
        assert torch.equal(p, before - 4.0)
        assert (p != before).all()


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}, {"master_weights": True}], ids=str)
def test_defect_bfloat16_parameters_stay_in_a_run(make: Method, options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = make([p], **options)
    for step in range(2 * L):
        before = p.detach().clone()
        p.grad = torch.full_like(p, 3.0 + step)
        optimizer.step()
        moved = p != before
        assert moved.all() if make.moves_inside or step % L == L - 1 else moved.any()


@pytest.mark.parametrize("numel", [1, 7, 64, 1000])
@pytest.mark.parametrize("nan", [0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], ids=["all ones", "minus all ones", "low", "minus low"])
def test_defect_stochastic_rounding_turns_a_nan_into_a_number(name: str, nan: int, numel: int) -> None:
    """Random bits added to the NaN 0x7fffffff carry into its sign, which makes it -0.0: torchao. One cut off is an infinity."""
    payload = torch.tensor(nan, dtype=torch.int32).view(F32)
    assert payload.isnan()
    for seed in range(4):
        for step, quiet in (
            ("langevin", {}),  # y - lr*(g + stiffness*(y - x))
            ("gradient average", {"drift": 0.0, "noise_std": 0.0}),  # y = x
            ("outer of gradient average", {"noise_std": 0.0}),
        ):
            lists = Lists.of(BF16, [(numel,)])
            lists.anchors[0].view(torch.int32).fill_(nan)
            STEPS[step](lists, seed=seed, step=3, rounding="stochastic", backend=name, **quiet)
            assert lists.params[0].isnan().all()


def test_defect_stochastic_rounding_hides_a_diverged_run(make: Method) -> None:
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = make([p], rounding="stochastic")
    for _ in range(L + 1):
        p.grad = torch.full_like(p, math.nan)
        p.grad[::2] = 1.0
        optimizer.step()
        if make.moves_inside or optimizer.stats()["outer_steps"]:
            assert p[1::2].isnan().all()
        assert not p[::2].isnan().any()


# A step that a gradient scaler skips.


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 8.0, 1e-30, math.nan, math.inf])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_defect_found_inf_of_2_is_not_skipped(step: Callable[..., None], found_inf: float, name: str) -> None:
    """Scalers sum it over devices. torch's fused optimizers compare it with 1."""
    for dtype, masters in ((F32, False), (F64, False), (BF16, True)):
        lists = Lists.of(dtype, [(5, 3), (67,), ()], masters=masters)
        before = lists.clone()
        lists.grads[0].view(-1)[0] = math.inf
        for value in (found_inf, torch.tensor(found_inf), torch.tensor([found_inf])):
            step(lists, found_inf=value, backend=name)
            before.grads = lists.grads
            assert_same(bits(lists), bits(before))


def test_defect_a_skipped_first_step_leaves_garbage_in_the_momentum(name: str) -> None:
    """torch's fused SGD allocates the momentum in the step that is skipped, without writing it."""
    lists = Lists.of(F32, [(64,), (7,)])
    for v in (*lists.momenta, *lists.outer_momenta):
        v.zero_()
    never = lists.clone()
    STEPS["langevin, fused"](lists, found_inf=1.0, step=0, backend=name)
    assert not any(v.any() for v in (*lists.momenta, *lists.outer_momenta))
    for step in range(3):
        for run in (lists, never):
            STEPS["langevin, fused"](run, found_inf=0.0, step=step, backend=name)
        assert_same(bits(lists), bits(never))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_defect_a_skipped_first_step_of_a_scaler_leaves_its_mark(make: Method, dtype: torch.dtype) -> None:
    (model, optimizer), (other, skipping) = ((m := small_model(dtype), make(m.parameters())) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in range(2):
        scaler.scale(backward(other, step).detach())  # which is when a scaler makes its scale; 1 leaves the gradients alone
        next(other.parameters()).grad[0, 0] = math.inf
        scaler.step(skipping)
        scaler.update(1.0)
        assert len(skipping.state) == 0
    for step in range(2 * L):
        walk(model, optimizer, range(step, step + 1))
        walk(other, skipping, range(step, step + 1))
        assert_equal(snapshot(other, skipping), snapshot(model, optimizer))
    assert counters(skipping) == counters(optimizer)


# Parameters that come, go and move.


def test_defect_a_late_unfrozen_parameter_crashes(make: Method) -> None:
    """Unfrozen, refrozen and unfrozen again; the others do not notice."""
    start, gradients = torch.randn(2, 9), torch.randn(4 * L, 2, 9)
    first, late, alone = (nn.Parameter(t.clone()) for t in (*start, start[0]))
    late.requires_grad_(False)
    optimizer, reference = make([first, late]), make([alone])
    for step, (g, h) in enumerate(gradients):
        frozen = not (2 <= step < L + 2 or step >= 3 * L - 1)
        late.requires_grad_(not frozen)
        first.grad, alone.grad, late.grad = g.clone(), g.clone(), None if frozen else h.clone()
        before = late.detach().clone()
        optimizer.step()
        reference.step()
        assert torch.equal(first, alone)
        if not frozen:
            assert (late != before).all()
        elif step < 2:
            assert late not in optimizer.state
            assert torch.equal(late, before)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if make.has_anchor:
        assert torch.equal(optimizer.state[late]["anchor"], start[1]) == (not make.has_periods)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F32, {"backend": "eager"}),
        (BF16, {"rounding": "stochastic"}),
        (BF16, {"master_weights": True}),
        (BF16, {"backend": "eager"}),
    ],
    ids=str,
)
def test_defect_channels_last_parameters_are_ignored(make: Method, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """DeepSpeed's CPU Adam flattens a copy of them. Noise and rounding go by storage order: here the twin is that storage."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype).to(memory_format=torch.channels_last)
    params = list(model.parameters())
    assert not params[0].is_contiguous()
    addresses = [p.data_ptr() for p in params]

    def storage(t: Tensor) -> Tensor:
        return t.detach().as_strided((t.numel(),), (1,))

    twins = [nn.Parameter(storage(p).clone()) for p in params]
    optimizer, reference = make(params, **options), make(twins, **options)
    for _ in range(2 * L + 1):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 7, 7, dtype=dtype)).square().mean().backward()
        before = [p.detach().clone() for p in params]
        for p, q in zip(params, twins, strict=True):
            q.grad = storage(torch.empty_like(p).copy_(p.grad)).clone()
        optimizer.step()
        reference.step()
        for p, q, was in zip(params, twins, before, strict=True):
            assert torch.equal(storage(p), q)
            assert not torch.equal(p, was)
            assert optimizer.state[p].keys() == reference.state[q].keys()
            for role, value in optimizer.state[p].items():
                if role == "period_steps":
                    assert torch.equal(value, reference.state[q][role])
                    continue
                assert torch.equal(storage(value), reference.state[q][role])
                assert value.stride() == p.stride()
    assert [p.data_ptr() for p in params] == addresses


def test_defect_p_data_is_pointed_elsewhere(make: Method) -> None:
    """bitsandbytes re-points ``p.data``. Whoever holds views of a flat buffer, as FSDP does, must go on seeing the weights."""
    buffer = torch.randn(40)
    ps = [nn.Parameter(buffer[:24].view(4, 6)), nn.Parameter(buffer[24:])]
    optimizer = make(ps)
    addresses = [p.data_ptr() for p in ps]
    for step in range(2 * L + 1):
        before = buffer.clone()
        for p in ps:
            p.grad = torch.full_like(p, step + 1.0)
        optimizer.step()
        assert (buffer != before).all()
        live = buffer.clone()
        optimizer.eval()
        shown = torch.cat([optimizer.state[p]["anchor"].view(-1) for p in ps]) if make.has_periods else live
        assert torch.equal(buffer, shown)
        optimizer.train()
        assert torch.equal(buffer, live)
        if step == L:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.consolidate_()
            optimizer.reset_anchors_()
        assert [p.data_ptr() for p in ps] == addresses


def test_defect_p_data_that_others_point_elsewhere_is_missed(make: Method) -> None:
    """The step is taken where the parameter is now, and what it has left stays as it was left."""
    (model, optimizer), (other, moving) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    left: list[tuple[Tensor, Tensor]] = []
    for step in range(2 * L + 1):
        for p in other.parameters():
            left.append((p.data, p.detach().clone()))
            p.data = p.data.clone()
        walk(model, optimizer, range(step, step + 1))
        walk(other, moving, range(step, step + 1))
        assert_equal(snapshot(other, moving), snapshot(model, optimizer))
        assert all(torch.equal(tensor, was) for tensor, was in left)
    assert len({tensor.data_ptr() for tensor, _ in left}) == len(left)


# The way a call is cut into pieces.


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("step", [STEPS["langevin, fused"], STEPS["gradient average"]], ids=["langevin", "gradient average"])
def test_defect_noise_depends_on_the_number_of_threads(step: Callable[..., None]) -> None:
    """A generator per thread draws other numbers wherever there are more or fewer of them."""
    lists = Lists.of(F32, [(300, 331), (65,), (3, 7)])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        step(run := lists.clone(), backend="auto")
        noise = functional.gaussian(100_003, seed=5, step=1)
        results.append([*bits(run), noise])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [STEPS["langevin, fused"], STEPS["gradient average"]], ids=["langevin", "gradient average"])
def test_defect_noise_depends_on_the_launch(step: Callable[..., None], dtype: torch.dtype, name: str) -> None:
    """One list, a call a tensor in any order, and tensors cut anywhere: kernels that number noise by thread cannot do it."""
    rounding = "stochastic" if dtype == BF16 else "nearest"
    lists = Lists.of(dtype, [(1000,), (3,), (259,), (64,)])
    streams = [4, 0, 7, 2**28 - 1]
    whole = lists.clone()
    step(whole, streams=streams, rounding=rounding, backend=name)

    one_by_one = lists.clone()
    for i in (2, 0, 3, 1):
        one = Lists(**{role: items[i : i + 1] for role, items in vars(one_by_one).items()})
        step(one, streams=[streams[i]], rounding=rounding, backend=name)
    assert_same(bits(one_by_one), bits(whole))

    roles = [role for role, items in vars(lists).items() if items]
    for cuts in ([0, 500, 1000], [0, 1, 6, 135, 136, 999, 1000]):
        pieces = lists.clone()
        views = Lists(**{role: [getattr(pieces, role)[0][a:b] for a, b in pairwise(cuts)] for role in roles})
        step(views, streams=[4] * len(views.params), places=cuts[:-1], rounding=rounding, backend=name)
        assert_same([getattr(pieces, role)[0] for role in roles], [getattr(whole, role)[0] for role in roles])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_defect_one_odd_element_changes_the_result(name: str, dtype: torch.dtype) -> None:
    """An address off by one element, or a tail of one, sends a whole tensor to another path: with the same bits here."""
    rounding = "stochastic" if dtype == BF16 else "nearest"
    numels = [127, 128, 129]
    lists = Lists.of(dtype, [(n,) for n in numels])
    aligned = lists.clone()
    STEPS["langevin, fused"](aligned, streams=[5, 6, 7], rounding=rounding, backend=name)
    roles = [role for role, items in vars(lists).items() if items]
    for offset in range(1, 17):
        guards = {role: [Guarded(t, (offset * (1 + j)) % 17) for t in getattr(lists, role)] for j, role in enumerate(roles)}
        views = Lists(**{role: [guard.tensor for guard in items] for role, items in guards.items()})
        STEPS["langevin, fused"](views, streams=[5, 6, 7], rounding=rounding, backend=name)
        assert_same(bits(views), bits(aligned))
        assert all(guard.intact() for items in guards.values() for guard in items)


def test_defect_one_odd_tensor_changes_the_others(name: str) -> None:
    """A tensor of one element, an empty one and a transposed one in the list, and the rest as without them."""
    lists = Lists.of(F32, [(65,), (128,)])
    alone = lists.clone()
    STEPS["langevin"](alone, streams=[1, 2], backend=name)
    odd = Lists.of(F32, [(), (0, 3), (3, 5)])
    together = Lists.of(F32, ())
    for role, (first, last) in ((role, items) for role, items in vars(lists).items() if items):
        scalar, empty, matrix = getattr(odd, role)
        setattr(together, role, [first, scalar, empty, matrix.t(), last])
    STEPS["langevin"](together, streams=[1, 3, 4, 5, 2], backend=name)
    assert_same([t for items in vars(together).values() if items for t in (items[0], items[-1])], bits(alone))
