"""The public functions on torch tensors: checks, then `recurrent`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._checks import as_tensor, check_tensor, has_values, integer_tensor
from .._engine import Extras, States
from .arguments import (
    REAL,
    Arguments,
    Description,
    arguments,
    check,
    check_gradient,
    check_lengths,
    check_shape,
)
from .call import recurrent

if TYPE_CHECKING:
    from .._options import Options


class Saved(NamedTuple):
    """What ``backward`` needs of ``forward``: a graph of its own, arguments to outputs."""

    options: Options
    given: Arguments
    outputs: Outputs


class Outputs(NamedTuple):
    output: Tensor
    hx_n: tuple[Tensor, ...]
    states: States | None
    saved: Saved | None


def forward(
    options: Options,
    input: Any,
    hx: Any,
    weights: Any,
    lengths: Any,
    reset: Any,
    extras: Extras,
    *,
    batch_first: bool,
    return_states: bool,
    return_saved: bool,
) -> Outputs:
    given = arguments(options, input, hx, weights, lengths, reset, extras)
    check(
        options,
        given,
        _describe,
        batch_first=batch_first,
        dtypes=(*REAL, "complex64", "complex128"),
    )
    given = _prepared(given, batch_first)
    if not return_saved:
        return _run(options, given, batch_first, return_states)
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "return_saved must be False under the transforms of torch.func: take gradients with "
            "torch.func.grad or torch.func.vjp"
        )
    # Neither no_grad nor inference_mode: the graph is for `backward`, and is of this call alone.
    with torch.inference_mode(False), torch.enable_grad():
        own = Arguments(
            _leaf(given.input),
            given.hx and tuple(map(_leaf, given.hx)),
            tuple(map(_leaf, given.weights)),
            given.lengths,
            given.reset,
            _leaves_of_extras(given.extras),
        )
        outputs = _run(options, own, batch_first, return_states)
    saved = Saved(options, own, outputs)
    states = outputs.states and States(*(s if s is None else s.detach() for s in outputs.states))
    return Outputs(outputs.output.detach(), tuple(s.detach() for s in outputs.hx_n), states, saved)


def backward(
    d_output: Tensor | None,
    d_hx_n: tuple[Tensor | None, ...],
    saved: Saved,
    d_states: States,
) -> tuple[Tensor, tuple[Tensor, ...] | None, list[Tensor], tuple[Tensor | None, ...] | None]:
    outputs, given = saved.outputs, saved.given
    d_h_n, d_c_n = (*d_hx_n, None, None)[:2]
    h_n, c_n = (*outputs.hx_n, None)[:2]
    h, c = outputs.states or (None, None)
    d_h, d_c = d_states
    pairs = [
        _pair("d_output", outputs.output, d_output),
        _pair("d_h_n", h_n, d_h_n),
        _pair("d_c_n", c_n, d_c_n),
        _pair("d_states.h", h, d_h),
        _pair("d_states.c", c, d_c),
    ]
    found = [pair for pair in pairs if pair is not None]
    anew = [x for x in given.extras[:2] if x is not None]
    leaves = (given.input, *(given.hx or ()), *anew, *given.weights)
    if found:
        gradients = torch.autograd.grad(
            [y for y, _ in found],
            leaves,
            [d for _, d in found],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    else:
        gradients = tuple(map(torch.zeros_like, leaves))
    found_in_order = iter(gradients)
    d_input = next(found_in_order)
    d_hx = tuple(next(found_in_order) for _ in given.hx or ())
    d_reset = tuple(None if x is None else next(found_in_order) for x in given.extras[:2])
    return d_input, d_hx or None, list(found_in_order), d_reset if anew else None


def _run(options: Options, given: Arguments, batch_first: bool, return_states: bool) -> Outputs:
    output, hx_n, states = recurrent(
        options,
        given.input.transpose(0, 1) if batch_first else given.input,
        given.hx,
        given.weights,
        lengths=given.lengths,
        reset=given.reset,
        extras=given.extras,
        return_states=return_states,
    )
    return Outputs(output.transpose(0, 1) if batch_first else output, hx_n, states, None)


def _leaf(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.clone() if x.is_inference() else x).requires_grad_()


def _leaves_of_extras(extras: Extras) -> Extras:
    anew = {name: getattr(extras, name) for name in ("reset_h", "reset_c")}
    return extras._replace(**{n: x if x is None else _leaf(x) for n, x in anew.items()})


def _describe(name: str, x: Any) -> Description:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor as input is, got {type(x).__name__}")
    check_tensor(name, x)
    return Description(tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device))


def _prepared(given: Arguments, batch_first: bool) -> Arguments:
    """lengths as int64 and reset as (T, B), both checked."""
    input, lengths, reset = given.input, given.lengths, given.reset
    B, T = input.shape[:2] if batch_first else reversed(input.shape[:2])
    if lengths is not None:
        lengths = integer_tensor(lengths, input)
        check_shape("lengths", tuple(lengths.shape), (B,))
        lengths = lengths.to(torch.int64).resolve_neg()
        if has_values(lengths):
            check_lengths(lengths.tolist(), T)
        lengths = lengths.contiguous()
    if reset is not None:
        reset = as_tensor("reset", reset, input).to(input.device)
        if reset.dtype != torch.bool:
            raise TypeError(f"reset must be bool, got {reset.dtype}")
        check_shape("reset", tuple(reset.shape), (B, T) if batch_first else (T, B))
        reset = reset.T if batch_first else reset
    return given._replace(lengths=lengths, reset=reset)


def _pair(name: str, y: Tensor | None, d: Any) -> tuple[Tensor, Tensor] | None:
    """An output and its gradient, where one is given."""
    if d is None:
        return None
    if y is None:
        raise ValueError(f"{name} must be None: forward gave no such output")
    check_gradient(name, _describe(name, d), _describe(name, y))
    return y, d
