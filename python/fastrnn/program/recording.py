"""What a step did with stand-ins: its calls, the tensors that it closes over, its program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .. import _C
    from .ir import Graph
    from .stand_ins import Traced


class Untraceable(Exception):
    """The step runs as a loop; the message names the operation, the reason and the line."""


class Changed(Exception):
    """The step did something else than when it was recorded."""


class Leaf(tuple[Any, ...]):
    """Of a leaf of carry or x: (shape without rows, dtype, whether its first axis is the rows)."""

    __slots__ = ()


@dataclass
class Call:
    """One call of a torch function in the step.

    ``simple`` holds the arguments where each is a tensor or a number: a stand-in, the slot of a
    captured tensor or the number itself, with which of them it is.
    """

    func: Any
    grad: bool
    key: Any = None
    simple: list[tuple[int, Any]] | None = None
    outputs: Any = None


STAND_IN, CAPTURED, NUMBER = range(3)


@dataclass
class Captured:
    """A tensor that the step closes over."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    dense: bool
    is_parameter: bool  # else it may be made anew, and of random numbers
    kind: str  # shared, fixed (its first axis is the rows) or alike (the stand-ins' rows, equal)

    def fits(self, tensor: Tensor, rows: int | None, of_stand_ins: int) -> bool:
        """Whether another tensor can take its place; rows: B of the call, and the stand-ins'."""
        if tensor.dtype is not self.dtype or (type(tensor) is Parameter) is not self.is_parameter:
            return False
        shape = tensor.shape
        if self.kind == "fixed":
            return len(shape) > 0 and shape[1:] == self.shape and shape[0] == rows
        if self.kind == "alike":
            return shape == (of_stand_ins, *self.shape[1:]) and all_alike(tensor)
        return shape == self.shape and tensor.stride() == self.strides


def all_alike(tensor: Tensor) -> bool:
    """Whether all its rows are equal."""
    if torch._C._len_torch_dispatch_stack() > 0:  # in a graph that is being made; no values there
        return type(tensor) is Tensor
    plain = tensor.detach()
    return torch.equal(plain[:1].expand_as(plain), plain)


@dataclass
class Run:
    """What a step did with stand-ins of so many rows."""

    rows: int
    inputs: list[Traced]
    calls: list[Call] = field(default_factory=list)
    structure: Any = None  # of what it returned
    compared: _C.StandInCalls | None = None  # the calls, to be compared with


@dataclass
class Recording(Run):
    """What a step did, and the program of it."""

    captured: list[Captured] = field(default_factory=list)
    graph: Graph | None = None  # None: untraceable, for this reason
    reason: str = ""
    shared: list[tuple[int, Tensor | None]] = field(default_factory=list)  # captured, its elements
    fixed: list[tuple[str, int]] = field(default_factory=list)  # ("captured", slot), ("carry", k)
    kept: frozenset[int] = frozenset()  # carries that every step hands on as they are
    alike_y: frozenset[int] = frozenset()  # outputs without an axis of rows
    y_shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # without rows
    y_bool: frozenset[int] = frozenset()
    executable: Any = None  # what run.py makes of the program
    nodes: list[Any] = field(default_factory=list)  # of the program before it was compacted
    start: Any = None  # what start.py found
    parameters_alone: bool = False  # nothing but parameters is closed over
    told: bool = False  # whether the warning about the loop was given
    others: dict[int, Run] = field(default_factory=dict)  # by batch size
    only: int | None = None  # the only B it is valid for, where the step depends on B


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a run of memory, in whatever order of the axes."""
    size = 1
    for axis in sorted(range(len(shape)), key=lambda a: (strides[a], shape[a])):
        if shape[axis] != 1 and strides[axis] != size:
            return False
        size *= shape[axis]
    return True


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides with which the engine gets it: its own where its elements fill their memory."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    return strides if is_dense(shape, strides) else contiguous_strides(shape)
