"""`deeprelax pde`: the files, what the pictures show, and that their numbers are those of the theory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb  # noqa: E402

from deeprelax_cuda import pde_command  # noqa: E402
from deeprelax_cuda.cli import main  # noqa: E402
from deeprelax_cuda.colours import COLOURS  # noqa: E402
from deeprelax_cuda.pde import Grid, double_well, heat, local_entropy, moreau_envelope, pictures, rugged, valleys, verify  # noqa: E402
from deeprelax_cuda.pde.studies import Columns, minima  # noqa: E402

#: The studies at a lower resolution.
COARSE: dict[str, dict[str, Any]] = {
    "relaxations-1d": {"points": 513},
    "landscape-2d": {"points": 81},
    "control": {"points": 257, "steps": 200},
    "widening": {"points": 2049, "times": np.geomspace(1e-4, 10.0, 21)},
    "relaxation": {"points": 129, "times": (0.0, *np.geomspace(1e-3, 1.0, 19))},
}


def coarse(name: str) -> pictures.Picture:
    picture = pictures.PICTURES[name]
    assert isinstance(picture.study, partial)
    arguments = {**dict(zip(("times",), picture.study.args, strict=False)), **picture.study.keywords}
    return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("pde")
