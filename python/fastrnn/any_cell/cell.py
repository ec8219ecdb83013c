"""One cell over a sequence in one direction, for `Recurrent` and `explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..program import api as program
from .scan import Calls, Tree, choose, fits, fresh_steps, mapped, outline, walk, zero_past

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Module


class Cell:
    """A cell as ``(x, state) -> (output, state)``, for every supported form of its result."""

    def __init__(self, cell: Module, name: str) -> None:
        self.cell, self.name = cell, name
        self._next: Callable[[Any], Any] | None = None

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        result = self.cell(x, state)
        output = result
        if not isinstance(result, Tensor):
            output = result[0] if isinstance(result, tuple | list) and result else None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{self.name} must return its state, of which the first entry is the output, or "
                f"(output, state), got {outline(result)}"
            )
        if self._next is None:
            self._next = _reading(self.cell, x, state, result)
        after = self._next(result)
        if torch.is_autocast_enabled(x.device.type) and fits(after, state):
            # A state keeps its dtype under autocast.
            after = mapped(lambda new, old: new.to(old.dtype), after, state)
        return output, after


def _whole(result: Any) -> Any:
    return result


def _second(result: Any) -> Any:
    return result[1]


def _rest(result: Any) -> Any:
    return tuple(result[1:])


# For cells that were called without a state: how to read it, by the structure of their result.
_readings: WeakKeyDictionary[Module, dict[str, Callable[[Any], Any]]] = WeakKeyDictionary()


def _reading(cell: Module, x: Tensor, state: Any, result: Any) -> Callable[[Any], Any]:
    """The function that takes the next state from a cell's result."""
    if isinstance(result, Tensor) or len(result) < 2:
        return _whole
    ways = [_whole, _second if len(result) == 2 else _rest]
    if state is not None:
        return next((way for way in ways if fits(way(result), state)), _whole)
    likely = ways[1] if len(result) == 2 and not isinstance(result[1], Tensor) else _whole
    if torch.compiler.is_dynamo_compiling():  # it cannot trace the trial call
        return likely
    known = _readings.setdefault(cell, {})
    kind = outline(result)
    if kind not in known:
        found = next((way for way in ways if _goes_in(cell, x, way(result), way)), None)
        if found is None:  # the cell needs values
            return likely
        known[kind] = found
    return known[kind]


def _goes_in(cell: Module, x: Tensor, state: Any, way: Callable[[Any], Any]) -> bool:
    """Whether the cell accepts this state and returns one like it, found without computing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            x, state = mapped(fake, (x, state))
            # Without hooks, which have already received the real call.
            return fits(way(cell.forward(x, state)), state)
        except Exception:
            return False  # any error means that it does not accept this state


class Run:
    """One cell over a sequence in one direction.

    Arguments:
        valid: bool (T, B), True at valid steps; the sequence is 0 elsewhere.
    """

    def __init__(
        self, cell: Cell, return_states: bool, valid: Tensor | None, reverse: bool
    ) -> None:
        self.cell, self.return_states = cell, return_states
        self.valid, self.reverse = valid, reverse
        # A forward hook must receive the values of every step.
        self.watched = any(module._forward_hooks for module in cell.cell.modules())

    def __call__(self, sequence: Tensor, state: Any, starts: Tensor | None) -> tuple[Any, Any]:
        """The final state, and ``(output, states)`` of all steps; states may be None.

        Arguments:
            sequence: (T, B, …).
            state: the initial state; None: the cell's own.
            starts: bool (T, B), True where an episode begins.
        """
        if starts is not None:
            return self._with_starts(sequence, state, starts)
        if state is None:
            return self._without_state(sequence)
        return self._walk(self.step, state, sequence, self.valid)

    def step(self, state: Any, x: Tensor) -> tuple[Any, Any]:
        output, after = self.cell(x, state)
        return after, (output, after if self.return_states else None)

    def first(self, x: Tensor) -> tuple[Any, Any]:
        """One step of x (rows, …) from the cell's own initial state."""
        state, y = self.step(None, x)
        rows = x.shape[0]
        for path, leaf in Tree(f"{self.cell.name}: state", state, "return a tensor").named():
            if leaf.shape[:1] != (rows,):
                raise ValueError(
                    f"{path} must have shape (B, …) beside input (B, …), with B = {rows}, got "
                    f"{tuple(leaf.shape)}"
                )
        return state, y

    def _walk(
        self,
        step: Any,
        state: Any,
        xs: Any,
        valid: Tensor | None,
        fresh: Tensor | None = None,
        start: Any = None,
    ) -> tuple[Any, Any]:
        carry, x = Tree("state", state), Tree("input", xs)
        steps, rows = x.tensors[0].shape[:2]
        calls = Calls(step, carry, x, who=self.cell.name, carry_name="state", rows=rows)
        begin = None if fresh is None else Tree("state", start).tensors
        final, ys = walk(
            calls, carry.tensors, x.tensors, steps, self.reverse, valid, fresh, begin, self.watched
        )
        return carry.build(final), calls.build_y(ys)

    def _without_state(self, sequence: Tensor) -> tuple[Any, Any]:
        """Calls the cell with None at the first step of each sequence."""
        if self.valid is None and not self.watched:
            results = program.whole(self.step, sequence, self.reverse)
            if results is not None:
                return results
        known = None if self.watched else program.start(self.step, sequence)
        if known is not None:
            return self._walk(self.step, known, sequence, self.valid)
        valid, reverse = self.valid, self.reverse
        steps, rows = sequence.shape[:2]
        # In reverse a sequence starts at its last valid step.
        first = sequence[-1 if reverse else 0]
        if valid is not None and reverse:
            at = (valid.sum(0) - 1).clamp(min=0)
            first = sequence[at, torch.arange(rows, device=at.device)]
        state, y = self.first(first)
        if valid is not None:  # sequences of length 0
            state, y = mapped(lambda leaf: zero_past(valid[0], leaf), (state, y))
        y = mapped(lambda leaf: leaf.unsqueeze(0), y)
        if steps == 1:
            return state, y
        rest = sequence[:-1] if reverse else sequence[1:]
        # The mask is the same in both directions: forwards step t + 1 is valid, in reverse step t
        # is not the last one.
        state, ys = self._walk(self.step, state, rest, None if valid is None else valid[1:])
        if not reverse:
            return state, mapped(lambda one, more: torch.cat([one, more]), y, ys)
        if valid is None:
            return state, mapped(lambda one, more: torch.cat([more, one]), y, ys)
        begins = _last_steps(valid)
        padded = mapped(lambda one, more: torch.cat([more, torch.zeros_like(one)]), y, ys)
        return state, mapped(lambda one, every: choose(begins, one, every), y, padded)

    def _with_starts(self, sequence: Tensor, state: Any, starts: Tensor) -> tuple[Any, Any]:
        """Where episodes begin, uses the results of the cell called with None."""
        steps, rows = sequence.shape[:2]
        known = None if self.watched else program.start(self.step, sequence)
        if known is not None:
            fresh = fresh_steps(starts, self.valid, self.reverse)
            begin = known if state is None else state
            return self._walk(self.step, begin, sequence, self.valid, fresh, known)
        after, y = self.first(sequence.flatten(0, 1))
        own = mapped(lambda leaf: leaf.unflatten(0, (steps, rows)), (after, y))
        fresh = fresh_steps(starts, self.valid, self.reverse)
        if state is None:
            state = mapped(lambda leaf: torch.zeros_like(leaf[0]), own[0])
            begins = torch.zeros_like(fresh)
            if not self.reverse:
                begins[0] = True
            elif self.valid is None:
                begins[-1] = True
            else:
                begins = _last_steps(self.valid)
            fresh = fresh | begins

        def step(state: Any, x: Any) -> tuple[Any, Any]:
            x, fresh, own = x
            # 0, so that no value of the previous episode, not even a NaN, enters the cell.
            before = mapped(lambda leaf: choose(fresh, torch.zeros_like(leaf), leaf), state)
            after, y = self.step(before, x)
            return (
                mapped(lambda new, old: choose(fresh, new, old), own[0], after),
                mapped(lambda new, old: choose(fresh, new, old), own[1], y),
            )

        return self._walk(step, state, (sequence, fresh, own), self.valid)


def _last_steps(valid: Tensor) -> Tensor:
    """Bool (T, B): whether a step is the last valid one of its sequence."""
    return valid & ~torch.cat([valid[1:], torch.zeros_like(valid[:1])])
