"""The program of one direction of a layer with options, built from the step of _step.py.

The step runs once on symbols, which add an operation to the program for each use. Lengths and
resets are operations around the step. A program depends on `Spec` alone, and is cached.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from .._step import Masks, Parameters, project, step
from .grad import Needs
from .ir import Arg, Graph, Product, Reduce, contracted
from .prepared import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .._options import Options


class Spec(NamedTuple):
    """All that a program depends on."""

    options: Options  # of one layer in one direction
    input_size: int
    hidden_size: int
    dtype: str  # of the input; half types are computed in float32
    lengths: bool  # whether rows have lengths
    reset: bool  # whether episodes start within the sequence
    learned: tuple[bool, bool]  # whether h, c after a reset are inputs; else zeros
    dropout: bool  # whether there is a mask on h
    keep: tuple[bool, bool]  # whether there is a zoneout mask of h, of c
    cell: bool  # whether c of every step is an output
    transposed: bool = False  # whether matrices are column-major, which is fastest for few rows

    @property
    def output_size(self) -> int:
        return self.options.proj_size or self.hidden_size

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of h, O, and for an LSTM of c, H."""
        two = self.options.cell == "LSTM"
        return (self.output_size, self.hidden_size) if two else (self.output_size,)


class LayerProgram(NamedTuple):
    """A program and the names of its inputs, in their order.

    The carries are h and, for an LSTM, c; the outputs are h and, if wanted, c, which are 0 past a
    row's length.
    """

    prepared: Prepared
    xs: tuple[str, ...]  # "x"; "valid", "fresh" (T, B, 1), "keep_h", "keep_c": 1 for true
    fixed: tuple[str, ...]  # "dropout"
    shared: tuple[str, ...]  # the weights' names, "reset_h", "reset_c"
    everything: Needs  # all gradients that a call may want; forward saves values for all of them

    @property
    def graph(self) -> Graph:
        return self.prepared.graph

    def needs(self, wanted: frozenset[str]) -> Needs:
        """The needs by name: names of `shared`, "x", "h0" and "c0"."""
        names = (("h0", "c0")[: len(self.graph.nexts)], self.xs, self.fixed, self.shared)
        return _needs(names, wanted)


@lru_cache(maxsize=256)
def layer_program(spec: Spec) -> LayerProgram:
    builder = _Builder(spec)
    builder.build()
    graph = contracted(builder.graph)
    compute = "float64" if spec.dtype == "float64" else "float32"
    prepared = Prepared(graph, dict(enumerate(spec.sizes)), compute)
    xs, fixed, shared = (tuple(builder.names[kind]) for kind in ("x", "fixed", "shared"))
    carries = ("h0", "c0")[: len(spec.sizes)]
    everything = _needs((carries, xs, fixed, shared), frozenset(("x", "h0", "c0", *shared)))
    return LayerProgram(prepared, xs, fixed, shared, everything)


def _needs(names: Iterable[tuple[str, ...]], wanted: frozenset[str]) -> Needs:
    """Needs for the wanted names; ``names``: of carries, xs, fixed and shared inputs."""
    return Needs(*(tuple(name in wanted for name in group) for group in names))


# ---- symbols -------------------------------------------------------------------------------------


class Symbol:
    """A value of the program: parts, concatenated only if an operation needs it."""

    def __init__(self, graph: Graph, parts: Sequence[tuple[Arg, int]]) -> None:
        self.graph, self.parts = graph, tuple(parts)

    @property
    def width(self) -> int:
        return sum(width for _, width in self.parts)

    @property
    def arg(self) -> Arg:
        """The value as one operand."""
        return self.graph.cat(list(self.parts))

    def cut(self, begin: int, end: int) -> Symbol:
        """Elements ``begin`` … ``end`` - 1."""
        parts, at = [], 0
        for arg, width in self.parts:
            low, high = max(begin, at), min(end, at + width)
            if low < high:
                parts.append((arg._replace(offset=arg.offset + low - at), high - low))
            at += width
        return Symbol(self.graph, parts)

    def __add__(self, other: Symbol) -> Symbol:
        return pointwise(self.graph, "add", self, other)

    def __sub__(self, other: Symbol) -> Symbol:
        return pointwise(self.graph, "sub", self, other)

    def __rsub__(self, other: float) -> Symbol:
        return pointwise(self.graph, "sub", other, self)

    def __mul__(self, other: Symbol) -> Symbol:
        return pointwise(self.graph, "mul", self, other)

    def __rmul__(self, other: float) -> Symbol:
        return pointwise(self.graph, "mul", other, self)


class Matrix(NamedTuple):
    """A weight, (rows, columns) or (heads, rows, columns), and its strides."""

    value: int
    offset: int
    shape: tuple[int, ...]
    row: int
    column: int
    head: int = 0


def pointwise(graph: Graph, op: str, *operands: Symbol | float) -> Symbol:
    """``op`` element by element; operands of one element and numbers are broadcast."""
    width = max(o.width for o in operands if isinstance(o, Symbol))
    edges = {0, width}
    for o in operands:
        if isinstance(o, Symbol) and o.width == width:
            at = 0
            for _, part in o.parts:
                at += part
                edges.add(at)

    def piece(o: Symbol | float, begin: int, end: int) -> Arg:
        if not isinstance(o, Symbol):
            return graph.const(o)
        if o.width < width:
            return o.arg._replace(scalar=True)
        return o.cut(begin, end).parts[0][0]

    return Symbol(
        graph,
        [
            (graph.pointwise(op, *(piece(o, b, e) for o in operands), width=e - b), e - b)
            for b, e in pairwise(sorted(edges))
        ],
    )


class _SymbolOperations:
    """`Operations` on symbols; h is rounded to ``dtype``."""

    def __init__(self, graph: Graph, dtype: str) -> None:
        self.graph, self.dtype = graph, dtype

    def _points(self, op: str, *operands: Symbol | float) -> Symbol:
        return pointwise(self.graph, op, *operands)

    def _product(self, x: Symbol, product: Product) -> Symbol:
        width = product.groups * product.N
        return Symbol(self.graph, [(self.graph.product(x.arg, product), width)])

    def linear(self, x: Symbol, weight: Matrix) -> Symbol:
        rows, columns = weight.shape
        return self._product(
            x,
            Product(
                weight.value, weight.offset, 1, columns, 0, weight.column, weight.row, columns, rows
            ),
        )

    def by_head(self, x: Symbol, weight: Matrix, gates: int) -> Symbol:
        heads, rows, columns = weight.shape
        units = rows // gates
        by_gate = [
            self._product(
                x,
                Product(
                    weight.value, weight.offset + gate * units * weight.row, heads, columns,
                    weight.head, weight.column, weight.row, columns, units,
                ),
            )
            for gate in range(gates)
        ]  # fmt: skip
        return Symbol(self.graph, [part for y in by_gate for part in y.parts])

    def activation(self, name: str, a: Symbol) -> Symbol:
        if name == "identity":
            return a
        if name == "hardsigmoid":
            outside = self._points("ge", self._points("abs", a), 3.0)
            limit = self._points("gt", a, 0.0)
            inside = self._points("add", self._points("div", a, 6.0), 0.5)
            return self._points("where", outside, limit, inside)
        return self._points(name, a)

    def normalized(self, a: Symbol) -> Symbol:
        whole, width = a.arg, a.width
        moments = self.graph.add("reduce", (whole,), 2, Reduce("moments", 1, width, width, 1))
        mean, scale = (Symbol(self.graph, [(Arg(moments, k), 1)]) for k in (0, 1))
        return self._points("normalize", Symbol(self.graph, [(whole, width)]), mean, scale)

    def split(self, a: Symbol, parts: int) -> list[Symbol]:
        size = a.width // parts
        return [a.cut(k * size, (k + 1) * size) for k in range(parts)]

    def rows(self, weight: Symbol | Matrix, first: int, last: int, of: int) -> Symbol | Matrix:
        if isinstance(weight, Symbol):
            size = weight.width // of
            return weight.cut(first * size, last * size)
        *heads, rows, columns = weight.shape
        size = rows // of
        return weight._replace(
            offset=weight.offset + first * size * weight.row,
            shape=(*heads, (last - first) * size, columns),
        )

    def where(self, condition: Symbol, yes: Symbol | float, no: Symbol | float) -> Symbol:
        return self._points("where", condition, yes, no)

    def clipped(self, x: Symbol, limit: float) -> Symbol:
        return self._points("clip", x, limit)

    def wide(self, h: Symbol) -> Symbol:
        return h

    def stored(self, h: Symbol) -> Symbol:
        return self._points(self.dtype, h) if self.dtype in ("bfloat16", "float16") else h


# ---- the program ---------------------------------------------------------------------------------


class _Builder:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.graph = Graph()
        self.names: dict[str, list[str]] = {"x": [], "fixed": [], "shared": []}
        self.ops = _SymbolOperations(self.graph, spec.dtype)

    def build(self) -> None:
        spec, ops = self.spec, self.ops
        x = self._input("x", "x", spec.input_size)
        valid = self._input("x", "valid", 1) if spec.lengths else None
        fresh = self._input("x", "fresh", 1) if spec.reset else None
        if valid is not None:  # padding may hold NaN, which must not reach a gradient
            x = ops.where(valid, x, 0.0)
        parameters = self._parameters()
        state = [self._value("carry", k, size) for k, size in enumerate(spec.sizes)]
        entering = state if fresh is None else self._started(fresh, state)
        masks = Masks(
            self._input("fixed", "dropout", spec.output_size) if spec.dropout else None,
            *(
                self._input("x", name, size) if given else None
                for name, given, size in zip(
                    ("keep_h", "keep_c"), spec.keep, (spec.output_size, spec.hidden_size),
                    strict=True,
                )
            ),
        )  # fmt: skip
        a = project(ops, spec.options, x, parameters)
        after = step(ops, spec.options, a, tuple(entering), parameters, masks)
        for k, (new, old) in enumerate(zip(after, state, strict=True)):
            self.graph.nexts[k] = (new if valid is None else ops.where(valid, new, old)).arg
            if k == 0 or spec.cell:
                self.graph.ys[k] = (new if valid is None else ops.where(valid, new, 0.0)).arg
                self.graph.widths[k] = new.width

    def _value(self, kind: str, index: int, width: int) -> Symbol:
        return Symbol(self.graph, [(Arg(self.graph.add(kind, (), width, index)), width)])

    def _input(self, kind: str, name: str, width: int) -> Symbol:
        self.names[kind].append(name)
        return self._value(kind, len(self.names[kind]) - 1, width)

    def _parameters(self) -> Parameters:
        spec = self.spec
        found: dict[str, Symbol | Matrix] = {}
        for name, shape in spec.options.weight_shapes(spec.input_size, spec.hidden_size).items():
            symbol = self._input("shared", name, math.prod(shape))
            if len(shape) == 1:
                found[name] = symbol
            else:
                rows, columns = shape[-2:]
                row, column = (1, rows) if spec.transposed else (columns, 1)
                value = symbol.parts[0][0].value
                found[name] = Matrix(value, 0, shape, row, column, rows * columns)
        return Parameters(**found)

    def _started(self, fresh: Symbol, state: list[Symbol]) -> list[Symbol]:
        """The states before a step; the states after a reset where an episode starts."""
        found = []
        for name, given, old in zip(("reset_h", "reset_c"), self.spec.learned, state, strict=False):
            start = self._input("shared", name, old.width) if given else 0.0
            found.append(self.ops.where(fresh, start, old))
        return found
