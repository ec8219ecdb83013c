"""torch's own call of a recurrent layer, for tensors on a GPU and every other device but the CPU.

Whatever torch.nn can compute goes through the function that torch.nn itself calls
(``torch._VF.lstm`` and its like): cuDNN on an NVIDIA GPU, MIOpen on an AMD one, or what torch has
where these do not serve, so that changing over from torch.nn never costs speed. Not by cuDNN's
operator (``aten::_cudnn_rnn``): which library computes, autocast, dropout's state and the layout of
weights stay torch's affair, as in torch.nn, and the same code runs on a CPU, where it is tested.

What torch.nn does not do, around that call:

- lengths and resets: as episodes of a packed batch (_episodes.py);
- h of every layer: layer by layer;
- a gradient in ``eval()``: cuDNN is asked for training mode wherever a gradient is recorded;
- a gradient of the gradient, which cuDNN does not have: composed operations, from inside backward;
- weights that do not lie as cuDNN wants them are copied without a warning;
- T ≥ 65,536, where cuDNN gives up: torch's own kernels.

Calls come by two ways. By itself a call records torch's graph, as torch.nn's does (`run`). In a
graph of torch.compile or torch.export, or where a mode listens, it is one node, our operator, whose
kernels are then those of _by_torch_operators.py.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.autograd import forward_ad

from . import _composed, _episodes
from ._engine import (
    CUDNN_STEPS,
    NO_EXTRAS,
    CudaRoute,
    Extras,
    cuda_route,
    cuda_switch,
    each_layer,
    graphs_take_kernels,
    no_kernels,
    scalars,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ._options import Options

States = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM
Rows = tuple[Tensor | None, Tensor | None, Tensor | None]  # batch_sizes, lengths, reset
Steps = tuple[Tensor | None, Tensor | None, Tensor | None, Extras]  # and what options ask for
Found = tuple[Tensor, States, Tensor | None]  # output, final states, h of every layer


def has(options: Options, extras: Extras, return_states: bool) -> bool:
    """Whether torch.nn has what the options of a call ask for: c of every step it has not."""
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
    """Whether the engine's own CUDA kernels compute a call, which they can and `cuda_route` lets
    them, and by which of them.
    """
    if options.beyond_the_cell or options.recompute or any(x is not None for x in extras):
        return CudaRoute(False, "no CUDA kernel has what the options ask for")
    if torch.compiler.is_compiling():
        return CudaRoute(_kernels_of_graphs(), "a graph's sizes are not known")
    device = input.get_device()
    if no_kernels(device):
        return CudaRoute(False, "none is trusted on this device")
    if (batch_sizes is not None or states) and cuda_switch() is None:
        return CudaRoute(False, "no certificate is of packed sequences, or of all states")
    steps, rows = input.shape[0], input.shape[1]
    if batch_sizes is not None:
        steps, rows = len(batch_sizes), int(batch_sizes[0])
    dtype = str(input.dtype).removeprefix("torch.")
    if input.dtype == torch.float32 and allows_tf32():
        dtype = "tf32"
    hidden_size = weights[0].shape[0] // options.gates
    return cuda_route(options, dtype, rows, hidden_size, training, device, steps)


def allows_tf32() -> bool:
    """Whether torch lets cuDNN's recurrent layers round float32 factors to TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by operator, which this setting does not know
        return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


def _kernels_of_graphs() -> bool:
    return graphs_take_kernels()


# torch.compile asks when it traces: what the environment says then is a constant of the graph. The
# mark is that of `torch.compiler.assume_constant_result`, which would import the compiler here.
_kernels_of_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_one_node() -> bool:
    """Whether a graph or a mode is to see the call as one operator."""
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
    """The output and the final states, by torch's function.

    Arguments:
        input: (T, B, I), or with ``batch_sizes`` packed, (N, I).
        hx: (L·D, B, units) each, or None for zeros.
        train: whether a gradient may be asked for, or values are dropped.
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
    """The switch is the process's: by one thread at a time, so that each puts back what was."""
    with _switching:
        enabled = torch._C._get_cudnn_enabled()
        torch._C._set_cudnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_cudnn_enabled(enabled)


_switching = threading.Lock()


def name_of(options: Options) -> str:
    """What torch calls the layer's function."""
    return f"rnn_{options.activation}" if options.cell == "RNN" else options.cell.lower()


def zeros(options: Options, input: Tensor, rows: Any, weights: Sequence[Tensor]) -> States:
    """Initial states of zeros, (L·D, B, units) each."""
    groups = options.num_layers * options.directions
    units = weights[0].shape[0] // options.gates
    h = input.new_zeros(groups, rows, options.proj_size or units)
    return (h,) if options.cell != "LSTM" else (h, input.new_zeros(groups, rows, units))


def cell(options: Options, input: Tensor, hx: States | None, weights: Sequence[Tensor]) -> States:
    """One step by torch's function: the new states (B, H), of input (B, I) and hx (B, H) each."""
    if hx is None:
        h = input.new_zeros(input.shape[0], weights[1].shape[1])
        hx = (h, h) if options.cell == "LSTM" else (h,)
    given = hx if options.cell == "LSTM" else hx[0]
    new = getattr(_VF, f"{name_of(options)}_cell")(input, given, *weights)
    return tuple(new) if options.cell == "LSTM" else (new,)


# ---- weights -------------------------------------------------------------------------------------

_flatten = torch.nn.RNNBase.flatten_parameters


def flatten(layer: Any) -> None:
    """Lay a layer's weights in one piece of memory, where cuDNN computes; by torch.nn's own way.

    Where weights are computed at every call, from parameters of another name, there is nothing to
    lay down.
    """
    if all(name in layer._parameters for name in layer._flat_weights_names):
        _flatten(layer)


def _laid_flat(options: Options, weights: Sequence[Tensor], input: Tensor) -> list[Tensor]:
    """The weights in one piece of memory, in cuDNN's order: where they are not, copies.

    Of what autocast casts, torch makes such copies by itself; what torch.jit traces is to hold the
    weights.
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


# Where cuDNN has each weight of a kind of stack, in bytes; learnt from the copies it makes.
_places: dict[tuple[Any, ...], list[int]] = {}


def _places_of(weights: Sequence[Tensor]) -> list[int]:
    start = weights[0].untyped_storage().data_ptr()
    return [w.data_ptr() - start for w in weights]


def _autocast_copies(weight: Tensor) -> bool:
    if not torch.is_autocast_enabled("cuda"):
        return False
    return weight.dtype not in (torch.float64, torch.get_autocast_dtype("cuda"))


class _Flat(torch.autograd.Function):
    """Copies of the weights, laid in one piece."""

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

    # Of the same memory, but not the same tensors: torch gives them other memory.
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
    """Output, final states and, with ``states``, h of every layer, (L, …) as the output.

    None where composed operations must serve: no row has a step, or lengths and resets stand in a
    CUDA graph that is being captured, whose values cannot be waited for.
    """
    batch_sizes, lengths, reset, extras = steps
    if lengths is not None or reset is not None:
        episodes = None if _is_capturing(input) else _episodes.find(input, lengths, reset)
        if episodes is None:
            return None
        hx = zeros(options, input, input.shape[1], weights) if hx is None else hx
        first = episodes.initial(options, hx, extras[:2])
        packed = (episodes.batch_sizes, None, None, NO_EXTRAS)
        found = compute(
            options, episodes.pack(input), first, weights, packed, states, dropout, train
        )
        assert found is not None
        output, last, hidden = found
        every = None if hidden is None else torch.stack([episodes.unpack(h) for h in hidden])
        return episodes.unpack(output), episodes.final(options, last, hx), every
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


# ---- by itself -----------------------------------------------------------------------------------


def run(
    options: Options,
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    steps: Steps,
    states: bool,
    dropout: float,
) -> Found | None:
    """As `compute`, in torch's graph; a gradient of the gradient comes from composed operations.

    But with dropout between layers, whose mask cuDNN keeps to itself: there torch says how to do
    without cuDNN. The output is a tensor of its own, which may be written to before backward.
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
    """Hands on what torch computed, and its gradients.

    Where these are to be differentiated in turn, or carry tangents, torch's graph gets none, and
    the leaves get theirs from composed operations.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, rows: Rows, count: int, *tensors: Tensor | None
    ) -> tuple[Any, ...]:
        ctx.options, ctx.count = options, count
        ctx.save_for_backward(*rows, *tensors[count:])
        ctx.set_materialize_grads(False)
        # Not views, which could not be detached in place.
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
            from ._transforms import ONE, gradients_of

            found = gradients_of(ONE, scalars(ctx.options), arguments, needs, cotangents)
        else:
            found = _composed.gradients(ctx.options, arguments, cotangents, needs)
        return *(None,) * (3 + ctx.count), *found
