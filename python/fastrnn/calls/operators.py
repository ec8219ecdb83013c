"""The engine as torch operators, ``fastrnn::forward`` and ``fastrnn::backward``.

One operator runs a whole stack, so that torch.compile and torch.export see one node. Registered
here: the schema; the kernels, which call the engine, or torch's own function (torch_kernels.py);
and the fake kernels, which only allocate. The compute dtype of half types is float32, of others
the dtype itself.

``forward`` returns, each contiguous and of shape (0,) where it was not asked for:

======  ===================================  ==================================================
output  (T, B, D·O) or packed (N, D·O)       h of the last layer at every step. The caller may
                                             write to it before ``backward``
h_n     (L·D, B, O)                          h after the last step
c_n     (L·D, B, H)                          c after the last step; LSTM
hidden  (L, T, B, D·O) or (L, N, D·O)        h of every layer at every step; ``states`` or ``save``
cell    (L, T, B, D·H) or (L, N, D·H)        c at every step, compute dtype; LSTM, ``states`` or
                                             ``save``
saved   (L·D, T·B or N, values)              what backward needs besides, compute dtype; ``save``,
                                             without ``recompute``
======  ===================================  ==================================================

``backward`` returns the gradients of input, h0, c0, reset_h, reset_c and each weight, (0,) where
``needs`` is False. ``options`` is `Options.text`.

With ``by_torch``, torch's own function computes (torch_route.py). Then ``hidden`` with ``save``
alone holds the last layer, (1, …); ``cell`` is (0,); and ``saved`` is cuDNN's reserve, whose number
of bytes is unknown before the call, or (0,) where another library computed.

``forward_members`` and ``backward_members`` run an ensemble in one call of the engine: every tensor
but batch_sizes, and every result, has a leading axis, the members. An array that members share has
stride 0 there.

Autograd and the transforms of ``torch.func`` are in transforms.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._engine import Extras, engine_options, saved_size
from .._options import parse
from . import by_program, flops, program_torch, torch_kernels, torch_route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._options import Options

_INPUTS = (
    "Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "Tensor? lengths, Tensor? reset, Tensor? reset_h, Tensor? reset_c, Tensor? dropout_mask, "
    "Tensor? zoneout_h_mask, Tensor? zoneout_c_mask"
)
TENSORS = 12  # of _INPUTS
_FORWARD = (
    f"({_INPUTS}, str options, bool states, bool save, bool by_torch) -> (Tensor output, "
    "Tensor h_n, Tensor c_n, Tensor hidden, Tensor cell, Tensor saved)"
)
_BACKWARD = (
    f"({_INPUTS}, Tensor hidden, Tensor cell_state, Tensor saved, Tensor? d_output, "
    "Tensor? d_hidden, Tensor? d_cell, Tensor? d_h_n, Tensor? d_c_n, str options, bool[] needs, "
    "bool by_torch) -> Tensor[]"
)

library: Any = torch.library.Library("fastrnn", "DEF")  # type: ignore[no-untyped-call]
for _members in ("", "_members"):
    library.define(f"forward{_members}{_FORWARD}")
    library.define(f"backward{_members}{_BACKWARD}")


# ---- Kernels -------------------------------------------------------------------------------------


def device_of(given: Sequence[Any], options: Options, training: bool) -> tuple[Any, ...] | None:
    """What the engine needs to know of a GPU (`Device` of call.h); None on a CPU."""
    input: Tensor = given[0]
    if not input.is_cuda:
        return None
    return (
        # On the current stream, so that the memory is used again only after the call.
        lambda size: torch.empty(size, dtype=torch.uint8, device=input.device),
        torch.cuda.current_stream(input.device).cuda_stream,
        input.dtype == torch.float32 and torch_route.allows_tf32(),
        torch_kernels.kernels(given, options, training).persistent,
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def whole(
    outputs: Sequence[Tensor | None], input: Tensor, by_torch: bool = False
) -> tuple[Tensor, ...]:
    """The outputs as the schema has them: (0,) in place of None."""
    compute = compute_dtype(input.dtype)
    dtypes = (*(input.dtype,) * 4, compute, torch.uint8 if by_torch else compute)
    return tuple(
        input.new_empty(0, dtype=dtype) if y is None else y
        for y, dtype in zip(outputs, dtypes, strict=True)
    )


def _forward_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    given, (text, states, save, by_torch) = arguments[:TENSORS], arguments[TENSORS:]
    input, options = given[0], parse(text)
    if by_torch or not torch_kernels.leaves_to_engine(given, options, save):
        outputs = torch_kernels.forward_kernel(given, options, states, save, by_torch)
        return whole(outputs, input, by_torch)
    # Zeros where the engine writes nothing: an operator's outputs must be the same every time.
    device = device_of(given, options, save)
    return whole(program_torch.call(options, given).forward(states, save, True, device), input)


def _backward_kernel(*arguments: Any) -> list[Tensor]:
    given, saved = arguments[:TENSORS], arguments[TENSORS:-3]
    text, needs, by_torch = arguments[-3:]
    input, options = given[0], parse(text)
    if by_torch or not torch_kernels.leaves_to_engine(given, options, True):
        found = torch_kernels.backward_kernel(given, saved, options, needs, by_torch)
    else:
        present, device = _present(options, saved), device_of(given, options, True)
        wanted = _needed(given, needs)
        found = program_torch.backward(options, given, present, wanted, device=device)
    return [input.new_empty(0) if d is None else d for d in found]


def _needed(given: Sequence[Any], needs: Sequence[bool]) -> tuple[bool, ...]:
    """``needs``, False for what was not given."""
    input, h0, c0, weights, *rest = given[:9]
    leaves = (input, h0, c0, *rest[3:5], *weights)
    return tuple(need and x is not None for need, x in zip(needs, leaves, strict=True))


def _present(options: Options, saved: Sequence[Any]) -> Any:
    """hidden, cell, saved and the cotangents, None for what the operators have (0,) for."""
    hidden, cell, rest, *cotangents = saved
    cell = cell if options.cell == "LSTM" else None
    return hidden, cell, None if rest.dim() == 1 else rest, *cotangents


# ---- Fake kernels --------------------------------------------------------------------------------


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    input, h0, _, weights, batch_sizes, *_ = arguments
    text, states, save, by_torch = arguments[TENSORS:]
    options = parse(text)
    if batch_sizes is None:
        rows: Any = input.shape[1]
    elif h0 is not None:
        rows = h0.shape[1]
    else:  # a value of batch_sizes, unknown here
        rows = torch.library.get_ctx().new_dynamic_size()
    compute, two = compute_dtype(input.dtype), options.cell == "LSTM"
    layers, directions = options.num_layers, options.directions
    hidden_size = weights[0].shape[0] // options.gates
    out, every = options.proj_size or hidden_size, states or save
    entries = input.shape[:-1]  # (T, B), or packed (N,)
    groups = layers * directions
    hidden = cell = saved = None
    if every:
        held = 1 if by_torch and not states else layers
        hidden = input.new_empty((held, *entries, directions * out))
    if every and two and not by_torch:
        cell = input.new_empty((layers, *entries, directions * hidden_size), dtype=compute)
    if save and not options.recompute and not by_torch:
        shape = _saved_shape(options, arguments[:TENSORS], rows, hidden_size)
        saved = None if shape is None else input.new_empty(shape, dtype=compute)
    return whole(
        (
            input.new_empty((*entries, directions * out)),
            input.new_empty((groups, rows, out)),
            input.new_empty((groups, rows, hidden_size)) if two else None,
            hidden,
            cell,
            saved,
        ),
        input,
        by_torch,
    )


def _saved_shape(
    options: Options, given: Sequence[Any], rows: Any, hidden_size: Any
) -> tuple[Any, ...] | None:
    input, extras = given[0], Extras(*given[7:])
    if not input.is_cuda and by_program.takes(options, extras):
        return by_program.shapes(options, given, rows, False, True)[-1]
    if not input.is_cuda and by_program.takes_backward(options, extras):
        return None
    count = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    size = saved_size(engine_options(options), hidden_size)
    return options.num_layers * options.directions, count, size


def _backward_fake(*arguments: Any) -> list[Tensor]:
    input, h0, c0, weights, *rest = arguments
    leaves = (input, h0, c0, *rest[3:5], *weights)
    return [
        input.new_empty(x.shape if x is not None and needed else (0,))
        for x, needed in zip(leaves, arguments[-2], strict=True)
    ]


# ---- Ensembles -----------------------------------------------------------------------------------


def _first(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [w.select(0, 0) for w in x]
    return None if x is None else x.select(0, 0)


def _dense(x: Tensor | None) -> Tensor | None:
    """``x`` with each member's part contiguous; shared ones stay shared."""
    if x is None or x.dim() == 1:  # absent
        return x
    return x if x.select(0, 0).is_contiguous() else x.contiguous()


def _members_inputs(options: Options, arguments: Sequence[Any]) -> Any:
    """What the engine's functions of ensembles read, in their order."""
    input, h0, c0, weights, batch_sizes, lengths, reset = arguments[:7]
    engine, lengths = engine_options(options), _dense(lengths)
    return engine, input.shape[0], input, h0, c0, weights, batch_sizes, lengths, reset


def _forward_members_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    text, states, save, by_torch = arguments[TENSORS:]
    options, extras = parse(text), Extras(*arguments[7:TENSORS])
    again = by_program.takes_backward(options, extras)
    if by_torch or by_program.takes(options, extras):
        return _forward_of_each(*arguments)
    inputs, threads = _members_inputs(options, arguments), torch.get_num_threads()
    resets = extras[:2] if extras[0] is not None else None
    flags = (states or save, False) if again else (states, save)
    given: Any = (*inputs, resets, *flags, threads, True)
    return whole(_C.forward_members(*given), arguments[0])


def _forward_members_fake(*arguments: Any) -> tuple[Tensor, ...]:
    input, batch_sizes = arguments[0], arguments[4]
    given = [_first(x) for x in arguments[:TENSORS]]
    given[4] = batch_sizes
    one = forward_fake(*given, *arguments[TENSORS:])
    return tuple(y if y.dim() == 1 else y.new_empty((input.shape[0], *y.shape)) for y in one)


def _backward_members_cpu(*arguments: Any) -> list[Tensor]:
    *given, needs, by_torch = arguments
    options = parse(given[-1])
    if by_torch or by_program.takes_backward(options, Extras(*given[7:TENSORS])):
        return _backward_of_each(*arguments)
    hidden, cell, saved, *cotangents = given[TENSORS:-1]
    present = _present(options, (_dense(hidden), _dense(cell), _dense(saved), *cotangents))
    wanted = _needed(given, needs)
    inputs, threads = _members_inputs(options, given), torch.get_num_threads()
    everything: Any = (*inputs, *present, (*wanted[:3], *wanted[5:]), threads)
    found = _C.backward_members(*everything)
    found = [*found[:3], None, None, *found[3:]]
    return [given[0].new_empty(0) if d is None else d for d in found]


def _at(x: Any, member: int) -> Any:
    """A member's part of an argument; whatever is no tensor, or absent, is shared."""
    return x.select(0, member) if isinstance(x, Tensor) and x.shape != (0,) else x


def _of_each(kernel: Callable[..., Sequence[Tensor]], *arguments: Any) -> Sequence[Tensor]:
    """The results of an ensemble where the engine runs none: one member after the other."""
    input, h0, c0, weights, batch_sizes, *rest = arguments
    each = [
        kernel(
            *(_at(x, member) for x in (input, h0, c0)),
            [w.select(0, member) for w in weights],
            batch_sizes,
            *(_at(x, member) for x in rest),
        )
        for member in range(input.shape[0])
    ]
    return [y[0] if y[0].shape == (0,) else torch.stack(y) for y in zip(*each, strict=True)]


def _forward_of_each(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_of_each(_forward_kernel, *arguments))


def _backward_of_each(*arguments: Any) -> list[Tensor]:
    return list(_of_each(_backward_kernel, *arguments))


# ---- Registration --------------------------------------------------------------------------------


class _Kernels(NamedTuple):
    cpu: Any
    elsewhere: Any
    fake: Any


_KERNELS = {
    "forward": _Kernels(_forward_kernel, _forward_kernel, forward_fake),
    "backward": _Kernels(_backward_kernel, _backward_kernel, _backward_fake),
    "forward_members": _Kernels(_forward_members_cpu, _forward_of_each, _forward_members_fake),
    "backward_members": _Kernels(_backward_members_cpu, _backward_of_each, _backward_fake),
}
for _name, _kernels in _KERNELS.items():
    library.impl(_name, _kernels.cpu, "CPU")
    for _key in ("CUDA", "MPS", "XPU"):
        library.impl(_name, _kernels.elsewhere, _key)
    torch.library.register_fake(f"fastrnn::{_name}", _kernels.fake, lib=library)

forward_op = torch.ops.fastrnn.forward.default
backward_op = torch.ops.fastrnn.backward.default
forward_members_op = torch.ops.fastrnn.forward_members.default
backward_members_op = torch.ops.fastrnn.backward_members.default

flops.register()
