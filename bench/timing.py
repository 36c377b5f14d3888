"""What the benchmarks make of their samples: medians and quartiles, bandwidths, and a file that is whole at any time."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median and the quartiles of some samples."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds] * 3
    return {"median_s": statistics.median(seconds), "quartiles_s": quartiles}


def rates(elements: int, bytes_per_element: float, median: float) -> dict[str, float]:
    """Return how many elements and bytes a second a median of so many seconds is."""
    return {"elements_per_s": elements / median, "bytes_per_s": bytes_per_element * elements / median}


def write_rows(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``head`` and ``rows`` as one JSON object, a row a line; who is stopped meanwhile leaves the file of before."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    text = "\n".join(["{", *lines, ' "rows": [', ",\n".join(f"  {json.dumps(row)}" for row in rows), " ]", "}"]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
