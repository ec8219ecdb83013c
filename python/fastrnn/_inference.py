"""The short way of a layer's or a cell's call where no gradient is recorded.

The same checks, engine and results as the long way, in one call of ``_C.infer``, which allocates
the outputs too. Whatever is unusual goes the long way, which also says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _C
from ._by_program import takes
from ._engine import NO_EXTRAS, engine_options, scalars
from ._program_torch import FrozenWeights

if TYPE_CHECKING:
    from torch import Tensor

    from ._options import Options

_ATTRIBUTE = "_prepared"


class Prepared:
    """What a module keeps for the engine from call to call: no part of its state, never copied."""

    __slots__ = ("by_program", "engine", "frozen", "names", "options")

    def __init__(self, options: Options, names: tuple[str, ...]) -> None:
        self.options = options
        self.names = names
        self.engine = engine_options(*scalars(options))
        self.by_program = takes(options, NO_EXTRAS)
        self.frozen: _C.Frozen | FrozenWeights | None = None  # by fastrnn.freeze

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        return Prepared(self.options, self.names)


def prepared(module: Any) -> Prepared:
    """The module's own, made where it has none or its options are others by now."""
    kept: Prepared | None = module.__dict__.get(_ATTRIBUTE)
    if kept is None or kept.options is not module._options:
        kept = Prepared(module._options, tuple(module._flat_weights_names))
        module.__dict__[_ATTRIBUTE] = kept
    return kept


def run(
    module: Any, input: Any, hx: tuple[Any, ...] | None, batch_first: bool, cell: bool
) -> tuple[Tensor, ...] | None:
    """Output (not of a cell), h_n and, of an LSTM, c_n; None where it takes the long way.

    Arguments:
        module: a layer or a cell.
        input: (T, B, I), with ``batch_first`` (B, T, I); of a cell (B, I).
        hx: the states in torch's shapes, or None.
    """
    if torch.compiler.is_compiling():
        return None
    own = prepared(module)
    if own.by_program:
        return None
    frozen: Any = own.frozen
    found: tuple[Tensor, ...] | None = _C.infer(
        own.engine, frozen, module._parameters, own.names, input, hx, batch_first, cell
    )
    return found


def frozen(module: Any) -> _C.Frozen | FrozenWeights | None:
    """The weights as they were packed when the module was frozen; None where it was not."""
    if torch.compiler.is_compiling():
        return None
    kept: Prepared | None = module.__dict__.get(_ATTRIBUTE)
    return None if kept is None or kept.options is not module._options else kept.frozen


def freeze(module: Any, weights: tuple[Tensor, ...]) -> None:
    """Pack a module's weights, in the order of the flat list, for the calls to come."""
    own = prepared(module)
    if own.by_program:
        own.frozen = FrozenWeights(weights)
        return
    example = weights[0].new_empty((1, 1, module.input_size))
    with torch.no_grad():
        own.frozen = _C.Frozen(own.engine, example, weights)


def forget(module: Any) -> None:
    """Drop what a module keeps for the engine."""
    module.__dict__.pop(_ATTRIBUTE, None)
