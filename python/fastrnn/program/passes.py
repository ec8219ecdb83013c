"""The two passes of a program: their inputs and outputs, and what forward saves for backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from .grad import Backward, Needs, Outer, backward, mapped
from .ir import COPIES, COSTLY, INPUTS, POINTWISE, Arg, Graph, Node, Reduce
from .plan import Code, Home, Output, Planner

# A value is recomputed in backward, not saved, if that takes at most so many cheap operations.
_MOST_RECOMPUTED = 6
_COST_OF_COSTLY = 3  # in cheap operations


@dataclass
class Pass:
    """The engine's code for one pass, and which arrays it takes, in its order.

    Attributes:
        sequences: ("x", i), ("y", i), ("saved", j), ("state", k), ("dy", i) or ("dx", i).
        firsts: for each sequence that is read one step earlier, the state with its initial value.
        fixed, shared: indices of the program's inputs.
        carries: the state of each carry.
        fixed_sums: the fixed inputs whose gradients are the carries after those.
        targets: the shared inputs whose gradients are summed.
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
    """The forward pass and what it saves; `backward_pass` derives the backward pass."""

    forward: Pass
    saved: list[int] = field(default_factory=list)  # the widths of the saved values
    states: dict[int, tuple[str, int]] = field(default_factory=dict)  # the sequence with state k
    # Final states and outputs that have a gradient.
    active_nexts: set[int] = field(default_factory=set)
    active_ys: set[int] = field(default_factory=set)
    chosen: _Saved | None = None


class _Inputs:
    """The engine's homes of a graph's inputs, numbered in the order of their first use."""

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
    """``widths``: of the states; ``needs`` None: nothing is saved for backward."""
    if needs is None:
        return Passes(_forward(graph, widths, None))
    chosen = _Saved(graph, backward(graph, needs))
    saved = [high - low for _, low, high in chosen.kept]
    active = chosen.made.active_nexts, chosen.made.active_ys
    return Passes(_forward(graph, widths, chosen), saved, chosen.states, *active, chosen)


def backward_pass(
    graph: Graph,
    whole: Passes,
    reverse: bool,
    part: tuple[Needs, frozenset[int]] | None = None,
) -> Pass:
    """The backward pass for the values that forward saved.

    Arguments:
        whole: the result of `passes`.
        reverse: whether forward starts at the last step.
        part: the wanted gradients, a subset of those that forward saved values for, and the outputs
            that have a gradient, which is zero for the others. None: all.
    """
    chosen = whole.chosen
    assert chosen is not None
    if part is not None:
        chosen = _Saved(graph, backward(graph, *part), chosen)
    return _lower_backward(graph, chosen, reverse)


def _forward(graph: Graph, widths: dict[int, int], backward: _Saved | None) -> Pass:
    made = Pass(Code())
    inputs = _Inputs(made)
    made.carries = sorted(graph.nexts)
    made.widths = [widths[k] for k in made.carries]
    saved = [value for value, _, _ in backward.kept] if backward is not None else []
    for i in sorted(graph.used(graph.results + saved)):
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
    made.code = Planner(graph, inputs.homes, outputs, []).run()
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


class _Saved:
    """The forward values that backward reads, each either saved or recomputed."""

    def __init__(self, forward: Graph, made: Backward, whole: _Saved | None = None) -> None:
        self.forward, self.made = forward, made
        self.graph = made.graph
        roots = self.graph.results + [a.value for r in made.reductions for a in r.args]
        self.read = self._ranges(self.graph.used(roots))
        self.available: set[int] = set()  # forward values that backward can read
        self.recomputed: dict[int, int] = {}  # by forward value, the node of backward
        self.kept: list[tuple[int, int, int]] = []  # value, and the saved part of it
        self.states: dict[int, tuple[str, int]] = {}
        if whole is None:
            self._decide()
        else:
            self._decide_as(whole)

    def _ranges(self, live: set[int]) -> dict[int, tuple[int, int]]:
        """The part of each forward value that is read."""
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
        """Chooses in the order of forward's nodes: recompute what is cheap, save the rest."""
        nodes = self.forward.nodes
        for value, (low, high) in sorted(self.read.items()):
            node = nodes[value]
            if node.op in INPUTS:
                if node.op == "carry":
                    self._keep_state(node.info)  # type: ignore[arg-type]
            elif self._cost(value) <= _MOST_RECOMPUTED:
                self._recompute(value)
            else:
                self.kept.append((value, low, high))
                if (low, high) != (0, node.width):
                    continue
            self.available.add(value)

    def _decide_as(self, whole: _Saved) -> None:
        """Reads what forward saved for more gradients than this pass; recomputes the rest."""
        self.kept, self.states = whole.kept, whole.states
        kept = {value for value, _, _ in self.kept}
        nodes = self.forward.nodes
        self.available |= {v for v, low, high in self.kept if (low, high) == (0, nodes[v].width)}
        for value in sorted(self.read):
            if nodes[value].op not in INPUTS and value not in kept:
                self._recompute(value)

    def _keep_state(self, k: int) -> None:
        """Saves state k of all steps, unless an output holds it."""
        forward = self.forward
        if k not in forward.nexts:
            return
        after, width = forward.nexts[k], forward.input_width("carry", k)
        same = (i for i, y in forward.ys.items() if y == after and forward.widths[i] == width)
        i = next(same, None)
        self.states[k] = ("state", k) if i is None else ("y", i)

    def _cost(self, value: int) -> float:
        """The cost of recomputing a value; infinite if it is above the limit or impossible."""
        nodes = self.forward.nodes
        cost, open_, seen = 0.0, [value], set()
        while open_:
            i = open_.pop()
            if i in seen or i in self.available:
                continue
            seen.add(i)
            node = nodes[i]
            if node.op in ("x", "fixed", "shared", "const"):
                continue
            if node.op not in POINTWISE and node.op not in COPIES and node.op != "cat":
                return float("inf")
            cost += _COST_OF_COSTLY if node.op in COSTLY else 1
            if cost > _MOST_RECOMPUTED:
                return float("inf")
            open_ += [a.value for a in node.args]
        return cost

    def _recompute(self, value: int) -> int:
        """Adds a forward node to backward's program."""
        known = self.recomputed.get(value)
        if known is not None:
            return known
        node = self.forward.nodes[value]
        if node.op in INPUTS or value in self.available:
            if node.op == "const":
                assert isinstance(node.info, float)
                return self.graph.const(node.info).value
            self.read.setdefault(value, (0, node.width))
            return self.graph.add("saved", (), node.width, value)
        args = tuple(a._replace(value=self._recompute(a.value)) for a in node.args)
        self.recomputed[value] = self.graph.add(node.op, args, node.width, node.info)
        return self.recomputed[value]

    def resolved(self, a: Arg) -> Arg:
        """An operand of backward's program, with a recomputed value in place of a saved one."""
        node = self.graph.nodes[a.value]
        if node.op == "saved" and node.info in self.recomputed:
            return a._replace(value=self.recomputed[node.info])
        return a


def _lower_backward(forward: Graph, chosen: _Saved, reverse: bool) -> Pass:
    made = Pass(Code())
    inputs = _Inputs(made)
    made.carries, made.fixed_sums = chosen.made.carries, chosen.made.fixed
    made.widths = chosen.made.widths
    graph = chosen.graph.mapped(chosen.resolved)
    reductions = [mapped(r, chosen.resolved) for r in chosen.made.reductions]
    roots = graph.results + [a.value for r in reductions for a in r.args]
    kept = {value: (j, low, high) for j, (value, low, high) in enumerate(chosen.kept)}
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
                home = inputs.sequence(chosen.states[k], node.width, 1 if reverse else -1, k)
                inputs.homes[i] = home
            else:
                _bind(source, i, inputs)

    def shifted(a: Arg) -> Arg:  # offsets within the saved part of a value
        return a._replace(offset=a.offset - shifts.get(a.value, 0))

    graph, read = graph.mapped(shifted), graph
    for i, node in enumerate(read.nodes):
        if node.op == "collect" and (shift := shifts.get(node.args[0].value)):
            table = tuple(tuple(e - shift for e in entry) for entry in node.info)  # type: ignore[attr-defined]
            graph.nodes[i] = node._replace(info=table)
    outputs = [
        Output(a, graph.widths[i], inputs.sequence(("dx", i), graph.widths[i]))
        for i, a in graph.ys.items()
    ]
    for index, a in graph.nexts.items():
        width = made.widths[index]
        outputs.append(Output(a, width, Home("next", index, width)))
    made.targets = list(dict.fromkeys(r.target for r in reductions))
    numbered = [
        mapped(r, shifted)._replace(target=made.targets.index(r.target)) for r in reductions
    ]
    made.code = Planner(graph, inputs.homes, outputs, numbered).run()
    return made
