"""What an optimizer's step must notice between two calls, and what must not trouble it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_runs import METHODS, L, Method, assert_equal, backward, small_model, snapshot, those, walk
from torch import nn

from deeprelax_cuda.optim import SGLD, HamiltonJacobi

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def test_gradient_that_is_still_on_its_way_is_waited_for(make: Method) -> None:
    """The result of a functional collective is a wrapper: its own address is 0."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        p, q = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(1000))
        optimizer, reference = make([p]), make([q])
        for step in range(L):
            g = torch.full((1000,), float(step))
            p.grad = distributed._functional_collectives.all_reduce(g, "sum", distributed.group.WORLD)
            assert p.grad.data_ptr() == 0
            q.grad = g
            optimizer.step()
            reference.step()
            assert torch.equal(p, q)
    finally:
        distributed.destroy_process_group()


@those(lambda method: method.has_anchor)
@pytest.mark.parametrize("numel", [3, 5000])
def test_state_whose_memory_was_exchanged(make: Method, numel: int) -> None:
    """By ``.data =``, as people move state to another device; nobody else's memory is written, whichever it was."""
    p, q = nn.Parameter(torch.ones(numel)), nn.Parameter(torch.ones(9000))
    other, another = nn.Parameter(torch.ones(numel)), nn.Parameter(torch.ones(9000))
    long = make.of({"inner_steps": 100})
    optimizer, reference = make([p, q], **long), make([other, another], **long)
    for _ in range(4):
        for parameter in (p, q, other, another):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        reference.step()
        for role, value in optimizer.state[p].items():
            value.data = value.data.clone()
            strangers = [torch.full((numel,), 7.0) for _ in range(20)]  # one of them lies where the state did
            optimizer.step()
            reference.step()
            assert all(bool((stranger == 7.0).all()) for stranger in strangers), role
    assert torch.equal(q, another)
    if numel > 1024:
        assert_equal_states(optimizer.state[p], reference.state[other])


def assert_equal_states(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[role], want[role]) for role in want)


def test_what_nobody_trains_does_not_trouble_the_step(make: Method) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    odd = [
        nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
        nn.Parameter(torch.ones(3, device="meta")),
        nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        nn.UninitializedParameter(),
    ]
    optimizer, reference = make([p, *odd]), make([q])
    optimizer.state["mine"] = 5
    optimizer.state["yours"] = {"a": torch.ones(2)}
    for _ in range(2 * L):
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
        reference.step()
        assert torch.equal(p, q)
    torch.utils.swap_tensors(odd[2], nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False))
    for _ in range(L):
        p.grad, q.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
        reference.step()
        assert torch.equal(p, q)


SPOILT: list[tuple[str, Any]] = [("scoping", None), ("scoping", -1.0), ("gamma_min", "x"), ("seed", -1), ("seed", "x")]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(method, name, value) for method in METHODS for name, value in SPOILT if name in METHODS[method].options],
    indirect=["make"],
)
def test_rule_that_was_spoilt_by_hand_is_refused_before_anything_moves(make: Method, name: str, value: Any) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    walk(model, optimizer, range(L - 1))
    backward(model, L - 1)
    before = snapshot(model, optimizer)
    was, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        optimizer.step()
    assert_equal(snapshot(model, optimizer), before)
    assert optimizer.stats() == make.stats(L - 1)
    optimizer.param_groups[0][name] = was
    other = small_model()
    reference = make(other.parameters())
    walk(other, reference, range(L))
    optimizer.step()
    assert_equal(snapshot(model, optimizer), snapshot(other, reference))


#: A value that does something, of each option that some methods have not.
PRESENT = {
    "inner_steps": 2,
    "scoping": 0.1,
    "gamma_min": 0.1,
    "gamma_total": 3.0,
    "momentum": 0.9,
    "nesterov": True,
    "outer_weight_decay": 0.1,
    "closure_mode": "inner_loop",
    "gamma": 2.0,
}
BY_HAND = [
    *((method, name, PRESENT[name]) for method, made in METHODS.items() for name in made.kind.WITHOUT),
    *((method, name, value) for method, made in METHODS.items() for name, value in made.refuses),
    ("HamiltonJacobi", "averaging", 1.0),
    ("HamiltonJacobi", "averaging", "mean"),
    ("HamiltonJacobi prox", "averaging", "linear"),
    ("HeatSGD", "temperature", -1.0),
    ("SGLD", "temperature", -1.0),
    ("SGLD", "lr", -1.0),
]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("make", "name", "value"), BY_HAND, indirect=["make"])
def test_what_the_constructor_refuses_is_refused_by_hand_too(make: Method, name: str, value: Any, backend: str) -> None:
    model = small_model()
    optimizer = make(model.parameters(), backend=backend)
    walk(model, optimizer, range(L - 1))
    backward(model, L - 1)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"^{name}: "):
        optimizer.step()
    assert_equal(snapshot(model, optimizer), before)


def test_an_anchor_is_made_anew_when_it_is_asked_for_again() -> None:
    for master_weights in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 9).bfloat16())
        optimizer = SGLD([p], lr=0.1, temperature=1e-3, gamma=2.0, seed=1, master_weights=master_weights)
        for step, gamma in enumerate((2.0, math.inf, math.inf, 2.0)):
            optimizer.param_groups[0]["gamma"] = gamma
            y = optimizer.state[p].get("master", p.detach().float()).clone()
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert ("anchor" in optimizer.state[p]) == (gamma == 2.0)
            if step == 3:
                assert torch.equal(optimizer.state[p]["anchor"], y), "where y was, and the master where there is one"


def test_a_count_does_not_outlive_the_average_that_it_is_of() -> None:
    """A proximal period between two by the fixed point: the second begins like a first one."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer, reference = (HamiltonJacobi([t], inner_steps=L, seed=0, momentum=0.0) for t in (p, q))

    def take(optimizer: HamiltonJacobi, t: nn.Parameter, steps: int) -> None:
        for _ in range(steps):
            t.grad = t.detach().clone()
            optimizer.step()

    take(optimizer, p, L - 1)
    optimizer.param_groups[0]["inner"] = "prox"
    take(optimizer, p, 1)
    optimizer.param_groups[0]["inner"] = "fixed_point"
    with torch.no_grad():
        q.copy_(p)
    take(optimizer, p, 2)
    take(reference, q, 2)
    assert torch.equal(p, q)


@those(lambda method: method.has_periods)
def test_closure_that_leaves_eval_mode_behind(make: Method) -> None:
    (model, optimizer), (other, shown) = ((m := small_model(), make(m.parameters())) for _ in range(2))
    for step in range(L + 1):
        walk(model, optimizer, range(step, step + 1))

        def closure(step: int = step) -> torch.Tensor:
            loss = backward(other, step)
            shown.eval()
            return loss

        shown.step(closure)
        assert_equal(snapshot(other, shown), snapshot(model, optimizer))


def test_backend_that_the_environment_names_later(make: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = make([p])
    p.grad = torch.ones(4)
    optimizer.step()
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    optimizer.step()
    assert type(optimizer._launches._calls[0].plan).__module__.endswith("eager")
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eeger")
    with pytest.raises(ValueError, match="DEEPRELAX_BACKEND=eeger"):
        optimizer.step()


def test_parameter_put_into_a_group_of_named_ones_by_hand(make: Method) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = make([("first", p)])
    optimizer.param_groups[0]["params"].append(q)
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    assert bool(optimizer.state[q]) == make.has_anchor
    q.grad = torch.ones(4, dtype=torch.float64).to(torch.float32).to_sparse()
    with pytest.raises(ValueError, match=r"^grads\[1\]"):
        optimizer.step()
