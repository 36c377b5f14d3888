"""What the ranks of `test_replicas_ranks` do; each returns what the test then looks at."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from replica_runs import DTYPES, L, Mixed, answer, differences, make, numbers, snapshot, walk, world
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import deeprelax_cuda as dr

Case = tuple[str, str, dict[str, Any]]


def histories(rank: int, cases: list[Case], steps: int, devices: list[str]) -> list[dict[str, Any]]:
    """Take steps in each case, on the device of the rank; return parameters, state, answer and numbers."""
    found = []
    for method, dtypes, options in cases:
        model = Mixed(DTYPES[dtypes]).to(devices[rank])
        optimizer = make(method, [model], world(), **options)
        walk({rank: model}, optimizer, range(steps))
        found.append({**snapshot(model, optimizer), **answer(model, optimizer), **numbers(optimizer, rank)})
    return found


def saves(rank: int, folder: str, method: str, steps: int, evaluating: bool) -> None:
    """Leave a checkpoint of each rank after so many steps."""
    model = Mixed(DTYPES["mixed"])
    optimizer = make(method, [model], world())
    walk({rank: model}, optimizer, range(steps))
    if evaluating:
        optimizer.eval()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, Path(folder) / f"checkpoint{rank}.pt")


def resumes(rank: int, folder: str, method: str, steps: range) -> dict[str, Any]:
    """Go on from the checkpoint of the rank, after that of another one was refused."""
    model = Mixed(DTYPES["mixed"])
    optimizer = make(method, [model], world(), seed=99)
    other = torch.load(Path(folder) / f"checkpoint{(rank + 1) % dist.get_world_size()}.pt", weights_only=True)
    with pytest.raises(ValueError, match=rf"^state_dict: expected the state of replica {rank} of 3 in group 0, got that of"):
        optimizer.load_state_dict(other["optimizer"])
    own = torch.load(Path(folder) / f"checkpoint{rank}.pt", weights_only=True)
    model.load_state_dict(own["model"])
    optimizer.load_state_dict(own["optimizer"])
    optimizer.train()
    walk({rank: model}, optimizer, steps)
    return {**snapshot(model, optimizer), **answer(model, optimizer), **numbers(optimizer, rank)}


def refused(optimizer: Any) -> str:
    """Return the error of a step that is refused."""
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def faults(rank: int) -> dict[str, Any]:
    """Meet errors at the end of a period, one after the other; return what was said, and what the run comes to all the same."""
    said: dict[str, Any] = {}
    model = Mixed(DTYPES["mixed"])
    optimizer = make("Parle", [model], world())
    walk({rank: model}, optimizer, range(2 * L - 1))
    before = {**snapshot(model, optimizer), **numbers(optimizer, rank)}

    def whole(name: str) -> None:
        said[f"{name} left"] = differences({**snapshot(model, optimizer), **numbers(optimizer, rank)}, before)

    # a gradient that is not finite, on one rank, in the last step of a period
    for spoilt in (float("nan"), float("inf")):
        model.backward(rank, 2 * L - 1)
        if rank == 1:
            model.weights[2].grad[0, 0] = spoilt
        said[f"{spoilt}"] = refused(optimizer)
        whole(f"{spoilt}")

    # an exchange that raises, on all ranks, before and after the sum, and one that is interrupted
    model.backward(rank, 2 * L - 1)
    exchange = dist.all_to_all_single  # over gloo both ways
    for name, calls in {"before the sum": [False], "after the sum": [True, False]}.items():
        answers = iter(calls)

        def fails(*args: Any, answers: Any = answers, **kwargs: Any) -> None:
            if not next(answers):
                raise RuntimeError("the network is gone")
            exchange(*args, **kwargs)

        with mock.patch.object(dist, "all_to_all_single", fails):
            said[name] = refused(optimizer)
        assert next(answers, None) is None
        whole(name)
    with mock.patch.object(dist, "all_to_all_single", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    whole("interrupted")

    # a copy has the group, what was pickled has not
    deep = copy.deepcopy(optimizer)
    assert deep._group is optimizer._group
    unpickled = pickle.loads(pickle.dumps(optimizer))
    for own, p in zip(unpickled.param_groups[0]["params"], model.parameters(), strict=True):
        own.grad = p.grad.clone()
    said["unpickled"] = refused(unpickled)

    # and the same step goes on, as if nothing had been
    optimizer.step()
    walk({rank: model}, optimizer, range(2 * L, 4 * L))
    said["end"] = {**snapshot(model, optimizer), **answer(model, optimizer)}

    # a gradient that is not finite in mid-period has spoilt a replica; the others are as they were
    walk({rank: model}, optimizer, range(4 * L, 4 * L + 1))
    model.backward(rank, 4 * L + 1)
    if rank == 1:
        model.weights[0].grad.fill_(float("nan"))
    optimizer.step()
    before = {**snapshot(model, optimizer), **numbers(optimizer, rank)}
    model.backward(rank, 4 * L + 2)
    said["mid-period"] = refused(optimizer)
    if rank != 1:
        whole("mid-period")
    return said


def disagreements(rank: int) -> dict[str, str]:
    """Differ from the others in what all must have in common; return the errors."""
    said = {}
    for name in ("seed", "inner_steps", "parameters", "kind", "steps"):
        model = Mixed(DTYPES["float32"])
        spoilt: dict[str, Any] = {"seed": 2**64 - 2 + rank} if name == "seed" else {}
        if name == "kind" and rank == 1:
            spoilt = {"consensus": "anchors"}
        optimizer = make("Parle", [model], world(), **spoilt)
        if name == "parameters" and rank == 1:
            model.weights[4].requires_grad_(False)
        for step in range(L - 1):
            backward_trainable(model, rank, step)
            optimizer.step()
        for group in optimizer.param_groups if rank == 1 else ():
            if name == "inner_steps":  # another period, which ends at the same time
                group.update(inner_steps=L + 2, position=L + 1)
            if name == "steps":  # as one that goes on from a newer checkpoint
                group["step"] += 1
        before = snapshot(model, optimizer)
        backward_trainable(model, rank, L)
        said[name] = refused(optimizer)
        assert differences(snapshot(model, optimizer), before) == []
    return said


def backward_trainable(model: Mixed, rank: int, step: int) -> None:
    model.backward(rank, step)
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = None


def dies(rank: int, when: str) -> dict[str, Any]:
    """Lose rank 2 before an exchange, or within one; return what the others say and have."""
    model = Mixed(DTYPES["float32"])
    optimizer = make("Parle", [model], world())
    walk({rank: model}, optimizer, range(2 * L - 1))
    before = {**snapshot(model, optimizer), **numbers(optimizer, rank)}
    model.backward(rank, 2 * L - 1)
    if rank == 2:
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        with mock.patch.object(dist, "all_to_all_single", side_effect=lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)):
            optimizer.step()
    said = refused(optimizer)
    left = differences({**snapshot(model, optimizer), **numbers(optimizer, rank)}, before)
    shown = answer(model, optimizer)
    return {"said": said, "left": left, "answer": shown, "saved": pickle.dumps(optimizer.state_dict()) != b""}


def raises_alone(rank: int) -> str:
    """Meet an error on rank 1 alone, which ends; return what is said."""
    model = Mixed(DTYPES["float32"])
    optimizer = make("Parle", [model], world())
    walk({rank: model}, optimizer, range(L - 1))
    model.backward(rank, L - 1)
    if rank == 1:
        model.weights[1].grad = model.weights[1].grad.to_sparse()
        with pytest.raises(ValueError, match="sparse"):
            optimizer.step()
        dist.destroy_process_group()
        return "ended"
    return refused(optimizer)


def data_parallel(rank: int, steps: int) -> dict[str, Any]:
    """Train two replicas of two data-parallel ranks each: ranks 0 and 1, and 2 and 3."""
    replica, place = divmod(rank, 2)
    ranks_of_replicas = [dist.new_group([2 * r, 2 * r + 1]) for r in range(2)]
    across = [dist.new_group([place, place + 2]) for place in range(2)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    model = DistributedDataParallel(net, process_group=ranks_of_replicas[replica])
    optimizer = dr.Parle(model.parameters(), group=across[place], inner_steps=4, temperature=1e-4, seed=3)
    generator = torch.Generator().manual_seed(dr.derive_seed(3, replica) % 2**63 + place)
    first = []
    for step in range(steps):
        x = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, :3]).argmax(1)).backward()
        optimizer.step()
        if step == 0:
            first = [x, net[0].weight.grad.clone()]
    y = [p.detach().clone() for p in net.parameters()]
    state = [t.clone() for p in net.parameters() for t in optimizer.state[p].values()]
    optimizer.eval()
    answers = [p.detach().clone() for p in net.parameters()]
    training = [b.clone() for b in net.buffers()]
    data = [torch.randn(32, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with dr.recalibrate_batch_norm(model, data):
        refreshed = [b.clone() for b in net.buffers()]
        net.eval()
        outputs = net(data[0]).detach()
    restored = all(torch.equal(a, b) for a, b in zip(training, net.buffers(), strict=True))
    optimizer.train()
    back = all(torch.equal(a, b) for a, b in zip(y, net.parameters(), strict=True))
    return {
        "first": first,
        "y": y,
        "state": state,
        "answers": answers,
        "refreshed": refreshed,
        "outputs": outputs,
        "restored": restored,
        "back": back,
    }


def scaled(rank: int) -> tuple[str, float]:
    """Take a step under a GradScaler, which is refused, and one without."""
    p = nn.Parameter(torch.ones(3))
    optimizer = dr.ElasticSGD([p], group=world(), seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError) as caught:
        scaler.step(optimizer)
    assert torch.equal(p.detach(), torch.ones(3))
    p.grad = torch.ones(3)
    optimizer.step()
    return str(caught.value), float(p.detach()[0])


def noise(rank: int) -> list[Tensor]:
    """Take one step without gradients: what is left is the noise."""
    params = [nn.Parameter(torch.zeros(1000)) for _ in range(2)]
    optimizer = dr.Parle(params, group=world(), temperature=0.5, inner_lr=1.0, seed=7)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return [p.detach().clone() for p in params]


def wide_beside_narrow(rank: int, steps: int) -> int:
    """Exchange a float64 tensor that does not fill its slices beside a float32 one; return the steps taken."""
    params = [nn.Parameter(torch.randn(2, dtype=torch.float64)), nn.Parameter(torch.randn(1))]
    optimizer = dr.ElasticSGD(params, group=world(), seed=0, temperature=1e-3)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    return int(optimizer.stats()["steps"])


def nothing_to_exchange(rank: int) -> int:
    """Step with parameters without elements alone."""
    p = nn.Parameter(torch.empty(0, 3))
    optimizer = dr.ElasticSGD([p], group=world(), seed=0)
    p.grad = torch.empty(0, 3)
    optimizer.step()
    return int(optimizer.stats()["steps"])


def outside(rank: int) -> str:
    """Make an optimizer on a rank that its group has not; say what it says."""
    group = dist.new_group([0])
    p = nn.Parameter(torch.ones(2))
    if rank == 0:
        dr.ElasticSGD([p], group=group, seed=0)
        return ""
    with pytest.raises(ValueError, match=r"^group: ") as caught:
        dr.ElasticSGD([p], group=group, seed=0)
    return str(caught.value)


def scaled_loop(rank: int) -> tuple[str, float]:
    """Have a GradScaler refused with closures, and step without one."""
    p = nn.Parameter(torch.ones(3))
    optimizer = dr.Parle([p], group=world(), seed=0, inner_steps=2, closure_mode="inner_loop")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError) as caught:
        scaler.step(optimizer)

    def closure() -> float:
        p.grad = torch.ones(3)
        return 0.0

    optimizer.step(closure)
    return str(caught.value), float(p.detach()[0])


def odds(rank: int) -> dict[str, Any]:
    """Do what is rare, in one start of the ranks."""
    return {
        "wide": wide_beside_narrow(rank, 400),
        "nothing": nothing_to_exchange(rank),
        "outside": outside(rank),
        "scaled": scaled(rank),
        "scaled loop": scaled_loop(rank),
    }
