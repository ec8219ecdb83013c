"""Who computes a case: our layers, and the peers, each at its best.

A provider prepares a case once (weights copied, sessions built, memory bound) and hands back a
`Prepared` whose `run` is all that is timed. Inference runs under `torch.inference_mode`; training
is forward and backward with gradients to the input, the states and all weights.
"""

from __future__ import annotations

import importlib.util
import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C
from fastrnn.info import COMPOSED, CUDA_ENGINE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.data import Data


class UnsupportedError(Exception):
    """The provider cannot compute the case; the message says why."""


class MissingPeerError(Exception):
    """The peer is not installed; the message says how to install it."""


@dataclass
class Prepared:
    """A case ready to run."""

    run: Callable[[int], Any]  # computes on input number i
    results: Callable[[], dict[str, Tensor]]  # runs on input 0 and names what came out
    kernel: str = ""  # the route that ran
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around every block


class Provider(Protocol):
    name: ClassVar[str]
    version: str

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        """Raises UnsupportedError where the case or the pass is not for this provider."""


class Fastrnn:
    """Our layers, as a user calls them."""

    name: ClassVar[str] = "fastrnn"

    def __init__(self) -> None:
        self.version = fastrnn.__version__

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        options = {} if case.heads == 1 else {"heads": case.heads}
        _require_parameters(getattr(fastrnn, case.cell).__init__, options)
        layer = _layer(fastrnn, case, data, **options)
        call = {} if data.reset is None else {"reset": data.reset}
        prepared = prepare_layer(layer, data, pass_, call)
        engine = any(name.startswith("fastrnn.") for name in operators(prepared, pass_))
        own = CUDA_ENGINE if data.d_output.is_cuda else f"engine {_C.isa()}"
        prepared.kernel = own if engine else COMPOSED
        return prepared


class Torch:
    """torch.nn: oneDNN or ATen on the CPU, cuDNN on CUDA."""

    name: ClassVar[str] = "torch"

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        if case.heads > 1:
            raise UnsupportedError("torch.nn has no heads")
        if data.reset is not None:
            raise UnsupportedError("torch.nn has no reset")
        prepared = prepare_layer(_layer(torch.nn, case, data), data, pass_, {})
        names = operators(prepared, pass_)
        if "aten._cudnn_rnn.default" in names:
            prepared.kernel = "cuDNN"
        elif "aten.mkldnn_rnn_layer.default" in names:
            prepared.kernel = "oneDNN"
        else:
            prepared.kernel = "ATen"
        return prepared


def prepare_layer(
    layer: torch.nn.Module, data: Data, pass_: Pass, call: dict[str, Tensor]
) -> Prepared:
    """A torch module whose call is torch.nn's, ready for one pass; `call` holds more keywords."""
    training = pass_ == "training"
    layer.train(training).requires_grad_(training)
    parameters = list(layer.named_parameters())
    states = [h.detach().requires_grad_(training) for h in data.hx]
    inputs = [x.detach().requires_grad_(training) for x in data.inputs]
    hx = states[0] if len(states) == 1 else tuple(states)
    shared = [*states, *(p for _, p in parameters)]

    def infer(i: int) -> Any:
        return layer(inputs[i], hx, **call)

    def train(i: int) -> Sequence[Tensor]:
        output, _ = layer(inputs[i], hx, **call)
        return torch.autograd.grad(output, [inputs[i], *shared], data.d_output)

    def inferred() -> dict[str, Tensor]:
        with torch.inference_mode():
            output, hx_n = infer(0)
        last = hx_n if isinstance(hx_n, tuple) else (hx_n,)
        return dict(zip(("output", "h_n", "c_n"), (output, *last), strict=False))

    def trained() -> dict[str, Tensor]:
        names = ["d_input", "d_h0", "d_c0"][: 1 + len(states)] + [f"d_{n}" for n, _ in parameters]
        return dict(zip(names, train(0), strict=True))

    if training:
        return Prepared(train, trained)
    return Prepared(infer, inferred, context=torch.inference_mode)


def _layer(library: Any, case: Case, data: Data, **options: Any) -> torch.nn.Module:
    """The library's layer for the case, holding the case's weights."""
    if case.cell == "RNN":
        options["nonlinearity"] = case.nonlinearity
    layer: torch.nn.Module = getattr(library, case.cell)(
        case.I,
        case.H,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        device=data.d_output.device,
        dtype=data.d_output.dtype,
        **options,
    )
    with torch.no_grad():
        for parameter, weight in zip(layer.parameters(), data.weights, strict=True):
            parameter.copy_(weight)
    return layer


def _require_parameters(function: Callable[..., Any], options: dict[str, Any]) -> None:
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise UnsupportedError(f"fastrnn {fastrnn.__version__} has no option {option!r}")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the name of every operator that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def operators(prepared: Prepared, pass_: Pass) -> set[str]:
    """The names of torch's operators in one run: what tells a fast route from a fallback."""
    recorder = _Recorder()
    with torch.set_grad_enabled(pass_ == "training"), recorder:
        prepared.run(0)
    return recorder.names


def require_package(package: str, install: str) -> None:
    """Raises MissingPeerError with the command to type where `package` cannot be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPeerError(f"{package} is not installed; to install it: {install}")


def make_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ValueError: no provider has the name.
        MissingPeerError: its package is not installed.
    """
    if name == "fastrnn":
        return Fastrnn()
    if name == "torch":
        return Torch()
    if name == "onnxruntime":
        from fastrnn.bench.onnx_provider import OnnxRuntime

        return OnnxRuntime()
    if name == "flashrnn":
        from fastrnn.bench.flashrnn_provider import FlashRnn

        return FlashRnn()
    raise ValueError(f"peer {name!r} is not known; there are: {', '.join(PEERS)}")


PEERS = ("torch", "onnxruntime", "flashrnn")
