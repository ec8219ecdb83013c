"""What the machine can do at most: the engine's own loops, whose arguments are checked."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from fastrnn import _C

WRONG_PEAK = {
    "dtype": (("int8", 1, 0.001), "dtype: expected 'float32' or 'float64', got 'int8'"),
    "threads": (("float32", 0, 0.001), "threads: expected 1 or more, got 0"),
    "seconds": (("float32", 1, 0.0), "seconds: expected a number above 0, got 0"),
    "nan": (("float32", 1, math.nan), "seconds: expected a number above 0, got "),
    "infinity": (("float32", 1, math.inf), "seconds: expected a number above 0, got inf"),
}
WRONG_BANDWIDTH = {
    "bytes": ((100, 1, 0.001), "bytes: expected 4096 or more, got 100"),
    "threads": ((4096, -1, 0.001), "threads: expected 1 or more, got -1"),
    "seconds": ((4096, 1, -1.0), "seconds: expected a number above 0, got -1"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_PEAK.values(), ids=WRONG_PEAK)
def test_the_peak_names_an_argument_that_does_not_fit(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.fma_peak(*arguments)


@pytest.mark.parametrize(("arguments", "message"), WRONG_BANDWIDTH.values(), ids=WRONG_BANDWIDTH)
def test_the_bandwidth_names_an_argument_that_does_not_fit(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        _C.read_bandwidth(*arguments)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_measurement_is_a_positive_number(threads: int) -> None:
    measured = [
        _C.fma_peak("float32", threads, 0.001),
        _C.fma_peak("float64", threads, 0.001),
        _C.read_bandwidth(4096, threads, 0.001),
        _C.read_bandwidth(5000, threads, 0.001),  # not in whole blocks
    ]
    assert all(math.isfinite(rate) and rate > 0 for rate in measured)


def test_half_as_many_doubles_as_floats_fit_into_a_vector() -> None:
    """A loop that the compiler left out, or counted wrongly, would be far off."""
    pairs = [(_C.fma_peak("float64", 1, 0.002), _C.fma_peak("float32", 1, 0.002)) for _ in range(9)]
    ratio = statistics.median(double / single for double, single in pairs)
    assert 0.25 < ratio < 1


def test_no_core_multiplies_or_reads_more_than_hardware_can() -> None:
    """4096 flops and bytes a clock at 6 GHz: what is above that never ran."""
    assert _C.fma_peak("float32", 1, 0.002) < 4096 * 6
    assert _C.read_bandwidth(1 << 14, 1, 0.002) < 4096 * 6
