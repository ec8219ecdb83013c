"""The child of `fastrnn certify` on a machine without a GPU, for test_certify.py.

The virtual device of cuda/tests/virtual, whose kernels run on the CPU, replaces a CUDA device, and
torch's CPU layers replace its CUDA layers. Times are invented: ours take half of torch's. Faults,
given as JSON, replace a kernel by one that is wrong, hangs or dies:
``{"GRU training steps": FAULT, ...}``.

    python virtual_certify.py MODULE FAULTS DEVICE
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from replaced_module import load

load(sys.argv[1])

import torch  # noqa: E402

from fastrnn import _C, _certificate  # noqa: E402
from fastrnn._engine import engine_options  # noqa: E402
from fastrnn.bench.data import Data, make_data  # noqa: E402
from fastrnn.bench.prepare import Prepared  # noqa: E402
from fastrnn.bench.providers import Fastrnn, Torch  # noqa: E402
from fastrnn.certify.child import serve  # noqa: E402
from fastrnn.certify.device import Pair, RefusedError  # noqa: E402
from virtual_array import OnDevice, workspace  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fastrnn.bench.cases import Case, Pass

FAULTS: dict[str, str] = json.loads(sys.argv[2])
SECONDS_OF_A_STEP = {"theirs": 2e-3, "ours": 1e-3, "slow": 4e-3}


def on_device(x: Tensor | None) -> OnDevice | None:
    return None if x is None else OnDevice(x)


class Kernels:
    """One case by the engine's CUDA kernels, through the module's own functions."""

    def __init__(self, case: Case, data: Data, pass_: Pass, persistent: bool) -> None:
        self.case, self.data, self.training = case, data, pass_ == "training"
        self.engine = engine_options(case.stack)
        self.work = (workspace, 0, False, persistent)

    def given(self) -> list[Any]:
        h0, c0 = (*self.data.hx, None)[:2]
        rows = (None, self.data.lengths, self.data.reset)
        weights = list(map(on_device, self.data.weights))
        arrays = [on_device(x) for x in (self.data.inputs[0], h0, c0)]
        return [self.engine, *arrays, weights, *map(on_device, rows)]

    def results(self) -> dict[str, Tensor]:
        call = _C.Call(*self.given(), threads=1)
        output, h_n, c_n, *saved = call.forward(False, self.training, False, self.work)
        found = {"output": output.host, "h_n": h_n.host}
        if c_n is not None:
            found["c_n"] = c_n.host
        found = {name: torch.from_dlpack(x) for name, x in found.items()}
        if self.training:
            found |= self.gradients(saved, "", [None, None])
            found |= self.gradients(saved, " with d_h_n", [*self.data.hx, None][:2])
        return found

    def gradients(
        self, saved: list[Any], suffix: str, d_last: list[Tensor | None]
    ) -> dict[str, Tensor]:
        # d_output, d_hidden, d_cell, d_h_n, d_c_n
        starts = map(on_device, (self.data.d_output, None, None, *d_last))
        needs = (True,) * (3 + len(self.data.weights))
        found = _C.backward(*self.given(), *saved, *starts, needs, False, 1, False, self.work)
        layer = getattr(torch.nn, self.case.cell)(
            1, 1, self.case.layers, bidirectional=self.case.bidirectional
        )
        names = ["input", "h0", "c0"][: 1 + len(self.data.hx)]
        names += [n for n, _ in layer.named_parameters()]
        gradients = [d for d in found if d is not None]
        return {
            f"d_{name}{suffix}": torch.from_dlpack(d.host)
            for name, d in zip(names, gradients, strict=True)
        }


class InventedClock:
    """Gives the seconds that a run says of itself."""

    def time(self, run: Callable[[int], Any], inputs: int, calls: int) -> list[float]:
        return [run(0)] * calls


class Virtual:
    """Answers as fastrnn.certify.device.Cuda does."""

    def __init__(self, name: str) -> None:
        if name != "cuda:0":
            raise RefusedError(f"--device {name}: there is one virtual device, cuda:0")
        self.clock = InventedClock()
        self.sound = True

    def key(self) -> _certificate.Key:
        return _certificate.key_of(0)

    def is_sound(self) -> bool:
        return self.sound

    def prepare(self, case: Case, pass_: Pass, kernels: str) -> Pair:
        data = make_data(case, "cpu")
        fault = FAULTS.get(f"{case.cell} {pass_} {kernels}", "")
        rival = Fastrnn() if case.options else Torch()
        theirs = rival.prepare(case, data, pass_)
        ours = Kernels(case, data, pass_, kernels == "persistent")

        def seconds(kind: str) -> Callable[[int], float]:
            return lambda _: SECONDS_OF_A_STEP[kind] * case.T

        return Pair(
            Prepared(
                seconds("slow" if fault == "slow" else "ours"),
                lambda: self.spoiled(fault, ours.results),
                f"virtual {kernels}",
            ),
            Prepared(seconds("theirs"), theirs.results),
            len(data.inputs),
        )

    def spoiled(self, fault: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a kernel with a fault gives."""
        if fault == "hang":
            time.sleep(1e6)
        if fault == "abort":
            print("the kernel aborts", file=sys.stderr, flush=True)
            os.abort()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "sticky":
            self.sound = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        if fault == "late":
            self.sound = False
        if fault == "error":
            raise RuntimeError("out of memory")
        print("a library says something on stdout")
        found = compute()
        if fault == "wrong":
            found["h_n"] = found["h_n"] + 1
        if fault == "restless":
            found["h_n"] = found["h_n"] * (1 + 1e-5 * torch.rand(()))
        return found


if __name__ == "__main__":
    serve(lambda: Virtual(sys.argv[3]))
