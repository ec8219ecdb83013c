"""The providers that compute a case: fastrnn and its peers, each in its fastest configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C
from fastrnn.bench import by_hand
from fastrnn.bench.explain import cuda_kernel
from fastrnn.bench.flashrnn_provider import FlashRnn
from fastrnn.bench.inference_providers import Frozen, Streamed, TorchCompiled
from fastrnn.bench.onnx_provider import OnnxRuntime
from fastrnn.bench.prepare import (
    Prepared,
    Provider,
    UnsupportedError,
    make_layer,
    prepare_layer,
)
from fastrnn.bench.report import OURS
from fastrnn.bench.step_providers import Compiled, Layer, Loop, prepare_recurrent
from fastrnn.info import COMPOSED

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.data import Data


class Fastrnn:
    """fastrnn's layers, called as a user calls them."""

    name: ClassVar[str] = "fastrnn"

    def __init__(self) -> None:
        self.version = fastrnn.__version__

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        if case.is_step:
            return prepare_recurrent(case, data, pass_)
        options: dict[str, Any] = {} if case.heads == 1 else {"heads": case.heads}
        if case.layer_norm:
            options["layer_norm"] = True
        layer = make_layer(fastrnn, case, data, **options)
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
        layer = make_layer(torch.nn, case, data)
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


BY_HAND: dict[str, type[Any]] = {  # by entry of `Case.options`
    "heads": by_hand.Heads,
    "resets": by_hand.StepByStep,
    "lengths": by_hand.Packed,
    "layer norm": by_hand.LayerNorm,
    "members": by_hand.Members,
}


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


PROVIDERS: dict[str, Callable[[], Provider]] = {
    provider.name: provider
    for provider in (
        *(Fastrnn, Frozen, Streamed),
        *(Torch, OnnxRuntime, FlashRnn, TorchCompiled),
        *(Loop, Compiled, Layer),
    )
}
STEP_PEERS = tuple(peer.name for peer in (Loop, Compiled, Layer))  # for cells of `cases.STEPS`


def make_provider(name: str) -> Provider:
    """The provider with that name.

    Raises:
        ValueError: no provider has that name.
        MissingPeerError: its package is not installed.
    """
    if name not in PROVIDERS:
        peers = ", ".join(n for n in PROVIDERS if n not in OURS)
        raise ValueError(f"peer {name!r} is not known; there are: {peers}")
    return PROVIDERS[name]()
