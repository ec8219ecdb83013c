"""Freezing: pack the weights of a model's layers once, for serving."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import _C
from .._checks import check_model
from ..calls.program_torch import FrozenWeights
from ..layers.cell import RecurrentCell
from ..layers.layer import RecurrentLayer
from ..layers.surface import is_a

if TYPE_CHECKING:
    from torch.nn import Module

_Model = TypeVar("_Model", bound="Module")


def freeze(model: _Model) -> _Model:
    """Pack the weights of every fastrnn layer and cell of a model once; while it is frozen, do not
    write to them in ways that bypass torch (``.data``, a NumPy view): the layer misses such writes.

    Without freezing, every call reads the weights from their arrays and never misses a write. A
    call with few rows and steps then takes up to twice as long as with packed weights; for a call
    with many there is almost no difference. Freezing needs as much extra memory as the weights.

    A layer unfreezes automatically at the first call after a write that torch's version counter
    sees (``load_state_dict``, an optimiser's step, any in-place operation), after a parameter was
    replaced, after ``train()``, ``to()`` and similar methods, and at a call that records a
    gradient. It then reads its weights at every call again. Copies and pickles of a model are not
    frozen.

    Arguments:
        model: any module; its layers and cells on a CPU are frozen with their current weights.

    Returns:
        The model.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Warns:
        UserWarning: names the layers that were not frozen, because their weights are computed at
            every call (parametrizations, weight norm) or are on another device.

    >>> import fastrnn, torch
    >>> model = torch.nn.Sequential(fastrnn.GRU(3, 4)).eval()
    >>> x = torch.randn(1, 1, 3)
    >>> with torch.inference_mode():
    ...     before = model(x)[0]
    ...     torch.equal(freeze(model)(x)[0], before)
    True
    """
    check_model(model)
    left = []
    for path, module in model.named_modules():
        if not is_a(module, RecurrentLayer, RecurrentCell):
            continue
        reason = _freeze_one(module)
        if reason:
            left.append(f"{path or 'the model itself'}: {reason}")
    if left:
        warnings.warn(
            "freeze: these layers were not frozen and still read their weights at every call: "
            + "; ".join(left),
            stacklevel=2,
        )
    return model


def unfreeze(model: _Model) -> _Model:
    """Undo `freeze`: every layer and cell of the model reads its weights at every call again.

    Arguments:
        model: any module.

    Returns:
        The model.

    Raises:
        TypeError: model is not a torch.nn.Module.

    >>> import fastrnn
    >>> unfreeze(freeze(fastrnn.LSTM(3, 4)))
    LSTM(3, 4)
    """
    check_model(model)
    for module in model.modules():
        own: Any = getattr(module, "_prepared", None)
        if is_a(module, RecurrentLayer, RecurrentCell) and own is not None:
            own.frozen = None
    return model


def _freeze_one(module: Any) -> str | None:
    """Freeze a layer or a cell; return the reason if that is not possible."""
    if module._options is None:
        return "the engine does not support its class or its nonlinearity"
    names = module._flat_weights_names
    weights = [w for name in names if (w := module._parameters.get(name)) is not None]
    if len(weights) != len(names) or any(type(w) is not torch.nn.Parameter for w in weights):
        return "its weights are not plain parameters"
    if any(w.device.type != "cpu" for w in weights):
        return f"its weights are on {weights[0].device}, not on the CPU"
    try:
        own, example = module._prepared, weights[0].new_empty((1, 1, module.input_size))
        with torch.no_grad():
            if own.by_cells:
                own.frozen = _C.Frozen(own.engine, example, tuple(weights))
            else:
                own.frozen = FrozenWeights(weights)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
