"""The cells of `fastrnn.reference`: one step of each, forward and backward, in plain NumPy float64.

A *cell* is one step: a function from the input x (B, I) and the state before the step to the state
after it, and a function that takes the gradient of the state after the step back to x, to the
state before and to the parameters. `CELLS` lists them by name. docs/maths.md derives the formulas;
sizes are named as in `fastrnn.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastrnn._options import Options

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


# ---- Parts of a step -----------------------------------------------------------------------------


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

    >>> from fastrnn.reference import Options
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
