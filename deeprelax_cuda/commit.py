"""The commit of the package's source: recorded when the package is built, asked of git in a source tree.

Standard library only: setup.py runs this file where there is no torch.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

#: Written into the built package by setup.py; never in the source tree.
RECORD = "COMMIT"


def commit() -> str | None:
    """Return the 40 digits of the commit, with "-dirty" after them if the sources were changed since; None where unknown."""
    package = Path(__file__).parent
    record = package / RECORD
    return record.read_text(encoding="ascii").strip() if record.exists() else commit_of(package)


def commit_of(folder: Path) -> str | None:
    """Ask git for the commit of a source tree, given a folder of it that holds an ``__init__.py``.

    An installed package may lie inside a repository that is not its own, so git must know the file.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError):  # no git, or git does not know the file
        return None


def _git(folder: Path, *arguments: str) -> str:
    # A hook of another repository names that one in the environment; this question is about the folder's.
    env = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout.strip()
