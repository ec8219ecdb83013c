"""The recurrent stack in plain torch operations: the readable specification.

It runs on any device and any floating or complex dtype, differentiates to any order, and works
under the transforms of ``torch.func``. The engine computes the same numbers faster; this route
serves where the engine cannot: complex numbers, derivatives of derivatives, forward mode, and where
the gradient of every state is to be seen.

As in the engine, h is kept in the dtype of the input; with half types everything else, c included,
is kept in float32.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._engine import NO_EXTRAS, Extras

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._options import Options


def _hardsigmoid(a: Tensor) -> Tensor:
    """clip(a/6 + 1/2, 0, 1). F.hardsigmoid's gradient holds 1/6 in float32, whatever the dtype."""
    return torch.where(a.abs() >= 3, (a > 0).to(a.dtype), a / 6 + 0.5)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda a: a,
    "hardsigmoid": _hardsigmoid,
}


State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM, each (B, units)

# Who is shown each new state: the step, the state, whether it is that of the reverse direction.
# While there is anybody, layers that record a gradient take this route (`_recurrent.py`).
watchers: ContextVar[tuple[Callable[[int, State, bool], None], ...]] = ContextVar(
    "watchers", default=()
)


def _show(step: int, state: State, reverse: bool) -> None:
    if torch.compiler.is_compiling():  # nobody watches a graph
        return
    for watch in watchers.get():
        watch(step, state, reverse)


class Stack(NamedTuple):
    """What a stack computes. ``h_n`` and ``c_n`` are (L·D, B, units)."""

    hidden: list[Tensor]  # h of each layer at each step, (T, B, D·O) or packed (N, D·O)
    cell: list[Tensor]  # LSTM: c of each layer at each step, compute dtype; else empty
    h_n: Tensor
    c_n: Tensor | None


def forward(
    options: Options,
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    extras: Extras = NO_EXTRAS,
) -> Stack:
    """Run a stack over ``input``, (T, B, I) or, with ``batch_sizes``, packed (N, I).

    ``hx`` is ``(h0,)`` or ``(h0, c0)``, each (L·D, B, units), or None for zeros; ``weights`` the
    flat list in torch's order; ``lengths`` (B,) integers; ``reset`` (T, B) booleans; ``extras``
    what the options ask for besides.
    """
    steps = _steps(input, batch_sizes, lengths, reset)
    if input.device.type == "meta":  # has no autocast
        return _stack(options, input, hx, weights, steps, extras)
    with torch.autocast(input.device.type, enabled=False):  # the dtypes are chosen here
        return _stack(options, input, hx, weights, steps, extras)


def _stack(
    options: Options,
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    steps: _Steps,
    extras: Extras,
) -> Stack:
    if steps.active is not None:  # whatever stands in the padding must not reach a gradient
        input = torch.where(steps.active, input, 0)
    directions = options.directions
    parameters = _parameters(options, weights)
    x, hidden, cell = input, [], []
    finals: list[State] = []
    for layer in range(options.num_layers):
        runs = []
        for direction in range(directions):
            group = layer * directions + direction
            p = parameters[group]
            initial = _initial(options, steps.rows, x, p, hx, group)
            own = _Extras(*(None if e is None else e[group] for e in extras))
            runs.append(_recurrence(options, x, initial, p, steps, own, direction == 1))
            finals.append(runs[-1][1])
        states = [torch.cat(parts, -1) for parts in zip(*(run[0] for run in runs), strict=True)]
        x = states[0]
        hidden.append(x)
        cell.extend(states[1:])
    h_n, *c_n = (torch.stack(parts) for parts in zip(*finals, strict=True))
    return Stack(hidden, cell, h_n, c_n[0].to(input.dtype) if c_n else None)


def gradients(
    options: Options,
    arguments: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a stack's arguments as a graph of plain operations, to be differentiated
    again.

    Arguments:
        arguments: input, h0, c0, the weights, batch_sizes, lengths, reset, then the extras.
        cotangents: d_output, d_hidden, d_cell, d_h_n, d_c_n, each may be None.
        needs: which of input, h0, c0, reset_h, reset_c and each weight; the others' is None.
    """
    input, h0, c0, weights, batch_sizes, lengths, reset, *extras = arguments
    d_output, d_hidden, d_cell, d_h_n, d_c_n = cotangents
    leaves = (input, h0, c0, *extras[:2], *weights)
    with torch.enable_grad():
        # Views: a gradient ends at its argument, even where one argument is computed from another.
        views: list[Any] = [x if x is None else x.view_as(x) for x in leaves]
        stack = forward(
            options,
            views[0],
            tuple(x for x in views[1:3] if x is not None) or None,
            views[5:],
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
            extras=Extras(*views[3:5], *extras[2:]),
        )
        pairs: list[tuple[Any, Any]] = [(stack.h_n, d_h_n), (stack.c_n, d_c_n)]
        pairs.append((stack.hidden[-1], d_output))
        if d_hidden is not None:
            pairs += zip(stack.hidden, d_hidden, strict=True)
        if d_cell is not None:
            pairs += zip(stack.cell, d_cell, strict=True)
        return pulled(pairs, views, needs, create_graph=True)


def pulled(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]],
    leaves: Sequence[Any],
    needs: Sequence[bool],
    **more: bool,
) -> list[Tensor | None]:
    """The gradients of the leaves that are needed, of outputs beside their own; None for others.

    Arguments:
        pairs: each output and its gradient, either of which may be absent.
        more: for ``torch.autograd.grad``.
    """
    given = [
        (y, d.to(y.dtype)) for y, d in pairs if y is not None and d is not None and y.requires_grad
    ]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in given],
            [x for x, need in zip(leaves, needs, strict=True) if need],
            [d for _, d in given],
            allow_unused=True,
            **more,
        )
    )
    return [next(found) if need else None for need in needs]


class _Parameters(NamedTuple):
    weight_ih: Tensor  # (G·H, I of the layer)
    weight_hh: Tensor  # (G·H, O), of several heads (heads, G·H/heads, O/heads)
    bias_ih: Tensor | None = None  # (G·H,)
    bias_hh: Tensor | None = None  # (G·H,)
    weight_hr: Tensor | None = None  # (P, H)
    weight_ci: Tensor | None = None  # (H,)
    weight_cf: Tensor | None = None  # (H,)
    weight_co: Tensor | None = None  # (H,)
    norm_ih: Tensor | None = None  # (G·H,)
    norm_hh: Tensor | None = None  # (G·H,)
    norm_c: Tensor | None = None  # (H,)
    norm_c_bias: Tensor | None = None  # (H,)


def _parameters(options: Options, weights: Sequence[Tensor]) -> list[_Parameters]:
    """One entry per layer and direction, in the dtype of the computation."""
    kinds = options.weight_kinds
    return [
        _Parameters(**dict(zip(kinds, map(_compute, weights[k : k + len(kinds)]), strict=True)))
        for k in range(0, len(weights), len(kinds))
    ]


class _Extras(NamedTuple):
    """Of one layer and direction, as `Extras` without the leading axis."""

    reset_h: Tensor | None
    reset_c: Tensor | None
    dropout: Tensor | None  # (B, O)
    keep_h: Tensor | None  # (T, B, O) or packed (N, O)
    keep_c: Tensor | None  # (T, B, H) or packed (N, H)

    def after_reset(self, state: State) -> tuple[Tensor | int, ...]:
        """What takes the place of each state, in its dtype."""
        return tuple(
            0 if anew is None else anew.to(s.dtype)
            for s, anew in zip(state, (self.reset_h, self.reset_c), strict=False)
        )


class _Masks(NamedTuple):
    """Of one step."""

    dropout: Tensor | None  # (B, O), compute dtype
    keep_h: Tensor | None  # (B, O)
    keep_c: Tensor | None  # (B, H)


def _compute(x: Tensor) -> Tensor:
    """``x`` in the dtype of the computation: float32 for half types, its own otherwise."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _initial(
    options: Options, rows: int, x: Tensor, p: _Parameters, hx: State | None, group: int
) -> State:
    """h, in the storage dtype, and c, in the compute dtype, before the first step."""
    if hx is None:
        units = p.weight_ih.shape[0] // options.gates
        h = x.new_zeros(rows, options.proj_size or units)
        return (h,) if options.cell != "LSTM" else (h, p.weight_ih.new_zeros(rows, units))
    h, *c = (state[group] for state in hx)
    return (h, *map(_compute, c))


class _Steps(NamedTuple):
    """Which rows run at each step, and which of them start anew there."""

    rows: int
    batch_sizes: list[int] | None  # packed: rows 0 … batch_sizes[t] run at step t
    active: Tensor | None  # padded: bool (T, B, 1), None where every row is active
    reset: Tensor | None  # padded: bool (T, B, 1), True where no state enters step t from t − 1


def _steps(
    input: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
) -> _Steps:
    if batch_sizes is not None:
        sizes = _checks.check_step_sizes(batch_sizes, input.shape[0])
        return _Steps(sizes[0], sizes, None, None)
    active = None
    if lengths is not None:
        step = torch.arange(input.shape[0], device=input.device)
        active = (step[:, None] < lengths.to(input.device)).unsqueeze(-1)
    if reset is not None:
        reset = reset.to(input.device).unsqueeze(-1)
        if active is not None:
            reset = reset & active
    return _Steps(input.shape[1], None, active, reset)


def _recurrence(
    options: Options,
    x: Tensor,
    state: State,
    p: _Parameters,
    steps: _Steps,
    extras: _Extras,
    reverse: bool,
) -> tuple[list[Tensor], State]:
    """One direction of one layer: its states at every step, shaped as ``x``, and the last one."""
    gates = options.gates
    # The projection of all steps at once.
    a = _side(_compute(x), p.weight_ih, p.bias_ih, p.norm_ih, gates)
    if steps.batch_sizes is not None:
        return _packed_recurrence(options, a, state, p, steps.batch_sizes, extras, reverse)
    dropout = None if extras.dropout is None else _compute(extras.dropout)
    anew = extras.after_reset(state)
    T = x.shape[0]
    states: list[State] = [state] * T
    for t in reversed(range(T)) if reverse else range(T):
        entering = state
        # Going backwards, the boundary crossed before step t is that between t + 1 and t.
        boundary = t + 1 if reverse else t
        if steps.reset is not None and boundary < T:
            here = steps.reset[boundary]
            entering = tuple(
                torch.where(here, start, s) for start, s in zip(anew, state, strict=True)
            )
        keep = (None if k is None else k[t] for k in (extras.keep_h, extras.keep_c))
        new = _cell(options, a[t], entering, p, _Masks(dropout, *keep))
        _show(t, new, reverse)
        if steps.active is None:
            state = states[t] = new
        else:
            active = steps.active[t]
            state = tuple(torch.where(active, s, old) for s, old in zip(new, state, strict=True))
            states[t] = tuple(torch.where(active, s, 0) for s in new)
    return [torch.stack(parts) for parts in zip(*states, strict=True)], state


def _packed_recurrence(
    options: Options,
    a: Tensor,
    initial: State,
    p: _Parameters,
    batch_sizes: list[int],
    extras: _Extras,
    reverse: bool,
) -> tuple[list[Tensor], State]:
    """The same over packed rows: at step t the first ``batch_sizes[t]`` rows run."""
    projected = torch.split(a, batch_sizes)
    keep_h, keep_c = (
        None if keep is None else torch.split(keep, batch_sizes)
        for keep in (extras.keep_h, extras.keep_c)
    )
    dropout = None if extras.dropout is None else _compute(extras.dropout)
    states: list[State] = [initial] * len(batch_sizes)
    state: State = tuple(s[:0] for s in initial) if reverse else initial
    finished: list[State] = []  # forwards: the rows that ended, the last ones first
    for t in reversed(range(len(batch_sizes))) if reverse else range(len(batch_sizes)):
        size, running = batch_sizes[t], state[0].shape[0]
        if size > running:  # rows that start here
            starting = (s[running:size] for s in initial)
            state = tuple(torch.cat(pair) for pair in zip(state, starting, strict=True))
        elif size < running:  # rows that ended one step before
            finished.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        masks = _Masks(
            None if dropout is None else dropout[:size],
            None if keep_h is None else keep_h[t],
            None if keep_c is None else keep_c[t],
        )
        state = states[t] = _cell(options, projected[t], state, p, masks)
        _show(t, state, reverse)
    last = zip(*(state, *reversed(finished)), strict=True)
    every = zip(*states, strict=True)
    return [torch.cat(parts) for parts in every], tuple(torch.cat(parts) for parts in last)


# ---- One step ------------------------------------------------------------------------------------


def _cell(options: Options, a: Tensor, state: State, p: _Parameters, masks: _Masks) -> State:
    """One step: ``a`` is the projected input (B, G·H), ``state`` that of the step before."""
    h = _compute(state[0])
    seen = h if masks.dropout is None else masks.dropout * h  # by W_hh
    c: Sequence[Tensor] = ()
    if options.cell == "RNN":
        b = _side(seen, p.weight_hh, p.bias_hh, p.norm_hh, 1)
        new = _ACTIVATIONS[options.activation](a + b)
    elif options.cell == "GRU":
        new = _gru_cell(options, a, h, seen, p)
    else:
        new, *c = _lstm_cell(options, a, seen, state[1], p, masks.keep_c)
    h = _clipped(_zoneout(new, h, masks.keep_h, options.zoneout_h), options.grad_clip)
    return (h.to(state[0].dtype), *c)


def _lstm_cell(
    options: Options, a: Tensor, seen: Tensor, c: Tensor, p: _Parameters, keep_c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h before zoneout, and the new c."""
    act = _ACTIVATIONS[options.activation]
    gate = _ACTIVATIONS[options.gate_activation]
    i, f, g, o = (a + _side(seen, p.weight_hh, p.bias_hh, p.norm_hh, 4)).chunk(4, -1)
    if p.weight_ci is not None and p.weight_cf is not None:
        i, f = i + p.weight_ci * c, f + p.weight_cf * c
    new = gate(f) * c + gate(i) * act(g)
    if keep_c is None and options.zoneout_c == 0:
        c = new = _clipped(new, options.grad_clip)  # of its gradient also what comes through h
    else:
        c = _clipped(_zoneout(new, c, keep_c, options.zoneout_c), options.grad_clip)
    if p.weight_co is not None:
        o = o + p.weight_co * new
    if p.norm_c is not None and p.norm_c_bias is not None:
        new = p.norm_c * _normalized(new) + p.norm_c_bias
    h = gate(o) * act(new)
    if p.weight_hr is not None:
        h = F.linear(h, p.weight_hr)
    return h, c


def _gru_cell(options: Options, a: Tensor, h: Tensor, seen: Tensor, p: _Parameters) -> Tensor:
    """h before zoneout."""
    act = _ACTIVATIONS[options.activation]
    gate = _ACTIVATIONS[options.gate_activation]
    if options.reset_after:
        a_r, a_z, a_n = a.chunk(3, -1)
        b_r, b_z, b_n = _side(seen, p.weight_hh, p.bias_hh, p.norm_hh, 3).chunk(3, -1)
        n = act(a_n + gate(a_r + b_r) * b_n)
        z = gate(a_z + b_z)
    else:
        size = h.shape[-1]
        a_rz, a_n = torch.split(a, [2 * size, size], -1)
        r, z = gate(a_rz + _side(seen, *_of_gates(p, 0, 2), 2)).chunk(2, -1)
        n = act(a_n + _side(r * seen, *_of_gates(p, 2, 3), 1))
    return (1 - z) * n + z * h


def _of_gates(p: _Parameters, first: int, last: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A GRU's W_hh, b_hh and γ_hh for the gates ``first`` … ``last`` - 1."""

    def cut(x: Tensor, axis: int = 0) -> Tensor:
        size = x.shape[axis] // 3
        return x.narrow(axis, first * size, (last - first) * size)

    bias, gain = (None if x is None else cut(x) for x in (p.bias_hh, p.norm_hh))
    return cut(p.weight_hh, p.weight_hh.dim() - 2), bias, gain


def _side(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, gates: int
) -> Tensor:
    """W x + b, or under layer norm γ norm(W x) + b; W may have a block for each head."""
    if weight.dim() == 2 and gain is None:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight) if weight.dim() == 2 else _by_head(x, weight, gates)
    if gain is not None:
        y = gain * _normalized(y)
    return y if bias is None else y + bias


def _by_head(h: Tensor, weight: Tensor, gates: int) -> Tensor:
    """The block-diagonal product (B, G·H): the rows of each head are gate-major, so are all."""
    heads, rows, units = weight.shape
    y = torch.einsum("bki,kri->bkr", h.reshape(-1, heads, units), weight)
    by_gate = y.reshape(-1, heads, gates, rows // gates).transpose(1, 2)
    return by_gate.reshape(-1, heads * rows)


def _normalized(a: Tensor) -> Tensor:
    """(a - mean) / sqrt(variance + 1e-5) over the last axis (Ba et al. 2016)."""
    centred = a - a.mean(-1, keepdim=True)
    variance = (centred * centred.conj()).real.mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + 1e-5)


def _zoneout(new: Tensor, old: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    """The old value where ``keep``; without a mask the expectation (Krueger et al. 2017)."""
    if keep is not None:
        return torch.where(keep, old, new)
    return probability * old + (1 - probability) * new if probability > 0 else new


# ---- Clamped gradients ---------------------------------------------------------------------------


def _clipped(x: Tensor, limit: float) -> Tensor:
    """``x``, whose gradient is clamped to ±limit (Graves 2013); 0 stands for no limit."""
    if limit == 0:
        return x
    function = _Clipped if torch.compiler.is_compiling() else _ClippedForward
    clipped: Tensor = function.apply(x, limit)  # type: ignore[no-untyped-call]
    return clipped


class _Clipped(torch.autograd.Function):
    """The identity; the gradient, of complex numbers each of its parts, is clamped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        if d.is_complex():
            parts = torch.view_as_real(d).clamp(-ctx.limit, ctx.limit)
            return torch.view_as_complex(parts), None
        return d.clamp(-ctx.limit, ctx.limit), None


class _ClippedForward(_Clipped):
    """The same with forward-mode differentiation, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)
