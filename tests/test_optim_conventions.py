"""What every optimizer here owes to a training loop written for torch.optim: drop-in rules, resuming, evaluating, refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deeprelax_cuda import backends
from deeprelax_cuda.optim import EntropySGD

L = 3
#: Constructors with settings under which everything moves: a gamma that changes, noise and momenta.
METHODS: dict[str, Callable[..., EntropySGD]] = {
    "EntropySGD": lambda params, **options: EntropySGD(
        params, **{"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3, "seed": 11, **options}
    ),
}


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Callable[..., EntropySGD]:
    return METHODS[request.param]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    """Put the gradients of step number ``step`` in place."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss


def walk(model: nn.Module, optimizer: EntropySGD, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: EntropySGD) -> dict[str, Tensor]:
    """Copies of the parameters and of all state, by name."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for role, value in optimizer.state.get(p, {}).items():
            tensors[f"{name} {role}"] = torch.as_tensor(value).detach().clone()
    return tensors


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def counters(optimizer: EntropySGD) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


KINDS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {"dtype": torch.float32, "averaging": "linear"},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.float64, "gamma_total": 3.0, "gamma_min": 0.5},
]


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


# Saving, loading, copying.


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("position", range(2 * L + 1))
def test_resume_is_bitwise(make: Callable[..., EntropySGD], kind: dict[str, Any], position: int, in_eval: bool) -> None:
    dtype = kind.pop("dtype")
    model = small_model(dtype)
    optimizer = make(model.parameters(), **kind)
    walk(model, optimizer, range(position))
    if in_eval:
        optimizer.eval()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    resumed = make(other.parameters(), **{**kind, "seed": 12345})
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))
    if in_eval:
        optimizer.train()
        resumed.train()
    walk(model, optimizer, range(position, position + L + 1))
    walk(other, resumed, range(position, position + L + 1))
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))
    assert counters(resumed) == counters(optimizer)


def test_counters_are_plain_numbers(make: Callable[..., EntropySGD]) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L + 1))
    (group,) = optimizer.state_dict()["param_groups"]
    assert (group["step"], group["position"], group["outer_steps"], group["seed"]) == (L + 1, 1, 1, 11)
    assert group["contract_version"] == 1
    for name in ("step", "position", "outer_steps", "seed", "contract_version"):
        assert type(group[name]) is int
    for name in ("gamma", "initial_gamma", "initial_inner_lr"):
        assert type(group[name]) is float


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_go_their_own_way(make: Callable[..., EntropySGD], copier: Callable[[Any], Any]) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L + 1))
    before = snapshot(model, optimizer)
    other, copied = copier((model, optimizer))
    walk(other, copied, range(L + 1, 3 * L))
    assert_equal(snapshot(model, optimizer), before)
    walk(model, optimizer, range(L + 1, 3 * L))
    assert_equal(snapshot(other, copied), snapshot(model, optimizer))


def test_loading_copies_and_respects_hooks(make: Callable[..., EntropySGD]) -> None:
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
        for role, tensor in resumed.state[q].items():
            assert tensor.data_ptr() != optimizer.state[p][role].data_ptr()


def test_loading_a_foreign_state_is_refused_and_changes_nothing(make: Callable[..., EntropySGD]) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(2))
    before, numbers = snapshot(model, optimizer), counters(optimizer)
    with pytest.raises(ValueError, match="contract version 1, got None"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    wrong_shape = copy.deepcopy(optimizer.state_dict())
    wrong_shape["state"][0]["average"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"average: expected the shape of its parameter, \(5, 4\), got \(1,\)"):
        optimizer.load_state_dict(wrong_shape)
    assert_equal(snapshot(model, optimizer), before)
    assert counters(optimizer) == numbers


# Evaluating.


@pytest.mark.parametrize("round_trips", [1, 7])
def test_evaluating_never_changes_training(make: Callable[..., EntropySGD], kind: dict[str, Any], round_trips: int) -> None:
    dtype = kind.pop("dtype")
    (model, optimizer), (other, evaluated) = ((m := small_model(dtype), make(m.parameters(), **kind)) for _ in range(2))
    for step in range(2 * L + 1):
        walk(model, optimizer, range(step, step + 1))
        walk(other, evaluated, range(step, step + 1))
        for _ in range(round_trips):
            evaluated.eval()
            evaluated.eval()
            for p in other.parameters():
                assert torch.equal(p, evaluated.state[p]["anchor"].to(dtype))
            evaluated.train()
            evaluated.train()
        assert_equal(snapshot(other, evaluated), snapshot(model, optimizer))


def test_step_in_eval_mode_returns_to_train_mode_with_one_warning(make: Callable[..., EntropySGD]) -> None:
    (model, optimizer), (other, evaluated) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    walk(model, optimizer, range(2))
    walk(other, evaluated, range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (2, 3):
            backward(model, step)
            optimizer.step()
            evaluated.eval()
            evaluated.step(lambda step=step: backward(other, step))  # its gradients are taken at the live weights
    assert ["step() in eval mode" in str(warning.message) for warning in caught] == [True]
    assert caught[0].filename == __file__
    assert_equal(snapshot(other, evaluated), snapshot(model, optimizer))


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["consolidate_", "sync_lookahead"])
def test_consolidating_goes_on_from_the_anchor(
    make: Callable[..., EntropySGD], kind: dict[str, Any], name: str, in_eval: bool
) -> None:
    dtype = kind.pop("dtype")
    model = small_model(dtype)
    optimizer = make(model.parameters(), **kind)
    walk(model, optimizer, range(L + 2))
    anchors = [optimizer.state[p]["anchor"].clone() for p in model.parameters()]
    if in_eval:
        optimizer.eval()
    getattr(optimizer, name)()
    optimizer.train()
    for p, x in zip(model.parameters(), anchors, strict=True):
        state = optimizer.state[p]
        assert torch.equal(p, x.to(dtype))
        assert torch.equal(state["anchor"], x)
        assert torch.equal(state["average"], x)
        assert "master" not in state or torch.equal(state["master"], x)
        assert state.get("period_steps", 0) == 0
    assert optimizer.stats() == {"steps": L + 2, "period_steps": 0, "outer_steps": 1}
    assert optimizer.at_outer_boundary


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
def test_resetting_anchors_takes_the_weights_that_are_there(
    make: Callable[..., EntropySGD], kind: dict[str, Any], in_eval: bool
) -> None:
    dtype = kind.pop("dtype")
    model = small_model(dtype)
    optimizer = make(model.parameters(), **kind)
    walk(model, optimizer, range(L + 2))
    if in_eval:
        optimizer.eval()
    weights = {name: torch.full_like(t, 0.3) for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    optimizer.reset_anchors_()
    optimizer.train()
    for p in model.parameters():
        for role in ("anchor", "average", *(["master"] if "master_weights" in kind else [])):
            assert torch.equal(optimizer.state[p][role], p.detach().to(optimizer.state[p][role].dtype))
        assert torch.equal(p, torch.full_like(p, 0.3))
    assert optimizer.stats()["period_steps"] == 0


# Calling step().


def test_closure_is_evaluated_once_and_hooks_fire_once(make: Callable[..., EntropySGD]) -> None:
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


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_phantom_step_allocates_and_changes_nothing(make: Callable[..., EntropySGD], lr: Any) -> None:
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


def test_checkpoint_tool_allocates_the_state() -> None:
    """torch.distributed.checkpoint takes the phantom step itself."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = small_model()
    optimizer = METHODS["EntropySGD"](model.parameters())
    weights = copy.deepcopy(model.state_dict())
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == set(weights)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert (optimizer.stats()["steps"], optimizer.param_groups[0]["lr"]) == (0, 0.1)


def test_warm_up_step_with_lr_0_is_a_step(make: Callable[..., EntropySGD]) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    walk(model, optimizer, range(1))
    assert optimizer.stats()["steps"] == 1
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert optimizer.stats()["steps"] == 2, "zero gradients too are gradients, where there is state"


def test_no_gradient_no_step(make: Callable[..., EntropySGD]) -> None:
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


def test_parameter_without_gradient_takes_the_outer_step_only(make: Callable[..., EntropySGD]) -> None:
    model = small_model()
    optimizer = make(model.parameters(), momentum=0.0)
    walk(model, optimizer, range(L - 2))
    p, live = model[0].weight, model[0].weight.detach().clone()
    state = optimizer.state[p]
    x, m, v = (state[role].clone() for role in ("anchor", "average", "momentum"))
    for step in range(L - 2, L):
        assert torch.equal(p, live)
        backward(model, step)
        p.grad = None
        optimizer.step()
    assert torch.equal(state["momentum"], v)
    assert torch.equal(state["anchor"], x - torch.tensor(0.1) * (x - m))
    assert torch.equal(p, state["anchor"])
    assert torch.equal(p, state["average"])


@pytest.mark.parametrize("averaging", [0.75, "linear"])
def test_late_parameter_starts_at_itself(make: Callable[..., EntropySGD], averaging: Any) -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = make(model.parameters(), averaging=averaging)
    walk(model, optimizer, range(1))
    late = model[0].weight
    assert late not in optimizer.state
    start = late.detach().clone()
    late.requires_grad_(True)
    walk(model, optimizer, range(1, 2))
    state = optimizer.state[late]
    assert torch.equal(state["anchor"], start)
    assert not torch.equal(late, start)
    share = 1.0 if averaging == "linear" else 0.25
    torch.testing.assert_close(state["average"], start + share * (late.detach() - start))
    walk(model, optimizer, range(2, L))
    assert not torch.equal(state["anchor"], start)
    assert torch.equal(late, state["anchor"])


def test_linear_average_counts_each_parameter_for_itself(make: Callable[..., EntropySGD]) -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = make([p, q], averaging="linear", inner_steps=5)
    seen: dict[Tensor, list[Tensor]] = {p: [], q: []}
    for step in range(4):
        p.grad, q.grad = torch.ones(3), torch.ones(3) if step % 2 else None
        optimizer.step()
        for t in (p, q):
            if t.grad is not None:
                seen[t].append(t.detach().clone())
    for t in (p, q):
        torch.testing.assert_close(optimizer.state[t]["average"], torch.stack(seen[t]).mean(0))


def test_group_added_in_training_joins_the_counter(make: Callable[..., EntropySGD]) -> None:
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


def test_replaced_storage_is_picked_up(make: Callable[..., EntropySGD]) -> None:
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


def test_nothing_outlives_its_use(make: Callable[..., EntropySGD]) -> None:
    p = nn.Parameter(torch.ones(64))
    optimizer = make([p])
    for _ in range(L + 1):
        p.grad = torch.ones(64)
        gradient = weakref.ref(p.grad)
        optimizer.step()
        p.grad = None
        assert gradient() is None
    anchor = weakref.ref(optimizer.state[p]["anchor"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert anchor() is None, "tensors of the replaced state are not kept by a cache"

    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make([p, q], inner_steps=10)
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    anchor = weakref.ref(optimizer.state[p]["anchor"])
    optimizer.state[p]["anchor"] = optimizer.state[p]["anchor"].clone()
    p.grad = None
    optimizer.step()
    assert anchor() is None, "a plan that a step does not use is dropped"


@pytest.mark.parametrize("backend", backends.available("cpu"))
def test_version_counters_see_the_step(make: Callable[..., EntropySGD], backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = make([p], backend=backend)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shapes_layouts_and_names(make: Callable[..., EntropySGD]) -> None:
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


def test_tensor_lr_is_its_number(make: Callable[..., EntropySGD]) -> None:
    (model, optimizer), (other, tensor_lr) = (
        (m := small_model(), make(m.parameters(), lr=lr)) for lr in (0.25, torch.tensor(0.25))
    )
    walk(model, optimizer, range(L + 1))
    walk(other, tensor_lr, range(L + 1))
    assert_equal(snapshot(other, tensor_lr), snapshot(model, optimizer))
    assert torch.is_tensor(tensor_lr.param_groups[0]["lr"])


def test_schedulers_change_the_outer_step_only(make: Callable[..., EntropySGD]) -> None:
    (model, optimizer), (other, scheduled) = ((m := small_model(), make(m.parameters(), lr=0.4)) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.5)
    inner_lr, gamma = (scheduled.param_groups[0][name] for name in ("inner_lr", "gamma"))
    for step in range(L):
        before = snapshot(model, optimizer)
        assert_equal(snapshot(other, scheduled), before)
        walk(model, optimizer, range(step, step + 1))
        walk(other, scheduled, range(step, step + 1))
        if step < L - 1:
            scheduler.step()
            assert scheduled.param_groups[0]["gamma"] == gamma
    assert scheduled.param_groups[0]["lr"] == 0.1
    assert scheduled.param_groups[0]["inner_lr"] == inner_lr
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        x = before[next(name for name, t in model.named_parameters() if t is p) + " anchor"]
        torch.testing.assert_close(q - x, (p - x) * (0.1 / 0.4), rtol=1e-3, atol=1e-6)


def test_useless_lr_is_said_once() -> None:
    ps = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.warns(UserWarning, match="lr=5e-05 hardly moves the anchor") as caught:
        EntropySGD([{"params": [p]} for p in ps], lr=5e-5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EntropySGD(ps, lr=0.01)


# Which backend, and what is refused.


def test_explain_and_stats(make: Callable[..., EntropySGD], monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert optimizer.stats() == {"steps": step, "period_steps": step % L, "outer_steps": step // L}
        assert optimizer.at_outer_boundary == (step % L == 0)


def test_fused_refuses_eager_at_the_step(make: Callable[..., EntropySGD], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    model = small_model()
    before = snapshot(model, optimizer := make(model.parameters(), fused=True))
    with pytest.raises(RuntimeError, match=r"^fused: True refuses the eager backend"):
        walk(model, optimizer, range(1))
    assert_equal(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
        ("foreach", "yes"),
    ],
)
def test_bad_options_are_refused_by_name(make: Callable[..., EntropySGD], name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        make([nn.Parameter(torch.ones(3))], **{name: value})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gamma_total": 5.0}, "gamma_min"),
        ({"gamma_total": 5.0, "gamma_min": 5.0}, "gamma_min"),
        ({"master_weights": True, "rounding": "stochastic"}, "master_weights"),
        ({"foreach": True, "fused": True}, "foreach, fused"),
        ({"fused": True, "backend": "eager"}, "fused"),
    ],
)
def test_contradicting_options_are_refused(make: Callable[..., EntropySGD], options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        make([nn.Parameter(torch.ones(3))], **options)


def test_groups_share_one_counter(make: Callable[..., EntropySGD]) -> None:
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    with pytest.raises(ValueError, match=r"^inner_steps: expected the same inner_steps in all groups, got 7 in group 1 and 3"):
        make([{"params": [p]}, {"params": [q], "inner_steps": 7}])
    optimizer = make([{"params": [p]}, {"params": [q]}])
    with pytest.raises(ValueError, match=r"^seed: "):
        optimizer.add_param_group({"params": [r], "seed": 1})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1]["inner_steps"] = 7
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"^inner_steps: "):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_tensors_that_cannot_be_served_are_refused_by_name(make: Callable[..., EntropySGD]) -> None:
    good, complex_ = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    half, gappy = nn.Parameter(torch.ones(2, dtype=torch.float16)), nn.Parameter(torch.ones(4)[::2])
    complex_grad = torch.ones(2, dtype=torch.complex64)
    sparse_grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (3,), check_invariants=True)
    cases: list[tuple[nn.Parameter, Tensor, dict[str, Any], str]] = [
        (complex_, complex_grad, {}, r"^params\[1\] odd \(shape \(2,\), torch.complex64\): expected a real"),
        (good, sparse_grad, {}, r"^params\[1\] odd .*expected a strided gradient"),
        (half, torch.ones(2, dtype=torch.float16), {"rounding": "stochastic"}, r"^params\[1\] odd .*bfloat16"),
        (gappy, torch.ones(2), {}, "expected a dense tensor"),
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


def test_ranks_of_a_process_group_need_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"^seed: pass seed=, the same on all data-parallel ranks"):
        EntropySGD([p])
    EntropySGD([p], seed=1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    EntropySGD([p])
