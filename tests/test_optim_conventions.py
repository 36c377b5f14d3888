"""What every optimizer here owes to a training loop written for torch.optim: drop-in rules, gradients, options, refusals."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from optim_runs import METHODS, L, Method, assert_equal, backward, counters, small_model, snapshot, those, walk, with_options
from torch import Tensor, nn

from deeprelax_cuda import backends
from deeprelax_cuda.optim.launches import FIELDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


# Calling step().


def test_closure_is_evaluated_once_and_hooks_fire_once(make: Method) -> None:
    (model, optimizer), (other, closed) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    calls: list[str] = []
    closed.register_step_pre_hook(lambda *_: calls.append("pre"))
    closed.register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(L):
        loss = backward(model, step)
        optimizer.step()
        calls.clear()
        returned = closed.step(lambda step=step: (calls.append("closure"), backward(other, step))[1])
        assert calls == ["pre", "closure", "post"]
        assert torch.equal(returned, loss)
    assert_equal(snapshot(other, closed), snapshot(model, optimizer))


@those(lambda method: method.takes("closure_mode"))
def test_closure_mode_inner_loop_takes_a_period_a_call(make: Method) -> None:
    (model, optimizer), other = ((m := small_model(), make(m.parameters()))), small_model()
    looping = make(other.parameters(), closure_mode="inner_loop")
    calls: list[str] = []
    looping.register_step_pre_hook(lambda *_: calls.append("pre"))
    looping.register_step_post_hook(lambda *_: calls.append("post"))
    minibatch = itertools.count()
    for period in range(3):
        losses = []
        for step in range(period * L, (period + 1) * L):
            losses.append(backward(model, step))
            optimizer.step()
        calls.clear()
        returned = looping.step(lambda: (calls.append("closure"), backward(other, next(minibatch)))[1])
        assert calls == ["pre", *["closure"] * L, "post"]
        assert torch.equal(returned, losses[0]), "the loss where the period begins"
        assert looping.at_outer_boundary
        assert_equal(snapshot(other, looping), snapshot(model, optimizer))


@those(lambda method: method.takes("closure_mode"))
def test_closure_mode_inner_loop_goes_on_where_it_broke_off(make: Method) -> None:
    (model, optimizer), other = ((m := small_model(), make(m.parameters()))), small_model()
    looping = make(other.parameters(), closure_mode="inner_loop")
    minibatches = iter(range(2 * L))

    def closure(break_at: int | None = None) -> torch.Tensor:
        if (step := next(minibatches)) == break_at:
            raise KeyboardInterrupt
        return backward(other, step)

    with pytest.raises(KeyboardInterrupt):
        looping.step(lambda: closure(break_at=1))
    assert looping.stats()["period_steps"] == 1
    minibatches = iter(range(1, 2 * L))
    looping.step(closure)
    assert looping.stats() == {"steps": L, "period_steps": 0, "outer_steps": 1}
    walk(model, optimizer, range(L))
    assert_equal(snapshot(other, looping), snapshot(model, optimizer))


@those(lambda method: method.takes("closure_mode"))
def test_closure_mode_inner_loop_needs_a_closure(make: Method) -> None:
    """Also where a GradScaler calls; but the phantom step of checkpoint tools passes none."""
    model = small_model()
    optimizer = make(model.parameters(), closure_mode="inner_loop")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    assert len(optimizer.state) == len(list(model.parameters()))
    before = snapshot(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(backward(model, 0).detach().requires_grad_()).backward()
    for step in (optimizer.step, lambda: scaler.step(optimizer)):
        with pytest.raises(ValueError, match=r"^closure: .*GradScaler"):
            step()
    assert_equal(snapshot(model, optimizer), before)
    optimizer.step(model.zero_grad)  # a closure that leaves no gradients: no step, and no end of them either
    assert optimizer.stats()["steps"] == 0


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_phantom_step_allocates_and_changes_nothing(make: Method, lr: Any) -> None:
    (model, optimizer), (other, probed) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    before, was = snapshot(other, probed), probed.param_groups[0]["lr"]
    for p in other.parameters():
        p.grad = torch.zeros_like(p)
    probed.param_groups[0]["lr"] = lr
    probed.step()
    probed.param_groups[0]["lr"] = was
    assert probed.stats()["steps"] == 0
    assert not probed.at_outer_boundary
    after = snapshot(other, probed)
    assert_equal({name: after[name] for name in before}, before)
    walk(model, optimizer, range(1))
    assert after.keys() == snapshot(model, optimizer).keys(), "the state is what a step allocates"
    walk(other, probed, range(1))
    assert_equal(snapshot(other, probed), snapshot(model, optimizer))


def test_checkpoint_tool_allocates_the_state(make: Method) -> None:
    """torch.distributed.checkpoint takes the phantom step itself."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = small_model()
    optimizer = make(model.parameters())
    weights = copy.deepcopy(model.state_dict())
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == set(weights)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert (optimizer.stats()["steps"], optimizer.param_groups[0]["lr"]) == (0, 0.1)


def test_checkpoint_tool_asks_in_training_and_changes_nothing(make: Method) -> None:
    """It takes its step wherever it finds no state: also in mid-training, where the method needs none."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    (model, optimizer), (other, saved) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    for step in range(L + 1):
        walk(model, optimizer, range(step, step + 1))
        walk(other, saved, range(step, step + 1))
        other.zero_grad()
        get_optimizer_state_dict(other, saved)
        assert counters(saved) == counters(optimizer)
        assert_equal(snapshot(other, saved), snapshot(model, optimizer))


def test_warm_up_step_with_lr_0_is_a_step(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    walk(model, optimizer, range(1))
    assert optimizer.stats()["steps"] == 1
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert optimizer.stats()["steps"] == 2, "zero gradients too are gradients, where there is state"


def test_no_gradient_no_step(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    optimizer.step()
    assert len(optimizer.state) == 0
    walk(model, optimizer, range(L - 1))
    before, numbers = snapshot(model, optimizer), counters(optimizer)
    model.zero_grad()
    optimizer.step()
    assert_equal(snapshot(model, optimizer), before)
    assert counters(optimizer) == numbers


@those(lambda method: method.has_long_periods)
def test_parameter_without_gradient_takes_the_outer_step_only(make: Method) -> None:
    model = small_model()
    optimizer = make(model.parameters(), momentum=0.0, **make.of({"rho": math.inf}))
    counted = make.uncounted + 1
    walk(model, optimizer, range(counted))
    p, live = model[0].weight, model[0].weight.detach().clone()
    state = optimizer.state[p]
    before = {role: value.clone() for role, value in state.items()}
    x, m = before["anchor"], before[make.average]
    for step in range(counted, L):
        assert torch.equal(p, live)
        backward(model, step)
        p.grad = None
        optimizer.step()
    assert "momentum" not in state or torch.equal(state["momentum"], before["momentum"])
    assert torch.equal(state["anchor"], x - torch.tensor(0.1) * (m if make.averages_gradients else x - m))
    assert torch.equal(p, state["anchor"]) == make.ends_at_anchor
    assert torch.equal(state[make.average], m if make.averages_gradients else state["anchor"])


@those(lambda method: method.has_long_periods)
def test_parameter_without_a_gradient_in_a_whole_period(make: Method) -> None:
    """The outer step is for it where it goes by weights; where it goes by gradients, this period has none of its."""
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L))
    p, before = model[0].weight, {"": model[0].weight.detach().clone()}
    before |= {role: value.clone() for role, value in optimizer.state[p].items()}
    for step in range(L, 2 * L):
        backward(model, step)
        p.grad = None
        optimizer.step()
    after = {"": p, **optimizer.state[p]}
    stayed = {role for role, value in before.items() if torch.equal(after[role], value)}
    assert stayed == (set(before) if make.averages_gradients else set(before) & {"momentum"})
    assert optimizer.stats()["outer_steps"] == 2


@with_options("options", [{}, {"averaging": "linear"}], lambda method: method.has_anchor and method.length > 1)
def test_late_parameter_starts_at_itself(make: Method, options: dict[str, Any]) -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = make(model.parameters(), **options)
    walk(model, optimizer, range(1))
    late = model[0].weight
    assert late not in optimizer.state
    start = late.detach().clone()
    late.requires_grad_(True)
    walk(model, optimizer, range(1, 2))
    state = optimizer.state[late]
    assert torch.equal(state["anchor"], start)
    assert not torch.equal(late, start)
    if make.averages_gradients:  # the first that counts is the average
        assert torch.equal(state["gradient_average"], torch.zeros_like(late) if make.uncounted else late.grad)
    elif make.average:
        share = 0.25 if make.takes("averaging") and not options else 1.0
        torch.testing.assert_close(state["average"], start + share * (late.detach() - start))
    walk(model, optimizer, range(2, L))
    assert torch.equal(state["anchor"], start) == (not make.has_periods)
    assert torch.equal(late, state["anchor"]) == (make.has_periods and make.ends_at_anchor)


@those(lambda method: method.takes("averaging") or method.uncounted > 0)
def test_linear_average_counts_each_parameter_for_itself(make: Method) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = make([p, q], inner_steps=5, **make.of({"averaging": "linear"}))
    seen: dict[Tensor, list[Tensor]] = {p: [], q: []}
    for step in range(4):
        p.grad, q.grad = torch.full((3,), step + 1.0), torch.full((3,), step + 2.0) if step % 2 else None
        optimizer.step()
        for t in (p, q):
            if t.grad is not None:
                seen[t].append(t.grad.clone() if make.averages_gradients else t.detach().clone())
    for t in (p, q):
        torch.testing.assert_close(optimizer.state[t][make.average], torch.stack(seen[t][make.uncounted :]).mean(0))


def test_group_added_in_training_joins_the_counter(make: Method) -> None:
    model, head = small_model(), nn.Parameter(torch.ones(3))
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L + 1))
    optimizer.add_param_group({"params": [head], "lr": 0.5})
    first, added = counters(optimizer)
    assert {name for name in first if first[name] != added[name]} == {"lr"}
    head.grad = torch.ones(3)
    backward(model, L + 1)
    optimizer.step()
    assert optimizer.stats()["steps"] == L + 2
    assert not torch.equal(head, torch.ones(3))


def test_replaced_storage_is_picked_up(make: Method) -> None:
    (model, optimizer), (other, replaced) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    for step in range(2 * L):
        walk(model, optimizer, range(step, step + 1))
        for p in other.parameters():
            p.data = p.data.clone()
            replaced.state.get(p, {}).update(
                {k: v.clone() for k, v in replaced.state.get(p, {}).items() if k != "period_steps"}
            )
        walk(other, replaced, range(step, step + 1))
        assert_equal(snapshot(other, replaced), snapshot(model, optimizer))


def test_no_gradient_outlives_its_use(make: Method) -> None:
    p = nn.Parameter(torch.ones(64))
    optimizer = make([p])
    for _ in range(L + 1):
        p.grad = torch.ones(64)
        gradient = weakref.ref(p.grad)
        optimizer.step()
        p.grad = None
        assert gradient() is None


@those(lambda method: method.has_anchor)
def test_no_state_outlives_its_use(make: Method) -> None:
    p = nn.Parameter(torch.ones(64))
    optimizer = make([p])
    for _ in range(L + 1):
        p.grad = torch.ones(64)
        optimizer.step()
    anchor = weakref.ref(optimizer.state[p]["anchor"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert anchor() is None, "tensors of the replaced state are not kept by a cache"

    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make([p, q], **make.of({"inner_steps": 10}))
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    anchor = weakref.ref(optimizer.state[p]["anchor"])
    optimizer.state[p]["anchor"] = optimizer.state[p]["anchor"].clone()
    p.grad = None
    optimizer.step()
    assert anchor() is None, "a plan that a step does not use is dropped"


@pytest.mark.parametrize("backend", backends.available("cpu"))
def test_version_counters_see_the_step(make: Method, backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = make([p], backend=backend)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shapes_layouts_and_names(make: Method) -> None:
    """Empty, 0-d and channels_last parameters; gradients that are laid out otherwise; named parameters."""
    torch.manual_seed(0)
    shapes = {"empty": (0, 3), "scalar": (), "image": (2, 3, 4, 5), "matrix": (3, 5)}
    ps = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    ps["image"].data = ps["image"].data.contiguous(memory_format=torch.channels_last)
    flat = {name: nn.Parameter(p.detach().clone().as_strided((p.numel(),), (1,)).clone()) for name, p in ps.items()}
    optimizer, reference = make(ps.items()), make(flat.values())
    assert optimizer.param_groups[0]["param_names"] == list(shapes)
    for _ in range(L + 1):
        for name, p in ps.items():
            p.grad = torch.randn(p.shape)
            flat[name].grad = torch.empty_like(p).copy_(p.grad).detach().as_strided((p.numel(),), (1,))
        optimizer.step()
        reference.step()
    for name, p in ps.items():
        assert torch.equal(p.detach().as_strided((p.numel(),), (1,)), flat[name])


# Learning rates.


def test_tensor_lr_is_its_number(make: Method) -> None:
    (model, optimizer), (other, tensor_lr) = (
        (m := small_model(), make(m.parameters(), lr=lr)) for lr in (0.25, torch.tensor(0.25))
    )
    walk(model, optimizer, range(L + 1))
    walk(other, tensor_lr, range(L + 1))
    assert_equal(snapshot(other, tensor_lr), snapshot(model, optimizer))
    assert torch.is_tensor(tensor_lr.param_groups[0]["lr"])


@those(lambda method: method.has_long_periods)
def test_schedulers_change_the_outer_step_only(make: Method) -> None:
    (model, optimizer), (other, scheduled) = ((m := small_model(), make(m.parameters(), lr=0.4)) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.5)
    inner_lr, gamma = (scheduled.param_groups[0].get(name) for name in ("inner_lr", "gamma"))
    for step in range(L):
        before = snapshot(model, optimizer)
        assert_equal(snapshot(other, scheduled), before)
        walk(model, optimizer, range(step, step + 1))
        walk(other, scheduled, range(step, step + 1))
        if step < L - 1:
            scheduler.step()
            assert scheduled.param_groups[0]["gamma"] == gamma
    assert scheduled.param_groups[0]["lr"] == 0.1
    assert scheduled.param_groups[0].get("inner_lr") == inner_lr
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        x = before[f"{name} anchor"]
        whole, part = optimizer.state[p]["anchor"] - x, scheduled.state[q]["anchor"] - x
        torch.testing.assert_close(part, whole * (0.1 / 0.4), rtol=1e-3, atol=1e-6)


@those(lambda method: method.has_long_periods)
def test_useless_lr_is_said_once(make: Method) -> None:
    ps = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.warns(UserWarning, match="lr=5e-05 hardly moves the anchor") as caught:
        make([{"params": [p]} for p in ps], lr=5e-5)
    assert len(caught) == 1
    kind = make.kind if make.exchanges else Method  # those have a constructor of their own in the tests
    assert caught[0].filename == inspect.getfile(kind), "at the line that constructs it"


@pytest.mark.filterwarnings("error")
def test_useful_lr_is_not_spoken_of(make: Method) -> None:
    make([nn.Parameter(torch.ones(3))], lr=0.01 if make.has_periods else 1e-9)


# Which backend, and what is refused.


def test_explain_and_stats(make: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    ps = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
    assert make(ps, backend="eager").explain().splitlines() == [
        'eager for float32 parameters on cpu: asked for by backend="eager"',
        'eager for float64 parameters on cpu: asked for by backend="eager"',
    ]
    assert make(ps[:1], foreach=True).explain() == "eager for float32 parameters on cpu: asked for by foreach=True"
    assert make(ps).explain().startswith(f"{backends.available('cpu')[0]} for float32")
    model = small_model()
    optimizer = make(model.parameters())
    assert not optimizer.at_outer_boundary
    for step in range(1, 2 * L + 2):
        walk(model, optimizer, range(step, step + 1))
        assert optimizer.stats() == make.stats(step)
        assert optimizer.at_outer_boundary == (make.has_periods and step % make.length == 0)


def test_fused_refuses_eager_at_the_step(make: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    model = small_model()
    before = snapshot(model, optimizer := make(model.parameters(), fused=True))
    with pytest.raises(RuntimeError, match=r"^fused: True refuses the eager backend"):
        walk(model, optimizer, range(1))
    assert_equal(snapshot(model, optimizer), before)


BAD: list[tuple[str, Any]] = [
    *[("lr", v) for v in (-0.1, math.nan, math.inf, "0.1", None, torch.ones(2))],
    *[("inner_steps", v) for v in (0, -1, 2.0, None)],
    *[("gamma", v) for v in (0.0, -1.0, math.nan)],
    *[(name, -1e-3) for name in ("inner_lr", "scoping", "gamma_min", "temperature", "weight_decay", "outer_weight_decay")],
    *[("averaging", v) for v in (1.0, -0.1, "mean")],
    *[(name, v) for name in ("momentum", "inner_momentum") for v in (-0.1, 1.0)],
    ("dampening", 1.5),
    ("gamma_total", -1.0),
    *[("seed", v) for v in (-1, 2**64, 0.5)],
    ("backend", "nosuch"),
    ("rounding", "up"),
    ("differentiable", True),
    ("capturable", "yes"),
    *[("closure_mode", v) for v in ("twice", None)],
    ("foreach", "yes"),
]


def test_bad_options_are_refused_by_name(make: Method) -> None:
    """In the constructor and in a group that is added later; those that a method has, though it may not use them."""
    optimizer = make([nn.Parameter(torch.ones(3))])
    for name, value in [*BAD, *make.refuses]:
        if name not in make.options:
            continue
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            make([nn.Parameter(torch.ones(3))], **{name: value})
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], name: value})


@those(lambda method: len(method.kind.WITHOUT) > 0)
def test_options_that_it_has_not_are_refused_by_name(make: Method) -> None:
    """By Python in the constructor; groups may have any names, but the loop would look at these."""
    other = {"inner_steps": 3, "scoping": 0.1, "gamma_min": 0.1, "gamma_total": 3.0, "momentum": 0.9, "nesterov": True}
    other |= {"outer_weight_decay": 0.1, "closure_mode": "inner_loop", "gamma": 2.0}
    for name in make.kind.WITHOUT:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            make([nn.Parameter(torch.ones(3))], **{name: other[name]})
        with pytest.raises(ValueError, match=f"^{name}: {make.kind.METHOD} has no such option, got "):
            make([{"params": [nn.Parameter(torch.ones(3))], name: other[name]}])


def test_contradicting_options_are_refused(make: Method) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"gamma_total": 5.0, "gamma_min": 0.0}, "gamma_min"),
        ({"gamma_total": 5.0, "gamma_min": 5.0}, "gamma_min"),
        ({"master_weights": True, "rounding": "stochastic"}, "master_weights"),
        ({"foreach": True, "fused": True}, "foreach, fused"),
        ({"fused": True, "backend": "eager"}, "fused"),
    ]
    for options, name in cases:
        if make.takes(*options):
            with pytest.raises(ValueError, match=f"^{name}: "):
                make([nn.Parameter(torch.ones(3))], **options)


@those(lambda method: method.has_long_periods)
def test_groups_have_periods_of_one_length(make: Method) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=r"^inner_steps: expected the same inner_steps in all groups, got 7 in group 1 and 3"):
        make([{"params": [p]}, {"params": [q], "inner_steps": 7}])
    optimizer = make([{"params": [p]}, {"params": [q]}])
    optimizer.param_groups[1]["inner_steps"] = 7
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"^inner_steps: "):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_groups_share_one_counter_and_one_stream_of_noise(make: Method) -> None:
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = make([{"params": [p]}, {"params": [q]}])
    with pytest.raises(ValueError, match=r"^seed: "):
        optimizer.add_param_group({"params": [r], "seed": 1})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1]["seed"] = 7
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"^seed: "):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_tensors_that_cannot_be_served_are_refused_by_name(make: Method) -> None:
    good, complex_ = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    half, gappy = nn.Parameter(torch.ones(2, dtype=torch.float16)), nn.Parameter(torch.ones(4)[::2])
    complex_grad = torch.ones(2, dtype=torch.complex64)
    sparse_grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (3,), check_invariants=True)
    cases: list[tuple[nn.Parameter, Tensor, dict[str, Any], str]] = [
        (complex_, complex_grad, {}, r"^params\[1 odd\] \(shape \(2,\), torch.complex64\): expected a real"),
        (good, sparse_grad, {}, r"^grads\[1 odd\] .*expected a strided tensor"),
        (half, torch.ones(2, dtype=torch.float16), {"rounding": "stochastic"}, r"^rounding: .*bfloat16.*float16"),
        (gappy, torch.ones(2), {}, r"^params\[1 odd\] .*expected a dense tensor"),
    ]
    for odd, grad, options, message in cases:
        p = nn.Parameter(torch.ones(3))
        optimizer = make([("plain", p), ("odd", odd)], **options)
        p.grad, odd.grad = torch.ones(3), grad
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.step()
        assert torch.equal(p, torch.ones(3))
        assert len(optimizer.state) == 0
        assert optimizer.stats()["steps"] == 0


@those(lambda method: method.has_anchor)
def test_errors_name_the_parameter_of_the_optimizer(make: Method) -> None:
    """Not its place in a launch, which depends on types and on who has a gradient."""
    ps = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.float64, torch.float32)]
    optimizer = make([{"params": ps[:1]}, {"params": ps[1:]}])
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    role = make.roles[-1]
    optimizer.state[ps[3]][role] = torch.zeros(2)
    with pytest.raises(ValueError, match=rf"^{FIELDS[role]}\[3\] \(shape \(2,\)"):
        optimizer.step()
    del optimizer.state[ps[3]][role]
    ps[2].grad.data = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^grads\[2\] \(shape \(2,\)"):
        optimizer.step()


@pytest.mark.parametrize("split", ["group", "dtype"])
@pytest.mark.parametrize("late", [False, True], ids=["first step", "later step"])
def test_shared_memory_is_refused_across_launches(make: Method, split: str, late: bool) -> None:
    storage = torch.ones(8)
    p, q = nn.Parameter(storage[:4]), nn.Parameter(storage[4:])
    if split == "dtype":
        q = nn.Parameter(storage.view(torch.float64)[2:])
    optimizer = make([{"params": [("p", p)]}, {"params": [("q", q)]}] if split == "group" else [("p", p), ("q", q)])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    if late:
        optimizer.step()
    q.data = storage[2:6] if split == "group" else storage.view(torch.float64)[1:3]
    before = storage.clone()
    with pytest.raises(ValueError, match=r"^params\[1 q\] .*shares memory with params\[0 p\]"):
        optimizer.step()
    assert torch.equal(storage, before)


def test_gradient_in_memory_that_is_written_is_refused(make: Method) -> None:
    """At the first step, and where only the gradient's address has changed; gradients may share memory among themselves."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = make([p, q])
    p.grad, q.grad = torch.ones(4), p.detach()
    with pytest.raises(ValueError, match=r"^(grads\[1\]|params\[0\]) .*shares memory"):
        optimizer.step()
    q.grad = torch.ones(4)
    optimizer.step()
    states = [(1, optimizer.state[owner][role]) for owner in (p, q) for role in make.roles]
    for i, written in ((0, p.detach()), *states):
        (p, q)[i].grad = written
        before = [t.detach().clone() for t in (p, q)]
        with pytest.raises(ValueError, match=rf"grads\[{i}\] .*shares memory|shares memory with grads\[{i}\]"):
            optimizer.step()
        assert all(torch.equal(*pair) for pair in zip((p, q), before, strict=True))
        p.grad = q.grad = torch.ones(4)
        optimizer.step()
    assert optimizer.stats()["steps"] == 2 + len(states)


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        (torch.bfloat16, {"rounding": "zzz"}, "^rounding: .*zzz"),
        (torch.float32, {"rounding": "zzz"}, "^rounding: .*zzz"),
        (torch.float16, {"rounding": "stochastic"}, "^rounding: .*bfloat16"),
        (torch.bfloat16, {"rounding": "stochastic", "master_weights": True}, "^rounding: .*masters"),
    ],
)
def test_rounding_is_checked_at_each_step(make: Method, dtype: torch.dtype, changes: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0].update(changes)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(p, before)
    assert "master" not in optimizer.state[p]


def test_gradients_that_only_look_like_numbers_in_memory_are_written_out(make: Method) -> None:
    for shape in ((), (1,), (4,)):
        p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        optimizer, reference = make([p]), make([q])
        imaginary = torch.complex(torch.zeros(shape), torch.ones(shape)).conj().imag
        assert imaginary.is_neg()
        lazy = [torch.ones(shape), imaginary, torch._efficientzerotensor(shape), imaginary.detach()]
        for p.grad, q.grad in zip(lazy, (torch.empty(shape).copy_(g) for g in lazy), strict=True):
            optimizer.step()
            reference.step()
            assert torch.equal(p, q)
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer, reference = make([p]), make([q])
    for _ in range(3):  # laid out like the parameter all the same, from the first step on
        p.grad, q.grad = torch._neg_view(torch.ones(4)), -torch.ones(4)
        optimizer.step()
        reference.step()
        assert torch.equal(p, q)


def test_ranks_of_a_process_group_need_a_seed(make: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"^seed: pass seed=, the same on all data-parallel ranks"):
        make([p], seed=None)
    make([p], seed=1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    make([p], seed=None)
