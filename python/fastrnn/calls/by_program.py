"""A stack with options on the CPU: layer after layer, direction after direction, each a program.

The engine's fused cells compute what torch.nn has, with any activation. Whatever else options ask
for is a program (program/build.py): `takes` and `takes_backward` say which calls. Both passes read
and write arrays of torch or of NumPy alike, through `Arrays`. Outputs, and what backward reads of
them, are those of ``fastrnn::forward`` (operators.py); there ``saved`` holds, for each layer and
direction and each pair of step and row, what the program's forward pass keeps.

Programs compute float32 and float64. Half types are widened on the way in, and h is rounded to them
at every step. Packed rows run as padded ones whose lengths are known.
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

_ALIGNED = 16  # elements: where each kept value begins


def takes(options: Options, extras: Extras) -> bool:
    """Whether the forward pass of a call on the CPU is one of programs."""
    return options.beyond_the_cells or any(x is not None for x in extras[2:])


def takes_backward(options: Options, extras: Extras) -> bool:
    """Whether the backward pass of a call on the CPU is one of programs.

    A limit of gradients, or a learned state after resets, changes no bit of what the fused cells
    put out. They keep nothing for such a backward pass, which makes it again.
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
    """What forward writes, contiguous; None: not wanted."""

    output: Any
    h_n: Any
    c_n: Any = None
    hidden: Any = None
    cell: Any = None
    saved: Any = None


class Cotangents(NamedTuple):
    """Gradients of what forward gave; None: zero."""

    output: Any = None
    hidden: Any = None
    cell: Any = None
    h_n: Any = None
    c_n: Any = None


class Gradients(NamedTuple):
    """What backward writes, contiguous, shaped as the arguments; None: not wanted."""

    input: Any
    h0: Any
    c0: Any
    reset_h: Any
    reset_c: Any
    weights: Sequence[Any]


class Arrays(Protocol):
    """What a pass asks of a library of arrays; slices, shapes and ``+=`` are alike in all."""

    threads: int  # of the engine; 0: its own number

    def empty(self, *shape: int) -> Any:
        """An array of the compute dtype."""

    def wide(self, x: Any) -> Any:
        """``x`` in the compute dtype, its last axis contiguous; itself where it is so."""

    def dense(self, x: Any) -> Any:
        """``x`` in the compute dtype, contiguous."""

    def columns(self, x: Any, columns: slice) -> Any:
        """The view of some elements of the last axis."""

    def numbers(self, mask: Any) -> Any:
        """1 for true and 0 for false, in the compute dtype."""

    def store(self, values: Any, target: Any) -> None:
        """Write values to an array of any floating dtype."""

    def is_wide(self, target: Any) -> bool:
        """Whether the engine can write a contiguous target as it is."""

    def valid(self, counts: Any, steps: int, rows: int, packed: bool) -> Any:
        """Bool (T, B): by batch_sizes, or by lengths."""

    def positions(self, valid: Any) -> Any:
        """Of packed rows, in their order, the places in (T·B)."""

    def fresh(self, reset: Any, valid: Any, reverse: bool) -> Any:
        """Bool (T, B): a step is the first that is made of an episode after a reset.

        In reverse an episode starts at its end, the step before the next reset.
        """


def kept_width(
    options: Options, input_size: int, hidden_size: int, dtype: str, extras: Extras,
    lengths: bool, reset: bool,
) -> int:  # fmt: skip
    """How many values ``saved`` holds for each layer, direction, step and row."""
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


class _Layout(NamedTuple):
    """Where each value that forward keeps stands in a row of ``saved``."""

    places: dict[tuple[str, int], slice]
    gaps: list[slice]  # what no value takes
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
    """One call of a stack: its arguments as programs take them."""

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
        kinds = options.weight_kinds
        self.kinds = kinds
        self.hidden_size = given.weights[0].shape[0] // options.gates
        self.output_size = options.proj_size or self.hidden_size
        anew, (dropout, *keep) = given.extras[:2], given.extras[2:]
        self.learned = [None if x is None else arrays.dense(x) for x in anew]
        self.dropout: Any = None if dropout is None else wide(dropout)
        self.keep = [None if k is None else self._padded(arrays.numbers(k)) for k in keep]

    @property
    def kept_width(self) -> int:
        """How many values ``saved`` holds for each layer, direction, step and row."""
        given = self.given
        return kept_width(
            self.options, self.input.shape[-1], self.hidden_size, self.dtype, given.extras,
            self.valid is not None, given.reset is not None,
        )  # fmt: skip

    # ---- packed rows -----------------------------------------------------------------------------

    def _padded(self, x: Any) -> Any:
        """(…, T, B, units) of packed (…, N, units); zero where no row runs."""
        if not self.packed:
            return x
        *before, _, units = x.shape
        padded = self.arrays.empty(*before, self.steps * self.rows, units)
        padded[...] = 0
        padded[..., self.at, :] = x
        return padded.reshape(*before, self.steps, self.rows, units)

    def _room(self, target: Any, *shape: int) -> Any:
        """What the engine writes in the place of a target: that itself where it can be."""
        rows = len(shape) > 2 and self.packed
        if target is not None and not rows and self.arrays.is_wide(target):
            return target
        return self.arrays.empty(*shape)

    def _store(self, values: Any, target: Any, *, rows: bool = True) -> None:
        """Bring what was written in a target's place there; rows: (…, T, B, units)."""
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
        """The arrays that a program reads, by its own names."""
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
        """One direction of a layer forward.

        Arguments:
            ys: where h and c of every step go.
            finals: where the last ones go; None: not wanted.
            kept: a row of ``saved``, (T·B, width), or None.
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
        """The arrays of a pass in its order."""
        rows: Any = None if kept is None else kept.reshape(self.steps, self.rows, kept.shape[-1])
        places, columns = _layout(spec).places, self.arrays.columns

        def of(what: tuple[str, int]) -> Any:
            kind, i = what
            if kind == "x":
                return xs[i]
            if kind == "y":
                return ys[i]
            return others[what] if what in others else columns(rows, places[what])

        return [of(what) for what in wanted]

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
        every = None if out.hidden is None else self._room(out.hidden, L, T, B, width)
        last = self._room(out.output, T, B, width) if every is None else every[-1]
        cell = None if out.cell is None else self._room(out.cell, L, T, B, D * self.hidden_size)
        finals = [
            self._room(target, L * D, B, size)
            for target, size in zip(
                (out.h_n, out.c_n), (self.output_size, self.hidden_size), strict=True
            )
            if target is not None
        ]
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
        """``saved``: hidden, cell and saved of forward; saved may be None: it is computed again."""
        L, D = self.options.num_layers, self.options.directions
        every = (saved.hidden, saved.cell, d.hidden, d.cell, d.output)
        hidden: Any
        d_above: Any
        hidden, cell, d_hidden, d_cell, d_above = (
            None if x is None else self._padded(self.arrays.wide(x)) for x in every
        )
        d_finals = [None if g is None else self.arrays.wide(g) for g in (d.h_n, d.c_n)]
        rooms = self._rooms(out)
        for layer in range(L - 1, -1, -1):
            d_y = _sum(d_above, None if d_hidden is None else d_hidden[layer])
            x = hidden[layer - 1] if layer else self.input
            wants_x = layer > 0 or out.input is not None
            d_x: Any = (
                rooms.input if layer == 0 else self.arrays.empty(*x.shape) if wants_x else None
            )
            for group in range(layer * D, (layer + 1) * D):
                second = d_x if group % D == 0 or d_x is None else self.arrays.empty(*x.shape)
                self._backward_group(
                    _Step(
                        self._spec(layer, cell is not None),
                        group,
                        x,
                        self._parts(group, hidden[layer], None if cell is None else cell[layer]),
                        self._parts(group, d_y, None if d_cell is None else d_cell[layer]),
                        None if saved.saved is None else saved.saved[group],
                    ),
                    [None if g is None else g[group] for g in d_finals],
                    second,
                    rooms,
                )
                if second is not d_x:
                    d_x += second
            d_above = d_x
        self._store(rooms.input, out.input)
        for room, target in (*zip(rooms[1:5], out[1:5], strict=True),
                             *zip(rooms.weights, out.weights, strict=True)):  # fmt: skip
            self._store(room, target, rows=False)

    def _rooms(self, out: Gradients) -> Gradients:
        """What the engine writes in their places."""

        def room(target: Any) -> Any:
            if target is None or self.arrays.is_wide(target):
                return target
            return self.arrays.empty(*target.shape)

        input = None if out.input is None else self._room(out.input, *self.input.shape)
        return out._replace(
            input=input,
            h0=room(out.h0),
            c0=room(out.c0),
            reset_h=room(out.reset_h),
            reset_c=room(out.reset_c),
            weights=[room(w) for w in out.weights],
        )

    def _parts(self, group: int, h: Any, c: Any) -> tuple[Any, Any]:
        """A direction's parts of h and c of a layer, (T, B, D·units)."""
        return self._part(h, group, self.output_size), self._part(c, group, self.hidden_size)

    def _backward_group(
        self, step: _Step, d_finals: Sequence[Any], d_x: Any, out: Gradients
    ) -> None:
        spec, group, kept = step.spec, step.group, step.kept
        if kept is None:
            kept = self._kept_again(spec, group, step.x)
        program, reverse = layer_program(spec), self._reverse(group)
        n = len(self.kinds)
        targets = dict(zip(self.kinds, out.weights[group * n : (group + 1) * n], strict=True))
        others = {"h0": out.h0, "c0": out.c0, "reset_h": out.reset_h, "reset_c": out.reset_c}
        targets |= {name: None if d is None else d[group] for name, d in others.items()}
        targets["x"] = d_x
        wanted = frozenset(name for name, d in targets.items() if d is not None)
        if not wanted:
            return
        ys = frozenset(i for i in program.graph.ys if step.d_ys[i] is not None)
        everything = program.everything
        plan, engine = program.prepared.backward(everything, reverse, program.needs(wanted), ys)
        given = self._arrays_of(program, group, step.x)
        own = {("dx", 0): d_x, **{("dy", i): step.d_ys[i] for i in ys}}
        firsts = [None if k is None else given.states[k] for k in plan.firsts]
        names = ("h0", "c0")
        finals = [targets[names[k]] for k in plan.carries]
        sums = [targets[program.shared[j]] for j in plan.targets]
        engine.run(
            self.steps, self.rows, not reverse, self.arrays.threads,
            [given.shared[j] for j in plan.shared],
            self._sequences(spec, plan.sequences, given.xs, step.ys, kept, own), firsts,
            [given.fixed[j] for j in plan.fixed],
            [d_finals[k] for k in plan.carries], finals, sums,
        )  # fmt: skip
        made = {"x"} if ("dx", 0) in plan.sequences else set()
        made |= {names[k] for k in plan.carries} | {program.shared[j] for j in plan.targets}
        for name in wanted - made:  # what nothing depends on
            targets[name][...] = 0

    def _kept_again(self, spec: Spec, group: int, x: Any) -> Any:
        """What forward keeps, by running it once more."""
        T, B = self.steps, self.rows
        kept = self.arrays.empty(T * B, _layout(spec).width)
        ys = [self.arrays.empty(T, B, size) for size in spec.sizes]
        self._run_group(spec, group, x, ys, [None, None], kept)
        return kept


class _Inputs(NamedTuple):
    """The arrays that a program reads, in the program's order."""

    xs: list[Any]
    fixed: list[Any]
    shared: list[Any]
    states: list[Any]  # the initial ones; None: zeros


class _Step(NamedTuple):
    """One direction of a layer backward."""

    spec: Spec
    group: int
    x: Any
    ys: tuple[Any, Any]  # h and c of every step
    d_ys: tuple[Any, Any]  # their gradients; None: zero
    kept: Any  # a row of ``saved``; None: to be made again


def _sum(a: Any, b: Any) -> Any:
    """Of gradients, either of which may be absent."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


# ---- one step of a stack at a time ---------------------------------------------------------------


def step_programs(
    options: Options, weights: Sequence[Any]
) -> list[tuple[_C.Program, list[_C.Tensor]]] | None:
    """What a stream runs in the place of the cells: of each layer a program, and copies of weights.

    Arguments:
        options: a stack in one direction.
        weights: the flat list, of any kind of arrays, all of one dtype.

    Returns:
        None where the engine's cells take the stack.

    Raises:
        TypeError, ValueError: the weights do not fit, as `check` of arguments.py says.
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
        program = layer_program(
            _spec(
                options, width, hidden_size, dtype, NO_EXTRAS, False, False, cell=False
            )._replace(transposed=True)
        )  # fmt: skip
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
