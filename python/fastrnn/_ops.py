"""The engine as torch operators, ``fastrnn::forward`` and ``fastrnn::backward``.

One operator runs a whole stack, so that torch.compile and torch.export see one node. Registered
here: the schema; the kernel for CPU and CUDA, which allocates the outputs and calls the engine;
the fake kernel, which allocates alone; and autograd. The compute dtype of half types is float32, of
others itself.

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

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, _composed
from ._engine import Scalars, engine_options, saved_size
from ._options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# hidden, h_n, c_n, cell, gates; a kernel called by itself gives None for what is not wanted.
ForwardOutputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

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
    "Tensor cell_state, Tensor gates, Tensor? d_output, Tensor? d_hidden, Tensor? d_cell, "
    f"Tensor? d_h_n, Tensor? d_c_n, {_OPTIONS}, bool[] needs) -> Tensor[]"
)


# ---- Kernels -------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """Of one call: the shapes of what ``forward`` gives."""

    hidden: tuple[int, ...]
    h_n: tuple[int, ...]
    c_n: tuple[int, ...] | None  # None: not wanted
    cell: tuple[int, ...] | None
    gates: tuple[int, ...] | None
    padding: bool  # whether the engine leaves a part of `gates` unwritten, besides rows


def _sizes(
    engine: _C.Options,
    input: Tensor,
    rows: int,
    weights: Sequence[Tensor],
    options: Sequence[Any],
    states: bool,
    save: bool,
) -> _Sizes:
    """The shapes for B = ``rows``."""
    layers, directions = options[1], 2 if options[2] else 1
    out, hidden = weights[1].shape[1], weights[1].shape[0] // engine.gates
    every, two = states or save, engine.states == 2
    entries = input.shape[:-1]  # (T, B), or packed (N,)
    groups = layers * directions
    gates = None
    if save:
        count = entries[0] if len(entries) == 1 else entries[0] * entries[1]
        gates = (groups, count, saved_size(engine, hidden))
    return _Sizes(
        hidden=(layers if every else 1, *entries, directions * out),
        h_n=(groups, rows, out),
        c_n=(groups, rows, hidden) if two else None,
        cell=(layers, *entries, directions * hidden) if two and every else None,
        gates=gates,
        padding=hidden % 16 != 0,
    )


class _Device(NamedTuple):
    """What the engine is told of the device, the last arguments of its calls."""

    workspace: Callable[[int], Tensor] | None = None  # None: the engine's own
    cache: _C.PackCache | None = None
    stream: int = 0
    allow_tf32: bool = False


def _device(input: Tensor, cache: _C.PackCache | None = None) -> _Device:
    if not input.is_cuda:
        return _Device(cache=cache)
    return _Device(
        # On the current stream, so that the memory is used again only after the call.
        lambda size: torch.empty(size, dtype=torch.uint8, device=input.device),
        None,
        torch.cuda.current_stream(input.device).cuda_stream,
        input.dtype == torch.float32 and _allows_tf32(),
    )


def _allows_tf32() -> bool:
    """Whether torch lets cuDNN's recurrent layers round float32 factors to TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by operator, which this setting does not know
        return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


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
    cache: _C.PackCache | None = None,
) -> ForwardOutputs:
    """Allocate the outputs and call the engine; None for what is not wanted.

    Of one layer without ``states``, hidden comes without its first axis.
    """
    *options, states, save = rest
    engine = engine_options(*options)
    rows = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    sizes = _sizes(engine, input, rows, weights, options, states, save)
    compute = _compute_dtype(input.dtype)
    one = sizes.hidden[0] == 1 and not states
    hidden = input.new_empty(sizes.hidden[1:] if one else sizes.hidden)
    h_n = input.new_empty(sizes.h_n)
    c_n = cell = gates = None
    if sizes.c_n is not None:
        c_n = input.new_empty(sizes.c_n)
    if sizes.cell is not None:
        cell = input.new_empty(sizes.cell, dtype=compute)
    if sizes.gates is not None:
        # The engine leaves the padding of vectors and the rows that do not run as they are, but
        # an operator must give the same outputs every time.
        incomplete = sizes.padding or lengths is not None
        allocate = input.new_zeros if incomplete else input.new_empty
        gates = allocate(sizes.gates, dtype=compute)
    device = _device(input, cache)
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
        c_n,
        cell,
        gates,
        states or save,
        torch.get_num_threads(),
        *device,
    )
    return hidden, h_n, c_n, cell, gates


def _whole(outputs: ForwardOutputs, input: Tensor) -> tuple[Tensor, ...]:
    """The outputs as the schema has them: (0,) in place of None."""
    hidden, h_n, c_n, cell, gates = outputs
    compute = _compute_dtype(input.dtype)
    return (
        hidden if hidden.dim() > input.dim() else hidden.unsqueeze(0),
        h_n,
        input.new_empty(0) if c_n is None else c_n,
        input.new_empty(0, dtype=compute) if cell is None else cell,
        input.new_empty(0, dtype=compute) if gates is None else gates,
    )


def _forward_kernel(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _whole(_run_forward(input, *rest), input)


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
    *options, states, save = rest
    if batch_sizes is None:
        rows: Any = input.shape[1]
    elif h0 is not None:
        rows = h0.shape[1]
    else:  # a value of batch_sizes, not known here
        rows = torch.library.get_ctx().new_dynamic_size()
    sizes = _sizes(engine_options(*options), input, rows, weights, options, states, save)
    compute = _compute_dtype(input.dtype)
    outputs = (
        input.new_empty(sizes.hidden),
        input.new_empty(sizes.h_n),
        None if sizes.c_n is None else input.new_empty(sizes.c_n),
        None if sizes.cell is None else input.new_empty(sizes.cell, dtype=compute),
        None if sizes.gates is None else input.new_empty(sizes.gates, dtype=compute),
    )
    return _whole(outputs, input)


def _run_backward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    hidden: Tensor,
    cell: Tensor | None,
    gates: Tensor,
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
    gradients = [
        input.new_empty(x.shape) if x is not None and needed else None
        for x, needed in zip((input, h0, c0, *weights), needs, strict=True)
    ]
    d_input, d_h0, d_c0, *d_weights = gradients
    engine = engine_options(*options)
    device = _device(input)
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
        consume_gates,
        torch.get_num_threads(),
        device.workspace,
        device.stream,
        device.allow_tf32,
    )
    return gradients


def _backward_kernel(input: Tensor, *rest: Any) -> list[Tensor]:
    return [input.new_empty(0) if d is None else d for d in _run_backward(input, *rest)]


def _backward_fake(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [
        input.new_empty(x.shape if x is not None and needed else (0,))
        for x, needed in zip((input, h0, c0, *weights), rest[-1], strict=True)
    ]


# ---- Autograd ------------------------------------------------------------------------------------


def forward(*arguments: Any, cache: _C.PackCache | None = None) -> ForwardOutputs:
    """``fastrnn::forward``, by the shorter way where that is the same; for its arguments see there.

    What is not wanted may come back as None, hidden of one layer without its first axis. The
    operator itself knows no ``cache``.
    """
    outputs: ForwardOutputs
    if torch.compiler.is_compiling() or not _C.nothing_listens((*arguments[:3], *arguments[3])):
        outputs = forward_op(*arguments)
    else:
        save = arguments[-1]
        if save:
            outputs = _apply(*arguments, keep_gates=False, cache=cache)
        else:
            outputs = _run_forward(*arguments, cache=cache)
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
        keep_gates: bool,  # backward leaves the output `gates` as it is
        cache: _C.PackCache | None,
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
    ) -> ForwardOutputs:
        arguments = (input, h0, c0, weights, batch_sizes, lengths, reset, *options, states, save)
        outputs: ForwardOutputs
        if _C.nothing_listens((input, h0, c0, *weights)):
            outputs = _run_forward(*arguments, cache=cache)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = forward_op(*arguments)
        hidden, h_n, c_n, cell, gates = outputs
        ctx.options = options
        ctx.set_materialize_grads(False)
        saved = (hidden, cell, gates) if save else (None,) * 3
        if keep_gates:
            outputs = _whole(outputs, input)  # type: ignore[assignment]
            empty = [x for x in outputs[2:4] if x is not None and x.dim() == 1]
            ctx.mark_non_differentiable(*empty, outputs[4])
        else:
            outputs = (hidden, h_n, c_n, cell if states else None, None)
        ctx.keep_gates = keep_gates
        ctx.fresh = save  # `gates` is as forward left it
        ctx.save_for_backward(batch_sizes, lengths, reset, input, h0, c0, *saved, *weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        batch_sizes, lengths, reset, input, h0, c0, *rest = ctx.saved_tensors
        saved, weights = rest[:3], rest[3:]
        needs = ctx.needs_input_grad[8:]
        if all(d is None for d in gradients):
            return (None,) * (8 + len(needs))
        arguments = (input, h0, c0, weights, batch_sizes, lengths, reset)
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True
            found = _composed_gradients(arguments, ctx.options, gradients, needs)
        else:
            # The gradients of the gates take the place of the gates, where nobody else has these.
            # A second backward (retain_graph=True) runs forward again; `pop` gives them away once.
            fresh = ctx.fresh if ctx.keep_gates else ctx.__dict__.pop("fresh", False)
            if not fresh:
                again = (*arguments, *ctx.options, False, True)
                by_itself = _C.nothing_listens((*arguments[:3], *weights))
                outputs = _run_forward(*again) if by_itself else forward_op(*again)
                hidden, _, _, cell, gates = outputs
                saved = (hidden, cell, gates)
            d_hidden, d_h_n, d_c_n, d_cell, _ = gradients
            d_output = None
            if d_hidden is not None and d_hidden.dim() == input.dim():
                d_output, d_hidden = d_hidden, None
            elif d_hidden is not None and d_hidden.shape[0] == 1:  # the last layer's alone
                d_output, d_hidden = d_hidden[0], None
            d_states = (d_output, d_hidden, d_cell, d_h_n, d_c_n)
            if _C.nothing_listens((*arguments[:3], *weights, *d_states)):
                found = _run_backward(
                    *arguments,
                    *saved,
                    *d_states,
                    *ctx.options,
                    needs,
                    consume_gates=not (fresh and ctx.keep_gates),
                )
            else:
                hidden, cell, gates = saved
                hidden = hidden if hidden.dim() > input.dim() else hidden.unsqueeze(0)
                cell = input.new_empty(0) if cell is None else cell
                found = backward_op(*arguments, hidden, cell, gates, *d_states, *ctx.options, needs)
        return (*(None,) * 8, *(d if need else None for d, need in zip(found, needs, strict=True)))


def _apply(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *rest: Any,
    keep_gates: bool,
    cache: _C.PackCache | None = None,
) -> Any:
    steps = (batch_sizes, lengths, reset)
    return _Recurrence.apply(  # type: ignore[no-untyped-call]
        keep_gates, cache, rest[:-2], *rest[-2:], *steps, input, h0, c0, *weights
    )


def _forward_autograd(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _apply(input, *rest, keep_gates=True)
    return outputs


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
            if d_hidden.dim() == input.dim():  # of one layer, without the first axis
                d_hidden = d_hidden.unsqueeze(0)
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


# ---- Registration --------------------------------------------------------------------------------


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward_kernel, _key)
    _library.impl("backward", _backward_kernel, _key)
_library.impl("forward", _forward_autograd, "Autograd")
torch.library.register_fake("fastrnn::forward", _forward_fake, lib=_library)
torch.library.register_fake("fastrnn::backward", _backward_fake, lib=_library)

forward_op = torch.ops.fastrnn.forward.default
backward_op = torch.ops.fastrnn.backward.default
