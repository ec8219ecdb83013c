"""The autograd Function of a call whose engine runs without torch's dispatcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from .. import _C
from . import composed, operators, program_torch, transforms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .._engine import Prepared

_BEFORE = 4  # arguments of `Recurrence.apply` before the tensors
_NO_STEPS = (None,) * 6  # batch_sizes, lengths, reset and three masks


class Recurrence(torch.autograd.Function):
    """A call of the engine with its gradient.

    The engine computes a first gradient; a gradient that is itself differentiated comes from
    composed operations. In ctx style, because ``setup_context`` costs 30 µs a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        own: Prepared,
        call: Any,
        steps: tuple[Tensor | None, ...] | None,
        states: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Run a checked call.

        Arguments:
            own: the stack or the cell.
            call: its arguments, checked: a ``_C.Call`` or what `program_torch.call` gives.
            steps: batch_sizes, lengths, reset and the masks of `Extras`; None: none of them.
            states: whether hidden and cell are wanted.
            tensors: input, h0, c0, reset_h, reset_c and the weights, which have gradients.
        """
        input: Any = tensors[0]
        device = None
        if input.is_cuda:
            device = operators.device_of(_arguments(tensors, steps or _NO_STEPS), own.options, True)
        output, h_n, c_n, hidden, cell, saved = call.forward(states, True, False, device)
        ctx.own, ctx.stepped = own, steps is not None
        ctx.fresh = True  # `saved` is as forward left it
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, cell, saved, *(steps or ()), *tensors)
        return output, h_n, c_n, hidden if states else None, cell if states else None, None

    @staticmethod
    def backward(
        ctx: Any, d_output: Any, d_h_n: Any, d_c_n: Any, d_hidden: Any, d_cell: Any, _: None
    ) -> tuple[Tensor | None, ...]:
        cotangents = (d_output, d_hidden, d_cell, d_h_n, d_c_n)
        needs = ctx.needs_input_grad[_BEFORE:]
        if all(d is None for d in cotangents):
            return (None,) * (_BEFORE + len(needs))
        hidden, cell, saved, *tensors = ctx.saved_tensors
        steps: Sequence[Tensor | None] = _NO_STEPS
        if ctx.stepped:
            steps, tensors = tensors[: len(_NO_STEPS)], tensors[len(_NO_STEPS) :]
        arguments = _arguments(tensors, steps)
        own, plain = ctx.own, not torch.is_grad_enabled() and forward_ad._current_level < 0
        found: Any = None
        # The gradients of the gates overwrite `saved`. A second backward (retain_graph=True) finds
        # it spent, and runs forward again.
        spent = saved is not None and not ctx.__dict__.pop("fresh", False)
        if plain and not spent and _C.bypass_is_unobservable(cotangents):
            results = (hidden, cell, saved, *cotangents)
            found = _by_engine(own, arguments, results, needs, ctx.stepped)
        if found is None:
            kept = None if spent else (hidden, cell, saved)
            found = _unusual(own, arguments, kept, cotangents, needs, plain)
        return (*(None,) * _BEFORE, *found)


def _arguments(tensors: Sequence[Any], steps: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the operator ``forward`` up to the options."""
    input, h0, c0, reset_h, reset_c, *weights = tensors
    batch_sizes, lengths, reset, *masks = steps
    return input, h0, c0, weights, batch_sizes, lengths, reset, reset_h, reset_c, *masks


def _by_engine(
    own: Prepared,
    arguments: tuple[Any, ...],
    saved: tuple[Any, ...],
    needs: tuple[bool, ...],
    stepped: bool,
) -> Any:
    """The gradients by the engine, which may overwrite ``saved``; None where it cannot read one."""
    device = operators.device_of(arguments, own.options, True)
    try:
        if own.gradient_by_cells and not stepped:
            return program_torch.cells_backward(
                own.engine, arguments, saved, needs, True, own.cell, device
            )
        return program_torch.backward(own.options, arguments, saved, needs, True, own.cell, device)
    except TypeError:  # a gradient that vmap has wrapped, whose memory cannot be read
        if not transforms.is_mapped(saved[3:]):
            raise
    return None


def _unusual(
    own: Prepared,
    arguments: tuple[Any, ...],
    saved: tuple[Any, ...] | None,
    cotangents: tuple[Any, ...],
    needs: Sequence[bool],
    plain: bool,
) -> list[Tensor | None]:
    """The gradients where they are differentiated in turn, observed or mapped, or come a second
    time (``saved`` is None).
    """
    given, options = arguments, own.options
    if own.cell:  # with the axes of steps and layers
        given = (*(x if x is None else x.unsqueeze(0) for x in arguments[:3]), *arguments[3:])
        cotangents = tuple(d if d is None else d.unsqueeze(0) for d in cotangents)
    found: Any
    if plain or (forward_ad._current_level < 0 and transforms.is_transforming()):
        if saved is None:
            results = operators.forward_op(*given, options.text, False, True, False)
            saved = results[3:]
        empty = given[0].new_empty(0)
        saved = tuple(empty if x is None else x for x in saved)
        found = transforms.backward(*given, *saved, *cotangents, options.text, needs, False)
    elif forward_ad._current_level >= 0:
        found = transforms.gradients_of(transforms.ONE, options, given, needs, cotangents)
    else:
        found = composed.gradients(options, given, cotangents, needs)
    wanted: list[Any] = [d if need else None for d, need in zip(found, needs, strict=True)]
    if own.cell:
        wanted[:3] = [d if d is None else d.squeeze(0) for d in wanted[:3]]
    return wanted


_C.set_apply(super(torch.autograd.Function, Recurrence).apply)
