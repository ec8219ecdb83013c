"""One step of a recurrence as a list of operations over rows: a *program*.

A value is a vector of ``width`` elements for each row of the batch. Node ``i`` computes value ``i``
from earlier ones. An `Arg` names a part of a value: a vector of the node's width from ``offset``
on, or with ``scalar`` one element, which is broadcast.

Inputs::

    x i         sequence i at this step
    carry k     state k before the step
    fixed i     one vector per row, constant over the steps
    shared j    tensor j, shared by all rows (weights, biases); its elements in memory order
    const v     one number; width 1

Operations::

    a pointwise code of `POINTWISE`
    product     x times a part of a shared tensor: `Product`
    reduce      sum or max over segments, moments or means of a row: `Reduce`
    normalize   (x - mean)·scale; its gradient assumes that these are the moments of all of x
    collect     out[i] = sum of the elements of x that list i of a `Table` names
    cat         concatenation
    stop        a copy without a gradient
    clip        a copy of x whose gradient is clipped to ± the second operand

Comparisons give 1 or 0. bfloat16 and float16 round to that type; their gradient is the identity.
grad.py differentiates a program, plan.py lowers it for the engine.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# The number of operands of each pointwise operation of the engine (csrc/program.h).
POINTWISE = {
    **dict.fromkeys(
        "copy neg abs sign reciprocal sqrt rsqrt exp expm1 log log1p sin cos erf sigmoid tanh relu "
        "softplus1 bfloat16 float16".split(),
        1,
    ),
    **dict.fromkeys(
        "add sub mul div maximum minimum lt le gt ge eq ne tanh_grad sigmoid_grad".split(), 2
    ),
    **dict.fromkeys(["where", "fma", "normalize"], 3),
}
COPIES = frozenset(["stop", "clip"])  # forward they copy their first operand
COMPARISONS = frozenset("lt le gt ge eq ne".split())
INPUTS = frozenset("x carry fixed shared const".split())
# Operations that cost about as much as a dozen additions.
COSTLY = frozenset("exp expm1 log log1p sin cos erf sigmoid tanh softplus1".split())


class Arg(NamedTuple):
    """A part of a value from ``offset`` on, or with ``scalar`` one element of it."""

    value: int
    offset: int = 0
    scalar: bool = False


class Product(NamedTuple):
    """out[g·N + n] = Σ_k x[g·in_group + k] · w[offset + g·w_group + k·w_k + n·w_n]."""

    weight: int  # a shared value
    offset: int
    groups: int
    in_group: int
    w_group: int
    w_k: int
    w_n: int
    K: int
    N: int


class Reduce(NamedTuple):
    """out[g] = Σ_j x[g·segment + j·element], j < length, or the maximum.

    For ``length`` contiguous elements, ``"moments"`` (x,) gives the mean and
    1 / √(variance + 1e-5), without gradients, and ``"means"`` (x, y) the means of x and of x·y.
    """

    kind: str  # "sum", "max", "moments" or "means"
    groups: int
    segment: int
    length: int
    element: int


Table = tuple[tuple[int, ...], ...]  # for each output the elements to sum


class Node(NamedTuple):
    op: str
    args: tuple[Arg, ...]
    width: int
    info: object = None  # x, carry, fixed, shared: its index; const: the number; Product; …


@dataclass
class Graph:
    """A program: nodes in order, next states and outputs."""

    nodes: list[Node] = field(default_factory=list)
    nexts: dict[int, Arg] = field(default_factory=dict)  # state k after the step
    ys: dict[int, Arg] = field(default_factory=dict)  # output sequence i
    widths: dict[int, int] = field(default_factory=dict)  # of the output sequences
    _known: dict[Node, int] = field(default_factory=dict, repr=False)

    def add(self, op: str, args: tuple[Arg, ...], width: int, info: object = None) -> int:
        """The value of a node; equal nodes are added once."""
        node = Node(op, args, width, info)
        found = self._known.get(node)
        if found is None:
            found = self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return found

    def const(self, value: float) -> Arg:
        return Arg(self.add("const", (), 1, float(value)), 0, True)

    def constant(self, arg: Arg) -> float | None:
        node = self.nodes[arg.value]
        return node.info if node.op == "const" else None  # type: ignore[return-value]

    @property
    def results(self) -> list[int]:
        """The values of the next states and the outputs."""
        return [a.value for a in (*self.nexts.values(), *self.ys.values())]

    def input_width(self, op: str, index: int) -> int | None:
        """The width of an input; None if the program does not read it."""
        return next((n.width for n in self.nodes if n.op == op and n.info == index), None)

    def full(self, arg: Arg, width: int) -> bool:
        """Whether ``arg`` is the whole of its value."""
        return not arg.scalar and arg.offset == 0 and self.nodes[arg.value].width == width

    def pointwise(self, op: str, *args: Arg, width: int) -> Arg:
        """``op`` over ``width`` units; x·1, x/1 and x ± 0 add no node."""
        simple = self._simplified(op, args, width)
        if simple is not None:
            return simple
        args = tuple(a._replace(scalar=a.scalar or width == 1) for a in args)
        return Arg(self.add(op, args, width))

    def _simplified(self, op: str, args: tuple[Arg, ...], width: int) -> Arg | None:
        constants = [self.constant(a) for a in args]

        def whole(i: int) -> bool:  # not broadcast
            return not args[i].scalar or width == 1

        if op in ("mul", "div") and constants[-1] == 1 and whole(0):
            return args[0]
        if op == "mul" and constants[0] == 1 and whole(1):
            return args[1]
        if op in ("add", "sub") and constants[-1] == 0 and whole(0):
            return args[0]
        if op == "add" and constants[0] == 0 and whole(1):
            return args[1]
        return None

    def written(self, value: int) -> int:
        """A value in memory; a constant is copied there."""
        if self.nodes[value].op != "const":
            return value
        return self.add("copy", (Arg(value, 0, True),), 1)

    def product(self, x: Arg, product: Product) -> Arg:
        x = x._replace(value=self.written(x.value))
        return Arg(self.add("product", (x,), product.groups * product.N, product))

    def reduce(self, x: Arg, reduce: Reduce) -> Arg:
        if reduce.length == 1 and (reduce.segment == 1 or reduce.groups == 1):
            return x._replace(scalar=False)
        x = Arg(self.written(x.value), x.offset)
        return Arg(self.add("reduce", (x,), reduce.groups, reduce))

    def collect(self, x: int, table: Table) -> Arg:
        """Sums of elements of value ``x``; a contiguous part of it adds no node."""
        if all(len(entry) == 1 for entry in table):
            first = table[0][0] if table else 0
            if table == tuple((first + i,) for i in range(len(table))):
                return Arg(x, first)
        return Arg(self.add("collect", (Arg(self.written(x)),), len(table), table))

    def cat(self, parts: list[tuple[Arg, int]]) -> Arg:
        """The concatenation of ``parts``, given with their widths."""
        if len(parts) == 1 and not parts[0][0].scalar:
            return parts[0][0]
        merged: list[tuple[Arg, int]] = []
        for arg, width in parts:
            if merged and not arg.scalar and not merged[-1][0].scalar:
                last, before = merged[-1]
                if last.value == arg.value and last.offset + before == arg.offset:
                    merged[-1] = (last, before + width)
                    continue
            merged.append((arg, width))
        if len(merged) == 1 and not merged[0][0].scalar:
            return merged[0][0]
        widths = tuple(width for _, width in merged)
        return Arg(self.add("cat", tuple(a for a, _ in merged), sum(widths), widths))

    def used(self, roots: list[int] | None = None) -> set[int]:
        """The values on which a result (or ``roots``) depends."""
        roots = self.results if roots is None else roots
        found, open_ = set(roots), list(roots)
        while open_:
            node = self.nodes[open_.pop()]
            reached = [a.value for a in node.args]
            if isinstance(node.info, Product):
                reached.append(node.info.weight)
            for value in reached:
                if value not in found:
                    found.add(value)
                    open_.append(value)
        return found

    def mapped(self, function: Callable[[Arg], Arg]) -> Graph:
        """The program with every operand mapped by ``function``."""
        return Graph(
            [n._replace(args=tuple(map(function, n.args))) for n in self.nodes],
            {k: function(a) for k, a in self.nexts.items()},
            {i: function(a) for i, a in self.ys.items()},
            self.widths,
        )

    def text(self) -> str:
        """The text form, with one line for each node; `parse` reads it."""
        lines = []
        for i, node in enumerate(self.nodes):
            words = [node.op, *(_arg_text(a) for a in node.args), *_info_text(node)]
            lines.append(f"%{i}[{node.width}] = {' '.join(words)}")
        lines += [f"next {k} = {_arg_text(a)}" for k, a in self.nexts.items()]
        lines += [f"y {i}[{self.widths[i]}] = {_arg_text(a)}" for i, a in self.ys.items()]
        return "\n".join(lines) + "\n"


def contracted(graph: Graph) -> Graph:
    """The program with fma in place of mul and add, if nothing else reads the product.

    It is done before passes.py chooses what to save, so that recording does not change a bit.
    """
    uses: Counter[int] = Counter(a.value for node in graph.nodes for a in node.args)
    uses.update(graph.results)
    joined: dict[int, tuple[int, tuple[Arg, ...]]] = {}  # by sum: the product, fma's operands
    for i, node in enumerate(graph.nodes):
        if node.op != "add":
            continue
        for product, other in (node.args, node.args[::-1]):
            factors = graph.nodes[product.value]
            whole = graph.full(product, node.width) or node.width == 1
            if factors.op == "mul" and uses[product.value] == 1 and whole:
                joined[i] = (product.value, (*factors.args, other))
                break
    out = Graph(widths=graph.widths)
    place: dict[int, int] = {}

    def moved(a: Arg) -> Arg:
        return a._replace(value=place[a.value])

    gone = {product for product, _ in joined.values()}
    for i, node in enumerate(graph.nodes):
        if i in gone:
            continue
        op, args = ("fma", joined[i][1]) if i in joined else (node.op, node.args)
        info = node.info
        if isinstance(info, Product):
            info = info._replace(weight=place[info.weight])
        place[i] = out.add(op, tuple(map(moved, args)), node.width, info)
    out.nexts = {k: moved(a) for k, a in graph.nexts.items()}
    out.ys = {i: moved(a) for i, a in graph.ys.items()}
    return out


def _arg_text(a: Arg) -> str:
    return f"%{a.value}" + (f"+{a.offset}" if a.offset else "") + ("!" if a.scalar else "")


def _ranges(numbers: tuple[int, ...]) -> str:
    """The text ``3:6,9`` for 3, 4, 5, 9."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n:
            parts[-1][1] = n + 1
        else:
            parts.append([n, n + 1])
    return ",".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in parts)


def _info_text(node: Node) -> list[str]:
    info = node.info
    if info is None:
        return []
    if node.op == "const":
        assert isinstance(info, float)
        return [info.hex()]
    if isinstance(info, Product):
        return [
            f"by %{info.weight}",
            *(f"{n}={v}" for n, v in zip(info._fields[1:], info[1:], strict=True)),
        ]
    if isinstance(info, Reduce):
        return [info.kind, *(f"{n}={v}" for n, v in zip(info._fields[1:], info[1:], strict=True))]
    if node.op == "collect":
        assert isinstance(info, tuple)
        if all(len(entry) == 1 for entry in info):
            return ["take", _ranges(tuple(entry[0] for entry in info)) or "-"]
        return ["lists", ";".join(_ranges(entry) for entry in info)]
    if node.op == "cat":
        assert isinstance(info, tuple)
        return ["widths", ",".join(str(w) for w in info)]
    return [str(info)]


_LINE = re.compile(r"%(\d+)\[(\d+)\] = (\S+)(.*)")
_ARG = re.compile(r"%(\d+)(?:\+(\d+))?(!)?")
_OUT = re.compile(r"(next|y) (\d+)(?:\[(\d+)\])? = (\S+)")


def _parse_arg(text: str) -> Arg:
    match = _ARG.fullmatch(text)
    assert match is not None, text
    return Arg(int(match[1]), int(match[2] or 0), match[3] is not None)


def _parse_ranges(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split(",") if text not in ("", "-") else []:
        first, _, end = part.partition(":")
        numbers += range(int(first), int(end or int(first) + 1))
    return tuple(numbers)


def parse(text: str) -> Graph:
    """The program of a text that ``Graph.text`` returned."""
    graph = Graph()
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            out = _OUT.fullmatch(line)
            assert out is not None, line
            if out[1] == "next":
                graph.nexts[int(out[2])] = _parse_arg(out[4])
            else:
                graph.ys[int(out[2])] = _parse_arg(out[4])
                graph.widths[int(out[2])] = int(out[3])
            continue
        op, words = match[3], match[4].split()
        args = []
        while words and words[0].startswith("%"):
            args.append(_parse_arg(words.pop(0)))
        graph.add(op, tuple(args), int(match[2]), _parse_info(op, words))
    return graph


def _parse_info(op: str, words: list[str]) -> object:
    if op == "const":
        return float.fromhex(words[0])
    if op == "product":
        return Product(_parse_arg(words[1]).value, *(int(w.split("=")[1]) for w in words[2:]))
    if op == "reduce":
        return Reduce(words[0], *(int(w.split("=")[1]) for w in words[1:]))
    if op == "collect":
        if words[0] == "take":
            return tuple((n,) for n in _parse_ranges(words[1]))
        lists = words[1].split(";") if len(words) > 1 else [""]
        return tuple(_parse_ranges(entry) for entry in lists)
    if op == "cat":
        return tuple(int(w) for w in words[1].split(","))
    return int(words[0]) if words else None
