"""The CUDA kernels' own source on the host: the bits of the CPU backend, and nothing that AddressSanitizer or UBSan reports.

The launcher and the bodies of csrc/cuda hold no CUDA; tests/cpp/host_device.cpp loops over the blocks and threads of a launch.
The cases are those of host_program.py, whose groups run in processes of their own, as a sanitizer ends the process it finds
fault with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import TESTS, build, missing, sanitized_environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


def check(folder: Path, group: str, sanitized: bool) -> None:
    if reason := missing(sanitized):
        pytest.skip(reason)
    command = [sys.executable, TESTS / "host_program.py", build(folder, sanitized), group]
    env = sanitized_environment() if sanitized else {**os.environ}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*said[-60:], done.stderr[:6000]])
    assert said[-1].startswith("all of ")
    assert said[-1] != "all of 0 cases passed"


@pytest.mark.slow
def test_few_cases_of_everything(folder: Path) -> None:
    check(folder, "few", sanitized=False)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["cases", "offsets", "lists", "huge", "clock", "drawn"])
def test_sanitized(group: str, folder: Path) -> None:
    check(folder, group, sanitized=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("unaligned", "misaligned address"),
        ("beyond", "use-after-poison"),
    ],
)
def test_a_fault_is_reported(fault: str, report: str, folder: Path) -> None:
    """The sanitizers are on: a 16-byte access at another address, and one beyond the end of a tensor, end the process."""
    with pytest.raises(AssertionError, match=report):
        check(folder, fault, sanitized=True)
