"""The engine as torch operators, ``fastrnn::forward`` and ``fastrnn::backward``.

One operator runs a whole stack, so that torch.compile and torch.export see one node. Registered
here: the schema; the CPU kernel, which allocates the outputs and calls the engine; the fake kernel,
which allocates alone; and autograd. The compute dtype of half types is float32, of others itself.

``forward`` gives, each contiguous and, where not wanted, of shape (0,):

======  ===================================  ==================================================
hidden  (L, T, B, D·O) or packed (L, N, D·O)  h at every step; with neither ``states`` nor ``save``
                                             the last layer's alone, L = 1
h_n     (L·D, B, O)                          h after the last step
c_n     (L·D, B, H)                          c after the last step; LSTM
cell    (L, T, B, D·H) or (L, N, D·H)        c at every step, compute dtype; LSTM, ``states`` or
                                             ``save``
gates   (L·D, T·B or N, saved values)        what backward needs besides, compute dtype; ``save``
======  ===================================  ==================================================

``backward`` gives the gradients of input, h0, c0 and each weight, (0,) where ``needs`` is False.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C, _composed
from ._engine import Scalars, engine_options, saved_size
from ._options import Options

if TYPE_CHECKING:
    from collections.abc import Sequence

_OPTIONS = (
    "str cell, int num_layers, bool bidirectional, bool bias, int proj_size, str activation, "
    "str gate_activation, bool reset_after"
)
_STEPS = "Tensor? batch_sizes, Tensor? lengths, Tensor? reset"

_library: Any = torch.library.Library("fastrnn", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"forward(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, {_STEPS}, {_OPTIONS}, "
    "bool states, bool save) -> (Tensor hidden, Tensor h_n, Tensor c_n, Tensor cell, Tensor gates)"
)
_library.define(
    f"backward(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, {_STEPS}, Tensor hidden, "
    "Tensor h_n, Tensor c_n, Tensor cell_state, Tensor gates, Tensor? d_output, Tensor? d_hidden, "
    f"Tensor? d_cell, Tensor? d_h_n, Tensor? d_c_n, {_OPTIONS}, bool[] needs) -> Tensor[]"
)


# ---- Kernels -------------------------------------------------------------------------------------


def _forward_outputs(
    input: Tensor,
    rows: int,
    weights: Sequence[Tensor],
    packed: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of ``forward`` for B = ``rows``, allocated and not filled."""
    *options, states, save = rest
    engine = engine_options(*options)
    two = engine.states == 2
    layers, directions = options[1], 2 if options[2] else 1
    out, hidden = weights[1].shape[1], weights[1].shape[0] // engine.gates
    every = states or save
    compute = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    entries = input.shape[:-1]  # (T, B), or packed (N,)
    count = entries[0] if packed else entries[0] * entries[1]
    saved = saved_size(engine, hidden)
    groups = layers * directions
    return (
        input.new_empty((layers if every else 1, *entries, directions * out)),
        input.new_empty((groups, rows, out)),
        input.new_empty((groups, rows, hidden) if two else (0,)),
        input.new_empty(
            (layers, *entries, directions * hidden) if two and every else (0,), dtype=compute
        ),
        input.new_empty((groups, count, saved) if save else (0,), dtype=compute),
    )


def _forward_cpu(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *options, states, save = rest
    packed = batch_sizes is not None
    rows = int(batch_sizes[0]) if batch_sizes is not None else input.shape[1]
    outputs = _forward_outputs(input, rows, weights, packed, *rest)
    hidden, h_n, c_n, cell, gates = outputs
    engine = engine_options(*options)
    two = engine.states == 2
    if save and (lengths is not None or weights[1].shape[0] // engine.gates % 16):
        # The engine leaves the padding of its vectors and of the rows as it is, but an operator
        # must give the same outputs every time.
        gates.zero_()
    _C.forward(
        engine,
        input,
        h0,
        c0,
        weights,
        batch_sizes,
        lengths,
        reset,
        hidden,
        h_n,
        c_n if two else None,
        cell if two and (states or save) else None,
        gates if save else None,
        all_layers=states or save,
        threads=torch.get_num_threads(),
    )
    return outputs


def _backward_outputs(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The outputs of ``backward``, allocated and not filled."""
    return [
        input.new_empty(x.shape if x is not None and needed else (0,))
        for x, needed in zip((input, h0, c0, *weights), needs, strict=True)
    ]


def _backward_fake(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return _backward_outputs(input, h0, c0, weights, rest[-1])


def _backward_cpu(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    hidden: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cell: Tensor,
    gates: Tensor,
    d_output: Tensor | None,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *options, needs = rest
    gradients = _backward_outputs(input, h0, c0, weights, needs)
    d_input, d_h0, d_c0, *d_weights = (
        d if needed else None for d, needed in zip(gradients, needs, strict=True)
    )
    engine = engine_options(*options)
    two = engine.states == 2
    _C.backward(
        engine,
        input,
        h0,
        c0,
        weights,
        batch_sizes,
        lengths,
        reset,
        hidden,
        h_n,
        c_n if two else None,
        cell if two else None,
        gates,
        d_output,
        d_hidden,
        d_cell,
        d_h_n,
        d_c_n,
        d_input,
        d_h0,
        d_c0,
        d_weights if any(needs[3:]) else None,
        threads=torch.get_num_threads(),
    )
    return gradients


# ---- Autograd ------------------------------------------------------------------------------------


class _Recurrence(torch.autograd.Function):
    """``forward`` with its gradient: the operator ``backward``, or, where the gradient is itself to
    be differentiated, the composed route.

    In ctx style: ``setup_context`` costs 30 µs a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: Scalars,
        states: bool,
        save: bool,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = forward_op(
                input, h0, c0, weights, batch_sizes, lengths, reset, *options, states, save
            )
        hidden, h_n, c_n, cell, gates = outputs
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates, *(t for t in (c_n, cell) if t.dim() == 1))
        # The user may change a final state in place, say to start some rows anew; backward keeps
        # its own.
        saved = (hidden, h_n.clone(), c_n.clone(), cell, gates) if save else (None,) * 5
        ctx.save_for_backward(batch_sizes, lengths, reset, input, h0, c0, *saved, *weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        batch_sizes, lengths, reset, input, h0, c0, *rest = ctx.saved_tensors
        saved, weights = rest[:5], rest[5:]
        needs = ctx.needs_input_grad[6:]
        if all(d is None for d in gradients):
            return (None,) * (6 + len(needs))
        arguments = (input, h0, c0, weights, batch_sizes, lengths, reset)
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True
            found = _composed_gradients(arguments, ctx.options, gradients, needs)
        else:
            if saved[0] is None:
                saved = forward_op(*arguments, *ctx.options, False, True)
            d_hidden, d_h_n, d_c_n, d_cell, _ = gradients
            d_output = None
            if d_hidden is not None and d_hidden.shape[0] == 1:  # the last layer's alone
                d_output, d_hidden = d_hidden[0], None
            d_states = (d_output, d_hidden, d_cell, d_h_n, d_c_n)
            found = backward_op(*arguments, *saved, *d_states, *ctx.options, needs)
        return (*(None,) * 6, *(d if need else None for d, need in zip(found, needs, strict=True)))


def _composed_gradients(
    arguments: tuple[Any, ...],
    options: Scalars,
    gradients: tuple[Tensor | None, ...],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as a graph of plain operations, to be differentiated again."""
    input, h0, c0, weights, batch_sizes, lengths, reset = arguments
    d_hidden, d_h_n, d_c_n, d_cell, _ = gradients
    with torch.enable_grad():
        # Views: a gradient ends at its argument, even where one argument is computed from another.
        views: list[Any] = [x if x is None else x.view_as(x) for x in (input, h0, c0, *weights)]
        stack = _composed.forward(
            Options(*options),  # type: ignore[arg-type]
            views[0],
            tuple(x for x in views[1:3] if x is not None) or None,
            views[3:],
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
        )
        pairs: list[tuple[Any, Any]] = [(stack.h_n, d_h_n), (stack.c_n, d_c_n)]
        if d_hidden is not None:
            layers = d_hidden.shape[0]  # every layer, or the last alone
            pairs += zip(stack.hidden[-layers:], d_hidden, strict=True)
        if d_cell is not None:
            pairs += zip(stack.cell, d_cell, strict=True)
        pairs = [(y, d) for y, d in pairs if d is not None and y.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [x for x, need in zip(views, needs, strict=True) if need],
                [d for _, d in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
        return [next(found) if need else None for need in needs]


def _forward_autograd(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> Any:
    *options, states, save = rest
    return _Recurrence.apply(  # type: ignore[no-untyped-call]
        tuple(options), states, save, batch_sizes, lengths, reset, input, h0, c0, *weights
    )


# ---- Registration --------------------------------------------------------------------------------


def _forward_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if batch_sizes is None:
        rows: Any = input.shape[1]
    elif h0 is not None:
        rows = h0.shape[1]
    else:  # a value of batch_sizes, not known here
        rows = torch.library.get_ctx().new_dynamic_size()
    return _forward_outputs(input, rows, weights, batch_sizes is not None, *rest)


_library.impl("forward", _forward_cpu, "CPU")
_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_cpu, "CPU")
torch.library.register_fake("fastrnn::forward", _forward_fake, lib=_library)
torch.library.register_fake("fastrnn::backward", _backward_fake, lib=_library)

forward_op = torch.ops.fastrnn.forward.default
backward_op = torch.ops.fastrnn.backward.default
