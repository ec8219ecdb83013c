"""Options that torch.nn does not have, written as torch users write them: peers for these cases.

Each is a module with the call of a layer and the parameter names of fastrnn's layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.calls.arguments import weight_names

if TYPE_CHECKING:
    from fastrnn.bench.cases import Case
    from fastrnn.bench.data import Data


class _ByHand(torch.nn.Module):
    """A module that calls a layer of torch.nn with its own parameters."""

    way: ClassVar[str]

    def __init__(self, layer: torch.nn.Module, case: Case, data: Data) -> None:
        super().__init__()
        self._case = case
        self._layer = [layer]  # in a list, so that its parameters are not this module's
        for name, weight in zip(weight_names(case.stack), data.weights, strict=True):
            self.register_parameter(name, torch.nn.Parameter(weight.clone()))

    def train(self, mode: bool = True) -> _ByHand:
        self._layer[0].train(mode)
        return super().train(mode)

    def _call(self, weights: dict[str, Tensor], x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        output: tuple[Tensor, Any] = functional_call(self._layer[0], weights, (x, hx))
        return output

    def _own(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class StepByStep(_ByHand):
    """Episodes that begin inside a sequence: one call per step; before it, the states of rows that
    start an episode are set to zero."""

    way = "a step at a time"

    def __init__(self, layer: torch.nn.Module, case: Case, data: Data) -> None:
        super().__init__(layer, case, data)
        assert data.reset is not None
        self._keep = ~data.reset[:, None, :, None]  # (T, 1, B, 1)

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        own, outputs = self._own(), []
        for t in range(x.shape[0]):
            keep = self._keep[t]
            hx = tuple(keep * h for h in hx) if isinstance(hx, tuple) else keep * hx
            output, hx = self._call(own, x[t : t + 1], hx)
            outputs.append(output)
        return torch.cat(outputs), hx


class Packed(_ByHand):
    """Rows of different lengths: packed before the layer, padded again after it."""

    way = "packed"

    def __init__(self, layer: torch.nn.Module, case: Case, data: Data) -> None:
        super().__init__(layer, case, data)
        assert data.lengths is not None
        self._lengths = data.lengths.cpu()

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        packed = pack_padded_sequence(x, self._lengths, enforce_sorted=False)
        output, hx_n = functional_call(self._layer[0], self._own(), (packed, hx))
        return pad_packed_sequence(output, total_length=x.shape[0])[0], hx_n


class Heads(_ByHand):
    """A block-diagonal recurrence: one layer per head, with concatenated outputs."""

    way = "a head at a time"

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        heads, own = self._case.heads, self._own()
        states = [h.chunk(heads, -1) for h in (hx if isinstance(hx, tuple) else (hx,))]
        outputs, finals = [], []
        for k in range(heads):
            weights = {
                name: p[k] if name.startswith("weight_hh") else self._rows(p, k)
                for name, p in own.items()
            }
            mine = tuple(s[k].contiguous() for s in states)
            output, last = self._call(weights, x, mine if len(mine) > 1 else mine[0])
            outputs.append(output)
            finals.append(last if isinstance(last, tuple) else (last,))
        whole = tuple(torch.cat(parts, -1) for parts in zip(*finals, strict=True))
        return torch.cat(outputs, -1), whole if len(whole) > 1 else whole[0]

    def _rows(self, p: Tensor, k: int) -> Tensor:
        """Head k's rows of W_ih or a bias, for every gate: a small copy, made once per call."""
        gates = p.view(-1, self._case.heads, cast("int", self._layer[0].hidden_size), *p.shape[1:])
        return gates[:, k].flatten(0, 1)


class Members(_ByHand):
    """An ensemble: one layer after another over the same input."""

    way = "a member at a time"

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        own = self._own()
        members = range(self._case.members)
        found = [self._call({name: p[e] for name, p in own.items()}, x, hx) for e in members]
        outputs, finals = zip(*found, strict=True)
        if isinstance(finals[0], tuple):
            whole: Any = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        else:
            whole = torch.stack(finals)
        return torch.stack(outputs), whole


class LayerNorm(_ByHand):
    """A normalised recurrence (Ba et al. 2016): one projection of all steps, then a loop of torch
    operations; one layer, one direction."""

    way = "operations"

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        p = {name.removesuffix("_l0"): w for name, w in self._own().items()}
        projected = x @ p["weight_ih"].T
        size = projected.shape[-1:]
        a = F.layer_norm(projected, size, p["norm_ih"], p["bias_ih"])
        step = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self._case.cell]
        state = tuple(h[0] for h in (hx if isinstance(hx, tuple) else (hx,)))
        outputs = []
        for a_t in a.unbind():
            b = F.layer_norm(state[0] @ p["weight_hh"].T, size, p["norm_hh"], p["bias_hh"])
            state = step(a_t, b, state, p)
            outputs.append(state[0])
        last = tuple(s[None] for s in state)
        return torch.stack(outputs), last if len(last) > 1 else last[0]

    @staticmethod
    def _rnn(a: Tensor, b: Tensor, state: Any, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (torch.tanh(a + b),)

    @staticmethod
    def _gru(a: Tensor, b: Tensor, state: Any, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        z, n = torch.sigmoid(a_z + b_z), torch.tanh(a_n + torch.sigmoid(a_r + b_r) * b_n)
        return (n + z * (state[0] - n),)

    @staticmethod
    def _lstm(a: Tensor, b: Tensor, state: Any, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
        i, f, g, o = (a + b).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        normal = F.layer_norm(c, c.shape[-1:], p["norm_c"], p["norm_c_bias"])
        return torch.sigmoid(o) * torch.tanh(normal), c
