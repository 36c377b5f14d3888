"""``capturable=True`` without a graph: the same bits with counters, gamma and lr on the device, of which a step reads none.

What a graph adds to that is tested where there is a GPU (tests/gpu).
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import BACKENDS, backend
from optim_runs import METHODS, ONE, Method, those, with_options
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from deeprelax_cuda.backends import cpu
from deeprelax_cuda.clock import NUMBERS
from deeprelax_cuda.optim import HamiltonJacobi, HeatSGD
from deeprelax_cuda.optim.base import RelaxationOptimizer

L = 4
ON_DEVICE = {"step": torch.int64, "position": torch.int64, "outer_steps": torch.int64, "gamma": torch.float64}

#: Options under which the device works out every kind of number.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "gamma": 1e4},
    {"scoping": 0.3, "gamma": 3.0, "gamma_min": 1.0},
    {"gamma_total": 2.0, "gamma_min": 0.5},
    {"averaging": "linear", "temperature": 1e-4},
    {"averaging": "last"},
    {"momentum": 0.0, "inner_momentum": 0.0, "gamma": 5.0},
    {"reset_inner_momentum": True, "gamma": 5.0},
    {"weight_decay": 0.01, "outer_weight_decay": 0.02, "maximize": True, "lr": 0.5},
    {"gamma": math.inf, "scoping": 0.1},
    {"inner_steps": 1},
    {"inner_steps": 2},
]

pytestmark = pytest.mark.usefixtures("one_thread")


class NoReading(TorchDispatchMode):
    """Fails where a number is read off a tensor: a captured step must not ask the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read off a tensor"
        return func(*args, **(kwargs or {}))


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,), (), (0,), (130,))]


def give_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: RelaxationOptimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_grads(params, step)
        optimizer.step()


@pytest.fixture(params=[name for name, method in METHODS.items() if method.is_capturable()])
def make(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def build(capturable: bool, params: Any, make: Method = METHODS[ONE], **options: Any) -> Any:
    return make(params, **{**make.of({"inner_steps": L}), "seed": 3, "capturable": capturable, **options})


def assert_same(a: RelaxationOptimizer, b: RelaxationOptimizer) -> None:
    """Every parameter, every tensor of its state and every counter."""
    ours, theirs = a.state_dict(), b.state_dict()
    for group, other in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
    assert ours["state"].keys() == theirs["state"].keys()
    first = ours["param_groups"][0]
    # With capturable the device alone knows gamma: an anchor is there though nothing may be coupled to it or end there.
    idle = {"anchor"} if first["inner_steps"] is None and first["gamma"] == math.inf else set()
    for key, own in ours["state"].items():
        assert own.keys() ^ theirs["state"][key].keys() <= idle
        for name in own.keys() - idle:
            value, other_value = own[name], theirs["state"][key][name]
            assert torch.equal(value, other_value) if isinstance(value, Tensor) else value == other_value, (key, name)
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        apart = {"capturable": None, "backend": None}
        assert {**group, **apart} == {**other, **apart}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@with_options("options", OPTIONS, Method.is_capturable)
def test_the_same_bits_as_with_numbers_of_the_host(make: Method, options: dict[str, Any], backend: str) -> None:
    here, there = weights(), weights()
    plain, clocked = (build(on, at, make, backend=backend, **options) for on, at in ((False, here), (True, there)))
    for step in range(3 * L + 2):
        run(plain, here, range(step, step + 1))
        run(clocked, there, range(step, step + 1))
        assert_same(plain, clocked)
    assert plain.stats() == clocked.stats()
    assert not torch.equal(here[0], weights()[0])


@pytest.mark.parametrize("clocked", [False, True])
@pytest.mark.parametrize("label", BACKENDS[1:])
def test_the_same_bits_on_every_backend(make: Method, label: str, clocked: bool) -> None:
    here, there = weights(), weights()
    reference = build(False, here, make, backend="eager")
    with backend(label) as name:
        optimizer = build(clocked, there, make, backend=name)
        for step in range(L + 2):
            run(reference, here, range(step, step + 1))
            run(optimizer, there, range(step, step + 1))
            assert_same(reference, optimizer)
    assert not any(torch.equal(p, was) for p, was in zip(there, weights(), strict=True) if p.numel())


@with_options(
    "kind",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "rounding": "stochastic"},
        {"dtype": torch.bfloat16, "master_weights": True},
        {"dtype": torch.float16, "averaging": "linear"},
    ],
    Method.is_capturable,
)
def test_in_every_type(make: Method, kind: dict[str, Any]) -> None:
    options = dict(kind)
    dtype = options.pop("dtype")
    here, there = weights(dtype=dtype), weights(dtype=dtype)
    plain, clocked = build(False, here, make, **options), build(True, there, make, **options)
    run(plain, here, range(2 * L + 1))
    run(clocked, there, range(2 * L + 1))
    assert_same(plain, clocked)


@with_options("options", [{}, {"averaging": "linear"}], Method.is_capturable)
def test_groups_types_and_parameters_that_come_late(make: Method, options: dict[str, Any]) -> None:
    def twin(capturable: bool) -> tuple[RelaxationOptimizer, list[nn.Parameter]]:
        params = [*weights(1), *weights(2, torch.bfloat16), *weights(3, torch.float64)]
        frozen = nn.Parameter(torch.ones(3))
        own = make.of({"gamma": 3.0, "scoping": 0.2})
        groups = [{"params": params[:7], "lr": 0.3}, {"params": [frozen]}, {"params": params[7:], **own}]
        return build(capturable, groups, make, **options), params

    (plain, here), (clocked, there) = twin(False), twin(True)
    for optimizer, params in ((plain, here), (clocked, there)):
        for step in range(3 * L):
            give_grads(params, step)
            if step < L + 2:  # in the middle of a period: its average begins anew
                params[0].grad = params[8].grad = None
            elif step == 2 * L + 1:  # and one that rests: the outer step is for it too
                params[4].grad = None
            optimizer.step()
    assert_same(plain, clocked)


@pytest.mark.parametrize("make_one", [HeatSGD, HamiltonJacobi], ids=lambda make_one: make_one.__name__)
def test_a_count_that_a_graph_writes_to_stays(make_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without one of the gradients counts elsewhere from then on; the graph goes on writing where it did."""
    params = weights()
    optimizer = make_one(params, inner_steps=L, seed=3, capturable=True)
    run(optimizer, params, range(2))
    monkeypatch.setattr("deeprelax_cuda.optim.clocks.is_capturing", lambda groups: True)
    run(optimizer, params, range(2, 3))
    monkeypatch.undo()
    count = weakref.ref(optimizer.state[params[0]]["period_steps"])
    params[1].grad = None
    optimizer.step()
    assert optimizer.state[params[0]]["period_steps"] is not count()
    gc.collect()
    assert count() is not None


@with_options("options", [{}, {"averaging": "linear", "reset_inner_momentum": True}], Method.is_capturable)
def test_a_step_reads_nothing_off_the_device(make: Method, options: dict[str, Any]) -> None:
    params = weights()
    optimizer = build(True, [{"params": params[:2]}, {"params": params[2:]}], make, **options)
    run(optimizer, params, range(1))
    for step in range(1, 2 * L + 1):
        give_grads(params, step)
        with NoReading():
            optimizer.step()
    assert optimizer.stats() == make.stats(2 * L + 1, L)


def test_values_lie_on_the_device_and_stay_where_they_are(make: Method) -> None:
    params = weights()
    optimizer = build(True, params, make, lr=0.25)
    group = optimizer.param_groups[0]
    assert {name: group[name].dtype for name in ON_DEVICE} == ON_DEVICE
    assert group["lr"].dtype == torch.float64
    assert group["lr"] == 0.25
    before = {name: group[name].data_ptr() for name in (*ON_DEVICE, "lr")}
    run(optimizer, params, range(L))
    assert optimizer.at_outer_boundary == make.has_periods
    group["lr"], group["gamma"] = 0.5, 7.0
    run(optimizer, params, range(L, L + 1))
    assert {name: group[name].data_ptr() for name in (*ON_DEVICE, "lr")} == before
    assert (group["lr"], group["gamma"]) == (0.5, 7.0)
    assert not optimizer.at_outer_boundary


@those(lambda method: method.is_capturable() and method.has_anchor)  # else a gamma set by hand makes one, there and then
def test_values_set_by_hand_and_by_schedulers_count(make: Method) -> None:
    def train(capturable: bool) -> RelaxationOptimizer:
        params = weights()
        optimizer = build(capturable, params, make, **make.of({"scoping": 0.0}))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(3 * L):
            run(optimizer, params, range(step, step + 1))
            scheduler.step()
            if step == L + 1:
                optimizer.param_groups[0]["gamma"] = 1.0
            if step == L + 2:
                optimizer.param_groups[0].update(make.of({"inner_lr": 0.05, "temperature": 0.01}))
        return optimizer

    plain, clocked = train(False), train(True)
    assert isinstance(clocked.param_groups[0]["lr"], Tensor)
    for optimizer in (plain, clocked):
        for group in optimizer.param_groups:
            group["initial_lr"] = None  # a tensor in the one, a number in the other
    assert_same(plain, clocked)


def test_a_tensor_lr_of_the_user_is_used_as_it_is(make: Method) -> None:
    params, lr = weights(), torch.tensor(0.3)
    optimizer = build(True, params, make, lr=lr)
    lr = optimizer.param_groups[0]["lr"]
    assert lr.dtype == torch.float32
    run(optimizer, params, range(L + 1))
    lr.fill_(0.7)
    run(optimizer, params, range(L + 1, 2 * L))
    twin = weights()
    plain = build(False, twin, make, lr=torch.tensor(0.3))
    run(plain, twin, range(L + 1))
    plain.param_groups[0]["lr"].fill_(0.7)
    run(plain, twin, range(L + 1, 2 * L))
    assert all(map(torch.equal, params, twin))


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_that_start_from_one_lr_tensor_go_their_own_ways(groups: int) -> None:
    lr = torch.tensor(0.3, dtype=torch.float64)
    optimizer = build(True, [{"params": [p], "lr": lr} for p in weights()[:groups]])
    own = [group["lr"] for group in optimizer.param_groups]
    own[0].fill_(0.5)
    assert [float(t) for t in own] == [0.5, 0.3][:groups]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("at", [1, L, L + 2])
def test_a_state_goes_over_in_the_middle_of_a_period(make: Method, saved: bool, loaded: bool, at: int) -> None:
    params, options = weights(), make.of({"averaging": "linear"})
    first = build(saved, params, make, **options)
    run(first, params, range(at))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert not any(isinstance(value, Tensor) for group in state["param_groups"] for value in group.values())
    assert all(isinstance(own.get("period_steps", 0), int) for own in state["state"].values())
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    second = build(loaded, twin, make, **options)
    for group in state["param_groups"]:
        group["capturable"] = loaded
    second.load_state_dict(state)
    assert isinstance(second.param_groups[0]["step"], Tensor) == loaded
    run(first, params, range(at, 2 * L + 1))
    run(second, twin, range(at, 2 * L + 1))
    assert_same(first, second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_by_themselves(make: Method, copied: Callable[[Any], Any]) -> None:
    params = weights()
    optimizer = build(True, params, make, **make.of({"averaging": "linear"}))
    run(optimizer, params, range(L + 1))
    twin, twins = copied((optimizer, params))
    run(twin, twins, range(L + 1, 2 * L + 1))
    assert optimizer.stats()["steps"] == L + 1
    run(optimizer, params, range(L + 1, 2 * L + 1))
    assert_same(optimizer, twin)


def test_saving_leaves_the_optimizer_as_it_is() -> None:
    params = weights()
    optimizer = build(True, params, averaging="linear")
    run(optimizer, params, range(1))
    held = {name: optimizer.param_groups[0][name] for name in (*ON_DEVICE, "lr")}
    count = optimizer.state[params[0]]["period_steps"]
    optimizer.state_dict()
    assert all(optimizer.param_groups[0][name] is t for name, t in held.items())
    assert optimizer.state[params[0]]["period_steps"] is count


@with_options("options", [{}, {"averaging": "linear"}], lambda method: method.is_capturable() and method.has_anchor)
def test_the_rest_of_the_interface(make: Method, options: dict[str, Any]) -> None:
    here, there = weights(), weights()
    plain, clocked = build(False, here, make, **options), build(True, there, make, **options)
    for optimizer, params in ((plain, here), (clocked, there)):
        run(optimizer, params, range(L + 1))
        optimizer.eval()
        optimizer.train()
        optimizer.consolidate_()
        run(optimizer, params, range(L + 1, L + 3))
        optimizer.reset_anchors_()
        run(optimizer, params, range(L + 3, 2 * L + 4))
    assert plain.describe() == clocked.describe()
    assert plain.explain() == clocked.explain()
    assert_same(plain, clocked)


@pytest.mark.parametrize("missing", [{0: 1}, {0: 1, 1: 3}, {1: L, 2: L + 1, 0: L + 2}])
def test_calls_that_part_and_meet_count_for_themselves(make: Method, missing: dict[int, int]) -> None:
    """Some parameters have no gradient in one step of each period, and miss that step in their plain mean."""

    def train(capturable: bool) -> RelaxationOptimizer:
        params = weights()
        optimizer = build(capturable, params, make, **make.of({"averaging": "linear", "inner_steps": 6}))
        for step in range(20):
            give_grads(params, step)
            for index, at in missing.items():
                if step % 6 == at:
                    params[index].grad = None
            optimizer.step()
        return optimizer

    assert_same(train(False), train(True))


@those(lambda method: method.averages_gradients)
@pytest.mark.parametrize("rests", [range(L, 2 * L), range(L, 2 * L - 1), range(2, 3 * L), range(L + 1, L + 2)], ids=str)
def test_a_parameter_without_a_gradient_rests_on_the_device_too(make: Method, rests: range) -> None:
    """Whether a gradient of the period counts for it, which decides over its outer step, is known there alone."""

    def train(capturable: bool) -> RelaxationOptimizer:
        params = weights()
        optimizer = build(capturable, params, make)
        for step in range(4 * L):
            give_grads(params, step)
            if step in rests:
                params[0].grad = params[4].grad = None
            optimizer.step()
        return optimizer

    assert_same(train(False), train(True))


def test_a_value_that_is_put_aside_and_back_is_what_it_was() -> None:
    def train(capturable: bool) -> RelaxationOptimizer:
        params = weights()
        optimizer = build(capturable, [{"params": params[:2], "lr": 0.7}, {"params": params[2:], "lr": 0.2}])
        groups = optimizer.param_groups
        for step in range(3 * L):
            give_grads(params, step)
            if step == L - 1:
                aside = groups[0]["lr"]
                groups[0]["lr"] = 1e-3
            if step == L:
                groups[0]["lr"] = aside
            if step == 2 * L - 1:
                groups[0]["lr"], groups[1]["lr"] = groups[1]["lr"], groups[0]["lr"]
            optimizer.step()
        return optimizer

    assert_same(train(False), train(True))


def test_the_step_without_effect_of_checkpoint_tools_leaves_lr_alone() -> None:
    model = nn.Linear(3, 2)
    optimizer = build(True, model.parameters(), lr=0.5)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    give_grads(list(model.parameters()), 0)
    optimizer.step()
    assert (optimizer.param_groups[0]["lr"], optimizer.stats()["steps"]) == (0.5, 1)


def test_a_group_without_parameters_counts_too(make: Method) -> None:
    def train(capturable: bool) -> RelaxationOptimizer:
        params = weights()
        optimizer = build(capturable, [{"params": []}, {"params": params}], make)
        run(optimizer, params, range(L + 2))
        state = optimizer.state_dict()
        assert optimizer.stats() == make.stats(L + 2, L)
        again = build(capturable, [{"params": []}, {"params": params}], make)
        again.load_state_dict(state)
        run(again, params, range(L + 2, 2 * L))
        return again

    assert_same(train(False), train(True))


@with_options("options", [{}, {"averaging": "linear"}], Method.is_capturable)
@pytest.mark.parametrize("begins", [False, True])
def test_it_may_be_turned_on_and_off_in_mid_period(make: Method, begins: bool, options: dict[str, Any]) -> None:
    here, there = weights(), weights()
    plain, other = build(False, here, make, **options), build(begins, there, make, **options)
    for step in range(4 * L):
        if step in (L + 1, 2 * L + 2):
            other.param_groups[0]["capturable"] = not other.param_groups[0]["capturable"]
        run(plain, here, range(step, step + 1))
        run(other, there, range(step, step + 1))
        assert isinstance(other.param_groups[0]["step"], Tensor) == other.param_groups[0]["capturable"]
        assert_same(plain, other)


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", -1.0), ("gamma", 0.0), ("gamma", math.nan), ("lr", math.nan), ("lr", "x")]
)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_value_out_of_range_is_refused_and_nothing_has_changed(make: Method, name: str, value: Any, backend: str) -> None:
    params = weights()
    optimizer = build(True, [{"params": params[:2]}, {"params": params[2:]}], make, backend=backend)
    run(optimizer, params, range(2))
    after = [p.detach().clone() for p in params]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"^{name}: "):
        run(optimizer, params, range(2, 3))
    assert all(map(torch.equal, params, after))
    assert [int(group["step"]) for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("lr", [torch.tensor([0.3]), torch.tensor(1), 1])
def test_an_lr_of_one_element_or_of_another_type_is_a_number(lr: Any) -> None:
    held = build(True, weights(), lr=lr).param_groups[0]["lr"]
    assert held.shape == ()
    assert held == torch.tensor(float(lr), dtype=torch.float64)


def test_a_float32_lr_stays_one_over_a_load() -> None:
    optimizer = build(True, weights(), lr=torch.tensor(0.1))
    address = optimizer.param_groups[0]["lr"].data_ptr()
    optimizer.load_state_dict(optimizer.state_dict())
    lr = optimizer.param_groups[0]["lr"]
    assert (lr.dtype, lr.data_ptr(), lr) == (torch.float32, address, torch.tensor(0.1))


def test_a_group_lies_on_one_device() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"^capturable: .*one device, got cpu, meta in group 0"):
        build(True, params).step()


def test_a_group_that_is_added_counts_on(make: Method) -> None:
    def train(capturable: bool) -> RelaxationOptimizer:
        params, late = weights(), weights(5)
        optimizer = build(capturable, params, make)
        run(optimizer, params, range(L + 2))
        optimizer.add_param_group({"params": late, "lr": 0.7})
        for step in range(L + 2, 2 * L + 1):
            give_grads([*params, *late], step)
            optimizer.step()
        return optimizer

    assert_same(train(False), train(True))


def test_another_option_that_needs_the_host_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^closure_mode: "):
        build(True, weights(), closure_mode="inner_loop")


@pytest.fixture
def captured_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[RelaxationOptimizer], None]:
    """Take a step of an optimizer that believes that a graph is being captured."""

    def step(optimizer: RelaxationOptimizer) -> None:
        with monkeypatch.context() as patch:
            for module in ("clocks", "captures"):
                patch.setattr(f"deeprelax_cuda.optim.{module}.is_capturing", lambda groups: True)
            optimizer.step()

    return step


@pytest.mark.parametrize(
    ("capturable", "message"), [(False, r"^capturable: expected True"), (True, r"^capturable: take a step before")]
)
def test_a_first_step_and_counters_of_the_host_are_not_captured(
    capturable: bool, message: str, captured_step: Callable[[RelaxationOptimizer], None]
) -> None:
    params = weights()
    give_grads(params, 0)
    optimizer = build(capturable, params)
    with pytest.raises(RuntimeError, match=message):
        captured_step(optimizer)
    assert not optimizer.state
    assert all(map(torch.equal, params, weights()))


def test_a_step_in_eval_mode_is_not_captured(captured_step: Callable[[RelaxationOptimizer], None]) -> None:
    params = weights()
    optimizer = build(True, params)
    run(optimizer, params, range(1))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"^capturable: call train\(\)"):
        captured_step(optimizer)


def test_a_parameter_without_state_is_not_captured(
    captured_step: Callable[[RelaxationOptimizer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = weights()
    optimizer = build(True, params)
    monkeypatch.setattr(cpu.CpuPlan, "CAPTURABLE", True)
    give_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    give_grads(params, 1)
    with pytest.raises(RuntimeError, match=r"^params\[1\]: take a step with it"):
        captured_step(optimizer)
    assert params[1] not in optimizer.state


def test_a_backend_that_reads_the_clock_is_not_captured(captured_step: Callable[[RelaxationOptimizer], None]) -> None:
    params = weights()
    optimizer = build(True, params, backend="eager")
    run(optimizer, params, range(1))
    after = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"^backend: .*got eager for float32 parameters"):
        captured_step(optimizer)
    assert all(map(torch.equal, params, after))


def test_a_number_in_the_place_of_a_tensor_is_not_captured(
    captured_step: Callable[[RelaxationOptimizer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = weights()
    optimizer = build(True, params)
    run(optimizer, params, range(1))
    after = [p.detach().clone() for p in params]
    monkeypatch.setattr(cpu.CpuPlan, "CAPTURABLE", True)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"^lr: "):
        captured_step(optimizer)
    assert all(map(torch.equal, params, after))
    assert optimizer.stats()["steps"] == 1


def test_the_scratch_memory_is_as_large_as_the_native_code_takes_it_to_be() -> None:
    header = Path(__file__).parents[1] / "csrc/include/deeprelax/deeprelax.h"
    assert f"kClockNumbers = {NUMBERS};" in header.read_text()
