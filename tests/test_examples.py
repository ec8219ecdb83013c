"""The examples run, on little data, and say what they found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_digits_trains_alike_with_torch_and_with_fastrnn(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    picture = tmp_path / "curves" / "digits.png"
    command = [sys.executable, "digits.py", "--epochs", "1", "--quick", "--output", str(picture)]
    done = subprocess.run(
        command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for layer in ("LSTM ", "GRU ", "LSTM, relu "):
        row = next(line for line in done.stdout.splitlines() if line.startswith(layer))
        assert row.endswith("ok")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_digits_fails_where_the_accuracy_is_too_low(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    command = [sys.executable, "digits.py", "--epochs", "1", "--output", str(tmp_path / "a.png")]
    done = subprocess.run(
        command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert "too low" in done.stdout
