"""The exchange of replicas: every element is added up once, in the order of the replicas, wherever the slices are cut."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from replica_runs import DTYPES, L, Mixed, differences, make, numbers, snapshot, walk
from torch import Tensor

import deeprelax_cuda as dr
from deeprelax_cuda.replicas.groups import Facts, InProcess
from deeprelax_cuda.replicas.layout import Buffer, Layout, add_, divide_

CPU = torch.device("cpu")
FACTS = Facts(steps=4, seed=1, inner_steps=5, parameters=0)
KINDS = st.tuples(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from([torch.float32, torch.float32, torch.float64]),
)


def drawn(kinds: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape, dtype in kinds]


def filled(layout: Layout, tensors: list[Tensor]) -> Buffer:
    buffer = Buffer(layout, CPU)
    buffer.fill(tensors)
    return buffer


def by_slices(lists: list[list[Tensor]], slices: int) -> list[Tensor]:
    """The mean as ranks compute it: each adds up one slice."""
    layout = Layout(lists[0], slices)
    buffers = [filled(layout, tensors).bytes for tensors in lists]
    whole = Buffer(layout, CPU).bytes
    for begin in range(0, layout.bytes, layout.slice_bytes or 1):
        piece = slice(begin, begin + layout.slice_bytes)
        own = whole[piece].copy_(buffers[0][piece])
        for buffer in buffers[1:]:
            add_(layout.parts(own, begin), layout.parts(buffer[piece], begin))
        divide_(layout.parts(own, begin), len(lists))
    return layout.views(whole)


@settings(max_examples=150, deadline=None)
@given(kinds=st.lists(KINDS, min_size=1, max_size=6), slices=st.integers(1, 7))
def test_slices_hold_every_element_once(kinds: list[tuple[tuple[int, ...], torch.dtype]], slices: int) -> None:
    count = sum(math.prod(shape) for shape, _ in kinds)
    marks = iter(range(1, count + 1))
    tensors = [
        torch.tensor([next(marks) for _ in range(math.prod(shape))], dtype=dtype).reshape(shape) for shape, dtype in kinds
    ]
    layout = Layout(tensors, slices)
    buffer = filled(layout, tensors)
    found: list[float] = []
    for j in range(slices):
        begin = j * layout.slice_bytes
        for part in layout.parts(buffer.bytes[begin : begin + layout.slice_bytes], begin):
            found += part.tolist()
    assert sorted(value for value in found if value) == list(range(1, count + 1))
    assert len(found) - count < 2 * slices + 1, "more than the padding"
    assert all(torch.equal(a, b) for a, b in zip(buffer.tensors, tensors, strict=True))


@settings(max_examples=100, deadline=None)
@given(kinds=st.lists(KINDS, min_size=1, max_size=5), count=st.integers(1, 5), slices=st.integers(1, 6))
def test_the_mean_is_the_ordered_sum_times_the_reciprocal(
    kinds: list[tuple[tuple[int, ...], torch.dtype]], count: int, slices: int
) -> None:
    lists = [drawn(kinds, replica) for replica in range(count)]
    together = InProcess(count).mean(lists, [FACTS] * count)
    cut = by_slices(lists, slices)
    for i, (_, dtype) in enumerate(kinds):
        kind = np.float64 if dtype == torch.float64 else np.float32
        total = lists[0][i].numpy()
        for tensors in lists[1:]:
            total = (total + tensors[i].numpy()).astype(kind)
        want = (total * kind(1.0 / count)).astype(kind)
        assert np.array_equal(together[i].numpy(), want)
        assert np.array_equal(cut[i].numpy(), want)


def test_the_order_of_replicas_counts() -> None:
    lists = [drawn([((1000,), torch.float32)], seed) for seed in range(3)]
    first, last = (InProcess(3).mean(order, [FACTS] * 3)[0].clone() for order in (lists, lists[::-1]))
    assert not torch.equal(first, last)
    assert torch.allclose(first, last, atol=1e-6)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_numbers_that_are_not_finite_are_seen_wherever_they_are(spoilt: float, dtype: torch.dtype) -> None:
    tensors = drawn([((7,), torch.float64), ((9,), torch.float32)], 0)
    buffer = Buffer(Layout(tensors, 3), CPU)
    assert buffer.fill(tensors)
    t = next(t for t in tensors if t.dtype == dtype)
    for i in range(len(t)):
        kept = t[i].clone()
        t[i] = spoilt
        assert not buffer.fill(tensors)
        t[i] = kept
    assert buffer.fill(tensors)


@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
def test_a_replica_in_one_process_that_leaves_the_finite_numbers_is_named(method: str) -> None:
    """Then none has moved; the same step with another gradient goes on as if nothing had been."""
    models = {replica: Mixed(DTYPES["mixed"]) for replica in range(3)}
    others = {replica: Mixed(DTYPES["mixed"]) for replica in range(3)}
    optimizer, undisturbed = make(method, list(models.values())), make(method, list(others.values()))
    walk(models, optimizer, range(2 * L - 1))
    walk(others, undisturbed, range(4 * L))
    before = [{**snapshot(model, optimizer), **numbers(optimizer, replica)} for replica, model in models.items()]
    for replica, model in models.items():
        model.backward(replica, 2 * L - 1)
    models[2].weights[1].grad[3] = math.nan
    with pytest.raises(RuntimeError, match=rf"^replicas: not all numbers are finite on replica 2 after {2 * L - 1} steps\. "):
        optimizer.step()
    for replica, model in models.items():
        assert differences({**snapshot(model, optimizer), **numbers(optimizer, replica)}, before[replica]) == []
    walk(models, optimizer, range(2 * L - 1, 4 * L))
    for replica, model in models.items():
        assert differences(snapshot(model, optimizer), snapshot(others[replica], undisturbed)) == []


def test_several_that_left_them_are_all_named() -> None:
    models = [Mixed(DTYPES["float32"]) for _ in range(4)]
    optimizer = make("ElasticSGD", models)
    for replica, model in enumerate(models):
        model.backward(replica, 0)
        if replica != 2:
            model.weights[0].grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="on replica 0, replica 1 and replica 3 after 0 steps"):
        optimizer.step()


def test_replicas_of_other_shapes_are_refused_at_the_exchange() -> None:
    params = [[torch.nn.Parameter(torch.ones(3))], [torch.nn.Parameter(torch.ones(4))]]
    optimizer = dr.ElasticSGD(replicas=params, seed=0)
    for (p,) in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"^replicas: other parameters on replica 1 than on replica 0: "):
        optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for (p,) in params)


def test_parameters_of_one_shape_are_not_taken_for_each_other() -> None:
    """Where each replica has had a gradient for another one of two."""
    params = [[torch.nn.Parameter(torch.full((2,), float(i))) for i in range(2)] for _ in range(2)]
    optimizer = dr.ElasticSGD(replicas=params, seed=0)
    params[0][0].grad, params[1][1].grad = torch.ones(2), torch.ones(2)
    with pytest.raises(RuntimeError, match=r"^replicas: other parameters on replica 1 than on replica 0: each replica needs "):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_a_gradient_that_is_not_finite_is_seen_where_anchors_are_exchanged() -> None:
    """They are finite all the same."""
    params = [[torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(0))] for _ in range(2)]
    optimizer = dr.Parle(replicas=params, inner_steps=2, consensus="anchors", seed=0)
    for last in (False, True):
        for own in params:
            for p in own:
                p.grad = torch.ones_like(p)
        if last:
            params[1][0].grad.fill_(math.nan)
            before = [p.detach().clone() for own in params for p in own]
            with pytest.raises(RuntimeError, match=r"^replicas: not all numbers are finite on replica 1 after 1 steps\. "):
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before, (p for own in params for p in own), strict=True))
        else:
            optimizer.step()


def test_a_step_that_fails_leaves_no_new_state() -> None:
    """Of a parameter that had its first gradient in it, which the others then would have to have too."""

    def run(disturbed: bool) -> list[Tensor]:
        params = [[torch.nn.Parameter(torch.full((2,), float(i))) for i in range(2)] for _ in range(2)]
        optimizer = dr.Parle(replicas=params, inner_steps=2, temperature=1e-3, seed=0)
        for step in range(5):
            for own in params:
                own[0].grad = torch.ones(2) * (1 + step)
            if disturbed and step == 1:
                params[0][1].grad = torch.ones(2)
                params[1][0].grad = torch.full((2,), math.nan)
                with pytest.raises(RuntimeError, match=r"^replicas: "):
                    optimizer.step()
                params[0][1].grad, params[1][0].grad = None, torch.ones(2) * (1 + step)
            optimizer.step()
        return [p.detach().clone() for own in params for p in own]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_replicas_of_different_groups_rehearse() -> None:
    """As they may train."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    for method in (dr.Parle, dr.ElasticSGD):
        optimizer = method(replicas=[[{"params": [params[0]]}, {"params": [params[1]]}], params[2:]], seed=0)
        optimizer.rehearse()
        for p in params:
            p.grad = torch.ones(3)
        for _ in range(25):
            optimizer.step()
        assert optimizer.at_outer_boundary


def test_a_group_is_not_added_where_nobody_knows_whose_it_is() -> None:
    optimizer = dr.Parle(replicas=[[P]], seed=0)
    optimizer._group = None  # as of a replica over ranks that was unpickled
    with pytest.raises(RuntimeError, match=r"^group: this optimizer was unpickled or copied"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
@pytest.mark.parametrize("rho", ["x", None, 0.0, math.nan], ids=["text", "none", "zero", "nan"])
def test_a_rho_set_by_hand_is_refused_by_name(method: str, rho: Any) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(dr, method)(replicas=[[p]], seed=0)
    optimizer.param_groups[0]["rho"] = rho
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"^rho: expected a number in \(0, inf\]"):
        optimizer.step()


P = torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "^params: expected the parameters of this rank's replica, or replicas="),
        ({"params": [P]}, TypeError, "^group: expected a process group of which each rank is a replica, .* got None"),
        ({"params": [P], "group": "gloo"}, TypeError, "^group: .* got 'gloo'"),
        ({"params": [P], "replicas": [[P]]}, ValueError, "^replicas: expected neither params nor group= beside them"),
        ({"replicas": [[P]], "group": "gloo"}, ValueError, "^replicas: expected neither params nor group= beside them"),
        ({"replicas": []}, ValueError, "^replicas: expected the parameters of at least one replica"),
        ({"replicas": [[P], []]}, ValueError, r"^replicas\[1\]: expected parameters, got none"),
        ({"replicas": [P]}, TypeError, r"^replicas\[0\]: expected the parameters of a replica, got one tensor"),
        ({"replicas": [[P], [P]]}, ValueError, "more than one parameter group"),
        ({"replicas": [[P]], "rho": 0.0}, ValueError, "^rho: expected a number in"),
        ({"replicas": [[P]], "rho_min": -1.0}, ValueError, "^rho_min: "),
        ({"replicas": [[P]], "rho_scoping": math.nan}, ValueError, "^rho_scoping: "),
        ({"replicas": [[P]], "capturable": True}, ValueError, "^capturable: expected False"),
        ({"replicas": [[{"params": [P], "rho": -1.0}]]}, ValueError, "^rho: "),
        ({"replicas": [[{"params": [P], "replicas": 2}]]}, ValueError, "^replicas: expected the same replicas in all groups"),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
def test_what_is_no_set_of_replicas_is_refused(
    method: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(dr, method)(**arguments)


def test_the_state_of_other_replicas_is_refused() -> None:
    def trained(count: int) -> Any:
        models = {replica: Mixed(DTYPES["float32"]) for replica in range(count)}
        optimizer = make("Parle", list(models.values()))
        walk(models, optimizer, range(L))
        return optimizer

    one, two = trained(1), trained(2)
    with pytest.raises(
        ValueError, match=r"^state_dict: expected the state of replica 0 of 1 in group 0, got that of replica 0 of 2"
    ):
        one.load_state_dict({**two.state_dict(), "param_groups": two.state_dict()["param_groups"][:1]})
    plain = dr.EntropySGD([torch.nn.Parameter(torch.ones(2))], seed=0)
    with pytest.raises(ValueError, match=r"^state_dict: expected the state of Parle, got that of EntropySGD"):
        one.load_state_dict(plain.state_dict())
