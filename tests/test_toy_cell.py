"""A new cell costs one header, its place in the list of cells and one NumPy function pair."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def toy_module() -> Path | None:
    """The engine built for the toy cell and this Python, which a build with FASTRNN_TESTS makes."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module = ROOT / "build" / "python" / "toy_cell" / name
    return module if module.exists() else None


def test_a_cell_is_one_header_and_one_reference_function() -> None:
    module = toy_module()
    if module is None:
        pytest.skip("the engine for the toy cell is not built: `make setup` builds it")
    program = ROOT / "tests" / "toy_cell" / "check.py"
    done = subprocess.run(
        [sys.executable, program, module],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "45 problems agree"
