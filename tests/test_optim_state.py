"""The two sets of weights and the state of the optimizers: copying, evaluating, and what goes wrong in a user's hands."""

from __future__ import annotations

import copy
import linecache
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_runs import (
    KINDS,
    METHODS,
    L,
    Method,
    assert_equal,
    backward,
    counters,
    small_model,
    snapshot,
    those,
    walk,
    with_options,
)
from torch import nn

from deeprelax_cuda.optim.base import COUNTERS, RelaxationOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


# Saving, loading, copying.


def test_counters_are_plain_numbers(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L + 1))
    (group,) = optimizer.state_dict()["param_groups"]
    assert dict(zip(("steps", "period_steps", "outer_steps"), map(group.get, COUNTERS), strict=True)) == make.stats(L + 1)
    assert group["seed"] == 11
    assert group["contract_version"] == 1
    for name in ("step", "position", "outer_steps", "seed", "contract_version"):
        assert type(group[name]) is int
    for name in ("gamma", "initial_gamma", "initial_inner_lr"):
        assert type(group[name]) is float
    assert {type(own["period_steps"]) for own in optimizer.state_dict()["state"].values() if "period_steps" in own} <= {int}


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_go_their_own_way(make: Method, copier: Callable[[Any], Any]) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L + 1))
    before = snapshot(model, optimizer)
    other, copied = copier((model, optimizer))
    walk(other, copied, range(L + 1, 3 * L))
    assert_equal(snapshot(model, optimizer), before)
    walk(model, optimizer, range(L + 1, 3 * L))
    assert_equal(snapshot(other, copied), snapshot(model, optimizer))


@those(lambda method: method.has_anchor)
def test_loading_copies_and_respects_hooks(make: Method) -> None:
    """A user's pre-hook sees the incoming state before ours, a post-hook the loaded state with its types."""
    model, other = small_model(torch.bfloat16), small_model(torch.bfloat16)
    optimizer, resumed = make(model.parameters()), make(other.parameters())
    walk(model, optimizer, range(2))

    def negate_anchors(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        state = {key: {**values, "anchor": -values["anchor"]} for key, values in incoming["state"].items()}
        return {**incoming, "state": state}

    seen: list[torch.dtype] = []
    resumed.register_load_state_dict_pre_hook(negate_anchors)
    resumed.register_load_state_dict_post_hook(lambda o: seen.extend(s["anchor"].dtype for s in o.state.values()))
    resumed.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(resumed.state[q]["anchor"], -optimizer.state[p]["anchor"])
        assert resumed.state[q].keys() == optimizer.state[p].keys()
        for role, value in resumed.state[q].items():
            if role != "period_steps":  # a number, until the next step
                assert value.data_ptr() != optimizer.state[p][role].data_ptr()


def test_loading_a_foreign_state_is_refused_and_changes_nothing(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(2))
    before, numbers = snapshot(model, optimizer), counters(optimizer)
    with pytest.raises(ValueError, match="contract version 1, got None"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    for other in METHODS.values():
        if other.kind is not make.kind:
            walk(strange := small_model(), of_other := other(strange.parameters()), range(2))
            with pytest.raises(ValueError, match=f"the state of {make.kind.METHOD}, got that of {other.kind.METHOD}"):
                optimizer.load_state_dict(of_other.state_dict())
    for role in make.roles:
        wrong_shape = copy.deepcopy(optimizer.state_dict())
        wrong_shape["state"][0][role] = torch.zeros(1)
        with pytest.raises(ValueError, match=rf"{role}\[0\]: expected the shape of its parameter, \(5, 4\), got \(1,\)"):
            optimizer.load_state_dict(wrong_shape)
    assert_equal(snapshot(model, optimizer), before)
    assert counters(optimizer) == numbers


# Evaluating.


@with_options("kind", KINDS)
def test_evaluating_never_changes_training(make: Method, kind: dict[str, Any]) -> None:
    options = dict(kind)
    dtype = options.pop("dtype")
    (model, optimizer), (other, evaluated) = ((m := small_model(dtype), make(m.parameters(), **options)) for _ in range(2))
    for step in range(2 * L + 1):
        walk(model, optimizer, range(step, step + 1))
        walk(other, evaluated, range(step, step + 1))
        for _ in range(1 + step % 3):
            evaluated.eval()
            evaluated.eval()
            for p, live in zip(other.parameters(), model.parameters(), strict=True):
                assert torch.equal(p, evaluated.state[p]["anchor"].to(dtype) if make.has_periods else live)
            evaluated.train()
            evaluated.train()
        assert_equal(snapshot(other, evaluated), snapshot(model, optimizer))


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "scheduled"])
def test_step_in_eval_mode_returns_to_train_mode_with_one_warning(make: Method, wrapped: bool) -> None:
    (model, optimizer), (other, evaluated) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    if wrapped:
        torch.optim.lr_scheduler.ConstantLR(evaluated, factor=1.0)
    walk(model, optimizer, range(2))
    walk(other, evaluated, range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (2, 3):
            backward(model, step)
            optimizer.step()
            evaluated.eval()
            evaluated.step(lambda step=step: backward(other, step))  # its gradients are taken at the live weights
    assert ["step() in eval mode" in str(warning.message) for warning in caught] == [True] * make.has_periods
    for warning in caught:
        assert warning.filename == __file__
        assert "evaluated.step(" in linecache.getline(warning.filename, warning.lineno)
    assert_equal(snapshot(other, evaluated), snapshot(model, optimizer))


@those(lambda method: method.has_periods)
def test_step_that_is_none_stays_in_eval_mode(make: Method) -> None:
    """A refused one, one without gradients, and the phantom step, which allocates the live weights too."""
    model = small_model()
    optimizer = make(model.parameters())
    optimizer.eval()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all("live" in optimizer.state[p] for p in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.train()
    walk(model, optimizer, range(2))
    optimizer.eval()
    before = snapshot(model, optimizer)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_equal(snapshot(model, optimizer), before)
    backward(model, 2)
    next(model.parameters()).grad = torch.zeros(5, 4).to_sparse()
    with pytest.raises(ValueError, match=r"^grads\[0\]"):
        optimizer.step()
    assert_equal(snapshot(model, optimizer), before)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert_equal(snapshot(model, optimizer), before)


@those(lambda method: method.has_periods)
def test_refused_step_keeps_the_live_weights_of_a_model_that_was_cast(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(2))
    optimizer.eval()
    live = [optimizer.state[p]["live"].clone() for p in model.parameters()]
    model.half()
    for p in model.parameters():
        p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    for p, y in zip(model.parameters(), live, strict=True):
        assert torch.equal(optimizer.state[p]["live"], y)
        assert optimizer.state[p]["live"].dtype == torch.float32


def interrupted() -> float:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("in_eval", "name"), [(False, "consolidate_"), (True, "consolidate_"), (True, "sync_lookahead")])
@with_options("kind", KINDS, lambda method: method.has_periods)
def test_consolidating_goes_on_from_the_anchor(make: Method, kind: dict[str, Any], name: str, in_eval: bool) -> None:
    options = dict(kind)
    dtype = options.pop("dtype")
    model = small_model(dtype)
    optimizer = make(model.parameters(), **options)
    walk(model, optimizer, range(L + 2))
    before = [{role: value.clone() for role, value in optimizer.state[p].items()} for p in model.parameters()]
    if in_eval:
        optimizer.eval()
    getattr(optimizer, name)()
    optimizer.train()
    for p, was in zip(model.parameters(), before, strict=True):
        state, x = optimizer.state[p], was["anchor"]
        assert torch.equal(p, x.to(dtype))
        assert torch.equal(state["anchor"], x)
        if make.average:
            assert torch.equal(state[make.average], was["gradient_average"] if make.averages_gradients else x)
        assert "master" not in state or torch.equal(state["master"], x)
        assert state.get("period_steps", -make.uncounted) == -make.uncounted
        for role in state.keys() & {"momentum", "outer_momentum"}:
            assert torch.equal(state[role], was[role])
    assert optimizer.stats() == {**make.stats(L + 2), "period_steps": 0}
    assert optimizer.at_outer_boundary


@those(lambda method: not method.has_periods)
def test_consolidating_does_nothing_where_there_is_no_average(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L + 2))
    before = snapshot(model, optimizer)
    optimizer.consolidate_()
    optimizer.sync_lookahead()
    assert_equal(snapshot(model, optimizer), before)
    assert optimizer.stats() == make.stats(L + 2)


@those(lambda method: method.averages_gradients)
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", ["consolidate_", "reset_anchors_"])
def test_average_of_gradients_begins_with_the_first_that_counts_from_there(make: Method, name: str, loaded: bool) -> None:
    """Whatever was in it: a period depends on nothing before it but x, the outer momentum and the counters."""
    p = nn.Parameter(torch.linspace(-1, 1, 4))
    optimizer = make([p])
    for step in range(L + 2):
        step_with(optimizer, (p, 1.0 + step))
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    getattr(optimizer, name)()
    old = optimizer.state[p]["gradient_average"][0].item()
    counted = (5.0, 7.0, 11.0)[make.uncounted :]
    second = counted[0] + (0.25 if make.takes("averaging") else 0.5) * (counted[1] - counted[0])
    for value, average in zip((5.0, 7.0, 11.0), [*[old] * make.uncounted, counted[0], second], strict=False):
        step_with(optimizer, (p, value))
        assert torch.equal(optimizer.state[p]["gradient_average"], torch.full((4,), average))


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
@with_options("kind", KINDS)
def test_resetting_anchors_takes_the_weights_that_are_there(make: Method, kind: dict[str, Any], in_eval: bool) -> None:
    options = dict(kind)
    dtype = options.pop("dtype")
    model = small_model(dtype)
    optimizer = make(model.parameters(), **options)
    walk(model, optimizer, range(L + 2))
    if in_eval:
        optimizer.eval()
    weights = {name: torch.full_like(t, 0.3) for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    optimizer.reset_anchors_()
    optimizer.train()
    for p in model.parameters():
        for role in ({"average"} & set(make.roles)) | ({"anchor", "master"} & optimizer.state[p].keys()):
            assert torch.equal(optimizer.state[p][role], p.detach().to(optimizer.state[p][role].dtype))
        assert torch.equal(p, torch.full_like(p, 0.3))
        assert optimizer.state[p].get("period_steps", -make.uncounted) == -make.uncounted
        assert ("anchor" in optimizer.state[p]) == make.has_anchor
        assert optimizer.state[p].get("period_steps", -make.uncounted) == -make.uncounted
        assert ("anchor" in optimizer.state[p]) == make.has_anchor
    assert optimizer.stats()["period_steps"] == 0


# What users do to the state and to the parameters between steps.


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {role: torch.as_tensor(value) for role, value in state.items()}


def two_parameters() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.linspace(-1, 1, 4)), nn.Parameter(torch.linspace(1, 2, 3))


def step_with(optimizer: RelaxationOptimizer, *grads: tuple[nn.Parameter, float | None]) -> None:
    for p, value in grads:
        p.grad = None if value is None else torch.full_like(p, value)
    optimizer.step()


@those(lambda method: method.has_periods)
def test_looking_at_the_state_of_a_parameter_makes_none(make: Method) -> None:
    """``optimizer.state`` is a defaultdict: torch's own idiom leaves an empty dict behind."""
    p, unused = two_parameters()
    start = unused.detach().clone()
    optimizer = make([p, unused])
    assert len(optimizer.state[unused]) == 0
    step_with(optimizer, (p, 1.0))
    live = p.detach().clone()
    for _ in range(2):
        optimizer.eval()
        assert torch.equal(p, optimizer.state[p]["anchor"])
        optimizer.train()
        assert torch.equal(p, live)
    for _ in range(L):
        step_with(optimizer, (p, 1.0))
    optimizer.consolidate_()
    optimizer.reset_anchors_()
    assert len(optimizer.state[unused]) == 0, "the outer step is for those that have been stepped"
    assert torch.equal(unused, start)
    step_with(optimizer, (unused, 1.0))
    assert torch.equal(optimizer.state[unused]["anchor"], start if make.has_long_periods else unused)


@those(lambda method: method.has_anchor)
def test_phantom_step_is_one_after_a_look_at_the_state(make: Method) -> None:
    p, q = two_parameters()
    optimizer = make([p, q])
    optimizer.param_groups[0]["lr"] = 0.0
    assert len(optimizer.state[p]) == 0
    step_with(optimizer, (p, 0.0), (q, 0.0))
    assert optimizer.stats()["steps"] == 0
    assert "anchor" in optimizer.state[p]


def test_loaded_empty_state_is_none(make: Method) -> None:
    p, unused = two_parameters()
    optimizer = make([p, unused])
    step_with(optimizer, (p, 1.0))
    saved = optimizer.state_dict()
    saved["state"][1] = {}
    optimizer.load_state_dict(saved)
    optimizer.eval()
    optimizer.train()
    for _ in range(L):
        step_with(optimizer, (p, 1.0))
    assert not optimizer.state[unused]


@those(lambda method: method.has_periods)
@pytest.mark.parametrize("spoil", ["drop", "reshape"])
def test_switching_weights_is_all_or_nothing(make: Method, spoil: str) -> None:
    p, q = two_parameters()
    optimizer = make([("first", p), ("second", q)])
    step_with(optimizer, (p, 1.0), (q, 1.0))

    def spoilt(role: str) -> dict[str, Any]:
        state = dict(optimizer.state[q])
        value = state.pop(role)
        return state if spoil == "drop" else {**state, role: value[:1].clone()}

    def assert_refused(call: Callable[[], None], role: str) -> None:
        whole, weights, training = optimizer.state[q], p.detach().clone(), optimizer.param_groups[0]["train_mode"]
        optimizer.state[q] = spoilt(role)
        with pytest.raises(ValueError, match=rf"^params\[1 second\]: expected in its state {role} of shape \(3,\)"):
            call()
        assert torch.equal(p, weights)
        assert optimizer.param_groups[0]["train_mode"] is training
        optimizer.state[q] = whole

    for call in (optimizer.eval, optimizer.consolidate_, optimizer.reset_anchors_):
        assert_refused(call, "anchor")
    optimizer.eval()
    assert_refused(optimizer.train, "live")
    optimizer.train()


@those(lambda method: method.has_periods)
def test_state_saved_in_eval_mode_outlives_the_next_train(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(2))
    in_training = optimizer.state_dict()
    live = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    saved = optimizer.state_dict()
    optimizer.train()
    assert all("live" not in state for state in in_training["state"].values())
    for state, y in zip(saved["state"].values(), live, strict=True):
        assert torch.equal(state["live"], y)
    resumed = make((other := small_model()).parameters())
    resumed.load_state_dict(saved)
    resumed.train()
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))


@those(lambda method: method.has_periods)
@pytest.mark.parametrize(("in_eval", "role"), [(False, "anchor"), (True, "anchor"), (True, "live")])
def test_loading_an_incomplete_state_is_refused_by_name(make: Method, in_eval: bool, role: str) -> None:
    p, q = two_parameters()
    optimizer = make([("first", p), ("second", q)])
    step_with(optimizer, (p, 1.0), (q, 1.0))
    if in_eval:
        optimizer.eval()
    incomplete = copy.deepcopy(optimizer.state_dict())
    del incomplete["state"][1][role]
    before, numbers = copy.deepcopy(optimizer.state_dict()["state"]), counters(optimizer)
    with pytest.raises(ValueError, match=rf'^state_dict, params\[1 second\]: expected "{role}" in its state'):
        optimizer.load_state_dict(incomplete)
    after = optimizer.state_dict()["state"]
    assert after.keys() == before.keys()
    for number, state in before.items():
        assert_equal(tensors(after[number]), tensors(state))
    assert counters(optimizer) == numbers


def test_parameter_transposed_in_place_is_paired_with_its_own_state(make: Method) -> None:
    """A square weight transposed at its address, which neither the address nor the shape tells: other weights, same state."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 3))
    optimizer = make([p], **(quiet := make.of({"temperature": 0.0})))
    for _ in range(L):
        p.grad = torch.randn(3, 3)
        optimizer.step()
    other = nn.Parameter(p.detach().t().contiguous())
    reference = make([other], **quiet)
    reference.load_state_dict(optimizer.state_dict())
    p.data = p.data.t()
    for _ in range(L + 1):
        p.grad = torch.randn(3, 3)
        other.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(p, other)
        for role in make.roles:
            assert torch.equal(optimizer.state[p][role], reference.state[other][role])


def test_model_laid_out_anew_goes_on(make: Method) -> None:
    torch.manual_seed(0)
    models = [nn.Conv2d(3, 4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make(model.parameters(), **make.of({"temperature": 0.0})) for model in models]
    for step in range(2 * L):
        x = torch.randn(2, 3, 5, 5)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if step == 1:
            models[1].to(memory_format=torch.channels_last)
            assert models[1].weight.stride() != models[0].weight.stride()
    for role, value in optimizers[0].state[models[0].weight].items():
        torch.testing.assert_close(optimizers[1].state[models[1].weight][role], value)
        assert role == "period_steps" or optimizers[1].state[models[1].weight][role].stride() == models[1].weight.stride()
    torch.testing.assert_close(models[1].weight, models[0].weight)


@those(lambda method: not method.averages_gradients)  # which never go on from y
def test_masters_that_were_switched_off_do_not_come_back(make: Method) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.bfloat16))
    optimizer = make([p], master_weights=True, **make.of({"temperature": 0.0, "inner_steps": 10}))
    for masters in (True, False, False, True):
        optimizer.param_groups[0]["master_weights"] = masters
        before = p.detach().clone()
        step_with(optimizer, (p, 1.0))
        assert ("master" in optimizer.state[p]) is masters
        assert (p < before).all(), "a stale master would throw the weights back"
    torch.testing.assert_close(optimizer.state[p]["master"].bfloat16(), p.detach(), rtol=0, atol=0)


@those(lambda method: len(method.smaller) > 0)
def test_refused_step_changes_nothing(make: Method) -> None:
    """Also not the state that a parameter has, which the refused step would have added to."""
    p, q = two_parameters()
    optimizer = make([p, q], **make.smaller)
    step_with(optimizer, (p, 1.0), (q, None))
    before = {role: value.clone() for role, value in optimizer.state[p].items()}
    optimizer.param_groups[0].update(make.larger)
    q.data = torch.arange(6.0)[::2]
    q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"^params\[1\] .*expected a dense tensor"):
        optimizer.step()
    assert_equal(optimizer.state[p], before)
    assert not optimizer.state.get(q)
    assert optimizer.stats()["steps"] == 1
    q.grad = None
    optimizer.step()
    assert optimizer.state[p].keys() > before.keys(), "what it would have added"


def test_group_taken_away_leaves_the_others_their_step(make: Method) -> None:
    (p, q), (r, s) = two_parameters(), two_parameters()
    quiet = make.of({"temperature": 0.0})
    optimizer, reference = make([{"params": [p]}, {"params": [q]}], **quiet), make([r], **quiet)
    for step in range(L + 1):
        if step == 1:
            del optimizer.param_groups[1]
        step_with(optimizer, (p, 1.0), (q, 1.0))
        step_with(reference, (r, 1.0), (s, 1.0))
        assert torch.equal(p, r)
