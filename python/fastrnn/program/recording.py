"""What a step did on stand-ins: its calls, the tensors that it closes over, its program."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .. import _C
    from .ir import Graph
    from .stand_ins import Traced


class Changed(Exception):
    """The step differs from its recording."""


class Leaf(NamedTuple):
    """A leaf of the carry or of x."""

    shape: tuple[int, ...]  # without rows
    dtype: torch.dtype
    rowed: bool  # whether its first axis is the rows

    @property
    def width(self) -> int:
        return math.prod(self.shape)


@dataclass
class Call:
    """One call of a torch function in the step.

    ``simple``: the arguments if all are tensors or numbers, each with its kind: a stand-in, the
    slot of a captured tensor, or a number (see `Session`).
    """

    func: Any
    grad: bool
    key: Any = None
    simple: list[tuple[int, Any]] | None = None
    outputs: Any = None


@dataclass
class Captured:
    """A tensor that the step closes over."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    dense: bool
    is_parameter: bool  # else the step may create it, even from random numbers
    # "shared" by all rows; "fixed": its first axis is the rows; "alike": its first axis is the rows
    # of the stand-ins, which are all equal.
    kind: str

    def fits(self, tensor: Tensor, rows: int | None, of_stand_ins: int) -> bool:
        """Whether another tensor can replace it; rows: B of the call, and the stand-ins' rows."""
        if tensor.dtype is not self.dtype or (type(tensor) is Parameter) is not self.is_parameter:
            return False
        shape = tensor.shape
        if self.kind == "fixed":
            return len(shape) > 0 and shape[1:] == self.shape and shape[0] == rows
        if self.kind == "alike":
            return shape == (of_stand_ins, *self.shape[1:]) and all_alike(tensor)
        return shape == self.shape and tensor.stride() == self.strides


def all_alike(tensor: Tensor) -> bool:
    """Whether all rows are equal."""
    if torch._C._len_torch_dispatch_stack() > 0:  # tensors of a graph have no values
        return type(tensor) is Tensor
    plain = tensor.detach()
    return torch.equal(plain[:1].expand_as(plain), plain)


@dataclass
class Run:
    """What a step did on stand-ins with ``rows`` rows."""

    rows: int
    inputs: list[Traced]
    calls: list[Call] = field(default_factory=list)
    structure: Any = None  # of the returned values
    compared: _C.StandInCalls | None = None  # the calls, for replays


@dataclass
class Recording(Run):
    """What a step did, and its program."""

    captured: list[Captured] = field(default_factory=list)
    graph: Graph | None = None  # None: untraceable, for this reason
    reason: str = ""
    # Shared inputs: the slot of a captured tensor, and its elements; None: all.
    shared: list[tuple[int, Tensor | None]] = field(default_factory=list)
    fixed: list[tuple[str, int]] = field(default_factory=list)  # ("captured", slot), ("carry", k)
    kept: frozenset[int] = frozenset()  # carries that a step returns unchanged
    alike_y: frozenset[int] = frozenset()  # outputs without an axis of rows
    y_shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # without rows
    y_bool: frozenset[int] = frozenset()
    executable: Any = None  # the `Executable` of run.py
    nodes: list[Any] = field(default_factory=list)  # of the program before compaction
    start: Any = None  # the result of start.py
    only_parameters: bool = False  # whether the step closes over nothing else
    warned: bool = False  # whether the warning about the loop was given
    others: dict[int, Run] = field(default_factory=dict)  # by batch size
    only: int | None = None  # the only valid B, if the step depends on B


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill contiguous memory, with any order of axes."""
    size = 1
    for axis in sorted(range(len(shape)), key=lambda a: (strides[a], shape[a])):
        if shape[axis] != 1 and strides[axis] != size:
            return False
        size *= shape[axis]
    return True


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides with which the engine reads it: its own if it is dense, else contiguous ones."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    return strides if is_dense(shape, strides) else contiguous_strides(shape)
