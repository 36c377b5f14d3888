"""What the source tree keeps elsewhere than the package does, under the names that it has there, installed or not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def source_package(folder: str) -> None:
    """Have ``deeprelax_cuda.<folder>`` be that folder of the source tree."""
    name = f"deeprelax_cuda.{folder}"
    if name not in sys.modules:
        path = ROOT / folder
        spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def bench(module: str) -> ModuleType:
    """Import a module of the benchmarks."""
    source_package("bench")
    return importlib.import_module(f"deeprelax_cuda.bench.{module}")
