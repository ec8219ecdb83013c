"""torch's own operators of recurrent layers, for tensors on a GPU or any device other than the CPU.

Everything that torch.nn can compute goes through the function that torch.nn itself calls
(``torch._VF.lstm`` etc.): cuDNN on an NVIDIA GPU, MIOpen on an AMD GPU, or torch's own kernels if
neither applies. So switching from torch.nn never costs speed. This module does not call cuDNN's
operator (``aten::_cudnn_rnn``): as in torch.nn, torch chooses the library and handles autocast,
dropout's state and the layout of the weights, and the same code runs on a CPU, where it is tested.

It adds what torch.nn does not support:

- lengths and resets: as episodes of a packed batch (episodes.py);
- h of every layer: layer by layer;
- a gradient in ``eval()``: cuDNN runs in training mode whenever a gradient is recorded;
- a gradient of the gradient, which cuDNN does not have: composed operations, inside backward;
- weights that are not in cuDNN's layout: copied, without a warning;
- T ≥ 65,536, which cuDNN does not support: torch's own kernels.

There are two ways to call it. An eager call records torch's graph, as torch.nn's does (`run`). In a
graph of torch.compile or torch.export, or under a dispatch mode, the call is one node, fastrnn's
operator, with the kernels of torch_kernels.py.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.autograd import forward_ad

from .._engine import (
    CUDNN_STEPS,
    NO_EXTRAS,
    CudaRoute,
    Extras,
    cuda_route,
    cuda_switch,
    each_layer,
    graphs_take_kernels,
    no_kernels,
)
from . import composed, episodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .._options import Options

States = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM
Rows = tuple[Tensor | None, Tensor | None, Tensor | None]  # batch_sizes, lengths, reset
Steps = tuple[Tensor | None, Tensor | None, Tensor | None, Extras]  # Rows, and arrays of options
Found = tuple[Tensor, States, Tensor | None]  # output, final states, h of every layer


def has(options: Options, extras: Extras, return_states: bool) -> bool:
    """Whether torch.nn supports the options of a call; it does not return c of every step."""
    masks = extras[2:]
    return (
        options.in_torch_nn
        and all(mask is None for mask in masks)
        and not (return_states and options.cell == "LSTM")
    )


def kernels(
    options: Options,
    extras: Extras,
    input: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    training: bool,
    states: bool = False,
) -> CudaRoute:
    """Whether the engine's own CUDA kernels compute a call, and which kind: they must support it,
    and `cuda_route` must allow it.
    """
    more = options.beyond_heads or options.grad_clip > 0 or options.recompute
    if more or any(x is not None for x in extras):
        return CudaRoute(False, "no CUDA kernel supports the options")
    if torch.compiler.is_compiling():
        return CudaRoute(_kernels_of_graphs(), "a graph's sizes are not known")
    device = input.get_device()
    if no_kernels(device):
        return CudaRoute(False, "no kernel is trusted on this device")
    if (batch_sizes is not None or states) and cuda_switch() is None:
        return CudaRoute(False, "certificates do not cover packed sequences or all states")
    steps, rows = input.shape[0], input.shape[1]
    if batch_sizes is not None:
        steps, rows = len(batch_sizes), int(batch_sizes[0])
    dtype = str(input.dtype).removeprefix("torch.")
    if input.dtype == torch.float32 and allows_tf32():
        dtype = "tf32"
    hidden_size = weights[0].shape[0] // options.gates
    return cuda_route(options, dtype, rows, hidden_size, training, device, steps)


def allows_tf32() -> bool:
    """Whether torch allows cuDNN's recurrent layers to round float32 factors to TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the precision was set per operator, which allow_tf32 does not support
        return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


def _kernels_of_graphs() -> bool:
    return graphs_take_kernels()


# torch.compile evaluates this while it traces, so the environment variable's value is a constant of
# the graph. The attribute is that of `torch.compiler.assume_constant_result`, which would import
# the compiler.
_kernels_of_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_one_node() -> bool:
    """Whether the call must be one operator, for a graph or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def records(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ---- the call ------------------------------------------------------------------------------------


def call(
    options: Options,
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    dropout: float,
    train: bool,
) -> tuple[Tensor, States]:
    """The output and the final states, computed by torch's function.

    Arguments:
        input: (T, B, I), or with ``batch_sizes`` packed, (N, I).
        hx: (L·D, B, units) each, or None for zeros.
        train: whether a gradient may be needed or dropout is applied.
    """
    rows = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    hx = zeros(options, input, rows, weights) if hx is None else hx
    states = tuple(state.contiguous() for state in hx)
    function = getattr(_VF, name_of(options))
    given = states if options.cell == "LSTM" else states[0]
    stack = (options.bias, options.num_layers, dropout, train, options.bidirectional)
    steps = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    with _without_cudnn() if input.is_cuda and steps >= CUDNN_STEPS else nullcontext():
        flat = _laid_flat(options, weights, input)
        if batch_sizes is None:
            output, *hx_n = function(input, given, flat, *stack, False)
        else:
            output, *hx_n = function(input, batch_sizes, given, flat, *stack)
    return output, tuple(hx_n)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Disable cuDNN. The setting is global, so a lock lets each thread restore the old value."""
    with _switching:
        enabled = torch._C._get_cudnn_enabled()
        torch._C._set_cudnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_cudnn_enabled(enabled)


_switching = threading.Lock()


def name_of(options: Options) -> str:
    """torch's name of the layer's function."""
    return f"rnn_{options.activation}" if options.cell == "RNN" else options.cell.lower()


def zeros(options: Options, input: Tensor, rows: Any, weights: Sequence[Tensor]) -> States:
    """Initial states of zeros, (L·D, B, units) each."""
    groups = options.num_layers * options.directions
    units = weights[0].shape[0] // options.gates
    h = input.new_zeros(groups, rows, options.proj_size or units)
    return (h,) if options.cell != "LSTM" else (h, input.new_zeros(groups, rows, units))


def cell(options: Options, input: Tensor, hx: States | None, weights: Sequence[Tensor]) -> States:
    """One step with torch's function: new states (B, H) from input (B, I) and hx, (B, H) each."""
    if hx is None:
        h = input.new_zeros(input.shape[0], weights[1].shape[1])
        hx = (h, h) if options.cell == "LSTM" else (h,)
    given = hx if options.cell == "LSTM" else hx[0]
    new = getattr(_VF, f"{name_of(options)}_cell")(input, given, *weights)
    return tuple(new) if options.cell == "LSTM" else (new,)


# ---- weights -------------------------------------------------------------------------------------

_flatten = torch.nn.RNNBase.flatten_parameters


def flatten(layer: Any) -> None:
    """Flatten a layer's weights into contiguous memory for cuDNN, with torch.nn's own method.

    It does nothing if the weights are computed at every call, from parameters with other names.
    """
    if all(name in layer._parameters for name in layer._flat_weights_names):
        _flatten(layer)


def _laid_flat(options: Options, weights: Sequence[Tensor], input: Tensor) -> list[Tensor]:
    """The weights in contiguous memory, in cuDNN's order; copies if they are not so already.

    Under autocast torch makes these copies itself. A trace of torch.jit must refer to the weights.
    """
    flat, first = list(weights), weights[0]
    traced = torch._C._get_tracing_state() is not None
    if not input.is_cuda or traced or _autocast_copies(first):
        return flat
    if not (torch._use_cudnn_rnn_flatten_weight() and torch.cudnn_is_acceptable(input)):
        return flat
    kind = (options, input.shape[-1], first.shape, first.dtype, first.device)
    plain = all(w.is_contiguous() and not w.is_neg() for w in weights)
    if plain and kind in _places and _places_of(flat) == _places[kind]:
        return flat
    copies = list(_Flat.apply(options, input.shape[-1], *weights))  # type: ignore[no-untyped-call]
    _places[kind] = _places_of(copies)
    return copies


# cuDNN's offset in bytes of each weight, for a kind of stack; read from the copies that it makes.
_places: dict[tuple[Any, ...], list[int]] = {}


def _places_of(weights: Sequence[Tensor]) -> list[int]:
    start = weights[0].untyped_storage().data_ptr()
    return [w.data_ptr() - start for w in weights]


def _autocast_copies(weight: Tensor) -> bool:
    if not torch.is_autocast_enabled("cuda"):
        return False
    return weight.dtype not in (torch.float64, torch.get_autocast_dtype("cuda"))


class _Flat(torch.autograd.Function):
    """Copies of the weights in contiguous memory, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, input_size: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(flat_copies(options, weights, input_size)[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *gradients


def flat_copies(
    options: Options, weights: Sequence[Tensor], input_size: int
) -> tuple[list[Tensor], Tensor]:
    """Copies of the weights in one buffer, and the buffer."""
    from torch.backends.cudnn.rnn import get_cudnn_mode

    # New tensors on the same memory, because torch replaces the memory of the tensors that it gets.
    copies: list[Any] = [w.detach().resolve_neg() for w in weights]
    copies = [w.new_empty(0).set_(w) for w in copies]
    kind = name_of(options).upper()
    with torch.no_grad(), torch.cuda.device(weights[0].device):
        buffer = torch._cudnn_rnn_flatten_weight(
            copies,
            len(options.weight_kinds),
            input_size,
            get_cudnn_mode(kind),  # type: ignore[no-untyped-call]
            weights[0].shape[0] // options.gates,
            options.proj_size,
            options.num_layers,
            False,
            options.bidirectional,
        )
    return copies, buffer


# ---- a stack -------------------------------------------------------------------------------------


def compute(
    options: Options,
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    steps: Steps,
    states: bool,
    dropout: float,
    train: bool,
) -> Found | None:
    """Output, final states and, with ``states``, h of every layer: the output's shape after (L, …).

    None if composed operations must compute the call: no row has a step, or a CUDA graph is being
    captured, during which the values of lengths and resets cannot be read.
    """
    batch_sizes, lengths, reset, extras = steps
    if lengths is not None or reset is not None:
        split = None if _is_capturing(input) else episodes.find(input, lengths, reset)
        if split is None:
            return None
        hx = zeros(options, input, input.shape[1], weights) if hx is None else hx
        first = split.initial(options, hx, extras[:2])
        packed = (split.batch_sizes, None, None, NO_EXTRAS)
        found = compute(options, split.pack(input), first, weights, packed, states, dropout, train)
        assert found is not None
        output, last, hidden = found
        every = None if hidden is None else torch.stack([split.unpack(h) for h in hidden])
        return split.unpack(output), split.final(options, last, hx), every
    if not states:
        return *call(options, input, hx, weights, batch_sizes, dropout, train), None
    outputs: list[Tensor] = []
    finals: list[States] = []
    for one, initial, own in each_layer(options, hx, weights):
        if outputs and dropout > 0:
            input = F.dropout(input, dropout)
        input, last = call(one, input, initial, own, batch_sizes, 0.0, train)
        outputs.append(input)
        finals.append(last)
    return input, tuple(map(torch.cat, zip(*finals, strict=True))), torch.stack(outputs)


def _is_capturing(input: Tensor) -> bool:
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- an eager call -------------------------------------------------------------------------------


def run(
    options: Options,
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    steps: Steps,
    states: bool,
    dropout: float,
) -> Found | None:
    """As `compute`, in torch's graph; composed operations compute a gradient of the gradient.

    Exception: with dropout between layers cuDNN does not expose the mask, so for a gradient of the
    gradient torch raises its error, which says how to do without cuDNN. The output owns its memory
    and may be written in place before backward.
    """
    h0, c0 = (*(hx or ()), None, None)[:2]
    leaves = (input, h0, c0, *steps[3][:2], *weights)
    recorded = records(leaves)
    found = compute(options, input, hx, weights, steps, states, dropout, recorded or dropout > 0)
    if found is None or not recorded:
        return found
    output, hx_n, hidden = found
    if dropout > 0:
        return output.clone(), hx_n, hidden
    outputs = (output, *hx_n, *(() if hidden is None else (hidden,)))
    output, *others = _Twice.apply(  # type: ignore[no-untyped-call]
        options, steps[:3], len(outputs), *outputs, *leaves
    )
    return output, tuple(others[: len(hx_n)]), None if hidden is None else others[-1]


class _Twice(torch.autograd.Function):
    """Passes through torch's results, and their gradients to torch's graph.

    If these gradients are differentiated again, or carry tangents, torch's graph gets no gradients,
    and composed operations compute the gradients of the leaves.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, rows: Rows, count: int, *tensors: Tensor | None
    ) -> tuple[Any, ...]:
        ctx.options, ctx.count = options, count
        ctx.save_for_backward(*rows, *tensors[count:])
        ctx.set_materialize_grads(False)
        # Clones, because views cannot be detached in place.
        return tuple(y.clone() for y in tensors[:count] if y is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3 + ctx.count :]
        tangents = forward_ad._current_level >= 0  # cuDNN has no forward mode either
        if not (torch.is_grad_enabled() or tangents):
            return None, None, None, *gradients, *(None,) * len(needs)
        batch_sizes, lengths, reset, *leaves = ctx.saved_tensors
        input, h0, c0, reset_h, reset_c, *weights = leaves
        d_output, d_h_n, *more = gradients
        d_c_n = more.pop(0) if ctx.options.cell == "LSTM" else None
        steps = (batch_sizes, lengths, reset, reset_h, reset_c)
        arguments = (input, h0, c0, weights, *steps, *(None,) * 3)
        cotangents = (d_output, more[0] if more else None, None, d_h_n, d_c_n)
        found: Sequence[Tensor | None]
        if tangents:
            from .transforms import ONE, gradients_of

            found = gradients_of(ONE, ctx.options, arguments, needs, cotangents)
        else:
            found = composed.gradients(ctx.options, arguments, cotangents, needs)
        return *(None,) * (3 + ctx.count), *found
