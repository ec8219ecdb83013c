"""The examples run, on little data, and say what they found."""

from __future__ import annotations

import os
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


def test_gradient_flow_finds_what_it_says(tmp_path: Path) -> None:
    for package in ("torch", "matplotlib"):
        pytest.importorskip(package)
    picture = tmp_path / "new" / "flow.png"
    command = [sys.executable, "gradient_flow.py", "--updates", "20", "--quick"]
    done = subprocess.run(
        [*command, "--output", str(picture)],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.partition(";")[0] for line in done.stdout.splitlines() if ";" in line]
    large = ["RNN, large weights: exploding", "RNN, large weights, clipped: exploding"]
    assert found == ["RNN: vanishing", "LSTM: steady", *large]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("processes", [1, 2])
def test_distributed_trains_as_one_process_does(processes: int, tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    if not pytest.importorskip("torch.distributed").is_available():
        pytest.skip("this torch has no torch.distributed")
    picture = tmp_path / "curves.png"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "distributed.py"]
    done = subprocess.run(
        [*command, "--epochs", "2", "--output", str(picture)],
        cwd=EXAMPLES,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"processes: {processes}; process 0 holds" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
