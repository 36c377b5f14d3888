"""`deeprelax train` left in the middle and gone on with: the same bits; and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from io import BytesIO
from pathlib import Path

import pytest
import torch
from train_runs import METHODS, images, settings, state_of, untimed

import deeprelax_cuda as dr
from deeprelax_cuda import storage
from deeprelax_cuda.cli import UsageError, main
from deeprelax_cuda.train import checkpoint, compare, loop, results
from deeprelax_cuda.train.command import CHECKPOINT
from deeprelax_cuda.train.datasets import digits
from deeprelax_cuda.train.progress import Progress
from deeprelax_cuda.train.results import RESULT
from deeprelax_cuda.train.schedules import Schedule
from deeprelax_cuda.train.stopping import SIGNALS, Stop, Stopped, stopping

pytestmark = pytest.mark.usefixtures("one_thread", "process_settings")

DIGITS = digits()


def through_a_file(state: dict[str, object], path: Path) -> dict[str, object]:
    checkpoint.write(path, state)
    return checkpoint.read(path)


# A run.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit_from_every_position_of_an_inner_loop(method: str, dtype: str, tmp_path: Path) -> None:
    """Through two outer steps and an epoch's end, with evaluations between and a learning rate that drops."""
    options = {"inner_steps": 7, "rounding": "stochastic"} if dtype == "bfloat16" else {"inner_steps": 7}
    made = settings(dtype=dtype, epochs=2, eval_every=0.25, schedule=Schedule("cosine"), options={"entropy-sgd": options})
    data = DIGITS.to(torch.device("cpu"), getattr(torch, dtype))
    run = compare.build(method, 0, made, data)
    states = {}
    for _ in run.steps(Progress(), lambda: None):
        if run.step in range(33, 48):
            states[run.step] = through_a_file(run.state_dict(), tmp_path / "checkpoint")
    for step, state in states.items():
        torch.rand(step)
        again = compare.build(method, 0, made, data)
        again.load_state_dict(state)
        assert again.step == step
        for _ in again.steps(Progress(), lambda: None):
            pass
        assert untimed(again.curve) == untimed(run.curve)
        assert all(torch.equal(a, b) for a, b in zip(state_of(again), state_of(run), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_the_gpu_goes_on_bit_for_bit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, weights and dropout are on the device; the laps of the stopwatch are events there."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device("cuda")
    data = images(train=512, val=128, size=28).to(device, torch.float32)
    made = settings(model="lenet", device="cuda", epochs=3, eval_every=0.5, options={"entropy-sgd": {"inner_steps": 7}})
    run = compare.build(method, 0, made, data)
    for _ in run.steps(Progress(), lambda: None):
        if run.step == 18:
            state = through_a_file(run.state_dict(), tmp_path / "checkpoint")
    torch.rand(3, device=device)
    again = compare.build(method, 0, made, data)
    again.load_state_dict(state)
    for _ in again.steps(Progress(), lambda: None):
        pass
    assert untimed(again.curve) == untimed(run.curve)
    assert all(torch.equal(a, b) for a, b in zip(state_of(again), state_of(run), strict=True))
    assert all(0 < seconds < 60 for seconds in again.curve.parts.values())


def test_seconds_are_those_of_all_processes() -> None:
    run = compare.build("sgd", 0, settings(), DIGITS)
    for _ in zip(range(30), run.steps(Progress(), lambda: None), strict=False):
        pass
    state = copy.deepcopy(run.state_dict())
    state["seconds"]["optimizer"] += 1000.0
    run.load_state_dict(state)
    for _ in run.steps(Progress(), lambda: None):
        pass
    assert 1000.0 < run.curve.seconds[-1] < 1010.0
    assert run.curve.parts["optimizer"] > 1000.0


# A comparison, in a process of its own.

OPTIONS = [
    "--epochs",
    "6",
    "--seeds",
    "0",
    "3",
    "--method",
    "sgd",
    "sgd-ema",
    "entropy-sgd",
    "--inner-steps",
    "7",
    "--eval-every",
    "0.5",
]


def start(*options: str, checkpoint_every: float = 1e9) -> subprocess.Popen[str]:
    every = ["--checkpoint-every", str(checkpoint_every)]
    command = [sys.executable, "-m", "deeprelax_cuda", "train", *options, *every]
    # Elsewhere than in a source tree, whose package Python would take before the one that is tested.
    where = {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONPATH": str(Path(dr.__file__).parents[1])}}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **where)


def wait_for_line(process: subprocess.Popen[str], start_of_line: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(start_of_line):
            return
    raise AssertionError(f"ended without a line that starts with {start_of_line!r}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = start(*OPTIONS, "--out", str(folder), "--quiet")
    _, errors = done.communicate(timeout=120)
    assert (done.returncode, errors) == (0, "")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS, ids=lambda s: s.name)
def test_a_signal_saves_and_says_how_to_go_on(signum: signal.Signals, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    process = start(*OPTIONS, "--out", str(folder))
    wait_for_line(process, "entropy-sgd, seed 0: epoch 2/")
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    said, how = errors.splitlines()[-2:]
    assert said.startswith(f"deeprelax train: stopped by {signum.name} at entropy-sgd, seed 0, after ")
    assert how == f"go on with: deeprelax train --resume '{folder}'"
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT]
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert (folder / RESULT).read_bytes() == (uninterrupted / RESULT).read_bytes()
    assert not (folder / CHECKPOINT).exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["sgd-ema, seed 0: epoch 3/", "entropy-sgd, seed 3: epoch 2/"])
def test_a_killed_run_goes_on_to_the_same_result(at: str, uninterrupted: Path, tmp_path: Path) -> None:
    process = start(*OPTIONS, "--out", str(tmp_path), checkpoint_every=0.05)
    wait_for_line(process, at)
    process.kill()
    process.wait(timeout=60)
    saved = checkpoint.read(tmp_path / CHECKPOINT)
    assert saved["run"]["step"] > 0
    assert main(["train", "--resume", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / RESULT).read_bytes() == (uninterrupted / RESULT).read_bytes()


def test_a_run_killed_before_its_first_step_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a checkpoint from the start on, and one that is written while it stops does not hide an error."""

    class Killed(Exception):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    options = ["train", "--epochs", "1", "--seeds", "0", "--quiet"]
    monkeypatch.setattr(compare, "compare", killed)
    with pytest.raises(Killed):
        main([*options, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert main([*options, "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "run" / RESULT).read_bytes() == (tmp_path / "other" / RESULT).read_bytes()


# Signals.


def test_the_second_signal_acts_at_once_and_handlers_come_back() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signum is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[Stop] = []

    def work() -> None:
        with stopping() as stop:
            stop.check()
            seen.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0].signum is None


# Files.


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synced before it gets its name, and again its folder after; broken off anywhere, the old one is there."""
    path, done = tmp_path / "file", []
    storage.write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(path.read_bytes()))
    storage.write(path, b"new")
    assert done == [b"old", b"new"]

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        storage.write(path, b"newer")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = checkpoint.write, 0

    def write(path: Path, content: dict[str, object]) -> None:
        nonlocal calls
        calls += 1
        if 1 < calls < 5:
            raise OSError("no space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "write", write)
    options = ["--seeds", "0", "--epochs", "1", "--quiet", "--checkpoint-every", "1e-9"]
    assert main(["train", *options, "--out", str(tmp_path)]) == 0
    assert calls > 5
    assert capsys.readouterr().err == "deeprelax train: checkpoint not written: no space left on device\n" * 3
    assert (tmp_path / RESULT).exists()


def test_a_full_disk_at_the_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write", full)
    assert "--out: [Errno 28] No space left on device" in refusal(["--seeds", "0", "--out", str(tmp_path)], capsys)


def refusal(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is refused, and return its one line."""
    with pytest.raises(SystemExit) as stop:
        main(["train", *options])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("deeprelax train: ")


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped in its middle."""
    folder = tmp_path / "left"
    real = loop.Run.steps

    def steps(run: loop.Run, progress: Progress, check: object) -> object:
        for _ in real(run, progress, check):  # type: ignore[arg-type]
            yield
            if run.step == 30:
                raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "steps", steps)
    options = ["--method", "entropy-sgd", "--seeds", "0", "--epochs", "1", "--quiet"]
    assert main(["train", "--out", str(folder), *options]) == 143
    monkeypatch.undo()
    return folder


def other_pickle() -> bytes:
    buffer = BytesIO()
    torch.save({"model": {}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[: len(content) // 2], "damaged"),
        (lambda content: content[:10], "not a checkpoint of this version of deeprelax train"),
        (lambda content: b"", "not a checkpoint of this version of deeprelax train"),
        (lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:], "damaged"),
        (lambda content: content + b"\n", "damaged"),
        (lambda content: other_pickle(), "not a checkpoint of this version of deeprelax train"),
        (
            lambda content: b"deeprelax train checkpoint 0\n" + content[29:],
            "not a checkpoint of this version of deeprelax train",
        ),
    ],
    ids=["half", "beginning", "empty", "one bit", "longer", "another program's", "another version's"],
)
def test_a_file_that_is_no_whole_checkpoint_is_refused_in_one_line(
    spoil, message: str, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = left / CHECKPOINT
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    assert refusal(["--resume", str(left)], capsys).startswith(f"{path}: {message}")
    assert path.read_bytes() == spoilt


def test_what_torch_cannot_read_is_refused_in_one_line(tmp_path: Path) -> None:
    """Code in a pickle is not run."""

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    checkpoint.write(tmp_path / "file", {"code": Code()})
    with pytest.raises(UsageError, match=r"file: torch .* cannot read it: [^\n]*$"):
        checkpoint.read(tmp_path / "file")


@pytest.mark.parametrize(
    "change", [{"settings": {}}, {"curves": None}, {"run": {"step": 1}}], ids=["settings", "curves", "run"]
)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(
    change: dict[str, object], left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write(left / CHECKPOINT, {**checkpoint.read(left / CHECKPOINT), **change})
    before = (left / CHECKPOINT).read_bytes()
    message = f"--resume: {left / CHECKPOINT} does not fit this version of deeprelax train: "
    assert message in refusal(["--resume", str(left)], capsys)
    assert (left / CHECKPOINT).read_bytes() == before


def test_a_folder_without_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--resume: {tmp_path} has no {CHECKPOINT}: no run was left there, or it is finished" in refusal(
        ["--resume", str(tmp_path)], capsys
    )
    assert "No such file" in refusal(["--resume", str(tmp_path / "nowhere")], capsys)


@pytest.mark.parametrize(
    "option", [["--epochs", "3"], ["--lr", "0"], ["--data", "digits"], ["--out", "x"], ["--set", "sgd.lr=1"]]
)
def test_settings_cannot_change_when_a_run_goes_on(option: list[str], left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = f"--resume: takes its settings from the run in {left}, and no {option[0]}"
    assert message in refusal(["--resume", str(left), *option], capsys)


def test_other_data_are_refused(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = checkpoint.read(left / CHECKPOINT)
    saved["data"]["digest"] = "another"
    checkpoint.write(left / CHECKPOINT, saved)
    assert "is not the data that" in refusal(["--resume", str(left)], capsys)


def test_other_versions_are_said_and_kept(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = checkpoint.read(left / CHECKPOINT)
    saved["versions"]["torch"] = "1.0"
    checkpoint.write(left / CHECKPOINT, saved)
    assert main(["train", "--resume", str(left), "--quiet"]) == 0
    said = f"deeprelax train: begun with torch 1.0, goes on with {torch.__version__}: bits may differ\n"
    assert capsys.readouterr().err == said
    versions = json.loads((left / RESULT).read_text())["versions"]
    assert (versions["torch"], versions["begun_with"]["torch"]) == (torch.__version__, "1.0")


def test_a_new_run_does_not_overwrite_the_results_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--seeds", "0", "--epochs", "1", "--quiet", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "has the results of another run; choose another folder" in refusal(["--seeds", "1", "--out", str(tmp_path)], capsys)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_run_does_not_overwrite_an_unfinished_one(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (left / CHECKPOINT).read_bytes()
    assert "has an unfinished run: --resume" in refusal(["--out", str(left)], capsys)
    assert (left / CHECKPOINT).read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="claims are by flock")
def test_two_processes_never_work_in_one_folder(left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (left / CHECKPOINT).read_bytes()
    with storage.claimed(left):
        assert f"--resume: another process is at work in {left}" in refusal(["--resume", str(left)], capsys)
        assert f"--out: another process is at work in {left}" in refusal(["--out", str(left)], capsys)
    assert (left / CHECKPOINT).read_bytes() == before
    with storage.claimed(left):  # a claim ends
        pass


def test_what_a_killed_process_left_of_a_checkpoint_is_removed_in_the_end(left: Path) -> None:
    (left / f"{CHECKPOINT}.tmp").write_bytes(b"half")
    assert main(["train", "--resume", str(left), "--quiet", "--checkpoint-every", "1e9"]) == 0
    assert sorted(path.name for path in left.iterdir()) == ["curves.png", "result.json", "seconds.json", "table.txt"]


def test_a_signal_while_the_results_are_written_waits_for_them(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = results.save

    def save(comparison: compare.Comparison, folder: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        real(comparison, folder)

    monkeypatch.setattr(results, "save", save)
    assert main(["train", "--resume", str(left), "--quiet"]) == 0
    assert not (left / CHECKPOINT).exists()


def test_a_run_goes_on_elsewhere(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may have moved, and the command be given in another one."""
    elsewhere = Path(shutil.move(left, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(elsewhere), "--quiet"]) == 0
    curve = json.loads((elsewhere / RESULT).read_text())["methods"]["entropy-sgd"]["curves"]["0"]
    assert curve["gradient_evaluations"] == [39]
