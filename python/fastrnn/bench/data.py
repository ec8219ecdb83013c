"""The arrays of a case, created once and passed to every provider."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrnn.bench.cases import Case

# On a GPU the calls cycle through inputs of this many bytes in all, so that none is still in the
# cache (50 MB of L2 on the largest devices).
ROTATED_BYTES = 128 << 20
MOST_INPUTS = 16


@dataclass
class Data:
    """Inputs, initial states, weights and the gradient of the output for training."""

    inputs: list[Tensor]  # each (T, B, I); more than one on CUDA
    hx: tuple[Tensor, ...]  # (h0,) or (h0, c0), each (L·D, B, H); () for a step, which uses zeros
    # torch's order: w_ih, w_hh, b_ih, b_hh per layer and direction, then layer norm's; for an
    # ensemble with a leading axis of members; empty for a step, whose module holds its weights
    weights: list[Tensor]
    d_output: Tensor  # (T, B, D·H), for an ensemble (members, T, B, D·H)
    reset: Tensor | None = None  # bool (T, B)
    lengths: Tensor | None = None  # int64 (B,)


def make_data(case: Case, device: str) -> Data:
    """Random data from a fixed seed, drawn on the device; weights U(±1/√H), as in a layer."""
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def weight(*shape: int) -> Tensor:
        bound = 1.0 / math.sqrt(case.H)
        shape = (case.members, *shape) if case.members > 1 else shape
        drawn = torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
        return drawn.to(dtype)

    units, weights = case.H, []
    for layer in range(0 if case.is_step else case.layers):
        shapes = case.stack.weight_shapes(case.directions * units if layer else case.I, units)
        for name, shape in [*shapes.items()] * case.directions:
            factor = name in ("norm_ih", "norm_hh", "norm_c")
            weights.append(1 + weight(*shape) if factor else weight(*shape))

    states = 0 if case.is_step else 2 if case.cell == "LSTM" else 1
    groups = case.layers * case.directions
    members = (case.members,) if case.members > 1 else ()
    first = normal(case.T, case.B, case.I)
    copies = 1
    if device != "cpu":
        copies = min(MOST_INPUTS, 1 + ROTATED_BYTES // (first.numel() * first.element_size()))
    data = Data(
        inputs=[first] + [first.clone() for _ in range(copies - 1)],
        hx=tuple(normal(groups, case.B, units) for _ in range(states)),
        weights=weights,
        d_output=normal(*members, case.T, case.B, case.directions * units),
    )
    drawn: Any = {"generator": generator, "device": device}
    if case.reset_rate > 0:
        data.reset = torch.rand((case.T, case.B), **drawn) < case.reset_rate
    if case.lengths:
        data.lengths = torch.randint(1, case.T + 1, (case.B,), **drawn)
    return data
