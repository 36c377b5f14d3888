"""A comparison as files: what the settings determine in one, what the clock said in the other."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deeprelax_cuda import storage
from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.train.compare import Comparison, Settings, Trained
from deeprelax_cuda.train.datasets import DATASETS
from deeprelax_cuda.train.loop import Curve

#: Settings, versions and curves over gradient evaluations: the same bytes whenever the same comparison is made again.
RESULT = "result.json"
#: The seconds of the same curves.
SECONDS = "seconds.json"

#: The fields of a `Curve` that are seconds.
TIMED = ("seconds", "parts")


def save(comparison: Comparison, folder: Path) -> None:
    """Write the two files into ``folder``, which exists."""
    result = asdict(comparison)
    seconds: dict[str, Any] = {}
    for name, trained in result["methods"].items():
        seconds[name] = {seed: {field: curve.pop(field) for field in TIMED} for seed, curve in trained["curves"].items()}
    for file, content in ((RESULT, result), (SECONDS, {"methods": seconds})):
        storage.write(folder / file, (json.dumps(_jsonable(content), indent=1, allow_nan=False) + "\n").encode())


def load(folder: Path) -> Comparison:
    """Return the comparison that was saved in ``folder``.

    Raises:
        UsageError: a file that is not there, or not one of these, in one line.
    """
    result, seconds = (_read(folder / file) for file in (RESULT, SECONDS))
    try:
        methods = {
            name: Trained(
                trained["settings"],
                trained["backend"],
                {
                    int(seed): Curve(**_numbers({**curve, **seconds["methods"][name][seed]}))
                    for seed, curve in trained["curves"].items()
                },
            )
            for name, trained in result["methods"].items()
        }
        settings = Settings.of(result["settings"])
        if settings.data not in DATASETS:  # what was measured is not known then
            raise KeyError(settings.data)
        return Comparison(settings, result["data"], result["versions"], result["platform"], methods)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{folder}: {RESULT} and {SECONDS} are not those of a run of this version: {error!r}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _jsonable(value: Any) -> Any:
    """Name the numbers JSON has no form for, as ``float`` reads them: "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(curve: dict[str, Any]) -> dict[str, Any]:
    """Return a curve with its numbers, the named ones included."""
    return {
        field: [float(item) if isinstance(item, str) else item for item in values] if isinstance(values, list) else values
        for field, values in curve.items()
    }
