"""Recurrent layers on a C++ engine, for PyTorch and for NumPy alone.

>>> import fastrnn
>>> import torch
>>> layer = fastrnn.LSTM(3, 4)  # takes the place of torch.nn.LSTM(3, 4)
>>> output, (h_n, c_n) = layer(torch.zeros(5, 2, 3))
>>> output.shape
torch.Size([5, 2, 4])

``import fastrnn`` needs only NumPy. The layers and ``convert`` import torch when first used;
``fastrnn.functional`` and ``fastrnn.Stream`` work on NumPy and other arrays without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .info import info  # not lazily: the module of this name would take the function's place

if TYPE_CHECKING:
    from . import functional, reference
    from ._C import Tensor, from_dlpack
    from ._convert import convert, to_torch
    from ._decompositions import decompositions
    from ._gradient_flow import gradient_flow
    from ._keras import from_keras
    from ._onnx import onnx_translation_table
    from ._stream import Stream
    from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

    __version__: str

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "Tensor",
    "__version__",
    "convert",
    "decompositions",
    "from_dlpack",
    "from_keras",
    "functional",
    "gradient_flow",
    "info",
    "onnx_translation_table",
    "reference",
    "to_torch",
]

_SUBMODULES = ("functional", "nn", "reference")
_HOMES = {  # name: the module it comes from, imported when the name is first used
    **dict.fromkeys(("Tensor", "from_dlpack"), "_C"),
    **dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), "nn"),
    **dict.fromkeys(("convert", "to_torch"), "_convert"),
    "decompositions": "_decompositions",
    "from_keras": "_keras",
    "gradient_flow": "_gradient_flow",
    "onnx_translation_table": "_onnx",
    "Stream": "_stream",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("fastrnn")
    elif name in _SUBMODULES:
        value = import_module(f".{name}", __name__)
    elif name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
