"""The engine's module on arrays of a virtual CUDA device: see cuda/tests/virtual."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from replaced_module import virtual_module


@pytest.mark.virtual_device
@pytest.mark.parametrize("route", ["steps", "persistent"])
def test_arrays_on_a_device_agree_with_the_reference(route: str) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("virtual_check.py"), virtual_module(), route],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "FASTRNN_CUBLASLT": "none"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "30 problems agree"
