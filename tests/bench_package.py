"""The benchmarks of the source tree under the name that they have in the package, whether or not that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "bench"
NAME = "deeprelax_cuda.bench"


def bench(module: str) -> ModuleType:
    """Import a module of the benchmarks."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(f"{NAME}.{module}")
