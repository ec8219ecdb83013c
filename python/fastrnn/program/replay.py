"""Whether a step still does what its program was made of.

It is run on stand-ins in every call, and each torch function that it calls is compared with the
recorded one: functions, constants, shapes. That costs a few microseconds for each call in the step,
and no change of a closure, an attribute, a mode or a hook goes unseen; the tensors that the step
closes over are collected anew, so another weight is simply used.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import _C
from .recording import Call, Changed, Recording, Run, Untraceable, dense_strides
from .stand_ins import META, Session, Traced, on_meta

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Replay(Session):
    """Compares a run with one of a recording; call by call that is done by _C.StandInCalls."""

    def __init__(self, recording: Recording, run: Run, batch: int | None) -> None:
        super().__init__(batch)
        self.recording, self.run = recording, run
        self.at = 0  # how many calls it made

    def step(self, step: Any, carry: list[Any], xs: list[Any]) -> Any:
        """What ``step(carry, xs)`` gives, each of its calls compared."""
        if self.run.compared is None:
            self.run.compared = _C.StandInCalls(self.run.calls)
        with self.filling(step):
            self.at, results = self.run.compared.replay(self, step, carry, xs)
        return results

    def slot_of(self, tensor: Any) -> int:
        """The slot of a tensor that the step closes over."""
        if not isinstance(tensor, Tensor) or type(tensor) is Traced:
            raise self.failed(Changed())
        slot = self.slots.get(id(tensor))
        if slot is None:
            slot = len(self.tensors)
            captured = self.recording.captured
            if slot >= len(captured) or not captured[slot].fits(tensor, self.batch, self.run.rows):
                raise self.failed(Changed())
            self.slots[id(tensor)] = slot
            self.tensors.append(tensor)
        return slot

    _slot = slot_of

    def changed(self) -> None:
        """The step does something else than it did."""
        raise self.failed(Changed())

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.changed()  # another function than at this place before

    def matched(self, known: Call, args: Any, kwargs: Any) -> Any:
        """The results of a call of the expected function whose arguments are no plain ones."""
        if self.key(args, kwargs or {}) != known.key or torch.is_grad_enabled() is not known.grad:
            self.changed()
        if known.outputs is None:  # the one that has no place in a program
            raise self.failed(Untraceable(self.recording.reason))
        return known.outputs


class _OtherRows(Session):
    """A run with as many rows as the batch has: whether the step does with them what is recorded.

    What it does may depend on their number in Python, as of ``if x.shape[0] == 1``, and in torch,
    as of ``x.squeeze()``. `run` is what it did, for the replays that follow.
    """

    def __init__(self, recording: Recording, rows: int) -> None:
        super().__init__(rows)
        self.recording = recording
        self.numbers = 0
        self.metas: dict[int, Tensor] = {}  # of captured tensors
        self.run_rows = rows
        self.run = Run(rows, [self._stand_in(like) for like in recording.inputs])

    def _stand_in(self, like: Traced) -> Traced:
        shape = tuple(like.traced_meta.shape)
        if like.traced_view.rows:
            shape = (self.run_rows, *shape[1:])
        with _disable_current_modes():
            meta = torch.empty(shape, dtype=like.traced_meta.dtype, device=META)
        return self._traced(meta, like)

    def _traced(self, meta: Tensor, like: Traced) -> Traced:
        self.numbers += 1
        return Traced.make(meta, like.traced_view, self.numbers - 1)

    def _slot(self, tensor: Tensor) -> int:
        slot = self.slots.get(id(tensor))
        if slot is None:
            slot, captured = len(self.tensors), self.recording.captured
            rows = self.batch
            assert rows is not None
            if slot >= len(captured) or not captured[slot].fits(tensor, rows, rows):
                raise self.failed(Changed())
            self.slots[id(tensor)] = slot
            self.tensors.append(tensor)
        return slot

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        run, known = self.run, self.recording.calls
        if len(run.calls) == len(known):
            raise self.failed(Changed())
        like = known[len(run.calls)]
        call = Call(func, torch.is_grad_enabled(), self.key(args, kwargs))
        call.simple = None if kwargs else self._simple(args)
        if (call.func, call.grad) != (like.func, like.grad) or not self.same(call.key, like.key):
            raise self.failed(Changed())
        run.calls.append(call)
        if like.outputs is None:
            raise self.failed(Untraceable(self.recording.reason))
        call.outputs = self._outputs(on_meta(self, func, args, kwargs), like.outputs)
        return call.outputs

    def same(self, mine: Any, known: Any) -> bool:
        """Whether all is equal, or in the ratio of the rows."""
        if type(mine) is tuple and type(known) is tuple:
            return len(mine) == len(known) and all(map(self.same, mine, known))
        if type(mine) is int and type(known) is int and known > 0 and mine != known:
            return mine * self.recording.rows == known * self.run.rows
        return bool(mine == known)

    def _outputs(self, value: Any, known: Any) -> Any:
        if isinstance(value, Tensor):
            if not self.same(tuple(value.shape), tuple(known.traced_meta.shape)):
                raise self.failed(Changed())
            return self._traced(value, known)
        if isinstance(value, (list, tuple)):
            return type(value)([self._outputs(v, k) for v, k in zip(value, known, strict=True)])
        return value

    def watched(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def meta(self, tensor: Tensor) -> Tensor:
        slot = self.slots[id(tensor)]
        if slot not in self.metas:
            with _disable_current_modes():
                self.metas[slot] = torch.empty_strided(
                    tensor.shape, dense_strides(tensor), dtype=tensor.dtype, device=META
                )
        return self.metas[slot]


def replay(
    recording: Recording, step: Any, carry_count: int, batch: int | None
) -> list[Tensor] | None:
    """The tensors that ``step`` closes over, where it still does what was recorded; else None."""
    if not recording.inputs:  # of leaves that have no stand-ins
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
        return None  # another step
    return session.tensors


def holds(recording: Recording, step: Any, carry_count: int, batch: int | None) -> bool:
    """Whether the step does with a batch of this size what is recorded."""
    if type(batch) is not int or batch == 0:
        return True
    return _of_rows(recording, step, carry_count, batch) is not None


_MOST_SIZES = 16


def _of_rows(recording: Recording, step: Any, carry_count: int, batch: int) -> list[Tensor] | None:
    """As `replay`, the first time with a batch of this size."""
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
    """Whether the step goes as recorded up to where it ends, or fails as it did before."""
    recording, inputs = session.recording, run.inputs
    untraceable = recording.graph is None and recording.only is None
    chance = Chance(untraceable)
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
        # Parameters are there before the step; what is made in it may be random.
        if not same or not recording.parameters_alone:
            drawn = chance.put_back()
    if not same or (drawn and not untraceable):
        return untraceable and not isinstance(session.failure, Changed)
    if isinstance(session, _OtherRows):
        run.structure = structure
        return True
    return untraceable or bool(structure == run.structure)


class Chance:
    """The states of the generators of random numbers.

    ``everything``: Python's and NumPy's too, of which a step that drew none needs no check.
    """

    def __init__(self, everything: bool) -> None:
        self.state = _rng_state()
        self.others = _other_generators() if everything else None

    def put_back(self) -> bool:
        """As they were; whether random numbers were drawn since."""
        drawn = not _same_rng_state(self.state)
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
    """Leaves inference mode, where composite operations do not decompose."""
    return _left_inference() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _left_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _rng_state() -> Tensor:
    if torch._C._len_torch_dispatch_stack() == 0:
        return torch.default_generator.get_state()
    with _disable_current_modes():
        return torch.get_rng_state()


def _same_rng_state(state: Tensor) -> bool:
    if torch._C._len_torch_dispatch_stack() == 0:
        return torch.equal(state, torch.default_generator.get_state())
    with _disable_current_modes():
        return torch.equal(state, torch.get_rng_state())
