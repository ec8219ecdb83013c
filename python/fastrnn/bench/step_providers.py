"""The suite `cells`: a cell that is a torch module, run by `fastrnn.Recurrent` and by its peers.

The peers are the loop over its steps in torch, ``torch.compile`` of that loop if it compiles within
`COMPILE_SECONDS`, and, for cells that torch.nn has, fastrnn's own layer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import _C
from fastrnn.bench import cells
from fastrnn.bench.cases import Case
from fastrnn.bench.data import Data, make_data
from fastrnn.bench.inference_providers import prepare_compiled
from fastrnn.bench.prepare import (
    MissingPeerError,
    Prepared,
    UnsupportedError,
    prepare_layer,
    require_package,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastrnn.bench.cases import Pass

COMPILE_SECONDS = 60.0  # for one case and pass, including torch's import
LAYERS = {"PlainGRU": "GRU", "PlainLSTM": "LSTM"}
LOOP = "operations of torch, a step at a time"


def make_cell(case: Case, data: Data) -> nn.Module:
    """The cell of the case, with the same weights for every provider.

    Raises:
        UnsupportedError: the cell is one of torchrecurrent's, which is not installed, or the case
            has more than one layer, both directions or options.
    """
    plain = Case(case.cell, case.T, case.B, case.I, case.H, dtype=case.dtype, tf32=case.tf32)
    if case != plain:
        raise UnsupportedError(
            f"a cell that is a torch module is measured only as {plain.label()}, without options"
        )
    ours = {**cells.CELLS, "PlainGRU": cells.PlainGRUCell, "PlainLSTM": cells.PlainLSTMCell}
    made: Callable[[int, int], nn.Module]
    if case.cell in ours:
        made = ours[case.cell]
    else:
        try:
            require_package("torchrecurrent", "pip install torchrecurrent")
        except MissingPeerError as missing:
            raise UnsupportedError(str(missing)) from missing
        import torchrecurrent

        made = getattr(torchrecurrent, f"{case.cell}Cell")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made(case.I, case.H).to(data.d_output)


def _prepare(make_layer: Callable[[nn.Module], nn.Module], case: Case, data: Data, pass_: Pass
) -> Prepared:  # fmt: skip
    cell = make_cell(case, data)
    return prepare_layer(make_layer(cell), data, pass_, {}, list(cell.named_parameters()))


def prepare_recurrent(case: Case, data: Data, pass_: Pass) -> Prepared:
    """The case with `fastrnn.Recurrent`; `kernel` states whether the engine ran it."""
    layer = fastrnn.Recurrent(make_cell(case, data))
    prepared = prepare_layer(layer, data, pass_, {}, list(layer.cell.named_parameters()))
    x = data.inputs[0]
    with prepared.context():
        looped = calls_of(layer, x) < calls_of(layer, torch.cat([x, x]))
    prepared.kernel = LOOP if looped else f"engine {_C.isa()}, a program"
    return prepared


def calls_of(layer: fastrnn.Recurrent, x: Tensor) -> int:
    """How often the layer calls its cell: a loop calls it at every step, the engine does not."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layer(x)  # builds the program
    with layer.cell.register_forward_pre_hook(count):
        layer(x)
    return calls


class Loop:
    """The usual Python loop over the steps."""

    name: ClassVar[str] = "loop"

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_step(case)
        prepared = _prepare(cells.Loop, case, data, pass_)
        prepared.kernel = LOOP
        return prepared


class Compiled:
    """``torch.compile`` of the loop, with torch's defaults.

    A separate process compiles it first, so that it can be killed at the time limit; this process
    then finds the result in inductor's cache. If a case did not compile for inference in time,
    training is not attempted, because its graph is larger.
    """

    name: ClassVar[str] = "compile"

    def __init__(self) -> None:
        self.version = str(torch.__version__)
        self._failed: dict[Case, str] = {}

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_step(case)
        if case not in self._failed:
            failure = compile_elsewhere(case, data.d_output.device.type, pass_)
            if failure is not None:
                self._failed[case] = f"{pass_} {failure}"
        if case in self._failed:
            raise UnsupportedError(self._failed[case])
        prepared = _prepare(_compiled, case, data, pass_)
        prepared.kernel = "torch.compile, inductor"
        return prepared


def _compiled(cell: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(cells.Loop(cell)))


def compile_elsewhere(case: Case, device: str, pass_: Pass) -> str | None:
    """Compile and run the case once in a separate process; return the failure, or None."""
    arguments = [json.dumps(case.as_record()), device, pass_, str(torch.get_num_threads())]
    with subprocess.Popen(
        [sys.executable, "-m", "fastrnn.bench.step_providers", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, complaint = process.communicate(timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"did not compile within {COMPILE_SECONDS:g} s"
        finally:
            _end(process)
    if process.returncode == 0:
        return None
    lines = [line for line in complaint.splitlines() if line.strip()]
    return f"did not compile: {lines[-1] if lines else process.returncode}"


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the process, and its compilers too if the system has process groups."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # the whole group has ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


class Layer:
    """fastrnn.GRU or LSTM with the weights of the plain cell."""

    name: ClassVar[str] = "layer"

    def __init__(self) -> None:
        self.version = fastrnn.__version__

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_step(case)
        if case.cell not in LAYERS:
            raise UnsupportedError("fastrnn has no layer for this cell")
        layer: nn.Module = getattr(fastrnn, LAYERS[case.cell])(case.I, case.H).to(data.d_output)
        cell = make_cell(case, data)
        layer.load_state_dict({f"{name}_l0": w for name, w in cell.state_dict().items()})
        named = [(name.removesuffix("_l0"), p) for name, p in layer.named_parameters()]
        prepared = prepare_layer(layer, data, pass_, {}, named)
        prepared.kernel = f"fastrnn.{LAYERS[case.cell]}"
        return prepared


def _require_step(case: Case) -> None:
    if not case.is_step:
        raise UnsupportedError("only cases of the suite cells, whose cells are torch modules")


def main(record: str, device: str, pass_: Pass, threads: str) -> None:
    """The main function of the separate process."""
    torch.set_num_threads(int(threads))
    case = Case(**json.loads(record))
    prepare = partial(_prepare, _compiled) if case.is_step else prepare_compiled
    prepared = prepare(case, make_data(case, device), pass_)
    with prepared.context():
        prepared.run(0)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
