"""What `deeprelax train` and `deeprelax report` write about comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import comparison_of, curve_of, rows_of

from deeprelax_cuda.cli import UsageError, main
from deeprelax_cuda.train import report, results
from deeprelax_cuda.train.compare import Comparison

matplotlib_image = pytest.importorskip("matplotlib.image")

from matplotlib.colors import to_rgb  # noqa: E402


def table_of(made: Comparison, **options: Any) -> dict[str, list[str]]:
    return rows_of(report.table(report.report_of({"run": made}, **options)))


# The table.


def test_table_counts_the_seeds_that_reach_a_level() -> None:
    fast, slow = curve_of([9.0, 4.0, 6.0]), curve_of([9.0, 8.0, 7.0])
    table = table_of(comparison_of({"both": [fast, slow], "one": [fast, fast]}, levels=(9.0, 5.0, 1.0)))
    assert table["final validation error, %"] == ["6.50 +- 0.71", "6.00 +- 0.00"]
    assert table["best validation error, %"] == ["5.50 +- 2.12", "4.00 +- 0.00"]
    assert table["gradient evaluations to 9 %"] == ["10 +- 0", "10 +- 0"]
    assert table["gradient evaluations to 5 %"] == ["20 (1 of 2)", "20 +- 0"]
    assert table["seconds to 5 %"] == ["2.00 (1 of 2)", "2.00 +- 0.00"]
    assert table["gradient evaluations to 1 %"] == ["- (0 of 2)", "- (0 of 2)"]


def test_table_says_where_the_time_went() -> None:
    """The parts are of the whole run; 3 s over 30 gradient evaluations are 100 ms each."""
    table = table_of(comparison_of({"sgd": [curve_of([9.0, 4.0, 6.0])]}))
    assert table["training seconds"] == ["3.00"]
    assert table["ms per gradient evaluation"] == ["100.00"]
    assert table["forward and backward"] == ["80.00"]
    assert table["optimizer"] == ["10.00"]
    assert table["data"] == ["10.00"]
    assert table["time over forward and backward, %"] == ["25.0"]


def test_other_levels_can_be_asked_for() -> None:
    table = table_of(comparison_of({"sgd": [curve_of([9.0, 4.0])]}, levels=(5.0,)), levels=(8.5,))
    assert "gradient evaluations to 8.5 %" in table
    assert "gradient evaluations to 5 %" not in table


def test_perplexity_has_no_unit() -> None:
    table = table_of(comparison_of({"sgd": [curve_of([9.0, 4.0])]}, data="text", levels=(5.0,)))
    assert table["final validation perplexity"] == ["4.00"]
    assert table["gradient evaluations to 5"] == ["20"]


def test_runs_that_diverged_are_in_the_table(tmp_path: Path) -> None:
    lost = comparison_of({"sgd": [curve_of([math.inf, math.nan]), curve_of([math.inf, 4.0])]}, data="text", levels=(5.0,))
    table = table_of(lost)
    assert table["final validation perplexity"] == ["nan +- nan"]
    assert table["gradient evaluations to 5"] == ["20 (1 of 2)"]
    report.figure(report.report_of({"run": lost})).savefig(tmp_path / "curves.png")


# The picture.


@pytest.mark.parametrize(("lowest", "scale"), [(0.5, "log"), (0.0, "linear")])
def test_errors_are_on_a_logarithmic_axis_unless_one_is_zero(lowest: float, scale: str) -> None:
    figure = report.figure(report.report_of({"run": comparison_of({"sgd": [curve_of([50.0, lowest])]})}))
    assert [axes.get_yscale() for axes in figure.axes] == [scale, scale]
    assert [axes.get_xlabel() for axes in figure.axes] == ["gradient evaluations", "training time (s)"]
    assert figure.axes[0].get_ylabel() == "validation error (%)"


@pytest.mark.parametrize(
    ("values", "scale"), [([math.inf, math.inf], "linear"), ([4.0, math.inf], "log"), ([4.0, math.nan], "log")]
)
def test_runs_that_diverged_are_drawn_as_far_as_they_can_be(values: list[float], scale: str, tmp_path: Path) -> None:
    made = report.report_of({"run": comparison_of({"sgd": [curve_of(values)]})})
    assert report.figure(made).axes[0].get_yscale() == scale
    report.write(made, tmp_path)


def test_band_reaches_from_the_lowest_to_the_highest_seed() -> None:
    curves = [curve_of(errors, [1.0 * i, 2.0 * i]) for i, errors in enumerate(([8.0, 1.0], [20.0, 6.0], [11.0, 5.0]), 1)]
    by_evaluations, by_seconds = report.figure(report.report_of({"run": comparison_of({"sgd": curves})})).axes
    for axes, times in ((by_evaluations, [10, 20]), (by_seconds, [2.0, 4.0])):
        assert list(axes.lines[0].get_xdata()) == times
        assert list(axes.lines[0].get_ydata()) == [13.0, 4.0]
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert set(heights) == {8.0, 20.0, 1.0, 6.0}


def test_picture_shows_every_method_in_both_panels(tmp_path: Path) -> None:
    made = comparison_of({name: [curve_of([9.0 + i, 4.0 + i])] for i, name in enumerate(("a", "b", "c", "d", "e"))})
    report.write(report.report_of({"run": made}), tmp_path)
    picture = torch.as_tensor(matplotlib_image.imread(tmp_path / report.PICTURE))[..., :3]
    height, width, _ = picture.shape
    assert width > 2000
    assert height > 800
    assert picture[0, 0].tolist() == [1.0, 1.0, 1.0]
    for colour in report.COLOURS[:5]:
        drawn = (picture - torch.tensor(to_rgb(colour))).abs().amax(dim=-1) < 0.01
        assert drawn[:, : width // 2].any(), "not drawn against gradient evaluations"
        assert drawn[:, width // 2 :].any(), "not drawn against seconds"


# Saved and read again.


def test_a_comparison_is_read_as_it_was_saved(tmp_path: Path) -> None:
    made = comparison_of({"sgd": [curve_of([9.0, math.nan]), curve_of([math.inf, 2.0])], "entropy-sgd": [curve_of([3.0])]})
    results.save(made, tmp_path)
    again = results.load(tmp_path)
    assert again.settings == made.settings
    assert repr(again) == repr(made)


def test_results_are_strict_json_and_seconds_are_apart(tmp_path: Path) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    results.save(comparison_of({"sgd": [curve_of([math.inf, math.nan], [1.25, 2.5])]}), tmp_path)
    texts = [(tmp_path / name).read_text() for name in (results.RESULT, results.SECONDS)]
    result, seconds = (json.loads(text, parse_constant=refuse) for text in texts)
    curve = result["methods"]["sgd"]["curves"]["0"]
    assert curve == {"gradient_evaluations": [10, 20], "train_loss": [1.0, 1.0], "validation": ["inf", "nan"]}
    assert seconds["methods"]["sgd"]["0"]["seconds"] == [1.25, 2.5]
    assert set(seconds["methods"]["sgd"]["0"]["parts"]) == {"data", "forward_backward", "optimizer"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (results.RESULT, None, "result.json: No such file or directory"),
        (results.SECONDS, None, "seconds.json: No such file or directory"),
        (results.RESULT, "{", "result.json: not JSON: "),
        (results.RESULT, "[]", "result.json: expected a JSON object, got list"),
        (results.RESULT, '{"settings": {}}', "result.json and seconds.json are not those of a run of this version: "),
        (
            results.RESULT,
            '{"methods": {}, "settings": {"data": "x", "schedule": {"drops": []}}}',
            "are not those of a run of this version: ",
        ),
        (results.SECONDS, '{"methods": {}}', "result.json and seconds.json are not those of a run of this version: "),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(
    file: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.save(comparison_of({"sgd": [curve_of([9.0])]}), tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# Several runs together.


def test_columns_are_labelled_with_what_tells_them_apart() -> None:
    curves = {"sgd": [curve_of([9.0])], "entropy-sgd": [curve_of([8.0])]}
    one, two, other_model = comparison_of(curves), comparison_of(curves), comparison_of(curves, model="lenet")
    only = comparison_of({"sgd-ema": [curve_of([7.0])]})

    def labels(**made: Comparison) -> list[str]:
        return [column.label for column in report.report_of(made).columns]

    assert labels(a=one) == ["sgd", "entropy-sgd"]
    assert labels(a=one, b=only) == ["sgd", "entropy-sgd", "sgd-ema"]
    assert labels(a=one, b=two) == ["sgd (a)", "entropy-sgd (a)", "sgd (b)", "entropy-sgd (b)"]
    assert labels(a=one, b=other_model) == ["mlp sgd", "mlp entropy-sgd", "lenet sgd", "lenet entropy-sgd"]
    assert labels(a=one, b=other_model, c=only)[-1] == "mlp sgd-ema"
    assert "mlp sgd (a)" in labels(a=one, b=other_model, c=two)


def test_runs_on_other_data_are_refused() -> None:
    one, other = comparison_of({"sgd": [curve_of([9.0])]}), comparison_of({"sgd": [curve_of([9.0])]})
    other.data["digest"] = "ff"
    with pytest.raises(UsageError, match=r"^b: a run on other data \(digits, ff\) than a \(digits, 00\)$"):
        report.report_of({"a": one, "b": other})


def test_report_makes_table_and_picture_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.save(comparison_of({"sgd": [curve_of([9.0, 4.0])]}, levels=(5.0,)), tmp_path / name)
    assert main(["report", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "one" / report.TABLE).read_text()
    assert text.startswith(
        "digits, mlp: 1257 examples to train on, 540 to validate; 2 epochs of 39 gradient evaluations; seeds 0"
    )
    assert rows_of(text)["seconds to 5 %"] == ["2.00"]
    assert printed.startswith(text)
    assert (tmp_path / "one" / report.PICTURE).exists()

    out = tmp_path / "both" / "of them"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out), "--levels", "4.5"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [report.PICTURE, report.TABLE]
    rows = rows_of((out / report.TABLE).read_text())
    assert rows["gradient evaluations to 4.5 %"] == ["20", "20"]
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "one"), str(tmp_path / "one")])
    assert "expected each run only once" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.save(comparison_of({"sgd": [curve_of([9.0])]}), tmp_path)
    (tmp_path / report.TABLE).mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("deeprelax report: --out: ")
