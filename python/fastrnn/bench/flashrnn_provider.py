"""FlashRNN's fused LSTM on CUDA (Pöppel, Beck, Hochreiter 2024), with or without heads.

The caller computes the input projection: here one torch matrix product, which is timed too.
Its gates are in torch's order i,f,g,o; its recurrent weights are (G, heads, H/heads, H/heads).
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fastrnn.bench.prepare import Prepared, UnsupportedError, require_package

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.data import Data


class FlashRnn:
    name: ClassVar[str] = "flashrnn"

    def __init__(self) -> None:
        require_package("flashrnn", "pip install flashrnn (needs a CUDA compiler and g++)")
        self.version = metadata.version("flashrnn")

    def prepare(self, case: Case, data: Data, pass_: Pass) -> Prepared:
        _require_supported(case, data)
        flashrnn = importlib.import_module("flashrnn").flashrnn

        heads, units, gates = case.heads, case.H // case.heads, case.stack.gates
        training = pass_ == "training"
        weight_ih, weight_hh, bias_ih, bias_hh = (w.clone() for w in data.weights)
        by_head = weight_hh.view(heads, gates, units, units).transpose(0, 1).contiguous()
        bias = (bias_ih + bias_hh).view(gates, heads, units)
        states = torch.stack(data.hx).view(2, case.B, 1, heads, units)
        shared = [t.requires_grad_(training) for t in (states, weight_ih, by_head, bias)]
        inputs = [x.detach().requires_grad_(training) for x in data.inputs]

        def infer(i: int) -> tuple[Tensor, Tensor]:
            projected = (inputs[i] @ weight_ih.t()).view(case.T, case.B, gates, heads, units)
            hidden, last = flashrnn(
                projected.transpose(0, 1), by_head, bias, states=states,
                function="lstm", backend="cuda_fused", dtype=case.dtype,
            )  # fmt: skip
            return hidden[0].reshape(case.B, case.T, case.H).transpose(0, 1), last

        def train(i: int) -> Sequence[Tensor]:
            output, _ = infer(i)
            return torch.autograd.grad(output, [inputs[i], *shared], data.d_output)

        def inferred() -> dict[str, Tensor]:
            with torch.inference_mode():
                output, last = infer(0)
            h_n, c_n = last.reshape(2, 1, case.B, case.H)
            return {"output": output, "h_n": h_n, "c_n": c_n}

        def trained() -> dict[str, Tensor]:
            d_input, d_states, d_ih, d_hh, d_bias = train(0)
            d_h0, d_c0 = d_states.reshape(2, 1, case.B, case.H)
            return {
                "d_input": d_input,
                "d_h0": d_h0,
                "d_c0": d_c0,
                "d_weight_ih_l0": d_ih,
                "d_weight_hh_l0": d_hh.transpose(0, 1).reshape(data.weights[1].shape),
                "d_bias_ih_l0": d_bias.flatten(),
                "d_bias_hh_l0": d_bias.flatten(),
            }

        if training:
            return Prepared(train, trained, "FlashRNN cuda_fused")
        return Prepared(infer, inferred, "FlashRNN cuda_fused", torch.inference_mode)


def _require_supported(case: Case, data: Data) -> None:
    if data.d_output.device.type != "cuda":
        raise UnsupportedError("FlashRNN runs only on CUDA")
    if case.cell != "LSTM" or case.layers > 1 or case.bidirectional:
        raise UnsupportedError("FlashRNN is compared only for one LSTM layer in one direction")
    others = [option for option in case.options if option != "heads"]
    if others:
        raise UnsupportedError(f"FlashRNN has no {' and no '.join(others)}")
