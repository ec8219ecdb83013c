"""For programs that run with another build of the engine's module in the place of `fastrnn._C`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(path: str) -> None:
    """The module at `path` as fastrnn._C, before fastrnn is imported."""
    spec = importlib.util.spec_from_file_location("fastrnn._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastrnn._C"] = module
    spec.loader.exec_module(module)


def module_of(kind: str) -> Path:
    """The module that a build with FASTRNN_TESTS makes in KIND for this Python; or a skip."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module = ROOT / "build" / "python" / kind / name
    if not module.exists():
        pytest.skip(f"no module for {kind}: `make test` and `make test-cuda` build such")
    return module


def output_with(kind: str, *arguments: str, **environment: str) -> str:
    """What tests/KIND/check.py prints, given the module of KIND and `arguments`."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / kind / "check.py", module_of(kind), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
