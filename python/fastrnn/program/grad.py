"""The backward step of a program, itself a program.

It runs over the steps in reverse. Its inputs::

    carry k      the gradient of state k after the step, from the later steps
    x i          the gradient of output i at this step
    saved v      value v of the forward step, at this step

Its results are ``next k``, the gradient of state k before the step; ``y i``, the gradient of x i;
and the gradients of shared inputs, sums over all rows and steps (`Outer`, `Columns`). The gradient
of a fixed input is summed over the steps by an additional carry, after those of the states.

The method is reverse accumulation over the nodes. At kinks the gradients are those of torch:
maximum and minimum halve the gradient between equal operands, and pass all of it to both operands
where one is NaN; relu and abs have the gradient 0 at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from .ir import COMPARISONS, Arg, Graph, Node, Product, Reduce

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence


_WITHOUT_GRADIENT = COMPARISONS | {"stop", "sign"}


class Outer(NamedTuple):
    """grad[offset + g·w_group + k·w_k + n·w_n] += Σ d[g·d_group + n] · x[g·x_group + k]."""

    target: int  # shared input
    offset: int
    d: Arg
    x: Arg
    groups: int
    d_group: int
    x_group: int
    w_group: int
    w_k: int
    w_n: int
    K: int
    N: int

    @property
    def args(self) -> tuple[Arg, ...]:
        return self.d, self.x


class Columns(NamedTuple):
    """grad[offset + j] += Σ d[j], j < width."""

    target: int
    offset: int
    d: Arg
    width: int

    @property
    def args(self) -> tuple[Arg, ...]:
        return (self.d,)


def mapped(r: Outer | Columns, function: Callable[[Arg], Arg]) -> Outer | Columns:
    """A sum with its operands mapped by ``function``."""
    if isinstance(r, Outer):
        return r._replace(d=function(r.d), x=function(r.x))
    return r._replace(d=function(r.d))


class Needs(NamedTuple):
    """Which inputs need a gradient."""

    carry: tuple[bool, ...]  # by the number of the state
    xs: tuple[bool, ...]
    fixed: tuple[bool, ...]
    shared: tuple[bool, ...]


@dataclass
class Backward:
    graph: Graph
    reductions: list[Outer | Columns] = field(default_factory=list)
    carries: list[int] = field(default_factory=list)  # the state of each carry
    fixed: list[int] = field(default_factory=list)  # the fixed inputs of the additional carries
    widths: list[int] = field(default_factory=list)  # of the carries
    # The states and outputs whose gradients contribute to a wanted one.
    active_nexts: set[int] = field(default_factory=set)
    active_ys: set[int] = field(default_factory=set)


def backward(forward: Graph, needs: Needs, ys: Container[int] | None = None) -> Backward:
    """The backward step; ``ys``: the outputs that have a gradient; None: all."""
    return _Gradients(forward, needs, forward.ys if ys is None else ys).run()


class _Gradients:
    def __init__(self, forward: Graph, needs: Needs, ys: Container[int]) -> None:
        self.forward, self.needs, self.ys = forward, needs, ys
        self.graph = Graph()
        self.result = Backward(self.graph)
        # For each value the gradients of its parts: offset, width, gradient.
        self.parts: dict[int, list[tuple[int, int, Arg]]] = {}
        self.active = self._active()

    def _active(self) -> set[int]:
        """The values that depend on an input with a wanted gradient, also through the states."""
        forward, needs = self.forward, self.needs
        wanted = {"x": needs.xs, "fixed": needs.fixed, "shared": needs.shared, "carry": needs.carry}
        states = {k for k, w in enumerate(needs.carry) if w}
        while True:
            active: set[int] = set()
            for i, node in enumerate(forward.nodes):
                if node.op in wanted:
                    index = node.info
                    assert isinstance(index, int)
                    if wanted[node.op][index] or (node.op == "carry" and index in states):
                        active.add(i)
                elif node.op in _WITHOUT_GRADIENT or getattr(node.info, "kind", "") == "moments":
                    continue
                elif any(a.value in active for a in node.args) or (
                    isinstance(node.info, Product) and node.info.weight in active
                ):
                    active.add(i)
            grown = states | {k for k, a in forward.nexts.items() if a.value in active}
            if grown == states:
                self.states = states
                return active
            states = grown

    def saved(self, arg: Arg) -> Arg:
        """A forward operand, in the backward step."""
        node = self.forward.nodes[arg.value]
        if node.op == "const":
            assert isinstance(node.info, float)
            return self.graph.const(node.info)
        return arg._replace(value=self.graph.add("saved", (), node.width, arg.value))

    # ---- gradients of values ---------------------------------------------------------------------

    def give(self, arg: Arg, width: int, gradient: Arg) -> None:
        """Adds to the gradient of an operand of ``width``."""
        if arg.value not in self.active:
            return
        if arg.scalar and width > 1:
            if gradient.scalar:
                gradient = self.op("mul", gradient, self.graph.const(width), width=1)
            else:
                gradient = self.graph.reduce(gradient, Reduce("sum", 1, width, width, 1))
            width = 1
        node = self.forward.nodes[arg.value]
        if node.op == "shared":
            assert isinstance(node.info, int)
            self.result.reductions.append(
                Columns(node.info, arg.offset, self.vector(gradient, width), width)
            )
            return
        self.parts.setdefault(arg.value, []).append((arg.offset, width, gradient))

    def vector(self, arg: Arg, width: int) -> Arg:
        """An operand that is neither broadcast nor a constant."""
        if (arg.scalar and width > 1) or self.graph.constant(arg) is not None:
            return self.filled(arg, width)
        return arg._replace(scalar=False)

    def filled(self, arg: Arg, width: int) -> Arg:
        return Arg(self.graph.add("copy", (arg._replace(scalar=True),), width))

    def taken(self, value: int) -> Arg | None:
        """The sum of the gradients that were given to a value; None if there were none."""
        parts = self.parts.pop(value, None)
        if parts is None:
            return None
        width = self.forward.nodes[value].width
        edges = sorted({0, width, *(p[0] for p in parts), *(p[0] + p[1] for p in parts)})
        pieces: list[tuple[Arg, int]] = []
        for begin, end in pairwise(edges):
            total: Arg | None = None
            for offset, size, gradient in parts:
                if not (offset <= begin and end <= offset + size):
                    continue
                part = gradient
                if not part.scalar:
                    part = part._replace(offset=part.offset + begin - offset)
                total = part if total is None else self.op("add", total, part, width=end - begin)
            if total is None:
                total = self.graph.const(0)
            if len(edges) == 2:
                return total
            pieces.append((total, end - begin))
        return self.graph.cat(pieces)

    def op(self, code: str, *args: Arg, width: int) -> Arg:
        return self.graph.pointwise(code, *args, width=width)

    # ---- the pass --------------------------------------------------------------------------------

    def run(self) -> Backward:
        forward, graph, result = self.forward, self.graph, self.result
        for k in sorted(self.states):
            if k in forward.nexts:
                arg = forward.nexts[k]
                width = forward.input_width("carry", k) or forward.nodes[arg.value].width
                carry = Arg(graph.add("carry", (), width, len(result.carries)))
                result.carries.append(k)
                result.widths.append(width)
                self.give(arg, width, carry)
        for i, arg in forward.ys.items():
            if i not in self.ys:
                continue
            width = forward.widths[i]
            self.give(arg, width, Arg(graph.add("x", (), width, i)))
        result.active_nexts = {k for k, a in forward.nexts.items() if a.value in self.active}
        result.active_ys = {i for i, a in forward.ys.items() if a.value in self.active}
        fixed: dict[int, tuple[Arg, int]] = {}
        states: dict[int, Arg] = {}
        for i in range(len(forward.nodes) - 1, -1, -1):
            node = forward.nodes[i]
            gradient = self.taken(i)
            if gradient is None:
                continue
            if node.op == "x":
                assert isinstance(node.info, int)
                if self.needs.xs[node.info]:
                    graph.ys[node.info] = self.vector(gradient, node.width)
                    graph.widths[node.info] = node.width
            elif node.op == "carry":
                assert isinstance(node.info, int)
                states[node.info] = self.vector(gradient, node.width)
            elif node.op == "fixed":
                assert isinstance(node.info, int)
                fixed[node.info] = gradient, node.width
            elif node.op != "const":
                self._through(i, node, gradient)
        for index, k in enumerate(result.carries):
            if k not in states:
                states[k] = self.filled(graph.const(0), result.widths[index])
            graph.nexts[index] = states[k]
        for f, (gradient, width) in sorted(fixed.items()):
            index = len(result.carries) + len(result.fixed)
            before = Arg(graph.add("carry", (), width, index))
            graph.nexts[index] = self.op("add", before, gradient, width=width)
            result.fixed.append(f)
            result.widths.append(width)
        return result

    def _through(self, i: int, node: Node, g: Arg) -> None:
        info, width = node.info, node.width
        if isinstance(info, Product):
            self._product(node, info, self.vector(g, width))
        elif isinstance(info, Reduce):
            self._reduce(i, node, info, g)
        elif node.op == "collect":
            self._collect(node, g)
        elif node.op == "cat":
            offset = 0
            assert isinstance(info, tuple)
            for arg, size in zip(node.args, info, strict=True):
                part = g if g.scalar else g._replace(offset=g.offset + offset)
                self.give(arg, size, part)
                offset += size
        else:
            self._pointwise(i, node, g)

    def _pointwise(self, i: int, node: Node, g: Arg) -> None:
        width = node.width
        args = [self.saved(a) for a in node.args]
        out = self.saved(Arg(i, 0, width == 1))

        def op(code: str, *operands: Arg | float) -> Arg:
            made = [o if isinstance(o, Arg) else self.graph.const(o) for o in operands]
            return self.op(code, *made, width=width)

        def give(which: int, gradient: Arg) -> None:
            self.give(node.args[which], width, gradient)

        wants = [a.value in self.active for a in node.args]
        a = args[0]
        b = args[1] if len(args) > 1 else a
        match node.op:
            case "copy" | "bfloat16" | "float16":
                give(0, g)
            case "clip":
                give(0, op("minimum", op("maximum", g, op("neg", b)), b))
            case "neg":
                give(0, op("neg", g))
            case "abs":
                give(0, op("mul", g, op("sign", a)))
            case "reciprocal":
                give(0, op("neg", op("mul", g, op("mul", out, out))))
            case "sqrt":
                give(0, op("div", op("mul", g, 0.5), out))
            case "rsqrt":
                cube = op("mul", op("mul", out, out), out)
                give(0, op("mul", op("mul", g, -0.5), cube))
            case "exp":
                give(0, op("mul", g, out))
            case "expm1":
                give(0, op("mul", g, op("add", out, 1)))
            case "log":
                give(0, op("div", g, a))
            case "log1p":
                give(0, op("div", g, op("add", a, 1)))
            case "sin":
                give(0, op("mul", g, op("cos", a)))
            case "cos":
                give(0, op("neg", op("mul", g, op("sin", a))))
            case "erf":
                bell = op("exp", op("neg", op("mul", a, a)))
                give(0, op("mul", g, op("mul", bell, 2 / math.sqrt(math.pi))))
            case "sigmoid":
                give(0, op("sigmoid_grad", g, out))
            case "tanh":
                give(0, op("tanh_grad", g, out))
            case "relu":
                give(0, op("where", op("le", out, 0), 0, g))
            case "softplus1":
                give(0, op("mul", g, op("sigmoid", a)))
            case "add":
                give(0, g)
                give(1, g)
            case "sub":
                give(0, g)
                if wants[1]:
                    give(1, op("neg", g))
            case "mul" | "fma":
                if wants[0]:
                    give(0, op("mul", g, b))
                if wants[1]:
                    give(1, op("mul", g, a))
                if node.op == "fma":
                    give(2, g)
            case "div":
                if wants[0]:
                    give(0, op("div", g, b))
                if wants[1]:
                    give(1, op("neg", op("div", op("mul", g, out), b)))
            case "maximum" | "minimum":
                shared = op("where", op("eq", a, b), op("mul", g, 0.5), g)
                loses = "lt" if node.op == "maximum" else "gt"
                if wants[0]:
                    give(0, op("where", op(loses, a, b), 0, shared))
                if wants[1]:
                    give(1, op("where", op(loses, b, a), 0, shared))
            case "normalize":
                g = self.vector(g, width)
                means = Arg(
                    self.graph.add("reduce", (g, out), 2, Reduce("means", 1, width, width, 1))
                )
                centred = op("sub", g, means._replace(scalar=True))
                skewed = op("mul", out, means._replace(offset=1, scalar=True))
                give(0, op("mul", op("sub", centred, skewed), args[2]))
            case "where":
                if wants[1]:
                    give(1, op("where", a, g, 0))
                if wants[2]:
                    give(2, op("where", a, 0, g))
            case _:
                raise AssertionError(node.op)

    def _product(self, node: Node, p: Product, g: Arg) -> None:
        (x,) = node.args
        if x.value in self.active:
            self._product_input(x, p, g)
        if p.weight in self.active:
            target = self.forward.nodes[p.weight].info
            assert isinstance(target, int)
            self.result.reductions.append(
                Outer(
                    target, p.offset, g, self.saved(x), p.groups, p.N, p.in_group,
                    p.w_group, p.w_k, p.w_n, p.K, p.N,
                )
            )  # fmt: skip

    def _product_input(self, x: Arg, p: Product, g: Arg) -> None:
        weight = self.saved(Arg(p.weight)).value
        transposed = Product(weight, p.offset, p.groups, p.N, p.w_group, p.w_n, p.w_k, p.N, p.K)
        if p.groups == 1 or p.in_group == p.K:  # the groups' parts of x are adjacent
            self.give(x, p.groups * p.K, self.graph.product(g, transposed))
            return
        if p.in_group == 0 and p.w_group == p.N * p.w_n:  # all groups read one x: sum over (g, n)
            K = p.groups * p.N
            single = transposed._replace(groups=1, in_group=K, w_group=0, K=K)
            self.give(x, p.K, self.graph.product(g, single))
            return
        for group in range(p.groups):
            one = transposed._replace(groups=1, offset=p.offset + group * p.w_group, w_group=0)
            part = self.graph.product(g._replace(offset=g.offset + group * p.N), one)
            self.give(x._replace(offset=x.offset + group * p.in_group), p.K, part)

    def _reduce(self, i: int, node: Node, r: Reduce, g: Arg) -> None:
        (x,) = node.args
        places = [
            x.offset + group * r.segment + j * r.element
            for group in range(r.groups)
            for j in range(r.length)
        ]
        of_group = [group for group in range(r.groups) for _ in range(r.length)]
        width = len(places)
        if r.kind == "max":  # equal maxima share the gradient
            out = self.saved(Arg(i))
            spread = self._at(out, of_group)
            taken = self._places(self.saved(Arg(x.value)).value, places)
            equal = self.op("eq", taken, spread, width=width)
            count = self.graph.reduce(
                self.vector(equal, width), Reduce("sum", r.groups, r.length, r.length, 1)
            )
            share = self.op("div", g, count._replace(scalar=r.groups == 1), width=r.groups)
            gradient = self.op("mul", self._at(share, of_group), equal, width=width)
        else:
            gradient = self._at(g, of_group)
        if places == list(range(places[0], places[0] + width)):
            self.give(Arg(x.value, places[0]), width, gradient)
            return
        self._give_elements(x.value, [[p] for p in places], self.vector(gradient, width))

    def _at(self, value: Arg, elements: list[int]) -> Arg:
        """These elements of an operand."""
        if value.scalar:
            return value
        if len(set(elements)) == 1:
            return Arg(value.value, value.offset + elements[0], True)
        return self._places(value.value, [value.offset + e for e in elements])

    def _places(self, value: int, places: list[int]) -> Arg:
        return self.graph.collect(value, tuple((p,) for p in places))

    def _collect(self, node: Node, g: Arg) -> None:
        (x,) = node.args
        assert isinstance(node.info, tuple)
        table = [[x.offset + e for e in entry] for entry in node.info]
        self._give_elements(x.value, table, self.vector(g, node.width))

    def _give_elements(self, value: int, table: Sequence[Sequence[int]], g: Arg) -> None:
        """Adds element j of ``g`` to the gradient of each element that entry j names."""
        named = [e for entry in table for e in entry]
        if not named:
            return
        low, high = min(named), max(named) + 1
        sources: list[list[int]] = [[] for _ in range(high - low)]
        for j, entry in enumerate(table):
            for e in entry:
                sources[e - low].append(g.offset + j)
        gradient = self.graph.collect(g.value, tuple(map(tuple, sources)))
        self.give(Arg(value, low), high - low, gradient)
