"""The only place that chooses how a stack of torch tensors is computed.

A usual call of a layer or cell on a CPU does not come here: it is one call of ``_C.layer``
(layers/layer.py, layers/cell.py). For all other calls:

- engine: real tensors on the CPU, and on CUDA where ``fastrnn certify`` found our kernels correct
  and faster on this machine. Where an observer would notice that torch's dispatcher is bypassed,
  and under ``torch.func``'s vmap, grad and vjp, it runs as the operator ``fastrnn::forward``, whose
  backward is the operator ``fastrnn::backward``;
- torch: torch.nn's own operator, for what torch.nn has, on every other device (torch_route.py);
- composed: plain torch operations, for complex numbers, in forward-mode differentiation, and while
  `gradient_flow` records; on devices other than the CPU also for what torch.nn does not have, and
  under the transforms. The backward of the other routes uses it for double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C, _checks
from .._C import Frozen
from .._engine import NO_EXTRAS, Extras, States, cuda_switch, each_layer, no_kernels, prepared
from .._options import Options
from . import composed, flops, operators, program_torch, torch_route
from .autograd import Recurrence

Result = tuple[Tensor, tuple[Tensor, ...], States | None]


def recurrent(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    extras: Extras = NO_EXTRAS,
    return_states: bool = False,
    dropout: float = 0.0,
    frozen: Frozen | None = None,
) -> Result:
    """Run a stack of recurrent layers over checked arguments.

    Arguments:
        options: the stack.
        input: (T, B, I) of any strides; with ``batch_sizes`` packed, (N, I).
        hx: ``(h0,)`` or, for an LSTM, ``(h0, c0)``: (L·D, B, O), (L·D, B, H); None for zeros.
        weights: the flat list in torch's order.
        batch_sizes: int64 (T,), on the CPU, of a PackedSequence.
        lengths: int64 (B,), the valid steps of each row, on any device.
        reset: bool (T, B), True where an episode starts.
        extras: the arrays that options need: states after a reset, masks.
        return_states: whether to return the states of every layer at every step.
        dropout: probability of a zero in what one layer passes to the next.
        frozen: the packed weights of a frozen layer, or None; a call that records a gradient
            unfreezes the layer.

    Returns:
        ``output`` (T, B, D·O) or packed (N, D·O); ``(h_n,)`` or ``(h_n, c_n)``, shaped as ``hx``;
        the states, or None.
    """
    dropout = dropout if options.num_layers > 1 else 0.0
    steps = (batch_sizes, lengths, reset, extras)
    run = _route(options, input, hx, weights, steps, return_states)
    if lengths is not None:
        by_torch = run is None or run is _torch_as_operator
        # Torch's operator reads lengths on the CPU, so moving them would only wait for the device.
        if not (by_torch and lengths.device.type == "cpu"):
            steps = (batch_sizes, lengths.to(input.device), reset, extras)
    if run is None:
        found = torch_route.run(options, input, hx, weights, steps, return_states, dropout)
        if found is not None:
            output, hx_n, hidden = found
            return output, hx_n, None if hidden is None else States(hidden)
        run = _composed_route
    if dropout > 0:
        return _layer_by_layer(run, options, input, hx, weights, steps, return_states, dropout)
    return run(options, input, hx, weights, steps, return_states, frozen)


def usual_layer(layer: Any, input: Any, hx: tuple[Any, ...] | None) -> Result | None:
    """The usual call of a layer on a device other than the CPU, in a few steps.

    Same checks and results as `recurrent`; None where the call is not a usual one or an argument
    does not fit. The caller makes sure that there are no lengths, resets, masks or learned states.
    """
    if torch.compiler.is_compiling() or not isinstance(input, Tensor) or input.dim() != 3:
        return None
    if input.device.type in _ENGINE_DEVICES:
        return None
    parameters, options = layer._parameters, layer._options
    weights: list[Any] = [parameters.get(name) for name in layer._flat_weights_names]
    if any(w is None for w in weights) or not _C.bypass_is_unobservable(
        (input, *(hx or ()), *weights)
    ):
        return None
    if any(x.layout is not torch.strided or x.is_nested for x in (input, *(hx or ()), *weights)):
        return None
    quiet = torch._C._functorch.maybe_current_level() is None and forward_ad._current_level < 0
    unusual = not quiet or composed.watchers.get() or torch.is_autocast_enabled(input.device.type)
    if unusual or input.is_complex() or not options.in_torch_nn:
        return None
    if input.is_cuda and not no_kernels(input.get_device()):
        return None
    x = input.transpose(0, 1) if layer.batch_first else input
    steps, rows, width = x.shape
    out, groups = layer.proj_size or layer.hidden_size, options.num_layers * options.directions
    shapes = ((groups, rows, out), (groups, rows, layer.hidden_size))
    fits = (
        steps > 0
        and width == layer.input_size
        and all(w.shape == shape for w, shape in zip(weights, layer._weight_shapes, strict=True))
        and all(s.shape == shape for s, shape in zip(hx or (), shapes, strict=False))
        and _checks.agree(input, weights)
        and _checks.agree(input, hx or ())
    )
    if not fits:
        return None
    found = torch_route.run(options, x, hx, weights, (None, None, None, NO_EXTRAS), False, 0.0)
    if found is None:
        return None
    output, hx_n, _ = found
    return output.transpose(0, 1) if layer.batch_first else output, hx_n, None


def casts_by_itself(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    return_states: bool,
) -> bool:
    """Whether torch's own operator computes a call without masks, lengths and resets. Under
    autocast that operator casts its arguments.
    """
    steps = (batch_sizes, None, None, NO_EXTRAS)
    return _route(options, input, hx, weights, steps, return_states) is None


def cell_by_torch(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
) -> bool:
    """Whether torch's own function computes a cell's step: it has derivatives of every order, and
    compilers support it. input is (B, I), the states (B, H).
    """
    if input.device.type in _ENGINE_DEVICES:
        return False
    steps = (None, None, None, NO_EXTRAS)
    chosen = _route(options, input.unsqueeze(0), hx, weights, steps, False)
    if chosen is _engine_route and not torch.compiler.is_compiling():
        return cuda_switch() is None  # certificates compare layers, not cells
    return chosen is None or chosen is _torch_as_operator


_C.set_torch(
    Tensor,
    torch.nn.Parameter,
    torch.get_num_threads,
    torch.is_grad_enabled,
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    # Observers, which would notice that a call bypasses the dispatcher: modes, traces, profilers.
    [torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state],
    [(vars(torch.autograd.profiler), "_is_profiler_enabled")],
    # Transforms, which change what a call means: autocast, torch.func, forward mode, gradient_flow.
    [
        partial(torch.is_autocast_enabled, "cpu"),
        torch._C._functorch.maybe_current_level,
        composed.watchers.get,
    ],
    [(vars(forward_ad), "_current_level")],
)


_Route = Callable[
    [Options, Tensor, tuple[Tensor, ...] | None, Sequence[Tensor], torch_route.Steps, bool,
     Frozen | None],
    Result,
]  # fmt: skip
_ENGINE_DEVICES = frozenset({"cpu", "meta"})  # on meta the operator only computes shapes


def _route(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    steps: torch_route.Steps,
    return_states: bool,
) -> _Route | None:
    """The route of a call; None: torch's own operator, in torch's own graph."""
    if input.is_complex():
        return _composed_route
    elsewhere = input.device.type not in _ENGINE_DEVICES
    if not torch.compiler.is_compiling():
        watched = torch.is_grad_enabled() and composed.watchers.get()
        # Neither torch's operator nor ensembles of the CUDA kernels support transforms.
        transformed = elsewhere and torch._C._functorch.maybe_current_level() is not None
        if forward_ad._current_level >= 0 or watched or transformed:
            return _composed_route
    if not elsewhere:
        return _engine_route
    batch_sizes, _, _, extras = steps
    if input.is_cuda:
        training = torch_route.records((input, *(hx or ()), *extras[:2], *weights))
        own = (options, extras, input, weights, batch_sizes, training, return_states)
        if torch_route.kernels(*own).kernels:
            return _engine_route
    if not torch_route.has(options, extras, return_states):
        return _composed_route
    return _torch_as_operator if torch_route.is_one_node() else None


def _engine_route(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    steps: torch_route.Steps,
    return_states: bool,
    frozen: Frozen | None,
    by_torch: bool = False,
) -> Result:
    h0 = c0 = None
    if hx is not None:
        h0, c0 = hx if len(hx) == 2 else (hx[0], None)
    *rows, extras = steps
    leaves = (input, h0, c0, extras.reset_h, extras.reset_c, *weights)
    save = torch_route.records(leaves)
    if frozen is not None and save:
        frozen.thaw()
    given = (input, h0, c0, weights, *rows, *extras)
    if (
        by_torch
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or not _C.bypass_is_unobservable((input, h0, c0, *weights, *extras))
    ):
        if not torch.compiler.is_compiling():
            flops.register()
        outputs = operators.forward_op(*given, options.text, return_states, False, by_torch)
    else:
        call = program_torch.call(options, given, frozen)
        device = operators.device_of(given, options, save)
        outputs = call.forward(return_states, save, False, device)
        if save:
            others = (*rows, *extras[2:])
            recorded = (prepared(options), outputs, others, return_states, None)
            outputs = Recurrence.apply(recorded, *leaves)  # type: ignore[no-untyped-call]
    output, h_n, c_n, hidden, cell, _ = outputs
    if options.cell != "LSTM":
        c_n = cell = None
    states = States(hidden, cell) if return_states else None
    return output, (h_n,) if c_n is None else (h_n, c_n), states


_torch_as_operator = partial(_engine_route, by_torch=True)


def _composed_route(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    steps: torch_route.Steps,
    return_states: bool,
    frozen: Frozen | None,
) -> Result:
    batch_sizes, lengths, reset, extras = steps
    stack = composed.forward(
        options,
        input,
        hx,
        weights,
        batch_sizes=batch_sizes,
        lengths=lengths,
        reset=reset,
        extras=extras,
    )
    states = None
    if return_states:
        states = States(torch.stack(stack.hidden), torch.stack(stack.cell) if stack.cell else None)
    hx_n = (stack.h_n,) if stack.c_n is None else (stack.h_n, stack.c_n)
    return stack.hidden[-1], hx_n, states


def _layer_by_layer(
    run: _Route,
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    steps: torch_route.Steps,
    return_states: bool,
    dropout: float,
) -> Result:
    """Apply torch's dropout to the output of each layer but the last, with torch.nn's masks."""
    x = input
    hx_n: list[tuple[Tensor, ...]] = []
    states: list[States] = []
    for k, (one, initial, mine) in enumerate(each_layer(options, hx, weights)):
        if k:
            x = F.dropout(x, dropout, training=True)
        own = (*steps[:3], steps[3].of_layer(k, options.directions))
        x, last, every = run(one, x, initial, mine, own, return_states, None)
        hx_n.append(last)
        if every is not None:
            states.append(every)
    whole = tuple(torch.cat(parts) for parts in zip(*hx_n, strict=True))
    if not states:
        return x, whole, None
    cells = [s.c for s in states if s.c is not None]
    return x, whole, States(torch.cat([s.h for s in states]), torch.cat(cells) if cells else None)
