"""The process that runs our kernels and torch's: asked on stdin, answers on stdout, in JSON lines.

The first line says of what device the answers are, or why there will be none. Then one line for
each trial. After an error that leaves the device unusable the process ends: whatever it computed
afterwards would mean nothing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastrnn.bench.cases import Case
from fastrnn.bench.precision import precision
from fastrnn.bench.runner import difference, tolerance
from fastrnn.bench.timing import measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fastrnn.certify.device import Device


class RefusedError(Exception):
    """There is nothing to certify here; the message says why and what to do."""


def serve(make_device: Callable[[], Device]) -> None:
    """Answers until stdin ends, or the device is of no use any more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        device = make_device()
    except RefusedError as error:
        send({"refused": str(error)})
        return
    send({"key": device.key()._asdict()})
    gc.collect()
    gc.freeze()  # torch's own objects: to walk them takes longer than to measure a case
    for line in sys.stdin:
        answer = attempt(device, json.loads(line))
        answer["sound"] = device.is_sound()
        if not answer["sound"] and answer["found"] == "right":
            answer["found"] = "error: the device was unusable afterwards"
        send(answer)
        if not answer["sound"]:
            return


def attempt(device: Device, asked: dict[str, Any]) -> dict[str, Any]:
    """What was found of one trial: right, or in which way not."""
    case = Case(**asked["case"])
    answer: dict[str, Any] = {"found": "right", "ms": []}
    try:
        with precision(case.tf32):
            for steps in asked["steps"]:
                found = _compare(device, replace(case, T=steps), asked, answer)
                if found:
                    return answer | {"found": f"{found} (T {steps})"}
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return answer | {"found": f"error: {lines[0]}"}
    return answer


def _compare(device: Device, case: Case, asked: dict[str, Any], answer: dict[str, Any]) -> str:
    """Checks and times one length; adds to the answer, gives what is wrong or nothing."""
    pair = device.prepare(case, asked["pass"], asked["kernels"])
    answer["kernel"] = pair.ours.kernel
    first = pair.ours.results()
    for name, theirs in pair.theirs.results().items():
        off, limit = difference(first[name], theirs), tolerance(case)
        if not off <= limit:
            return (
                f"wrong: {name} differs from torch's by {off:.1e} of its largest value, "
                f"more than {limit:.0e}"
            )
    prepared = {"ours": pair.ours, "theirs": pair.theirs}
    times = measure(prepared, device.clock, pair.inputs, asked["seconds"])
    answer["ms"].append([times["ours"].median, times["theirs"].median])
    again = pair.ours.results()
    other = [name for name, x in first.items() if not _same_bits(x, again[name])]
    return f"not repeatable: {other[0]} has other bits the second time" if other else ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    first, second = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(first, second)
