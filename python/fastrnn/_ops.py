"""The engine as torch operators, ``fastrnn::forward`` and ``fastrnn::backward``.

One operator runs a whole stack, so that torch.compile and torch.export see one node. Registered
here: the schema; the kernel, which allocates the outputs and calls the engine, or on a GPU what
there is in its place; the fake kernel, which allocates alone; and autograd. The compute dtype of
half types is float32, of others itself.

``forward`` gives, each contiguous and, where not wanted, of shape (0,):

======  ===================================  ==================================================
output  (T, B, D·O) or packed (N, D·O)       h of the last layer at every step, a tensor of its own:
                                             it may be written to before ``backward``
h_n     (L·D, B, O)                          h after the last step
c_n     (L·D, B, H)                          c after the last step; LSTM
hidden  (L, T, B, D·O) or (L, N, D·O)        h of every layer at every step; ``states`` or ``save``
cell    (L, T, B, D·H) or (L, N, D·H)        c at every step, compute dtype; LSTM, ``states`` or
                                             ``save``
gates   (L·D, T·B or N, saved values)        what backward needs besides, compute dtype; ``save``,
                                             not with ``recompute``
======  ===================================  ==================================================

``backward`` gives the gradients of input, h0, c0, reset_h, reset_c and each weight, (0,) where
``needs`` is False. The arrays of `Extras` stand after ``reset``, then the fields of `Options`.

With ``by_torch`` torch's own call computes, not the engine (_by_torch.py). Then ``hidden`` with
``save`` alone holds the last layer, (1, …); there is no cell; and ``gates`` is what cuDNN left for
its backward, bytes of a number that nobody knows before, (0,) where another library computed.

``forward_members`` and ``backward_members`` do the same for an ensemble in one call of the engine:
every tensor but batch_sizes, and every tensor that comes out, has a leading axis, the members. An
array that members share has a stride of 0 there.

Their autograd, and what they do under the transforms of ``torch.func``, is in _transforms.py.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    _C,
    _by_program,
    _by_torch,
    _by_torch_operators,
    _checks,
    _composed,
    _flops,
    _program_torch,
)
from ._engine import Extras, Scalars, engine_options, saved_size
from ._options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# output, h_n, c_n, hidden, cell, gates; a kernel called by itself gives None for what is not
# wanted.
ForwardOutputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_OPTIONS = (
    "str cell, int num_layers, bool bidirectional, bool bias, int proj_size, str activation, "
    "str gate_activation, bool reset_after, bool peephole, bool layer_norm, int heads, "
    "float zoneout_h, float zoneout_c, float grad_clip, bool recompute"
)
_STEPS = "Tensor? batch_sizes, Tensor? lengths, Tensor? reset"
_EXTRAS = (
    "Tensor? reset_h, Tensor? reset_c, Tensor? dropout_mask, Tensor? zoneout_h_mask, "
    "Tensor? zoneout_c_mask"
)

_FORWARD = (
    f"(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, {_STEPS}, {_EXTRAS}, {_OPTIONS}, "
    "bool states, bool save, bool by_torch) -> (Tensor output, Tensor h_n, Tensor c_n, "
    "Tensor hidden, Tensor cell, Tensor gates)"
)
_BACKWARD = (
    f"(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, {_STEPS}, {_EXTRAS}, "
    "Tensor hidden, Tensor cell_state, Tensor gates, Tensor? d_output, Tensor? d_hidden, "
    f"Tensor? d_cell, Tensor? d_h_n, Tensor? d_c_n, {_OPTIONS}, bool[] needs, "
    "bool by_torch) -> Tensor[]"
)

library: Any = torch.library.Library("fastrnn", "DEF")  # type: ignore[no-untyped-call]
for _members in ("", "_members"):
    library.define(f"forward{_members}{_FORWARD}")
    library.define(f"backward{_members}{_BACKWARD}")


# ---- Kernels -------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """Of one call: the shapes of what ``forward`` gives."""

    output: tuple[int, ...]
    h_n: tuple[int, ...]
    c_n: tuple[int, ...] | None  # None: not wanted
    hidden: tuple[int, ...] | None
    cell: tuple[int, ...] | None
    gates: tuple[int, ...] | None
    padding: bool  # whether the engine leaves a part of `gates` unwritten


_options = lru_cache(maxsize=256)(Options)


def _sizes(
    engine: _C.Options,
    input: Tensor,
    rows: int,
    weights: Sequence[Tensor],
    steps: Sequence[Any],
    options: Sequence[Any],
    states: bool,
    save: bool,
) -> _Sizes:
    """The shapes for B = ``rows``."""
    layers, directions = options[1], 2 if options[2] else 1
    hidden = weights[0].shape[0] // engine.gates
    out = options[4] or hidden
    every, two = states or save, engine.states == 2
    entries = input.shape[:-1]  # (T, B), or packed (N,)
    groups = layers * directions
    batch_sizes, lengths, reset, *given = steps
    by_program = not input.is_cuda and _by_program.takes(_options(*options), Extras(*given))
    made_again = options[-1] or (
        not by_program
        and not input.is_cuda
        and _by_program.takes_backward(_options(*options), Extras(*given))
    )
    gates = None
    if save and not made_again and by_program:
        count = entries[0] * rows if batch_sizes is None else batch_sizes.shape[0] * rows
        ragged = batch_sizes is not None or lengths is not None
        dtype = str(input.dtype).removeprefix("torch.")
        width = _by_program.kept_width(
            _options(*options), input.shape[-1], hidden, dtype, Extras(*given), ragged,
            reset is not None,
        )  # fmt: skip
        gates = (groups, count, width)
    elif save and not made_again:
        count = entries[0] if len(entries) == 1 else entries[0] * entries[1]
        gates = (groups, count, saved_size(engine, hidden))
    return _Sizes(
        output=(*entries, directions * out),
        h_n=(groups, rows, out),
        c_n=(groups, rows, hidden) if two else None,
        hidden=(layers, *entries, directions * out) if every else None,
        cell=(layers, *entries, directions * hidden) if two and every else None,
        gates=gates,
        padding=not by_program and (hidden % 16 != 0 or lengths is not None),
    )


class _Device(NamedTuple):
    """What the engine is told of the device, and what it may keep there."""

    workspace: Callable[[int], Tensor] | None = None  # None: the engine's own
    stream: int = 0
    allow_tf32: bool = False
    persistent: bool = False


def _device(given: Sequence[Any], options: Sequence[Any], training: bool) -> _Device:
    """Of a call with these tensors, as an operator takes them."""
    input: Tensor = given[0]
    if not input.is_cuda:
        return _Device()
    return _Device(
        # On the current stream, so that the memory is used again only after the call.
        lambda size: torch.empty(size, dtype=torch.uint8, device=input.device),
        torch.cuda.current_stream(input.device).cuda_stream,
        input.dtype == torch.float32 and _by_torch.allows_tf32(),
        _by_torch_operators.kernels(given, options, training).persistent,
    )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _run_forward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
    frozen: Any = None,
) -> ForwardOutputs:
    """Allocate the outputs and call the engine; None for what is not wanted."""
    extras, options, (states, save) = rest[:5], rest[5:-2], rest[-2:]
    engine = engine_options(*options)
    rows = input.shape[1] if batch_sizes is None else _checks.packed_rows(batch_sizes, input)
    steps = (batch_sizes, lengths, reset, *extras)
    sizes = _sizes(engine, input, rows, weights, steps, options, states, save)
    compute = _compute_dtype(input.dtype)
    output = input.new_empty(sizes.output)
    h_n = input.new_empty(sizes.h_n)
    c_n = hidden = cell = gates = None
    if sizes.c_n is not None:
        c_n = input.new_empty(sizes.c_n)
    if sizes.hidden is not None:
        hidden = input.new_empty(sizes.hidden)
    if sizes.cell is not None:
        cell = input.new_empty(sizes.cell, dtype=compute)
    if sizes.gates is not None:
        # The engine leaves the padding of vectors and the rows that do not run as they are, but
        # an operator must give the same outputs every time.
        allocate = input.new_zeros if sizes.padding else input.new_empty
        gates = allocate(sizes.gates, dtype=compute)
    given = (input, h0, c0, weights, batch_sizes, lengths, reset, *extras)
    if not input.is_cuda and _by_program.takes(_options(*options), Extras(*extras)):
        outputs = _by_program.Outputs(output, h_n, c_n, hidden, cell, gates)
        _program_torch.forward(_options(*options), given, outputs, frozen)
        return output, h_n, c_n, hidden, cell, gates
    device = _device(given, options, save)
    _C.forward(
        engine,
        input,
        h0,
        c0,
        weights,
        batch_sizes,
        lengths,
        reset,
        output if hidden is None else hidden,
        h_n,
        c_n,
        cell,
        gates,
        states or save,
        torch.get_num_threads(),
        device.workspace,
        frozen,
        extras[:2],
        device.stream,
        device.allow_tf32,
        device.persistent,
        None if hidden is None or input.is_cuda else output,
    )
    if hidden is not None and input.is_cuda:
        output.copy_(hidden[-1])
    return output, h_n, c_n, hidden, cell, gates


def _whole(outputs: ForwardOutputs, input: Tensor, by_torch: bool = False) -> tuple[Tensor, ...]:
    """The outputs as the schema has them: (0,) in place of None."""
    output, h_n, c_n, hidden, cell, gates = outputs
    compute = _compute_dtype(input.dtype)
    saved = torch.uint8 if by_torch else compute
    return (
        output,
        h_n,
        input.new_empty(0) if c_n is None else c_n,
        input.new_empty(0) if hidden is None else hidden,
        input.new_empty(0, dtype=compute) if cell is None else cell,
        input.new_empty(0, dtype=saved) if gates is None else gates,
    )


def _forward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    input, *given, by_torch = arguments
    if not by_torch and _by_torch_operators.leaves_to_engine(*arguments):
        return _whole(_run_forward(input, *given), input)
    outputs = _by_torch_operators.forward_kernel(*arguments)
    return _whole(outputs, input, by_torch)


def _forward_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options, (states, save, by_torch) = rest[5:-3], rest[-3:]
    if batch_sizes is None:
        rows: Any = input.shape[1]
    elif h0 is not None:
        rows = h0.shape[1]
    else:  # a value of batch_sizes, not known here
        rows = torch.library.get_ctx().new_dynamic_size()
    steps = (batch_sizes, lengths, reset, *rest[:5])
    sizes = _sizes(engine_options(*options), input, rows, weights, steps, options, states, save)
    if by_torch:
        hidden = sizes.hidden if states or not save else (1, *sizes.output)
        sizes = sizes._replace(hidden=hidden, cell=None, gates=None)
    return _whole(_new_outputs(input, sizes), input, by_torch)


def _new_outputs(input: Tensor, sizes: _Sizes, members: tuple[int, ...] = ()) -> ForwardOutputs:
    compute = _compute_dtype(input.dtype)

    def new(shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor | None:
        return None if shape is None else input.new_empty(members + shape, dtype=dtype)

    return (
        input.new_empty(members + sizes.output),
        input.new_empty(members + sizes.h_n),
        new(sizes.c_n, input.dtype),
        new(sizes.hidden, input.dtype),
        new(sizes.cell, compute),
        new(sizes.gates, compute),
    )


def _new_gradients(
    input: Tensor, others: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """What is wanted of the gradients of ``input`` and ``others``, to be written by the engine."""
    return [
        input.new_empty(x.shape) if x is not None and needed else None
        for x, needed in zip((input, *others), needs, strict=True)
    ]


def _run_backward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    dropout_mask: Tensor | None,
    zoneout_h_mask: Tensor | None,
    zoneout_c_mask: Tensor | None,
    hidden: Tensor,
    cell: Tensor | None,
    gates: Tensor | None,
    d_output: Tensor | None,
    d_hidden: Tensor | None,
    d_cell: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    *rest: Any,
    consume_gates: bool = False,
) -> list[Tensor | None]:
    """Allocate the gradients that are wanted, None for the others, and call the engine."""
    *options, needs = rest
    gradients = _new_gradients(input, (h0, c0, reset_h, reset_c, *weights), needs)
    d_input, d_h0, d_c0, d_reset_h, d_reset_c, *d_weights = gradients
    engine = engine_options(*options)
    extras = (reset_h, reset_c, dropout_mask, zoneout_h_mask, zoneout_c_mask)
    given = (input, h0, c0, weights, batch_sizes, lengths, reset, *extras)
    if not input.is_cuda and _by_program.takes_backward(_options(*options), Extras(*extras)):
        _program_torch.backward(
            _options(*options),
            given,
            _by_program.Outputs(
                None,
                None,
                hidden=hidden,
                cell=cell if engine.states == 2 else None,
                gates=None if gates is None or gates.dim() == 1 else gates,
            ),
            _by_program.Cotangents(d_output, d_hidden, d_cell, d_h_n, d_c_n),
            _by_program.Gradients(d_input, d_h0, d_c0, d_reset_h, d_reset_c, d_weights),
        )
        return gradients
    device = _device(given, options, True)
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
        cell if engine.states == 2 else None,
        None if gates is None or gates.dim() == 1 else gates,
        d_output,
        d_hidden,
        d_cell,
        d_h_n,
        d_c_n,
        d_input,
        d_h0,
        d_c0,
        d_weights if any(needs[5:]) else None,
        consume_gates,
        torch.get_num_threads(),
        device.workspace,
        device.stream,
        device.allow_tf32,
        device.persistent,
    )
    return gradients


def _backward_kernel(*arguments: Any) -> list[Tensor]:
    input, *given, by_torch = arguments
    if not by_torch and _by_torch_operators.leaves_to_engine(*arguments):
        found = _run_backward(input, *given)
    else:
        found = _by_torch_operators.backward_kernel(*arguments)
    return [input.new_empty(0) if d is None else d for d in found]


def _backward_fake(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [
        input.new_empty(x.shape if x is not None and needed else (0,))
        for x, needed in zip((input, h0, c0, *rest[3:5], *weights), rest[-2], strict=True)
    ]


# ---- Kernels of ensembles ------------------------------------------------------------------------


def _first(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.select(0, 0)


def _dense(x: Tensor) -> Tensor:
    """``x`` with the part of each member contiguous; shared ones stay shared."""
    return x if x.select(0, 0).is_contiguous() else x.contiguous()


def _forward_members_cpu(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    extras, options, (states, save) = rest[:5], rest[5:-2], rest[-2:]
    engine = engine_options(*options)
    members, one = input.shape[0], input.select(0, 0)
    rows = one.shape[1] if batch_sizes is None else _checks.packed_rows(batch_sizes, one)
    first = [w.select(0, 0) for w in weights]
    steps = (batch_sizes, lengths, reset, *extras)
    sizes = _sizes(engine, one, rows, first, steps, options, states, save)
    outputs = _new_outputs(input, sizes, (members,))
    output, h_n, c_n, hidden, cell, gates = outputs
    if gates is not None and sizes.padding:
        gates.zero_()  # for the reason in _run_forward
    _C.forward_members(
        engine,
        members,
        input,
        h0,
        c0,
        weights,
        batch_sizes,
        None if lengths is None else _dense(lengths),
        reset,
        output if hidden is None else hidden,
        h_n,
        c_n,
        cell,
        gates,
        states or save,
        torch.get_num_threads(),
        extras[:2],
        None if hidden is None else output,
    )
    return _whole(outputs, input)


def _forward_members_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    one = _forward_fake(
        input.select(0, 0),
        _first(h0),
        _first(c0),
        [w.select(0, 0) for w in weights],
        batch_sizes,
        _first(lengths),
        _first(reset),
        *map(_first, rest[:5]),
        *rest[5:],
    )
    return tuple(y if y.dim() == 1 else y.new_empty((input.shape[0], *y.shape)) for y in one)


def _backward_members_cpu(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    dropout_mask: Tensor | None,
    zoneout_h_mask: Tensor | None,
    zoneout_c_mask: Tensor | None,
    hidden: Tensor,
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
    engine = engine_options(*options)
    gradients = _new_gradients(input, (h0, c0, reset_h, reset_c, *weights), needs)
    d_input, d_h0, d_c0, _, _, *d_weights = gradients
    _C.backward_members(
        engine,
        input.shape[0],
        input,
        h0,
        c0,
        weights,
        batch_sizes,
        None if lengths is None else _dense(lengths),
        reset,
        _dense(hidden),
        _dense(cell) if engine.states == 2 else None,
        None if gates.dim() == 1 else _dense(gates),
        d_output,
        d_hidden,
        d_cell,
        d_h_n,
        d_c_n,
        d_input,
        d_h0,
        d_c0,
        d_weights if any(needs[5:]) else None,
        torch.get_num_threads(),
    )
    return [input.new_empty(0) if d is None else d for d in gradients]


# ---- Autograd of calls by themselves -------------------------------------------------------------


def forward(
    *arguments: Any, by_torch: bool = False, frozen: _C.Frozen | None = None
) -> ForwardOutputs:
    """``fastrnn::forward``, by the shorter way where that is the same; for its arguments see there.

    What is not wanted may come back as None. The operator itself knows no ``frozen``, and saves by
    itself where a gradient is recorded.
    """
    outputs: ForwardOutputs
    if (
        by_torch
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or not _C.nothing_listens((*arguments[:3], *arguments[3], *arguments[7:12]))
    ):
        if not torch.compiler.is_compiling():
            _flops.register()
        outputs = forward_op(*arguments[:-1], False, by_torch)
    else:
        save = arguments[-1]
        outputs = _apply(*arguments[:-1]) if save else _run_forward(*arguments, frozen=frozen)
    return outputs


# What says that a call is not by itself: a mode, a trace, a profile; a gradient recorded, a cast, a
# transform.
_C.set_torch(
    Tensor,
    torch.nn.Parameter,
    torch.get_num_threads,
    [torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state],
    [(vars(torch.autograd.profiler), "_is_profiler_enabled")],
    [
        torch.is_grad_enabled,
        partial(torch.is_autocast_enabled, "cpu"),
        torch._C._functorch.maybe_current_level,
    ],
    [(vars(forward_ad), "_current_level")],
)


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
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        dropout_mask: Tensor | None,
        zoneout_h_mask: Tensor | None,
        zoneout_c_mask: Tensor | None,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        *weights: Tensor,
    ) -> ForwardOutputs:
        steps = (batch_sizes, lengths, reset)
        masks = (dropout_mask, zoneout_h_mask, zoneout_c_mask)
        arguments = (input, h0, c0, weights, *steps, reset_h, reset_c, *masks)
        outputs = _run_forward(*arguments, *options, states, True)
        output, h_n, c_n, hidden, cell, gates = outputs
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.fresh = True  # `gates` is as forward left it
        ctx.save_for_backward(*arguments[:3], *arguments[4:], hidden, cell, gates, *weights)
        return output, h_n, c_n, hidden if states else None, cell if states else None, None

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        given, saved, weights = tensors[:11], tensors[11:14], tensors[14:]
        needs = ctx.needs_input_grad[8:]
        if all(d is None for d in gradients):
            return (None,) * (8 + len(needs))
        input = given[0]
        arguments = (*given[:3], weights, *given[3:])
        found: Sequence[Tensor | None] | None = None
        recorded = torch.is_grad_enabled()  # create_graph=True
        if recorded or forward_ad._current_level >= 0:
            found = _differentiable_gradients(arguments, ctx.options, gradients, needs)
        if found is None:
            # The gradients of the gates take the place of the gates, where nobody else has these.
            # A second backward (retain_graph=True) runs forward again; `pop` gives them away once.
            # With `recompute`, the last option, there are none.
            if not (ctx.options[-1] or ctx.__dict__.pop("fresh", False)):
                again = (*arguments, *ctx.options, False, True)
                by_itself = _C.nothing_listens((*given[:3], *weights, *given[6:]))
                outputs = _run_forward(*again) if by_itself else forward_op(*again, False)
                saved = outputs[3:]
            d_states = _cotangents(gradients)
            tensors = (*given[:3], *weights, *given[6:], *d_states)
            if not recorded and _C.nothing_listens(tensors):
                try:
                    found = _run_backward(
                        *arguments, *saved, *d_states, *ctx.options, needs, consume_gates=True
                    )
                except TypeError:  # a gradient that vmap has wrapped, or what cannot be read at all
                    from . import _transforms

                    if not _transforms.is_mapped(d_states):
                        raise
            if found is None:
                hidden, cell, gates = saved
                cell = input.new_empty(0) if cell is None else cell
                gates = input.new_empty(0) if gates is None else gates
                from . import _transforms

                found = _transforms.backward(
                    *arguments, hidden, cell, gates, *d_states, *ctx.options, needs, False
                )
        return (*(None,) * 8, *(d if need else None for d, need in zip(found, needs, strict=True)))


def _cotangents(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """d_output, d_hidden, d_cell, d_h_n, d_c_n, from the gradients of `_Recurrence`'s outputs."""
    d_output, d_h_n, d_c_n, d_hidden, d_cell, _ = gradients
    return d_output, d_hidden, d_cell, d_h_n, d_c_n


def _apply(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
) -> Any:
    steps, (reset_h, reset_c, *masks) = (batch_sizes, lengths, reset), rest[:5]
    differentiable = (input, h0, c0, reset_h, reset_c, *weights)
    return _Recurrence.apply(  # type: ignore[no-untyped-call]
        rest[5:-1], rest[-1], *steps, *masks, *differentiable
    )


def _differentiable_gradients(
    arguments: tuple[Any, ...],
    options: Scalars,
    gradients: tuple[Tensor | None, ...],
    needs: Sequence[bool],
) -> list[Tensor | None] | None:
    """The gradients as functions of their arguments; None where the operator gives them so."""
    if forward_ad._current_level >= 0:
        from . import _transforms

        cotangents = _cotangents(gradients)
        return _transforms.gradients_of(_transforms.ONE, options, arguments, needs, cotangents)
    if torch._C._functorch.maybe_current_level() is not None:
        return None
    made = Options(*options)  # type: ignore[arg-type]
    return _composed.gradients(made, arguments, _cotangents(gradients), needs)


# ---- Ensembles where the engine runs none --------------------------------------------------------


def _at(x: Any, member: int) -> Any:
    """A member's part of an argument; what is no tensor, or absent, is everybody's."""
    return x.select(0, member) if isinstance(x, Tensor) and x.shape != (0,) else x


def _of_each(kernel: Callable[..., Sequence[Tensor]], *arguments: Any) -> Sequence[Tensor]:
    """What a kernel of ensembles gives, by `kernel` for one member after the other."""
    input, h0, c0, weights, batch_sizes, *rest = arguments
    each = [
        kernel(
            *(_at(x, member) for x in (input, h0, c0)),
            [w.select(0, member) for w in weights],
            batch_sizes,
            *(_at(x, member) for x in rest),
        )
        for member in range(input.shape[0])
    ]
    return [y[0] if y[0].shape == (0,) else torch.stack(y) for y in zip(*each, strict=True)]


def _forward_of_each(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_of_each(_forward_kernel, *arguments))


def _backward_of_each(*arguments: Any) -> list[Tensor]:
    return list(_of_each(_backward_kernel, *arguments))


def _where_the_engine_runs_them(
    engine: Callable[..., Any],
    each: Callable[..., Any],
    by_program: Callable[[Options, Extras], bool],
    first: int,
) -> Callable[..., Any]:
    """An ensemble by one call of the engine, or, by torch and of programs, member by member.

    ``first``: the place of the first option.
    """

    def run(*arguments: Any) -> Any:
        options = _options(*arguments[first : first + len(fields(Options))])
        extras = Extras(*arguments[7:12])
        if arguments[-1] or by_program(options, extras):
            return each(*arguments)
        return engine(*arguments[:-1])

    return run


# ---- Registration --------------------------------------------------------------------------------


_kernels: tuple[tuple[str, Any, Any, Any], ...] = (  # on the CPU, elsewhere, of shapes alone
    ("forward", _forward_kernel, _forward_kernel, _forward_fake),
    ("backward", _backward_kernel, _backward_kernel, _backward_fake),
    (
        "forward_members",
        _where_the_engine_runs_them(_forward_members_cpu, _forward_of_each, _by_program.takes, 12),
        _forward_of_each,
        _forward_members_fake,
    ),
    (
        "backward_members",
        _where_the_engine_runs_them(
            _backward_members_cpu, _backward_of_each, _by_program.takes_backward, 20
        ),
        _backward_of_each,
        _backward_fake,
    ),
)
for _name, _on_cpu, _elsewhere, _fake in _kernels:
    library.impl(_name, _on_cpu, "CPU")
    for _key in ("CUDA", "MPS", "XPU"):
        library.impl(_name, _elsewhere, _key)
    torch.library.register_fake(f"fastrnn::{_name}", _fake, lib=library)

forward_op = torch.ops.fastrnn.forward.default
backward_op = torch.ops.fastrnn.backward.default
forward_members_op = torch.ops.fastrnn.forward_members.default
backward_members_op = torch.ops.fastrnn.backward_members.default

_flops.register()
