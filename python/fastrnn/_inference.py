"""The short way of a layer's or a cell's call where no gradient is recorded.

The same checks, engine and results as the long way, in one call of ``_C.infer``, which allocates
the outputs too and finds the weights packed from the call before (csrc/bind/pack_cache.h). Whatever
is unusual goes the long way, which also says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C
from ._engine import engine_options, scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

_C.set_torch(Tensor, torch.nn.Parameter)
_ATTRIBUTE = "_prepared"


def allowed() -> bool:
    """Whether nothing is recorded, traced, transformed or cast around a call made now."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def run(
    module: Any,
    names: Sequence[str],
    input: Any,
    hx: tuple[Any, ...] | None,
    batch_first: bool,
    cell: bool,
) -> tuple[Tensor, ...] | None:
    """Output (not of a cell), h_n and, of an LSTM, c_n; None where it takes the long way.

    Arguments:
        module: a layer or a cell, whose parameters have the ``names``.
        input: (T, B, I), with ``batch_first`` (B, T, I); of a cell (B, I).
        hx: the states in torch's shapes, or None.
    """
    options, cache = prepared(module)
    parameters = module._parameters
    try:
        weights = [parameters[name] for name in names]
    except KeyError:  # parametrized, weight norm, a replica: not a registered parameter
        return None
    h0, c0 = (None, None) if hx is None else (*hx, None)[:2]
    found: tuple[Tensor, ...] | None = _C.infer(
        options, cache, weights, input, h0, c0, batch_first, cell, torch.get_num_threads()
    )
    return found


def prepared(module: Any) -> tuple[_C.Options, _C.PackCache]:
    """What a module keeps for the engine from call to call; not part of its state."""
    kept: tuple[Any, _C.Options, _C.PackCache] | None = module.__dict__.get(_ATTRIBUTE)
    if kept is None or kept[0] is not module._options:
        options = module._options
        kept = (options, engine_options(*scalars(options)), _C.PackCache())
        module.__dict__[_ATTRIBUTE] = kept
    return kept[1:]


def forget(module: Any) -> None:
    """Drop what a module keeps for the engine."""
    module.__dict__.pop(_ATTRIBUTE, None)


def state_without(module: Any) -> dict[str, Any]:
    """A module's state for pickling and copying: all but what it keeps for the engine."""
    return {name: value for name, value in module.__dict__.items() if name != _ATTRIBUTE}
