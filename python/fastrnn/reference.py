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

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastrnn._options import Options
from fastrnn._reference_cells import (
    ACTIVATIONS,
    CELLS,
    GATE_ACTIVATIONS,
    SIGMOID,
    Array,
    Cell,
    Function,
    Mask,
    Masks,
    Parameters,
    State,
    StepSaved,
    gru_cell,
    gru_cell_backward,
    linear,
    linear_backward,
    lstm_cell,
    lstm_cell_backward,
    rnn_cell,
    rnn_cell_backward,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Options", "Result", "Saved", "States", "backward", "forward"]
__all__ += ["rnn_cell", "rnn_cell_backward", "lstm_cell", "lstm_cell_backward"]
__all__ += ["gru_cell", "gru_cell_backward", "Masks", "Parameters", "linear", "linear_backward"]
__all__ += ["ACTIVATIONS", "CELLS", "GATE_ACTIVATIONS", "SIGMOID", "Cell", "Function"]


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
