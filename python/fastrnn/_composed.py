"""The recurrent stack in plain torch operations: the readable specification.

It runs on any device and any floating or complex dtype, differentiates to any order, and works
under the transforms of ``torch.func``. The engine computes the same numbers faster; this route
serves where the engine cannot: complex numbers, derivatives of derivatives, transforms, and where
the gradient of every state is to be seen.

As in the engine, h is kept in the dtype of the input; with half types everything else, c included,
is kept in float32.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
) -> Stack:
    """Run a stack over ``input``, (T, B, I) or, with ``batch_sizes``, packed (N, I).

    ``hx`` is ``(h0,)`` or ``(h0, c0)``, each (L·D, B, units), or None for zeros; ``weights`` the
    flat list in torch's order; ``lengths`` (B,) integers; ``reset`` (T, B) booleans.
    """
    steps = _steps(input, batch_sizes, lengths, reset)
    if input.device.type == "meta":  # has no autocast
        return _stack(options, input, hx, weights, steps)
    with torch.autocast(input.device.type, enabled=False):  # the dtypes are chosen here
        return _stack(options, input, hx, weights, steps)


def _stack(
    options: Options,
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    steps: _Steps,
) -> Stack:
    if steps.active is not None:  # whatever stands in the padding must not reach a gradient
        input = torch.where(steps.active, input, 0)
    directions = 2 if options.bidirectional else 1
    parameters = _parameters(options, weights)
    x, hidden, cell = input, [], []
    finals: list[State] = []
    for layer in range(options.num_layers):
        runs = []
        for direction in range(directions):
            group = layer * directions + direction
            initial = _initial(options, steps.rows, x, parameters[group], hx, group)
            runs.append(_recurrence(options, x, initial, parameters[group], steps, direction == 1))
            finals.append(runs[-1][1])
        states = [torch.cat(parts, -1) for parts in zip(*(run[0] for run in runs), strict=True)]
        x = states[0]
        hidden.append(x)
        cell.extend(states[1:])
    h_n, *c_n = (torch.stack(parts) for parts in zip(*finals, strict=True))
    return Stack(hidden, cell, h_n, c_n[0].to(input.dtype) if c_n else None)


class _Parameters(NamedTuple):
    weight_ih: Tensor  # (G·H, I of the layer)
    weight_hh: Tensor  # (G·H, O)
    bias_ih: Tensor | None  # (G·H,)
    bias_hh: Tensor | None  # (G·H,)
    weight_hr: Tensor | None  # (P, H)


def _parameters(options: Options, weights: Sequence[Tensor]) -> list[_Parameters]:
    """One entry per layer and direction, in the dtype of the computation."""
    size = 2 + 2 * options.bias + (options.proj_size > 0)
    groups = []
    for first in range(0, len(weights), size):
        weight_ih, weight_hh, *rest = (_compute(w) for w in weights[first : first + size])
        bias_ih, bias_hh = rest[:2] if options.bias else (None, None)
        weight_hr = rest[-1] if options.proj_size else None
        groups.append(_Parameters(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr))
    return groups


def _compute(x: Tensor) -> Tensor:
    """``x`` in the dtype of the computation: float32 for half types, its own otherwise."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _initial(
    options: Options, rows: int, x: Tensor, p: _Parameters, hx: State | None, group: int
) -> State:
    """h, in the storage dtype, and c, in the compute dtype, before the first step."""
    if hx is None:
        h = x.new_zeros(rows, p.weight_hh.shape[1])
        if options.cell != "LSTM":
            return (h,)
        return h, p.weight_hh.new_zeros(rows, p.weight_hh.shape[0] // 4)
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
        sizes = [int(size) for size in batch_sizes.tolist()]
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
    options: Options, x: Tensor, state: State, p: _Parameters, steps: _Steps, reverse: bool
) -> tuple[list[Tensor], State]:
    """One direction of one layer: its states at every step, shaped as ``x``, and the last one."""
    a = F.linear(_compute(x), p.weight_ih, p.bias_ih)  # the projection of all steps at once
    if steps.batch_sizes is not None:
        return _packed_recurrence(options, a, state, p, steps.batch_sizes, reverse)
    T = x.shape[0]
    states: list[State] = [state] * T
    for t in reversed(range(T)) if reverse else range(T):
        entering = state
        # Going backwards, the boundary crossed before step t is that between t + 1 and t.
        boundary = t + 1 if reverse else t
        if steps.reset is not None and boundary < T:
            entering = tuple(torch.where(steps.reset[boundary], 0, s) for s in state)
        new = _cell(options, a[t], entering, p)
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
    reverse: bool,
) -> tuple[list[Tensor], State]:
    """The same over packed rows: at step t the first ``batch_sizes[t]`` rows run."""
    projected = torch.split(a, batch_sizes)
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
        state = states[t] = _cell(options, projected[t], state, p)
        _show(t, state, reverse)
    last = zip(*(state, *reversed(finished)), strict=True)
    every = zip(*states, strict=True)
    return [torch.cat(parts) for parts in every], tuple(torch.cat(parts) for parts in last)


def _cell(options: Options, a: Tensor, state: State, p: _Parameters) -> State:
    """One step: ``a`` is the projected input (B, G·H), ``state`` that of the step before."""
    h = _compute(state[0])
    act = _ACTIVATIONS[options.activation]
    gate = _ACTIVATIONS[options.gate_activation]
    c: State = ()
    if options.cell == "RNN":
        h = act(a + F.linear(h, p.weight_hh, p.bias_hh))
    elif options.cell == "GRU":
        h = _gru_cell(options, a, h, p, act, gate)
    else:
        i, f, g, o = (a + F.linear(h, p.weight_hh, p.bias_hh)).chunk(4, -1)
        c = (gate(f) * state[1] + gate(i) * act(g),)
        h = gate(o) * act(c[0])
        if p.weight_hr is not None:
            h = F.linear(h, p.weight_hr)
    return (h.to(state[0].dtype), *c)


def _gru_cell(
    options: Options,
    a: Tensor,
    h: Tensor,
    p: _Parameters,
    act: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    size = h.shape[-1]
    if options.reset_after:
        a_r, a_z, a_n = a.chunk(3, -1)
        b_r, b_z, b_n = F.linear(h, p.weight_hh, p.bias_hh).chunk(3, -1)
        n = act(a_n + gate(a_r + b_r) * b_n)
        z = gate(a_z + b_z)
    else:
        if p.bias_hh is not None:
            a = a + p.bias_hh
        a_rz, a_n = torch.split(a, [2 * size, size], -1)
        r, z = gate(a_rz + F.linear(h, p.weight_hh[: 2 * size])).chunk(2, -1)
        n = act(a_n + F.linear(r * h, p.weight_hh[2 * size :]))
    return (1 - z) * n + z * h
