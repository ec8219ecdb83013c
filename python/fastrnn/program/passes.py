"""The two passes of a program: what each reads and writes, and what forward keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from .grad import Backward, Needs, Outer, backward
from .ir import COPIES, COSTLY, INPUTS, POINTWISE, Arg, Graph, Node, Reduce
from .plan import Code, Home, Output, lower

# Cheap operations that are rather done again than kept, and what a costly one counts for.
_MOST_AGAIN = 6
_COSTLY_AGAIN = 3


@dataclass
class Pass:
    """What the engine runs, and what its arrays stand for, in its order.

    ``sequences``: ("x", i), ("y", i), ("saved", j), ("state", k), ("dy", i), ("dx", i);
    ``firsts``: for a sequence of states before each step the carry whose initial value begins it.
    ``fixed`` and ``shared``: indices of the program's; ``targets``: shared inputs whose gradients
    are summed; ``carries``: state k of each carry, ``fixed_sums`` the fixed input of those after.
    """

    code: Code
    sequences: list[tuple[str, int]] = field(default_factory=list)
    firsts: list[int | None] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    carries: list[int] = field(default_factory=list)
    fixed_sums: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)  # of the carries


@dataclass
class Passes:
    """The forward pass, and what it keeps; `backward_pass` makes the other from it."""

    forward: Pass
    saved: list[int] = field(default_factory=list)  # widths of what forward keeps
    states: dict[int, tuple[str, int]] = field(default_factory=dict)  # where state k is kept
    # Final states and outputs that have a gradient.
    active_nexts: set[int] = field(default_factory=set)
    active_ys: set[int] = field(default_factory=set)
    found: _Backward | None = None


class _Inputs:
    """The engine's homes of a graph's inputs, numbered as they are met."""

    def __init__(self, made: Pass) -> None:
        self.made = made
        self.homes: dict[int, Home] = {}

    def sequence(
        self, what: tuple[str, int], width: int, previous: int = 0, first: int | None = None
    ) -> Home:
        made = self.made
        key = (what, first)
        known = list(zip(made.sequences, made.firsts, strict=True))
        if key not in known:
            made.sequences.append(what)
            made.firsts.append(first)
            known.append(key)
        return Home("sequence", known.index(key), width, previous)

    def numbered(self, home: str, items: list[int], index: int, width: int) -> Home:
        if index not in items:
            items.append(index)
        return Home(home, items.index(index), width)


def passes(graph: Graph, widths: dict[int, int], needs: Needs | None) -> Passes:
    """``widths`` of the states; without ``needs`` nothing is kept."""
    found = _Backward(graph, backward(graph, needs)) if needs is not None else None
    made = Passes(_forward(graph, widths, found))
    if found is not None:
        made.saved = [high - low for _, low, high in found.kept]
        made.states = found.states
        made.active_nexts = found.made.active_nexts
        made.active_ys = found.made.active_ys
        made.found = found
    return made


def backward_pass(
    graph: Graph,
    whole: Passes,
    reverse: bool,
    part: tuple[Needs, frozenset[int]] | None = None,
) -> Pass:
    """The backward pass for what forward keeps.

    Arguments:
        whole: what `passes` made of the program.
        reverse: whether forward walks from the last step.
        part: the wanted gradients, fewer than those that forward kept values for, and the outputs
            that have a gradient; of the others it is zero. None: all.
    """
    found = whole.found
    assert found is not None
    if part is not None:
        found = _Backward(graph, backward(graph, *part), found)
    return _lower_backward(graph, found, reverse)


def _forward(graph: Graph, widths: dict[int, int], backward: _Backward | None) -> Pass:
    made = Pass(Code())
    inputs = _Inputs(made)
    made.carries = sorted(graph.nexts)
    made.widths = [widths[k] for k in made.carries]
    roots = [a.value for a in (*graph.nexts.values(), *graph.ys.values())]
    for i in sorted(graph.used(roots + (backward.sources() if backward else []))):
        _bind(graph.nodes[i], i, inputs)
    outputs = [
        Output(a, graph.widths[i], inputs.sequence(("y", i), graph.widths[i]))
        for i, a in graph.ys.items()
    ]
    if backward is not None:
        for j, (value, low, high) in enumerate(backward.kept):
            home = inputs.sequence(("saved", j), high - low)
            outputs.append(Output(Arg(value, low), high - low, home))
        for k, (kind, _) in backward.states.items():
            if kind == "state":
                home = inputs.sequence(("state", k), widths[k])
                outputs.append(Output(graph.nexts[k], widths[k], home))
    for index, k in enumerate(made.carries):
        outputs.append(Output(graph.nexts[k], widths[k], Home("next", index, widths[k])))
    made.code = lower(graph, inputs.homes, outputs, [])
    return made


def _bind(node: Node, i: int, inputs: _Inputs) -> None:
    made, index = inputs.made, node.info
    if node.op not in INPUTS or node.op == "const":
        return
    assert isinstance(index, int)
    if node.op == "x":
        inputs.homes[i] = inputs.sequence(("x", index), node.width)
    elif node.op == "carry":
        inputs.homes[i] = Home("carry", made.carries.index(index), node.width)
    else:
        items = made.fixed if node.op == "fixed" else made.shared
        inputs.homes[i] = inputs.numbered(node.op, items, index, node.width)


class _Backward:
    """What backward's program reads of forward's values: kept, or computed again."""

    def __init__(self, forward: Graph, made: Backward, whole: _Backward | None = None) -> None:
        self.forward, self.made = forward, made
        self.graph = made.graph
        self.roots = [a.value for a in (*self.graph.nexts.values(), *self.graph.ys.values())]
        for r in made.reductions:
            self.roots += [r.d.value, *([r.x.value] if isinstance(r, Outer) else [])]
        live = self.graph.used(self.roots)
        self.read = self._ranges(live)
        self.there: set[int] = set()  # forward's values that backward can read
        self.again: dict[int, int] = {}  # forward's value: backward's node that makes it
        self.kept: list[tuple[int, int, int]] = []  # value, and the part of it
        self.states: dict[int, tuple[str, int]] = {}
        if whole is None:
            self._decide()
        else:
            self._decide_as(whole)

    def sources(self) -> list[int]:
        return [v for v, _, _ in self.kept]

    def _ranges(self, live: set[int]) -> dict[int, tuple[int, int]]:
        """The part of each of forward's values that is read."""
        found: dict[int, tuple[int, int]] = {}
        nodes = self.graph.nodes

        def note(a: Arg, width: int) -> None:
            node = nodes[a.value]
            if node.op != "saved":
                return
            assert isinstance(node.info, int)
            low, high = a.offset, a.offset + (1 if a.scalar else width)
            before = found.get(node.info, (low, high))
            found[node.info] = (min(low, before[0]), max(high, before[1]))

        for i in live:
            node = nodes[i]
            for position, a in enumerate(node.args):
                note(a, self._read_width(node, position))
        for r in self.made.reductions:
            if isinstance(r, Outer):
                note(r.d, (r.groups - 1) * r.d_group + r.N)
                note(r.x, (r.groups - 1) * r.x_group + r.K)
            else:
                note(r.d, r.width)
        return found

    def _read_width(self, node: Node, position: int) -> int:
        if node.op == "cat":
            assert isinstance(node.info, tuple)
            return node.info[position]  # type: ignore[no-any-return]
        if node.op in POINTWISE or node.op in COPIES:
            return node.width
        if isinstance(node.info, Reduce) and position > 0:
            return node.info.length
        return self.graph.nodes[node.args[0].value].width - node.args[0].offset

    def _decide(self) -> None:
        """In the order of forward's nodes: made again where that is cheap, else kept."""
        nodes = self.forward.nodes
        there = self.there
        for value, (low, high) in sorted(self.read.items()):
            node = nodes[value]
            if node.op in INPUTS:
                if node.op == "carry":
                    self._keep_state(node.info)  # type: ignore[arg-type]
                there.add(value)
            elif self._cost(value, there) <= _MOST_AGAIN:
                self._make_again(value)
                there.add(value)
            else:
                self.kept.append((value, low, high))
                if (low, high) == (0, node.width):
                    there.add(value)

    def _decide_as(self, whole: _Backward) -> None:
        """What a backward pass for more gradients has kept is there, the rest is made again."""
        self.kept, self.states = whole.kept, whole.states
        kept = {value for value, _, _ in self.kept}
        nodes = self.forward.nodes
        self.there |= {v for v, low, high in self.kept if (low, high) == (0, nodes[v].width)}
        for value in sorted(self.read):
            if nodes[value].op not in INPUTS and value not in kept:
                self._make_again(value)

    def _keep_state(self, k: int) -> None:
        forward = self.forward
        if k not in forward.nexts:
            return
        after = forward.nexts[k]
        for i, y in forward.ys.items():
            if y == after and forward.widths[i] == self._width(k):
                self.states[k] = ("y", i)
                return
        self.states[k] = ("state", k)

    def _width(self, k: int) -> int:
        return next(n.width for n in self.forward.nodes if n.op == "carry" and n.info == k)

    def _cost(self, value: int, there: set[int]) -> float:
        """Of making a value again; infinite where something is missing."""
        nodes = self.forward.nodes
        cost, open_, seen = 0.0, [value], set()
        while open_:
            i = open_.pop()
            if i in seen or i in there:
                continue
            seen.add(i)
            node = nodes[i]
            if node.op in ("x", "fixed", "shared", "const"):
                continue
            if node.op not in POINTWISE and node.op not in COPIES and node.op != "cat":
                return float("inf")
            cost += _COSTLY_AGAIN if node.op in COSTLY else 1
            if cost > _MOST_AGAIN:
                return float("inf")
            open_ += [a.value for a in node.args]
        return cost

    def _make_again(self, value: int) -> int:
        """Forward's node, in backward's program."""
        known = self.again.get(value)
        if known is not None:
            return known
        node = self.forward.nodes[value]
        if node.op in INPUTS or value in self.there:
            if node.op == "const":
                assert isinstance(node.info, float)
                return self.graph.const(node.info).value
            self.read.setdefault(value, (0, node.width))
            return self.graph.add("saved", (), node.width, value)
        args = tuple(a._replace(value=self._make_again(a.value)) for a in node.args)
        self.again[value] = self.graph.add(node.op, args, node.width, node.info)
        return self.again[value]


def _lower_backward(forward: Graph, found: _Backward, reverse: bool) -> Pass:
    made = Pass(Code())
    inputs = _Inputs(made)
    made.carries, made.fixed_sums = found.made.carries, found.made.fixed
    made.widths = found.made.widths
    graph = _resolved(found)
    roots = [a.value for a in (*graph.nexts.values(), *graph.ys.values())]
    reductions = [
        r._replace(d=_renamed(found, r.d), x=_renamed(found, r.x)) if isinstance(r, Outer)
        else r._replace(d=_renamed(found, r.d))
        for r in found.made.reductions
    ]  # fmt: skip
    for r in reductions:
        roots += [r.d.value, *([r.x.value] if isinstance(r, Outer) else [])]
    kept = {value: (j, low, high) for j, (value, low, high) in enumerate(found.kept)}
    shifts: dict[int, int] = {}
    for i in sorted(graph.used(roots)):
        node = graph.nodes[i]
        if node.op == "carry":
            assert isinstance(node.info, int)
            inputs.homes[i] = Home("carry", node.info, node.width)
        elif node.op == "x":
            assert isinstance(node.info, int)
            inputs.homes[i] = inputs.sequence(("dy", node.info), node.width)
        elif node.op == "saved":
            assert isinstance(node.info, int)
            source = forward.nodes[node.info]
            if node.info in kept:
                j, low, high = kept[node.info]
                inputs.homes[i] = inputs.sequence(("saved", j), high - low)
                shifts[i] = low
            elif source.op == "carry":
                k = source.info
                assert isinstance(k, int)
                home = inputs.sequence(found.states[k], node.width, 1 if reverse else -1, k)
                inputs.homes[i] = home
            else:
                _bind(source, i, inputs)
    graph, reductions = _shifted(graph, shifts, reductions)
    outputs = [
        Output(a, graph.widths[i], inputs.sequence(("dx", i), graph.widths[i]))
        for i, a in graph.ys.items()
    ]
    for index, a in graph.nexts.items():
        width = made.widths[index]
        outputs.append(Output(a, width, Home("next", index, width)))
    for r in reductions:
        if r.target not in made.targets:
            made.targets.append(r.target)
    numbered = [r._replace(target=made.targets.index(r.target)) for r in reductions]
    made.code = lower(graph, inputs.homes, outputs, numbered)
    return made


def _renamed(found: _Backward, a: Arg) -> Arg:
    node = found.graph.nodes[a.value]
    if node.op == "saved" and node.info in found.again:
        return a._replace(value=found.again[node.info])
    return a


def _resolved(found: _Backward) -> Graph:
    """Backward's program, with what is made again in its place."""
    graph = found.graph
    out = Graph(widths=graph.widths)
    out.nodes = [
        node._replace(args=tuple(_renamed(found, a) for a in node.args)) for node in graph.nodes
    ]
    out.nexts = {k: _renamed(found, a) for k, a in graph.nexts.items()}
    out.ys = {i: _renamed(found, a) for i, a in graph.ys.items()}
    return out


def _shifted(graph: Graph, shifts: dict[int, int], reductions: list) -> tuple[Graph, list]:  # type: ignore[type-arg]
    """Of a value of which only a part was kept, offsets count from that."""

    def moved(a: Arg) -> Arg:
        return a._replace(offset=a.offset - shifts.get(a.value, 0))

    out = Graph(widths=graph.widths)
    for node in graph.nodes:
        info = node.info
        args = node.args
        if node.op == "collect" and args and args[0].value in shifts:
            shift = shifts[args[0].value]
            info = tuple(tuple(e - shift for e in entry) for entry in info)  # type: ignore[attr-defined]
        else:
            args = tuple(moved(a) for a in args)
        out.nodes.append(node._replace(args=args, info=info))
    out.nexts = {k: moved(a) for k, a in graph.nexts.items()}
    out.ys = {i: moved(a) for i, a in graph.ys.items()}
    moved_reductions = [
        r._replace(d=moved(r.d), x=moved(r.x)) if isinstance(r, Outer) else r._replace(d=moved(r.d))
        for r in reductions
    ]
    return out, moved_reductions
