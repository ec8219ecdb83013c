"""The operations that layers and cells record while ``torch.onnx.export`` traces a model.

For the exporter based on torch.export, each layer of a stack records an LSTM, GRU or RNN node of
standard ONNX with ``torch.onnx.ops.symbolic_multi_out``, and torch operations around the nodes. The
older exporter (``dynamo=False``) traces with torch.jit and supports torch's own recurrent
functions, so the layers call these. Neither needs a translation table.

A program that ``torch.export.export`` made earlier contains fastrnn's operator, and needs
`fastrnn.onnx_translation_table`.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._engine import NO_EXTRAS, Extras, States
from ..calls import torch_route
from . import onnx_nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._options import Options

Result = tuple[Tensor, tuple[Tensor, ...], States | None]

# Options that torch's own functions support.
_OF_TORCH = ("cell", "num_layers", "bidirectional", "bias", "grad_clip", "recompute")


def route(usual: Callable[..., Result]) -> Callable[..., Result]:
    """``usual``, or the function that replaces it while torch.onnx.export traces."""
    if torch.compiler.is_compiling():
        return _symbolic if _is_exporting() else usual
    if torch._C._get_tracing_state() is not None and _is_exporting():
        return _torchs
    return usual


def _is_exporting() -> bool:
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in calls/call.py


def _symbolic(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    extras: Extras = NO_EXTRAS,
    return_states: bool = False,
    dropout: float = 0.0,
    **_: Any,
) -> Result:
    """As `recurrent`, with one ONNX node for each layer."""
    onnx_nodes.check_options(options, return_states)
    onnx_nodes.check_arrays({**extras._asdict(), "batch_sizes": batch_sizes, "reset": reset})
    D, layers = options.directions, options.num_layers
    each = len(weights) // (layers * D)
    hidden_size = weights[1].shape[-1]
    steps, rows = input.shape[:2]
    named = {"hidden_size": hidden_size, **onnx_nodes.attributes(options)}
    count = None if lengths is None else lengths.to(torch.int32)
    x, outputs, finals = input, [], []
    for layer in range(layers):
        if layer and dropout > 0:
            x = F.dropout(x, dropout, training=True)
        own = slice(layer * D, (layer + 1) * D)
        groups = [weights[g * each : (g + 1) * each] for g in range(layers * D)[own]]
        w, r, *b = (
            torch.stack([_onnx_order(options, group[k]) for group in groups]) for k in range(each)
        )
        initial = () if hx is None else tuple(state[own] for state in hx)
        given = [x, w, r, torch.cat(b, -1) if b else None, count, *initial]
        state = (D, rows, hidden_size)
        shapes = [(steps, *state), *(state,) * (2 if options.cell == "LSTM" else 1)]
        y, *last = torch.onnx.ops.symbolic_multi_out(
            options.cell, given, named, dtypes=[x.dtype] * len(shapes), shapes=shapes
        )
        x = y.squeeze(1) if D == 1 else y.permute(0, 2, 1, 3).flatten(2)
        outputs.append(x)
        if lengths is not None and initial:
            none = (lengths == 0).unsqueeze(-1)  # where ONNX returns zeros
            last = [torch.where(none, s0, s) for s0, s in zip(initial, last, strict=True)]
        finals.append(last)
    hx_n = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    return x, hx_n, States(torch.stack(outputs)) if return_states else None


def _onnx_order(options: Options, weight: Tensor) -> Tensor:
    """(G·H, …) with the gates in ONNX's order."""
    parts = weight.chunk(options.gates)
    return torch.cat([parts[gate] for gate in onnx_nodes.ORDER[options.cell]])


def _torchs(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    extras: Extras = NO_EXTRAS,
    return_states: bool = False,
    dropout: float = 0.0,
    **_: Any,
) -> Result:
    """As `recurrent`, with torch's own function."""
    _check_torch_has_it(options, lengths=lengths, reset=reset, return_states=return_states)
    train = dropout > 0
    return *torch_route.call(options, input, hx, weights, batch_sizes, dropout, train), None


def _check_torch_has_it(options: Options, **call: Any) -> None:
    found = {}
    for field in fields(options):
        value = getattr(options, field.name)
        relu = field.name == "activation" and options.cell == "RNN" and value == "relu"
        if field.name not in _OF_TORCH and not relu and value != field.default:
            found[field.name] = f"={value!r}"
    found |= {name: "=" for name, value in call.items() if value is not None and value is not False}
    for name, value in found.items():
        raise ValueError(
            f"torch.onnx.export(dynamo=False) has no equal for {name}{value} of fastrnn's "
            f"{options.cell}: use dynamo=True, which supports more, or {onnx_nodes.UNROLLED}"
        )
