"""SGD with an average of its weights: SGD's very steps, and an average that is seen and saved but never felt."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optim_runs import backward, small_model
from torch import Tensor, nn
from torch.optim import SGD

from deeprelax_cuda.train.averaged_sgd import AveragedSGD

OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.0, "nesterov": False},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": False, "dampening": 0.1, "weight_decay": 1e-2, "maximize": True},
    {"momentum": 0.9, "foreach": True},
    {"momentum": 0.9, "nesterov": True, "fused": True},
]
NESTEROV = OPTIONS[1]
Run = tuple[nn.Module, Any]


def run(dtype: torch.dtype = torch.float32, kind: type = AveragedSGD, **options: Any) -> Run:
    model = small_model(dtype)
    return model, kind(model.parameters(), lr=0.1, **{**NESTEROV, **options})


def steps(run: Run, numbers: range, evaluate: bool = False) -> None:
    model, optimizer = run
    for number in numbers:
        backward(model, number)
        optimizer.step()
        if evaluate:
            optimizer.eval()
            optimizer.eval()
            optimizer.train()
            optimizer.train()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def averages(run: Run) -> list[Tensor]:
    return [run[1].state[p]["ema"].clone() for p in run[0].parameters()]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_of_sgd(options: dict[str, Any], dtype: torch.dtype) -> None:
    plain, averaged = run(dtype, SGD, **options), run(dtype, **options)
    for number in range(12):
        steps(plain, range(number, number + 1))
        steps(averaged, range(number, number + 1), evaluate=number % 3 == 0)
        assert_same(weights(averaged[0]), weights(plain[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ema_decay", [0.0, 0.4, 0.99])
def test_average_from_its_definition(ema_decay: float, dtype: torch.dtype) -> None:
    averaged = run(dtype, ema_decay=ema_decay)
    want = [p.double() for p in weights(averaged[0])]
    for t in range(1, 15):
        steps(averaged, range(t, t + 1))
        d = min(ema_decay, (1 + t) / (10 + t))
        want = [d * ema + (1 - d) * p.double() for ema, p in zip(want, weights(averaged[0]), strict=True)]
    for ema, exact in zip(averages(averaged), want, strict=True):
        assert ema.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ema.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_shows_the_average_and_train_brings_the_weights_back(dtype: torch.dtype) -> None:
    model, optimizer = averaged = run(dtype)
    optimizer.eval()  # before the first step there is nothing to show
    steps(averaged, range(5))
    live, emas = weights(model), averages(averaged)
    places = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        optimizer.eval()
        assert_same(weights(model), [ema.to(dtype) for ema in emas])
    for _ in range(2):
        optimizer.train()
        assert_same(weights(model), live)
    assert_same(averages(averaged), emas)
    assert places == [p.data_ptr() for p in model.parameters()]
    assert not any(torch.equal(ema, p) for ema, p in zip(emas, live, strict=True))


def test_step_in_eval_mode_returns_to_the_live_weights() -> None:
    plain, averaged = run(), run()
    steps(plain, range(4))
    steps(averaged, range(3))
    backward(averaged[0], 3)
    averaged[1].eval()
    with pytest.warns(UserWarning, match="step\\(\\) in eval mode"):
        averaged[1].step()
    assert_same(weights(averaged[0]), weights(plain[0]))
    assert_same(averages(averaged), averages(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_eval", [False, True])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_resumed_run_has_the_same_bits(position: int, in_eval: bool, dtype: torch.dtype) -> None:
    straight, stopped, resumed = (run(dtype) for _ in range(3))
    steps(straight, range(15))
    steps(stopped, range(position))
    if in_eval:
        stopped[1].eval()
    saved = through_a_file([stopped[0].state_dict(), stopped[1].state_dict()])
    for target, state in zip(resumed, saved, strict=True):
        target.load_state_dict(state)
    resumed[1].train()
    steps(resumed, range(position, 15))
    assert_same(weights(resumed[0]), weights(straight[0]))
    assert_same(averages(resumed), averages(straight))


def test_state_dict_is_not_changed_by_train_and_eval() -> None:
    _, optimizer = averaged = run()
    steps(averaged, range(2))
    of_training = optimizer.state_dict()
    optimizer.eval()
    of_eval = optimizer.state_dict()
    optimizer.train()
    assert not any("live" in state for state in of_training["state"].values())
    assert all("live" in state for state in of_eval["state"].values())


def test_copy_goes_on_by_itself() -> None:
    straight, averaged = run(), run()
    steps(straight, range(6))
    steps(averaged, range(3))
    other: Run = copy.deepcopy(averaged)
    steps(other, range(3, 6))
    assert_same(averages(other), averages(straight))


def test_parameter_without_a_gradient_is_averaged_too() -> None:
    p, frozen = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AveragedSGD([p, frozen], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(optimizer.state[frozen]["ema"], torch.ones(3))
    optimizer.eval()
    assert torch.equal(frozen, torch.ones(3))
    assert not torch.equal(p, torch.ones(3))


def test_groups_have_their_own_decay() -> None:
    p, q, late = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = AveragedSGD([{"params": [p], "ema_decay": 0.0}, {"params": [q]}], lr=1.0, ema_decay=0.1)
    for t in range(2):
        for r in (p, q):
            r.grad = -torch.ones(1)
        optimizer.step()
        if t == 0:
            optimizer.add_param_group({"params": [late]})
    assert optimizer.state[p]["ema"].item() == 2.0
    assert optimizer.state[q]["ema"].item() == pytest.approx(0.1 * 0.9 + 0.9 * 2.0)
    assert [group["ema_steps"] for group in optimizer.param_groups] == [2, 2, 1]


def test_closure_and_hooks_run_once() -> None:
    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch puts the hooks into a class's step when the first one is made
    averaged, other = run(), run()
    steps(other, range(1))
    calls = []
    averaged[1].register_step_pre_hook(lambda *_: calls.append("before"))
    averaged[1].register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append("closure")
        return backward(averaged[0], 0)

    assert averaged[1].step(closure).item() > 0.0
    assert calls == ["before", "closure", "after"]
    assert_same(weights(averaged[0]), weights(other[0]))


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan"), "0.9"])
def test_refused_decay(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"ema_decay: expected a number in \[0, 1\), got"):
        AveragedSGD([nn.Parameter(torch.zeros(1))], lr=0.1, ema_decay=bad)
    optimizer = AveragedSGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"ema_decay: expected a number in \[0, 1\), got"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "ema_decay": bad})
