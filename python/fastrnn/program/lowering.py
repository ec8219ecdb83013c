"""Tensors of a traced step as values of a program (ir.py), and the basic operations on them.

A tensor of the traced step is a `View`: a value of the program, and the place of each element in
it. So views, transposes, slices, broadcasts and rows folded into other axes are plain NumPy
indexing, and add nothing to the program. The step is traced with a few rows (`Lowering.rows`). An
element's place is ``row · ROW + column``, and every operation checks that each row of its result is
computed in the same way from the same row of its operands. The engine cannot run a step that mixes
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from .ir import Arg, Graph, Product, Reduce

if TYPE_CHECKING:
    from collections.abc import Sequence

ROW = 1 << 32


class Unknown(Exception):
    """The engine cannot run an operation; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class View:
    """A tensor of the step."""

    value: int
    index: Any  # an integer array of the tensor's shape
    rows: bool  # whether places contain the row; else they are columns, the same for every row
    is_bool: bool = False

    def viewed(self, index: Any) -> View:
        return View(self.value, index, self.rows, self.is_bool)


Operand = Union[View, float, int, bool]  # noqa: UP007  (at run time, on Python 3.10)


class Lowering:
    """Builds the program of one trace."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.graph = Graph()
        self.stateful: dict[int, bool] = {}
        # Shared input -1 - j consists of these elements of a captured tensor.
        self.takes: list[tuple[int, tuple[int, ...]]] = []

    # ---- inputs ---------------------------------------------------------------------------------

    def input(self, op: str, index: int, shape: Sequence[int], rowed: bool, is_bool: bool) -> View:
        """An input; ``rowed``: its first axis is the rows."""
        width = math.prod(shape[rowed:])
        value = self.graph.add(op, (), width, index)
        places = np.arange(self.rows)[:, None] * ROW if rowed else 0
        return View(value, (places + np.arange(width)).reshape(shape), rowed, is_bool)

    def shared(
        self, index: int, shape: Sequence[int], strides: Sequence[int], is_bool: bool
    ) -> View:
        """A dense tensor that all rows share."""
        value = self.graph.add("shared", (), math.prod(shape), index)
        return View(value, addresses(shape, strides), False, is_bool)

    # ---- rows -----------------------------------------------------------------------------------

    def _by_rows(self, arrays: list[Any], views: list[View]) -> tuple[list[Any], Any, bool]:
        """The columns, (width,), of each of the arrays, which have one shape; the result's places.

        The elements of a row are in the order of the shape.
        """
        tables, places, rows = self._tables([a[..., None] for a in arrays], views)
        return [table[:, 0] for table in tables], places, rows

    def _tables(self, arrays: list[Any], views: list[View]) -> tuple[list[Any], Any, bool]:
        """Likewise, (width, K), for arrays (…, K) with K operands for each result element."""
        shape = arrays[0].shape[:-1]
        first = next((i for i, v in enumerate(views) if v.rows), None)
        if first is None:
            # Equal rows, such as zeros for each row, are computed once.
            once = [
                slice(0, 1)
                if size == self.rows > 1 and all((a == a.take([0], axis)).all() for a in arrays)
                else slice(None)
                for axis, size in enumerate(shape)
            ]
            taken = [a[tuple(once)] for a in arrays]
            lead = taken[0].shape[:-1]
            places = np.broadcast_to(np.arange(math.prod(lead)).reshape(lead), shape)
            return [a.reshape(-1, a.shape[-1]) for a in taken], places, False
        of_row = (arrays[first][..., 0] // ROW).reshape(-1)
        size, rows = of_row.size, self.rows
        if size % rows:
            raise Unknown("mixes the rows of the batch")
        width = size // rows
        rank = np.arange(rows)[:, None]
        order = None
        if not (of_row.reshape(rows, width) == rank).all():
            order = np.argsort(of_row, kind="stable")
            if not (of_row[order].reshape(rows, width) == rank).all():
                raise Unknown("mixes the rows of the batch")
        tables = []
        for array, view in zip(arrays, views, strict=True):
            flat = array.reshape(size, array.shape[-1])
            if order is not None:
                flat = flat[order]
            table = flat.reshape(rows, width, array.shape[-1])
            if view.rows:
                table = table - rank[:, :, None] * ROW
            if not (table == table[:1]).all() or (table.size and table[0].min() < 0):
                raise Unknown("mixes the rows of the batch")
            tables.append(table[0])
        places = (rank * ROW + np.arange(width)).reshape(-1)
        if order is not None:
            sorted_places = places
            places = np.empty_like(sorted_places)
            places[order] = sorted_places
        return tables, places.reshape(shape), True

    def _arg(self, view: View, columns: Any) -> Arg:
        """An operand with these columns of a value."""
        width = columns.size
        first = int(columns[0]) if width else 0
        if width and (columns == first).all():
            return Arg(view.value, first, True)
        if (columns == first + np.arange(width)).all():
            return Arg(view.value, first)
        if self.graph.nodes[view.value].op == "shared":
            return Arg(self._taken(view.value, tuple(columns.tolist())))
        return self.graph.collect(view.value, tuple((c,) for c in columns.tolist()))

    def _taken(self, value: int, elements: tuple[int, ...]) -> int:
        source = self.graph.nodes[value].info
        assert isinstance(source, int)
        for j, known in enumerate(self.takes):
            if known == (source, elements):
                return self.graph.add("shared", (), len(elements), -1 - j)
        self.takes.append((source, elements))
        return self.graph.add("shared", (), len(elements), -len(self.takes))

    def _vector(self, view: View, columns: Any) -> Arg:
        """Likewise, but never broadcast."""
        arg = self._arg(view, columns)
        if self.graph.nodes[view.value].op == "const":
            return self.graph.pointwise("copy", arg, width=columns.size)
        if columns.size == 1:
            return arg._replace(scalar=False)
        if arg.scalar:
            return self.graph.collect(view.value, ((arg.offset,),) * columns.size)
        return arg

    # ---- operations -----------------------------------------------------------------------------

    def pointwise(self, op: str, *operands: Operand, is_bool: bool = False) -> View:
        views = [o for o in operands if isinstance(o, View)]
        shape = np.broadcast_shapes(*(v.index.shape for v in views))
        arrays = [np.broadcast_to(v.index, shape) for v in views]
        columns, places, rows = self._by_rows(arrays, views)
        found = iter(zip(views, columns, strict=True))
        args = [
            self._arg(*next(found)) if isinstance(o, View) else self.graph.const(float(o))
            for o in operands
        ]
        width = columns[0].size
        if width == 0:
            raise Unknown("computes on an empty tensor")
        out = self.graph.pointwise(op, *args, width=width)
        return View(out.value, places + out.offset, rows, is_bool)

    def stop(self, view: View) -> View:
        """The same elements without a gradient."""
        node = self.graph.nodes[view.value]
        if node.op == "const":
            return view
        value = self.graph.add("stop", (Arg(view.value, 0, node.width == 1),), node.width)
        return View(value, view.index, view.rows, view.is_bool)

    def reduce(self, kind: str, view: View, axes: Sequence[int], keepdim: bool) -> View:
        axes = [a % view.index.ndim for a in axes] or list(range(view.index.ndim))
        kept = [a for a in range(view.index.ndim) if a not in axes]
        shape = tuple(view.index.shape[a] for a in kept)
        count = math.prod(view.index.shape[a] for a in axes)
        if count == 0:
            raise Unknown("reduces an axis of size 0")
        moved = view.index.transpose([*kept, *axes]).reshape(*shape, count)
        (table,), places, rows = self._tables([moved], [view])  # (groups, count)
        groups = table.shape[0]
        off = int(table[0, 0])
        segment = int(table[1, 0]) - off if groups > 1 else count
        element = int(table[0, 1]) - off if count > 1 else 1
        affine = off + np.arange(groups)[:, None] * segment + np.arange(count) * element
        if (table == affine).all() and element > 0 and segment > 0:
            out = self.graph.reduce(
                Arg(view.value, off), Reduce(kind, groups, segment, count, element)
            )
        else:
            arg = self._vector(view, table.reshape(-1))
            out = self.graph.reduce(arg, Reduce(kind, groups, count, count, 1))
        places = places + out.offset
        if keepdim:
            places = np.expand_dims(places, tuple(sorted(axes)))
        return View(out.value, places, rows)

    def cat(self, views: Sequence[View], axis: int) -> View:
        parts: list[tuple[Arg, int]] = []
        indices = []
        rowed = any(v.rows for v in views)
        offset = 0
        for v in views:
            if rowed and not v.rows:
                v = self._in_rows(v, next(o for o in views if o.rows), axis)
            columns, places, _ = self._by_rows([v.index], [v])
            if columns[0].size:
                parts.append((self._vector(v, columns[0]), columns[0].size))
            indices.append(places + offset)
            offset += columns[0].size
        if not parts:
            raise Unknown("joins empty tensors")
        out = self.graph.cat(parts)
        index = np.concatenate(indices, axis=axis)
        return View(out.value, index + out.offset, rowed, all(v.is_bool for v in views))

    def _in_rows(self, v: View, other: View, axis: int) -> View:
        """A view without rows, with the rows of another view that it is concatenated with."""
        of_row = other.index // ROW
        rows = of_row.take([0], axis)
        if not (of_row == rows).all():
            raise Unknown("mixes the rows of the batch")
        return View(v.value, v.index + rows * ROW, True, v.is_bool)

    def product(self, x: View, w: View) -> View:
        """x (…, M, K) times w (…, K, N), with equal leading axes."""
        x_shared = self.graph.nodes[x.value].op == "shared"
        if self.graph.nodes[w.value].op != "shared":
            if x_shared:  # (w^T x^T)^T
                return _transposed(self.product(_transposed(w), _transposed(x)))
            return self._product_of_rows(x, w)
        if x_shared:
            width = self.graph.nodes[x.value].width
            x = View(self.graph.add("copy", (Arg(x.value, 0, width == 1),), width), x.index, False)
        K, N = w.index.shape[-2:]
        if K == 0 or N == 0:
            raise Unknown("multiplies by a matrix of size 0")
        lead = x.index.shape[:-2]
        x_index = x.index.reshape(-1, *x.index.shape[-2:])  # (G, M, K)
        w_index = w.index.reshape(-1, K, N)
        G, M = x_index.shape[:2]
        (table,), places, rows = self._tables([x_index], [x])  # (groups of a row, K)
        members = places.reshape(-1) % ROW  # the position of (g, m) among a row's groups
        of_group = np.empty(table.shape[0], np.int64)
        of_group[members] = np.repeat(np.arange(G), M)
        out = self._grouped(x, table, w, w_index, of_group)
        index = (places[..., None] - places[..., None] % ROW) + (
            (places[..., None] % ROW) * N + np.arange(N)
        )
        return View(out.value, (index + out.offset).reshape(*lead, M, N), rows)

    def _grouped(self, x: View, table: Any, w: View, w_index: Any, of_group: Any) -> Arg:
        """Row ``i`` of ``table`` times matrix ``of_group[i]`` of ``w``."""
        K, N = w_index.shape[1:]
        w_k = int(w_index[0, 1, 0] - w_index[0, 0, 0]) if K > 1 else 1
        w_n = int(w_index[0, 0, 1] - w_index[0, 0, 0]) if N > 1 else 1
        bases = w_index[:, 0, 0]
        if w_k <= 0 or w_n <= 0 or not _regular(w_index, bases, w_k, w_n):
            return self._by_columns(x, table, w, w_index, of_group)
        starts = bases[of_group]
        if not _affine(starts):  # several rows of x for each of several matrices
            parts = []
            cuts = np.flatnonzero(np.diff(of_group)) + 1
            for run in np.split(np.arange(of_group.size), cuts):
                part = self._grouped(x, table[run], w, w_index, of_group[run])
                parts.append((part, run.size * N))
            return self.graph.cat(parts)
        unit = (table == table[:, :1] + np.arange(K)).all()
        if unit and _affine(table[:, 0]):
            arg, in_group = Arg(x.value, int(table[0, 0])), _step(table[:, 0], K)
        else:
            arg, in_group = self._vector(x, table.reshape(-1)), K
        size = Product(
            w.value, int(starts[0]), starts.size, in_group, _step(starts, 0), w_k, w_n, K, N
        )
        return self._split_product(arg, size)

    def _split_product(self, x: Arg, product: Product) -> Arg:
        """A product, split into products with the parts of x that depend on the state and the rest.

        So the engine can compute the rest for all steps at once.
        """
        graph = self.graph
        joined = graph.nodes[x.value]
        if joined.op != "cat" or product.groups > 1 or not graph.full(x, product.K):
            return graph.product(x, product)
        runs: list[tuple[bool, list[tuple[Arg, int]]]] = []
        assert isinstance(joined.info, tuple)
        for part in zip(joined.args, joined.info, strict=True):
            stateful = self._stateful(part[0].value)
            if not runs or runs[-1][0] != stateful:
                runs.append((stateful, []))
            runs[-1][1].append(part)
        total: Arg | None = None
        at = 0
        for _, parts in runs if len(runs) > 1 else []:
            width = sum(w for _, w in parts)
            one = graph.product(
                graph.cat(parts)._replace(scalar=False),
                product._replace(offset=product.offset + at * product.w_k, K=width),
            )
            total = one if total is None else graph.pointwise("add", total, one, width=product.N)
            at += width
        return graph.product(x, product) if total is None else total

    def _stateful(self, value: int) -> bool:
        """Whether a value depends on the state."""
        known = self.stateful.get(value)
        if known is None:
            node = self.graph.nodes[value]
            known = node.op == "carry" or any(self._stateful(a.value) for a in node.args)
            self.stateful[value] = known
        return known

    def _by_columns(self, x: View, table: Any, w: View, w_index: Any, of_group: Any) -> Arg:
        """Likewise for matrices whose columns have no constant stride."""
        N = w_index.shape[2]
        steps = np.diff(w_index[0, 0])
        cuts = np.flatnonzero(steps[1:] != steps[:-1]) + 1 if N > 2 else np.arange(0)
        run = int(cuts[0]) + 1 if cuts.size else 1
        if run == N or (N > 2 and run < 2 and not cuts.size) or N == 1:
            raise Unknown("multiplies by a matrix that is expanded or flipped")
        parts = []
        for i in range(of_group.size):
            for n in range(0, N, run):
                matrix = w_index[of_group[i]][None, :, n : n + run]
                part = self._grouped(x, table[i : i + 1], w, matrix, np.zeros(1, np.int64))
                parts.append((part, matrix.shape[2]))
        return self.graph.cat(parts)

    def _product_of_rows(self, x: View, w: View) -> View:
        """A product of two matrices of each row, as products of elements and their sums."""
        left = x.viewed(x.index[..., :, None, :])
        right = w.viewed(np.swapaxes(w.index, -1, -2)[..., None, :, :])
        return self.reduce("sum", self.pointwise("mul", left, right), [-1], False)


def addresses(shape: Sequence[int], strides: Sequence[int], start: int = 0) -> Any:
    """The position in memory of each element of a tensor."""
    places = np.full((), start, np.int64)
    for size, stride in zip(shape, strides, strict=True):
        places = places[..., None] + np.arange(size) * stride
    return places


def _transposed(v: View) -> View:
    return v.viewed(np.swapaxes(v.index, -1, -2))


def _regular(places: Any, bases: Any, w_k: int, w_n: int) -> bool:
    """Whether matrix g has element (k, n) at bases[g] + k·w_k + n·w_n."""
    if w_n > w_k:  # compare in memory order, line by line: faster than a copy of the whole
        places, w_k, w_n = places.swapaxes(1, 2), w_n, w_k
    line = bases[:, None] + np.arange(places.shape[2]) * w_n
    return all((places[:, k] == line + k * w_k).all() for k in range(places.shape[1]))


def _affine(starts: Any) -> bool:
    if starts.size < 3:
        return starts.size < 2 or int(starts[1]) >= int(starts[0])
    step = starts[1] - starts[0]
    return bool(step >= 0 and (np.diff(starts) == step).all())


def _step(starts: Any, alone: int) -> int:
    return int(starts[1] - starts[0]) if starts.size > 1 else alone
