"""Small stacks to test with: every option, and the ways to say which rows run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn._arguments import weight_names
from fastrnn._options import Options

SIZES = (4, 3, 2, 3)  # T, B, I, H
P = 2
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}

STACKS = {
    "rnn": Options("RNN"),
    "rnn-sigmoid-2": Options("RNN", num_layers=2, activation="sigmoid"),
    "gru": Options("GRU"),
    "gru-bidirectional-2": Options("GRU", num_layers=2, bidirectional=True),
    "gru-before-no-bias": Options("GRU", bias=False, reset_after=False),
    "lstm": Options("LSTM"),
    "lstm-identity-hard": Options("LSTM", activation="identity", gate_activation="hardsigmoid"),
    "lstm-bidirectional-2": Options("LSTM", num_layers=2, bidirectional=True, bias=False),
    "lstm-projected": Options("LSTM", num_layers=2, bidirectional=True, proj_size=P),
}
STEPS = ("padded", "lengths", "reset", "lengths-reset", "packed")


class Case(NamedTuple):
    """The arguments of `recurrent`."""

    options: Options
    input: Tensor
    hx: tuple[Tensor, ...]
    weights: list[Tensor]
    steps: dict[str, Tensor]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.input, *self.hx, *self.weights)

    def with_leaves(self, *leaves: Tensor) -> Case:
        states = len(self.hx)
        return self._replace(
            input=leaves[0], hx=leaves[1 : 1 + states], weights=list(leaves[1 + states :])
        )


def make(
    options: Options,
    steps: str = "padded",
    *,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
    seed: int = 0,
    sizes: tuple[int, int, int, int] = SIZES,
) -> Case:
    """A stack with random arguments; ``steps`` is one of `STEPS`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.7).to(dtype)
        return x.requires_grad_(requires_grad)

    t, b, i, h = sizes
    out = options.proj_size or h
    directions = 2 if options.bidirectional else 1
    gates = GATES[options.cell]
    weights = []
    for name in weight_names(options):
        kind, _, layer = name.removesuffix("_reverse").rpartition("_l")
        columns = {"weight_ih": i if layer == "0" else directions * out, "weight_hh": out}
        if kind == "weight_hr":
            weights.append(random(out, h))
        elif kind in columns:
            weights.append(random(gates * h, columns[kind]))
        else:
            weights.append(random(gates * h))
    groups = options.num_layers * directions
    hx: tuple[Tensor, ...] = (random(groups, b, out),)
    if options.cell == "LSTM":
        hx += (random(groups, b, h),)
    given: dict[str, Any] = {}
    if "lengths" in steps:
        given["lengths"] = torch.tensor([(3, 0, t)[k % 3] for k in range(b)])
    if "reset" in steps:
        given["reset"] = torch.rand(t, b, generator=generator) < 0.4
    if steps == "packed":
        given["batch_sizes"] = torch.tensor([max(1, b - k) for k in range(t)])
        return Case(options, random(int(given["batch_sizes"].sum()), i), hx, weights, given)
    return Case(options, random(t, b, i), hx, weights, given)
