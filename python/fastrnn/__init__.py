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
    from ._stream import Stream
    from .any_cell.explain import explain
    from .any_cell.recurrent import Recurrent
    from .any_cell.scan import scan
    from .calls.decompositions import decompositions
    from .layers.onnx_nodes import onnx_translation_table
    from .models.convert import convert, to_torch
    from .models.freeze import freeze, unfreeze
    from .models.gradient_flow import gradient_flow
    from .models.keras import from_keras
    from .models.patch import patch_torch, unpatch_torch
    from .models.quantize import quantize_dynamic
    from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

    __version__: str

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Stream",
    "Tensor",
    "__version__",
    "convert",
    "decompositions",
    "explain",
    "freeze",
    "from_dlpack",
    "from_keras",
    "functional",
    "gradient_flow",
    "info",
    "onnx_translation_table",
    "patch_torch",
    "quantize_dynamic",
    "reference",
    "scan",
    "to_torch",
    "unfreeze",
    "unpatch_torch",
]

_SUBMODULES = ("functional", "nn", "reference")
_HOMES = {  # name: the module it comes from, imported when the name is first used
    **dict.fromkeys(("Tensor", "from_dlpack"), "_C"),
    **dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), "nn"),
    **dict.fromkeys(("convert", "to_torch"), "models.convert"),
    "Recurrent": "any_cell.recurrent",
    "decompositions": "calls.decompositions",
    "explain": "any_cell.explain",
    **dict.fromkeys(("freeze", "unfreeze"), "models.freeze"),
    "from_keras": "models.keras",
    "gradient_flow": "models.gradient_flow",
    "onnx_translation_table": "layers.onnx_nodes",
    **dict.fromkeys(("patch_torch", "unpatch_torch"), "models.patch"),
    "quantize_dynamic": "models.quantize",
    "scan": "any_cell.scan",
    "Stream": "_stream",
}


_WITHOUT_TORCH = "functional, Stream, Tensor, from_dlpack, reference and info"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("fastrnn")
    elif name in _SUBMODULES or name in _HOMES:
        value = _imported(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _imported(name: str) -> Any:
    """A submodule, or what a submodule holds by this name."""
    try:
        module = import_module(f".{_HOMES.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise ModuleNotFoundError(
            f"fastrnn.{name} needs PyTorch, which is not installed: pip install torch. Without "
            f"PyTorch there are fastrnn's {_WITHOUT_TORCH}",
            name=error.name,
        ) from error
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
