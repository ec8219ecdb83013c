"""Programs of options on torch tensors: what the operators of _ops.py run for such calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._by_program import Call, Cotangents, Given, Gradients, Outputs
from ._engine import Extras

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._options import Options


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
    """Of what an operator takes: input, h0, c0, weights, the rows of steps, the extras."""
    input, h0, c0, weights, batch_sizes, lengths, reset, *extras = arguments[:12]
    given = Given(input, h0, c0, weights, batch_sizes, lengths, reset, Extras(*extras))
    return Call(TorchArrays(input.dtype), options, str(input.dtype).removeprefix("torch."), given)


class FrozenWeights:
    """A layer's weights as they were when it was frozen (fastrnn.freeze).

    Thaws at the first call for which a weight has another address, shape, stride, dtype or version
    counter. A view of each weight is held, so that no other memory can come to lie at its address.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._marks = [_mark(w) for w in weights]
        self._held = [w.detach() for w in weights]
        self._copies: list[Tensor] | None = [w.detach().clone() for w in weights]

    @property
    def packed(self) -> bool:
        """Whether the weights have not changed since, as far as a call has seen."""
        return self._copies is not None

    def find(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The copies, or the weights themselves where these have changed."""
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


@torch.no_grad()
def forward(
    options: Options,
    arguments: tuple[Any, ...],
    outputs: Outputs,
    frozen: FrozenWeights | None = None,
) -> None:
    if frozen is not None:
        arguments = (*arguments[:3], frozen.find(arguments[3]), *arguments[4:])
    _call(options, arguments).forward(outputs)


@torch.no_grad()
def backward(
    options: Options,
    arguments: tuple[Any, ...],
    saved: Outputs,
    cotangents: Cotangents,
    gradients: Gradients,
) -> None:
    _call(options, arguments).backward(saved, cotangents, gradients)
