"""What the machine can do at most: the engine's loops, and the roof of a case made from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fastrnn import _C
from fastrnn.bench.cases import Case

if TYPE_CHECKING:
    from fastrnn.bench.cases import Pass

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
    pairs = [
        (_C.fma_peak("float64", 1, 0.002), _C.fma_peak("float32", 1, 0.002)) for _ in range(30)
    ]
    double, single = (max(peaks) for peaks in zip(*pairs, strict=True))  # of the quietest moment
    assert 0.25 < double / single < 1


def test_no_core_multiplies_or_reads_more_than_hardware_can() -> None:
    """4096 flops and bytes a clock at 6 GHz: what is above that never ran."""
    assert _C.fma_peak("float32", 1, 0.002) < 4096 * 6
    assert _C.read_bandwidth(1 << 14, 1, 0.002) < 4096 * 6


# ---- the roof of a case -------------------------------------------------------------------------

PEAK = 100.0  # GFLOP/s
LSTM = Case("LSTM", T=10, B=2, I=8, H=4)
FLOPS_IH, FLOPS_HH = 2 * 16 * 8 * 20, 2 * 16 * 4 * 20
BYTES_IH, BYTES_HH = 4 * 16 * 8, 4 * 16 * 4


def roof_seconds(case: Case, pass_: Pass, peak: float, reading: dict[int, float]) -> float:
    roof = pytest.importorskip("fastrnn.bench.roof", reason="the benchmark needs torch")
    seconds: float = roof.roof_seconds(case, pass_, peak, reading.__getitem__)
    return seconds


def test_where_reading_is_fast_the_roof_is_the_peak() -> None:
    seconds = roof_seconds(LSTM, "inference", PEAK, {BYTES_HH: 1e9})
    assert seconds == pytest.approx(LSTM.flops("inference") / PEAK / 1e9)
    training = roof_seconds(LSTM, "training", PEAK, {BYTES_HH: 1e9})
    assert training == pytest.approx(3 * seconds)


def test_the_roof_of_a_recurrence_is_the_bandwidth_of_its_weights() -> None:
    """Two rows: 2·2 operations for the 4 bytes of a weight, hence as many GFLOP/s as GB/s."""
    forward = FLOPS_IH / PEAK + FLOPS_HH / 5.0
    assert roof_seconds(LSTM, "inference", PEAK, {BYTES_HH: 5.0}) == pytest.approx(forward / 1e9)
    weights = (FLOPS_IH + FLOPS_HH) / PEAK
    both = 2 * forward + weights
    assert roof_seconds(LSTM, "training", PEAK, {BYTES_HH: 5.0}) == pytest.approx(both / 1e9)


def test_each_direction_streams_its_own_weights() -> None:
    both = replace(LSTM, bidirectional=True)
    one = roof_seconds(LSTM, "inference", PEAK, {BYTES_HH: 5.0})
    assert roof_seconds(both, "inference", PEAK, {BYTES_HH: 5.0}) == pytest.approx(2 * one)


def test_each_member_is_as_much_work_as_one_model() -> None:
    five = replace(LSTM, members=5)
    one = roof_seconds(LSTM, "training", PEAK, {BYTES_HH: 5.0})
    assert roof_seconds(five, "training", PEAK, {BYTES_HH: 5.0}) == pytest.approx(5 * one)
    assert five.flops("training") == 5 * LSTM.flops("training")


def test_rows_of_uniform_lengths_are_half_the_work() -> None:
    some = replace(LSTM, lengths=True)  # lengths of 1 to T: (T + 1) / 2 steps on average
    share = (LSTM.T + 1) / (2 * LSTM.T)
    whole = roof_seconds(LSTM, "inference", PEAK, {BYTES_HH: 5.0})
    assert roof_seconds(some, "inference", PEAK, {BYTES_HH: 5.0}) == pytest.approx(share * whole)
    assert some.flops("inference") == pytest.approx(share * LSTM.flops("inference"))


def test_a_single_step_streams_all_the_weights_of_the_stack() -> None:
    case = replace(LSTM, T=1, layers=2)
    weights = BYTES_IH + BYTES_HH + 2 * BYTES_HH  # the second layer reads 4 units
    seconds = roof_seconds(case, "inference", PEAK, {weights: 5.0})
    assert seconds == pytest.approx(case.flops("inference") / 5.0 / 1e9)


def test_the_half_types_stream_half_the_bytes() -> None:
    half = replace(LSTM, dtype="bfloat16")
    seconds = roof_seconds(half, "inference", PEAK, {BYTES_HH // 2: 5.0})
    assert seconds == pytest.approx((FLOPS_IH / PEAK + FLOPS_HH / 10.0) / 1e9)


def test_intensity_counts_the_weights_of_every_step() -> None:
    streamed = BYTES_IH + 10 * BYTES_HH
    assert LSTM.intensity("inference") == pytest.approx((FLOPS_IH + FLOPS_HH) / streamed)
    assert LSTM.intensity("training") == pytest.approx(1.5 * (FLOPS_IH + FLOPS_HH) / streamed)


def test_a_bandwidth_is_measured_once_for_each_power_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roof = pytest.importorskip("fastrnn.bench.roof", reason="the benchmark needs torch")
    asked: list[tuple[int, int]] = []

    def read(size: int, threads: int, seconds: float) -> float:
        asked.append((size, threads))
        return 7.0

    monkeypatch.setattr(_C, "read_bandwidth", read)
    machine = roof.CpuRoof(threads=2)
    always = set(machine.bandwidth)
    asked.clear()
    large = Case("LSTM", T=10, B=1, I=8, H=300)  # 1440000 bytes: 720000 for each of two threads
    for _ in range(2):
        machine.seconds(large, "inference", PEAK)
    assert asked == [(1 << 19, 2)] * roof.READ_SAMPLES
    assert set(machine.bandwidth) == always | {1 << 19}


def test_a_small_array_is_read_no_slower_than_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that was disturbed must not lower the roof."""
    roof = pytest.importorskip("fastrnn.bench.roof", reason="the benchmark needs torch")
    disturbed = {1 << 18: 1.0}
    monkeypatch.setattr(_C, "read_bandwidth", lambda size, *_: disturbed.get(size, 7.0))
    machine = roof.CpuRoof(threads=1)
    case = Case("LSTM", T=10, B=1, I=8, H=128)  # 256 KiB
    expected = roof_seconds(case, "inference", PEAK, {1 << 18: 7.0})
    assert machine.seconds(case, "inference", PEAK) == pytest.approx(expected)
