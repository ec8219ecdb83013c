"""Our operators' kernels where torch's own call computes (torch_route.py).

cuDNN's reserve goes from ``forward`` to ``backward`` in the place of the gates. Where another
library computes, and with lengths, resets or all states, ``backward`` runs forward again. What
torch's call cannot compute is composed of plain operations.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._engine import Extras
from . import composed, torch_route

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from .._engine import CudaRoute
    from .._options import Options
    from .torch_route import States, Steps


class _Given(NamedTuple):
    """The tensors that an operator takes first."""

    input: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    reset_h: Tensor | None
    reset_c: Tensor | None
    dropout_mask: Tensor | None
    zoneout_h_mask: Tensor | None
    zoneout_c_mask: Tensor | None

    @property
    def hx(self) -> States | None:
        return tuple(x for x in (self.h0, self.c0) if x is not None) or None

    @property
    def steps(self) -> Steps:
        return self.batch_sizes, self.lengths, self.reset, Extras(*self[7:])


def leaves_to_engine(given: Sequence[Any], options: Options, training: bool) -> bool:
    """Whether the engine computes a call that asks for it: on CUDA where its kernels are trusted.

    A graph that was made on a CPU asks for the engine after it was moved, too.
    """
    if not given[0].is_cuda:
        return bool(given[0].device.type == "cpu")
    return kernels(given, options, training).kernels


def kernels(given: Sequence[Any], options: Options, training: bool) -> CudaRoute:
    """`torch_route.kernels` of an operator's first tensors and its options."""
    own = _Given(*given)
    batch_sizes, *_, extras = own.steps
    return torch_route.kernels(options, extras, own.input, own.weights, batch_sizes, training)


def forward_kernel(
    arguments: Sequence[Any], options: Options, states: bool, save: bool, by_torch: bool
) -> tuple[Any, ...]:
    """The results of ``fastrnn::forward`` by torch's function or, where it cannot, by composed
    operations. None for what was not asked for.
    """
    given = _Given(*arguments)
    steps, found = given.steps, None
    if by_torch or (torch_route.has(options, steps[3], states) and not save):
        found = _forward(options, given, states, save)
    if found is not None:
        output, (h_n, *c_n), hidden, reserve = found
        return output, h_n, c_n[0] if c_n else None, hidden, None, reserve
    batch_sizes, lengths, reset, extras = steps
    stack = composed.forward(
        options,
        given.input,
        given.hx,
        given.weights,
        batch_sizes=batch_sizes,
        lengths=lengths,
        reset=reset,
        extras=extras,
    )
    every = states or (save and not by_torch)
    kept = stack.hidden if every else stack.hidden[-1:] if save else []
    hidden = torch.stack(kept) if kept else None
    cell = torch.stack(stack.cell) if every and stack.cell and not by_torch else None
    return stack.hidden[-1], stack.h_n, stack.c_n, hidden, cell, None


def backward_kernel(
    arguments: Sequence[Any],
    saved: Sequence[Any],
    options: Options,
    needs: Sequence[bool],
    by_torch: bool,
) -> list[Tensor | None]:
    """The results of ``fastrnn::backward``, likewise."""
    given, (hidden, _, reserve, *cotangents) = _Given(*arguments), saved
    found = None
    if by_torch:
        cotangents = _of_the_output(cotangents)
        found = _backward(options, given, hidden, reserve, cotangents, needs)
    if found is None:
        with recording():
            found = composed.gradients(options, given, cotangents, needs)
            found = [None if d is None else d.detach() for d in found]
    # As the fake kernel says they are, on which compilers rely.
    return [None if d is None else d.contiguous() for d in found]


def _of_the_output(cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The cotangents, that of ``hidden`` with the output's where it is of the last layer alone."""
    d_output, d_hidden, *others = cotangents
    if d_hidden is not None and d_hidden.shape[0] == 1:
        d_output = d_hidden[0] if d_output is None else d_output + d_hidden[0]
        d_hidden = None
    return [d_output, d_hidden, *others]


def _forward(
    options: Options, given: _Given, states: bool, save: bool
) -> tuple[Tensor, States, Tensor | None, Tensor | None] | None:
    """Output, final states, h of every layer or, with ``save`` alone, of the last, and the reserve.

    Of all of these, None where `torch_route.compute` says so.
    """
    input, hx, weights, steps = given.input, given.hx, given.weights, given.steps
    # Of a call for cuDNN's backward torch's graph is recorded, and the reserve taken from there.
    by_reserve = save and steps[1] is None and steps[2] is None
    by_reserve = by_reserve and not (states and options.num_layers > 1)
    with _casting_nothing(input), recording() if by_reserve else nullcontext():
        with torch.set_grad_enabled(by_reserve):
            x = input.detach().requires_grad_() if by_reserve else input
            found = torch_route.compute(options, x, hx, weights, steps, states, 0.0, by_reserve)
        if found is None:
            return None
        output, hx_n, hidden = found
        reserve = _reserve(output) if by_reserve else None
        output, hx_n = output.detach(), tuple(state.detach() for state in hx_n)
        if hidden is not None:
            hidden = hidden.detach()
        elif save:
            hidden = output.unsqueeze(0).clone()
        return output, hx_n, hidden, reserve


def _reserve(output: Tensor) -> Tensor | None:
    """What cuDNN's forward left for its backward, where it was cuDNN's."""
    node = output.grad_fn
    if node is None or not node.name().startswith("CudnnRnnBackward"):
        return None
    reserve: Tensor | None = getattr(node, "_saved_result3", None)
    return reserve


def _backward(
    options: Options,
    given: _Given,
    hidden: Tensor,
    reserve: Tensor,
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None] | None:
    """The gradients of input, h0, c0, reset_h, reset_c and each weight; None where not needed.

    ``cotangents``: d_output, d_hidden, d_cell (never given), d_h_n, d_c_n. Of all gradients, None
    where `torch_route.compute` says so.
    """
    with _casting_nothing(given.input):
        if reserve.numel():
            return _by_cudnn(options, given, hidden[0], reserve, cotangents, needs)
        with recording(), torch.enable_grad():
            leaves: list[Any] = [
                x if x is None else x.detach().requires_grad_(need)
                for x, need in zip((*given[:3], *given[7:9], *given.weights), needs, strict=True)
            ]
            input, h0, c0, reset_h, reset_c, *weights = leaves
            own = given._replace(h0=h0, c0=c0, reset_h=reset_h, reset_c=reset_c)
            states = cotangents[1] is not None
            found = torch_route.compute(
                options, input, own.hx, weights, own.steps, states, 0.0, True
            )
            if found is None:
                return None
            output, (h_n, *c_n), every = found
            pairs = list(zip((output, every, None, h_n, *c_n), cotangents, strict=False))
            return composed.pulled(pairs, leaves, needs, materialize_grads=True)


def _by_cudnn(
    options: Options,
    given: _Given,
    output: Tensor,
    reserve: Tensor,
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """By cuDNN's backward itself, of what its forward left."""
    from torch.backends.cudnn.rnn import get_cudnn_mode

    input, weights, batch_sizes = given.input, given.weights, given.batch_sizes
    rows = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    h0, *c0 = given.hx or torch_route.zeros(options, input, rows, weights)
    d_output, _, _, d_h_n, d_c_n = cotangents
    flat, buffer = torch_route.flat_copies(options, weights, input.shape[-1])
    d_input, d_h0, d_c0, d_weights = torch.ops.aten._cudnn_rnn_backward(
        input=input,
        weight=flat,
        weight_stride0=len(options.weight_kinds),
        weight_buf=buffer,
        hx=h0.contiguous(),
        cx=c0[0].contiguous() if c0 else None,
        output=output,
        grad_output=d_output,
        grad_hy=d_h_n,
        grad_cy=d_c_n,
        mode=get_cudnn_mode(torch_route.name_of(options).upper()),  # type: ignore[no-untyped-call]
        hidden_size=weights[0].shape[0] // options.gates,
        proj_size=options.proj_size,
        num_layers=options.num_layers,
        batch_first=False,
        dropout=0.0,
        train=True,
        bidirectional=options.bidirectional,
        batch_sizes=[] if batch_sizes is None else batch_sizes.tolist(),
        dropout_state=None,
        reserve=reserve.clone(),  # cuDNN writes to it
        output_mask=[True, True, bool(c0), any(needs[5:])],
    )
    found = (d_input, d_h0, d_c0, None, None, *(d_weights or (None,) * len(weights)))
    return [d if need else None for d, need in zip(found, needs, strict=True)]


def _casting_nothing(input: Tensor) -> AbstractContextManager[Any]:
    """Without autocast: an operator's arguments have the dtypes that they are to have."""
    return torch.autocast(input.device.type, enabled=False)


def recording() -> AbstractContextManager[Any]:
    """Where autograd records, though an operator runs below it."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(included, excluded)
    return guard
