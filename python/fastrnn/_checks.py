"""Argument checks of the layers and cells, with torch.nn's error types and messages.

Every check reads only shapes, dtypes and devices, so that none of them waits for a device and all
of them can be traced. The one exception, the values of ``lengths`` on the CPU, is left out while
compiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch_version
from .layers import autocast

_torch_version.check(torch.__version__)

Lengths = Tensor | Sequence[int]
Shape = tuple[int, ...]
_MOST = 2**48  # of any size; no machine has so much memory

MAPPED_BATCH_SIZES = (
    "batch_sizes of a PackedSequence cannot be mapped by vmap: they must be the same all along the "
    "axis. Give a padded tensor and lengths= instead"
)


def check_model(model: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


# ---- tensors and sizes -------------------------------------------------------------------------


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is no tensor, and tensors whose values do not lie in strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense Tensor, got a nested one")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense Tensor, got one of layout {value.layout}")


def check_states(states: Sequence[Any] | None) -> None:
    """Refuse initial states that are no tensors."""
    for index, state in enumerate(states or ()):
        check_tensor("hx" if states is None or len(states) == 1 else f"hx[{index}]", state)


def state_pair(hx: Any, function: str) -> tuple[Any, Any] | None:
    """hx of an LSTM as its two parts; torch.nn takes them apart of one tensor (2, ·) too.

    Raises:
        TypeError: hx is another tensor, or neither a tuple nor a list.
        RuntimeError: it has more or fewer than two parts; torch's error.
    """
    if hx is None:
        return None
    if not isinstance(hx, (tuple, list)) and not (
        isinstance(hx, Tensor) and hx.dim() > 0 and hx.shape[0] == 2
    ):
        kind = "one Tensor" if isinstance(hx, Tensor) else type(hx).__name__
        raise TypeError(f"hx must be a tuple or list of two tensors (h_0, c_0), got {kind}")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")
    return hx[0], hx[1]


def check_integers(**sizes: Any) -> None:
    """Refuse sizes that are no ints, in the words of torch.nn's layers, or beyond all memory."""
    for name, size in sizes.items():
        if not hasattr(type(size), "__index__"):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if abs(size) > _MOST:
            raise ValueError(f"{name} must be between 0 and {_MOST}, got {size}")


# ---- the input and the states of a layer ------------------------------------------------------


def check_input(input: Tensor, weight: Tensor, dims: int, input_size: int) -> None:
    """Refuse an input of another dtype than the weights, or of the wrong rank or size."""
    if input.dtype != weight.dtype and autocast.requested(input) is None:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input.shape[-1] != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.shape[-1]}"
        )


def check_state_dims(states: Sequence[Tensor], unbatched: bool) -> None:
    """Refuse batched states beside an unbatched input, and the other way round."""
    expected = 2 if unbatched else 3
    dims = [state.dim() for state in states]
    if all(dim == expected for dim in dims):
        return
    given = f"For {'unbatched 2' if unbatched else 'batched 3'}-D input"
    if len(states) == 1:
        raise RuntimeError(f"{given}, hx should also be {expected}-D but got {dims[0]}-D tensor")
    raise RuntimeError(
        f"{given}, hx and cx should also be {expected}-D but got ({dims[0]}-D, {dims[1]}-D) tensors"
    )


def check_state_shapes(states: Sequence[Tensor], shapes: Sequence[Shape]) -> None:
    """Refuse states that do not fit the layers, the batch or the hidden size."""
    for index, (state, shape) in enumerate(zip(states, shapes, strict=False)):
        if state.shape != shape:
            which = "hidden" if len(states) == 1 else f"hidden[{index}]"
            raise RuntimeError(f"Expected {which} size {shape}, got {list(state.shape)}")


def permuted(state: Tensor, indices: Tensor) -> Tensor:
    """The state with its rows in packed order; left as it is where it has too few rows for that."""
    if state.dim() < 2 or state.shape[1] < indices.shape[0]:
        return state
    return state.index_select(1, indices)


def check_packed_data(data: Any) -> None:
    """Refuse the data of a PackedSequence that are no rows."""
    check_tensor("input", data)
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")


def check_batch_sizes(batch_sizes: Any, data: Tensor) -> None:
    """Refuse a PackedSequence whose batch_sizes are not what torch packs its data into.

    Raises:
        TypeError: batch_sizes are no tensor.
        RuntimeError: they are no int64 tensor (T,) on the CPU; they are mapped by vmap; or,
            where their values can be read, one is below 1 or larger than the one before, or they do
            not add up to the rows of ``data``.
    """
    check_tensor("batch_sizes", batch_sizes)
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.shape[0] == 0:
        raise RuntimeError(
            f"batch_sizes of a PackedSequence must be int64 (T,) of at least one step, "
            f"got {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)}"
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(batch_sizes):
        raise RuntimeError(MAPPED_BATCH_SIZES)
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(
            f"batch_sizes of a PackedSequence must be on the CPU, got {batch_sizes.device}"
        )
    if has_values(batch_sizes):
        check_step_sizes(batch_sizes, data.shape[0])


def check_step_sizes(batch_sizes: Tensor, rows: int) -> list[int]:
    """The values of batch_sizes, once they are those of a PackedSequence of so many rows."""
    before = left = rows
    # No step has no row, so that one more than the rows tells of too many steps.
    sizes: list[int] = batch_sizes[: rows + 1].tolist()
    for t, size in enumerate(sizes):
        left -= size
        if not 1 <= size <= before or left < 0:
            got = f"{size} at step {t}"
            break
        before = size
    else:
        if sizes and left == 0:
            return sizes
        got = f"{rows - left} in all"
    raise RuntimeError(
        "batch_sizes of a PackedSequence must be at least 1, never increase and add up to the "
        f"{rows} rows of its data, got {got}"
    )


def packed_rows(batch_sizes: Tensor, data: Tensor) -> int:
    """B of packed data, before memory is asked for; the engine checks the other values.

    Raises:
        RuntimeError: batch_sizes are empty, or the first of them is no number of rows of ``data``.
    """
    rows = int(batch_sizes[0]) if batch_sizes.numel() > 0 else 0
    if not 1 <= rows <= data.shape[0]:
        check_step_sizes(batch_sizes, data.shape[0])
    return rows


def check_indices(name: str, indices: Any, batch: int, data: Tensor) -> None:
    """Refuse the order of a PackedSequence's rows where it is none of so many rows."""
    if indices is None:
        return
    check_tensor(name, indices)
    if indices.dtype not in (torch.int64, torch.int32) or indices.shape != (batch,):
        raise RuntimeError(
            f"{name} of a PackedSequence must be integers of shape ({batch},), "
            f"got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if indices.device != data.device:
        raise RuntimeError(
            f"{name} of a PackedSequence must be on the device of its data, {data.device}, "
            f"got {indices.device}"
        )
    if has_values(indices):
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= batch:
            raise RuntimeError(
                f"{name} of a PackedSequence must lie between 0 and {batch - 1}, "
                f"got {low if low < 0 else high}"
            )


def refuse_with_packed(**arguments: Tensor | Sequence[int] | None) -> None:
    """Refuse what says which steps run, beside an input that says so itself."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None where input is a PackedSequence; "
                f"give a padded tensor to use {name}"
            )


# ---- weights, and what must agree with the input ----------------------------------------------


def check_weight_shapes(
    weights: Sequence[Any], names: Sequence[str], shapes: Sequence[Shape]
) -> None:
    """Refuse weights that were replaced by something of another kind or shape."""
    for weight, name, shape in zip(weights, names, shapes, strict=True):
        check_tensor(name, weight)
        if weight.shape != shape:
            raise RuntimeError(f"{name} must have shape {shape}, got {tuple(weight.shape)}")


def check_companions(input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Refuse states and weights that are on another device or of another dtype than the input."""
    if agree(input, states) and agree(input, weights):
        return
    for kind, tensors in (("hidden", states), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{input.device} and {kind} tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with "
                    f"{scalar_name(input)} and {kind} tensor with {scalar_name(tensor)}"
                )


def agree(input: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors have the input's dtype and device."""
    dtype, device = input.dtype, input.device
    for tensor in tensors:  # a loop, as a generator costs more than what it compares
        if tensor.dtype != dtype:
            return False
        if tensor.device != device:
            return False
    return True


def scalar_name(tensor: Tensor) -> str:
    """The name that torch's own messages give the tensor's dtype.

    >>> scalar_name(torch.zeros(1, dtype=torch.bfloat16))
    'BFloat16'
    """
    return str(tensor.type()).rpartition(".")[2].removesuffix("Tensor")


# ---- which steps run --------------------------------------------------------------------------


def as_tensor(name: str, value: Any, input: Tensor) -> Tensor:
    """An argument beside the input as a tensor, on whatever device its values are.

    Raises:
        TypeError: torch makes no tensor of it.
        ValueError: it is on the meta device, where there are no values, and input is not.
    """
    if not isinstance(value, Tensor):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise TypeError(
                f"{name} must be a tensor or what torch makes one of, got {kind}: {error}"
            ) from error
    check_tensor(name, value)
    if value.device.type == "meta" and input.device.type != "meta":
        raise ValueError(f"{name} must have values, got a tensor on the meta device")
    return value


def integer_tensor(lengths: Lengths, input: Tensor) -> Tensor:
    """``lengths`` as a tensor of integers.

    Raises:
        TypeError, ValueError: as `as_tensor`; TypeError also where they are not integers.
    """
    tensor = as_tensor("lengths", lengths, input)
    if tensor is not lengths and tensor.numel() == 0:
        return tensor.to(torch.int64)  # torch.tensor([]) has the default dtype, a floating one
    no_integers = tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized
    if no_integers or tensor.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {tensor.dtype}")
    return tensor


def lengths_tensor(lengths: Lengths, input: Tensor, unbatched: bool, name: str = "input") -> Tensor:
    """``lengths`` as int64 (B,), where they lie, beside a time-major input (T, B, I) of this name.

    Raises:
        TypeError: lengths are not integers.
        ValueError: their shape is not (B,), they have no values, or, on the CPU, one lies outside
            0…T.
    """
    lengths = integer_tensor(lengths, input)
    steps, batch = input.shape[0], input.shape[1]
    if unbatched and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one for each sequence of the batch, "
            f"got {tuple(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64).resolve_neg()
    if batch > 0 and has_values(lengths):
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > steps:
            raise ValueError(
                f"lengths must lie between 0 and the {steps} steps of {name}, "
                f"got {low if low < 0 else high}"
            )
    return lengths.contiguous()


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read at once: on the CPU, and not while tracing."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor  # no FakeTensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
    )


def reset_tensor(reset: Any, input: Tensor, unbatched: bool, batch_first: bool) -> Tensor:
    """``reset`` as bool (T, B) beside a time-major input (T, B, I).

    Raises:
        TypeError: reset is not a bool tensor.
        ValueError: its shape is not that of the input's steps and sequences.
        RuntimeError: it is on another device than the input.
    """
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset must be a bool tensor, got {kind}")
    check_tensor("reset", reset)
    steps, batch = input.shape[0], input.shape[1]
    expected: Shape
    if unbatched:
        expected, layout = (steps,), "(T,) beside an unbatched input"
    elif batch_first:
        expected, layout = (batch, steps), "(B, T) with batch_first=True"
    else:
        expected, layout = (steps, batch), "(T, B)"
    if reset.shape != expected:
        raise ValueError(
            f"reset must have shape {layout}, here {expected}, got {tuple(reset.shape)}"
        )
    if reset.device != input.device:
        raise RuntimeError(
            f"Input and reset tensors are not at the same device, found input tensor at "
            f"{input.device} and reset tensor at {reset.device}"
        )
    if unbatched:
        return reset.unsqueeze(1)
    return reset.transpose(0, 1) if batch_first else reset


# ---- cells ------------------------------------------------------------------------------------


def check_cell_input(name: str, input: Tensor, states: Sequence[Tensor]) -> None:
    """Refuse what is neither one row nor a batch of rows."""
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for index, state in enumerate(states):
        if state.dim() not in (1, 2):
            which = f"hx[{index}]" if name == "LSTMCell" else "hidden"
            raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")


def check_cell_sizes(
    input: Tensor,
    states: Sequence[Tensor],
    input_size: int,
    hidden_size: int,
    unbatched: bool,
) -> None:
    """Refuse a batch (B, I) and states (B, H) that do not fit each other or the cell.

    Arguments:
        unbatched: whether the caller gave single rows, to which a first axis was added.
    """
    if input.shape[1] != input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]} expected {input_size}"
        )
    for index, state in enumerate(states):
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{index} "
                f"batch size {state.shape[0]}"
            )
        if state.dim() > 1 and state.shape[1] != hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: "
                f"got {state.shape[1]}, expected {hidden_size}"
            )
        if state.dim() != 2:
            expected, given = (1, state.dim() - 1) if unbatched else (2, state.dim())
            raise RuntimeError(
                f"hidden{index} must be {expected}-D beside a {expected}-D input, "
                f"got {given}-D of shape {tuple(state.shape[1:] if unbatched else state.shape)}"
            )


def check_cell_companions(
    input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Refuse states and weights that are on another device or of another dtype than the input."""
    if agree(input, states) and agree(input, weights):
        return
    pairs = [("input", input, name, weight) for name, weight in zip(names, weights, strict=False)]
    pairs += [
        (f"hidden{index}", state, "weight_hh", weights[1]) for index, state in enumerate(states)
    ]
    for name, tensor, weight_name, weight in pairs:
        if tensor.device != weight.device:
            raise RuntimeError(
                f"Tensor on device {weight.device} is not on the expected device {tensor.device}! "
                f"({weight_name} and {name})"
            )
        if tensor.dtype != weight.dtype:
            raise RuntimeError(
                f"{name} and {weight_name} must have the same dtype, "
                f"but got {scalar_name(tensor)} and {scalar_name(weight)}"
            )
