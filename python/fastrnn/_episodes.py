"""Rows with lengths and resets as the rows of a packed batch, as torch's own call takes them.

An episode is what a row computes from one reset to the next, or to its length. Each becomes a row
of a packed batch, the longest first; its output is put back where it came from. Its first state is
the row's initial one, or what a reset puts in its place, and a row's final state is that of its
last episode; of the reverse direction, which meets the last episode first, it is the other way
round. Sample Factory and RLlib run their policies so.

The order and the sizes are found where the lengths and resets lie. cuDNN wants the sizes on the
host, so values on a device cost one wait for it; lengths on the CPU cost none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._options import Options


class Episodes(NamedTuple):
    """E episodes of N steps in all, in a batch of T steps and B rows."""

    batch_sizes: Tensor  # int64 (S,), on the CPU: how many episodes have a step 0, 1, …
    source: Tensor  # (N,): the place t·B + b of each packed step
    entry: Tensor  # (T·B,): the packed step of each place, 0 where there is none
    idle: Tensor  # bool (T·B, 1): where there is none
    row: Tensor  # (E,): the row of each episode
    first: Tensor  # (B,): the first episode of each row; 0 where it has none
    last: Tensor  # (B,): the last one
    empty: Tensor  # bool (B, 1): rows without any
    cut: Tensor | None  # bool (2, E, 1): it enters by a reset, forwards and in reverse; None: none

    def pack(self, x: Tensor) -> Tensor:
        """(T, B, I) as packed (N, I)."""
        packed: Tensor = _Moved.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, 1), self.source, None, self.entry, self.idle
        )
        return packed

    def unpack(self, y: Tensor) -> Tensor:
        """Packed (N, O) as (T, B, O), zero where nothing runs."""
        steps = self.entry.shape[0] // self.empty.shape[0]
        places: Tensor = _Moved.apply(  # type: ignore[no-untyped-call]
            y, self.entry, self.idle, self.source, None
        )
        return places.reshape(steps, -1, y.shape[1])

    def initial(
        self, options: Options, hx: tuple[Tensor, ...], anew: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The states (L·D, E, units) with which the episodes begin.

        Arguments:
            hx: those of the rows, (L·D, B, units).
            anew: what a reset puts in their place, (L·D, units) each, or None for zeros.
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
        """The states (L·D, B, units) with which the rows end, of those of the episodes."""
        index = self._of_groups(options, self.last.unsqueeze(1), self.first.unsqueeze(1))
        # Contiguous as torch.nn's are, whatever hx is.
        return tuple(
            torch.where(
                self.empty, before, after.gather(1, index.expand(-1, -1, after.shape[2]))
            ).contiguous()
            for after, before in zip(hx_n, hx, strict=True)
        )

    @staticmethod
    def _of_groups(options: Options, forwards: Tensor, reverse: Tensor) -> Tensor:
        """One of each layer and direction, (L·D, …)."""
        return torch.stack((forwards, reverse)[: options.directions]).repeat(
            options.num_layers, *(1,) * forwards.dim()
        )


def find(input: Tensor, lengths: Tensor | None, reset: Tensor | None) -> Episodes | None:
    """The episodes of a batch; None where no row has a step.

    Arguments:
        input: (T, B, I).
        lengths: int64 (B,), on the input's device or on the CPU; what lies outside of 0…T counts as
            the nearest of these. None: T.
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
    batch_sizes = found.batch_sizes.cpu()  # of values on a device, this waits
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
    # Places in the order of their entries. What is idle goes to an entry that is not kept.
    places = torch.empty(T * B + 1, dtype=torch.int64, device=device)
    places.scatter_(0, torch.where(idle, T * B, entry), torch.arange(T * B, device=device))
    row = order[:E] % B
    last = rank.expand(T, B).gather(0, (lengths - 1).clamp(min=0).unsqueeze(0))[0]
    cut = None
    if reset is not None:
        episode = torch.arange(E, device=device)
        # The row's state enters its first episode, but for a reset there; in reverse the last one.
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
    """``x`` on a device, without a wait where that is safe: CUDA takes pageable memory in at once,
    where others may read it after it was freed.
    """
    return x.to(device, non_blocking=device.type == "cuda")


class _Found(NamedTuple):
    """What has a shape that values do not decide."""

    batch_sizes: Tensor  # (T,), zeros at its end
    offset: Tensor  # (T,): the first packed entry of each step
    order: Tensor  # the episodes, the longest first: start time · B + row; then anything
    rank: Tensor  # (T, B) or (B,): the place in that order of the episode that runs
    step: Tensor  # (T, B) or (T, 1): its step


def _of_lengths(lengths: Tensor, T: int) -> _Found:
    order = lengths.argsort(descending=True, stable=True)
    step = torch.arange(T, device=lengths.device).unsqueeze(1)
    batch_sizes = (step < lengths).sum(1)
    return _Found(batch_sizes, _before(batch_sizes), order, order.argsort(), step)


def _of_resets(lengths: Tensor, reset: Tensor) -> _Found:
    T, B = reset.shape
    time = torch.arange(T, device=reset.device).unsqueeze(1)
    start = (time < lengths) & (reset | (time == 0))
    began = torch.where(start, time, 0).cummax(0).values  # of the episode that runs
    next_start = torch.where(start, time, T).flip(0).cummin(0).values.flip(0)  # here or later
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
    """The rows of ``x`` at ``index``, zero where ``idle``; no two come from one place.

    So the gradient is read too (``back``), where torch's of an index adds.
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
