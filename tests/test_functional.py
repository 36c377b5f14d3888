"""The public functions: each argument reaches its place in the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from step_lists import (
    BF16,
    F16,
    F32,
    F64,
    NOISE,
    PLACES,
    STEPS,
    STREAMS,
    Lists,
    gradient_average,
    langevin,
    outer,
    outer_of,
    same,
    some,
)
from torch import Tensor

from deeprelax_cuda import backends, functional
from deeprelax_cuda.backends.eager import EagerPlan
from deeprelax_cuda.checks import check_grads
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import STORED, Scalars, Tensors, compute_type


def number(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=F64).to(compute_type(dtype)).item()


def scalars(name: str, dtype: torch.dtype) -> Scalars:
    """The step in the names of the formula, written out a second time."""
    langevin = name.startswith("langevin") or name == "outer"
    inner = {"s": 0.21}
    if name.startswith("langevin"):
        inner |= {"eta": 0.1, "k": 0.37, "a": 0.26, "wd": 0.013, "mu": 0.83, "damp1": 1 - 0.11}
    if name.startswith("gradient average"):
        inner |= {"a": 0.26, "c": 0.41, "wd": 0.013}
    takes_outer = "outer" in name or "fused" in name
    ends = {"lr": 0.55, "mu_o": 0.72, "wd_o": 0.017, "kr": 0.23} if takes_outer else {}
    return Scalars(
        family="langevin" if langevin else "gradient_average",
        inner="outer" not in name,
        outer=takes_outer,
        nesterov=True,
        nesterov_o=True,
        maximize=True,
        coupling_in_momentum=False,
        **{key: number(value, dtype) for key, value in {**inner, **ends}.items()},
        **NOISE,
    )


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_every_argument_reaches_its_place(name, dtype, backend):
    lists = Lists.of(dtype, masters=dtype is F16)
    twin, before = lists.clone(), lists.clone()
    inv_scale = {} if "outer" in name else {"inv_scale": 0.3}
    STEPS[name](lists, streams=STREAMS, places=PLACES, backend=backend, found_inf=0.0, **inv_scale)

    places = [Place(2**40 + 1, 4, 9), Place(5, 7, 7), Place(3, 1, 1), Place(0, 1, 1)]
    roles = {role: items for role, items in vars(twin).items() if role != "grads"}
    plan = EagerPlan(Tensors(**roles, numbers=STREAMS, places=places))
    plan.run(twin.grads, scalars(name, dtype), torch.tensor(0.3, dtype=compute_type(dtype)))
    assert same(lists, twin)
    assert not torch.equal(lists.params[0], before.params[0])


SWITCHES = [
    ("langevin, fused", {"nesterov": False}, {"nesterov": False}),
    ("langevin, fused", {"maximize": False}, {"maximize": False}),
    ("langevin, fused", {"coupling_in_momentum": True}, {"coupling_in_momentum": True}),
    ("gradient average, fused", {"maximize": False}, {"maximize": False}),
    ("outer", {"nesterov": False}, {"nesterov_o": False}),
]


@pytest.mark.parametrize(("name", "argument", "switch"), SWITCHES)
def test_every_switch_reaches_its_place(name, argument, switch):
    lists = Lists.of()
    twin, before = lists.clone(), lists.clone()
    STEPS[name](lists, **argument)
    roles = {role: items for role, items in vars(twin).items() if role != "grads"}
    plan = EagerPlan(Tensors(**roles, numbers=range(4), places=[Place(0, 15, 15)] * 4))
    plan.run(twin.grads, replace(scalars(name, F32), **switch))
    assert same(lists, twin)
    STEPS[name](before)
    assert not same(lists, before)


@pytest.mark.parametrize("family", ["langevin", "gradient_average"])
def test_the_nesterov_of_a_fused_outer_step_is_its_own(family):
    fused = Lists.of()
    turns = fused.clone()
    inner = langevin if family == "langevin" else gradient_average
    inner(fused, outer=replace(outer_of(fused), nesterov=False))
    inner(turns)
    outer(turns, family=family, nesterov=False)
    assert same(fused, turns)


@pytest.mark.parametrize("family", ["langevin", "gradient_average"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_fused_period_end_is_the_two_steps_in_turn(family, rounding):
    fused = Lists.of(BF16)
    turns = fused.clone()
    inner = langevin if family == "langevin" else gradient_average
    inner(fused, outer=outer_of(fused), rounding=rounding)
    inner(turns, rounding=rounding)
    outer(turns, family=family, rounding=rounding)
    assert same(fused, turns)


def test_the_noise_is_gaussians():
    """y = 0 + 1*z, of the stream and the element that the lists' places say."""
    y = [torch.zeros(6), torch.zeros(9)]
    zeros = [torch.zeros(6), torch.zeros(9)]
    functional.langevin_step_(
        y, zeros, None, None, lr=1.0, stiffness=0.0, noise_std=1.0, averaging=0.0, seed=3, step=4, places=[2, (10, 4, 100)]
    )
    assert torch.equal(y[0], functional.gaussian(6, seed=3, step=4, stream=0, offset=2))
    runs = [functional.gaussian(n, seed=3, step=4, stream=1, offset=o) for n, o in ((4, 10), (4, 110), (1, 210))]
    assert torch.equal(y[1], torch.cat(runs))


@pytest.mark.parametrize("stream", [0, 2**32 - 1])
def test_gaussian_is_the_same_everywhere_and_in_pieces(stream):
    where = {"seed": 2**63, "step": 2**32 - 1, "stream": stream}
    whole = functional.gaussian(33, offset=2**62 - 7, **where)
    assert whole.dtype is F32
    assert torch.equal(whole, functional.gaussian(33, offset=2**62 - 7, backend="eager", **where))
    assert torch.equal(whole[5:], functional.gaussian(28, offset=2**62 - 2, device=torch.device("cpu"), **where))
    assert functional.gaussian(0, **where).shape == (0,)


def test_dampening_is_taken_from_1_in_binary64():
    """1 - 0.9 in float32 would be 0.10000002."""
    v = [torch.zeros(1)]
    functional.langevin_step_(
        [torch.zeros(1)], [torch.ones(1)], None, None, v,
        lr=1.0, stiffness=0.0, noise_std=0.0, averaging=0.0, momentum=0.5, dampening=0.9,
    )  # fmt: skip
    assert v[0].item() == number(1 - 0.9, F32) != 1 - number(0.9, F32)


def test_what_plays_no_part_may_be_left_out():
    g = [torch.full((2,), 3.0)]
    y = [torch.ones(2)]
    functional.langevin_step_(y, g, None, None, lr=0.5, stiffness=0.0, noise_std=0.0, averaging=0.0)
    assert torch.equal(y[0], torch.full((2,), -0.5))
    functional.gradient_average_step_(y, g, [torch.full((2,), 7.0)], None, averaging=0.0, drift=0.0, noise_std=0.0)
    assert torch.equal(y[0], torch.full((2,), 7.0))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_no_tensors_and_empty_tensors(step):
    step(Lists.of(shapes=()))
    step(Lists.of(shapes=((0,), (3, 0))))


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_found_inf_writes_nothing(step, as_tensor, found_inf):
    lists = Lists.of()
    before = lists.clone()
    step(lists, found_inf=torch.tensor([found_inf], dtype=F64) if as_tensor else found_inf)
    assert same(lists, before)


@pytest.mark.parametrize("inv_scale", [torch.tensor(0.25), torch.tensor([0.25], dtype=F64), torch.tensor([[0.25]], dtype=F16)])
def test_inv_scale_may_be_a_tensor(inv_scale):
    lists = Lists.of()
    twin = lists.clone()
    langevin(lists, inv_scale=inv_scale)
    langevin(twin, inv_scale=0.25)
    assert same(lists, twin)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_inv_scale_is_rounded_once_to_the_compute_type(backend):
    """0.1 in float32 would be 0.100000001."""
    for dtype in STORED:
        for inv_scale in (0.1, torch.tensor(0.1, dtype=F64)):
            y = [torch.zeros(1, dtype=dtype)]
            v = [torch.zeros(1, dtype=compute_type(dtype))]
            functional.langevin_step_(
                y, [torch.ones(1, dtype=dtype)], None, None, v, lr=1.0, stiffness=0.0, noise_std=0.0, averaging=0.0,
                momentum=0.5, inv_scale=inv_scale, backend=backend,
            )  # fmt: skip
            assert v[0].item() == number(0.1, dtype)


@pytest.mark.parametrize("found_inf", [1e-60, 2**-200, 1, True, math.nan])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_found_inf_counts_whatever_float32_would_make_of_it(as_tensor, found_inf):
    lists = Lists.of()
    before = lists.clone()
    dtype = F64 if isinstance(found_inf, float) else None
    langevin(lists, found_inf=torch.tensor(found_inf, dtype=dtype) if as_tensor else found_inf)
    assert same(lists, before)
    langevin(lists, found_inf=torch.zeros((), dtype=dtype) if as_tensor else type(found_inf)(0))
    assert not torch.equal(lists.params[0], before.params[0])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_wide_parameters_ignore_masters_and_stochastic_rounding(dtype):
    lists = Lists.of(dtype)
    twin = lists.clone()
    masters = some(F32)
    kept = [t.clone() for t in masters]
    langevin(lists, masters=masters, rounding="stochastic")
    langevin(twin)
    assert same(lists, twin)
    assert all(map(torch.equal, masters, kept))


def test_numbers_of_other_libraries_do():
    torch.manual_seed(0)
    lists = Lists.of()
    other = lists.clone()
    langevin(lists, lr=np.float32(0.5), averaging=torch.tensor(0.25), stiffness=Fraction(1, 4))
    langevin(other, lr=0.5, averaging=0.25, stiffness=0.25)
    assert same(lists, other)


def test_tuples_do_for_lists():
    lists = Lists.of()
    twin = lists.clone()
    langevin(Lists(**{role: tuple(items) for role, items in vars(lists).items()}), streams=tuple(STREAMS), places=tuple(PLACES))
    langevin(twin, streams=STREAMS, places=PLACES)
    assert same(lists, twin)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(5, 3).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(2, 3, 4).permute(1, 2, 0),
    "a size of 1, any stride": lambda: torch.randn(6).as_strided((1, 6), (91, 1)),
    "in a larger buffer": lambda: torch.randn(20)[3:15].view(3, 4),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_any_dense_layout_in_storage_order(step, make):
    """The same call on the tensors seen as 1-d, in the order of memory."""
    y = make()
    lists = Lists.of(shapes=(y.shape,))
    for items in vars(lists).values():
        items[:] = [torch.empty_strided(y.shape, y.stride()).copy_(t) for t in items]
    lists.params[:] = [y]
    flat = Lists(**{role: [t.as_strided((t.numel(),), (1,)).clone() for t in items] for role, items in vars(lists).items()})
    step(lists)
    step(flat)
    for role, items in vars(lists).items():
        for t, expected in zip(items, vars(flat)[role], strict=True):
            assert torch.equal(t.as_strided((t.numel(),), (1,)), expected), role
    assert lists.params[0] is y


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(4, 3).t(), lambda: torch.randn(1, 4).expand(3, 4), lambda: torch.randn(3, 8)[:, ::2]]
)
def test_a_gradient_in_another_layout_is_read_as_what_it_is(make):
    g = make()
    lists = Lists.of(shapes=(g.shape,))
    twin = lists.clone()
    kept = g.clone()
    langevin(lists, grads=[g])
    langevin(twin, grads=[g.contiguous()])
    lists.grads, twin.grads = [], []
    assert same(lists, twin)
    assert torch.equal(g, kept)


LAZY: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "negation": lambda shape: torch._neg_view(torch.arange(12.0).view(shape)),
    "transposed negation": lambda shape: torch._neg_view(torch.arange(12.0).view(shape[::-1]).t()),
    "zeros without memory": torch._efficientzerotensor,
    "expanded zeros without memory": lambda shape: torch._efficientzerotensor(1).expand(shape),
}


@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY.keys())
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_a_gradient_that_is_not_written_out_in_memory_is_read_as_what_it_is(make, name):
    """A step checked and taken as the optimizers do it; the operators get such tensors from torch written out."""
    g = make((3, 4))
    written_out = torch.empty(3, 4).copy_(g)
    steps = []
    for grad in (g, written_out):
        y = torch.ones(3, 4)
        tensors = Tensors([y], numbers=[0], places=[Place(0, 12, 12)])
        plan = backends.make_plan(backends.select("cpu", F32, name).name, tensors)
        (checked,) = check_grads(tensors, [grad])
        assert checked.data_ptr() != 0
        plan.run([checked], Scalars(eta=0.5))
        steps.append(y)
    assert torch.equal(*steps)
    assert torch.equal(steps[0], 1 - 0.5 * written_out)


def test_tensors_may_share_a_storage():
    lists, flats = Lists.of(shapes=((8,), (3, 4))), {}
    twin = lists.clone()
    for role, items in vars(lists).items():
        flats[role] = torch.cat([t.flatten() for t in items]) if items else torch.empty(0)
        items[:] = [flats[role][:8], flats[role][8:].view(3, 4)] if items else []
    langevin(lists, outer=outer_of(lists))
    langevin(twin, outer=outer_of(twin))
    assert same(lists, twin)


def test_what_is_only_read_may_overlap():
    lists = Lists.of(shapes=((8,), (8,)))
    twin = lists.clone()
    g = torch.randn(12)
    langevin(lists, grads=[g[:8], g[4:]], anchors=[g[:8], g[2:10]])
    langevin(twin, grads=[g[:8].clone(), g[4:].clone()], anchors=[g[:8].clone(), g[2:10].clone()])
    assert all(map(torch.equal, lists.params, twin.params))
