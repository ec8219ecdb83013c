"""How closely results must agree with the float64 reference: one table, by dtype and quantity.

An element passes when |actual - expected| <= tolerance · (|expected| + scale), scale being the
largest |expected| of its array, and at least 0.1: errors come from sums, a sum is as exact as its
largest terms, and the data of the tests are of the order of one.

The half types keep h in their own precision from step to step, so the error of their outputs is a
few roundings (bfloat16 2⁻⁹, float16 2⁻¹²), more where it has gone back through time. Gradients of
weights are sums over every step and row, where roundings average out but cancellation does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#                       outputs   gradients of inputs, states   gradients of weights
_TABLE = {
    "float64": {"output": 1e-13, "d_input": 1e-12, "d_weight": 1e-12},
    "float32": {"output": 1e-6, "d_input": 5e-6, "d_weight": 5e-6},
    "float16": {"output": 2e-3, "d_input": 6e-3, "d_weight": 6e-3},
    "bfloat16": {"output": 1.5e-2, "d_input": 5e-2, "d_weight": 5e-2},
    # The analytic gradient of the reference against central differences of its outputs.
    "finite differences": {"d_input": 1e-7, "d_weight": 1e-7},
}


def tolerance(dtype: str, quantity: str) -> float:
    """The relative tolerance of `quantity`: "output", "d_input" or "d_weight"."""
    return _TABLE[dtype][quantity]


def assert_close(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    dtype: str,
    quantity: str,
    name: str = "",
    looser: float = 1.0,
) -> None:
    """Agreement within the table; NaN and infinity must stand in the same places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.1)
    limit = looser * tolerance(dtype, quantity)
    np.testing.assert_allclose(
        actual,
        expected,
        rtol=limit,
        atol=limit * scale,
        err_msg=f"{name or quantity}, {dtype}",
    )
