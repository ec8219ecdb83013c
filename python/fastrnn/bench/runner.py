"""Run cases: prepare every provider, compare the results with fastrnn's, measure in turns."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrnn.bench.data import Data, make_data
from fastrnn.bench.inference_providers import Frozen, Streamed
from fastrnn.bench.precision import precision
from fastrnn.bench.prepare import MissingPeerError, Prepared, Provider, UnsupportedError
from fastrnn.bench.providers import STEP_PEERS, Fastrnn, make_provider
from fastrnn.bench.report import OURS
from fastrnn.bench.roof import Roof, make_roof
from fastrnn.bench.timing import make_clock, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastrnn.bench.cases import Case, Pass

DEFAULT_PEERS = {"cpu": ("torch", "onnxruntime"), "cuda": ("torch", "flashrnn")}

# The largest allowed difference from fastrnn's result, relative to the largest value of the array.
# Peers may keep the cell state in half precision.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
TOLERANCE_TF32 = 2e-2


class MismatchError(Exception):
    """A provider's result differs from fastrnn's, so its times would be meaningless."""


@dataclass(frozen=True)
class Request:
    """What to run. `peers` None: the installed default peers of the device and kind of case."""

    cases: Sequence[tuple[str, Case]]
    device: str = "cpu"
    passes: Sequence[Pass] = ("inference", "training")
    threads: int | None = None
    peers: Sequence[str] | None = None
    seconds: float = 1.0
    keep_going: bool = False  # list a case that fails with the reason, and run the next one


@dataclass
class Results:
    """The measurements; complete unless `interrupted`."""

    device: str
    threads: int
    seconds: float
    roof: Roof
    records: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    # Cores that other processes used during the run; None if unknown.
    others: float | None = None


def run(
    request: Request,
    on_case: Callable[[str], None] = lambda label: None,
    after_case: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure every case and pass; call `on_case` with its name before each of them.

    `after_case` is called with the results so far after each. Ctrl-C ends the run and keeps the
    measurements.

    Raises:
        ValueError: a peer's name is unknown, there is no CUDA device, or a case uses TF32 on a CPU.
        MissingPeerError: a peer that was requested by name is not installed.
        MismatchError: a peer's result differs from fastrnn's.
    """
    (results,) = run_each(request, [request.threads], on_case, lambda runs: after_case(runs[0]))
    return results


def run_each(
    request: Request,
    counts: Sequence[int | None],
    on_case: Callable[[str], None] = lambda label: None,
    after_case: Callable[[list[Results]], None] = lambda runs: None,
) -> list[Results]:
    """Measure like `run`, every case and pass with each number of threads in turn (None: torch's).

    Returns:
        One entry per number of threads.

    Raises:
        ValueError, MissingPeerError, MismatchError: as `run`.
    """
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device on this machine")
    if request.device == "cpu" and any(case.tf32 for _, case in request.cases):
        raise ValueError("--dtype tf32: only CUDA devices multiply in TF32")
    runs = []
    began, before = time.monotonic(), _seconds_of_others()
    for count in counts:
        with _threads(count) as threads:
            roof = make_roof(request.device, threads)
        runs.append(Results(request.device, threads, request.seconds, roof))
    peers = _peers(request, runs)
    try:
        for suite, case in request.cases:
            own = [p for p in peers if request.peers is not None or _is_default(p.name, case)]
            for pass_ in request.passes:
                on_case(f"{case.label()} {pass_}")
                for results in runs:
                    with _threads(results.threads):
                        _attempt(suite, case, pass_, own, results, request.keep_going)
                after_case(runs)
    except KeyboardInterrupt:
        for results in runs:
            results.interrupted = True
    after = _seconds_of_others()
    for results in runs:
        if before is not None and after is not None:
            results.others = max(after - before, 0.0) / (time.monotonic() - began)
    return runs


def _seconds_of_others() -> float | None:
    """Processor time that other processes have used since the machine started; None if unknown.

    Not the load average: for a minute that also counts what ended before the run began.
    """
    try:
        _, *ticks = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, *interrupts = map(int, ticks[:8])  # and time that the host took
    all_processes = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return all_processes - sum(os.times()[:4])


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _peers(request: Request, runs: Sequence[Results]) -> list[Provider]:
    if request.peers is not None:
        return [make_provider(name) for name in dict.fromkeys(request.peers)]
    names = (*DEFAULT_PEERS[request.device], *STEP_PEERS)
    wanted = (n for n in names if any(_is_default(n, case) for _, case in request.cases))
    found = (_installed(name, runs) for name in wanted)
    return [peer for peer in found if peer is not None]


def _is_default(peer: str, case: Case) -> bool:
    """Whether the peer is a default peer of the case: of a layer's cases or of a step's."""
    return (peer in STEP_PEERS) == case.is_step


def _installed(name: str, runs: Sequence[Results]) -> Provider | None:
    try:
        return make_provider(name)
    except MissingPeerError as missing:
        nowhere = {"suite": None, "case": None, "pass": None}
        for results in runs:
            results.not_run.append({**nowhere, "provider": name, "reason": str(missing)})
        return None


def _attempt(
    suite: str,
    case: Case,
    pass_: Pass,
    peers: Sequence[Provider],
    results: Results,
    keep_going: bool,
) -> None:
    try:
        with precision(case.tf32):
            _run_case(suite, case, pass_, peers, results)
    except (MismatchError, RuntimeError) as error:
        if not keep_going:
            raise
        reason = f"failed: {str(error).splitlines()[0]}"
        place = {"suite": suite, "case": case.as_record(), "pass": pass_}
        results.not_run.append({**place, "provider": "fastrnn", "reason": reason})
        if results.device == "cuda":
            torch.cuda.empty_cache()


def _run_case(
    suite: str, case: Case, pass_: Pass, peers: Sequence[Provider], results: Results
) -> None:
    data = make_data(case, results.device)
    place = {"suite": suite, "case": case.as_record(), "pass": pass_}
    providers: dict[str, Provider] = {"fastrnn": Fastrnn()}
    if pass_ == "inference" and results.device == "cpu" and not case.is_step:
        providers |= {provider.name: provider() for provider in (Frozen, Streamed)}
    providers |= {peer.name: peer for peer in peers}
    prepared: dict[str, Prepared] = {}
    for name, provider in providers.items():
        outcome = _prepare(provider, case, data, pass_)
        if isinstance(outcome, Prepared):
            prepared[name] = outcome
        elif name == "fastrnn" or name not in OURS:
            results.not_run.append({**place, "provider": name, "reason": outcome})
        if "fastrnn" not in prepared:
            return
    check(case, data, pass_, prepared)
    clock = make_clock(results.device)
    peaks: list[float] = []

    def sample_peak() -> None:
        peaks.append(results.roof.sample_peak(case.precision))

    timings = measure(prepared, clock, len(data.inputs), results.seconds, sample_peak)
    peak = statistics.median(peaks)
    roof_ms = results.roof.seconds(case, pass_, peak) * 1e3
    peer_times = [t.median for name, t in timings.items() if name not in OURS]
    for name, timing in timings.items():
        gflops = case.flops(pass_) / timing.median / 1e6
        results.records.append(
            {
                "suite": suite,
                "case": case.as_record(),
                "device": results.device,
                "threads": results.threads,
                "pass": pass_,
                "provider": name,
                "provider_version": providers[name].version,
                "median_ms": timing.median,
                "p10_ms": timing.p10,
                "p90_ms": timing.p90,
                "gflops": gflops,
                "peak_gflops": peak,
                "peak_fraction": gflops / peak,
                "roof_fraction": roof_ms / timing.median,
                "ratio_to_best_peer": min(peer_times) / timing.median if peer_times else None,
                "kernel": prepared[name].kernel,
            }
        )


def _prepare(provider: Provider, case: Case, data: Data, pass_: Pass) -> Prepared | str:
    """The case ready to run, or the reason why the provider cannot run it."""
    try:
        return provider.prepare(case, data, pass_)
    except UnsupportedError as unsupported:
        return str(unsupported)


def check(case: Case, data: Data, pass_: Pass, prepared: dict[str, Prepared]) -> None:
    """Compare every array of every peer with fastrnn's.

    Raises:
        MismatchError: names provider, case, pass, array and difference.
    """
    limit = tolerance(case)
    ours = prepared["fastrnn"].results()
    for name, peer in prepared.items():
        if name == "fastrnn":
            continue
        for array, theirs in peer.results().items():
            off = difference(ours[array], theirs)
            if not off <= limit:
                raise MismatchError(
                    f"{case.label()}, {pass_}: {array} of {name} differs from fastrnn's by "
                    f"{off:.1e} of its largest value, more than {limit:.0e}; "
                    "nothing was timed"
                )


def tolerance(case: Case) -> float:
    """The largest allowed `difference` for results of the case."""
    return TOLERANCE_TF32 if case.tf32 else TOLERANCE[case.dtype]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value of ``theirs``."""
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ours.double(), theirs.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
