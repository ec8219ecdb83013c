"""Import the weights of Keras's recurrent layers.

Keras multiplies from the right and stacks the gates as columns: its ``kernel`` is (I, G·H) and its
``recurrent_kernel`` (H, G·H); fastrnn's weights are (G·H, I) and (G·H, H). Keras orders the gates
i, f, c, o (LSTM) and z, r, h (GRU). The formulas are those of keras.layers.LSTM, GRU, SimpleRNN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..nn import GRU, LSTM, RNN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..layers.layer import Device, RecurrentLayer

Array = npt.NDArray[Any]

_LAYERS = {"LSTM": LSTM, "GRU": GRU, "SimpleRNN": RNN}
_ORDER = {  # the position of each of fastrnn's gates in Keras's order
    "LSTM": (0, 1, 2, 3),
    "GRU": (1, 0, 2),
    "SimpleRNN": (0,),
}
_SIGMOIDS = {"LSTM": (0, 1, 3), "GRU": (0, 1), "SimpleRNN": ()}  # gates with the gate activation
_ACTIVATIONS = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid", "linear": "identity"}
_GATE_ACTIVATIONS = {"sigmoid": "sigmoid", "hard_sigmoid": "hardsigmoid"}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


class _Direction(NamedTuple):
    """The weights of one layer and direction, in Keras's layout."""

    kernel: Array  # (I, G·H)
    recurrent_kernel: Array  # (H, G·H)
    bias: Array | None  # (G·H,); for a GRU with reset_after (2, G·H)


def from_keras(
    weights: Sequence[Any],
    cell: str,
    *,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    reset_after: bool | None = None,
    keras_version: int = 3,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> RecurrentLayer:
    """Make a layer from the weights of Keras's LSTM, GRU or SimpleRNN.

    The layer has ``batch_first=True``, as in Keras. Its output equals that of Keras with
    ``return_sequences=True``, also for ``Bidirectional`` with ``merge_mode="concat"``. Without
    ``return_sequences`` Keras returns ``h_n``; ``Bidirectional`` concatenates both directions.
    If Keras masks padding at the end of sequences, pass ``lengths``.

    Arguments:
        weights: the result of ``layer.get_weights()``: kernel (I, G·H), recurrent_kernel (H, G·H)
            and, with ``use_bias``, bias (G·H,); for a GRU with ``reset_after`` bias is (2, G·H).
            For ``Bidirectional``, the arrays of the forward layer, then those of the backward
            layer. For a stack of equal layers, a list of these lists, from the lowest layer up.
        cell: ``"LSTM"``, ``"GRU"`` or ``"SimpleRNN"``.
        activation: Keras's argument: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"linear"``.
        recurrent_activation: Keras's argument: ``"sigmoid"`` or ``"hard_sigmoid"``; LSTM and GRU.
        reset_after: Keras's argument of a GRU. With a bias, its shape determines the value;
            without a bias, None means Keras's default, True.
        keras_version: 3, where hard_sigmoid is clip(x/6 + 1/2, 0, 1); or 2, where it was
            clip(x/5 + 1/2, 0, 1) and the weights of the gates are multiplied by 6/5.
        device: the device of the parameters.
        dtype: the dtype of the parameters; None: that of the first kernel.

    Returns:
        `LSTM`, `GRU` or `RNN`.

    Raises:
        ValueError: an argument has an invalid value, the shapes of the arrays do not match, or the
            layers of a stack differ in units, bias or directions.
        TypeError: weights is not a list of arrays of real floating-point numbers.

    >>> import numpy as np
    >>> kernel, recurrent_kernel, bias = np.ones((3, 16)), np.ones((4, 16)), np.zeros(16)
    >>> from_keras([kernel, recurrent_kernel, bias], "LSTM")
    LSTM(3, 4, batch_first=True)
    """
    _check_choice("cell", cell, _LAYERS)
    _check_choice("activation", activation, _ACTIVATIONS)
    _check_choice("recurrent_activation", recurrent_activation, _GATE_ACTIVATIONS)
    if keras_version not in (2, 3):
        raise ValueError(f"keras_version must be 2 or 3, got {keras_version!r}")
    layers = _layers(weights, cell)
    _check_equal(layers)
    first = layers[0][0]
    own: dict[str, Any] = {"nonlinearity": _ACTIVATIONS[activation]}
    if cell != "SimpleRNN":
        own = {
            "activation": _ACTIVATIONS[activation],
            "gate_activation": _GATE_ACTIVATIONS[recurrent_activation],
        }
    if cell == "GRU":
        own["reset_after"] = _reset_after(first.bias, reset_after)
    elif reset_after is not None:
        raise ValueError(f"reset_after must be None for cell {cell!r}: only cell 'GRU' has it")
    elif cell == "SimpleRNN" and recurrent_activation != "sigmoid":
        raise ValueError(
            "recurrent_activation must be left out for cell 'SimpleRNN', which has no gates, "
            f"got {recurrent_activation!r}"
        )
    layer: RecurrentLayer = _LAYERS[cell](
        first.kernel.shape[0],
        first.recurrent_kernel.shape[0],
        num_layers=len(layers),
        bias=first.bias is not None,
        batch_first=True,
        bidirectional=len(layers[0]) == 2,
        device=device,
        dtype=dtype or getattr(torch, first.kernel.dtype.name),
        **own,
    )
    steeper = keras_version == 2 and recurrent_activation == "hard_sigmoid"
    ours = [w for parts in layers for part in parts for w in _converted(cell, part, steeper)]
    with torch.no_grad():
        for parameter, values in zip(layer.parameters(), ours, strict=True):
            parameter.copy_(torch.from_numpy(values))
    return layer


def _check_choice(argument: str, value: Any, choices: dict[str, Any]) -> None:
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"{argument} must be one of {names}, got {value!r}")


def _layers(weights: Any, cell: str) -> list[list[_Direction]]:
    """The layers of the stack, each with its one or two directions."""
    if not isinstance(weights, (list, tuple)) or not weights:
        raise TypeError(f"weights must be a list of arrays, got {type(weights).__name__}")
    if all(isinstance(part, (list, tuple)) for part in weights):
        named = [(f"weights[{k}]", part) for k, part in enumerate(weights)]
    else:
        named = [("weights", weights)]
    return [_directions(name, part, cell) for name, part in named]


def _directions(name: str, weights: Sequence[Any], cell: str) -> list[_Direction]:
    if len(weights) not in (2, 3, 4, 6):
        raise ValueError(
            f"{name} must hold kernel, recurrent_kernel and, with a bias, bias (twice for "
            f"Bidirectional), got {len(weights)} arrays"
        )
    each = len(weights) if len(weights) < 4 else len(weights) // 2
    directions = []
    for start in range(0, len(weights), each):
        kernel, recurrent, *bias = (
            _array(f"{name}[{start + k}]", weights[start + k]) for k in range(each)
        )
        directions.append(_Direction(kernel, recurrent, bias[0] if bias else None))
        _check_shapes(name, start, cell, directions[-1])
    return directions


def _array(name: str, value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype.name not in _DTYPES:
        names = ", ".join(_DTYPES)
        raise TypeError(f"{name} must be an array with dtype {names}, got {array.dtype}")
    return array


def _check_shapes(name: str, start: int, cell: str, part: _Direction) -> None:
    gates = len(_ORDER[cell])
    shape = part.recurrent_kernel.shape
    if len(shape) != 2 or shape[1] != gates * shape[0]:
        raise ValueError(
            f"{name}[{start + 1}], the recurrent_kernel of {cell!r}, must have the shape "
            f"(H, {gates}·H), got {shape}"
        )
    units = gates * shape[0]
    if part.kernel.ndim != 2 or part.kernel.shape[1] != units:
        raise ValueError(
            f"{name}[{start}], the kernel, must have the shape (I, {units}) to match the "
            f"recurrent_kernel of shape {shape}, got {part.kernel.shape}"
        )
    biases = [(units,), (2, units)] if cell == "GRU" else [(units,)]
    if part.bias is not None and part.bias.shape not in biases:
        expected = " or ".join(map(str, biases))
        raise ValueError(
            f"{name}[{start + 2}], the bias, must have the shape {expected}, got {part.bias.shape}"
        )


def _check_equal(layers: list[list[_Direction]]) -> None:
    """Raise an error for layers and directions that do not fit into one fastrnn stack."""

    def form(part: _Direction) -> tuple[Any, ...]:
        return part.recurrent_kernel.shape, None if part.bias is None else part.bias.shape

    first = layers[0]
    width = first[0].kernel.shape[0]
    for k, layer in enumerate(layers):
        if len(layer) != len(first) or any(form(part) != form(first[0]) for part in layer):
            raise ValueError(
                "weights: all layers must have the same units, bias and directions, but "
                f"weights[{k}] differs from weights[0]; call from_keras for each layer separately"
            )
        for part in layer:
            if part.kernel.shape[0] != width:
                raise ValueError(
                    f"weights[{k}][0], the kernel, must have {width} rows, one for each input "
                    f"feature of the layer, got {part.kernel.shape[0]}"
                )
        width = len(layer) * first[0].recurrent_kernel.shape[0]


def _reset_after(bias: Array | None, given: bool | None) -> bool:
    if bias is None:
        return True if given is None else bool(given)
    shown = bias.ndim == 2
    if given is not None and bool(given) != shown:
        raise ValueError(
            f"reset_after={given} does not match a bias of shape {bias.shape}: the bias is "
            "(2, 3·H) with reset_after=True and (3·H,) with reset_after=False"
        )
    return shown


def _converted(cell: str, part: _Direction, steeper: bool) -> list[npt.NDArray[np.float64]]:
    """``weight_ih, weight_hh`` and, with a bias, ``bias_ih, bias_hh``."""
    order = _ORDER[cell]

    def ours(columns: Array) -> npt.NDArray[np.float64]:
        """Gates in fastrnn's order, as rows."""
        gates = np.split(np.asarray(columns, np.float64).T, len(order))
        blocks = [gates[k] for k in order]
        if steeper:
            blocks = [b * 1.2 if k in _SIGMOIDS[cell] else b for k, b in enumerate(blocks)]
        return np.concatenate(blocks)

    found = [ours(part.kernel), ours(part.recurrent_kernel)]
    if part.bias is not None:
        input_bias, recurrent_bias = part.bias if part.bias.ndim == 2 else (part.bias, None)
        bias = ours(input_bias)
        found += [bias, np.zeros_like(bias) if recurrent_bias is None else ours(recurrent_bias)]
    return found
