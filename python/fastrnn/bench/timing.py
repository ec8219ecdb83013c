"""Clocks, interleaved measurement, percentiles."""

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

    from fastrnn.bench.prepare import Prepared

ROUNDS = 5  # turns of every provider
FEWEST_ROUNDS = 3  # if the budget does not suffice for ROUNDS
SETTLE_SECONDS = 0.003  # untimed calls at the start of a turn
REST_SECONDS = 0.006  # longer than the tick in which the system accounts CPU time of threads
MOST_REST_SECONDS = 0.25
MOST_CALLS = 2000  # timed calls in one turn


class Clock(Protocol):
    def time(self, run: Callable[[int], Any], inputs: int, calls: int) -> list[float]:
        """The seconds of each of `calls` runs, which cycle through the inputs."""


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
    """Device events around every call; the host synchronises once, after the last one."""

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
    prepared: Mapping[str, Prepared],
    clock: Clock,
    inputs: int,
    seconds: float,
    each_round: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Time all providers in turns, about `seconds` in total, with at least three turns each.

    A turn begins with a pause until the threads of the previous provider are asleep (ONNX Runtime's
    threads spin for about 45 ms after a call, and would occupy a core), and with untimed calls that
    warm the caches. The order rotates with every round. Each round begins with a pause and a call
    of `each_round`, so that its measurements of the machine are from the same time.
    """
    estimates = {name: _warm_up(p, clock, inputs) for name, p in prepared.items()}
    rounds = ROUNDS if ROUNDS * sum(estimates.values()) <= seconds else FEWEST_ROUNDS
    budget = seconds / (rounds * len(prepared))
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    order = list(prepared)
    with _no_collection():
        for _ in range(rounds):
            rest()
            each_round()
            for name in order:
                estimate = estimates[name]
                calls = min(MOST_CALLS, max(1, int(budget / estimate)))
                untimed = 0 if estimate > 4 * SETTLE_SECONDS else int(SETTLE_SECONDS / estimate)
                rest()
                with prepared[name].context():
                    if untimed:
                        clock.time(prepared[name].run, inputs, untimed)
                    samples[name] += clock.time(prepared[name].run, inputs, calls)
            order.append(order.pop(0))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def rest() -> None:
    """Pause until no thread of this process works."""
    end = time.monotonic() + MOST_REST_SECONDS
    working = True
    while working and time.monotonic() < end:
        before = time.process_time()
        time.sleep(REST_SECONDS)
        working = time.process_time() - before > REST_SECONDS / 4


def _warm_up(prepared: Prepared, clock: Clock, inputs: int) -> float:
    """Two untimed calls, then one that estimates the time of a call."""
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
