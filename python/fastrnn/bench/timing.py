"""Clocks, interleaved measuring, percentiles, and the measured roof."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fastrnn.bench.providers import Prepared

ROUNDS = 5  # times that every provider has its turn
FEWEST_ROUNDS = 3  # where the budget does not reach for ROUNDS
SETTLE_SECONDS = 0.003  # pause and untimed calls at the start of a turn
MOST_CALLS = 2000  # timed in one turn


class Clock(Protocol):
    def time(self, run: Callable[[int], Any], inputs: int, calls: int) -> list[float]:
        """Seconds of each of `calls` runs, input after input."""


class HostClock:
    def time(self, run: Callable[[int], Any], inputs: int, calls: int) -> list[float]:
        seconds = []
        for call in range(calls):
            i = call % inputs
            start = time.perf_counter()
            run(i)
            seconds.append(time.perf_counter() - start)
        return seconds


class CudaClock:
    """Device events around every call; the host waits once, after the last one."""

    def time(self, run: Callable[[int], Any], inputs: int, calls: int) -> list[float]:
        event: Callable[..., Any] = torch.cuda.Event
        events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(calls)]
        for call, (start, end) in enumerate(events):
            start.record()
            run(call % inputs)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def make_clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        p10, median, p90 = np.percentile(np.asarray(seconds) * 1e3, (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


def measure(
    prepared: Mapping[str, Prepared], clock: Clock, inputs: int, seconds: float
) -> dict[str, Timing]:
    """Times every provider in turns, about `seconds` in all, but never fewer than three turns.

    A turn opens with a pause, so that the threads of the provider before go to sleep, and with
    untimed calls that bring the caches back; the order turns with every round.
    """
    estimates = {name: _warm_up(p, clock, inputs) for name, p in prepared.items()}
    rounds = ROUNDS if ROUNDS * sum(estimates.values()) <= seconds else FEWEST_ROUNDS
    budget = seconds / (rounds * len(prepared))
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    order = list(prepared)
    with _no_collection():
        for _ in range(rounds):
            for name in order:
                estimate = estimates[name]
                calls = min(MOST_CALLS, max(1, int(budget / estimate)))
                untimed = 0 if estimate > 4 * SETTLE_SECONDS else int(SETTLE_SECONDS / estimate)
                time.sleep(SETTLE_SECONDS)
                with prepared[name].context():
                    if untimed:
                        clock.time(prepared[name].run, inputs, untimed)
                    samples[name] += clock.time(prepared[name].run, inputs, calls)
            order.append(order.pop(0))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _warm_up(prepared: Prepared, clock: Clock, inputs: int) -> float:
    """Two untimed calls, then one that says how long a call takes."""
    with prepared.context():
        clock.time(prepared.run, inputs, 2)
        return max(clock.time(prepared.run, inputs, 1)[0], 1e-6)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Roof:
    """What the machine reached at its best kind of work, in the same process."""

    gflops: float
    method: str


def measure_roof(dtype: str, device: str, threads: int, seconds: float = 0.3) -> Roof:
    """The best of torch's matrix products of `dtype`, with the same threads as the cases."""
    size = 1024 if device == "cpu" else 4096
    a, b = (torch.rand(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    clock = make_clock(device)
    with torch.inference_mode():
        best = min(clock.time(lambda _: torch.mm(a, b), 1, 3))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = min(best, *clock.time(lambda _: torch.mm(a, b), 1, 3))
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
    method = f"best {dtype} matrix product of torch {torch.__version__}, {size}^3, {where}"
    return Roof(2.0 * size**3 / best / 1e9, method)
