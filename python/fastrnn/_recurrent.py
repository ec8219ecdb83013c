"""The one place that chooses how a stack of torch tensors is computed.

- engine: the operator ``fastrnn::forward``, for real tensors on a device that the engine knows;
- a first gradient: the same operator, whose backward is the operator ``fastrnn::backward``; under
  ``torch.func``'s vmap, grad and vjp too, by the rules of _transforms.py;
- composed: plain torch operations, for complex numbers, for devices without an engine (CUDA among
  them where its kernels are not turned on, see ``_engine.cuda_route``), in forward-mode
  differentiation, and where the gradients of all states are watched (``gradient_flow``); and, from
  inside the backward of the operator, for derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _composed, _ops, _transforms  # noqa: F401  (_transforms registers the rules)
from ._C import Frozen
from ._engine import NO_EXTRAS, Extras, States, cuda_route, scalars
from ._options import Options

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
        lengths: int64 (B,), the valid steps of each row.
        reset: bool (T, B), True where an episode starts.
        extras: what the options ask for besides: states after a reset, masks.
        return_states: whether to return the states of every layer at every step.
        dropout: probability of a zero in what one layer passes to the next.
        frozen: the weights as they were packed when the layer was frozen; a gradient thaws it.

    Returns:
        ``output`` (T, B, D·O) or packed (N, D·O); ``(h_n,)`` or ``(h_n, c_n)``, shaped as ``hx``;
        the states, or None.
    """
    run = _composed_route if _needs_composed(options, input, extras) else _engine_route
    steps = (batch_sizes, lengths, reset, extras)
    if dropout > 0 and options.num_layers > 1:
        return _layer_by_layer(run, options, input, hx, weights, steps, return_states, dropout)
    return run(options, input, hx, weights, steps, return_states, frozen)


# batch_sizes, lengths, reset, extras
_Steps = tuple[Tensor | None, Tensor | None, Tensor | None, Extras]
_Route = Callable[
    [Options, Tensor, tuple[Tensor, ...] | None, Sequence[Tensor], _Steps, bool, Frozen | None],
    Result,
]
_ENGINE_DEVICES = frozenset({"cpu", "meta"})  # on meta the operator only works out shapes


def _needs_composed(options: Options, input: Tensor, extras: Extras) -> bool:
    device = input.device.type
    on_cuda = device == "cuda"
    known = _cuda_knows(options, extras) if on_cuda else device in _ENGINE_DEVICES
    if input.is_complex() or not known:
        return True
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _composed.watchers.get()):
        return True
    # Ensembles have no kernels on CUDA.
    return on_cuda and torch._C._functorch.maybe_current_level() is not None


def _cuda_knows(options: Options, extras: Extras) -> bool:
    """Whether the CUDA kernels are on and compute what is asked for."""
    if options.beyond_the_cell or options.recompute or any(x is not None for x in extras):
        return False
    return _kernels_on_cuda()


def _kernels_on_cuda() -> bool:
    return cuda_route().kernels


# torch.compile asks when it traces: what the environment says then is a constant of the graph. The
# mark is that of `torch.compiler.assume_constant_result`, which would import the compiler here.
_kernels_on_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _engine_route(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    steps: _Steps,
    return_states: bool,
    frozen: Frozen | None,
) -> Result:
    h0 = c0 = None
    if hx is not None:
        h0, c0 = hx if len(hx) == 2 else (hx[0], None)
    *rows, extras = steps
    leaves = (input, h0, c0, extras.reset_h, extras.reset_c, *weights)
    save = torch.is_grad_enabled() and _any_requires_grad(leaves)
    given = (input, h0, c0, weights, *rows, *extras, *scalars(options))
    if frozen is not None and save:
        frozen.thaw()
    output, h_n, c_n, hidden, cell, _ = _ops.forward(*given, return_states, save, frozen=frozen)
    if options.cell != "LSTM":
        c_n = cell = None
    states = States(hidden, cell) if return_states else None
    return output, (h_n,) if c_n is None else (h_n, c_n), states


def _any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _composed_route(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    steps: _Steps,
    return_states: bool,
    frozen: Frozen | None,
) -> Result:
    batch_sizes, lengths, reset, extras = steps
    stack = _composed.forward(
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
    steps: _Steps,
    return_states: bool,
    dropout: float,
) -> Result:
    """Dropout on what each layer but the last puts out, by torch: the masks are torch.nn's."""
    layers, directions = options.num_layers, options.directions
    one_layer = replace(options, num_layers=1)
    size = len(weights) // layers
    x = input
    hx_n: list[tuple[Tensor, ...]] = []
    states: list[States] = []
    for k in range(layers):
        if k:
            x = F.dropout(x, dropout, training=True)
        initial = hx and tuple(s[k * directions : (k + 1) * directions] for s in hx)
        mine = weights[k * size : (k + 1) * size]
        own = (*steps[:3], steps[3].of_layer(k, directions))
        x, last, every = run(one_layer, x, initial, mine, own, return_states, None)
        hx_n.append(last)
        if every is not None:
            states.append(every)
    whole = tuple(torch.cat(parts) for parts in zip(*hx_n, strict=True))
    if not states:
        return x, whole, None
    cells = [s.c for s in states if s.c is not None]
    return x, whole, States(torch.cat([s.h for s in states]), torch.cat(cells) if cells else None)
