"""`deeprelax train` as a command: what is seen, what is written, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_runs import PER_EPOCH, rows_of

import deeprelax_cuda as dr
from deeprelax_cuda.cli import main
from deeprelax_cuda.machine import versions
from deeprelax_cuda.train import methods

METHODS = ("sgd", "entropy-sgd")
FILES = ["curves.png", "result.json", "seconds.json", "table.txt"]

pytestmark = pytest.mark.usefixtures(
    "one_thread", "process_settings"
)  # the command sets threads for its process, which here is everybody's


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A short comparison from the command line: its folder, what it printed, its JSON."""
    folder = tmp_path_factory.mktemp("run") / "not" / "there yet"
    out, err = io.StringIO(), io.StringIO()
    options = ["--epochs", "3", "--seeds", "0", "7", "--levels", "50", "0", "--gamma", "500", "--weight-decay", "1e-4"]
    more = [
        "--set",
        "entropy-sgd.averaging=linear",
        "entropy-sgd.gamma_min=0x10",
        "sgd.lr=0.05",
        "--out",
        str(folder),
        "--eval-every",
        "1.5",
    ]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["train", "--data", "digits", *options, *more])
    result = json.loads((folder / "result.json").read_text())
    return SimpleNamespace(status=status, folder=folder, out=out.getvalue(), err=err.getvalue(), result=result)


# What is written and seen.


def test_a_run_leaves_its_four_files_and_nothing_else(finished: SimpleNamespace) -> None:
    assert finished.status == 0
    assert sorted(path.name for path in finished.folder.iterdir()) == FILES


def test_json_holds_settings_curves_versions_and_backend(finished: SimpleNamespace) -> None:
    result = finished.result
    assert result["settings"] == {
        "data": "digits",
        "model": "mlp",
        "methods": list(METHODS),
        "seeds": [0, 7],
        "epochs": 3,
        "batch_size": 32,
        "eval_every": 1.5,
        "levels": [50.0, 0.0],
        "schedule": {"kind": "constant", "drops": [], "factor": 1.0},
        "dtype": "float32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": 1,
        "options": {
            "sgd": {"weight_decay": 1e-4, "lr": 0.05},
            "entropy-sgd": {"weight_decay": 1e-4, "gamma": 500.0, "averaging": "linear", "gamma_min": 16},
        },
    }
    assert result["versions"] == versions()
    assert result["versions"]["torch"] == torch.__version__
    assert result["platform"]["threads"] == 1
    assert (result["data"]["train_examples"], result["data"]["val_examples"]) == (1257, 540)
    assert len(result["data"]["digest"]) == 64

    sgd, entropy_sgd = (result["methods"][name] for name in METHODS)
    assert (sgd["settings"]["lr"], sgd["settings"]["momentum"], sgd["settings"]["nesterov"]) == (0.05, 0.9, True)
    assert (entropy_sgd["settings"]["gamma"], entropy_sgd["settings"]["averaging"]) == (500.0, "linear")
    assert sgd["backend"] == "torch"
    assert entropy_sgd["backend"].startswith(dr.backends.select(result["settings"]["device"], torch.float32).name)
    for method in (sgd, entropy_sgd):
        assert list(method["curves"]) == ["0", "7"]
        for curve in method["curves"].values():
            assert curve["gradient_evaluations"] == [round(1.5 * PER_EPOCH), 3 * PER_EPOCH]
            assert curve["train_loss"][0] > curve["train_loss"][1] > 0
            assert all(0 < error < 100 for error in curve["validation"])
        assert method["curves"]["0"] != method["curves"]["7"]


def test_what_is_printed_is_the_stored_table_and_where_the_files_are(finished: SimpleNamespace) -> None:
    text = (finished.folder / "table.txt").read_text()
    assert finished.out.startswith(text)
    assert finished.out.endswith("\n".join(str(finished.folder / n) for n in (FILES[1], FILES[2], FILES[3], FILES[0])) + "\n")
    rows = rows_of(text)
    for position, name in enumerate(METHODS):
        finals = [curve["validation"][-1] for curve in finished.result["methods"][name]["curves"].values()]
        assert rows["final validation error, %"][position].startswith(f"{sum(finals) / 2:.2f} +- ")
    assert rows["gradient evaluations to 0 %"] == ["- (0 of 2)", "- (0 of 2)"]


def test_one_line_an_epoch_where_there_is_no_terminal(finished: SimpleNamespace) -> None:
    """And one for each evaluation, with its error; time left at the end of each."""
    lines = finished.err.splitlines()
    epochs = [line.partition(": epoch ")[2].partition(",")[0] for line in lines if line.startswith("sgd, seed 0: ")]
    assert epochs == ["1/3", "1.487/3", "2/3", "3/3"]
    assert len(lines) == 2 * 2 * 4
    assert "loss" in lines[0]
    assert "error" not in lines[0]
    assert "error" in lines[1]
    assert lines[-1].startswith("entropy-sgd, seed 7: epoch 3/3, loss ")
    assert lines[-1].endswith(" s, 0 s left")


def test_a_terminal_gets_a_bar_with_loss_error_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "--method", "sgd", "--epochs", "2", "--seeds", "0", "--out", str(tmp_path)]) == 0
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert last.startswith("sgd, seed 0: 100%")
    for part in (f"{2 * PER_EPOCH}/{2 * PER_EPOCH}", "<00:00", "loss ", "error "):
        assert part in last


def test_a_run_that_diverges_is_reported_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--epochs", "1", "--seeds", "0", "--lr", "1e30", "--quiet", "--out", str(tmp_path)]
    assert main(["train", "--method", "sgd", *options]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert math.isnan(float(result["methods"]["sgd"]["curves"]["0"]["train_loss"][0]))
    assert capsys.readouterr().err == ""


# What is refused.


def test_all_methods_at_once_make_one_table_and_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "all"
    assert main(["train", "--method", "all", "--seeds", "0", "--epochs", "1", "--quiet", "--out", str(folder)]) == 0
    heads = capsys.readouterr().out.splitlines()[2].split()
    assert heads == list(methods.METHODS) == list(json.loads((folder / "result.json").read_text())["methods"])
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "adam"], "--method: invalid choice: 'adam'"),
        (["--data", "imagenet"], "--data: invalid choice: 'imagenet'"),
        (["--epochs", "0"], "--epochs: expected a whole number from 1 to 1000000, got 0"),
        (["--epochs", "1.5"], "--epochs: expected a whole number from 1 to 1000000, got 1.5"),
        (["--eval-every", "0"], "--eval-every: expected a number above 0, got 0"),
        (["--levels", "5", "inf"], "--levels: expected a finite number, got inf"),
        (["--set", "sgd.maximize={1}"], "sgd: "),
        (["--checkpoint-every", "inf"], "--checkpoint-every: expected a finite number, got inf"),
        (["--seeds", "-1"], "--seeds: expected a whole number in [0, 2**64), got -1"),
        (["--seeds", "1", "1"], "--seeds: expected each only once, got 1 1"),
        (["--method", "all", "sgd"], "--method: all stands for every method, got it with sgd"),
        (["--method", "controlled-sgd", "--scoping", "1"], "--scoping: not an option of controlled-sgd"),
        (["--method", "hj", "--temperature", "1"], "--temperature: not an option of hj"),
        (["--method", "sgd", "sgd"], "--method: expected each only once, got sgd sgd"),
        (["--batch-size", "2000"], "--batch-size: 2000 is more than the 1257 training examples"),
        (["--method", "sgd", "--gamma", "10"], "--gamma: not an option of sgd"),
        (["--method", "sgd", "--set", "entropy-sgd.gamma=10"], "--set: entropy-sgd is none of the methods sgd"),
        (["--set", "sgd.lr"], "--set: expected METHOD.OPTION=VALUE, got sgd.lr"),
        (["--set", "lr=1"], "--set: expected METHOD.OPTION=VALUE, got lr=1"),
        (["--set", "sgd.depth=1"], "sgd: SGD.__init__() got an unexpected keyword argument 'depth'"),
        (["--lr", "-1"], "sgd: Invalid learning rate: -1.0"),
        (["--lr", "nan"], "--lr: expected a number, got nan"),
        (["--threads", "100000"], "--threads: expected a whole number from 1 to 1024, got 100000"),
        (
            ["--epochs", "5", "--lr-schedule", "step", "--lr-drops", "2", "5"],
            "--lr-drops: 5 is not before the end, after 5 epochs",
        ),
        (["--lr-schedule", "step"], "--lr-schedule step: needs --lr-drops EPOCH..."),
        (["--lr-drops", "3"], "--lr-drops: needs --lr-schedule step"),
        (["--lr-schedule", "cosine", "--lr-factor", "0.5"], "--lr-factor: needs --lr-schedule step"),
        (["--inner-steps", "0"], "entropy-sgd: inner_steps"),
        (["--rounding", "stochastic"], "--rounding: needs --dtype bfloat16"),
        (["--master-weights", "--dtype", "float32"], "--master-weights: needs --dtype bfloat16"),
        (["--backend", "abacus"], "entropy-sgd: backend"),
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got abacus"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got meta"),
        (["--device", "cuda:99"], "--device: cuda:99 cannot be used: "),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_get_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "new"), *options])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("deeprelax train: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("deeprelax train: --out: ")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_missing_packages_are_named_with_the_extra_that_has_them(tmp_path: Path) -> None:
    done = python(f"""
import sys
from deeprelax_cuda.cli import main
for package in ("matplotlib", "tqdm", "sklearn"):
    kept = {{name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}}
    sys.modules[package] = None
    print(main(["train", "--out", {str(tmp_path / "new")!r}]))
    del sys.modules[package]
    sys.modules.update(kept)
""")
    assert done.stderr.splitlines() == [
        f'deeprelax train: {package} is not installed: pip install "deeprelax_cuda[train]"'
        for package in ("matplotlib", "tqdm", "sklearn")
    ]
    assert done.stdout.split() == ["2", "2", "2"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["train", "report"])
@pytest.mark.slow
def test_help_needs_none_of_the_optional_packages(command: str) -> None:
    done = python(f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "sklearn", "tqdm", "numpy")))
from deeprelax_cuda.cli import main
main([{command!r}, "--help"])
""")
    assert done.returncode == 0
    assert "--levels" in done.stdout


@pytest.mark.slow
def test_import_brings_in_nothing_of_the_command_line() -> None:
    done = python("""
import sys, deeprelax_cuda
absent = ("deeprelax_cuda.train", "deeprelax_cuda.cli", "sklearn", "matplotlib")
print([name for name in sys.modules if name.startswith(absent)])
""")
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "deeprelax_cuda", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"deeprelax_cuda {dr.__version__}\n"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
