"""The roof of a case: the least time that this machine can need for its matrix products.

On the CPU both sides of it are measured by the engine's own loops, on as many threads as the case:
multiply-adds on registers (the peak), and reads of an array from the cache that holds it. The
projection's products are taken at the peak, all steps being one product. The recurrence needs
every weight of W_hh once a step, and does 2·B operations with it: it is taken at the peak or at
the bandwidth times 2·B operations for each weight's bytes, whichever is less, the bandwidth being
that of an array as large as a thread's share of W_hh. A single step streams all the weights of
the stack. Training is forward once more for the gradients of data, and the products for the
gradients of weights at the peak. The cell costs nothing here, so that a share of the roof never
looks better than it is.

On CUDA the peak is torch's best square product, and the roof is all products at the peak.
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

PEAK_SECONDS = 0.0025  # of every sample of the peak
READ_SECONDS = 0.005
READ_SAMPLES = 5  # the best counts: a disturbed one would flatter us
FEWEST_BYTES = 1 << 14  # a thread's array: nothing is faster than the first cache
CACHED_BYTES = (FEWEST_BYTES, 1 << 18, 1 << 22)  # always measured: first, second and third cache
MEMORY_BYTES = 1 << 27  # and the memory: of all threads' arrays, but no less than a quarter each

# The half types sum in float32, whose peak is theirs until the engine has a product of their own.
PEAK_DTYPE = {"float32": "float32", "float64": "float64", "bfloat16": "float32",
              "float16": "float32"}  # fmt: skip


class Roof(Protocol):
    """What a device can do; rates in GFLOP/s and GB/s, of all threads together."""

    bandwidth: dict[int, float]  # by the bytes of each thread's array

    def sample_peak(self, dtype: str) -> float:
        """The peak here and now, of one of `cases.PRECISIONS`: a case takes the median of one
        sample in each round."""

    def seconds(self, case: Case, pass_: Pass, peak: float) -> float:
        """The roof of a case during which that peak was measured."""

    def method(self, dtype: str) -> str:
        """How the peak is measured."""


class CpuRoof:
    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.bandwidth: dict[int, float] = {}
        memory = max(MEMORY_BYTES // threads, MEMORY_BYTES // 4)
        for size in (*CACHED_BYTES, memory):
            self._measure(_power_of_two(size))

    def sample_peak(self, dtype: str) -> float:
        return _C.fma_peak(PEAK_DTYPE[dtype], self._threads, PEAK_SECONDS)

    def seconds(self, case: Case, pass_: Pass, peak: float) -> float:
        return roof_seconds(case, pass_, peak, self._bandwidth_of)

    def method(self, dtype: str) -> str:
        counted = f"{self._threads} thread{'s' * (self._threads != 1)}"
        loop = f"own {PEAK_DTYPE[dtype]} multiply-adds ({_C.isa()}), {counted}"
        return f"{loop}, in every round of every case, the median"

    def _bandwidth_of(self, weights: int) -> float:
        """Of reading weights of so many bytes, each thread its share.

        Measured once for each power of two, the one below: a smaller array is never slower, nor
        than any larger one that was measured.
        """
        size = max(FEWEST_BYTES, _power_of_two(weights // self._threads))
        if size not in self.bandwidth:
            self._measure(size)
        return max(rate for measured, rate in self.bandwidth.items() if measured >= size)

    def _measure(self, size: int) -> None:
        self.bandwidth[size] = max(
            _C.read_bandwidth(size, self._threads, READ_SECONDS) for _ in range(READ_SAMPLES)
        )


def _power_of_two(size: int) -> int:
    """The largest that is no more than `size`, which is 1 at least."""
    return 1 << (max(size, 1).bit_length() - 1)


def roof_seconds(case: Case, pass_: Pass, peak: float, bandwidth: Callable[[int], float]) -> float:
    """The roof on a CPU with that peak in GFLOP/s; `bandwidth` gives GB/s for bytes of weights."""
    reuse = 2.0 * case.B / ELEMENT_BYTES[case.dtype]  # operations for each byte of weights
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
