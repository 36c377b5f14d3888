"""What all tests share. The last line of a run says how many mutants were caught: tests marked `mutant` pass where they are."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from source_packages import source_package
from triton_interpreter import prepare_once

OF = "mutant of"

# Without a GPU, Triton's interpreter runs the kernels of the triton backend; Triton looks at this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        prepare_once()
if importlib.util.find_spec("deeprelax_cuda.triton_kernels") is None:
    source_package("triton_kernels")


# Test processes side by side share the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if any(isinstance(value, str) and value == "triton" for value in params.values()):
            item.add_marker(pytest.mark.slow)  # the interpreter is
        if marker := item.get_closest_marker("mutant"):
            item.user_properties.append((OF, marker.args[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended: dict[str, tuple[str, bool]] = {}  # by test: one that passes and then fails to clean up has two reports
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            if of := dict(getattr(report, "user_properties", ())).get(OF):  # a file that failed to load has none
                ended[report.nodeid] = (of, outcome == "passed")
    tried = Counter(of for of, _ in ended.values())
    caught = Counter(of for of, passed in ended.values() if passed)
    if tried:
        counts = (f"{caught[of]} of {number} changes of {of}" for of, number in tried.items())
        terminalreporter.write_line(f"mutants caught: {', '.join(counts)}")


@pytest.fixture(scope="module")
def process_settings() -> Iterator[None]:
    """Puts back what `deeprelax train` sets for its process on a GPU, which here is everybody's."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads are a matter of the tests that ask for them; for small tensors they only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
