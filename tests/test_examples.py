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


def test_streaming_reads_digits_in_every_dtype(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    picture = tmp_path / "streaming.png"
    command = [sys.executable, "streaming.py", "--epochs", "4", "--quick", "--output", str(picture)]
    done = subprocess.run(
        command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    accuracies = {
        name: float(rows[name][1].rstrip("%")) for name in ("float32", "bfloat16", "int8")
    }
    assert accuracies["float32"] > 60  # a tenth would be chance
    assert max(accuracies.values()) - min(accuracies.values()) < 5
    assert float(rows["bfloat16"][2]) < 0.1
    assert float(rows["int8"][2]) < 0.1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_streaming_fails_where_the_accuracy_is_too_low(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    command = [sys.executable, "streaming.py", "--epochs", "1", "--output", str(tmp_path / "a.png")]
    done = subprocess.run(
        command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert "too low" in done.stdout
