"""The scripts that make what is kept: the constants of the Gaussian and the golden file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.mark.slow
def test_the_constants_are_derived_again_and_their_errors_checked_exhaustively():
    done = subprocess.run([sys.executable, TOOLS / "derive_gaussian.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_golden_file_is_what_the_oracle_gives():
    done = subprocess.run([sys.executable, TOOLS / "make_golden.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
