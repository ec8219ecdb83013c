"""What torch.autocast does to a recurrent layer or cell.

Everything enters the computation in autocast's dtype. What comes out is torch's affair, and
follows torch.nn: on the CPU an LSTM or GRU adds each step's gates to a state that is still in the
dtype it came in, so its results have the wider of the two dtypes; an Elman RNN computes the state
anew at each step, and oneDNN's LSTM, which torch takes for a padded input without projection, of
float32 or of a half type that this CPU computes in, casts the states too, so their results have
autocast's dtype; and a projected h is a product, which has autocast's dtype. On other devices all
have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def requested(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the input's device, None where it is off."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in autocast's dtype; float64, complex and integers stay as they are."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def result_dtype(
    cell: str, dtype: torch.dtype, input: Tensor, states: Sequence[Tensor] | None, fused: bool
) -> torch.dtype:
    """The dtype of a layer's or cell's results under autocast to ``dtype``.

    Arguments:
        cell: ``"RNN"``, ``"LSTM"`` or ``"GRU"``.
        dtype: the dtype that autocast asks for.
        input: the input, before it is cast.
        states: the initial states, before they are cast; None for zeros of the input's dtype.
        fused: whether torch would take oneDNN's LSTM where that has the input's dtype.
    """
    carried = (states[-1] if states else input).dtype
    if torch.float64 in (input.dtype, carried) or input.is_complex():
        return torch.promote_types(input.dtype, carried)
    casts_states = cell == "RNN" or (fused and _onednn_computes(input.dtype))
    if input.device.type != "cpu" or casts_states:
        return dtype
    return torch.promote_types(dtype, carried)


def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether torch takes oneDNN for ``dtype`` on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        supported = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        return supported and not torch.is_grad_enabled()  # torch has no gradient for it
    return dtype == torch.float32


# A constant of the graph, as torch.compile cannot trace the questions; see calls/call.py.
_onednn_computes._dynamo_marked_constant = True  # type: ignore[attr-defined]
