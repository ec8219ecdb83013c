"""Checks that a step still matches its recording.

Every call runs the step on stand-ins and compares each torch function that it calls with the
recorded one: functions, constants, shapes. This costs a few microseconds for each torch call in the
step, and detects every change of a closure, an attribute, a mode or a hook. The tensors that the
step closes over are collected again, so a replaced weight is used.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import _C
from .recording import Call, Changed, Recording, Run, contiguous_strides, dense_strides
from .stand_ins import Session, Traced, Untraceable, new_meta, on_meta

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Comparison(Session):
    """A run that is compared with a recording."""

    def __init__(self, recording: Recording, run: Run, batch: int | None) -> None:
        super().__init__(batch)
        self.recording, self.run = recording, run

    def slot_of(self, tensor: Any) -> int:
        """The slot of a tensor that the step closes over."""
        if not isinstance(tensor, Tensor) or type(tensor) is Traced:
            self.changed()
        slot = self.slots.get(id(tensor))
        if slot is None:
            slot, captured = len(self.tensors), self.recording.captured
            if slot >= len(captured) or not captured[slot].fits(tensor, self.batch, self.run.rows):
                self.changed()
            self.slots[id(tensor)] = slot
            self.tensors.append(tensor)
        return slot

    _slot = slot_of

    def changed(self) -> NoReturn:
        """The step differs from its recording."""
        raise self.failed(Changed())


class _Replay(_Comparison):
    """A replay; _C.StandInCalls compares call by call."""

    at = 0  # the number of calls so far

    def step(self, step: Any, carry: list[Any], xs: list[Any]) -> Any:
        if self.run.compared is None:
            self.run.compared = _C.StandInCalls(self.run.calls)
        with self.filling(step):
            self.at, results = self.run.compared.replay(self, step, carry, xs)
        return results

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.changed()  # _C.StandInCalls expected another function

    def matched(self, known: Call, args: Any, kwargs: Any) -> Any:
        """The results of a call of the expected function whose arguments are not simple."""
        if self.key(args, kwargs or {}) != known.key or torch.is_grad_enabled() is not known.grad:
            self.changed()
        if known.outputs is None:  # the untraceable call
            raise self.failed(Untraceable(self.recording.reason))
        return known.outputs


class _OtherRows(_Comparison):
    """A run with as many rows as the batch: whether the step matches its recording for them.

    A step may depend on the number of rows in Python, as ``if x.shape[0] == 1`` does, and in torch,
    as ``x.squeeze()`` does. Later replays are compared with `run`.
    """

    def __init__(self, recording: Recording, rows: int) -> None:
        super().__init__(recording, Run(rows, []), rows)
        self.numbers = 0
        self.metas: dict[int, Tensor] = {}  # by slot
        self.run.inputs = [self._stand_in(like) for like in recording.inputs]

    def _stand_in(self, like: Traced) -> Traced:
        shape = tuple(like.traced_meta.shape)
        if like.traced_view.rows:
            shape = (self.run.rows, *shape[1:])
        meta = new_meta(shape, contiguous_strides(shape), like.traced_meta.dtype)
        return self._traced(meta, like)

    def _traced(self, meta: Tensor, like: Traced) -> Traced:
        self.numbers += 1
        return Traced.make(meta, like.traced_view, self.numbers - 1)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        run, known = self.run, self.recording.calls
        if len(run.calls) == len(known):
            self.changed()
        like = known[len(run.calls)]
        call = Call(func, torch.is_grad_enabled(), self.key(args, kwargs))
        call.simple = None if kwargs else self._simple(args)
        if (call.func, call.grad) != (like.func, like.grad) or not self.same(call.key, like.key):
            self.changed()
        run.calls.append(call)
        if like.outputs is None:
            raise self.failed(Untraceable(self.recording.reason))
        call.outputs = self._outputs(on_meta(self, func, args, kwargs), like.outputs)
        return call.outputs

    def same(self, mine: Any, known: Any) -> bool:
        """Whether everything is equal, or numbers have the ratio of the rows."""
        if type(mine) is tuple and type(known) is tuple:
            return len(mine) == len(known) and all(map(self.same, mine, known))
        if type(mine) is int and type(known) is int and known > 0 and mine != known:
            return mine * self.recording.rows == known * self.run.rows
        return bool(mine == known)

    def _outputs(self, value: Any, known: Any) -> Any:
        if isinstance(value, Tensor):
            if not self.same(tuple(value.shape), tuple(known.traced_meta.shape)):
                self.changed()
            return self._traced(value, known)
        if isinstance(value, (list, tuple)):
            return type(value)([self._outputs(v, k) for v, k in zip(value, known, strict=True)])
        return value

    def meta(self, tensor: Tensor) -> Tensor:
        slot = self.slots[id(tensor)]
        if slot not in self.metas:
            self.metas[slot] = new_meta(tensor.shape, dense_strides(tensor), tensor.dtype)
        return self.metas[slot]


def replay(
    recording: Recording, step: Any, carry_count: int, batch: int | None
) -> list[Tensor] | None:
    """The tensors that ``step`` closes over; None if it differs from its recording."""
    if not recording.inputs:  # its leaves cannot be stand-ins
        return []
    run: Run = recording
    if recording.graph is not None and type(batch) is int and batch > 0:
        if batch not in recording.others:
            return _of_rows(recording, step, carry_count, batch)
        run = recording.others[batch]
    elif recording.only not in (None, batch):
        return None
    session = _Replay(recording, run, batch)
    if not _does(session, step, run, carry_count) or session.at != len(run.calls):
        return None
    if recording.only is not None and holds(recording, step, carry_count, batch):
        return None
    return session.tensors


def holds(recording: Recording, step: Any, carry_count: int, batch: int | None) -> bool:
    """Whether the step matches its recording for this batch size."""
    if type(batch) is not int or batch == 0:
        return True
    return _of_rows(recording, step, carry_count, batch) is not None


_MOST_SIZES = 16


def _of_rows(recording: Recording, step: Any, carry_count: int, batch: int) -> list[Tensor] | None:
    """As `replay`, for a new batch size."""
    with normal_mode():
        session = _OtherRows(recording, batch)
    run = session.run
    if not _does(session, step, run, carry_count) or len(run.calls) != len(recording.calls):
        return None
    if not session.same(run.structure, recording.structure):
        return None
    if len(recording.others) >= _MOST_SIZES:
        recording.others.pop(next(iter(recording.others)), None)
    recording.others[batch] = run
    return session.tensors


def _does(session: _Replay | _OtherRows, step: Any, run: Run, carry_count: int) -> bool:
    """Whether the step matches its recording to its end, or to the call that was untraceable."""
    recording, inputs = session.recording, run.inputs
    untraceable = recording.graph is None and recording.only is None
    generators = Generators(untraceable)
    same = drawn = False
    structure = None
    try:
        with session, normal_mode():
            carry, xs = list(inputs[:carry_count]), list(inputs[carry_count:])
            nexts, ys = session.step(step, carry, xs)
            structure = (session._key(list(nexts)), session._key(list(ys)))
        same = session.failure is None
    except Exception:
        pass
    finally:
        # A tensor that the step closes over, if it is no parameter, may be random.
        if not same or not recording.only_parameters:
            drawn = generators.restore()
    if not same or (drawn and not untraceable):
        return untraceable and not isinstance(session.failure, Changed)
    if isinstance(session, _OtherRows):
        run.structure = structure
        return True
    return untraceable or bool(structure == run.structure)


class Generators:
    """The states of the random number generators; ``every``: also those of Python and NumPy."""

    def __init__(self, every: bool) -> None:
        with _without_modes():
            self.state = torch.default_generator.get_state()
        self.others = _other_generators() if every else None

    def restore(self) -> bool:
        """Restores the states; returns whether random numbers were drawn."""
        with _without_modes():
            drawn = not torch.equal(self.state, torch.default_generator.get_state())
        if drawn:
            with _disable_current_modes():
                torch.set_rng_state(self.state)
        if self.others is not None:
            drawn = drawn or repr(self.others) != repr(_other_generators())
            random.setstate(self.others[0])
            np.random.set_state(self.others[1])  # noqa: NPY002
        return drawn


def _other_generators() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def normal_mode() -> AbstractContextManager[None]:
    """Leaves inference mode, in which composite operations do not decompose."""
    return _left_inference() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _left_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _without_modes() -> AbstractContextManager[Any]:
    inside = torch._C._len_torch_dispatch_stack() > 0
    return _disable_current_modes() if inside else nullcontext()
