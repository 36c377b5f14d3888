"""The optimizers estimate grad u on a GPU, by every backend, and all with the same bits."""

from __future__ import annotations

import pytest
from device_runs import DEVICE, NEEDS_GPU

from deeprelax_cuda import backends

pytest.importorskip("scipy")  # the solvers', not the optimizers'
from deeprelax_cuda.pde import verify

pytestmark = NEEDS_GPU


def test_the_estimates_agree_on_every_backend() -> None:
    rows = verify.verify(DEVICE)
    assert {row.backend for row in rows} == set(backends.available(DEVICE))
    assert all(row.agrees for row in rows), verify.table(rows)
