"""Inference with weights that were prepared before: `fastrnn.freeze`, `fastrnn.Stream`, and
``torch.compile`` of torch.nn's layer.

A frozen layer and an ONNX Runtime session both keep packed weights and take the states as
arguments, so they are compared in every case. A stream also keeps the states inside, and runs one
step per call: it is measured where the case is a single step (T = 1), and not by calling it T
times, which no user with a whole sequence does.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import fastrnn
from fastrnn import _C
from fastrnn.bench.prepare import Prepared, UnsupportedError, make_layer, prepare_layer

if TYPE_CHECKING:
    from torch import Tensor

    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.data import Data


class Frozen:
    """fastrnn's layer after `fastrnn.freeze`."""

    name: ClassVar[str] = "frozen"

    def __init__(self) -> None:
        self.version = fastrnn.__version__

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_inference(case, data, pass_)
        layer = make_layer(fastrnn, case, data)
        call = {"reset": data.reset, "lengths": data.lengths}
        given = {name: value for name, value in call.items() if value is not None}
        prepared = prepare_layer(layer, data, pass_, given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a layer that was not frozen must not pass as one
            fastrnn.freeze(layer)
        prepared.kernel = f"engine {_C.isa()}, frozen"
        return prepared


class Streamed:
    """`fastrnn.Stream` for single steps: the states stay inside."""

    name: ClassVar[str] = "stream"

    def __init__(self) -> None:
        self.version = fastrnn.__version__

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_inference(case, data, pass_)
        if case.T != 1 or case.bidirectional or case.options:
            raise UnsupportedError("a stream is compared for single steps (T 1) in one direction")
        stream = fastrnn.Stream(make_layer(fastrnn, case, data), batch_size=case.B)
        x = data.inputs[0][0]
        start: Any = data.hx if len(data.hx) > 1 else data.hx[0]

        def run(_: int) -> Any:
            return stream.step(x)

        def results() -> dict[str, Tensor]:
            stream.state = start
            output = stream.step(x).clone()[None]
            last = stream.state if isinstance(stream.state, tuple) else (stream.state,)
            return {"output": output, **dict(zip(("h_n", "c_n"), last, strict=False))}

        return Prepared(run, results, f"engine {_C.isa()}, stream", torch.inference_mode)


def _require_inference(case: Case, data: Data, pass_: Pass) -> None:
    if pass_ == "training":
        raise UnsupportedError("only inference")
    if case.is_step:
        raise UnsupportedError("a cell that is a torch module has no frozen layer and no stream")
    if not data.d_output.device.type == "cpu":
        raise UnsupportedError("only on the CPU")
    if set(case.options) - {"lengths", "resets"}:
        raise UnsupportedError(f"not compared with {' and '.join(case.options)}")


class TorchCompiled:
    """``torch.compile`` of torch.nn's layer.

    Dynamo unrolls the steps (``allow_rnn``), so a separate process compiles it first and is killed
    at the time limit of step_providers.py.
    """

    name: ClassVar[str] = "torch_compile"

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        from fastrnn.bench.step_providers import compile_elsewhere

        if case.is_step:
            raise UnsupportedError("torch.nn has no layer for this cell")
        if case.options:
            raise UnsupportedError(f"torch.nn has no {' and no '.join(case.options)}")
        failure = compile_elsewhere(case, data.d_output.device.type, pass_)
        if failure is not None:
            raise UnsupportedError(failure)
        return prepare_compiled(case, data, pass_)


def prepare_compiled(case: Case, data: Data, pass_: Pass) -> Prepared:
    """The case with the compiled layer, in this process."""
    layer = make_layer(torch.nn, case, data)
    with torch._dynamo.config.patch(allow_rnn=True):
        prepared = prepare_layer(layer, data, pass_, {}, compiled=True)
        with prepared.context():
            prepared.run(0)  # compiles, while allow_rnn holds
    prepared.kernel = "torch.compile, inductor"
    return prepared
