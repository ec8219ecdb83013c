"""fastrnn's errors beside torch's, against float64: the ratio of each group's mean is bounded.

benchmarks/accuracy.py measures more and larger cases; docs/accuracy.md has its tables.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from fastrnn.bench.cases import CELLS, Case

SIZES = ((1, 8, 32, 32), (20, 32, 16, 20), (60, 4, 32, 64))
SCALES = (0.01, 0.5, 1.0, 4.0)
LIMITS: dict[str, dict[str, float]] = {}


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("accuracy")


def groups(accuracy: Any, cell: str, dtype: str) -> dict[str, float]:
    """The mean ratio of outputs (with final states) and of gradients."""
    errors = [
        error
        for size in SIZES
        for scale in SCALES
        for error in accuracy.measure(Case(cell, *size, dtype=dtype), scale)
    ]
    is_gradient = [error.array.startswith("d_") for error in errors]
    return {
        name: accuracy.mean_ratio(e for e, other in zip(errors, is_gradient, strict=True) if other == wanted)
        for name, wanted in (("outputs", False), ("gradients", True))
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_errors(cell: str, dtype: str, accuracy: Any) -> None:
    print(cell, dtype, groups(accuracy, cell, dtype))
