"""Recurrent cells in plain torch, which the suite `cells` measures.

``examples/cells.py`` trains the five cells of `CELLS`, and the page "Your own cell" shows their
source. Nothing here depends on fastrnn: each cell has the call of torch.nn's cells,
``cell(input, state)``, starts from zeros if the state is None, and returns its new state, whose
first tensor is the output.

>>> cell = MGUCell(3, 8)
>>> state = cell(torch.zeros(2, 3))  # (B, I) to (B, H)
>>> cell(torch.zeros(2, 3), state).shape
torch.Size([2, 8])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SLSTMCell(nn.Module):
    """The sLSTM: an LSTM with exponential gates (Beck et al. 2024).

    n is the sum of the weights of what was written to c, so c / n is a weighted mean. m, the
    largest exponent so far, is subtracted in both gates: it cancels in c / n and prevents overflow.

    input (B, I); state (h, c, n, m), each (B, H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 4 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 4 * hidden_size, bias=False)

    def forward(self, input: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        if state is None:
            state = (input.new_zeros(input.shape[0], self.hidden_size),) * 4
        h, c, n, m = state
        i, f, z, o = (self.input(input) + self.hidden(h)).chunk(4, -1)
        kept = F.logsigmoid(f) + m
        m = torch.maximum(kept, i)
        i, f = torch.exp(i - m), torch.exp(kept - m)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        return torch.sigmoid(o) * c / n, c, n, m


class MGUCell(nn.Module):
    """The minimal gated unit: a GRU with one gate (Zhou et al. 2016).

    input (B, I); state (B, H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 2 * hidden_size)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False)
        self.candidate = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:
        h = input.new_zeros(input.shape[0], self.hidden_size) if state is None else state
        a_f, a_n = self.input(input).chunk(2, -1)
        f = torch.sigmoid(a_f + self.gate(h))
        n = torch.tanh(a_n + self.candidate(f * h))
        return h + f * (n - h)


class GRUDCell(nn.Module):
    """A GRU for series with missing values (GRU-D, Che et al. 2018).

    The input is the concatenation of the values (with any content where they are missing), a mask
    that is 1 where there is a value and 0 elsewhere, and the time since the last value. A missing
    value is replaced by the last one, which decays over time to the mean, 0; the hidden state
    decays too.

    input (B, 3·F) with F features; state (h (B, H), last (B, F)).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.features, self.hidden_size = input_size // 3, hidden_size
        self.speed = nn.Parameter(torch.full((self.features,), 0.1))
        self.start = nn.Parameter(torch.full((self.features,), 0.1))
        self.fade_hidden = nn.Linear(self.features, hidden_size)
        self.input = nn.Linear(2 * self.features, 3 * hidden_size)
        self.gates = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.candidate = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        x, seen, elapsed = input.chunk(3, -1)
        if state is None:
            state = (x.new_zeros(x.shape[0], self.hidden_size), torch.zeros_like(x))
        h, last = state
        last = torch.where(seen > 0.5, x, last)
        fade = torch.exp(-F.relu(self.speed * elapsed + self.start))
        x = torch.where(seen > 0.5, x, fade * last)
        h = torch.exp(-F.relu(self.fade_hidden(elapsed))) * h
        a_rz, a_n = self.input(torch.cat([x, seen], -1)).split(
            [2 * self.hidden_size, self.hidden_size], -1
        )
        r, z = torch.sigmoid(a_rz + self.gates(h)).chunk(2, -1)
        n = torch.tanh(a_n + self.candidate(r * h))
        return h + z * (n - h), last


class CfCCell(nn.Module):
    """A closed-form continuous-time cell (CfC, Hasani et al. 2022).

    It approximates the solution of a differential equation of the state after the elapsed time,
    without a solver: a sigmoid of the time interpolates between two candidates.

    input (B, I), whose last feature is the time since the previous step; state (B, H).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.backbone = nn.Linear(input_size + hidden_size, hidden_size)
        self.heads = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:
        h = input.new_zeros(input.shape[0], self.hidden_size) if state is None else state
        elapsed = input[:, -1:]
        features = F.silu(self.backbone(torch.cat([input, h], -1)))
        first, second, speed, start = self.heads(features).chunk(4, -1)
        gate = torch.sigmoid(start - speed * elapsed)
        return gate * torch.tanh(first) + (1 - gate) * torch.tanh(second)


class NormGRUCell(nn.Module):
    """A GRU with several heads and normalised gates.

    The recurrent weights are block-diagonal: each head reads only its own units, so the products
    cost 1/heads as much (as in the xLSTM, Beck et al. 2024). An RMS norm over the pre-activations
    of a head's gates (Zhang & Sennrich 2019) keeps the gates from saturating.

    input (B, I); state (B, H). `hidden_size` is a multiple of `heads`.
    """

    def __init__(self, input_size: int, hidden_size: int, heads: int = 4) -> None:
        super().__init__()
        units = hidden_size // heads
        self.heads, self.units = heads, units
        self.input = nn.Linear(input_size, 3 * hidden_size)
        bound = units**-0.5
        self.hidden = nn.Parameter(torch.empty(heads, units, 3 * units).uniform_(-bound, bound))
        self.norm = nn.RMSNorm(2 * units, eps=1e-5)

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:
        if state is None:
            state = input.new_zeros(input.shape[0], self.heads * self.units)
        h = state.view(-1, self.heads, self.units)
        parts = [2 * self.units, self.units]
        a = self.input(input).view(-1, self.heads, 3 * self.units)
        b = torch.einsum("bki,kio->bko", h, self.hidden)
        (a_rz, a_n), (b_rz, b_n) = torch.split(a, parts, -1), torch.split(b, parts, -1)
        r, z = torch.sigmoid(self.norm(a_rz + b_rz)).chunk(2, -1)
        n = torch.tanh(a_n + r * b_n)
        return (n + z * (h - n)).flatten(-2)


class PlainGRUCell(nn.GRUCell):
    """torch.nn.GRUCell in plain operations, to compare a program with fastrnn.GRU."""

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:
        h = input.new_zeros(input.shape[0], self.hidden_size) if state is None else state
        a_r, a_z, a_n = F.linear(input, self.weight_ih, self.bias_ih).chunk(3, -1)
        b_r, b_z, b_n = F.linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return n + z * (h - n)


class PlainLSTMCell(nn.LSTMCell):
    """torch.nn.LSTMCell in plain operations, to compare a program with fastrnn.LSTM."""

    def forward(
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            state = (input.new_zeros(input.shape[0], self.hidden_size),) * 2
        h, c = state
        gates = F.linear(input, self.weight_ih, self.bias_ih)
        i, f, g, o = (gates + F.linear(h, self.weight_hh, self.bias_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Loop(nn.Module):
    """A layer that calls its cell at every step in a Python loop.

    input (T, B, I); returns the output (T, B, H) and the last state, with a first axis of 1.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs = []
        for x in input:
            state = self.cell(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        last = tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
        return torch.stack(outputs), last


CELLS: dict[str, type[nn.Module]] = {
    "sLSTM": SLSTMCell,
    "MGU": MGUCell,
    "GRU-D": GRUDCell,
    "CfC": CfCCell,
    "NormGRU": NormGRUCell,
}
