"""Replicas over ranks: the same bits as in one process, and whole states whatever happens to a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_programs as programs
import torch
from ranks import run_ranks
from replica_runs import DTYPES, L, Mixed, answer, differences, make, numbers, snapshot, walk

import deeprelax_cuda as dr

CASES: list[programs.Case] = [
    ("Parle", "float32", {}),
    ("Parle", "mixed", {"rounding": "stochastic"}),
    ("Parle", "mixed", {"master_weights": True, "consensus": "anchors", "averaging": "linear"}),
    ("Parle", "float32", {"momentum": 0.0, "inner_momentum": 0.0, "reset_inner_momentum": True, "backend": "eager"}),
    ("ElasticSGD", "float32", {}),
    ("ElasticSGD", "mixed", {"master_weights": True}),
    ("ElasticSGD", "mixed", {"momentum": 0.0, "coupling_in_momentum": False}),
]
STEPS = 4 * L + 1


def in_one_process(count: int, case: programs.Case, steps: int = STEPS) -> list[dict[str, Any]]:
    method, dtypes, options = case
    models = {replica: Mixed(DTYPES[dtypes]) for replica in range(count)}
    optimizer = make(method, list(models.values()), **options)
    walk(models, optimizer, range(steps))
    return [
        {**snapshot(model, optimizer), **answer(model, optimizer), **numbers(optimizer, replica)}
        for replica, model in models.items()
    ]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_bits_of_replicas_in_one_process(tmp_path: Path, count: int) -> None:
    """Parameters, all state, answers and numbers; over ranks whose number does not divide that of the elements too."""
    found = run_ranks(tmp_path, count, programs.histories, CASES, STEPS, ["cpu"] * count)
    for i, case in enumerate(CASES):
        for replica, want in enumerate(in_one_process(count, case)):
            assert differences(found[replica][i], want) == [], (case, replica)
            assert all(torch.equal(want[name], found[0][i][name]) for name in want if name.endswith(" answer"))
        moved = [differences(found[0][i], other[i]) for other in found[1:]]
        assert all("0" in names and "2" in names for names in moved), "replicas that are the same"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
@pytest.mark.parametrize("evaluating", [False, True], ids=["training", "evaluating"])
def test_a_run_resumes_bit_for_bit_in_new_processes(tmp_path: Path, method: str, evaluating: bool) -> None:
    """In the middle of a period; and the checkpoint of one rank is not taken for that of another."""
    run_ranks(tmp_path / "first", 3, programs.saves, str(tmp_path), method, L + 1, evaluating)
    found = run_ranks(tmp_path / "second", 3, programs.resumes, str(tmp_path), method, range(L + 1, STEPS))
    for got, want in zip(found, in_one_process(3, (method, "mixed", {})), strict=True):
        assert differences(got, want) == []


def test_a_failed_exchange_leaves_all_as_it_was_and_the_run_can_go_on(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, 3, programs.faults)
    undisturbed = in_one_process(3, ("Parle", "mixed", {}), 4 * L)
    for rank, said in enumerate(found):
        assert {name: left for name, left in said.items() if name.endswith(" left") and left} == {}
        for spoilt in ("nan", "inf", "mid-period"):
            assert said[spoilt].startswith("replicas: not all numbers are finite on rank 1 after "), said[spoilt]
            assert "No replica has taken this step" in said[spoilt]
            assert "checkpoint" in said[spoilt]
        for call in ("before the sum", "after the sum"):
            assert said[call].startswith(f"replicas: the exchange after {2 * L - 1} steps failed"), said[call]
            assert "the network is gone" in said[call]
            assert "Nothing has changed here; start all ranks again from the last checkpoint" in said[call]
        assert said["unpickled"].startswith("group: this optimizer was unpickled")
        want = {name: value for name, value in undisturbed[rank].items() if isinstance(value, torch.Tensor)}
        assert differences(said["end"], want) == []
    assert any("mid-period left" in said for said in found)


@pytest.mark.parametrize("when", ["before", pytest.param("within", marks=pytest.mark.slow)])
def test_when_a_rank_dies_the_others_say_which_and_have_whole_states(tmp_path: Path, when: str) -> None:
    found = run_ranks(tmp_path, 3, programs.dies, when)
    assert found[2] is None
    for rank in (0, 1):
        said = found[rank]["said"]
        if when == "before":
            assert said.startswith(f"replicas: no answer after {2 * L - 1} steps from "), said
            assert "rank 2 (" in said
        else:
            assert said.startswith(f"replicas: the exchange after {2 * L - 1} steps failed, although all were there"), said
        assert "start all ranks again from the last checkpoint" in said
        assert found[rank]["left"] == []
        assert found[rank]["saved"]
    assert differences(found[0]["answer"], found[1]["answer"]) == []


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, 3, programs.raises_alone)
    assert found[1] == "ended"
    for rank in (0, 2):
        assert found[rank].startswith(f"replicas: no answer after {L - 1} steps from ")
        assert "rank 1 (" in found[rank]


@pytest.mark.slow
def test_ranks_that_differ_are_refused_by_name_on_all_of_them(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, 2, programs.disagreements)
    for said in found:
        assert said["seed"].startswith(f"replicas: seed {2**64 - 1} on rank 1, {2**64 - 2} on rank 0: ")
        assert said["inner_steps"].startswith(f"replicas: inner_steps={L + 2} on rank 1, {L} on rank 0: ")
        assert said["parameters"].startswith("replicas: other parameters on rank 1 than on rank 0: ")
        assert said["steps"].startswith(f"replicas: {L} steps taken on rank 1, {L - 1} on rank 0: ")
        assert all(one.endswith(". No replica has taken this step") for one in said.values())
        assert said["kind"].startswith("replicas: other parameters on rank 1 than on rank 0: ")
    assert found[0] == found[1]


@pytest.mark.slow
def test_data_parallel_ranks_of_a_replica_stay_equal(tmp_path: Path) -> None:
    """Two replicas of two ranks each, over 100 steps; all four have one answer, and batch norm's statistics there."""
    found = run_ranks(tmp_path, 4, programs.data_parallel, 100)

    def same(name: str, a: int, b: int) -> bool:
        return all(torch.equal(one, other) for one, other in zip(found[a][name], found[b][name], strict=True))

    for name in ("y", "state", "answers"):
        assert same(name, 0, 1)
        assert same(name, 2, 3)
    assert not same("y", 0, 2)
    assert same("answers", 0, 2)
    for rank in range(1, 4):
        assert same("refreshed", 0, rank)
        assert torch.equal(found[0]["outputs"], found[rank]["outputs"])
    inputs = [tuple(one["first"][0].flatten().tolist()) for one in found]
    assert len(set(inputs)) == 4, "ranks that have seen the same data"
    assert all(one["restored"] and one["back"] for one in found)


@pytest.mark.slow
def test_each_replica_has_its_own_noise_in_one_process_and_over_ranks(tmp_path: Path) -> None:
    """That of the derived seed, and of the tensor's number within its replica."""
    params = [[torch.nn.Parameter(torch.zeros(1000)) for _ in range(2)] for _ in range(3)]
    optimizer = dr.Parle(replicas=params, temperature=0.5, inner_lr=1.0, seed=7)
    for p in (p for own in params for p in own):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = run_ranks(tmp_path, 3, programs.noise)
    everything = []
    for replica in range(3):
        for number in range(2):
            z = dr.functional.gaussian(1000, seed=dr.derive_seed(7, replica), step=0, stream=number)
            assert torch.equal(params[replica][number].detach(), z)
            assert torch.equal(found[replica][number], z)
            everything.append(z)
    correlation = torch.corrcoef(torch.stack(everything)).fill_diagonal_(0.0)
    assert correlation.abs().max() < 0.15


@pytest.mark.slow
def test_what_is_rare_over_ranks(tmp_path: Path) -> None:
    """Types side by side for many exchanges, nothing to exchange, a rank outside of the group, a GradScaler."""
    for rank, found in enumerate(run_ranks(tmp_path, 2, programs.odds)):
        assert found["wide"] == 400
        assert found["nothing"] == 1
        assert found["outside"].startswith("group: expected one that this rank belongs to") or rank == 0
        for name in ("scaled", "scaled loop"):
            said, moved = found[name]
            assert said.startswith("group: a GradScaler skips steps")
            assert moved < 1.0


def test_a_grad_scaler_skips_the_steps_of_replicas_in_one_process() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = dr.ElasticSGD(replicas=[[p]], seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for scale, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        (scaler.scale(p.sum()) * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (p.detach()[0] < 1.0) == moves
