"""Support for tools that inspect a model: torch.fx and torch.jit. For Opacus see opacus.py.

torch.fx treats only modules of torch.nn as leaves. It traces into all others, and calls their
forward with proxies instead of tensors. fastrnn's forward then records a call of the whole layer,
as for a leaf.

torch.jit.script compiles the source of forward, which fastrnn's forward does not support, so it
gets torch.nn's layer with the same parameters.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module
from torch.nn.modules import module as _torch_module
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import _checks
from . import opacus

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class SeenByTools(Module):
    """Methods of layers and cells for tools that inspect a model."""

    def __prepare_scriptable__(self) -> Module:
        return scriptable(self)

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """The method that torch calls while it traces.

        torch.onnx's older exporter passes all arguments of the model by position, including
        keyword-only ones, and a bool as a tensor.
        """
        named = list(inspect.signature(self.forward).parameters.values())
        by_position = [p for p in named if p.kind is not p.KEYWORD_ONLY]
        if len(input) > len(by_position) and not any(p.kind is p.VAR_POSITIONAL for p in named):
            extra = named[len(by_position) : len(input)]
            for p, x in zip(extra, input[len(by_position) :], strict=True):
                kwargs[p.name] = bool(x) if isinstance(p.default, bool) else x
            input = input[: len(by_position)]
        return super()._slow_forward(*input, **kwargs)  # type: ignore[no-untyped-call]

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """As ``torch.nn.Module.register_forward_hook``, but Opacus' hook receives all arguments."""
        if type(self).forward is _own_class(self).forward:
            calls = opacus.forward_hook(hook)
            if calls is not None:
                return super().register_forward_hook(calls, **{**options, "with_kwargs": True})
        return super().register_forward_hook(hook, **options)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """As ``torch.nn.Module.register_full_backward_hook``, except for Opacus' hook."""
        handle = opacus.backward_hook(self, hook)
        return handle or super().register_full_backward_hook(hook, prepend)


# ---- torch.fx ------------------------------------------------------------------------------------

# Forward pre-hooks that write a weight and do not change the arguments.
_WRITE_A_WEIGHT = (BasePruningMethod, SpectralNorm, WeightNorm)


def is_traced(*arguments: Any) -> bool:
    """Whether torch.fx traces the call: the arguments contain a proxy."""
    for value in arguments:
        if isinstance(value, Proxy):
            return True
        if isinstance(value, tuple | list) and is_traced(*value):
            return True
    return False


def states_of(cell: str, hx: Any, function: str, *dims: int) -> tuple[Any, ...] | None:
    """The states that a caller gave as a tuple: (h,), of an LSTM (h, c); None for None.

    A proxy of an LSTM's pair, which cannot be taken apart, gives (hx,).

    Arguments:
        function: the name that torch's own error gives the function.
        dims: the numbers of axes of one tensor that torch refuses in place of a pair.
    """
    if hx is None or cell != "LSTM":
        return None if hx is None else (hx,)
    if isinstance(hx, Tensor) and hx.dim() in dims:
        raise TypeError("hx must be a tuple or list of two tensors (h_0, c_0), got one Tensor")
    return (hx,) if isinstance(hx, Proxy) else _checks.state_pair(hx, function)


def call_whole(module: Module, input: Any, hx: tuple[Any, ...] | None, **options: Any) -> Proxy:
    """Record a call in torch.fx's graph, and return the proxy of its result.

    Arguments:
        module: a layer or a cell.
        input, hx: the arguments of its ``_run``; these or options contain a proxy.
        options: the other arguments, None or False if they were not given.

    Raises:
        RuntimeError: the layer itself is the root that torch.fx traces, or the graph would lose
            hooks of the layer.
    """
    tracer = _proxies((input, hx, *options.values())).tracer
    if not isinstance(tracer, torch.fx.Tracer):
        raise RuntimeError(f"expected a torch.fx.Tracer behind the proxy, got {tracer!r}")
    args = (input,) if hx is None else (input, hx[0] if len(hx) == 1 else hx)
    given = {name: x for name, x in options.items() if x is not None and x is not False}
    path = tracer.path_of_module(module)
    name = f"fastrnn.{_own_class(module).__name__}"
    if not path:
        raise RuntimeError(
            f"torch.fx cannot trace {name} as the root module: trace a module that contains the "
            "layer, such as torch.nn.Sequential(layer)"
        )
    _restore_weights(module)
    if _has_old_backward_hooks(module):
        raise RuntimeError(
            f"torch.fx cannot trace {name} with register_backward_hook at {path!r}: use "
            "register_full_backward_hook, or remove the hook before tracing"
        )
    if type(module).forward is _own_class(module).forward and not _hooks(module):
        return tracer.create_proxy("call_module", path, args, given)
    # A subclass's own operations or hooks surround forward: torch.fx traces these, and only the
    # layer's own forward becomes one node.
    if module._backward_hooks or module._backward_pre_hooks:
        raise RuntimeError(
            f"torch.fx loses the backward hooks of {name} at {path!r}, because the layer also has "
            "forward hooks or its own forward: remove the backward hooks before tracing"
        )
    layer = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", call_forward, (layer, *args), given)


def call_forward(module: Any, *args: Any, **options: Any) -> Any:
    """A layer's or cell's computation, without hooks and without a subclass's own forward."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _WRITE_A_WEIGHT):
            hook(module, args)
    return _own_class(module).forward(module, *args, **options)


def _proxies(value: Any) -> Proxy:
    """The first proxy in nested tuples and lists that contain one."""
    while not isinstance(value, Proxy):
        value = next(part for part in value if is_traced(part))
    return value


def _own_class(module: Module) -> Any:
    """The class of fastrnn.nn that defines a layer's computation."""
    own = (c for c in type(module).__mro__ if c.__module__ == "fastrnn.nn")
    return next(own, type(module))  # a user's class derived directly from the bases has its own


def _hooks(module: Module) -> bool:
    """Whether the module has hooks that may change arguments or results of a call."""
    before = (
        *module._forward_pre_hooks.values(),
        *_torch_module._global_forward_pre_hooks.values(),
    )
    after = module._forward_hooks or _torch_module._global_forward_hooks
    return bool(after) or not all(isinstance(hook, _WRITE_A_WEIGHT) for hook in before)


def _has_old_backward_hooks(module: Module) -> bool:
    """Whether `torch.nn.Module.__call__` would search the proxy for a tensor for ever."""
    own = module._backward_hooks and module._is_full_backward_hook is False
    every = _torch_module._global_backward_hooks and (
        _torch_module._global_is_full_backward_hook is False
    )
    return bool(own or every)


def _restore_weights(module: Module) -> None:
    """Recompute the weights that a hook has computed from proxies, which torch.fx passed to it."""
    own = vars(module)
    if not any(isinstance(value, Proxy) for value in own.values()):
        return
    sources = {n: x for n, x in {**module._parameters, **module._buffers}.items() if x is not None}
    own.update(sources)  # so that attribute access does not reach torch.fx's __getattr__
    try:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _WRITE_A_WEIGHT):
                hook(module, ())
    finally:
        for name in sources:
            del own[name]


# ---- torch.jit -----------------------------------------------------------------------------------


def scriptable(module: Module) -> Module:
    """torch.nn's layer with the same parameters, which torch.jit.script compiles instead.

    Raises:
        ValueError: torch.nn has no layer with these options.
    """
    from ..models.convert import to_torch

    own = _own_class(module)
    ways = (
        "use torch.jit.trace or torch.export, which support the layer; import fastrnn before you "
        "load the file"
    )
    if type(module).forward is not own.forward:
        raise ValueError(
            f"torch.jit.script cannot compile {type(module).__name__}, a subclass of fastrnn."
            f"{own.__name__} with its own forward: {ways}"
        )
    plain = module
    if not parametrize.is_parametrized(module):
        plain = own.__new__(own)
        vars(plain).update(vars(module))
    try:
        return to_torch(plain)
    except ValueError as error:
        raise ValueError(
            f"torch.jit.script cannot compile fastrnn.{own.__name__}: {error}; {ways}"
        ) from None


def without_first_axis(state: Tensor) -> Tensor:
    """(1, B, H) as (B, H), for a tensor without other references.

    The result is not a view, because torch refuses detach_() of views. Only in a trace of torch.jit
    it is one, because the trace would store B as a constant otherwise.
    """
    if torch._C._get_tracing_state() is not None:
        return state.squeeze(0)
    seen: Tensor = torch.ops.aten._unsafe_view.default(state, state.shape[1:])
    return seen
