"""For programs that run with another build of the engine's module as `fastrnn._C`."""

from __future__ import annotations

import importlib.util
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


def virtual_module() -> Path:
    """The module whose CUDA device is virtual (cuda/tests/virtual), built by `make test-cuda`; or a
    skip."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module = ROOT / "build" / "python" / "virtual_device" / name
    if not module.exists():
        pytest.skip("no module with a virtual CUDA device: `make test-cuda` builds it")
    return module
