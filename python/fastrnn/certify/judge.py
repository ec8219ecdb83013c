"""The run: requests every case from a child, judges every class, builds the report."""

from __future__ import annotations

import math
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrnn import _certificate
from fastrnn.certify.plan import WHOLE, Grid, Trial, plan
from fastrnn.certify.watch import START_SECONDS, Child, LostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MARGIN = 1.03  # the least speed of fastrnn's kernels relative to torch's
TRIAL_SECONDS = 60.0  # after which a case counts as hung
OUT_OF_TIME = "not run: out of time"


class CertifyError(Exception):
    """There is nothing to certify, or the run cannot start; the message says what to do."""


def run(
    device: str = "cuda:0",
    grid: Grid = WHOLE,
    on_class: Callable[[str], None] = lambda label: None,
    *,
    child: Sequence[str] = (sys.executable, "-m", "fastrnn.certify"),
    trial_seconds: float = TRIAL_SECONDS,
) -> dict[str, Any]:
    """Test the classes of ``grid`` on a device; write no file.

    Arguments:
        device: ``cuda:N``.
        grid: `WHOLE` or `QUICK`.
        on_class: called with the name of each class before its cases run.
        child: the command that runs the cases; tests pass another one.
        trial_seconds: the time limit of a case.

    Returns:
        The report, for `_certificate.write`.

    Raises:
        CertifyError: the device does not exist, or the build has no kernels.
    """
    start = time.monotonic()
    worker = _Worker([*child, device], grid, start + grid.seconds, trial_seconds)
    try:
        worker.start()
        classes = plan(grid)
        entries = []
        for found, trials in classes.items():
            on_class(f"{found.label()} {found.kernels}")
            entries.append(found.as_record() | _judge(trials, worker)._asdict())
    finally:
        worker.stop()
    return {
        "format": _certificate.FORMAT,
        "key": worker.key,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start),
        "complete": not any(entry["why"].endswith(OUT_OF_TIME) for entry in entries),
        "steps": [1, grid.steps],
        "classes": entries,
        "cases": [
            {"case": trial.case.label(), "pass": trial.pass_, "kernels": trial.kernels, **answer}
            for trial, answer in worker.answers.items()
        ],
    }


class _Worker:
    """Runs trials in a child process until the deadline; starts a new child after a failure."""

    def __init__(
        self, command: list[str], grid: Grid, deadline: float, trial_seconds: float
    ) -> None:
        self.command, self.grid = command, grid
        self.deadline, self.trial_seconds = deadline, trial_seconds
        self.answers: dict[Trial, dict[str, Any]] = {}
        self.key: dict[str, Any] = {}
        self._child: Child | None = None

    def start(self) -> None:
        """Raises CertifyError if the child does not start, or refuses to run."""
        self._child = Child(self.command)
        try:
            hello = self._child.answer(START_SECONDS)
        except LostError as lost:
            self.stop()
            raise CertifyError(f"the process that runs the kernels {lost}") from lost
        if "refused" in hello:
            raise CertifyError(hello["refused"])
        self.key = hello["key"]

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = None

    def found(self, trial: Trial) -> dict[str, Any]:
        """The answer of a trial, which runs at the first request."""
        if trial not in self.answers:
            if time.monotonic() > self.deadline:
                return {"found": OUT_OF_TIME}
            self.answers[trial] = self._run(trial)
        return self.answers[trial]

    def _run(self, trial: Trial) -> dict[str, Any]:
        asked = {
            "case": trial.case.as_record(),
            "pass": trial.pass_,
            "kernels": trial.kernels,
            "steps": [1, self.grid.steps],
            "seconds": self.grid.measured_seconds,
        }
        try:
            if self._child is None:
                self.start()
            assert self._child is not None
            answer = self._child.ask(asked, self.trial_seconds)
        except (LostError, CertifyError) as lost:
            self.stop()
            return {"found": str(lost)}
        if not answer.pop("sound"):
            self.stop()
        return answer


class Verdict(NamedTuple):
    """Whether a class is trusted, the smallest T, the worst ratio, or the reason against it.

    ``ratio`` is torch's time / fastrnn's time at the long T.
    """

    trusted: bool
    steps: int | None
    ratio: float | None
    why: str


def _judge(trials: Sequence[Trial], worker: _Worker) -> Verdict:
    """Run the cases of a class until one fails."""
    slowest, first = math.inf, 1
    for trial in trials:
        answer = worker.found(trial)
        if answer["found"] != "right":
            return Verdict(False, None, None, f"{trial.case.label()}: {answer['found']}")
        short, long = answer["ms"]
        ratio = long[1] / long[0]
        slowest = min(slowest, ratio)
        steps = faster_from(short, long, worker.grid.steps)
        if steps is None:
            why = f"{trial.case.label()}: right, but only {ratio:.2f} times as fast as torch's"
            return Verdict(False, None, slowest, why)
        first = max(first, steps)
    return Verdict(True, first, slowest, "")


def faster_from(short: Sequence[float], long: Sequence[float], steps: int) -> int | None:
    """The smallest T from which on fastrnn is faster by `MARGIN`; None if there is none.

    The model of a call's time is a constant plus a time per step.

    Arguments:
        short: the times of fastrnn and torch for T = 1.
        long: the same for T = ``steps``.

    >>> faster_from((1.0, 2.0), (50.0, 100.0), 100)
    1
    >>> faster_from((10.0, 2.0), (60.0, 100.0), 100)
    19
    >>> faster_from((1.0, 2.0), (90.0, 92.0), 100)  # faster by less than the margin
    """
    lost_short, lost_long = (MARGIN * ours - theirs for ours, theirs in (short, long))
    if lost_long > min(0.0, lost_short):  # slower at the long T, or slower per step
        return None
    if lost_short <= 0:
        return 1
    return math.ceil(1 + (steps - 1) * lost_short / (lost_short - lost_long))
