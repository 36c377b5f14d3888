"""`deeprelax train`: what it computes, what it writes, and how it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deeprelax_cuda as dr

pytest.importorskip("sklearn", reason='needs the packages of "deeprelax_cuda[train]"')
pytest.importorskip("tqdm", reason='needs the packages of "deeprelax_cuda[train]"')
matplotlib_image = pytest.importorskip("matplotlib.image", reason='needs the packages of "deeprelax_cuda[train]"')

from matplotlib.colors import to_rgb  # noqa: E402

from deeprelax_cuda.cli import main  # noqa: E402
from deeprelax_cuda.train import compare, loop, report  # noqa: E402
from deeprelax_cuda.train.data import batches, batches_per_epoch, digits  # noqa: E402
from deeprelax_cuda.train.progress import Progress  # noqa: E402

METHODS = ("sgd", "entropy-sgd")
PER_EPOCH = 39  # 1,257 images in full batches of 32


@pytest.fixture(autouse=True)
def keep_threads():
    """The command chooses a number of threads for its process, which here is everybody's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(**changes: Any) -> compare.Settings:
    values: dict[str, Any] = {
        "data": "digits",
        "model": "mlp",
        "methods": METHODS,
        "seeds": (0,),
        "epochs": 2,
        "batch_size": 32,
    }
    return compare.Settings(**{**values, "eval_every": 1, "levels": (50.0,), "options": {}, **changes})


def comparison_of(curves: dict[str, list[loop.Curve]], levels: tuple[float, ...] = ()) -> compare.Comparison:
    """A comparison with these curves, one for each of the seeds 0, 1, ..."""
    seeds = tuple(range(len(next(iter(curves.values())))))
    trained = {name: compare.Trained({}, "nobody", dict(enumerate(of_seeds))) for name, of_seeds in curves.items()}
    return compare.Comparison(settings(methods=tuple(curves), seeds=seeds, levels=levels), trained)


def without_seconds(curve: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in curve.items() if name != "seconds"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A short comparison from the command line: its folder, what it printed, its JSON."""
    folder = tmp_path_factory.mktemp("run") / "not" / "there yet"
    out, err = io.StringIO(), io.StringIO()
    options = ["--epochs", "3", "--seeds", "0", "7", "--levels", "50", "0", "--gamma", "500", "--out", str(folder)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["train", "--data", "digits", "--method", *METHODS, *options])
    result = json.loads((folder / "result.json").read_text())
    return SimpleNamespace(status=status, folder=folder, out=out.getvalue(), err=err.getvalue(), result=result)


# What is written.


def test_a_run_leaves_the_json_and_the_picture_and_nothing_else(finished: SimpleNamespace) -> None:
    assert finished.status == 0
    assert sorted(path.name for path in finished.folder.iterdir()) == ["curves.png", "result.json"]


def test_json_holds_settings_curves_versions_and_backend(finished: SimpleNamespace) -> None:
    result = finished.result
    assert result["settings"] == {
        "data": "digits",
        "model": "mlp",
        "methods": list(METHODS),
        "seeds": [0, 7],
        "epochs": 3,
        "batch_size": 32,
        "eval_every": 1,
        "levels": [50.0, 0.0],
        "options": {"gamma": 500.0},
    }
    assert result["versions"] == {
        "deeprelax_cuda": dr.__version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    assert result["platform"]["threads"] == torch.get_num_threads()

    sgd, entropy_sgd = (result["methods"][name] for name in METHODS)
    assert (sgd["settings"]["lr"], sgd["settings"]["momentum"], sgd["settings"]["nesterov"]) == (0.1, 0.9, True)
    assert (entropy_sgd["settings"]["gamma"], entropy_sgd["settings"]["inner_steps"]) == (500.0, 20)
    assert sgd["backend"] == "torch"
    assert entropy_sgd["backend"].startswith(dr.backends.select("cpu", torch.float32).name)
    for method in (sgd, entropy_sgd):
        assert list(method["curves"]) == ["0", "7"]
        for curve in method["curves"].values():
            assert curve["gradient_evaluations"] == [PER_EPOCH, 2 * PER_EPOCH, 3 * PER_EPOCH]
            assert 0 < curve["seconds"][0] < curve["seconds"][1] < curve["seconds"][2]
            assert curve["train_loss"][0] > curve["train_loss"][1] > curve["train_loss"][2] > 0
            assert all(0 < error < 100 for error in curve["validation_error"])
        assert without_seconds(method["curves"]["0"]) != without_seconds(method["curves"]["7"])


def test_table_summarises_the_curves_of_the_json(finished: SimpleNamespace) -> None:
    rows = {name: cells for name, *cells in (re.split(r"\s{2,}", line) for line in finished.out.splitlines())}
    for position, name in enumerate(METHODS):
        finals = [curve["validation_error"][-1] for curve in finished.result["methods"][name]["curves"].values()]
        assert rows["final validation error, %"][position] == f"{statistics.mean(finals):.2f} +- {statistics.stdev(finals):.2f}"
    assert rows["gradient evaluations to 0 %"] == ["- (0 of 2)", "- (0 of 2)"]
    assert f"{finished.folder / 'result.json'}\n{finished.folder / 'curves.png'}\n" in finished.out


def test_picture_shows_both_methods(finished: SimpleNamespace) -> None:
    picture = torch.as_tensor(matplotlib_image.imread(finished.folder / "curves.png"))[..., :3]
    height, width, _ = picture.shape
    assert width > 1200
    assert height > 500
    assert picture[0, 0].tolist() == [1.0, 1.0, 1.0]
    for colour in report.COLOURS[: len(METHODS)]:
        drawn = (picture - torch.tensor(to_rgb(colour))).abs().amax(dim=-1) < 0.01
        assert drawn[:, : width // 2].any(), "not drawn against gradient evaluations"
        assert drawn[:, width // 2 :].any(), "not drawn against seconds"


def test_one_line_an_epoch_where_there_is_no_terminal(finished: SimpleNamespace) -> None:
    lines = finished.err.splitlines()
    assert len(lines) == 2 * 2 * 3
    assert lines[0].startswith("sgd, seed 0: epoch 1/3, loss ")
    assert lines[-1].startswith("entropy-sgd, seed 7: epoch 3/3, loss ")


def test_table_counts_the_seeds_that_reach_a_level() -> None:
    evaluations, seconds = [10, 20, 30], [1.0, 2.0, 3.0]
    fast = loop.Curve(evaluations, seconds, [1.0] * 3, [9.0, 4.0, 6.0])
    slow = loop.Curve(evaluations, seconds, [1.0] * 3, [9.0, 8.0, 7.0])
    lines = report.table(comparison_of({"both": [fast, slow], "one": [fast, fast]}, levels=(9.0, 5.0))).splitlines()
    table = {name: cells for name, *cells in (re.split(r"\s{2,}", line) for line in lines[1:])}
    assert table["final validation error, %"] == ["6.50 +- 0.71", "6.00 +- 0.00"]
    assert table["best validation error, %"] == ["5.50 +- 2.12", "4.00 +- 0.00"]
    assert table["gradient evaluations to 9 %"] == ["10 +- 0", "10 +- 0"]
    assert table["gradient evaluations to 5 %"] == ["20 (1 of 2)", "20 +- 0"]
    assert table["seconds to 5 %"] == ["2.00 (1 of 2)", "2.00 +- 0.00"]


def test_one_seed_has_no_deviation() -> None:
    assert "+-" not in report.table(comparison_of({"sgd": [loop.Curve([10], [1.0], [1.0], [3.0])]}, levels=(5.0,)))


@pytest.mark.parametrize(("lowest", "scale"), [(0.5, "log"), (0.0, "linear")])
def test_errors_are_on_a_logarithmic_axis_unless_one_is_zero(lowest: float, scale: str) -> None:
    figure = report.figure(comparison_of({"sgd": [loop.Curve([10, 20], [1.0, 2.0], [1.0, 1.0], [50.0, lowest])]}))
    assert [axes.get_yscale() for axes in figure.axes] == [scale, scale]
    assert [axes.get_xlabel() for axes in figure.axes] == ["gradient evaluations", "training time (s)"]


def test_band_reaches_from_the_lowest_to_the_highest_seed() -> None:
    curves = [loop.Curve([10, 20], [1.0, 2.0], [1.0, 1.0], errors) for errors in ([8.0, 1.0], [20.0, 6.0], [11.0, 5.0])]
    for axes in report.figure(comparison_of({"sgd": curves})).axes:
        assert list(axes.lines[0].get_ydata()) == [13.0, 4.0]
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert set(heights) == {8.0, 20.0, 1.0, 6.0}


def test_a_run_that_diverges_is_written_as_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--epochs", "1", "--seeds", "0", "--lr", "1e30", "--quiet", "--out", str(tmp_path)]
    assert main(["train", "--method", "sgd", *options]) == 0

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert math.isnan(float(result["methods"]["sgd"]["curves"]["0"]["train_loss"][0]))
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = comparison_of({"sgd": [loop.Curve([10], [1.0], [1.0], [3.0])]})
    report.save(comparison, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    comparison.methods["sgd"].curves[0].validation_error[0] = 4.0
    with pytest.raises(OSError, match="no space"):
        report.save(comparison, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What is computed.


def test_digits_are_split_by_class_always_the_same_way() -> None:
    data, again = digits(), digits()
    assert data.train_inputs.shape == (1257, 1, 8, 8)
    assert data.val_inputs.shape == (540, 1, 8, 8)
    assert data.train_inputs.dtype == torch.float32
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(vars(data).values(), vars(again).values(), strict=True) if torch.is_tensor(a))
    share = data.val_targets.bincount() / (data.val_targets.bincount() + data.train_targets.bincount())
    assert ((share - 540 / 1797).abs() < 0.01).all()
    assert batches_per_epoch(data, 32) == PER_EPOCH


def test_an_epoch_shows_each_image_at_most_once_in_full_batches() -> None:
    data = digits()
    order = compare.data_order(3)
    epochs = [list(batches(data, 32, order)) for _ in range(2)]
    for epoch in epochs:
        inputs = torch.cat([inputs for inputs, _ in epoch])
        assert [len(targets) for _, targets in epoch] == [32] * PER_EPOCH
        assert len(inputs.flatten(1).unique(dim=0)) == len(inputs)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_methods_start_from_the_same_weights_and_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    seen: list[torch.Tensor] = []
    real_step = loop.gradient_step

    def watched_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> torch.Tensor:
        if len(seen) % (PER_EPOCH + 1) == 0:
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        seen.append(batch[0])
        return real_step(model, optimizer, *batch)

    monkeypatch.setattr(loop, "gradient_step", watched_step)
    both = settings(seeds=(0, 1), epochs=1)
    compare.compare(compare.Comparison(both, {name: compare.Trained({}, "", {}) for name in METHODS}), data, quiet=True)
    runs = [seen[i : i + PER_EPOCH + 1] for i in range(0, len(seen), PER_EPOCH + 1)]
    assert len(runs) == 4
    for sgd, entropy_sgd in (runs[:2], runs[2:]):
        assert all(torch.equal(a, b) for a, b in zip(sgd, entropy_sgd, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_the_same_run_again_gives_the_same_curves(finished: SimpleNamespace) -> None:
    again = settings(seeds=(7,), epochs=3, options={"gamma": 500.0})
    data = digits()
    comparison = compare.rehearse(again, data)
    torch.rand(5)  # the global generator is elsewhere now, and that must not matter
    compare.compare(comparison, data, quiet=True)
    for name in METHODS:
        curve = asdict(comparison.methods[name].curves[7])
        assert without_seconds(curve) == without_seconds(finished.result["methods"][name]["curves"]["7"])


@pytest.mark.parametrize("method", METHODS)
def test_training_is_bit_identical_with_and_without_evaluation(method: str) -> None:
    data = digits()
    outcomes = []
    for eval_every in (1, 3):
        model, optimizer = compare.build(method, 0, settings(), data)
        curve = loop.train(
            model,
            optimizer,
            data,
            order=compare.data_order(0),
            epochs=3,
            batch_size=32,
            eval_every=eval_every,
            progress=Progress(),
        )
        state = [value for tensors in optimizer.state.values() for value in tensors.values() if torch.is_tensor(value)]
        outcomes.append(([*model.parameters(), *state], curve))
    (often, curve_often), (once, curve_once) = outcomes
    assert len(often) > 6
    assert all(torch.equal(a, b) for a, b in zip(often, once, strict=True))
    assert len(curve_often.validation_error) == 3
    assert curve_once.gradient_evaluations == [3 * PER_EPOCH]
    assert curve_once.validation_error == curve_often.validation_error[-1:]


def test_entropy_sgd_is_evaluated_at_its_anchor_in_evaluation_mode() -> None:
    data = digits()
    model, optimizer = compare.build("entropy-sgd", 0, settings(), data)
    for _, (inputs, targets) in zip(range(27), batches(data, 32, compare.data_order(0)), strict=False):
        loop.gradient_step(model, optimizer, inputs, targets)
    parameters = list(model.parameters())
    live = [p.detach().clone() for p in parameters]
    anchors = [optimizer.state[p]["anchor"].clone() for p in parameters]
    assert not any(torch.equal(y, x) for y, x in zip(live, anchors, strict=True))
    with loop.at_answer(model, optimizer):
        assert not model.training
        assert all(torch.equal(p, x) for p, x in zip(parameters, anchors, strict=True))
    assert model.training
    assert all(torch.equal(p, y) for p, y in zip(parameters, live, strict=True))


def test_validation_error_counts_every_example(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    monkeypatch.setattr(loop, "EVALUATION_CHUNK", 7)

    def always_three(inputs: torch.Tensor) -> torch.Tensor:
        return torch.eye(10)[3].expand(len(inputs), 10)

    error = loop.validation_error(always_three, data)  # type: ignore[arg-type]
    assert error == 100.0 * int((data.val_targets != 3).sum()) / 540


@pytest.mark.slow
def test_both_methods_end_below_four_percent(tmp_path: Path) -> None:
    assert main(["train", "--quiet", "--seeds", "0", "1", "2", "3", "4", "--out", str(tmp_path)]) == 0
    methods = json.loads((tmp_path / "result.json").read_text())["methods"]
    finals = {name: [c["validation_error"][-1] for c in methods[name]["curves"].values()] for name in METHODS}
    assert all(error < 4.0 for errors in finals.values() for error in errors), finals


# What is seen, and what is refused.


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "adam"], "--method: invalid choice: 'adam'"),
        (["--data", "imagenet"], "--data: invalid choice: 'imagenet'"),
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got 0"),
        (["--epochs", "1.5"], "--epochs: expected a whole number of at least 1, got 1.5"),
        (["--seeds", "-1"], "--seeds: expected a whole number in [0, 2**64), got -1"),
        (["--seeds", "1", "1"], "--seeds: expected each only once, got 1 1"),
        (["--batch-size", "2000"], "--batch-size: 2000 is more than the 1257 training examples"),
        (["--method", "sgd", "--gamma", "10"], "--gamma: not an option of sgd"),
        (["--lr", "-1"], "sgd: Invalid learning rate: -1.0"),
        (["--inner-steps", "0"], "entropy-sgd: inner_steps"),
        (["--backend", "abacus"], "entropy-sgd: backend"),
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


def test_an_interrupted_run_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", interrupt)
    assert main(["train", "--quiet", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ndeeprelax train: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


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


def test_help_needs_none_of_the_optional_packages() -> None:
    done = python("""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "sklearn")))
from deeprelax_cuda.cli import main
main(["train", "--help"])
""")
    assert done.returncode == 0
    assert "--inner-steps" in done.stdout


def test_import_brings_in_nothing_of_the_command_line() -> None:
    done = python("""
import sys, deeprelax_cuda
absent = ("deeprelax_cuda.train", "deeprelax_cuda.cli", "sklearn", "matplotlib")
print([name for name in sys.modules if name.startswith(absent)])
""")
    assert done.stdout == "[]\n"


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "deeprelax_cuda", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"deeprelax_cuda {dr.__version__}\n"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
