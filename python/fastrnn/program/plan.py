"""Lowers a program to the engine's code.

*Phases.* Products that do not depend on the state run for all steps of a block at once, before the
loop; products on which no state depends, after it; everything else step by step. Pointwise
operations that do not depend on the state, and that no such product reads, stay in the step, where
they need no memory.

*Runs.* Consecutive pointwise operations of one width run over tiles of columns that stay in the
first-level cache; a value that only its own run reads is never written to memory.

*Sums.* An addend of a product is the initial value of its sums. The parts of a concatenation are
written directly to their places in it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .grad import Columns, Outer, mapped
from .ir import COPIES, POINTWISE, Arg, Graph, Node, Product, Reduce

BEFORE, STEP, AFTER, SUMS = range(4)
_MOST_REGISTERS = 28  # of 32; a run needs some more itself
_MOST_OPERATIONS = 200  # of a run


class Home(NamedTuple):
    """A value of the engine (csrc/program.h)."""

    home: str
    number: int
    width: int
    previous: int = 0


class Output(NamedTuple):
    arg: Arg
    width: int
    home: Home


@dataclass
class Code:
    """The arguments of ``_C.Program``, but the dtype."""

    values: list[tuple[Any, ...]] = field(default_factory=list)
    phases: list[list[tuple[Any, ...]]] = field(default_factory=lambda: [[], [], []])
    reductions: list[tuple[Any, ...]] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    tables: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def arguments(self) -> tuple[Any, ...]:
        return (self.values, *self.phases, self.reductions, self.constants, self.tables)


class Planner:
    """Lowers one pass."""

    def __init__(
        self,
        graph: Graph,
        inputs: dict[int, Home],
        outputs: list[Output],
        reductions: list[Outer | Columns],
    ) -> None:
        self.nodes: list[Node] = list(graph.nodes)  # with the copies and sums that are added here
        self.inputs = inputs
        self.outputs = outputs
        self.reductions = list(reductions)
        self.starts: dict[int, Arg] = {}  # by product, the initial value of its sums
        self.alias: dict[int, int] = {}  # by sum, the product that computes it
        self.place: dict[int, tuple[int, int]] = {}  # by value, the engine's value and the offset
        self.code = Code()
        self._constants: dict[float, int] = {}
        self._tables: dict[Any, int] = {}

    def run(self) -> Code:
        self._find_live()
        self._join_sums()
        self._find_phases()
        self._copy_states()
        self._place_all()
        for phase in (BEFORE, STEP, AFTER):
            self._schedule(phase)
        for reduction in self.reductions:
            self._reduction(reduction)
        return self.code

    # ---- dependencies ----------------------------------------------------------------------------

    def operands(self, i: int) -> list[Arg]:
        node = self.nodes[i]
        args = list(node.args)
        if i in self.starts:
            args.append(self.starts[i])
        return [a._replace(value=self.root(a.value)) for a in args]

    def root(self, i: int) -> int:
        while i in self.alias:
            i = self.alias[i]
        return i

    def is_input(self, i: int) -> bool:
        return i in self.inputs or self.nodes[i].op == "const"

    def _roots(self) -> list[int]:
        reads = [*(o.arg for o in self.outputs), *(a for r in self.reductions for a in r.args)]
        return [self.root(a.value) for a in reads]

    def _made_of(self, values: list[int]) -> set[int]:
        """These values and all values that they depend on."""
        found, open_ = set(values), list(values)
        while open_:
            i = open_.pop()
            if self.is_input(i):
                continue
            new = {a.value for a in self.operands(i)} - found
            found |= new
            open_ += new
        return found

    def _find_live(self) -> None:
        self.live = self._made_of(self._roots())
        self.users: dict[int, list[int]] = defaultdict(list)
        for i in sorted(self.live):
            if not self.is_input(i):
                for a in self.operands(i):
                    self.users[a.value].append(i)

    def _states(self) -> set[int]:
        """The values that depend on a state."""
        found: set[int] = set()
        for i in self._order():
            home = self.inputs.get(i)
            if home is not None:
                if home.home == "carry":
                    found.add(i)
            elif any(a.value in found for a in self.operands(i)):
                found.add(i)
        return found

    def _order(self) -> list[int]:
        """Live values in topological order."""
        order, seen = [], set()
        stack = [(i, False) for i in sorted(self.live, reverse=True)]
        while stack:
            value, ready = stack.pop()
            if ready:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack.append((value, True))
                if not self.is_input(value):
                    stack += [(a.value, False) for a in self.operands(value) if a.value not in seen]
        return order

    # ---- sums that start at an addend ------------------------------------------------------------

    def _join_sums(self) -> None:
        """add(product, q): the product's sums start at q, if q is computed before it."""
        for i in range(len(self.nodes)):
            node = self.nodes[i]
            if node.op != "add" or i not in self.live or i in self.inputs:
                continue
            args = [a._replace(value=self.root(a.value)) for a in node.args]
            if any(a.scalar for a in args) or node.width == 1:
                continue
            depends = self._states()
            late = [a.value in depends for a in args]
            for p, q in ((1, 0), (0, 1)) if late[1] >= late[0] else ((0, 1), (1, 0)):
                if self._join(i, args[p], args[q], late[p], late[q]):
                    break

    def _join(self, i: int, product: Arg, other: Arg, late: bool, other_late: bool) -> bool:
        value = product.value
        node = self.nodes[value]
        if (
            node.op != "product"
            or value in self.inputs
            or product.offset
            or node.width != self.nodes[i].width
            or self.users[value] != [i]
            or value in self._roots()
            or other_late > late
            or other.value == value
            or value in self._made_of([other.value])
        ):
            return False
        started = self.starts.get(value)
        if started is not None:
            home = self.inputs.get(started.value)
            if late == other_late or home is None or home.home != "shared":
                return False
            # Add a bias to the addend that is computed outside the loop.
            other = Arg(self._new("add", (other, started), node.width))
        self.starts[value] = other
        self.alias[i] = value
        self._find_live()
        return True

    def _new(self, op: str, args: tuple[Arg, ...], width: int) -> int:
        self.nodes.append(Node(op, args, width))
        return len(self.nodes) - 1

    # ---- phases ----------------------------------------------------------------------------------

    def _find_phases(self) -> None:
        depends = self._states()
        order = self._order()
        to_state = self._made_of(
            [self.root(o.arg.value) for o in self.outputs if o.home.home == "next"]
        )
        self.phase = phase = dict[int, int]()
        for i in order:  # products that no state depends on, and their users
            if self.is_input(i):
                continue
            late = any(phase.get(a.value) == AFTER for a in self.operands(i))
            product = self.nodes[i].op == "product"
            if i in depends and i not in to_state and (late or product):
                phase[i] = AFTER
        for i in reversed(order):  # products that depend on no state, and their operands
            if self.is_input(i) or i in phase:
                continue
            ahead = any(phase.get(u) == BEFORE for u in self.users[i])
            if i not in depends and (ahead or self.nodes[i].op == "product"):
                phase[i] = BEFORE
            else:
                used = {phase.get(u, STEP) for u in self.users[i]}
                only_after = used == {AFTER} and i not in depends and i not in self._roots()
                phase[i] = AFTER if only_after else STEP

    def _copy_states(self) -> None:
        """Copies each state that is read outside the step."""
        copies: dict[int, int] = {}

        def out(arg: Arg) -> Arg:
            home = self.inputs.get(self.root(arg.value))
            if home is None or home.home != "carry":
                return arg
            i = self.root(arg.value)
            if i not in copies:
                copies[i] = self._new("copy", (Arg(i),), home.width)
                self.phase[copies[i]] = STEP
            return arg._replace(value=copies[i])

        for i in [i for i, p in self.phase.items() if p == AFTER]:
            node = self.nodes[i]
            self.nodes[i] = node._replace(args=tuple(out(a) for a in node.args))
            if i in self.starts:
                self.starts[i] = out(self.starts[i])
        self.reductions = [mapped(r, out) for r in self.reductions]
        self._find_live()

    # ---- places ----------------------------------------------------------------------------------

    def _value(self, home: Home) -> int:
        entry = (home.home, home.number, home.width) + ((home.previous,) if home.previous else ())
        self.code.values.append(entry)
        return len(self.code.values) - 1

    def _place_all(self) -> None:
        self.copies: list[int] = []  # nodes that copy to an output or into a concatenation
        products = [self.nodes[i].info for i in self.live]
        weights = {p.weight for p in products if isinstance(p, Product)}
        for i, home in self.inputs.items():
            if i in self.live or i in weights:
                self.place[i] = (self._value(home), 0)
        for output in self.outputs:
            self._place_output(output)
        for i in reversed(self._order()):
            if not self.is_input(i):
                self._place_node(i)

    def _place_output(self, output: Output) -> None:
        value = self._value(output.home)
        i = self.root(output.arg.value)
        arg = output.arg._replace(value=i)
        whole = self._is_whole(arg, output.width)
        state = output.home.home == "next"
        fits = self._phase_of(i) == STEP if state else True
        if whole and not self.is_input(i) and i not in self.place and fits:
            self.place[i] = (value, 0)
            return
        self._copy(arg, output.width, (value, 0), STEP if state else self._phase_of(i))

    def _copy(self, arg: Arg, width: int, place: tuple[int, int], phase: int) -> None:
        i = self._new("copy", (arg,), width)
        self.phase[i] = phase
        self.place[i] = place
        self.copies.append(i)
        self.users[arg.value].append(i)

    def _phase_of(self, i: int) -> int:
        return self.phase.get(i, STEP)

    def _is_whole(self, arg: Arg, width: int) -> bool:
        return not arg.scalar and arg.offset == 0 and self.nodes[arg.value].width == width

    def _read_phases(self, i: int) -> set[int]:
        """The phases that read a value; `SUMS` for sums over all steps."""
        phases: set[int] = set()
        for user in self.users[i]:
            phases.add(self._phase_of(user))
            if self.nodes[user].op == "cat" and user not in self.copies:
                phases |= self._read_phases(user)
        if any(i == self.root(a.value) for r in self.reductions for a in r.args):
            phases.add(SUMS)
        return phases

    def _place_node(self, i: int) -> None:
        node, phase = self.nodes[i], self._phase_of(i)
        if i not in self.place and (node.op == "cat" or self._leaves_run(i)):
            home = "local" if self._read_phases(i) <= {phase} else "block"
            self.place[i] = (self._value(Home(home, 0, node.width)), 0)
        if node.op != "cat":
            return
        value, offset = self.place[i]
        home = self.code.values[value][0]
        assert isinstance(node.info, tuple)
        for arg, width in zip(self.operands(i), node.info, strict=True):
            part = arg.value
            if (
                self._is_whole(arg, width)
                and not self.is_input(part)
                and part not in self.place
                and self._phase_of(part) == phase
                and (home != "local" or self._read_phases(part) <= {phase})
                and (home != "next" or self.users[part] == [i])
            ):
                self.place[part] = (value, offset)
            else:
                self._copy(arg, width, (value, offset), phase)
            offset += width

    def _leaves_run(self, i: int) -> bool:
        """Whether a value may be read by anything but a pointwise operation on the same columns."""
        node, phase = self.nodes[i], self._phase_of(i)
        if not self._pointwise(i) or SUMS in self._read_phases(i):
            return True
        for user in self.users[i]:
            other = self.nodes[user]
            if (
                not self._pointwise(user)
                or self._phase_of(user) != phase
                or other.width != node.width
            ):
                return True
            for arg in self.operands(user):
                if arg.value == i and (arg.offset or (arg.scalar and node.width > 1)):
                    return True
        return False

    # ---- the order of a phase --------------------------------------------------------------------

    def _schedule(self, phase: int) -> None:
        todo = [i for i in self._order() if not self.is_input(i) and self._phase_of(i) == phase]
        todo += [i for i in self.copies if self._phase_of(i) == phase and i not in todo]
        writers: dict[int, list[int]] = defaultdict(list)  # by the engine's value, copies into it
        for i in self.copies:
            writers[self.place[i][0]].append(i)
        waits: dict[int, set[int]] = {}
        mine = set(todo)
        for i in todo:
            needs = {a.value for a in self.operands(i)} & mine
            if self.nodes[i].op == "cat":
                needs |= {c for c in writers[self.place[i][0]] if c in mine and self._within(c, i)}
            waits[i] = needs
        done: set[int] = set()
        while todo:
            todo = self._emit_others(phase, todo, waits, done)
            todo = self._emit_run(phase, todo, waits, done)

    def _within(self, copy: int, cat: int) -> bool:
        begin, width = self.place[cat][1], self.nodes[cat].width
        return begin <= self.place[copy][1] < begin + max(width, 1)

    def _pointwise(self, i: int) -> bool:
        return self.nodes[i].op in POINTWISE or self.nodes[i].op in COPIES

    def _emit_others(
        self, phase: int, todo: list[int], waits: dict[int, set[int]], done: set[int]
    ) -> list[int]:
        grown = True
        while grown:
            grown = False
            for i in todo:
                if i not in done and not self._pointwise(i) and waits[i] <= done:
                    self._emit(phase, i)
                    done.add(i)
                    grown = True
        return [i for i in todo if i not in done]

    def _emit(self, phase: int, i: int) -> None:
        node = self.nodes[i]
        if node.op == "cat":
            return
        value, offset = self.place[i]
        arg = self.operands(i)[0]
        source, start = self.place[arg.value]
        start += arg.offset
        out = self.code.phases[phase]
        info = node.info
        if isinstance(info, Product):
            init, init_offset = -1, 0
            if i in self.starts:
                a = self.starts[i]._replace(value=self.root(self.starts[i].value))
                init, init_offset = self.place[a.value][0], self.place[a.value][1] + a.offset
            weight = self.place[info.weight][0]
            out.append(
                ("product", value, offset, source, start, weight, info.offset, info.groups, info.N,
                 info.in_group, info.w_group, info.w_k, info.w_n, info.K, info.N, init, init_offset)
            )  # fmt: skip
        elif isinstance(info, Reduce):
            second: tuple[int, ...] = ()
            if info.kind == "means":
                other = self.operands(i)[1]
                place, begin = self.place[other.value]
                second = (place, begin + other.offset)
            out.append(
                ("reduce", info.kind, value, offset, source, start, info.groups, info.segment,
                 info.length, info.element, *second)
            )  # fmt: skip
        else:
            out.append(("collect", value, offset, source, start, node.width, self._table(info)))

    def _table(self, table: Any) -> int:
        if table not in self._tables:
            starts, elements = [0], []
            for entry in table:
                elements += entry
                starts.append(len(elements))
            self._tables[table] = len(self.code.tables)
            self.code.tables.append((starts, elements))
        return self._tables[table]

    def _emit_run(
        self, phase: int, todo: list[int], waits: dict[int, set[int]], done: set[int]
    ) -> list[int]:
        ready = [i for i in todo if self._pointwise(i) and waits[i] <= done]
        if not ready:
            assert not todo, "the dependencies of a program have a cycle"
            return todo
        width = self.nodes[ready[0]].width
        run: list[int] = []
        inside: set[int] = set()
        grown = True
        while grown:
            grown = False
            for i in todo:
                if i in inside or not self._pointwise(i) or self.nodes[i].width != width:
                    continue
                if self._joins(i, waits[i], done, inside) and len(run) < _MOST_OPERATIONS:
                    run.append(i)
                    inside.add(i)
                    grown = True
        while True:
            operations = self._run_code(run, set(run))
            if operations is not None:
                break
            run = run[: len(run) * 3 // 4]
        self.code.phases[phase].append(("run", width, operations))
        done |= set(run)
        return [i for i in todo if i not in done]

    def _joins(self, i: int, waits: set[int], done: set[int], inside: set[int]) -> bool:
        if not waits <= done | inside:
            return False
        width = self.nodes[i].width
        for arg in self.operands(i):
            if arg.value in inside and (arg.offset or (arg.scalar and width > 1)):
                return False
        return True

    def _run_code(self, run: list[int], inside: set[int]) -> list[tuple[Any, ...]] | None:
        """The run's operations; None if it needs too many registers."""
        last: dict[int, int] = {}  # by value of this run, the position of its last reader
        for at, i in enumerate(run):
            for a in self.operands(i):
                if a.value in inside:
                    last[a.value] = at
        for i in run:  # a value that a later run reads needs a place in memory
            if i not in self.place and any(u not in inside for u in self.users[i]):
                self.place[i] = (self._value(Home("local", 0, self.nodes[i].width)), 0)
        free = list(range(_MOST_REGISTERS - 1, -1, -1))
        register: dict[int, int] = {}
        operations: list[tuple[Any, ...]] = []
        for at, i in enumerate(run):
            node = self.nodes[i]
            operands: list[tuple[int, int, bool] | None] = []
            for a in self.operands(i):
                if a.value in register:
                    operands.append((self._register(register[a.value]), 0, False))
                elif a.value in inside:
                    operands.append((*self.place[a.value], False))
                else:
                    operands.append(self._operand(a))
            ended = {a.value for a in self.operands(i) if last.get(a.value) == at}
            free += [register.pop(value) for value in sorted(ended & register.keys())]
            code = node.op
            if code in COPIES:
                code, operands = "copy", operands[:1]
            operands += [None] * (3 - len(operands))
            if i in self.place and (i not in last or self._has_place_alone(i)):
                operations.append((code, (*self.place[i], False), *operands))
                continue
            if not free:
                return None
            register[i] = free.pop()
            target = (self._register(register[i]), 0, False)
            operations.append((code, target, *operands))
            if i in self.place:
                operations.append(("copy", (*self.place[i], False), target, None, None))
        return operations

    def _has_place_alone(self, i: int) -> bool:
        """Whether a value is alone in its place, so that its run may read it from there."""
        value, offset = self.place[i]
        width: int = self.code.values[value][2]
        return offset == 0 and width == self.nodes[i].width

    def _register(self, number: int) -> int:
        entry = ("tile", number, 0)
        if entry not in self.code.values:
            self.code.values.append(entry)
        return self.code.values.index(entry)

    def _operand(self, a: Arg) -> tuple[int, int, bool]:
        node = self.nodes[a.value]
        if node.op == "const":
            assert isinstance(node.info, float)
            if node.info not in self._constants:
                self._constants[node.info] = len(self.code.constants)
                self.code.constants.append(node.info)
            return (-1, self._constants[node.info], True)
        value, offset = self.place[a.value]
        return (value, offset + a.offset, a.scalar)

    def _reduction(self, r: Outer | Columns) -> None:
        def at(a: Arg) -> tuple[int, int]:
            value, offset = self.place[self.root(a.value)]
            return value, offset + a.offset

        if isinstance(r, Columns):
            self.code.reductions.append(("columns", r.target, r.offset, *at(r.d), r.width))
        else:
            self.code.reductions.append(
                ("outer", r.target, r.offset, *at(r.d), *at(r.x), r.groups, r.d_group, r.x_group,
                 r.w_group, r.w_k, r.w_n, r.K, r.N)
            )  # fmt: skip
