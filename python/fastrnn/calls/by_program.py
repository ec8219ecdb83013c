"""A stack with options on the CPU: each direction of each layer is a program.

The engine's fused cells compute the layers of torch.nn, with any activation. All other options are
programs (program/build.py); `takes` and `takes_backward` say for which calls. Both passes work on
arrays of torch or NumPy, through `Arrays`. The outputs are those of ``fastrnn::forward``
(operators.py); ``saved`` holds, for each layer, direction, step and row, the values that the
program's forward pass saves.

Programs compute in float32 and float64. Half types are converted to float32, and h is rounded to
the half type at every step. Packed rows are padded, and run with lengths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .. import _C
from .._engine import NO_EXTRAS, Extras
from ..program.build import LayerProgram, Spec, layer_program
from .arguments import Arguments, Description, check, weight_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._options import Options

_ALIGNED = 16  # elements: the alignment of each saved value


def takes(options: Options, extras: Extras) -> bool:
    """Whether programs compute the forward pass of a call on the CPU."""
    return options.beyond_the_cells or any(x is not None for x in extras[2:])


def takes_backward(options: Options, extras: Extras) -> bool:
    """Whether programs compute the backward pass of a call on the CPU.

    Gradient clipping and learned states after resets do not change the results of the fused cells,
    so these compute forward. They save nothing for such a backward pass, which recomputes it.
    """
    return takes(options, extras) or options.grad_clip > 0 or any(x is not None for x in extras[:2])


class Given(NamedTuple):
    """The arguments of a call, as `recurrent` of call.py describes them."""

    input: Any  # (T, B, I), or packed (N, I)
    h0: Any
    c0: Any
    weights: Sequence[Any]
    batch_sizes: Any = None
    lengths: Any = None
    reset: Any = None
    extras: Extras = NO_EXTRAS


class Outputs(NamedTuple):
    """Contiguous arrays that forward writes; None: not wanted."""

    output: Any
    h_n: Any
    c_n: Any = None
    hidden: Any = None
    cell: Any = None
    saved: Any = None


class Cotangents(NamedTuple):
    """Gradients of the outputs of forward; None: zero."""

    output: Any = None
    hidden: Any = None
    cell: Any = None
    h_n: Any = None
    c_n: Any = None


class Gradients(NamedTuple):
    """Contiguous arrays that backward writes, with the arguments' shapes; None: not wanted."""

    input: Any
    h0: Any
    c0: Any
    reset_h: Any
    reset_c: Any
    weights: Sequence[Any]


def gradients(d: Sequence[Any]) -> Gradients:
    """`Gradients` from a flat list in their order."""
    d_input, d_h0, d_c0, d_reset_h, d_reset_c, *d_weights = d
    return Gradients(d_input, d_h0, d_c0, d_reset_h, d_reset_c, d_weights)


class Arrays(Protocol):
    """Operations that differ between array libraries."""

    threads: int  # of the engine; 0: its default

    def empty(self, *shape: int) -> Any:
        """An array of the compute dtype."""

    def wide(self, x: Any) -> Any:
        """``x`` in the compute dtype with a contiguous last axis; ``x`` itself if it has both."""

    def dense(self, x: Any) -> Any:
        """``x`` in the compute dtype, contiguous."""

    def columns(self, x: Any, columns: slice) -> Any:
        """A view of a slice of the last axis."""

    def numbers(self, mask: Any) -> Any:
        """1 for true and 0 for false, in the compute dtype."""

    def store(self, values: Any, target: Any) -> None:
        """Write values to an array of any floating dtype."""

    def is_wide(self, target: Any) -> bool:
        """Whether the engine can write directly to a contiguous target."""

    def valid(self, counts: Any, steps: int, rows: int, packed: bool) -> Any:
        """Bool (T, B): by batch_sizes, or by lengths."""

    def positions(self, valid: Any) -> Any:
        """The positions of the packed rows in (T·B), in their order."""

    def fresh(self, reset: Any, valid: Any, reverse: bool) -> Any:
        """Bool (T, B): whether a step is the first one computed of an episode after a reset.

        In reverse an episode starts at its last step, the one before the next reset.
        """


def kept_width(
    options: Options, input_size: int, hidden_size: int, dtype: str, extras: Extras,
    lengths: bool, reset: bool,
) -> int:  # fmt: skip
    """The size of the last axis of ``saved``."""
    widths = [input_size]
    if options.num_layers > 1:
        widths.append(options.directions * (options.proj_size or hidden_size))
    specs = [
        _spec(options, width, hidden_size, dtype, extras, lengths, reset, cell=True)
        for width in widths
    ]
    return max(_layout(spec).width for spec in specs)


def _spec(
    options: Options, input_size: int, hidden_size: int, dtype: str, extras: Extras,
    lengths: bool, reset: bool, cell: bool,
) -> Spec:  # fmt: skip
    given = tuple(x is not None for x in extras)
    return Spec(
        _of_one_direction(options),
        int(input_size),
        int(hidden_size),
        dtype,
        lengths,
        reset,
        (given[0], given[1]) if reset else (False, False),
        given[2],
        (given[3], given[4]),
        cell and options.cell == "LSTM",
    )


@lru_cache(maxsize=256)
def _of_one_direction(options: Options) -> Options:
    return replace(options, num_layers=1, bidirectional=False, recompute=False)


def shapes(
    options: Options, arguments: Sequence[Any], rows: Any, every: bool, saved: bool
) -> tuple[tuple[Any, ...] | None, ...]:
    """The shapes of `Outputs`.

    Arguments:
        arguments: input, h0, c0, weights, batch_sizes, lengths, reset and the extras, as tensors
            or arrays, whose values are not read.
        rows: B.
        every: whether hidden and cell are wanted.
        saved: whether the values that only backward needs are wanted.
    """
    input, _, _, weights, batch_sizes, lengths, reset, *extras = arguments
    layers, directions, two = options.num_layers, options.directions, options.cell == "LSTM"
    hidden_size = weights[0].shape[0] // options.gates
    out, groups, entries = options.proj_size or hidden_size, layers * directions, input.shape[:-1]
    kept = None
    if saved:
        steps = entries[0] if batch_sizes is None else batch_sizes.shape[0]
        ragged = batch_sizes is not None or lengths is not None
        dtype = str(input.dtype).removeprefix("torch.")
        given = (Extras(*extras), ragged, reset is not None)
        width = kept_width(options, input.shape[-1], hidden_size, dtype, *given)
        kept = (groups, steps * rows, width)
    return (
        (*entries, directions * out),
        (groups, rows, out),
        (groups, rows, hidden_size) if two else None,
        (layers, *entries, directions * out) if every else None,
        (layers, *entries, directions * hidden_size) if every and two else None,
        kept,
    )


class _Layout(NamedTuple):
    """The layout of the last axis of ``saved``."""

    places: dict[tuple[str, int], slice]  # by saved value
    gaps: list[slice]  # unused elements
    width: int


@lru_cache(maxsize=256)
def _layout(spec: Spec) -> _Layout:
    program = layer_program(spec)
    passes = program.prepared.passes(program.everything)
    widths = {
        (kind, i): passes.saved[i] if kind == "saved" else program.prepared.widths[i]
        for kind, i in passes.forward.sequences
        if kind in ("saved", "state")
    }
    places, gaps, end = {}, [], 0
    for what, width in sorted(widths.items(), key=lambda item: -item[1]):
        begin = end if width == 1 else -(-end // _ALIGNED) * _ALIGNED
        gaps.append(slice(end, begin))
        end = begin + width
        places[what] = slice(begin, end)
    width = -(-end // _ALIGNED) * _ALIGNED
    gaps.append(slice(end, width))
    return _Layout(places, [g for g in gaps if g.start < g.stop], width)


# ---- a call --------------------------------------------------------------------------------------


class Call:
    """One call of a stack, with its arguments in the form that programs need."""

    def __init__(self, arrays: Arrays, options: Options, dtype: str, given: Given) -> None:
        self.arrays, self.options, self.dtype, self.given = arrays, options, dtype, given
        wide = arrays.wide
        self.packed = given.batch_sizes is not None
        if self.packed:
            self.steps, self.rows = given.batch_sizes.shape[0], int(given.batch_sizes[0])
        else:
            self.steps, self.rows = given.input.shape[:2]
        valid = None
        if self.packed or given.lengths is not None:
            counts = given.batch_sizes if self.packed else given.lengths
            valid = arrays.valid(counts, self.steps, self.rows, self.packed)
        self.at = arrays.positions(valid) if self.packed else None
        self.valid: Any = None if valid is None else arrays.numbers(valid)[..., None]
        self.fresh = [
            None
            if given.reset is None
            else arrays.numbers(arrays.fresh(given.reset, valid, direction == 1))[..., None]
            for direction in range(options.directions)
        ]
        self.input = self._padded(wide(given.input))
        self.states = [None if s is None else wide(s) for s in (given.h0, given.c0)]
        self.weights = [arrays.dense(w) for w in given.weights]
        self.kinds = options.weight_kinds
        self.hidden_size = given.weights[0].shape[0] // options.gates
        self.output_size = options.proj_size or self.hidden_size
        anew, (dropout, *keep) = given.extras[:2], given.extras[2:]
        self.learned = [None if x is None else arrays.dense(x) for x in anew]
        self.dropout: Any = None if dropout is None else wide(dropout)
        self.keep = [None if k is None else self._padded(arrays.numbers(k)) for k in keep]

    # ---- packed rows -----------------------------------------------------------------------------

    def _padded(self, x: Any) -> Any:
        """Packed (…, N, units) as (…, T, B, units) with zeros past a row's length."""
        if not self.packed:
            return x
        *before, _, units = x.shape
        padded = self.arrays.empty(*before, self.steps * self.rows, units)
        padded[...] = 0
        padded[..., self.at, :] = x
        return padded.reshape(*before, self.steps, self.rows, units)

    def _buffer(self, target: Any, *shape: int) -> Any:
        """The array that the engine writes for a target: the target itself if possible.

        Arguments:
            shape: (…, T, B, units), the shape of a padded target; left out if it has no rows.
        """
        packed = self.packed and bool(shape)
        if target is not None and not packed and self.arrays.is_wide(target):
            return target
        return self.arrays.empty(*(shape or target.shape))

    def _store(self, values: Any, target: Any, *, rows: bool = True) -> None:
        """Copy a buffer to its target; ``rows``: the target is (…, T, B, units)."""
        if target is None or values is target:
            return
        if rows and self.packed:
            flat = values.reshape(*values.shape[:-3], self.steps * self.rows, values.shape[-1])
            values = flat[..., self.at, :]
        self.arrays.store(values, target)

    # ---- programs --------------------------------------------------------------------------------

    def _spec(self, layer: int, cell: bool) -> Spec:
        options = self.options
        width = options.directions * self.output_size if layer else self.input.shape[-1]
        return _spec(
            options, width, self.hidden_size, self.dtype, self.given.extras,
            self.valid is not None, self.given.reset is not None, cell,
        )  # fmt: skip

    def _arrays_of(self, program: LayerProgram, group: int, x: Any) -> _Inputs:
        """The inputs of a program."""
        sequences = {
            "x": x,
            "valid": self.valid,
            "fresh": self.fresh[int(self._reverse(group))],
            "keep_h": None if self.keep[0] is None else self.keep[0][group],
            "keep_c": None if self.keep[1] is None else self.keep[1][group],
        }
        shared = dict(zip(self.kinds, self.weights[group * len(self.kinds) :], strict=False))
        for name, anew in zip(("reset_h", "reset_c"), self.learned, strict=True):
            shared[name] = None if anew is None else anew[group]
        return _Inputs(
            [sequences[name] for name in program.xs],
            [self.dropout[group] for _ in program.fixed],
            [shared[name] for name in program.shared],
            [None if s is None else s[group] for s in self.states],
        )

    def _run_group(
        self, spec: Spec, group: int, x: Any, ys: Sequence[Any], finals: Sequence[Any], kept: Any
    ) -> None:
        """Runs one direction of a layer forward.

        Arguments:
            ys: the outputs h and c of every step.
            finals: the final states; None: not wanted.
            kept: ``saved`` of the direction, (T·B, width), or None.
        """
        program = layer_program(spec)
        reverse = self._reverse(group)
        plan, engine = program.prepared.forward(None if kept is None else program.everything)
        given = self._arrays_of(program, group, x)
        sequences = self._sequences(spec, plan.sequences, given.xs, ys, kept, {})
        engine.run(
            self.steps, self.rows, reverse, self.arrays.threads,
            [given.shared[j] for j in plan.shared],
            sequences, [None] * len(sequences),
            [given.fixed[j] for j in plan.fixed],
            [given.states[k] for k in plan.carries],
            [finals[k] for k in plan.carries],
            [],
        )  # fmt: skip

    def _reverse(self, group: int) -> bool:
        return self.options.directions == 2 and group % 2 == 1

    def _sequences(
        self, spec: Spec, wanted: Sequence[tuple[str, int]], xs: Sequence[Any],
        ys: Sequence[Any], kept: Any, others: dict[tuple[str, int], Any],
    ) -> list[Any]:  # fmt: skip
        """The sequences of a pass in its order."""
        rows: Any = None if kept is None else kept.reshape(self.steps, self.rows, kept.shape[-1])
        places, columns = _layout(spec).places, self.arrays.columns

        def find(what: tuple[str, int]) -> Any:
            kind, i = what
            if kind in ("x", "y"):
                return (xs if kind == "x" else ys)[i]
            return others[what] if what in others else columns(rows, places[what])

        return list(map(find, wanted))

    def _part(self, whole: Any, group: int, size: int) -> Any:
        """A direction's part of (T, B, D·size)."""
        if whole is None or self.options.directions == 1:
            return whole
        direction = group % 2
        return self.arrays.columns(whole, slice(direction * size, (direction + 1) * size))

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, out: Outputs) -> None:
        options, T, B = self.options, self.steps, self.rows
        L, D = options.num_layers, options.directions
        width = D * self.output_size
        every = None if out.hidden is None else self._buffer(out.hidden, L, T, B, width)
        last = self._buffer(out.output, T, B, width) if every is None else every[-1]
        cell = None if out.cell is None else self._buffer(out.cell, L, T, B, D * self.hidden_size)
        finals = [self._buffer(target) for target in (out.h_n, out.c_n) if target is not None]
        between = [
            self.arrays.empty(T, B, width) for _ in range(min(L - 1, 2) if every is None else 0)
        ]
        x = self.input
        for layer in range(L):
            if every is not None:
                y = every[layer]
            else:
                y = last if layer == L - 1 else between[layer % 2]
            spec = self._spec(layer, cell is not None)
            for group in range(layer * D, (layer + 1) * D):
                kept = None if out.saved is None else out.saved[group]
                self._run_group(
                    spec,
                    group,
                    x,
                    self._parts(group, y, None if cell is None else cell[layer]),
                    [final[group] for final in finals],
                    kept,
                )
                if kept is not None:  # the same bits at every call
                    layout = _layout(spec)
                    for gap in (*layout.gaps, slice(layout.width, kept.shape[-1])):
                        kept[:, gap] = 0
            x = y
        self._store(last, out.output)
        self._store(every, out.hidden)
        self._store(cell, out.cell)
        for final, target in zip(finals, (out.h_n, out.c_n), strict=False):
            self._store(final, target, rows=False)

    # ---- backward --------------------------------------------------------------------------------

    def backward(self, saved: Outputs, d: Cotangents, out: Gradients) -> None:
        """``saved``: hidden, cell and saved of forward; saved None: it is recomputed."""
        L, D = self.options.num_layers, self.options.directions
        every = (saved.hidden, saved.cell, d.hidden, d.cell, d.output)
        hidden: Any
        d_above: Any
        hidden, cell, d_hidden, d_cell, d_above = (
            None if x is None else self._padded(self.arrays.wide(x)) for x in every
        )
        d_finals = [None if g is None else self.arrays.wide(g) for g in (d.h_n, d.c_n)]
        buffers = self._buffers(out)
        for layer in range(L - 1, -1, -1):
            d_y = _sum(d_above, None if d_hidden is None else d_hidden[layer])
            x = hidden[layer - 1] if layer else self.input
            d_x: Any = buffers.input if layer == 0 else self.arrays.empty(*x.shape)
            for group in range(layer * D, (layer + 1) * D):
                second = d_x if group % D == 0 or d_x is None else self.arrays.empty(*x.shape)
                self._backward_group(
                    self._spec(layer, cell is not None),
                    group,
                    x,
                    self._parts(group, hidden[layer], None if cell is None else cell[layer]),
                    None if saved.saved is None else saved.saved[group],
                    self._parts(group, d_y, None if d_cell is None else d_cell[layer]),
                    [None if g is None else g[group] for g in d_finals],
                    second,
                    buffers,
                )
                if second is not d_x:
                    d_x += second
            d_above = d_x
        self._store(buffers.input, out.input)
        for buffer, target in (*zip(buffers[1:5], out[1:5], strict=True),
                               *zip(buffers.weights, out.weights, strict=True)):  # fmt: skip
            self._store(buffer, target, rows=False)

    def _buffers(self, out: Gradients) -> Gradients:
        """The arrays that the engine writes for the gradients."""
        others = (*out[1:5], *out.weights)
        return gradients(
            [
                None if out.input is None else self._buffer(out.input, *self.input.shape),
                *(None if target is None else self._buffer(target) for target in others),
            ]
        )

    def _parts(self, group: int, h: Any, c: Any) -> tuple[Any, Any]:
        """A direction's parts of a layer's h and c, (T, B, D·units)."""
        return self._part(h, group, self.output_size), self._part(c, group, self.hidden_size)

    def _backward_group(
        self, spec: Spec, group: int, x: Any, ys: Sequence[Any], kept: Any, d_ys: Sequence[Any],
        d_finals: Sequence[Any], d_x: Any, out: Gradients,
    ) -> None:  # fmt: skip
        """Runs one direction of a layer backward.

        Arguments:
            ys: h and c of every step.
            kept: ``saved`` of the direction; None: it is recomputed.
            d_ys, d_finals: gradients; None: zero.
            d_x: the gradient of x to write, or None.
            out: the other gradients to write.
        """
        if kept is None:
            kept = self._recomputed(spec, group, x)
        program, reverse = layer_program(spec), self._reverse(group)
        n = len(self.kinds)
        targets = dict(zip(self.kinds, out.weights[group * n : (group + 1) * n], strict=True))
        others = {"h0": out.h0, "c0": out.c0, "reset_h": out.reset_h, "reset_c": out.reset_c}
        targets |= {name: None if d is None else d[group] for name, d in others.items()}
        targets["x"] = d_x
        wanted = frozenset(name for name, d in targets.items() if d is not None)
        if not wanted:
            return
        with_d = frozenset(i for i in program.graph.ys if d_ys[i] is not None)
        needs = program.needs(wanted)
        plan, engine = program.prepared.backward(program.everything, reverse, needs, with_d)
        given = self._arrays_of(program, group, x)
        own = {("dx", 0): d_x, **{("dy", i): d_ys[i] for i in with_d}}
        firsts = [None if k is None else given.states[k] for k in plan.firsts]
        names = ("h0", "c0")
        finals = [targets[names[k]] for k in plan.carries]
        sums = [targets[program.shared[j]] for j in plan.targets]
        engine.run(
            self.steps, self.rows, not reverse, self.arrays.threads,
            [given.shared[j] for j in plan.shared],
            self._sequences(spec, plan.sequences, given.xs, ys, kept, own), firsts,
            [given.fixed[j] for j in plan.fixed],
            [d_finals[k] for k in plan.carries], finals, sums,
        )  # fmt: skip
        made = {"x"} if ("dx", 0) in plan.sequences else set()
        made |= {names[k] for k in plan.carries} | {program.shared[j] for j in plan.targets}
        for name in wanted - made:  # no output depends on it
            targets[name][...] = 0

    def _recomputed(self, spec: Spec, group: int, x: Any) -> Any:
        """The values that forward saves, from another forward pass."""
        T, B = self.steps, self.rows
        kept = self.arrays.empty(T * B, _layout(spec).width)
        ys = [self.arrays.empty(T, B, size) for size in spec.sizes]
        self._run_group(spec, group, x, ys, [None, None], kept)
        return kept


class _Inputs(NamedTuple):
    """The inputs of a program, in its order."""

    xs: list[Any]
    fixed: list[Any]
    shared: list[Any]
    states: list[Any]  # the initial ones; None: zeros


def _sum(a: Any, b: Any) -> Any:
    """The sum of two gradients; None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


# ---- one step of a stack at a time ---------------------------------------------------------------


def step_programs(
    options: Options, weights: Sequence[Any]
) -> list[tuple[_C.Program, list[_C.Tensor]]] | None:
    """For each layer of a stream, a program and copies of the weights.

    Arguments:
        options: a stack in one direction.
        weights: the flat list of arrays of any library, all of one dtype.

    Returns:
        None if the engine's cells compute the stack.

    Raises:
        TypeError, ValueError: as `check` of arguments.py.
    """
    if not takes(options, NO_EXTRAS):
        return None
    dtype = str(weights[0].dtype).removeprefix("torch.")
    first = tuple(weights[0].shape)
    if len(first) != 2:
        raise ValueError(f"{weight_names(options)[0]} must have shape (G·H, I), got {first}")
    example = Description((1, 1, first[1]), dtype, "cpu")

    def describe(name: str, x: Any) -> Description:
        if name == "input":
            return example
        return Description(tuple(x.shape), str(x.dtype).removeprefix("torch."), "cpu")

    check(options, Arguments(None, None, tuple(weights), None, None), describe, batch_first=False)
    kinds, hidden_size = options.weight_kinds, first[0] // options.gates
    found = []
    for layer in range(options.num_layers):
        width = first[1] if layer == 0 else options.proj_size or hidden_size
        spec = _spec(options, width, hidden_size, dtype, NO_EXTRAS, False, False, cell=False)
        program = layer_program(spec._replace(transposed=True))
        plan, engine = program.prepared.forward(None)
        assert plan.sequences == [("x", 0), ("y", 0)]
        own = dict(zip(kinds, weights[layer * len(kinds) :], strict=False))
        copies = []
        for j in plan.shared:
            weight = _C.from_dlpack(own[program.shared[j]])
            if weight.ndim > 1:
                weight = weight.transpose(weight.ndim - 2, weight.ndim - 1)
            copies.append(_C.empty(weight.shape, program.prepared.dtype))
            _C.convert(weight, copies[-1])
        found.append((engine, copies))
    return found
