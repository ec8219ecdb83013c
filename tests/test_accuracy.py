"""fastrnn's errors beside torch's, against float64: the ratio of each group's mean is bounded.

benchmarks/accuracy.py measures more and larger cases; docs/accuracy.md has its tables.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from fastrnn.bench.cases import CELLS, Case

SIZES = ((1, 8, 32, 32), (20, 32, 16, 20), (60, 4, 32, 64))
SCALES = (0.01, 0.5, 1.0, 4.0)
# Of outputs (with final states) and gradients. The goal is 1.1 everywhere. float32 above it is
# measured, with a tenth to spare: the sums of the weights' gradients have 256 terms
# (docs/accuracy.md).
HALF = {"outputs": 1.0, "gradients": 0.8}
FLOAT32 = {
    "LSTM": {"outputs": 1.1, "gradients": 1.1},
    "GRU": {"outputs": 1.1, "gradients": 1.43},
    "RNN": {"outputs": 1.1, "gradients": 1.24},
}


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("accuracy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_mean_error_is_near_torchs(cell: str, dtype: str, accuracy: Any) -> None:
    errors = [
        error
        for size in SIZES
        for scale in SCALES
        for error in accuracy.measure(Case(cell, *size, dtype=dtype), scale)
    ]
    gradients = [e for e in errors if e.array.startswith("d_")]
    outputs = [e for e in errors if not e.array.startswith("d_")]
    limits = FLOAT32[cell] if dtype == "float32" else HALF
    assert accuracy.mean_ratio(outputs) <= limits["outputs"]
    assert accuracy.mean_ratio(gradients) <= limits["gradients"]


@pytest.mark.parametrize("cell", CELLS)
def test_every_gradient_is_compared(cell: str, accuracy: Any) -> None:
    errors = accuracy.measure(Case(cell, 3, 2, 5, 4), 1.0)
    known = {array for arrays in accuracy.GROUPS.values() for array in arrays}
    states = {"c_n", "d_c0"} if cell == "LSTM" else set()
    assert {e.array for e in errors} == known - {"c_n", "d_c0"} | states


def test_an_error_is_relative_to_the_values(accuracy: Any) -> None:
    torch = pytest.importorskip("torch")
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert accuracy._error(exact + 0.5, exact) == pytest.approx(0.5 / 12.5**0.5)
    errors = [accuracy.Error(None, 1.0, "output", ours, 2.0) for ours in (1.0, 4.0, 0.0)]
    assert [e.ratio for e in errors] == [0.5, 2.0, None]
    assert accuracy.mean_ratio(errors) == pytest.approx(1.0)
