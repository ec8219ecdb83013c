"""Convert rows with lengths and resets to the packed batch that torch's own operator takes.

An episode is the part of a row from one reset to the next, or to the row's length. Each episode
becomes a row of a packed batch, the longest first; its output is copied back to its steps. In the
forward direction, the row's first episode starts from the row's initial state, every other episode
from the state after a reset, and the row's final state is that of its last episode. The reverse
direction processes the last episode first, so there first and last are exchanged. Sample Factory
and RLlib run their policies in the same way.

The order and the sizes are computed on the device of the lengths and resets. cuDNN needs the sizes
on the host, so values on a device cost one host synchronisation; lengths on the CPU cost none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._options import Options


class Episodes(NamedTuple):
    """E episodes of N steps in all, in a batch of T steps and B rows."""

    batch_sizes: Tensor  # int64 (S,), on the CPU: the number of episodes with a step 0, 1, …
    source: Tensor  # (N,): the position t·B + b of each packed step
    entry: Tensor  # (T·B,): the packed step of each position, 0 if there is none
    idle: Tensor  # bool (T·B, 1): whether the position has no packed step
    row: Tensor  # (E,): the row of each episode
    first: Tensor  # (B,): the first episode of each row; 0 if it has none
    last: Tensor  # (B,): the last episode of each row; 0 if it has none
    empty: Tensor  # bool (B, 1): whether the row has no episode
    cut: Tensor | None  # bool (2, E, 1): starts from a reset, forward and reverse; None: no resets

    def pack(self, x: Tensor) -> Tensor:
        """(T, B, I) as packed (N, I)."""
        packed: Tensor = _Moved.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, 1), self.source, None, self.entry, self.idle
        )
        return packed

    def unpack(self, y: Tensor) -> Tensor:
        """Packed (N, O) as (T, B, O), zero at inactive steps."""
        steps = self.entry.shape[0] // self.empty.shape[0]
        places: Tensor = _Moved.apply(  # type: ignore[no-untyped-call]
            y, self.entry, self.idle, self.source, None
        )
        return places.reshape(steps, -1, y.shape[1])

    def initial(
        self, options: Options, hx: tuple[Tensor, ...], anew: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The initial states (L·D, E, units) of the episodes.

        Arguments:
            hx: the initial states of the rows, (L·D, B, units).
            anew: the states after a reset, (L·D, units) each, or None for zeros.
        """
        of_rows = [state.index_select(1, self.row) for state in hx]
        if self.cut is None:
            return tuple(of_rows)
        cut = self._of_groups(options, *self.cut)
        return tuple(
            torch.where(cut, 0 if start is None else start.unsqueeze(1).to(state.dtype), state)
            for state, start in zip(of_rows, anew, strict=False)
        )

    def final(
        self, options: Options, hx_n: tuple[Tensor, ...], hx: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The final states (L·D, B, units) of the rows, from those of the episodes."""
        index = self._of_groups(options, self.last.unsqueeze(1), self.first.unsqueeze(1))
        # Contiguous like torch.nn's results, independently of hx.
        return tuple(
            torch.where(
                self.empty, before, after.gather(1, index.expand(-1, -1, after.shape[2]))
            ).contiguous()
            for after, before in zip(hx_n, hx, strict=True)
        )

    @staticmethod
    def _of_groups(options: Options, forwards: Tensor, reverse: Tensor) -> Tensor:
        """The value of each layer and direction, (L·D, …)."""
        return torch.stack((forwards, reverse)[: options.directions]).repeat(
            options.num_layers, *(1,) * forwards.dim()
        )


def find(input: Tensor, lengths: Tensor | None, reset: Tensor | None) -> Episodes | None:
    """The episodes of a batch; None if no row has a step.

    Arguments:
        input: (T, B, I).
        lengths: int64 (B,), on the input's device or on the CPU, clamped to 0…T. None: T.
        reset: bool (T, B), True where an episode starts, or None.
    """
    T, B = input.shape[:2]
    if reset is None:
        assert lengths is not None
        lengths = lengths.clamp(0, T)
        found = _of_lengths(lengths, T)
    else:
        where = reset.device
        lengths = torch.full((B,), T, device=where) if lengths is None else lengths.clamp(0, T)
        lengths = _on(where, lengths)
        found = _of_resets(lengths, reset)
    batch_sizes = found.batch_sizes.cpu()  # synchronises with the device of the values
    E, N = int(batch_sizes[0]), int(batch_sizes.sum())
    if N == 0:
        return None
    device = input.device
    order, rank, step, offset, lengths = (
        _on(device, x) for x in (found.order, found.rank, found.step, found.offset, lengths)
    )
    time = torch.arange(T, device=device).unsqueeze(1)
    idle = (time >= lengths).flatten()
    entry = torch.where(idle, 0, (offset[step] + rank).flatten())
    # Positions in the order of their entries; idle positions go to an extra entry that is dropped.
    places = torch.empty(T * B + 1, dtype=torch.int64, device=device)
    places.scatter_(0, torch.where(idle, T * B, entry), torch.arange(T * B, device=device))
    row = order[:E] % B
    last = rank.expand(T, B).gather(0, (lengths - 1).clamp(min=0).unsqueeze(0))[0]
    cut = None
    if reset is not None:
        episode = torch.arange(E, device=device)
        # The row's state enters its first episode, unless a reset is there; in reverse its last.
        by_reset = reset.flatten()[order[:E]] | (order[:E] >= B)
        cut = torch.stack([by_reset, last[row] != episode]).unsqueeze(-1)
    empty = lengths == 0
    return Episodes(
        batch_sizes[: int((batch_sizes > 0).sum())],
        places[:N],
        entry,
        idle.unsqueeze(-1),
        row,
        torch.where(empty, 0, rank.expand(T, B)[0]),
        torch.where(empty, 0, last),
        empty.unsqueeze(-1),
        cut,
    )


def _on(device: torch.device, x: Tensor) -> Tensor:
    """``x`` on a device, without synchronisation where that is safe: CUDA copies pageable memory
    before the call returns, while other devices may read it after it was freed.
    """
    return x.to(device, non_blocking=device.type == "cuda")


class _Found(NamedTuple):
    """The tensors whose shapes do not depend on values."""

    batch_sizes: Tensor  # (T,), with zeros at the end
    offset: Tensor  # (T,): the first packed entry of each step
    order: Tensor  # the episodes, longest first: start time · B + row; the rest is undefined
    rank: Tensor  # (T, B) or (B,): the position in that order of the current episode
    step: Tensor  # (T, B) or (T, 1): the step within the current episode


def _of_lengths(lengths: Tensor, T: int) -> _Found:
    order = lengths.argsort(descending=True, stable=True)
    step = torch.arange(T, device=lengths.device).unsqueeze(1)
    batch_sizes = (step < lengths).sum(1)
    return _Found(batch_sizes, _before(batch_sizes), order, order.argsort(), step)


def _of_resets(lengths: Tensor, reset: Tensor) -> _Found:
    T, B = reset.shape
    time = torch.arange(T, device=reset.device).unsqueeze(1)
    start = (time < lengths) & (reset | (time == 0))
    began = torch.where(start, time, 0).cummax(0).values  # the start of the current episode
    next_start = torch.where(start, time, T).flip(0).cummin(0).values.flip(0)  # at this t or later
    end = torch.cat([next_start[1:], next_start.new_full((1, B), T)]).minimum(lengths)
    length = torch.where(start, end - time, 0).flatten()
    length, order = length.sort(descending=True, stable=True)
    batch_sizes = T * B - torch.searchsorted(length.flip(0), time.flatten(), right=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(T * B, device=reset.device))
    rank = rank.view(T, B).gather(0, began)
    return _Found(batch_sizes, _before(batch_sizes), order, rank, time - began)


def _before(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


class _Moved(torch.autograd.Function):
    """The rows of ``x`` at ``index``, zero where ``idle``; no index occurs twice.

    So the gradient is a gather too (``back``), while torch's gradient of an index accumulates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        idle: Tensor | None,
        back: Tensor,
        idle_back: Tensor | None,
    ) -> Tensor:
        ctx.back = (back, idle_back)
        return _moved(x, index, idle)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _moved(d, *ctx.back), None, None, None, None


def _moved(x: Tensor, index: Tensor, idle: Tensor | None) -> Tensor:
    moved = x.index_select(0, index)
    return moved if idle is None else moved.masked_fill(idle, 0)
