"""The providers that compute a case: fastrnn and its peers, each in its fastest configuration.

A provider prepares a case once (copies weights, builds sessions, binds memory) and returns a
`Prepared`, of which only `run` is timed. Inference runs under `torch.inference_mode`; training is
forward and backward with gradients to the input, the states and all weights.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C
from fastrnn.bench import by_hand
from fastrnn.bench.explain import cuda_kernel
from fastrnn.info import COMPOSED

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

    run: Callable[[int], Any]  # computes with input number i
    results: Callable[[], dict[str, Tensor]]  # computes with input 0 and returns named results
    kernel: str = ""  # the route that ran
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around every block


class Provider(Protocol):
    name: ClassVar[str]
    version: str

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        """Raises UnsupportedError if the provider does not support the case or the pass."""


class Fastrnn:
    """fastrnn's layers, called as a user calls them."""

    name: ClassVar[str] = "fastrnn"

    def __init__(self) -> None:
        self.version = fastrnn.__version__

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        if case.is_step:
            from fastrnn.bench.step_providers import prepare_recurrent

            return prepare_recurrent(case, data, pass_)
        options: dict[str, Any] = {} if case.heads == 1 else {"heads": case.heads}
        if case.layer_norm:
            options["layer_norm"] = True
        layer = _layer(fastrnn, case, data, **options)
        if case.members > 1:
            layer = _Ensemble(layer, case, data)
        call = {"reset": data.reset, "lengths": data.lengths}
        given = {name: value for name, value in call.items() if value is not None}
        prepared = prepare_layer(layer, data, pass_, given)
        engine = any(name.startswith("fastrnn.") for name in operators(prepared, pass_))
        own = cuda_kernel(case, pass_) if data.d_output.is_cuda else f"engine {_C.isa()}"
        prepared.kernel = own if engine else COMPOSED
        return prepared


class _Ensemble(by_hand.Members):
    """An ensemble of fastrnn's layers with ``torch.func.vmap``: one call of the engine."""

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = torch.func.vmap(self._call, (0, None, None))(self._own(), x, hx)
        return found


class Torch:
    """torch.nn: oneDNN or ATen on the CPU, cuDNN on CUDA; missing options as in `by_hand`."""

    name: ClassVar[str] = "torch"

    def __init__(self) -> None:
        self.version = str(torch.__version__)

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        if case.is_step:
            raise UnsupportedError("torch.nn has no layer for this cell")
        several = case.layers * case.directions > 1
        if len(case.options) > 1 or (several and (case.layer_norm or case.heads > 1)):
            raise UnsupportedError(f"torch.nn has no {' and no '.join(case.options)}")
        layer = _layer(torch.nn, case, data)
        by = BY_HAND[case.options[0]] if case.options else None
        if by is not None:
            layer = by(layer, case, data)
        prepared = prepare_layer(layer, data, pass_, {})
        names = operators(prepared, pass_)
        if "aten._cudnn_rnn.default" in names:
            prepared.kernel = "cuDNN"
        elif "aten.mkldnn_rnn_layer.default" in names:
            prepared.kernel = "oneDNN"
        else:
            prepared.kernel = "ATen"
        if by is not None:
            prepared.kernel += f", {by.way}"
        return prepared


BY_HAND: dict[str, type[Any]] = {  # of `Case.options`
    "heads": by_hand.Heads,
    "resets": by_hand.StepByStep,
    "lengths": by_hand.Packed,
    "layer norm": by_hand.LayerNorm,
    "members": by_hand.Members,
}


STATES = ("h", "c", "n", "m")  # the names of a state's tensors; only an sLSTM has all


def prepare_layer(
    layer: torch.nn.Module,
    data: Data,
    pass_: Pass,
    call: dict[str, Tensor],
    parameters: Sequence[tuple[str, Tensor]] | None = None,
) -> Prepared:
    """Prepare a torch module with the call of torch.nn's layers for one pass.

    `call` contains additional keyword arguments. By default the parameters are the module's own;
    their names are also the names of the results.
    """
    training = pass_ == "training"
    layer.train(training).requires_grad_(training)
    if parameters is None:
        parameters = list(layer.named_parameters())
    states = [h.detach().requires_grad_(training) for h in data.hx]
    inputs = [x.detach().requires_grad_(training) for x in data.inputs]
    hx = states[0] if len(states) == 1 else tuple(states) or None
    shared = [*states, *(p for _, p in parameters)]

    def infer(i: int) -> Any:
        return layer(inputs[i], hx, **call)

    def train(i: int) -> Sequence[Tensor]:
        output, _ = layer(inputs[i], hx, **call)
        return torch.autograd.grad(output, [inputs[i], *shared], data.d_output)

    def outputs() -> dict[str, Tensor]:
        output, hx_n = infer(0)
        last = hx_n if isinstance(hx_n, tuple) else (hx_n,)
        finals = zip((f"{name}_n" for name in STATES), last, strict=False)
        return {"output": output, **dict(finals)}

    def inferred() -> dict[str, Tensor]:
        with torch.inference_mode():
            return outputs()

    def trained() -> dict[str, Tensor]:
        found = outputs()
        names = ["d_input", *(f"d_{name}0" for name, _ in zip(STATES, states, strict=False))]
        names += [f"d_{name}" for name, _ in parameters]
        output, *last = found.values()
        starts = [torch.ones_like(x) for x in last]
        if data.hx:
            starts = [h.expand_as(x) for h, x in zip(data.hx, last, strict=True)]
        wanted = [inputs[0], *shared]
        # Gradients from the output alone, as timed, and also from the output and the final states.
        with_last = torch.autograd.grad([output, *last], wanted, [data.d_output, *starts])
        return {
            **{name: x.detach() for name, x in found.items()},
            **dict(zip(names, train(0), strict=True)),
            **{f"{n} with d_h_n": d for n, d in zip(names, with_last, strict=True)},
        }

    if training:
        return Prepared(train, trained)
    return Prepared(infer, inferred, context=torch.inference_mode)


def _layer(library: Any, case: Case, data: Data, **options: Any) -> torch.nn.Module:
    """The library's layer for the case, with the case's weights."""
    if case.cell == "RNN":
        options["nonlinearity"] = case.nonlinearity
    heads = 1 if library is fastrnn else case.heads  # torch's layer computes a single head
    layer: torch.nn.Module = getattr(library, case.cell)(
        case.I,
        case.H // heads,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        device=data.d_output.device,
        dtype=data.d_output.dtype,
        **options,
    )
    parameters = list(layer.parameters())
    # For the modules of by_hand, and for an ensemble, the surrounding module holds the weights.
    if [p.shape for p in parameters] == [w.shape for w in data.weights]:
        with torch.no_grad():
            for parameter, weight in zip(parameters, data.weights, strict=True):
                parameter.copy_(weight)
    return layer


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the name of every operator that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def operators(prepared: Prepared, pass_: Pass) -> set[str]:
    """The names of torch's operators in one run, which distinguish a fast route from a fallback."""
    recorder = _Recorder()
    with torch.set_grad_enabled(pass_ == "training"), recorder:
        prepared.run(0)
    return recorder.names


def require_package(package: str, install: str) -> None:
    """Raise MissingPeerError with the install command if `package` cannot be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPeerError(f"{package} is not installed; to install it: {install}")


def make_provider(name: str) -> Provider:
    """The provider with that name.

    Raises:
        ValueError: no provider has that name.
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
    if name in STEP_PEERS:
        from fastrnn.bench.step_providers import PROVIDERS

        return PROVIDERS[name]()
    raise ValueError(f"peer {name!r} is not known; there are: {', '.join(PEERS)}")


STEP_PEERS = ("loop", "compile", "layer")  # for cells that are torch modules
PEERS = ("torch", "onnxruntime", "flashrnn", *STEP_PEERS)
