"""Recurrent layers in plain NumPy float64, forward and backward, written for reading.

This is the yardstick that the engine is tested against. It is slow, has no blocking, no threads
and no special cases; each formula stands here once. docs/maths.md derives them.

Sizes: T steps, B rows, I input size, H hidden size, P projection size, O = P or else H,
G gates, L layers, D directions, N the number of (step, row) pairs of a packed sequence.

A *cell* is one step: a function from the input x (B, I) and the state before the step to the state
after it, and a function that takes the gradient of the state after the step back to x, to the
state before and to the parameters. `CELLS` lists them by name; a cell added there runs in stacks,
both directions, packed, with lengths and with resets. `forward` and `backward` run a whole stack.

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

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastrnn._options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Options", "Result", "Saved", "States", "backward", "forward"]
__all__ += ["rnn_cell", "rnn_cell_backward", "lstm_cell", "lstm_cell_backward"]
__all__ += ["gru_cell", "gru_cell_backward", "Parameters"]
__all__ += ["ACTIVATIONS", "CELLS", "GATE_ACTIVATIONS", "Cell", "Function"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
State: TypeAlias = tuple[Array, ...]  # (h,) or (h, c), each (B, O) or (B, H)
StepSaved: TypeAlias = tuple[Array, ...]  # what a cell's forward keeps for its backward


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


# ---- Cells ---------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """The parameters of one layer and direction, or their gradients."""

    weight_ih: Array  # (G·H, I)
    weight_hh: Array  # (G·H, O)
    bias_ih: Array  # (G·H,); zeros in a layer without bias
    bias_hh: Array  # (G·H,)
    weight_hr: Array | None = None  # (P, H); None without projection


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """x·Wᵀ + b: (B, K), (M, K), (M,) → (B, M)."""
    y: Array = x @ weight.T + bias
    return y


def linear_backward(d_y: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """The gradients of x, W and b."""
    return d_y @ weight, d_y.T @ x, d_y.sum(axis=0)


def rnn_cell(x: Array, state: State, p: Parameters, options: Options) -> tuple[State, StepSaved]:
    """h = act(W_ih x + b_ih + W_hh h' + b_hh), where h' is h before the step (Elman 1990).

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
    h = act.value(linear(x, p.weight_ih, p.bias_ih) + linear(h_prev, p.weight_hh, p.bias_hh))
    return (h,), (x, h_prev, h)


def rnn_cell_backward(
    d_state: State, saved: StepSaved, p: Parameters, options: Options
) -> tuple[Array, State, Parameters]:
    """From the gradient of (h,), the gradients of x, of (h',) and of the parameters."""
    act = ACTIVATIONS[options.activation]
    x, h_prev, h = saved
    (d_h,) = d_state
    d_a = d_h * act.slope(h)
    d_x, d_weight_ih, d_bias_ih = linear_backward(d_a, x, p.weight_ih)
    d_h_prev, d_weight_hh, d_bias_hh = linear_backward(d_a, h_prev, p.weight_hh)
    return d_x, (d_h_prev,), Parameters(d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh)


def lstm_cell(x: Array, state: State, p: Parameters, options: Options) -> tuple[State, StepSaved]:
    """One step of the LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    With h', c' the state before the step, gate and act the two activations, and
    a_k = W_ik x + b_ik + W_hk h' + b_hk for each gate k:

        i = gate(a_i)   f = gate(a_f)   g = act(a_g)   o = gate(a_o)
        c = f c' + i g
        m = o act(c)
        h = m, or W_hr m where there is a projection (Sak et al. 2014)

    Takes x (B, I) and the state (h', c') of shapes (B, O) and (B, H); the rows of the weights are
    i, f, g, o. Returns the state (h, c), and what the backward function needs.
    """
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    h_prev, c_prev = state
    a = linear(x, p.weight_ih, p.bias_ih) + linear(h_prev, p.weight_hh, p.bias_hh)
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    i, f, g, o = gate.value(a_i), gate.value(a_f), act.value(a_g), gate.value(a_o)
    c = f * c_prev + i * g
    act_c = act.value(c)
    m = o * act_c
    h = m if p.weight_hr is None else m @ p.weight_hr.T
    return (h, c), (x, h_prev, c_prev, i, f, g, o, act_c, m)


def lstm_cell_backward(
    d_state: State, saved: StepSaved, p: Parameters, options: Options
) -> tuple[Array, State, Parameters]:
    """From the gradients of (h, c), the gradients of x, of (h', c') and of the parameters."""
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    x, h_prev, c_prev, i, f, g, o, act_c, m = saved
    d_h, d_c = d_state
    d_m, d_weight_hr = d_h, None
    if p.weight_hr is not None:
        d_m, d_weight_hr = d_h @ p.weight_hr, d_h.T @ m
    d_c = d_c + d_m * o * act.slope(act_c)
    d_i = d_c * g * gate.slope(i)
    d_f = d_c * c_prev * gate.slope(f)
    d_g = d_c * i * act.slope(g)
    d_o = d_m * act_c * gate.slope(o)
    d_a = np.concatenate([d_i, d_f, d_g, d_o], axis=1)
    d_x, d_weight_ih, d_bias_ih = linear_backward(d_a, x, p.weight_ih)
    d_h_prev, d_weight_hh, d_bias_hh = linear_backward(d_a, h_prev, p.weight_hh)
    d_p = Parameters(d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_weight_hr)
    return d_x, (d_h_prev, d_c * f), d_p


def gru_cell(x: Array, state: State, p: Parameters, options: Options) -> tuple[State, StepSaved]:
    """One step of the GRU (Cho et al. 2014).

    With h' the state before the step:

        r = gate(W_ir x + b_ir + W_hr h' + b_hr)
        z = gate(W_iz x + b_iz + W_hz h' + b_hz)
        n = act(W_in x + b_in + r (W_hn h' + b_hn))     reset_after
        n = act(W_in x + b_in + W_hn (r h') + b_hn)     not reset_after: the original
        h = (1 - z) n + z h'

    Takes x (B, I) and the state (h',), h' (B, H); the rows of the weights are r, z, n. Returns
    the state (h,), and what the backward function needs.
    """
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    (h_prev,) = state
    a_r, a_z, a_n = np.split(linear(x, p.weight_ih, p.bias_ih), 3, axis=1)
    b_r, b_z, b_n = np.split(linear(h_prev, p.weight_hh, p.bias_hh), 3, axis=1)
    r, z = gate.value(a_r + b_r), gate.value(a_z + b_z)
    if options.reset_after:
        n = act.value(a_n + r * b_n)
    else:
        _, _, weight_hn = np.split(p.weight_hh, 3)
        _, _, bias_hn = np.split(p.bias_hh, 3)
        n = act.value(a_n + linear(r * h_prev, weight_hn, bias_hn))
    h = n + z * (h_prev - n)  # torch's way; where n is infinite the other gives another result
    return (h,), (x, h_prev, r, z, n, b_n)


def gru_cell_backward(
    d_state: State, saved: StepSaved, p: Parameters, options: Options
) -> tuple[Array, State, Parameters]:
    """From the gradient of (h,), the gradients of x, of (h',) and of the parameters."""
    act, gate = ACTIVATIONS[options.activation], GATE_ACTIVATIONS[options.gate_activation]
    x, h_prev, r, z, n, b_n = saved
    (d_h,) = d_state
    d_n = d_h * (1.0 - z) * act.slope(n)
    d_z = d_h * (h_prev - n) * gate.slope(z)
    if options.reset_after:
        d_r = d_n * b_n * gate.slope(r)
        d_b = np.concatenate([d_r, d_z, d_n * r], axis=1)
        d_h_prev, d_weight_hh, d_bias_hh = linear_backward(d_b, h_prev, p.weight_hh)
    else:
        weight_rz, weight_hn = np.split(p.weight_hh, [2 * n.shape[1]])
        d_rh, d_weight_hn, d_bias_hn = linear_backward(d_n, r * h_prev, weight_hn)
        d_r = d_rh * h_prev * gate.slope(r)
        d_rz = np.concatenate([d_r, d_z], axis=1)
        d_h_prev, d_weight_rz, d_bias_rz = linear_backward(d_rz, h_prev, weight_rz)
        d_h_prev = d_h_prev + d_rh * r
        d_weight_hh = np.concatenate([d_weight_rz, d_weight_hn])
        d_bias_hh = np.concatenate([d_bias_rz, d_bias_hn])
    d_a = np.concatenate([d_r, d_z, d_n], axis=1)
    d_x, d_weight_ih, d_bias_ih = linear_backward(d_a, x, p.weight_ih)
    d_p = Parameters(d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh)
    return d_x, (d_h_prev + d_h * z,), d_p


class Cell(NamedTuple):
    """The maths of one step, and how many gates and state vectors it has."""

    forward: Callable[[Array, State, Parameters, Options], tuple[State, StepSaved]]
    backward: Callable[[State, StepSaved, Parameters, Options], tuple[Array, State, Parameters]]
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


def _run(
    cell: Cell,
    x: Array,
    state: State,
    p: Parameters,
    options: Options,
    steps: Steps,
    reverse: bool,
) -> tuple[State, State, dict[int, StepSaved]]:
    """The states at every step (zero at padding), the last state, and what is saved per step."""
    state = tuple(s.copy() for s in state)
    states = tuple(np.zeros((len(x), *s.shape)) for s in state)
    saved = {}
    for t in steps.order(reverse):
        rows, fresh = steps.rows(t), steps.fresh(t, reverse)
        before = tuple(np.where(fresh[:, None], 0.0, s)[rows] for s in state)
        after, saved[t] = cell.forward(x[t, rows], before, p, options)
        for s, value, history in zip(state, after, states, strict=True):
            s[rows] = value
            history[t, rows] = value
    return states, state, saved


def _run_backward(
    cell: Cell,
    d_states: State,
    d_state: State,
    saved: dict[int, StepSaved],
    p: Parameters,
    options: Options,
    steps: Steps,
    reverse: bool,
) -> tuple[Array, State, list[Array]]:
    """Backpropagation through time: the gradients of x, of the first state, of the parameters."""
    T, B = steps.active.shape
    d_state = tuple(s.copy() for s in d_state)
    d_x = np.zeros((T, B, p.weight_ih.shape[1]))
    d_p = [np.zeros_like(w) for w in p if w is not None]
    for t in steps.order(not reverse):
        rows, fresh = steps.rows(t), steps.fresh(t, reverse)
        d_after = tuple(s[rows] + d[t, rows] for s, d in zip(d_state, d_states, strict=True))
        d_x[t, rows], d_before, d_p_step = cell.backward(d_after, saved[t], p, options)
        for s, value in zip(d_state, d_before, strict=True):
            s[rows] = np.where(fresh[rows, None], 0.0, value)
        for total, part in zip(d_p, (w for w in d_p_step if w is not None), strict=True):
            total += part
    return d_x, d_state, d_p


# ---- The stack -----------------------------------------------------------------------------------


class States(NamedTuple):
    """The states of every layer at every step, or their gradients; zero at padding."""

    h: Array | None  # (L, T, B, D·O), packed (L, N, D·O)
    c: Array | None = None  # (L, T, B, D·H), packed (L, N, D·H); None for cells of one state


class Saved(NamedTuple):
    """What `backward` needs of `forward`."""

    options: Options
    parameters: list[Parameters]  # [L·D]
    steps: Steps
    packed: bool
    kept: list[dict[int, StepSaved]]  # [L·D], by step


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
) -> Result:
    """Run a stack of recurrent layers over a batch of sequences.

    Arguments:
        options: the stack, an `Options`.
        input: (T, B, I); with `batch_sizes` packed, (N, I).
        hx: (h0,) or (h0, c0) of shapes (L·D, B, O) and (L·D, B, H); None stands for zeros.
        weights: for each layer, for each direction: weight_ih, weight_hh, with bias also bias_ih
            and bias_hh, with projection also weight_hr.
        batch_sizes: (T,), not increasing: how many rows run at each step of packed data.
        lengths: (B,), each 0…T: the valid steps of each row. Past them the output is zero; h_n is
            the last valid state, and the reverse direction starts at the last valid step.
        reset: bool (T, B): True at step t starts a new episode there: zeros take the place of the
            state that comes over the boundary between t-1 and t, in both directions.

    Raises:
        ValueError: batch_sizes comes with lengths or reset, reset is not (T, B), or the number of
            weights is not that of the options.
    """
    cell = CELLS[options.cell]
    parameters = _group(options, weights)
    x = np.asarray(input, dtype=np.float64)
    steps = _steps(x.shape, batch_sizes, lengths, reset)
    packed = batch_sizes is not None
    if packed:
        x = _pad(x, steps.active)
    sizes = _state_sizes(cell, parameters[0])
    B = steps.active.shape[1]
    initial = [
        _or_zeros(s, len(parameters), B, size)
        for s, size in zip(hx or (None,) * cell.states, sizes, strict=True)
    ]

    layers, final, kept = [], [], []
    for layer in range(options.num_layers):
        directions = []
        for k, reverse in _directions(options, layer):
            start = tuple(s[k] for s in initial)
            states, last, saved = _run(cell, x, start, parameters[k], options, steps, reverse)
            directions.append(states)
            final.append(last)
            kept.append(saved)
        layers.append([np.concatenate(s, axis=-1) for s in zip(*directions, strict=True)])
        x = layers[-1][0]

    every = [np.stack(s) for s in zip(*layers, strict=True)]
    if packed:
        every = [s[:, steps.active] for s in every]
    hx_n = tuple(np.stack(s) for s in zip(*final, strict=True))
    return Result(
        every[0][-1], hx_n, States(*every), Saved(options, parameters, steps, packed, kept)
    )


def backward(
    saved: Saved,
    d_output: npt.ArrayLike | None,
    d_hx_n: Sequence[npt.ArrayLike | None] | None,
    *,
    d_states: States | None = None,
) -> tuple[Array, State, list[Array]]:
    """Backpropagation through time over the stack (Werbos 1990).

    Arguments:
        saved: `Result.saved` of the forward pass.
        d_output: the gradient of `Result.output`; None stands for zeros, here and below.
        d_hx_n: the gradients of `Result.hx_n`.
        d_states: the gradients of `Result.states`.

    Returns:
        The gradients of input, of hx and, in the order of the weights, of the weights.
    """
    options, parameters, steps, packed, kept = saved
    cell = CELLS[options.cell]
    T, B = steps.active.shape
    L, D = options.num_layers, 2 if options.bidirectional else 1

    def whole(d: npt.ArrayLike | None, *shape: int) -> Array:
        if d is not None and packed:
            return _pad(np.asarray(d, dtype=np.float64), steps.active)
        return _or_zeros(d, *shape)

    sizes = _state_sizes(cell, parameters[0])
    d_final = [
        _or_zeros(d, L * D, B, size)
        for d, size in zip(d_hx_n or (None,) * cell.states, sizes, strict=True)
    ]
    d_every = [
        whole(d, L, T, B, D * size)
        for d, size in zip(d_states or (None, None), sizes, strict=False)
    ]
    d_x = whole(d_output, T, B, D * sizes[0])

    d_hx = [np.zeros_like(d) for d in d_final]
    d_parameters: list[list[Array]] = [[]] * len(parameters)
    for layer in reversed(range(L)):
        d_every[0][layer] += d_x  # what comes from above
        d_x = np.zeros(())
        for k, reverse in _directions(options, layer):
            d_own = tuple(np.split(d[layer], D, axis=-1)[int(reverse)] for d in d_every)
            d_last = tuple(d[k] for d in d_final)
            d_below, d_first, d_parameters[k] = _run_backward(
                cell, d_own, d_last, kept[k], parameters[k], options, steps, reverse
            )
            d_x = d_x + d_below
            for d, value in zip(d_hx, d_first, strict=True):
                d[k] = value

    if not options.bias:
        d_parameters = [d_p[:2] + d_p[4:] for d_p in d_parameters]
    d_weights = [d_w for d_p in d_parameters for d_w in d_p]
    return d_x[steps.active] if packed else d_x, tuple(d_hx), d_weights


def _group(options: Options, weights: Sequence[npt.ArrayLike]) -> list[Parameters]:
    """Cut the flat list of weights into the parameters of each layer and direction."""
    fields = ["weight_ih", "weight_hh"]
    fields += ["bias_ih", "bias_hh"] if options.bias else []
    fields += ["weight_hr"] if options.proj_size else []
    n, groups = len(fields), options.num_layers * (2 if options.bidirectional else 1)
    if len(weights) != groups * n:
        raise ValueError(
            f"weights must hold {groups * n} arrays, {groups} times ({', '.join(fields)}); "
            f"got {len(weights)}"
        )
    parameters = []
    for k in range(0, groups * n, n):
        arrays = [np.asarray(w, dtype=np.float64) for w in weights[k : k + n]]
        named = dict(zip(fields, arrays, strict=True))
        zeros = np.zeros(len(arrays[0]))
        parameters.append(Parameters(**{"bias_ih": zeros, "bias_hh": zeros, **named}))
    return parameters


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
