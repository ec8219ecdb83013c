"""One step of every cell with every option, written once.

The step is written over `Operations`, a small set of functions, and over ``+``, ``-`` and ``*``.
With those of calls/composed.py its values are torch tensors: the readable specification, and the
route of derivatives of derivatives. With those of program/build.py its values record what is done
with them: the program that the CPU engine runs. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._options import Options

Value = Any  # a torch tensor, or a symbol of a program
State = tuple[Value, ...]  # (h,), or (h, c) of an LSTM, each (B, units)


class Operations(Protocol):
    """What a step needs besides ``+``, ``-`` and ``*`` of values and numbers."""

    def linear(self, x: Value, weight: Value) -> Value:
        """``x Wᵀ``."""

    def by_head(self, x: Value, weight: Value, gates: int) -> Value:
        """The same, block by block: W is (heads, gates·H/heads, units), the result gate-major."""

    def activation(self, name: str, a: Value) -> Value:
        """A function by its name in `Options`."""

    def normalized(self, a: Value) -> Value:
        """(a - mean) / sqrt(variance + 1e-5) over the last axis (Ba et al. 2016)."""

    def split(self, a: Value, parts: int) -> Sequence[Value]:
        """Equal parts of the last axis."""

    def rows(self, weight: Value, first: int, last: int, of: int) -> Value:
        """Parts ``first`` … ``last`` - 1 of ``of`` equal parts of a weight's rows."""

    def where(self, condition: Value, yes: Value, no: Value) -> Value:
        """``yes`` where the condition is true, else ``no``."""

    def clipped(self, x: Value, limit: float) -> Value:
        """``x``, whose gradient is clamped to ±limit (Graves 2013)."""

    def wide(self, h: Value) -> Value:
        """h in the dtype of the computation."""

    def stored(self, h: Value) -> Value:
        """h as it is kept between steps: rounded to the dtype of the input."""


class Parameters(NamedTuple):
    """Of one layer and direction, in the dtype of the computation."""

    weight_ih: Value  # (G·H, I of the layer)
    weight_hh: Value  # (G·H, O), of several heads (heads, G·H/heads, O/heads)
    bias_ih: Value | None = None  # (G·H,)
    bias_hh: Value | None = None  # (G·H,)
    weight_hr: Value | None = None  # (P, H)
    weight_ci: Value | None = None  # (H,)
    weight_cf: Value | None = None  # (H,)
    weight_co: Value | None = None  # (H,)
    norm_ih: Value | None = None  # (G·H,)
    norm_hh: Value | None = None  # (G·H,)
    norm_c: Value | None = None  # (H,)
    norm_c_bias: Value | None = None  # (H,)


class Masks(NamedTuple):
    """Of one step; None: not given."""

    dropout: Value | None = None  # (B, O), factors of h on its way into W_hh
    keep_h: Value | None = None  # (B, O), true where the old value stays
    keep_c: Value | None = None  # (B, H)


def project(ops: Operations, options: Options, x: Value, p: Parameters) -> Value:
    """The side of x, which depends on no state."""
    return _side(ops, x, p.weight_ih, p.bias_ih, p.norm_ih, options.gates, 1)


def step(
    ops: Operations, options: Options, a: Value, state: State, p: Parameters, masks: Masks
) -> State:
    """One step: ``a`` is the projected input (B, G·H), ``state`` that of the step before."""
    h = ops.wide(state[0])
    seen = h if masks.dropout is None else masks.dropout * h  # by W_hh
    c: Sequence[Value] = ()
    if options.cell == "RNN":
        b = _side(ops, seen, p.weight_hh, p.bias_hh, p.norm_hh, 1, options.heads)
        new = ops.activation(options.activation, a + b)
    elif options.cell == "GRU":
        new = _gru_cell(ops, options, a, h, seen, p)
    else:
        new, *c = _lstm_cell(ops, options, a, seen, state[1], p, masks.keep_c)
    h = _clipped(ops, _zoneout(ops, new, h, masks.keep_h, options.zoneout_h), options.grad_clip)
    return (ops.stored(h), *c)


def _lstm_cell(
    ops: Operations,
    options: Options,
    a: Value,
    seen: Value,
    c: Value,
    p: Parameters,
    keep_c: Value | None,
) -> tuple[Value, Value]:
    """h before zoneout, and the new c."""
    gate, limit = options.gate_activation, options.grad_clip
    b = _side(ops, seen, p.weight_hh, p.bias_hh, p.norm_hh, 4, options.heads)
    i, f, g, o = ops.split(a + b, 4)
    if p.weight_ci is not None and p.weight_cf is not None:
        i, f = i + p.weight_ci * c, f + p.weight_cf * c
    new = ops.activation(gate, f) * c + ops.activation(gate, i) * ops.activation(
        options.activation, g
    )
    if keep_c is None and options.zoneout_c == 0:
        c = new = _clipped(ops, new, limit)  # of its gradient also what comes through h
    else:
        c = _clipped(ops, _zoneout(ops, new, c, keep_c, options.zoneout_c), limit)
    if p.weight_co is not None:
        o = o + p.weight_co * new
    if p.norm_c is not None and p.norm_c_bias is not None:
        new = p.norm_c * ops.normalized(new) + p.norm_c_bias
    h = ops.activation(gate, o) * ops.activation(options.activation, new)
    if p.weight_hr is not None:
        h = ops.linear(h, p.weight_hr)
    return h, c


def _gru_cell(
    ops: Operations, options: Options, a: Value, h: Value, seen: Value, p: Parameters
) -> Value:
    """h before zoneout."""
    gate, heads = options.gate_activation, options.heads
    a_r, a_z, a_n = ops.split(a, 3)
    if options.reset_after:
        b = _side(ops, seen, p.weight_hh, p.bias_hh, p.norm_hh, 3, heads)
        b_r, b_z, b_n = ops.split(b, 3)
        n = a_n + ops.activation(gate, a_r + b_r) * b_n
        z = ops.activation(gate, a_z + b_z)
    else:
        b_r, b_z = ops.split(_side(ops, seen, *_of_gates(ops, p, 0, 2), 2, heads), 2)
        r, z = ops.activation(gate, a_r + b_r), ops.activation(gate, a_z + b_z)
        n = a_n + _side(ops, r * seen, *_of_gates(ops, p, 2, 3), 1, heads)
    n = ops.activation(options.activation, n)
    return (1 - z) * n + z * h


def _of_gates(
    ops: Operations, p: Parameters, first: int, last: int
) -> tuple[Value, Value | None, Value | None]:
    """A GRU's W_hh, b_hh and γ_hh for the gates ``first`` … ``last`` - 1."""

    def cut(x: Value) -> Value:
        return None if x is None else ops.rows(x, first, last, 3)

    return cut(p.weight_hh), cut(p.bias_hh), cut(p.norm_hh)


def _side(
    ops: Operations,
    x: Value,
    weight: Value,
    bias: Value | None,
    gain: Value | None,
    gates: int,
    heads: int,
) -> Value:
    """W x + b, or under layer norm γ norm(W x) + b; W may have a block for each head."""
    y = ops.linear(x, weight) if heads == 1 else ops.by_head(x, weight, gates)
    if gain is not None:
        y = gain * ops.normalized(y)
    return y if bias is None else y + bias


def _zoneout(
    ops: Operations, new: Value, old: Value, keep: Value | None, probability: float
) -> Value:
    """The old value where ``keep``; without a mask the expectation (Krueger et al. 2017)."""
    if keep is not None:
        return ops.where(keep, old, new)
    return probability * old + (1 - probability) * new if probability > 0 else new


def _clipped(ops: Operations, x: Value, limit: float) -> Value:
    return x if limit == 0 else ops.clipped(x, limit)
