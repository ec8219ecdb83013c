"""What every test runs under: one thread, one seed, one hypothesis profile; shared fixtures.

torch is not imported here unless it is installed: the tests of the NumPy half run without it.
"""

from __future__ import annotations

import gc
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

# Read by OpenMP when it is loaded, so before torch and the engine are. Several workers share the
# cores, so each takes one thread and none spins while it waits; a test about threads asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import torch

HAS_TORCH = find_spec("torch") is not None

# Where torch is not installed, the files about torch are left out, and the header says which.
collect_ignore = [
    file.name
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if not HAS_TORCH and re.search(r"^(import|from) torch\b", file.read_text("utf-8"), re.MULTILINE)
]

if find_spec("hypothesis") is not None:
    from hypothesis import settings

    # derandomize: the same examples in every run, so that a failure is a failure for everybody.
    settings.register_profile("fastrnn", deadline=None, derandomize=True, max_examples=40)
    settings.load_profile("fastrnn")


def pytest_report_header() -> str | None:
    return f"no torch, so without {', '.join(collect_ignore)}" if collect_ignore else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Ends the session where a test left CUDA broken, by an illegal address or a trap: every later
    call in the process would fail, whatever it calls.
    """
    report = yield
    if report.failed and "cuda" in getattr(item, "fixturenames", ()):
        import torch

        try:
            if torch.backends.cuda.is_built():
                torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            item.session.shouldstop = f"CUDA is lost to this process after {item.nodeid}: {reason}"
    return report


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_collected() -> None:
    """Freezes all objects older than a file's tests, so that its collections are quick."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """Every test starts from the same state of the random generators, in whatever order it runs."""
    np.random.seed(0)
    if HAS_TORCH:
        import torch

        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """A test that sets torch's thread count leaves it as it was."""
    if not HAS_TORCH:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["RNN", "LSTM", "GRU"])
def cell(request: pytest.FixtureRequest) -> str:
    """The three cells, by the name that the layers, the operators and the reference share."""
    return str(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device, or a skip that says why there is none."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device on this machine")
    return torch.device("cuda")
