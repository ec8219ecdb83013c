"""Finds the initial state of a cell that is called with ``state=None``.

The cell runs on stand-ins without a state and with one. If both runs make the same calls, except
that the first uses other tensors in place of the state, these tensors are the initial state: zeros
that the cell creates, or its parameters. The engine can then run the whole sequence in one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import replay, trace
from .recording import Leaf, Recording
from .run import Call, Sizes, recorded, sizes_of
from .stand_ins import Traced

if TYPE_CHECKING:
    from collections.abc import Callable

    from .recording import Call as RecordedCall


class _Start(NamedTuple):
    """The initial state of a cell, and its recording with a state."""

    spec: Any
    sources: list[tuple[str, Any]]  # by leaf: ("number", it), or ("tensor", slot of a captured one)
    shapes: list[tuple[int, ...]]
    given: Recording
    y_spec: Any


class _Begun(NamedTuple):
    """A call of a cell without a state."""

    found: _Start
    recording: Recording
    sizes: Sizes
    state: list[Tensor]


def start(step: Callable[[Any, Tensor], tuple[Any, Any]], sequence: Tensor) -> Any:
    """The initial state, (B, ·), of ``step(None, x)`` for a sequence (T, B, …); None if unknown."""
    begun = _begin(step, sequence)
    return None if begun is None else _nested(begun.state, begun.found.spec)


def whole(
    step: Callable[[Any, Tensor], tuple[Any, Any]], sequence: Tensor, reverse: bool
) -> tuple[Any, Any] | None:
    """The final state and ys of a sequence (T, B, …) without an initial state.

    None if the engine does not run it.
    """
    begun = _begin(step, sequence)
    if begun is None:
        return None
    found, sizes = begun.found, begun.sizes
    leaves = [Leaf(shape, sizes.dtype, True) for shape in found.shapes]
    flat = _with_state(step, found.spec, [])
    tensors = replay.replay(found.given, flat, len(leaves), sizes.batch)
    if tensors is None:
        begun.recording.start = None
        return None
    sizes = sizes._replace(carry=tuple(leaves))
    call = Call(found.given, sizes, begun.state, [sequence], tensors, sequence.shape[0], reverse)
    carry, ys = call.run()
    outputs = dict(zip(call.graph.ys, ys, strict=True))
    y = [outputs.get(i) for i in range(found.y_spec.num_leaves)]
    return _nested(carry, found.spec), pytree.tree_unflatten(y, found.y_spec)


_LEAF = pytree.tree_structure(0)


def _flattened(value: Any) -> tuple[list[Any], Any]:
    """As pytree's function, which is slow for a single tensor."""
    return ([value], _LEAF) if isinstance(value, Tensor) else pytree.tree_flatten(value)


def _nested(leaves: list[Any], spec: Any) -> Any:
    return leaves[0] if spec is _LEAF else pytree.tree_unflatten(leaves, spec)


def _with_state(step: Any, spec: Any, y_specs: list[Any]) -> Any:
    """The step over leaves; appends the structure of its y to ``y_specs``."""

    def flat(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        after, y = step(_nested(carry, spec), x[0])
        leaves, y_spec = pytree.tree_flatten(y)
        y_specs.append(y_spec)
        return _flattened(after)[0], leaves

    return flat


def _begin(step: Any, sequence: Tensor) -> _Begun | None:
    sizes = next(sizes_of([], [sequence]), None)
    if sizes is None or sizes.batch is None:
        return None
    specs: list[Any] = []

    def begin(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        leaves, spec = _flattened(step(None, x[0])[0])
        specs.append(spec)
        return [], leaves

    begin.begins = True  # type: ignore[attr-defined]
    recording, tensors = recorded(begin, sizes)
    if recording.graph is None:
        return None
    if recording.start is None:
        recording.start = _find(step, recording, specs[-1], sizes) or "unknown"
    if recording.start == "unknown":
        return None
    found: _Start = recording.start
    leaves = []
    for (kind, source), shape in zip(found.sources, found.shapes, strict=True):
        if kind == "number":
            leaf = torch.full((), source, dtype=sizes.dtype)
        elif recording.captured[source].kind == "alike":
            leaf = tensors[source][:1]
        else:
            leaf = tensors[source]
        leaves.append(leaf.expand(sizes.batch, *shape))
    return _Begun(found, recording, sizes, leaves)


def _find(step: Any, without: Recording, spec: Any, sizes: Sizes) -> _Start | None:
    count = spec.num_leaves
    shapes = [without.y_shapes[i] for i in range(count) if i in without.y_shapes]
    if len(shapes) < count or without.y_bool:
        return None
    leaves = [Leaf(shape, sizes.dtype, True) for shape in shapes]
    y_specs: list[Any] = []
    flat = _with_state(step, spec, y_specs)
    given, _ = trace.record(flat, leaves, sizes.xs, sizes.batch, sizes.dtype)
    sources = None if given.graph is None else _Match(without, given, count).sources()
    return None if sources is None else _Start(spec, sources, shapes, given, y_specs[-1])


class _Match:
    """Compares two recordings: without a state, and with one of ``count`` leaves."""

    def __init__(self, without: Recording, given: Recording, count: int) -> None:
        self.without, self.given, self.count = without, given, count
        # Corresponding stand-ins: x is number 0 without a state, and follows the state's leaves.
        self.numbers: dict[int, int] = {0: count}
        self.slots: dict[int, int] = {}  # corresponding captured tensors
        self.found: dict[int, tuple[str, Any]] = {}  # by leaf, its source
        self.constants: dict[int, float] = {}  # stand-ins that are filled with one number

    def sources(self) -> list[tuple[str, Any]] | None:
        theirs = list(self.given.calls)
        for call in self.without.calls:
            number = self._constant(call.outputs)
            if number is not None:
                self.constants[call.outputs.traced_number] = number
            if theirs and self._alike(call, theirs[0]):
                self._note(call.outputs, theirs.pop(0).outputs)
            elif number is None:
                return None
        same_states = self._same(self.without.structure[1], self.given.structure[0])
        if theirs or not same_states or len(self.found) < self.count:
            return None
        return [self.found[k] for k in range(self.count)]

    def _alike(self, mine: RecordedCall, theirs: RecordedCall) -> bool:
        same = theirs.func == mine.func and theirs.grad is mine.grad
        return same and self._same(mine.key, theirs.key)

    def _constant(self, outputs: Any) -> float | None:
        """The number that a new tensor is filled with."""
        if type(outputs) is not Traced:
            return None
        node = self.without.nodes[outputs.traced_view.value]
        number: float | None = node.info if node.op == "const" else None
        return number

    def _same(self, mine: Any, theirs: Any) -> bool:
        if not isinstance(mine, tuple) or not isinstance(theirs, tuple):
            return type(mine) is type(theirs) and bool(mine == theirs)
        if len(theirs) == 2 and theirs[0] == "%" and theirs[1] < self.count:
            return self._state(theirs[1], mine)
        if len(mine) != len(theirs):
            return False
        if len(mine) == 2 and mine[0] in ("%", "&") and mine[0] == theirs[0]:
            known = self.numbers if mine[0] == "%" else self.slots
            if mine[0] == "&" and mine[1] not in known:
                known[mine[1]] = theirs[1]
            return bool(known.get(mine[1]) == theirs[1])
        return all(self._same(a, b) for a, b in zip(mine, theirs, strict=True))

    def _state(self, leaf: int, mine: Any) -> bool:
        """Whether ``mine`` can be the source of a leaf of the state; stores it."""
        if not isinstance(mine, tuple) or len(mine) != 2:
            return False
        if mine[0] == "&":
            source: tuple[str, Any] = ("tensor", mine[1])
        elif mine[0] == "%" and mine[1] in self.constants:
            source = ("number", self.constants[mine[1]])
        else:
            return False
        return self.found.setdefault(leaf, source) == source

    def _note(self, mine: Any, theirs: Any) -> None:
        if type(mine) is Traced and type(theirs) is Traced:
            self.numbers[mine.traced_number] = theirs.traced_number
        elif isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
            for a, b in zip(mine, theirs, strict=False):
                self._note(a, b)
