"""One OpenMP runtime in the process: the engine uses one that is loaded, or that torch will load.

`make wheel-check` asks the same of wheels, beside other packages (tests/wheel).
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrnn import _openmp

PROGRAM = Path(__file__).parent / "wheel" / "program.py"

needs_maps = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="this system does not list loaded files"
)
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def process(*imports: str) -> Any:
    """What a process holds that imports these one after the other and uses each."""
    words = [sys.executable, str(PROGRAM), *imports]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_maps
def test_without_other_packages_there_is_one_runtime() -> None:
    known = process("fastrnn")
    assert [Path(file).resolve() for file in known["runtimes"]] == [Path(known["openmp"]).resolve()]


@needs_maps
@needs_torch
def test_torch_and_fastrnn_share_a_runtime_whichever_is_first() -> None:
    (torchs,) = process("torch")["runtimes"]
    for imports in (("fastrnn", "torch"), ("torch", "fastrnn")):
        known = process(*imports)
        assert known["runtimes"] == [torchs]
        assert Path(known["openmp"]).resolve() == Path(torchs).resolve()
        assert len(set(known["results"])) == 1


@needs_maps
@needs_torch
@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_fastrnn_adds_no_runtime_to_those_of_torch_and_scikit_learn() -> None:
    theirs = process("sklearn", "torch")["runtimes"]
    for imports in ("fastrnn sklearn torch", "sklearn fastrnn torch", "torch sklearn fastrnn"):
        assert process(*imports.split())["runtimes"] == theirs


@needs_torch
def test_the_first_candidate_is_torch_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package, folder in _openmp.FOLDERS.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        files = (tmp_path / package / folder).resolve()
        files.mkdir()
        (files / "libgomp-0123.so.1").touch()
        (files / "libother.so").touch()
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [Path(file).resolve() for file in _openmp.candidates()]
    assert found == [
        tmp_path / "torch" / "lib" / "libgomp-0123.so.1",
        tmp_path / "scikit_learn.libs" / "libgomp-0123.so.1",
    ]


@pytest.mark.parametrize("other", [None, ModuleType("torch")], ids=["none", "module"])
def test_something_else_in_sys_modules_is_no_candidate(
    monkeypatch: pytest.MonkeyPatch, other: ModuleType | None
) -> None:
    monkeypatch.setattr(_openmp, "FOLDERS", {"torch": "lib"})
    monkeypatch.setitem(sys.modules, "torch", other)
    assert _openmp.candidates() == []
