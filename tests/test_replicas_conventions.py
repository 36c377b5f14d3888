"""What optimizers owe to a training loop, where there are several replicas: states, the two sets of weights, parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from described import read
from replica_runs import DTYPES, L, Mixed, differences, make, numbers, snapshot, walk
from torch import Tensor, nn

import deeprelax_cuda as dr

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:rho=")]

Models = dict[int, Mixed]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masters": {"master_weights": True},
    "stochastic": {"rounding": "stochastic"},
}
over_methods = pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
over_options = pytest.mark.parametrize(
    "options", ["masters", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "stochastic"))]
)


def build(method: str, options: str = "masters", seed: int = 11, count: int = 2) -> tuple[Models, Any]:
    """Return replicas with parameters of three types and four layouts, and their optimizer."""
    models = {replica: Mixed(DTYPES["mixed"]) for replica in range(count)}
    return models, make(method, list(models.values()), **OPTIONS[options], seed=seed)


def facts(models: Models, optimizer: Any) -> dict[str, Any]:
    return {
        f"{replica}: {name}": value
        for replica, model in models.items()
        for name, value in {**snapshot(model, optimizer), **numbers(optimizer, replica)}.items()
    }


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def answer_role(method: str) -> str:
    return "consensus" if method == "Parle" else "anchor"


# States.


@over_methods
@over_options
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_run_resumes_bit_for_bit_at_every_position(method: str, options: str, mode: str) -> None:
    models, optimizer = build(method, options)
    whole, undisturbed = build(method, options)
    walk(whole, undisturbed, range(3 * L + 1))
    for position in range(2 * L + 2):
        getattr(optimizer, mode)()
        saved = through_a_file([[model.state_dict() for model in models.values()], optimizer.state_dict()])
        as_it_was = facts(models, optimizer)
        others, resumed = build(method, options, seed=99)
        walk(others, resumed, range(50, 50 + position % 3))
        for model, weights in zip(others.values(), saved[0], strict=True):
            model.load_state_dict(weights)
        resumed.load_state_dict(saved[1])
        assert differences(facts(others, resumed), as_it_was) == [], position
        resumed.train()
        walk(others, resumed, range(position, 3 * L + 1))
        assert differences(facts(others, resumed), facts(whole, undisturbed)) == [], position
        optimizer.train()
        walk(models, optimizer, range(position, position + 1))


@over_methods
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_go_their_own_way(method: str, copier: Callable[[Any], Any]) -> None:
    models, optimizer = build(method)
    walk(models, optimizer, range(L + 1))
    before = facts(models, optimizer)
    others, copied = copier((models, optimizer))
    walk(others, copied, range(L + 1, 3 * L))
    assert differences(facts(models, optimizer), before) == []
    walk(models, optimizer, range(L + 1, 3 * L))
    assert differences(facts(others, copied), facts(models, optimizer)) == []


# The two sets of weights.


@over_methods
@over_options
def test_evaluating_shows_the_consensus_everywhere_and_never_changes_training(method: str, options: str) -> None:
    models, optimizer = build(method, options)
    others, evaluated = build(method, options)
    for step in range(2 * L + 1):
        walk(models, optimizer, range(step, step + 1))
        walk(others, evaluated, range(step, step + 1))
        for _ in range(1 + step % 2):
            evaluated.eval()
            evaluated.eval()
            for p, q in zip(*(model.weights for model in others.values()), strict=True):
                shown = evaluated.state[p][answer_role(method)]
                assert torch.equal(p, shown.to(p.dtype))
                exchanged = method == "ElasticSGD" or step >= L - 1
                assert torch.equal(p, q) or not exchanged
            evaluated.train()
            evaluated.train()
        assert differences(facts(others, evaluated), facts(models, optimizer)) == []
    assert not torch.equal(models[0].weights[0], models[1].weights[0])


def test_until_the_first_exchange_the_answer_is_where_each_replica_began() -> None:
    models, optimizer = build("Parle")
    with torch.no_grad():
        models[1].weights[0].add_(1.0)
    began = {replica: model.weights[0].detach().clone() for replica, model in models.items()}
    walk(models, optimizer, range(L - 1))
    optimizer.eval()
    for replica, model in models.items():
        assert torch.equal(model.weights[0], began[replica])


def test_until_its_first_exchange_the_answer_of_a_late_parameter_is_where_it_began() -> None:
    models, optimizer = build("Parle")
    start = models[0].weights[1].detach().clone()
    for step in range(L + 1):
        for replica, model in models.items():
            model.backward(replica, step)
            model.weights[1].grad = model.weights[1].grad if step == L else None
        optimizer.step()
    assert not any(torch.equal(model.weights[1], start) for model in models.values())
    optimizer.eval()
    assert all(torch.equal(model.weights[1], start) for model in models.values())


@over_methods
@over_options
@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
def test_consolidating_goes_on_from_the_consensus(method: str, options: str, in_eval: bool) -> None:
    models, optimizer = build(method, options)
    walk(models, optimizer, range(L + 2))
    before = facts(models, optimizer)
    if in_eval:
        optimizer.eval()
    optimizer.consolidate_()
    optimizer.train()
    for replica, model in models.items():
        for i, p in enumerate(model.weights):
            c = before[f"{replica}: {i} {answer_role(method)}"]
            assert torch.equal(p, c.to(p.dtype))
            state = optimizer.state[p]
            for role, value in state.items():
                unchanged = before[f"{replica}: {i} {role}"] if "momentum" in role else c
                assert torch.equal(value, unchanged), role
    assert optimizer.stats()["period_steps"] == 0
    walk(models, optimizer, range(L + 2, 3 * L))


@over_methods
@over_options
@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
def test_resetting_anchors_takes_the_weights_of_each_replica(method: str, options: str, in_eval: bool) -> None:
    models, optimizer = build(method, options)
    walk(models, optimizer, range(L + 2))
    if in_eval:
        optimizer.eval()
    with torch.no_grad():
        for replica, model in models.items():
            for p in model.weights:
                p.fill_(0.3 + replica)
    optimizer.reset_anchors_()
    optimizer.train()
    for replica, model in models.items():
        for p in model.weights:
            assert torch.equal(p, torch.full_like(p, 0.3 + replica))
            for role, value in optimizer.state[p].items():
                assert "momentum" in role or torch.equal(value, p.detach().to(value.dtype)), role
    assert optimizer.stats()["period_steps"] == 0


def test_describe_says_whose_mean_the_parameters_hold() -> None:
    models, optimizer = build("Parle")
    walk(models, optimizer, range(L + 1))
    lines, _ = read(optimizer.describe())
    assert lines["mode"] == ("train", "the parameters hold the live weights y; eval() shows the consensus c of the replicas")
    optimizer.eval()
    lines, _ = read(optimizer.describe())
    shown = "the parameters hold the consensus c of the replicas; train() brings the live weights y back"
    assert lines["mode"] == ("eval", shown)


# Parameters that come late, go, or are somebody else's.


def grown(method: str, late: int, at: int) -> dict[int, list[nn.Parameter]]:
    """Two replicas of three parameters, of which that of number ``late`` is added after ``at`` steps."""
    replicas = {replica: [nn.Parameter(torch.full((4,), float(i))) for i in range(3)] for replica in range(2)}
    groups = [[{"params": [p for i, p in enumerate(own) if i != late], "lr": 0.2}] for own in replicas.values()]
    settings = {"inner_steps": L} if method == "Parle" else {}
    optimizer = getattr(dr, method)(replicas=groups, temperature=1e-2, seed=3, **settings)
    for step in range(2 * L + 1):
        if step == at:
            for replica in (1, 0):
                optimizer.add_param_group({"params": [replicas[replica][late]], "replica": replica, "lr": 0.2})
        for replica, own in replicas.items():
            for i, p in enumerate(own):
                p.grad = torch.full_like(p, 1.0 + replica - i)
        optimizer.step()
        if step == at:
            stepped = [replicas[replica][late] for replica in range(2)]
            assert not any(torch.equal(p, torch.full((4,), float(late))) for p in stepped)
    return replicas


@over_methods
@pytest.mark.parametrize("at", range(L + 1))
def test_groups_of_all_replicas_may_be_added_in_mid_training(method: str, at: int) -> None:
    """In any order of the replicas; that it is numbered as the last of its replica shows in its noise."""
    later, early = grown(method, 2, at), grown(method, 2, 0)
    for replica in range(2):
        assert all(map(torch.equal, later[replica][:2], early[replica][:2]))
        assert torch.equal(later[replica][2], early[replica][2]) == (at == 0)


@over_methods
def test_a_group_says_whose_it_is(method: str) -> None:
    p = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = getattr(dr, method)(replicas=[[p[0]], [p[1]]], seed=0)
    for wrong in ({}, {"replica": 2}, {"replica": -1}, {"replica": None}):
        with pytest.raises(ValueError, match=r"^replica: expected the number of a replica in this process, 0, 1, got "):
            optimizer.add_param_group({"params": [p[2]], **wrong})
    assert len(optimizer.param_groups) == 2
    alone = getattr(dr, method)(replicas=[[p[3]]], seed=0)
    alone.add_param_group({"params": [p[4]]})
    assert [group["replica"] for group in alone.param_groups] == [0, 0]


@over_methods
def test_a_parameter_that_one_replica_alone_has_is_refused_at_the_exchange(method: str) -> None:
    models, optimizer = build(method)
    walk(models, optimizer, range(L - 1 if method == "Parle" else 1))
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "replica": 1})
    extra.grad = torch.ones(3)
    before = facts(models, optimizer)
    for replica, model in models.items():
        model.backward(replica, L - 1)
    with pytest.raises(RuntimeError, match=r"^replicas: other parameters on replica 1 than on replica 0: "):
        optimizer.step()
    assert [name for name in differences(facts(models, optimizer), before) if not name.endswith(" params")] == []
    assert torch.equal(extra, torch.ones(3))


@over_methods
def test_parameters_that_are_unfrozen_late_and_frozen_again(method: str) -> None:
    """The frozen one stays, but for outer steps once it has been stepped, and those beside it do not notice."""
    (models, optimizer), (others, reference) = build(method), build(method)
    start = models[0].weights[1].detach().clone()
    for step in range(4 * L):
        for replica in models:
            models[replica].backward(replica, step)
            others[replica].backward(replica, step)
            if not L + 1 <= step < 2 * L + 1:
                models[replica].weights[1].grad = None
        optimizer.step()
        reference.step()
        late = [model.weights[1] for model in models.values()]
        if step <= L:
            assert all(torch.equal(p, start) and not optimizer.state.get(p) for p in late)
        elif step < 2 * L + 1:
            assert not any(torch.equal(p, start) for p in late)
        for model, other in zip(models.values(), others.values(), strict=True):
            for i in (0, 2, 3, 4, 5):
                assert torch.equal(model.weights[i], other.weights[i]), i
    optimizer.eval()
    assert torch.equal(*(model.weights[1] for model in models.values()))


@over_methods
def test_a_replica_without_gradients_takes_no_inner_step_and_the_exchange_all_the_same(method: str) -> None:
    models, optimizer = build(method)
    walk(models, optimizer, range(L))
    live: list[Tensor] = []
    for step in range(L, 2 * L - 1):
        for replica, model in models.items():
            model.backward(replica, step)
        for p in models[1].weights:
            p.grad = None
        live = [p.detach().clone() for p in models[1].weights]
        optimizer.step()
        assert all(map(torch.equal, models[1].weights, live))
    role, one, two = answer_role(method), models[0].weights[2], models[1].weights[2]
    before = optimizer.state[one][role].clone()
    walk({0: models[0]}, optimizer, range(2 * L - 1, 2 * L))
    assert torch.equal(optimizer.state[one][role], optimizer.state[two][role])
    assert not torch.equal(optimizer.state[one][role], before)


@over_methods
def test_replicas_are_given_as_parameters_are(method: str) -> None:
    """As generators, with names, or as groups with options of their own."""
    models = [Mixed(DTYPES["float32"]) for _ in range(6)]
    kind = getattr(dr, method)
    plain = kind(replicas=[model.parameters() for model in models[:2]], lr=0.05, temperature=0.1, seed=0)
    named = kind(replicas=[model.named_parameters() for model in models[2:4]], lr=0.05, temperature=0.1, seed=0)
    split = [[{"params": [*model.weights[:2]]}, {"params": [*model.weights[2:]], "lr": 0.05}] for model in models[4:]]
    grouped = kind(replicas=split, lr=0.05, temperature=0.1, seed=0)
    assert [group["replica"] for group in grouped.param_groups] == [0, 0, 1, 1]
    assert named.param_groups[1]["param_names"] == [f"weights.{i}" for i in range(6)]
    for optimizer, own in ((plain, models[:2]), (named, models[2:4]), (grouped, models[4:])):
        walk(dict(enumerate(own)), optimizer, range(3))
        for model, first in zip(own, models[:2], strict=True):
            assert all(map(torch.equal, model.weights, first.weights))
