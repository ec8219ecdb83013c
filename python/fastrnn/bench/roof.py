"""The roof of a case: the least time in which this machine can compute its matrix products.

On the CPU the engine's own loops measure the two limits, with as many threads as the case:
multiply-adds on registers (the peak), and reads of an array from the cache that holds it. The
projection of all steps is one product, and counts at the peak. The recurrence reads every weight of
W_hh once per step and does 2·B operations with it. It counts at the peak or at the bandwidth times
2·B operations per weight, whichever is less, with the bandwidth of an array as large as a thread's
share of W_hh. A single step reads all the weights of the stack at that bandwidth. Training adds
the forward time once more for the gradients of data, and the products for the gradients of weights
at the peak. The roof counts no time for the cell, so it never overstates the share that is reached.

On CUDA the peak is torch's best square product, and the roof counts all products at the peak.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Protocol

import torch

from fastrnn import _C
from fastrnn.bench.cases import ELEMENT_BYTES
from fastrnn.bench.precision import precision
from fastrnn.bench.timing import make_clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastrnn.bench.cases import Case, Pass

PEAK_SECONDS = 0.0025  # for each sample of the peak
READ_SECONDS = 0.005
READ_SAMPLES = 5  # the best one counts: a disturbed sample would overstate the share
FEWEST_BYTES = 1 << 14  # a thread's array: nothing is faster than the first-level cache
CACHED_BYTES = (FEWEST_BYTES, 1 << 18, 1 << 22)  # always measured: first, second and third cache
MEMORY_BYTES = 1 << 27  # for the memory: all threads' arrays, at least a quarter of it per thread


class Roof(Protocol):
    """The limits of a device; rates in GFLOP/s and GB/s, summed over all threads."""

    bandwidth: dict[int, float]  # by the bytes of each thread's array

    def sample_peak(self, dtype: str) -> float:
        """The current peak for one of `cases.PRECISIONS`: a case uses the median of one sample per
        round."""

    def seconds(self, case: Case, pass_: Pass, peak: float) -> float:
        """The roof of a case, with the peak that was measured during the case."""

    def method(self, dtype: str) -> str:
        """The method of measuring the peak."""


class CpuRoof:
    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.bandwidth: dict[int, float] = {}
        memory = max(MEMORY_BYTES // threads, MEMORY_BYTES // 4)
        for size in (*CACHED_BYTES, memory):
            self._measure(_power_of_two(size))

    def sample_peak(self, dtype: str) -> float:
        return _C.fma_peak(_accumulator(dtype), self._threads, PEAK_SECONDS)

    def seconds(self, case: Case, pass_: Pass, peak: float) -> float:
        return roof_seconds(case, pass_, peak, self._bandwidth_of)

    def method(self, dtype: str) -> str:
        counted = f"{self._threads} thread{'s' * (self._threads != 1)}"
        loop = f"own {_accumulator(dtype)} multiply-adds ({_C.isa()}), {counted}"
        return f"{loop}, in every round of every case, the median"

    def _bandwidth_of(self, weights: int) -> float:
        """The bandwidth of reading weights of so many bytes, divided among the threads.

        It is measured once for the largest power of two below the size, because a smaller array is
        never slower; for the same reason the result is at least that of any larger measured array.
        """
        size = max(FEWEST_BYTES, _power_of_two(weights // self._threads))
        if size not in self.bandwidth:
            self._measure(size)
        return max(rate for measured, rate in self.bandwidth.items() if measured >= size)

    def _measure(self, size: int) -> None:
        self.bandwidth[size] = max(
            _C.read_bandwidth(size, self._threads, READ_SECONDS) for _ in range(READ_SAMPLES)
        )


def _accumulator(dtype: str) -> str:
    """The dtype of the sums; the half types accumulate in float32."""
    return "float64" if dtype == "float64" else "float32"


def _power_of_two(size: int) -> int:
    """The largest power of two that does not exceed `size`; at least 1."""
    return 1 << (max(size, 1).bit_length() - 1)


def roof_seconds(case: Case, pass_: Pass, peak: float, bandwidth: Callable[[int], float]) -> float:
    """The roof on a CPU with that peak in GFLOP/s; `bandwidth` maps bytes of weights to GB/s."""
    reuse = 2.0 * case.B / ELEMENT_BYTES[case.dtype]  # operations per byte of weights
    layers = case.products()
    projection = sum(p.projection for p in layers)
    recurrence = sum(p.recurrence for p in layers)
    if case.T == 1:
        weights = sum(p.weight_ih + p.weight_hh for p in layers)
        forward = (projection + recurrence) / min(peak, bandwidth(weights) * reuse)
    else:
        forward = projection / peak
        for p in layers:
            one_direction = p.weight_hh // (case.directions * case.members)
            forward += p.recurrence / min(peak, bandwidth(one_direction) * reuse)
    if pass_ == "training":
        forward += forward + (projection + recurrence) / peak
    return forward / 1e9


class CudaRoof:
    def __init__(self) -> None:
        self.bandwidth: dict[int, float] = {}
        self._peaks: dict[str, float] = {}

    def sample_peak(self, dtype: str) -> float:
        if dtype not in self._peaks:
            self._peaks[dtype] = _best_product(dtype)
        return self._peaks[dtype]

    def seconds(self, case: Case, pass_: Pass, peak: float) -> float:
        return case.flops(pass_) / peak / 1e9

    def method(self, dtype: str) -> str:
        return f"best {dtype} matrix product of torch {torch.__version__}, {CUDA_SIZE}^3"


CUDA_SIZE = 4096
CUDA_SECONDS = 0.3


def _best_product(dtype: str) -> float:
    """GFLOP/s of the best of torch's square products."""
    kind = getattr(torch, "float32" if dtype == "tf32" else dtype)
    a, b = (torch.rand(CUDA_SIZE, CUDA_SIZE, device="cuda").to(kind) for _ in range(2))
    clock = make_clock("cuda")
    best = math.inf
    with torch.inference_mode(), precision(dtype == "tf32"):
        end = time.perf_counter() + CUDA_SECONDS
        while time.perf_counter() < end:
            best = min(best, *clock.time(lambda _: torch.mm(a, b), 1, 3))
    return 2.0 * CUDA_SIZE**3 / best / 1e9


def make_roof(device: str, threads: int) -> Roof:
    return CudaRoof() if device == "cuda" else CpuRoof(threads)
