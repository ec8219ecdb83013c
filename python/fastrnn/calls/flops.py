"""The formulas with which ``torch.utils.flop_counter.FlopCounterMode`` counts fastrnn's operators.

As for torch's own operators, only matrix products count, with two operations for each
multiplication and addition. With R rows (T·B, the rows of packed data, or the sum of the lengths):

- forward: 2·R for each element of W_ih, W_hh and W_hr;
- backward: 2·R for each element of each of these weights whose gradient is needed; 2·R for each
  element of W_hr and W_hh for the gradient of the states, where W_hh is counted without the first
  step if no gradient of the initial states is needed; 2·R for each element of W_ih for the gradient
  of the input, in the first layer only if that is needed. With ``recompute`` forward's products
  are added.

The formulas are registered if the counter has been imported; this module does not import it.
"""

from __future__ import annotations

import sys
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .._options import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_MATRICES = ("weight_ih", "weight_hh", "weight_hr")


def register() -> None:
    """Register the formulas, if the counter module has been imported, also with active counters.

    A counter copies the formulas when it is constructed, which may have happened before this
    package was imported.
    """
    counter: Any = sys.modules.get(_COUNTER)
    if counter is None:
        return
    formulas = _formulas()
    counter.flop_registry.update(formulas)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            for operator, formula in formulas.items():
                mode.counter.flop_registry.setdefault(operator, formula)


def _formulas() -> dict[Any, Callable[..., int]]:
    operators = torch.ops.fastrnn
    return {
        operators.forward: partial(_forward, operators.forward.default, 0),
        operators.backward: partial(_backward, operators.backward.default, 0),
        operators.forward_members: partial(_forward, operators.forward_members.default, 1),
        operators.backward_members: partial(_backward, operators.backward_members.default, 1),
    }


class _Call:
    """A call of an operator; ``members`` is the number of leading axes of ensemble members."""

    def __init__(self, operator: Any, members: int, arguments: Sequence[Any]) -> None:
        names = (argument.name for argument in operator._schema.arguments)
        self.given = dict(zip(names, arguments, strict=False))
        self.options = parse(self.given["options"])
        self.rows, self.first = self._rows(members)
        kinds = self.options.weight_kinds
        self.names = [kind for _ in range(self._groups()) for kind in kinds]
        # 2·R for each element of the weights that are factors of a product.
        self.products = [
            2 * self.rows * prod(weight.shape[members:]) if name in _MATRICES else 0
            for name, weight in zip(self.names, self.given["weights"], strict=True)
        ]

    def _groups(self) -> int:
        return self.options.num_layers * self.options.directions

    def _rows(self, members: int) -> tuple[int, int]:
        """The number of rows over all steps, and the number of rows in first steps."""
        shape = self.given["input"].shape
        batch_sizes, lengths, h0 = (self.given[n] for n in ("batch_sizes", "lengths", "h0"))
        if batch_sizes is not None:
            rows = prod(shape[:-1])
            if _has_values(batch_sizes):
                return rows, prod(shape[:members]) * int(batch_sizes[0])
            return rows, 0 if h0 is None else prod(h0.shape[:members]) * h0.shape[-2]
        if lengths is not None and _has_values(lengths):
            return int(lengths.sum()), int((lengths > 0).sum())
        return prod(shape[:-1]), prod(shape[:members]) * shape[-2]


def _has_values(x: Tensor) -> bool:
    return type(x) is torch.Tensor and x.device.type != "meta"


def _forward(operator: Any, members: int, *arguments: Any, **_: Any) -> int:
    return sum(_Call(operator, members, arguments).products)


def _backward(operator: Any, members: int, *arguments: Any, **_: Any) -> int:
    call = _Call(operator, members, arguments)
    needs = list(call.given["needs"])
    states, weights = any(needs[1:5]), needs[5:]
    per_layer = len(weights) // call.options.num_layers
    flops = sum(call.products) if call.options.recompute else 0
    wanted = needs[0]  # whether the gradient of the layer's input is needed
    for first in range(0, len(weights), per_layer):
        own = slice(first, first + per_layer)
        if wanted or states or any(weights[own]):
            for name, product, need in zip(
                call.names[own], call.products[own], weights[own], strict=True
            ):
                through = product
                if name == "weight_ih":
                    through = product if wanted else 0
                elif name == "weight_hh" and not states:
                    through = product // max(call.rows, 1) * (call.rows - call.first)
                flops += through + (product if need else 0)
            wanted = True
    return flops
