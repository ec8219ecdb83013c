"""Runs calls on torch tensors with the engine's cells or, where options need them, with programs.

`call` returns an object with the ``forward`` of ``_C.Call``; `backward` returns the gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C
from .._engine import Extras, engine_options
from .by_program import (
    Call,
    Cotangents,
    Given,
    Outputs,
    gradients,
    shapes,
    takes,
    takes_backward,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._options import Options


class TorchArrays:
    """`Arrays` of torch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.threads = torch.get_num_threads()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def dense(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        return x.contiguous()

    def columns(self, x: Tensor, columns: slice) -> Tensor:
        return x.narrow(-1, columns.start, columns.stop - columns.start)

    def numbers(self, mask: Tensor) -> Tensor:
        return mask.to(self.dtype, memory_format=torch.contiguous_format)

    def store(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values)

    def is_wide(self, target: Tensor) -> bool:
        return target.dtype == self.dtype and target.is_contiguous()

    def valid(self, counts: Tensor, steps: int, rows: int, packed: bool) -> Tensor:
        if packed:
            return torch.arange(rows) < counts[:, None]
        return torch.arange(steps)[:, None] < counts

    def positions(self, valid: Tensor) -> Tensor:
        return valid.flatten().nonzero().squeeze(1)

    def fresh(self, reset: Tensor, valid: Tensor | None, reverse: bool) -> Tensor:
        if valid is not None:
            reset = reset & valid
        return torch.cat([reset[1:], torch.zeros_like(reset[:1])]) if reverse else reset


def _call(options: Options, arguments: tuple[Any, ...]) -> Call:
    """A call with an operator's arguments."""
    input, h0, c0, weights, batch_sizes, lengths, reset, *extras = arguments[:12]
    given = Given(input, h0, c0, weights, batch_sizes, lengths, reset, Extras(*extras))
    return Call(TorchArrays(input.dtype), options, str(input.dtype).removeprefix("torch."), given)


class FrozenWeights:
    """Copies of a layer's weights, made when it was frozen (fastrnn.freeze).

    Thaws at the first call for which a weight has another address, shape, stride, dtype or version
    counter. A view of each weight is held, so that its address cannot be reused.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._marks = [_mark(w) for w in weights]
        self._held = [w.detach() for w in weights]
        self._copies: list[Tensor] | None = [w.detach().clone() for w in weights]

    @property
    def packed(self) -> bool:
        """Whether no call has found a changed weight."""
        return self._copies is not None

    def find(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The copies, or the weights themselves if they have changed."""
        if self._copies is None:
            return weights
        if self._marks != [_mark(w) for w in weights]:
            self.thaw()
            return weights
        return self._copies

    def thaw(self) -> None:
        self._copies, self._held = None, []


def _mark(weight: Tensor) -> tuple[Any, ...]:
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, version


class _ProgramCall:
    """A call whose forward pass is a program."""

    def __init__(
        self, options: Options, arguments: tuple[Any, ...], frozen: FrozenWeights | None
    ) -> None:
        if frozen is not None:
            arguments = (*arguments[:3], frozen.find(arguments[3]), *arguments[4:])
        self.options, self.arguments = options, arguments

    @torch.no_grad()
    def forward(
        self, states: bool, save: bool, zeros: bool = False, device: Any = None
    ) -> tuple[Tensor | None, ...]:
        """As ``_C.Call.forward``; a program writes every value, so nothing needs to be zeroed."""
        input, batch_sizes = self.arguments[0], self.arguments[4]
        rows = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        saved = save and not self.options.recompute
        sizes = shapes(self.options, self.arguments, rows, states or save, saved)
        compute = torch.float64 if input.dtype == torch.float64 else torch.float32
        dtypes = (*(input.dtype,) * 4, compute, compute)
        outputs = [
            None if size is None else input.new_empty(size, dtype=dtype)
            for size, dtype in zip(sizes, dtypes, strict=True)
        ]
        _call(self.options, self.arguments).forward(Outputs(*outputs))
        return tuple(outputs)


class _CallWithoutSaved:
    """A call of the engine's cells whose backward pass is a program: it saves only h and c."""

    def __init__(self, call: _C.Call) -> None:
        self.call = call

    def forward(
        self, states: bool, save: bool, zeros: bool = False, device: Any = None
    ) -> tuple[Any, ...]:
        """As ``_C.Call.forward``, with hidden and cell alone for backward."""
        return self.call.forward(states or save, False, zeros, device)


def call(options: Options, arguments: Any, frozen: Any = None) -> Any:
    """A call whose ``forward`` runs it.

    Arguments:
        arguments: input, h0, c0, weights, batch_sizes, lengths, reset and the extras, checked.
        frozen: the `FrozenWeights` of a frozen layer, or None.
    """
    extras = Extras(*arguments[7:])
    on_cpu = not arguments[0].is_cuda
    if on_cpu and takes(options, extras):
        return _ProgramCall(options, arguments, frozen)
    resets = extras[:2] if extras[0] is not None else None
    given: Any = (*arguments[:7], resets, torch.get_num_threads(), False, frozen)
    made = _C.Call(engine_options(options), *given)
    return _CallWithoutSaved(made) if on_cpu and takes_backward(options, extras) else made


def backward(
    options: Options,
    arguments: Any,
    saved: Any,
    needs: tuple[bool, ...],
    consume: bool = False,
    cell: bool = False,
    device: Any = None,
) -> list[Tensor | None]:
    """The gradients of input, h0, c0, reset_h, reset_c and each weight; None where not needed.

    Arguments:
        arguments: as for `call`.
        saved: hidden, cell and saved of ``forward``, then the gradients d_output, d_hidden, d_cell,
            d_h_n, d_c_n.
        needs: which gradients; False for arguments that are None.
        consume: whether ``saved`` may be overwritten.
        cell: whether the arguments are those of a cell, without the axes of steps and layers.
    """
    if not arguments[0].is_cuda and takes_backward(options, Extras(*arguments[7:])):
        return _by_program(options, arguments, saved, needs)
    return cells_backward(engine_options(options), arguments, saved, needs, consume, cell, device)


def cells_backward(
    engine: _C.Options,
    arguments: Any,
    saved: Any,
    needs: tuple[bool, ...],
    consume: bool = False,
    cell: bool = False,
    device: Any = None,
) -> list[Tensor | None]:
    """As `backward`, computed by the engine's cells."""
    own = (*needs[:3], *needs[5:])
    given: Any = (*arguments[:7], *saved, own, consume, torch.get_num_threads(), cell, device)
    found = _C.backward(engine, *given)
    return [*found[:3], None, None, *found[3:]]


@torch.no_grad()
def _by_program(
    options: Options, arguments: tuple[Any, ...], saved: tuple[Any, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    input, h0, c0, weights, _, _, _, reset_h, reset_c, *_ = arguments
    leaves = (input, h0, c0, reset_h, reset_c, *weights)
    found = [
        input.new_empty(x.shape) if need else None for x, need in zip(leaves, needs, strict=True)
    ]
    hidden, cell, kept, *cotangents = saved
    if not takes(options, Extras(*arguments[7:])):  # the engine's cells computed forward
        kept = None
    outputs = Outputs(None, None, None, hidden, cell, kept)
    _call(options, arguments).backward(outputs, Cotangents(*cotangents), gradients(found))
    return found
