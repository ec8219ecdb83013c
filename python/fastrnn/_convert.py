"""Swapping torch.nn's recurrent layers inside a model for fastrnn's, and back."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize

from ._cells import RecurrentCell
from ._checks import check_model
from ._layer import RecurrentLayer
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.nn import Module

_OURS: dict[type[Module], type[Module]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

# What each side derives from the rest of a layer's attributes.
_TORCH_DERIVED = ("_flat_weights", "_flat_weight_refs")
_OUR_DERIVED = ("_options", "_weight_shapes", "_prepared")

# Own options that change nothing of what a layer computes, so that torch's needs no equal of them.
_COMPUTE_THE_SAME = ("forget_bias", "recompute")


def convert(model: Module) -> Module:
    """Swap every torch.nn recurrent layer and cell in a model for fastrnn's.

    The new layers hold the same Parameter objects, so that optimisers, weight sharing and
    ``requires_grad`` stay as they are; hooks, parametrizations, weight norm and the training mode
    are carried over. A layer that stands in several places of the model is swapped for one.

    Arguments:
        model: any module. It is changed in place. Subclasses of torch.nn's layers may compute
            something else and are left alone.

    Returns:
        The model; where the model itself is one of torch.nn's recurrent layers or cells, the layer
        that takes its place.

    Raises:
        TypeError: model is no module.

    >>> import torch
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4), "out": torch.nn.Linear(4, 1)})
    >>> convert(model)["rnn"]
    LSTM(3, 4)
    >>> type(model["rnn"]).__module__
    'fastrnn.nn'
    """
    check_model(model)
    return _swap(model, _OURS, _to_ours)


def to_torch(model: Module) -> Module:
    """Swap every fastrnn layer and cell in a model for torch.nn's: the way back from `convert`.

    Arguments:
        model: any module. It is changed in place. Subclasses of fastrnn's layers may compute
            something else and are left alone.

    Returns:
        The model; where the model itself is one of fastrnn's layers or cells, the layer that takes
        its place.

    Raises:
        TypeError: model is no module.
        ValueError: a layer has an option that torch.nn does not have; the message names both. The
            model is then as it was. ``forget_bias`` and ``recompute`` stand in no way: what a layer
            computes is the same without them.

    >>> import fastrnn
    >>> to_torch(fastrnn.GRU(3, 4))
    GRU(3, 4)
    >>> to_torch(fastrnn.GRU(3, 4, reset_after=False))
    Traceback (most recent call last):
        ...
    ValueError: the GRU at the top of the model has reset_after=False, which torch.nn does not have
    """
    check_model(model)
    for path, module in model.named_modules():
        if _plain_class(module) in _TORCHS:
            _check_torch_has_it(path, module)
    return _swap(model, _TORCHS, _to_torchs)


def _swap(
    model: Module,
    classes: dict[type[Module], type[Module]],
    change: Callable[[Module, type[Module]], Module],
) -> Module:
    swapped: dict[Module, Module] = {}

    def swap(module: Module) -> Module:
        target = classes.get(_plain_class(module))
        if target is None:
            return module
        if module not in swapped:
            swapped[module] = change(module, target)
        return swapped[module]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = swap(child)
    return swap(model)


def _plain_class(module: Module) -> type[Module]:
    """The class of the module, or the one it had before it was parametrized."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _to_ours(module: Module, target: type[Module]) -> Module:
    ours: Any = _build(module, target)
    ours.__setstate__(_shared_state(module, _TORCH_DERIVED))
    return _rebind_hooks(ours)


def _to_torchs(module: Module, target: type[Module]) -> Module:
    dropped = {*_OUR_DERIVED, *_own_options(module)} - {"nonlinearity"}
    layer: Any = _build(module, target)
    layer.__dict__.update(_shared_state(module, dropped))
    if isinstance(layer, torch.nn.RNNBase):
        layer._init_flat_weights()
    return _rebind_hooks(layer)


def _shared_state(module: Module, dropped: Iterable[str]) -> dict[str, Any]:
    """The module's attributes; its tensors are shared, what holds them is not.

    The dictionaries of hooks are the same objects, so that the handles that users keep still
    remove their hooks.
    """
    state = {name: value for name, value in vars(module).items() if name not in dropped}
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = state[name].copy()
    return state


def _build(module: Module, target: type[Module]) -> Module:
    """An empty instance of the target class, parametrized where the module is."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), own)
    return target.__new__(target)


def _rebind_hooks(module: Module) -> Module:
    """Point the hooks that remember their module at the one that took its place."""
    hooks: Iterable[Any] = module._load_state_dict_pre_hooks.values()
    for hook in hooks:
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)
    return module


def _own_options(module: Module) -> dict[str, Any]:
    return module.own_options if isinstance(module, RecurrentLayer | RecurrentCell) else {}


def _check_torch_has_it(path: str, module: Module) -> None:
    where = f"at {path!r}" if path else "at the top of the model"
    shown = dict(_own_options(module))
    if isinstance(module, RNN | RNNCell):
        shown["nonlinearity"] = "relu" if module.nonlinearity == "relu" else "tanh"
    for name, default in shown.items():
        value = getattr(module, name)
        off = (default, (0, 0), [0, 0])  # zoneout may be a pair
        if value not in off and name not in _COMPUTE_THE_SAME:
            raise ValueError(
                f"the {_plain_class(module).__name__} {where} has {name}={value!r}, "
                "which torch.nn does not have"
            )
