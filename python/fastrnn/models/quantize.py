"""int8 weights for the recurrent layers of a model."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from .._checks import check_model
from ..any_cell.recurrent import Recurrent
from ..layers.cell import RecurrentCell
from ..layers.layer import RecurrentLayer
from ..layers.quantized import QuantizedGRU, QuantizedLayer, QuantizedLSTM, QuantizedRNN
from ..layers.surface import is_a
from ..nn import GRU, LSTM, RNN
from .convert import convert, swap
from .subclasses import BASES, COUNTERPARTS

if TYPE_CHECKING:
    from torch.nn import Module

_QUANTIZED: dict[type, type[QuantizedLayer]] = {
    RNN: QuantizedRNN,
    LSTM: QuantizedLSTM,
    GRU: QuantizedGRU,
}
_Model = TypeVar("_Model", bound="Module")


def quantize_dynamic(model: _Model, *, inplace: bool = False) -> _Model:
    """Give every recurrent layer of a model int8 weights: a quarter of the memory, for inference.

    Layers of fastrnn and of torch.nn become ``fastrnn.nn.QuantizedRNN``, ``QuantizedLSTM`` and
    ``QuantizedGRU``, which are called in the same way: ``lengths``, ``reset``, ``return_states``,
    a PackedSequence, one sequence. All other modules stay as they are. No data are needed.

    Each row of a weight matrix is rounded to 255 levels, with one scale: q = round(w / s),
    s = max|w| / 127. At each step each row of x_t and of h_{t-1} is rounded in the same way, the
    products are summed as integers, and everything else (biases, gates, h_t, c_t) is float32. So
    the results do not depend on the other rows of a batch, on the number of threads, or on cutting
    a sequence into chunks, and a layer with one direction gives the bits of
    ``fastrnn.Stream(layer, dtype="int8")``.

    The new layers are modules of their own, as those of ``torch.ao.quantization.quantize_dynamic``:
    not instances of fastrnn.LSTM or torch.nn.LSTM, with torch.nn's attributes (``input_size``,
    ``batch_first``, …), without parameters, and they refuse to be trained. ``state_dict()`` holds
    each matrix as int8 with its scales; load it into a model quantised in the same way. Pickles and
    state dicts can be read on any machine; files of ``torch.export`` only where the CPU has the
    same instruction set.

    Arguments:
        model: any module, or a layer.
        inplace: whether the model itself is changed; else it is copied, without the weights that
            are quantised, and keeps its layers.

    Returns:
        The model with its new layers, in ``eval()``; for a layer, the new layer.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Warns:
        UserWarning: names the recurrent modules that were left as they are, with the reason: a
            cell, a class of your own, an option that int8 does not support (``peephole``,
            ``layer_norm``, ``heads``, ``zoneout``), another dtype than float32, another device than
            the CPU; or there was none.

    >>> import torch
    >>> import fastrnn
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4), "out": torch.nn.Linear(4, 1)})
    >>> small = fastrnn.quantize_dynamic(model)
    >>> small["rnn"]
    QuantizedLSTM(3, 4)
    >>> output, (h_n, c_n) = small["rnn"](torch.randn(5, 2, 3))
    >>> output.shape
    torch.Size([5, 2, 4])
    >>> small.state_dict()["rnn.weight_hh_l0"].dtype
    torch.int8
    """
    check_model(model)
    found: dict[Module, QuantizedLayer] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        if not is_a(module, RecurrentLayer, RecurrentCell, Recurrent, *BASES):
            continue
        reason = _reason_against(module)
        try:
            if reason is None:
                found[module] = _quantised(module)
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            where = repr(path) if path else "the model itself"
            left[where] = f"{where} ({type(module).__qualname__}): {reason}"
    if left:
        count = f"{len(left)} recurrent module{'s' if len(left) > 1 else ''}"
        warnings.warn(
            f"quantize_dynamic left {count} as before: {'; '.join(left.values())}", stacklevel=2
        )
    elif not found and not any(is_a(module, QuantizedLayer) for module in model.modules()):
        warnings.warn("quantize_dynamic found no recurrent layer in the model", stacklevel=2)
    changed: Any = found.get(model)
    if changed is None and inplace:
        changed = swap(model, lambda _, m: type(found[m]) if m in found else None, _new(found))
    elif changed is None:
        changed = copy.deepcopy(model, {id(module): new for module, new in found.items()})
    return changed.eval()  # type: ignore[no-any-return]


def _new(found: dict[Module, QuantizedLayer]) -> Any:
    return lambda module, _: found[module]


def _reason_against(module: Any) -> str | None:
    """Why a recurrent module cannot be quantised; None where only its layer can tell."""
    if is_a(module, RecurrentCell, BASES[1]):
        return "a cell; fastrnn.Stream runs a layer step by step with int8 weights"
    if is_a(module, Recurrent):
        return "the maths of its cell is not one of RNN, LSTM and GRU"
    if type(module) not in COUNTERPARTS and type(module) not in _QUANTIZED:
        return "its class has a forward or weights of its own"
    if any(name not in module._parameters for name in module._flat_weights_names):
        return "its weights are not plain parameters"
    return None


def _quantised(module: Any) -> QuantizedLayer:
    ours: Any = convert(module) if type(module) in COUNTERPARTS else module
    new = _QUANTIZED[type(ours)].from_float(ours)
    for name in ("_forward_hooks", "_forward_pre_hooks"):  # and their options
        for part in (name, f"{name}_with_kwargs", f"{name}_always_called"):
            if part in vars(module):
                getattr(new, part).update(getattr(module, part))
    return new
