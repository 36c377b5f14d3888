"""`deeprelax train` with replicas: in one process and one on each rank, to the same bytes, whatever happens meanwhile."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks as processes
import torch
import train_rank_programs as programs
from train_runs import settings, state_of, untimed

import deeprelax_cuda as dr
from deeprelax_cuda import cli
from deeprelax_cuda.cli import UsageError, main
from deeprelax_cuda.train import checkpoint, command, compare, loop
from deeprelax_cuda.train.command import CHECKPOINT
from deeprelax_cuda.train.data import Batches
from deeprelax_cuda.train.datasets import digits
from deeprelax_cuda.train.models import MODELS, Model
from deeprelax_cuda.train.progress import Progress
from deeprelax_cuda.train.ranks import ALONE, STARTED, joined
from deeprelax_cuda.train.results import RESULT
from deeprelax_cuda.train.stopping import Stopped

pytestmark = pytest.mark.usefixtures("one_thread", "process_settings")

DIGITS = digits()
ROOT = Path(__file__).parents[1]
BOTH = ("elastic-sgd", "parle")
IMPORTED = ["deeprelax_cuda.train.compare", "deeprelax_cuda.train.report", "sklearn.datasets", "sklearn.model_selection"]
processes._CONTEXT.set_forkserver_preload(["deeprelax_cuda", "torch.nn.parallel", "numpy", *IMPORTED])


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network with batch norm and dropout."""

    def build(shape: Any, classes: int) -> torch.nn.Module:
        layers = [torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), 32), torch.nn.BatchNorm1d(32)]
        return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, classes))

    monkeypatch.setitem(MODELS, "noisy", Model(build))
    return "noisy"


def advanced(run: loop.Run, steps: int) -> loop.Run:
    for _ in zip(range(steps), run.steps(Progress(), lambda: None), strict=False):
        pass
    return run


# In one process.


@pytest.mark.parametrize("method", BOTH)
def test_replicas_begin_alike_and_have_data_and_dropout_of_their_own(method: str, noisy: str) -> None:
    made = settings(methods=(method,), model=noisy, options={method: {"replicas": 3}})
    run = compare.build(method, 5, made, DIGITS)
    first, *others = ([t.clone() for t in replica.model.state_dict().values()] for replica in run.replicas)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for number, replica in enumerate(run.replicas):
        own = dr.derive_seed(5, number)
        assert torch.equal(replica.batches[7][0], Batches(DIGITS, 32, own)[7][0])
        assert not torch.equal(replica.batches[7][0], Batches(DIGITS, 32, 5)[7][0])
    drawn: list[list[torch.Tensor]] = []
    for replica in run.replicas:
        drawn.append([])
        replica.model[4].register_forward_hook(
            lambda _, inputs, out, kept=drawn[-1]: kept.append((out == 0) & (inputs[0] != 0))
        )
    advanced(run, 2)
    for number, masks in enumerate(drawn):
        torch.manual_seed(dr.derive_seed(5, number))
        for step, mask in enumerate(masks):
            kept = torch.nn.functional.dropout(torch.ones(32, 32), 0.3)
            differs = mask & (kept != 0)
            assert not differs.any(), (number, step)
            assert mask.any()


def test_one_replica_without_a_coupling_is_entropy_sgd(noisy: str) -> None:
    alone = {"inner_steps": 7, "temperature": 1e-8, "gamma": 500.0, "gamma_min": 10.0}
    made = settings(
        methods=("entropy-sgd", "parle"),
        model=noisy,
        options={"entropy-sgd": alone, "parle": {**alone, "replicas": 1, "rho": math.inf}},
    )
    assert torch.equal(compare.build("parle", 3, made, DIGITS).replicas[0].batches[7][0], Batches(DIGITS, 32, 3)[7][0])
    curves = [untimed(advanced(compare.build(name, 3, made, DIGITS), 1000).curve) for name in made.methods]
    assert curves[0] == curves[1]
    assert len(curves[0]["validation"]) == 2


def test_the_training_loss_is_the_mean_over_replicas() -> None:
    made = settings(methods=("parle",), epochs=1, options={"parle": {"replicas": 2}})
    run = compare.build("parle", 0, made, DIGITS)
    sums = []
    for _ in run.steps(Progress(), lambda: None):
        if run.step == run.last_step:
            sums = [replica.summed_loss() for replica in run.replicas]
    assert sums[0] != sums[1]
    assert run.curve.train_loss == [sum(sums) / (2 * run.last_step)]


def test_a_state_is_taken_apart_and_put_together(noisy: str) -> None:
    """The parts are those of ranks, each with its replica; together they are the whole again."""
    made = settings(methods=("parle",), model=noisy, options={"parle": {"replicas": 3}})
    run = advanced(compare.build("parle", 0, made, DIGITS), 30)
    whole = run.state_dict()
    parts = [loop.part_of(whole, range(i, i + 1)) for i in range(3)]
    assert [group["replica"] for part in parts for group in part["optimizer"]["param_groups"]] == [0, 1, 2]
    assert all(len(part["optimizer"]["state"]) == len(whole["optimizer"]["state"]) // 3 for part in parts)
    for part in parts:  # as an optimizer of these alone numbers them
        (group,) = part["optimizer"]["param_groups"]
        place = {number: i for i, number in enumerate(group["params"])}
        part["optimizer"] = {
            "state": {place[number]: own for number, own in part["optimizer"]["state"].items()},
            "param_groups": [{**group, "params": list(place.values())}],
        }
    again = compare.build("parle", 0, made, DIGITS)
    again.load_state_dict(loop.whole_of(parts))
    for one in (run, again):
        advanced(one, 30)
    assert all(torch.equal(a, b) for a, b in zip(state_of(run), state_of(again), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "parle", "--replicas", "0"], "--replicas: expected a whole number from 1 to 1024, got 0"),
        (["--method", "sgd", "--replicas", "2"], "--replicas: not an option of sgd"),
        (["--method", "entropy-sgd", "--rho", "1"], "--rho: not an option of entropy-sgd"),
        (["--method", "elastic-sgd", "--inner-steps", "5"], "--inner-steps: not an option of elastic-sgd"),
        (
            ["--method", "parle", "--set", "parle.replicas=2.0"],
            "parle: replicas: expected a whole number from 1 to 1024, got 2.0",
        ),
        (["--method", "parle", "--set", "parle.replicas=1025"], "from 1 to 1024, got 1025"),
        (["--method", "parle", "--rho", "0"], "parle: rho: expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_of_replicas_get_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "new"), *options])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_replicas_that_diverge_end_the_run_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "parle", "--replicas", "2", "--inner-lr", "1e30", "--seeds", "0", "--quiet"]
    assert main(["train", *options, "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    said = "deeprelax train: parle, seed 0: replicas: not all numbers are finite on replica 0 and replica 1 after 24 steps."
    assert (out, err.count("\n"), err[: len(said)]) == ("", 1, said)
    assert (tmp_path / CHECKPOINT).exists()


def left(folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run in its middle."""
    real = loop.Run.steps

    def steps(run: loop.Run, progress: Progress, check: object) -> object:
        for _ in real(run, progress, check):  # type: ignore[arg-type]
            yield
            if run.step == 30:
                raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "steps", steps)
        assert main(["train", "--out", str(folder), *options]) == 128 + signal.SIGTERM


def test_only_a_job_that_is_started_again_goes_on_without_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And only with the run that it began itself."""
    options = ["--method", "parle", "--replicas", "2", "--seeds", "0", "--epochs", "1", "--quiet"]
    folder = tmp_path / "left"
    left(folder, options, monkeypatch)
    refused = f"deeprelax train: --out: {folder} has an unfinished run: --resume {folder}, or choose another folder"
    for count, other in (("0", []), ("1", ["--lr", "0.2"])):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["train", "--out", str(folder), *options, *other])
        assert capsys.readouterr().err.startswith(refused)
    assert main(["train", "--out", str(folder), *options]) == 0
    assert capsys.readouterr().err == f"deeprelax train: started again, goes on with the run in {folder}\n"
    assert main(["train", "--out", str(tmp_path / "undisturbed"), *options]) == 0
    assert (folder / RESULT).read_bytes() == (tmp_path / "undisturbed" / RESULT).read_bytes()


# What is refused over ranks.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ("parle", "sgd")},
            "--method: over 3 ranks only methods with replicas train, elastic-sgd and parle; got sgd",
        ),
        ({"options": {"parle": {"replicas": 2}}}, "--replicas: each of the 3 ranks has one, got 2 of parle"),
        ({"device": "cuda:1"}, "--device: of its node each rank takes its own, expected cpu or cuda, got cuda:1"),
    ],
    ids=["sgd", "2 replicas", "one device"],
)
def test_what_ranks_cannot_train_is_refused(changes: dict[str, Any], message: str) -> None:
    class Three:
        size = 3

    fitting = {"methods": ("parle",), "options": {"parle": {"replicas": 3}}}
    command._check_ranks(settings(**fitting), Three())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"^{message}$"):
        command._check_ranks(settings(**{**fitting, **changes}), Three())  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_says_what_all_have_to_say(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epochs", "0"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert (bool(waited), said.count("\n")) == ((False, 1) if rank == "0" else (True, 0))


# Over ranks.


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def started(folder: Path, program: Callable[..., int], *args: Any) -> list[Any]:
    """Start two ranks, which have all imported already, unlike those of torchrun."""
    folder.mkdir(exist_ok=True)
    processes.start_server()
    port = free_port()
    ranks = [processes._CONTEXT.Process(target=programs.work, args=(rank, port, folder, program, *args)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def ended(folder: Path, ranks: list[Any]) -> list[tuple[int, str]]:
    """Return the status of each rank, and what it said."""
    for rank in ranks:
        rank.join(processes.PATIENCE)
        assert rank.exitcode is not None, "does not end"
    return [(rank.exitcode, (folder / f"rank{number}.txt").read_text()) for number, rank in enumerate(ranks)]


def on_ranks(folder: Path, program: Callable[..., int], *args: Any) -> list[tuple[int, str]]:
    return ended(folder, started(folder, program, *args))


@pytest.mark.slow
def test_ranks_talk(tmp_path: Path) -> None:
    """Each way in which they do, and what is said when one is gone."""
    first, gone, last = processes.run_ranks(tmp_path, 3, programs.talk)
    assert gone is None
    for rank, found in ((0, first), (2, last)):
        assert found["gathered"] == [{"rank": i, "text": "x" * 1000 * i} for i in range(3)]
        assert found["collected"] == ([(i, 5000.0 * i, torch.float64) for i in range(3)] if rank == 0 else [])
        assert found["scattered"] == [rank] * 3
        assert [found[f"of {length}"] for length in (495, 496, 497, 504, 505, 512, 5000)] == [
            495,
            496,
            497,
            504,
            505,
            512,
            5000,
        ]
        assert (found["from first"], found["together"]) == (0, 10 * rank)
        assert found["first refuses"] == found["scatter refuses"] == found["all refuse"] == "CommonError: --x: no"
        assert found["first stops"] == "Stopped: SIGTERM"
        assert (found["one refuses"], found["all differ"]) == (
            "CommonError: rank 2: --x: no",
            "CommonError: rank 0: --x: not on 0",
        )
        assert found["within a period"] == found["after a short period"] == (None, False)
        assert found["agreed"] == [(None, False), (15, False), (None, True), (None, False)]
    assert first["after a rank has gone"] == "no answer from rank 1: start all ranks again, from the last checkpoint"
    expected = (
        "no answer from rank 0, which may have ended because another one was lost, and then says so: start all ranks again"
    )
    assert last["after a rank has gone"] == f"{expected}, from the last checkpoint"


@pytest.mark.slow
def test_who_sends_to_a_rank_that_is_lost_does_not_wait_for_the_timeout(tmp_path: Path) -> None:
    """Of a minute here, and of half an hour by default."""
    lost, (said, seconds) = processes.run_ranks(tmp_path, 2, programs.lost_while_receiving)
    assert lost is None
    assert said.startswith("no answer from rank 0, which may have ended because another one was lost")
    assert seconds < processes.PATIENCE / 2


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"RANK": "0", "WORLD_SIZE": "2"}], ids=range(3))
def test_a_part_of_what_torchrun_sets_starts_no_ranks(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with joined() as ranks:
        assert ranks is ALONE


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    """Numbers that are not finite, which every rank says; an error of its own, after which it does not answer."""
    options = ["--method", "parle", "--seeds", "0", "--quiet", "--out"]
    found = on_ranks(tmp_path / "1", programs.command, [*options, str(tmp_path / "nan")], "nan")
    for rank, (status, said) in enumerate(found):
        assert (status, said.count("\n")) == (1, 1)
        assert said.startswith(f"deeprelax train: rank {rank}: parle, seed 0: replicas: not all numbers are finite on rank 1")
    (first, said), (second, _) = on_ranks(tmp_path / "2", programs.command, [*options, str(tmp_path / "raises")], "raises")
    assert (first, second) == (1, 1)
    assert re.match(r"deeprelax train: rank 0: .*no answer .*from rank 1", said)
    assert (tmp_path / "raises" / CHECKPOINT).exists()


OPTIONS = ["--method", "parle", "--seeds", "0", "--epochs", "24", "--threads", "1", "--inner-steps", "7", "--eval-every", "0.7"]
OPTIONS += ["--temperature", "1e-8", "--lr-schedule", "cosine", "--quiet"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of a run in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", *OPTIONS, "--replicas", "2", "--out", str(folder)]) == 0
    return (folder / RESULT).read_bytes()


def wait_for_a_run(path: Path) -> None:
    """Wait until there is a checkpoint from the middle of a run."""
    end = time.monotonic() + processes.PATIENCE
    while not (path.exists() and checkpoint.read(path)["run"]):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_ranks_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    """With dropout and batch norm, and evaluations within a period; only the first rank is heard."""
    options = ["--method", *BOTH, "--model", "mnistfc", "--seeds", "0", "--epochs", "2", "--batch-size", "128"]
    options += ["--inner-steps", "4", "--temperature", "1e-8", "--threads", "1", "--eval-every", "0.7"]
    options += ["--lr", "0.2"]  # which each optimizer warns of
    (first, said), other = on_ranks(tmp_path, programs.command, [*options, "--out", str(tmp_path / "ranks")])
    assert main(["train", *options, "--replicas", "2", "--quiet", "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "ranks" / RESULT).read_bytes() == (tmp_path / "one" / RESULT).read_bytes()
    assert (first, *other) == (0, 0, "")
    lines = [line for line in said.splitlines() if ": epoch " in line]
    assert len(lines) == len(set(lines)) == 2 * 4
    assert said.count("final validation error") == 1
    assert "UserWarning: rho=0.1" in said
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == ["curves.png", RESULT, "seconds.json", "table.txt"]


@pytest.mark.slow
def test_a_signal_saves_all_replicas_and_one_process_may_go_on(undisturbed: bytes, tmp_path: Path) -> None:
    """Though it reaches one rank only."""
    folder = tmp_path / "a run"
    ranks = started(tmp_path, programs.command, [*OPTIONS, "--out", str(folder), "--checkpoint-every", "0.05"])
    wait_for_a_run(folder / CHECKPOINT)
    os.kill(ranks[1].pid, signal.SIGTERM)
    (first, said), other = ended(tmp_path, ranks)
    assert (first, *other) == (143, 143, "")
    assert said.startswith("\ndeeprelax train: stopped by SIGTERM at parle, seed 0, after ")
    how = f"go on with: torchrun --nproc-per-node 2 -m deeprelax_cuda train --resume '{folder}'"
    assert said.splitlines()[2:] == [how]
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT]
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert (folder / RESULT).read_bytes() == undisturbed


@pytest.mark.slow
def test_ranks_go_on_with_the_run_of_one_process(undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "left"
    left(folder, [*OPTIONS, "--replicas", "2"], monkeypatch)
    assert on_ranks(tmp_path, programs.command, ["--resume", str(folder), "--quiet"])[1] == (0, "")
    assert (folder / RESULT).read_bytes() == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are told apart by /proc")
def test_a_rank_that_is_killed_is_named_and_torchrun_starts_the_job_again(undisturbed: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    launcher += ["--master-port", str(free_port()), "-m", "deeprelax_cuda", "train"]
    # Elsewhere than in a source tree, whose package Python would take before the one that is tested.
    where = {"PYTHONPATH": str(Path(dr.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *OPTIONS, "--out", str(folder), "--checkpoint-every", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
        env={**os.environ, **where},
    )
    wait_for_a_run(folder / CHECKPOINT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [int(child) for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(second, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said = [line for line in err.splitlines() if line.startswith("deeprelax train: ")]
    assert len(said) == 2, err
    assert re.match(r"deeprelax train: rank 0: .*(no answer .*from rank 1|the exchange after \d+ steps failed)", said[0])
    assert said[1] == f"deeprelax train: started again, goes on with the run in {folder}"
    assert out.count("final validation error") == 1
    assert (folder / RESULT).read_bytes() == undisturbed


@pytest.mark.slow
def test_the_example_learns_and_goes_on(tmp_path: Path) -> None:
    path, folder = str(ROOT / "examples/parle_torchrun.py"), tmp_path / "saved"
    folder.mkdir()
    (_, said), other = on_ranks(tmp_path, programs.example, path, folder)
    begin, middle, end = said.partition("2 replicas, 20 epochs: ")
    assert (begin, middle, other) == ("", "2 replicas, 20 epochs: ", (0, ""))
    assert int(end.split()[0]) < 150
    (folder / "rank1-1.pt").unlink()  # as if that rank had been killed before its last epoch was saved
    assert on_ranks(tmp_path, programs.example, path, folder)[0] == (0, f"2 replicas, 1 epochs: {end}")
