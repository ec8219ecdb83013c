"""The recurrent stack in plain torch operations, over the steps of _step.py.

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

from .. import _checks
from .._engine import NO_EXTRAS, Extras
from .._step import Masks, Parameters, State, project, step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._options import Options


# Who is shown each new state: the step, the state, whether it is that of the reverse direction.
# While there is anybody, layers that record a gradient take this route (`call.py`).
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


def _parameters(options: Options, weights: Sequence[Tensor]) -> list[Parameters]:
    """One entry per layer and direction, in the dtype of the computation."""
    kinds = options.weight_kinds
    return [
        Parameters(**dict(zip(kinds, map(_compute, weights[k : k + len(kinds)]), strict=True)))
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


def _compute(x: Tensor) -> Tensor:
    """``x`` in the dtype of the computation: float32 for half types, its own otherwise."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _initial(
    options: Options, rows: int, x: Tensor, p: Parameters, hx: State | None, group: int
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
    p: Parameters,
    steps: _Steps,
    extras: _Extras,
    reverse: bool,
) -> tuple[list[Tensor], State]:
    """One direction of one layer: its states at every step, shaped as ``x``, and the last one."""
    ops = _TorchOperations(x.dtype)
    a = project(ops, options, _compute(x), p)  # of all steps at once
    if steps.batch_sizes is not None:
        return _packed_recurrence(ops, options, a, state, p, steps.batch_sizes, extras, reverse)
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
        new = step(ops, options, a[t], entering, p, Masks(dropout, *keep))
        _show(t, new, reverse)
        if steps.active is None:
            state = states[t] = new
        else:
            active = steps.active[t]
            state = tuple(torch.where(active, s, old) for s, old in zip(new, state, strict=True))
            states[t] = tuple(torch.where(active, s, 0) for s in new)
    return [torch.stack(parts) for parts in zip(*states, strict=True)], state


def _packed_recurrence(
    ops: _TorchOperations,
    options: Options,
    a: Tensor,
    initial: State,
    p: Parameters,
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
        masks = Masks(
            None if dropout is None else dropout[:size],
            None if keep_h is None else keep_h[t],
            None if keep_c is None else keep_c[t],
        )
        state = states[t] = step(ops, options, projected[t], state, p, masks)
        _show(t, state, reverse)
    last = zip(*(state, *reversed(finished)), strict=True)
    every = zip(*states, strict=True)
    return [torch.cat(parts) for parts in every], tuple(torch.cat(parts) for parts in last)


# ---- The operations of a step --------------------------------------------------------------------


class _TorchOperations:
    """`Operations` on tensors, in a call whose h is kept in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def by_head(self, x: Tensor, weight: Tensor, gates: int) -> Tensor:
        heads, rows, units = weight.shape
        y = torch.einsum("bki,kri->bkr", x.reshape(-1, heads, units), weight)
        by_gate = y.reshape(-1, heads, gates, rows // gates).transpose(1, 2)
        return by_gate.reshape(-1, heads * rows)

    def activation(self, name: str, a: Tensor) -> Tensor:
        if name == "identity":
            return a
        if name == "hardsigmoid":
            # F.hardsigmoid's gradient holds 1/6 in float32, whatever the dtype.
            return torch.where(a.abs() >= 3, (a > 0).to(a.dtype), a / 6 + 0.5)
        found: Tensor = getattr(torch, name)(a)
        return found

    def normalized(self, a: Tensor) -> Tensor:
        centred = a - a.mean(-1, keepdim=True)
        variance = (centred * centred.conj()).real.mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + 1e-5)

    def split(self, a: Tensor, parts: int) -> Sequence[Tensor]:
        return a.chunk(parts, -1)

    def rows(self, weight: Tensor, first: int, last: int, of: int) -> Tensor:
        axis = max(weight.dim() - 2, 0)
        size = weight.shape[axis] // of
        return weight.narrow(axis, first * size, (last - first) * size)

    def where(self, condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(condition, yes, no)

    def clipped(self, x: Tensor, limit: float) -> Tensor:
        function = _Clipped if torch.compiler.is_compiling() else _ClippedForward
        clipped: Tensor = function.apply(x, limit)  # type: ignore[no-untyped-call]
        return clipped

    def wide(self, h: Tensor) -> Tensor:
        return _compute(h)

    def stored(self, h: Tensor) -> Tensor:
        return h.to(self.dtype)


# ---- Clamped gradients ---------------------------------------------------------------------------


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
