"""The process that runs fastrnn's and torch's kernels; it communicates in JSON lines.

It reads requests from stdin and writes answers to stdout. The first line identifies the device, or
gives the reason why there are no answers; then there is one line for each trial. After an error
that leaves the device unusable the process ends, because later results would be meaningless.
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
from fastrnn.certify.device import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fastrnn.certify.device import Device


def serve(make_device: Callable[[], Device]) -> None:
    """Answer requests until stdin ends or the device is unusable."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that output of libraries is not taken for an answer

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        device = make_device()
    except RefusedError as error:
        send({"refused": str(error)})
        return
    send({"key": device.key()._asdict()})
    gc.collect()
    gc.freeze()  # torch's own objects: traversing them takes longer than measuring a case
    for line in sys.stdin:
        answer = attempt(device, json.loads(line))
        answer["sound"] = device.is_sound()
        if not answer["sound"] and answer["found"] == "right":
            answer["found"] = "error: the device was unusable afterwards"
        send(answer)
        if not answer["sound"]:
            return


def attempt(device: Device, asked: dict[str, Any]) -> dict[str, Any]:
    """The result of one trial: "right", or the failure."""
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
    """Check and time one length; add to the answer, return the failure or an empty string."""
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
    return f"not repeatable: {other[0]} has other bits in the second run" if other else ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    first, second = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(first, second)
