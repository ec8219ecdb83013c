"""Recurrent layers in plain NumPy float64, forward and backward, written for reading.

This is the yardstick that the engine is tested against. It is slow, has no blocking, no threads
and no special cases; each formula stands here once. docs/maths.md derives them.

Sizes: T steps, B rows, I input size, H hidden size, P projection size, O = P or else H,
G gates, L layers, D directions, N the number of (step, row) pairs of a packed sequence.

A *cell* is one step: a function from the input x (B, I) and the state before the step to the state
after it, and a function that takes the gradient of the state after the step back to x, to the
state before and to the parameters. `CELLS` lists them by name; a cell added there runs in stacks,
both directions, packed, with lengths and with resets, and may follow the options and the masks that
it is given. `forward` and `backward` run a whole stack.

>>> rng = np.random.default_rng(0)
>>> w_ih, w_hh = rng.normal(size=(12, 2)), rng.normal(size=(12, 3))  # I = 2, H = 3, G = 4
>>> x = rng.normal(size=(5, 1, 2))  # T = 5, B = 1
>>> result = forward(Options("LSTM", bias=False), x, None, [w_ih, w_hh])
>>> result.output.shape, result.hx_n[0].shape, result.states.c.shape
((5, 1, 3), (1, 1, 3), (1, 5, 1, 3))
>>> d_input, d_hx, d_weights = backward(result.saved, np.ones_like(result.output), None)
>>> d_input.shape, d_weights[1].shape
((5, 1, 2), (12, 3))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastrnn._options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Options", "Result", "Saved", "States", "backward", "forward"]
__all__ += ["rnn_cell", "rnn_cell_backward", "lstm_cell", "lstm_cell_backward"]
__all__ += ["gru_cell", "gru_cell_backward", "Masks", "Parameters"]
__all__ += ["ACTIVATIONS", "CELLS", "GATE_ACTIVATIONS", "Cell", "Function"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
State: TypeAlias = tuple[Array, ...]  # (h,) or (h, c), each (B, O) or (B, H)
StepSaved: TypeAlias = tuple[Any, ...]  # what a cell's forward keeps for its backward


# ---- Activations ---------------------------------------------------------------------------------


class Function(NamedTuple):
    """An activation; `slope` is its derivative written as a function of its value."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return np.asarray(1.0 / (1.0 + np.exp(-x)))


SIGMOID = Function(_sigmoid, lambda y: y * (1.0 - y))
ACTIVATIONS = {
    "tanh": Function(np.tanh, lambda y: 1.0 - y * y),
    "relu": Function(lambda x: np.maximum(x, 0.0), lambda y: np.where(y <= 0.0, 0.0, 1.0)),
    "sigmoid": SIGMOID,
    "identity": Function(lambda x: x, np.ones_like),
}
GATE_ACTIVATIONS = {
    "sigmoid": SIGMOID,
    "hardsigmoid": Function(
        lambda x: np.clip(x / 6.0 + 0.5, 0.0, 1.0),
        lambda y: np.where((y > 0.0) & (y < 1.0), 1.0 / 6.0, 0.0),
    ),
}


# ---- Pieces of a step ----------------------------------------------------------------------------


class Parameters(NamedTuple):
    """The parameters of one layer and direction, or their gradients."""

    weight_ih: Array  # (G·H, I)
    weight_hh: Array  # (G·H, O); of several heads their blocks on the diagonal
    bias_ih: Array  # (G·H,); zeros in a layer without bias
    bias_hh: Array  # (G·H,)
    weight_hr: Array | None = None  # (P, H); None without projection
    weight_ci: Array | None = None  # (H,); None without peepholes
    weight_cf: Array | None = None  # (H,)
    weight_co: Array | None = None  # (H,)
    norm_ih: Array | None = None  # (G·H,); None without layer norm
    norm_hh: Array | None = None  # (G·H,)
    norm_c: Array | None = None  # (H,); LSTM
    norm_c_bias: Array | None = None  # (H,); LSTM


class Masks(NamedTuple):
    """What is drawn at random while training; None where nothing is."""

    dropout: Array | None = None  # (B, O), 0 or 1/(1 - p): the factor of h' on its way into W_hh
    zoneout_h: Mask | None = None  # of one step (B, O), of a sequence (T, B, O); True: h' is kept
    zoneout_c: Mask | None = None  # (B, H) or (T, B, H)

    def at(self, t: int, rows: npt.NDArray[np.intp]) -> Masks:
        """Those of some rows at one step of a sequence."""
        dropout, zoneout_h, zoneout_c = self
        return Masks(
            None if dropout is None else dropout[rows],
            None if zoneout_h is None else zoneout_h[t, rows],
            None if zoneout_c is None else zoneout_c[t, rows],
        )


NO_MASKS = Masks()


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """x·Wᵀ + b: (B, K), (M, K), (M,) → (B, M)."""
    y: Array = x @ weight.T + bias
    return y


def linear_backward(d_y: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """The gradients of x, W and b."""
    return d_y @ weight, d_y.T @ x, d_y.sum(axis=0)


def normalize(a: Array) -> tuple[Array, Array]:
    """norm(a) = (a - mean) / sqrt(variance + 1e-5) over a row's values (Ba et al. 2016).

    Returns it and the factor 1 / sqrt(…), (B, 1).
    """
    scale = 1.0 / np.sqrt(a.var(axis=1, keepdims=True) + 1e-5)
    y: Array = (a - a.mean(axis=1, keepdims=True)) * scale
    return y, scale


def normalize_backward(d_y: Array, y: Array, scale: Array) -> Array:
    """The gradient of a, from that of y = norm(a)."""
    d_a: Array = d_y - d_y.mean(axis=1, keepdims=True) - y * (d_y * y).mean(axis=1, keepdims=True)
    return scale * d_a


def side(x: Array, weight: Array, bias: Array, gain: Array | None) -> tuple[Array, StepSaved]:
    """One side of the pre-activations: W x + b, or under layer norm γ norm(W x) + b.

    The norm runs over all M values of a row, whatever gates and heads they belong to. Takes
    x (B, K), W (M, K), b and γ (M,). Returns (B, M), and what the backward function needs.
    """
    if gain is None:
        return linear(x, weight, bias), (x,)
    y, scale = normalize(x @ weight.T)
    return gain * y + bias, (x, y, scale)


def side_backward(
    d_a: Array, saved: StepSaved, weight: Array, gain: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of x, W, b and, where there is one, γ."""
    if gain is None:
        return (*linear_backward(d_a, saved[0], weight), None)
    x, y, scale = saved
    d_x, d_weight, _ = linear_backward(normalize_backward(d_a * gain, y, scale), x, weight)
    return d_x, d_weight, d_a.sum(axis=0), (d_a * y).sum(axis=0)


def dropped(h: Array, mask: Array | None) -> Array:
    """Recurrent dropout (Gal & Ghahramani 2016): m h; of a gradient, the gradient of h."""
    return h if mask is None else mask * h


def zoneout(new: Array, old: Array, keep: Mask | None, probability: float) -> Array:
    """Zoneout (Krueger et al. 2017): the old value where `keep`; without a mask the expectation."""
    if keep is not None:
        return np.where(keep, old, new)
    return probability * old + (1.0 - probability) * new if probability > 0.0 else new


def zoneout_backward(d: Array, keep: Mask | None, probability: float) -> tuple[Array, Array]:
    """The gradients of the new and of the old value."""
    if keep is not None:
        return np.where(keep, 0.0, d), np.where(keep, d, 0.0)
    return (1.0 - probability) * d, probability * d


def clipped(d: Array, limit: float) -> Array:
    """The whole gradient of a state, clamped to ±limit (Graves 2013); 0 stands for no limit."""
    return np.clip(d, -limit, limit) if limit > 0.0 else d


# ---- Cells ---------------------------------------------------------------------------------------


def rnn_cell(
    x: Array, state: State, p: Parameters, options: Options, masks: Masks = NO_MASKS
) -> tuple[State, StepSaved]:
    """h = act(W_ih x + b_ih + W_hh h' + b_hh), where h' is h before the step (Elman 1990).

    W_hh sees h' after recurrent dropout, each side may be normalised (`side`), and zoneout may
    keep units of h'.

    Takes x (B, I) and the state (h',), h' (B, H). Returns the state (h,), and what the
    backward function needs.

    >>> p = Parameters(np.array([[1.0]]), np.array([[2.0]]), np.array([3.0]), np.array([4.0]))
    >>> relu = Options("RNN", activation="relu")
    >>> (h,), saved = rnn_cell(np.array([[10.0]]), (np.array([[0.5]]),), p, relu)
    >>> h
    array([[18.]])
    """
    act = ACTIVATIONS[options.activation]
    (h_prev,) = state
    a, saved_x = side(x, p.weight_ih, p.bias_ih, p.norm_ih)
    b, saved_h = side(dropped(h_prev, masks.dropout), p.weight_hh, p.bias_hh, p.norm_hh)
    new = act.value(a + b)
    h = zoneout(new, h_prev, masks.zoneout_h, options.zoneout_h)
    return (h,), (saved_x, saved_h, new)


def rnn_cell_backward(
    d_state: State, saved: StepSaved, p: Parameters, options: Options, masks: Masks = NO_MASKS
) -> tuple[Array, State, Parameters]:
    """From the gradient of (h,), the gradients of x, of (h',) and of the parameters."""
    act = ACTIVATIONS[options.activation]
    saved_x, saved_h, new = saved
    d_h = clipped(d_state[0], options.grad_clip)
    d_new, d_h_prev = zoneout_backward(d_h, masks.zoneout_h, options.zoneout_h)
    d_a = d_new * act.slope(new)
    d_x, d_weight_ih, d_bias_ih, d_norm_ih = side_backward(d_a, saved_x, p.weight_ih, p.norm_ih)
    d_seen, d_weight_hh, d_bias_hh, d_norm_hh = side_backward(d_a, saved_h, p.weight_hh, p.norm_hh)
    d_p = Parameters(
        d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, norm_ih=d_norm_ih, norm_hh=d_norm_hh
    )
    return d_x, (d_h_prev + dropped(d_seen, masks.dropout),), d_p


def lstm_cell(
    x: Array, state: State, p: Parameters, options: Options, masks: Masks = NO_MASKS
) -> tuple[State, StepSaved]:
    """One step of the LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    With h', c' the state before the step, gate and act the two activations, and
    a_k = W_ik x + b_ik + W_hk h' + b_hk for each gate k:

        i = gate(a_i)   f = gate(a_f)   g = act(a_g)   o = gate(a_o)
        c = f c' + i g
        m = o act(c)
        h = m, or W_hr m where there is a projection (Sak et al. 2014)

    With peepholes (Gers & Schmidhuber 2000) a_i has w_ci c' added, a_f w_cf c', a_o w_co c. Under
    layer norm (Ba et al. 2016) m = o act(γ_c norm(c) + β_c). W_hh sees h' after recurrent dropout.
    Zoneout may keep units of h' and c'; h comes from c as it was before zoneout.

    Takes x (B, I) and the state (h', c') of shapes (B, O) and (B, H); the rows of the weights are
    i, f, g, o. Returns the state (h, c), and what the backward function needs.
    """
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    h_prev, c_prev = state
    a, saved_x = side(x, p.weight_ih, p.bias_ih, p.norm_ih)
    b, saved_h = side(dropped(h_prev, masks.dropout), p.weight_hh, p.bias_hh, p.norm_hh)
    a_i, a_f, a_g, a_o = np.split(a + b, 4, axis=1)
    if p.weight_ci is not None and p.weight_cf is not None:
        a_i, a_f = a_i + p.weight_ci * c_prev, a_f + p.weight_cf * c_prev
    i, f, g = gate.value(a_i), gate.value(a_f), act.value(a_g)
    c_new = f * c_prev + i * g
    o = gate.value(a_o if p.weight_co is None else a_o + p.weight_co * c_new)
    c_out: Array = c_new
    saved_c: StepSaved = (c_new,)
    if p.norm_c is not None and p.norm_c_bias is not None:
        y, scale = normalize(c_new)
        c_out, saved_c = p.norm_c * y + p.norm_c_bias, (c_new, y, scale)
    act_c = act.value(c_out)
    m = o * act_c
    h_new = m if p.weight_hr is None else m @ p.weight_hr.T
    h = zoneout(h_new, h_prev, masks.zoneout_h, options.zoneout_h)
    c = zoneout(c_new, c_prev, masks.zoneout_c, options.zoneout_c)
    return (h, c), (saved_x, saved_h, saved_c, c_prev, i, f, g, o, act_c, m)


def lstm_cell_backward(
    d_state: State, saved: StepSaved, p: Parameters, options: Options, masks: Masks = NO_MASKS
) -> tuple[Array, State, Parameters]:
    """From the gradients of (h, c), the gradients of x, of (h', c') and of the parameters."""
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    saved_x, saved_h, saved_c, c_prev, i, f, g, o, act_c, m = saved
    d_h = clipped(d_state[0], options.grad_clip)
    d_h, d_h_prev = zoneout_backward(d_h, masks.zoneout_h, options.zoneout_h)
    d_m, d_weight_hr = d_h, None
    if p.weight_hr is not None:
        d_m, d_weight_hr = d_h @ p.weight_hr, d_h.T @ m
    d_o = d_m * act_c * gate.slope(o)
    d_by_h, d_norm_c, d_norm_c_bias = _c_out_backward(d_m * o * act.slope(act_c), saved_c, p)
    if p.weight_co is not None:
        d_by_h = d_by_h + p.weight_co * d_o
    d_c, d_c_prev = _c_new_backward(d_state[1], d_by_h, options, masks)
    d_i = d_c * g * gate.slope(i)
    d_f = d_c * c_prev * gate.slope(f)
    d_g = d_c * i * act.slope(g)
    d_c_prev = d_c_prev + d_c * f
    d_ci, d_cf, d_co = None, None, None
    if p.weight_ci is not None and p.weight_cf is not None:
        d_c_prev = d_c_prev + p.weight_ci * d_i + p.weight_cf * d_f
        products = (d_i * c_prev, d_f * c_prev, d_o * saved_c[0])
        d_ci, d_cf, d_co = (d.sum(axis=0) for d in products)
    d_a = np.concatenate([d_i, d_f, d_g, d_o], axis=1)
    d_x, d_weight_ih, d_bias_ih, d_norm_ih = side_backward(d_a, saved_x, p.weight_ih, p.norm_ih)
    d_seen, d_weight_hh, d_bias_hh, d_norm_hh = side_backward(d_a, saved_h, p.weight_hh, p.norm_hh)
    d_norms = (d_norm_ih, d_norm_hh, d_norm_c, d_norm_c_bias)
    d_sides = (d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh)
    d_p = Parameters(*d_sides, d_weight_hr, d_ci, d_cf, d_co, *d_norms)
    return d_x, (d_h_prev + dropped(d_seen, masks.dropout), d_c_prev), d_p


def _c_out_backward(
    d_c_out: Array, saved_c: StepSaved, p: Parameters
) -> tuple[Array, Array | None, Array | None]:
    """The gradients of c, γ_c and β_c, from that of γ_c norm(c) + β_c; without norm that is c."""
    if p.norm_c is None:
        return d_c_out, None, None
    _, y, scale = saved_c
    d_c = normalize_backward(d_c_out * p.norm_c, y, scale)
    return d_c, (d_c_out * y).sum(axis=0), d_c_out.sum(axis=0)


def _c_new_backward(
    d_c: Array, d_by_h: Array, options: Options, masks: Masks
) -> tuple[Array, Array]:
    """The gradients of c before zoneout and of c', from that of c and from what comes through h.

    Without zoneout the two c are one, and its whole gradient is clamped; with it that of c after
    zoneout is, and what comes through h is added to the c before.
    """
    if masks.zoneout_c is None and options.zoneout_c == 0.0:
        return clipped(d_c + d_by_h, options.grad_clip), np.zeros_like(d_c)
    d_c = clipped(d_c, options.grad_clip)
    d_new, d_old = zoneout_backward(d_c, masks.zoneout_c, options.zoneout_c)
    return d_new + d_by_h, d_old


def gru_cell(
    x: Array, state: State, p: Parameters, options: Options, masks: Masks = NO_MASKS
) -> tuple[State, StepSaved]:
    """One step of the GRU (Cho et al. 2014).

    With h' the state before the step:

        r = gate(W_ir x + b_ir + W_hr h' + b_hr)
        z = gate(W_iz x + b_iz + W_hz h' + b_hz)
        n = act(W_in x + b_in + r (W_hn h' + b_hn))     reset_after
        n = act(W_in x + b_in + W_hn (r h') + b_hn)     not reset_after: the original
        h = (1 - z) n + z h'

    W_hh sees h' after recurrent dropout; z h' does not. Under layer norm each side is normalised
    (`side`), x's over all three gates; the hidden side, where it is two products, each by itself:
    r and z together, then n. Zoneout may keep units of h'.

    Takes x (B, I) and the state (h',), h' (B, H); the rows of the weights are r, z, n. Returns
    the state (h,), and what the backward function needs.
    """
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    (h_prev,) = state
    seen = dropped(h_prev, masks.dropout)
    a, saved_x = side(x, p.weight_ih, p.bias_ih, p.norm_ih)
    a_r, a_z, a_n = np.split(a, 3, axis=1)
    if options.reset_after:
        b, saved_h = side(seen, p.weight_hh, p.bias_hh, p.norm_hh)
        b_r, b_z, b_n = np.split(b, 3, axis=1)
        r, z = gate.value(a_r + b_r), gate.value(a_z + b_z)
        n = act.value(a_n + r * b_n)
    else:
        p_rz, p_n = _gru_parts(p)
        b, saved_rz = side(seen, *p_rz)
        b_r, b_z = np.split(b, 2, axis=1)
        r, z = gate.value(a_r + b_r), gate.value(a_z + b_z)
        b_n, saved_n = side(r * seen, *p_n)
        n = act.value(a_n + b_n)
        saved_h = (saved_rz, saved_n)
    new = n + z * (h_prev - n)  # torch's way; where n is infinite the other gives another result
    h = zoneout(new, h_prev, masks.zoneout_h, options.zoneout_h)
    return (h,), (saved_x, saved_h, h_prev, seen, r, z, n, b_n)


def gru_cell_backward(
    d_state: State, saved: StepSaved, p: Parameters, options: Options, masks: Masks = NO_MASKS
) -> tuple[Array, State, Parameters]:
    """From the gradient of (h,), the gradients of x, of (h',) and of the parameters."""
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    saved_x, saved_h, h_prev, seen, r, z, n, b_n = saved
    d_h = clipped(d_state[0], options.grad_clip)
    d_h, d_h_prev = zoneout_backward(d_h, masks.zoneout_h, options.zoneout_h)
    d_n = d_h * (1.0 - z) * act.slope(n)
    d_z = d_h * (h_prev - n) * gate.slope(z)
    if options.reset_after:
        d_r = d_n * b_n * gate.slope(r)
        d_b = np.concatenate([d_r, d_z, d_n * r], axis=1)
        hidden = side_backward(d_b, saved_h, p.weight_hh, p.norm_hh)
        d_seen, d_weight_hh, d_bias_hh, d_norm_hh = hidden
    else:
        (w_rz, _, norm_rz), (w_n, _, norm_n) = _gru_parts(p)
        saved_rz, saved_n = saved_h
        d_reset, d_w_n, d_b_n, d_norm_n = side_backward(d_n, saved_n, w_n, norm_n)
        d_r = d_reset * seen * gate.slope(r)
        d_rz = np.concatenate([d_r, d_z], axis=1)
        d_seen, d_w_rz, d_b_rz, d_norm_hh = side_backward(d_rz, saved_rz, w_rz, norm_rz)
        d_seen = d_seen + d_reset * r
        d_weight_hh = np.concatenate([d_w_rz, d_w_n])
        d_bias_hh = np.concatenate([d_b_rz, d_b_n])
        if d_norm_hh is not None and d_norm_n is not None:
            d_norm_hh = np.concatenate([d_norm_hh, d_norm_n])
    d_a = np.concatenate([d_r, d_z, d_n], axis=1)
    d_x, d_weight_ih, d_bias_ih, d_norm_ih = side_backward(d_a, saved_x, p.weight_ih, p.norm_ih)
    d_p = Parameters(
        d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, norm_ih=d_norm_ih, norm_hh=d_norm_hh
    )
    return d_x, (d_h_prev + dropped(d_seen, masks.dropout) + d_h * z,), d_p


def _gru_parts(p: Parameters) -> list[tuple[Array, Array, Array | None]]:
    """W, b and γ of the hidden side of r and z, then of n."""
    cut = [2 * len(p.weight_hh) // 3]
    norms = (None, None) if p.norm_hh is None else np.split(p.norm_hh, cut)
    return list(zip(np.split(p.weight_hh, cut), np.split(p.bias_hh, cut), norms, strict=True))


class Cell(NamedTuple):
    """The maths of one step, and how many gates and state vectors it has."""

    forward: Callable[[Array, State, Parameters, Options, Masks], tuple[State, StepSaved]]
    backward: Callable[
        [State, StepSaved, Parameters, Options, Masks], tuple[Array, State, Parameters]
    ]
    gates: int
    states: int


CELLS = {
    "RNN": Cell(rnn_cell, rnn_cell_backward, gates=1, states=1),
    "LSTM": Cell(lstm_cell, lstm_cell_backward, gates=4, states=2),
    "GRU": Cell(gru_cell, gru_cell_backward, gates=3, states=1),
}


# ---- Which rows run at each step -----------------------------------------------------------------


class Steps(NamedTuple):
    """The one table behind padded and packed data, lengths and resets."""

    active: Mask  # (T, B): where there is data
    reset: Mask  # (T, B): the step starts an episode

    def order(self, reverse: bool) -> Iterable[int]:
        """The steps, in the order in which a direction runs through them."""
        steps = range(len(self.active))
        return reversed(steps) if reverse else steps

    def rows(self, t: int) -> npt.NDArray[np.intp]:
        """The rows that run at step t; the others keep their state."""
        return np.flatnonzero(self.active[t])

    def fresh(self, t: int, reverse: bool) -> Mask:
        """(B,): the state before step t is zero, because a boundary lies just before it."""
        if not reverse:
            return np.asarray(self.reset[t], dtype=np.bool_)
        if t + 1 == len(self.active):
            return np.zeros_like(self.reset[t])
        return np.asarray(self.reset[t + 1] & self.active[t + 1], dtype=np.bool_)


def _steps(
    shape: tuple[int, ...],
    batch_sizes: npt.ArrayLike | None,
    lengths: npt.ArrayLike | None,
    reset: npt.ArrayLike | None,
) -> Steps:
    if batch_sizes is not None:
        if lengths is not None or reset is not None:
            raise ValueError("batch_sizes cannot be combined with lengths or reset")
        sizes = np.asarray(batch_sizes, dtype=np.int64)
        active = np.arange(sizes[0]) < sizes[:, None]
        return Steps(active, np.zeros_like(active))
    T, B = shape[:2]
    last = np.full(B, T) if lengths is None else np.asarray(lengths, dtype=np.int64)
    active = np.arange(T)[:, None] < last
    mask = np.zeros((T, B), np.bool_) if reset is None else np.asarray(reset, dtype=np.bool_)
    if mask.shape != (T, B):
        raise ValueError(f"reset must have shape {(T, B)}, got {mask.shape}")
    return Steps(active, mask)


def _pad(packed: Array, active: Mask) -> Array:
    """(…, N, K) → (…, T, B, K); a packed sequence is the active pairs, steps outermost."""
    padded = np.zeros((*packed.shape[:-2], *active.shape, packed.shape[-1]))
    padded[..., active, :] = packed
    return padded


# ---- One layer in one direction ------------------------------------------------------------------


class Group(NamedTuple):
    """One layer in one direction."""

    parameters: Parameters
    reverse: bool
    first: State  # (B, O), (B, H): before the first step
    anew: State  # (O,), (H,): after a reset
    masks: Masks


def _run(
    cell: Cell, x: Array, group: Group, options: Options, steps: Steps
) -> tuple[State, State, dict[int, StepSaved]]:
    """The states at every step (zero at padding), the last state, and what is saved per step."""
    state = tuple(s.copy() for s in group.first)
    states = tuple(np.zeros((len(x), *s.shape)) for s in state)
    saved = {}
    for t in steps.order(group.reverse):
        rows, fresh = steps.rows(t), steps.fresh(t, group.reverse)
        before = tuple(
            np.where(fresh[:, None], anew, s)[rows]
            for s, anew in zip(state, group.anew, strict=True)
        )
        masks = group.masks.at(t, rows)
        after, saved[t] = cell.forward(x[t, rows], before, group.parameters, options, masks)
        for s, value, history in zip(state, after, states, strict=True):
            s[rows] = value
            history[t, rows] = value
    return states, state, saved


def _run_backward(
    cell: Cell,
    d_states: State,
    d_state: State,
    saved: dict[int, StepSaved],
    group: Group,
    options: Options,
    steps: Steps,
) -> tuple[Array, State, State, list[Array]]:
    """Backpropagation through time: the gradients of x, of the first state, of the one after a
    reset, and of the parameters."""
    T, B = steps.active.shape
    p = group.parameters
    d_state = tuple(s.copy() for s in d_state)
    d_anew = tuple(np.zeros_like(s) for s in group.anew)
    d_x = np.zeros((T, B, p.weight_ih.shape[1]))
    d_p = [np.zeros_like(w) for w in p if w is not None]
    for t in steps.order(not group.reverse):
        rows, fresh = steps.rows(t), steps.fresh(t, group.reverse)
        d_after = tuple(s[rows] + d[t, rows] for s, d in zip(d_state, d_states, strict=True))
        masks = group.masks.at(t, rows)
        d_x[t, rows], d_before, d_p_step = cell.backward(d_after, saved[t], p, options, masks)
        for s, anew, value in zip(d_state, d_anew, d_before, strict=True):
            s[rows] = np.where(fresh[rows, None], 0.0, value)
            anew += value[fresh[rows]].sum(axis=0)
        for total, part in zip(d_p, (w for w in d_p_step if w is not None), strict=True):
            total += part
    return d_x, d_state, d_anew, d_p


# ---- The stack -----------------------------------------------------------------------------------


class States(NamedTuple):
    """The states of every layer at every step, or their gradients; zero at padding."""

    h: Array | None  # (L, T, B, D·O), packed (L, N, D·O)
    c: Array | None = None  # (L, T, B, D·H), packed (L, N, D·H); None for cells of one state


class Saved(NamedTuple):
    """What `backward` needs of `forward`."""

    options: Options
    groups: list[Group]  # [L·D]
    steps: Steps
    packed: bool
    kept: list[dict[int, StepSaved]]  # [L·D], by step
    d_reset: bool  # whether the states after a reset were given


class Result(NamedTuple):
    output: Array  # (T, B, D·O), packed (N, D·O): h of the last layer
    hx_n: State  # (h_n,) or (h_n, c_n): (L·D, B, O), (L·D, B, H)
    states: States
    saved: Saved


def forward(
    options: Options,
    input: npt.ArrayLike,
    hx: Sequence[npt.ArrayLike] | None,
    weights: Sequence[npt.ArrayLike],
    *,
    batch_sizes: npt.ArrayLike | None = None,
    lengths: npt.ArrayLike | None = None,
    reset: npt.ArrayLike | None = None,
    reset_hx: Sequence[npt.ArrayLike] | None = None,
    dropout_mask: npt.ArrayLike | None = None,
    zoneout_mask: Sequence[npt.ArrayLike | None] | None = None,
) -> Result:
    """Run a stack of recurrent layers over a batch of sequences.

    Arguments:
        options: the stack, an `Options`.
        input: (T, B, I); with `batch_sizes` packed, (N, I).
        hx: (h0,) or (h0, c0) of shapes (L·D, B, O) and (L·D, B, H); None stands for zeros.
        weights: for each layer, for each direction: weight_ih, weight_hh, with bias also bias_ih
            and bias_hh, with projection also weight_hr, then those of the options
            (`Options.weight_shapes`). With several heads weight_hh is (heads, G·H/heads, O/heads),
            a block for each head.
        batch_sizes: (T,), not increasing: how many rows run at each step of packed data.
        lengths: (B,), each 0…T: the valid steps of each row. Past them the output is zero; h_n is
            the last valid state, and the reverse direction starts at the last valid step.
        reset: bool (T, B): True at step t starts a new episode there: `reset_hx` takes the place
            of the state that comes over the boundary between t-1 and t, in both directions.
        reset_hx: (h,) or (h, c) of shapes (L·D, O) and (L·D, H); None stands for zeros.
        dropout_mask: (L·D, B, O), 0 or 1/(1 - p): recurrent dropout, one mask per sequence.
        zoneout_mask: (h,) or (h, c), bool of shapes (L·D, T, B, O) and (L·D, T, B, H), packed
            (L·D, N, ·), True where the old value is kept; each may be None.

    Raises:
        ValueError: batch_sizes comes with lengths or reset, reset is not (T, B), or the number of
            weights is not that of the options.
    """
    cell = CELLS[options.cell]
    parameters = _group(options, cell, weights)
    x = np.asarray(input, dtype=np.float64)
    steps = _steps(x.shape, batch_sizes, lengths, reset)
    packed = batch_sizes is not None
    if packed:
        x = _pad(x, steps.active)
    sizes = _state_sizes(cell, parameters[0])
    count, B = len(parameters), steps.active.shape[1]
    none = (None,) * cell.states
    initial = [_or_zeros(s, count, B, size) for s, size in zip(hx or none, sizes, strict=True)]
    anew = [_or_zeros(s, count, size) for s, size in zip(reset_hx or none, sizes, strict=True)]
    masks = _masks(count, steps, packed, dropout_mask, zoneout_mask)

    groups, layers, final, kept = [], [], [], []
    for layer in range(options.num_layers):
        directions = []
        for k, reverse in _directions(options, layer):
            first, after = tuple(s[k] for s in initial), tuple(s[k] for s in anew)
            groups.append(Group(parameters[k], reverse, first, after, masks[k]))
            states, last, step_saved = _run(cell, x, groups[k], options, steps)
            directions.append(states)
            final.append(last)
            kept.append(step_saved)
        layers.append([np.concatenate(s, axis=-1) for s in zip(*directions, strict=True)])
        x = layers[-1][0]

    every = [np.stack(s) for s in zip(*layers, strict=True)]
    if packed:
        every = [s[:, steps.active] for s in every]
    hx_n = tuple(np.stack(s) for s in zip(*final, strict=True))
    saved = Saved(options, groups, steps, packed, kept, reset_hx is not None)
    return Result(every[0][-1], hx_n, States(*every), saved)


def backward(
    saved: Saved,
    d_output: npt.ArrayLike | None,
    d_hx_n: Sequence[npt.ArrayLike | None] | None,
    *,
    d_states: States | None = None,
) -> tuple[Any, ...]:
    """Backpropagation through time over the stack (Werbos 1990).

    Arguments:
        saved: `Result.saved` of the forward pass.
        d_output: the gradient of `Result.output`; None stands for zeros, here and below.
        d_hx_n: the gradients of `Result.hx_n`.
        d_states: the gradients of `Result.states`.

    Returns:
        The gradients of input, of hx and, in the order of the weights, of the weights; where
        forward was given `reset_hx`, then its gradients too.
    """
    options, groups, steps, packed, kept, with_reset = saved
    cell = CELLS[options.cell]
    T, B = steps.active.shape
    L, D = options.num_layers, options.directions

    def whole(d: npt.ArrayLike | None, *shape: int) -> Array:
        if d is not None and packed:
            return _pad(np.asarray(d, dtype=np.float64), steps.active)
        return _or_zeros(d, *shape)

    sizes = _state_sizes(cell, groups[0].parameters)
    d_final = [
        _or_zeros(d, L * D, B, size)
        for d, size in zip(d_hx_n or (None,) * cell.states, sizes, strict=True)
    ]
    d_every = [
        whole(d, L, T, B, D * size)
        for d, size in zip(d_states or (None, None), sizes, strict=False)
    ]
    d_x = whole(d_output, T, B, D * sizes[0])

    d_hx = tuple(np.zeros_like(d) for d in d_final)
    d_reset = tuple(np.zeros((L * D, size)) for size in sizes)
    d_parameters: list[list[Array]] = [[]] * len(groups)
    for layer in reversed(range(L)):
        d_every[0][layer] += d_x  # what comes from above
        d_x = np.zeros(())
        for k, reverse in _directions(options, layer):
            d_own = tuple(np.split(d[layer], D, axis=-1)[int(reverse)] for d in d_every)
            d_last = tuple(d[k] for d in d_final)
            d_below, d_first, d_anew, d_parameters[k] = _run_backward(
                cell, d_own, d_last, kept[k], groups[k], options, steps
            )
            d_x = d_x + d_below
            for d, value in zip((*d_hx, *d_reset), (*d_first, *d_anew), strict=True):
                d[k] = value

    d_weights = [d_w for d_p in d_parameters for d_w in _ungroup(options, cell, d_p)]
    d_input = d_x[steps.active] if packed else d_x
    return (d_input, d_hx, d_weights, d_reset) if with_reset else (d_input, d_hx, d_weights)


def _group(options: Options, cell: Cell, weights: Sequence[npt.ArrayLike]) -> list[Parameters]:
    """Cut the flat list of weights into the parameters of each layer and direction."""
    kinds = options.weight_kinds
    n, groups = len(kinds), options.num_layers * options.directions
    if len(weights) != groups * n:
        raise ValueError(
            f"weights must hold {groups * n} arrays, {groups} times ({', '.join(kinds)}); "
            f"got {len(weights)}"
        )
    parameters = []
    for k in range(0, groups * n, n):
        arrays = [np.asarray(w, dtype=np.float64) for w in weights[k : k + n]]
        named = dict(zip(kinds, arrays, strict=True))
        if options.heads > 1:
            named["weight_hh"] = block_diagonal(named["weight_hh"], cell.gates)
        zeros = np.zeros(len(arrays[0]))
        parameters.append(Parameters(**{"bias_ih": zeros, "bias_hh": zeros, **named}))
    return parameters


def _ungroup(options: Options, cell: Cell, d_p: list[Array]) -> list[Array]:
    """The gradients of one layer's and direction's weights, as `_group` found the weights."""
    d_weight_ih, d_weight_hh, *rest = d_p
    if options.heads > 1:
        d_weight_hh = diagonal_blocks(d_weight_hh, cell.gates, options.heads)
    return [d_weight_ih, d_weight_hh, *(rest if options.bias else rest[2:])]


def block_diagonal(blocks: Array, gates: int) -> Array:
    """The recurrent weights of heads, (heads, G·H/heads, O/heads), written out as (G·H, O).

    A head's block is gate-major; so is the whole. Head k has the units k·H/heads and on of each
    gate, and sees the units k·O/heads and on of h. All else is zero.

    >>> block_diagonal(np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), gates=2)
    array([[1., 0.],
           [0., 3.],
           [2., 0.],
           [0., 4.]])
    """
    heads, rows, columns = blocks.shape
    units = rows // gates
    whole = np.zeros((gates, heads, units, heads, columns))
    for k, block in enumerate(blocks):
        whole[:, k, :, k] = block.reshape(gates, units, columns)
    return whole.reshape(heads * rows, heads * columns)


def diagonal_blocks(whole: Array, gates: int, heads: int) -> Array:
    """The way back from `block_diagonal`; of a gradient, what falls on the blocks."""
    rows, columns = len(whole) // heads, whole.shape[1] // heads
    parts = whole.reshape(gates, heads, rows // gates, heads, columns)
    return np.stack([parts[:, k, :, k].reshape(rows, columns) for k in range(heads)])


def _masks(
    count: int,
    steps: Steps,
    packed: bool,
    dropout: npt.ArrayLike | None,
    zoneout: Sequence[npt.ArrayLike | None] | None,
) -> list[Masks]:
    """Those of each layer and direction, padded."""
    factors = None if dropout is None else np.asarray(dropout, dtype=np.float64)
    keep: list[Mask | None] = [None, None]
    for k, mask in enumerate(zoneout or ()):
        if mask is not None:
            array = np.asarray(mask, dtype=np.float64)
            keep[k] = (_pad(array, steps.active) if packed else array) != 0.0
    return [Masks(*(None if m is None else m[k] for m in (factors, *keep))) for k in range(count)]


def _directions(options: Options, layer: int) -> list[tuple[int, bool]]:
    """The index among L·D of each direction of the layer, and whether it runs backwards."""
    if options.bidirectional:
        return [(2 * layer, False), (2 * layer + 1, True)]
    return [(layer, False)]


def _state_sizes(cell: Cell, p: Parameters) -> list[int]:
    """The width of each state: O for h, H for the others."""
    gate_rows, output_size = p.weight_hh.shape
    return [output_size] + [gate_rows // cell.gates] * (cell.states - 1)


def _or_zeros(array: npt.ArrayLike | None, *shape: int) -> Array:
    return np.zeros(shape) if array is None else np.array(array, dtype=np.float64)
