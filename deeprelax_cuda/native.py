"""The compiled module, where there is one: without a compiler at installation the package runs on torch alone."""

from __future__ import annotations

import importlib
from typing import Any

module: Any = None
#: Why there is no module, None where there is one.
missing: str | None = None

try:
    module = importlib.import_module("deeprelax_cuda._native")
except ImportError as error:  # not built, or built for another Python: kept, and said when somebody asks
    missing = str(error)
