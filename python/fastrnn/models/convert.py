"""Replace torch.nn's recurrent layers inside a model by fastrnn's, and back."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch.nn.utils import parametrize

from .._checks import check_model
from ..layers.cell import RecurrentCell
from ..layers.layer import RecurrentLayer
from ..layers.surface import DERIVED, GIVEN, is_a
from ..nn import RNN, RNNCell
from .subclasses import (
    BASES,
    COUNTERPARTS,
    is_torchs,
    over_ours,
    reason_against,
    rebound,
    users_class,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.nn import Module

_TORCHS = {ours: torchs for torchs, ours in COUNTERPARTS.items()}

# Attributes that torch derives from a layer's other attributes, and the result of Module.compile().
_TORCH_DERIVED = ("_flat_weights", "_flat_weight_refs", "_compiled_call_impl")
_OUR_DERIVED = (*DERIVED, GIVEN, "_compiled_call_impl")

# Options that do not change a layer's results, so torch's layer needs no equivalent.
_COMPUTE_THE_SAME = ("forget_bias", "recompute")


def convert(model: Module) -> Module:
    """Replace every torch.nn recurrent layer and cell in a model by fastrnn's.

    The new layers hold the same Parameter objects, so optimisers, weight sharing and
    ``requires_grad`` do not change. Hooks, parametrizations, weight norm and the training mode are
    kept. A layer that occurs in several places of the model is replaced by one new layer.

    A user's subclass of one of torch.nn's layers is converted too, if its forward is torch's own
    or calls ``super().forward``: the module keeps its class's name and methods, ``isinstance`` of
    the class still holds, and ``super()`` in the methods refers to fastrnn's layer. One warning
    names every module that is not converted, with the reason: a forward with its own computation,
    an override of a method that torch's forward calls (``check_input``, ``permute_hidden``, …), or
    an attribute name that fastrnn's layer uses.

    Packages that construct models when they load their files construct torch.nn's layers again.
    Convert after loading, or call `fastrnn.patch_torch` before you import the package.

    Arguments:
        model: any module; it is changed in place. If you have called ``compile()`` on a module in
            it, compile that module again.

    Returns:
        The model; if the model itself is one of torch.nn's recurrent layers or cells, the new
        layer.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Warns:
        UserWarning: a recurrent module was not converted.

    >>> import torch
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4), "out": torch.nn.Linear(4, 1)})
    >>> convert(model)["rnn"]
    LSTM(3, 4)
    >>> type(model["rnn"]).__module__
    'fastrnn.nn'

    A user's class keeps its name and the code around ``super().forward``:

    >>> import fastrnn
    >>> class Halved(torch.nn.GRU):
    ...     def forward(self, input, hx=None):
    ...         output, h_n = super().forward(input, hx)
    ...         return output / 2, h_n
    >>> halved = convert(Halved(3, 4))
    >>> isinstance(halved, Halved), isinstance(halved, fastrnn.GRU)
    (True, True)
    """
    check_model(model)
    left: dict[str, str] = {}

    def target(path: str, module: Module) -> type[Module] | None:
        if not is_torchs(module):
            return None
        cls = _plain_class(module)
        reason = reason_against(module, cls)
        if reason is None:
            try:
                return COUNTERPARTS.get(cls) or over_ours(cls)
            except TypeError as error:  # from its __init_subclass__ or its metaclass
                reason = f"no class can be derived from it: {error}"
        where = repr(path) if path else "the model itself"
        left.setdefault(where, f"{where} ({cls.__module__}.{cls.__qualname__}): {reason}")
        return None

    converted = swap(model, target, _to_ours)
    if left:
        count = f"{len(left)} recurrent module{'s' if len(left) > 1 else ''}"
        warnings.warn(
            f"convert left {count} as torch.nn's: {'; '.join(left.values())}", stacklevel=2
        )
    return converted


def to_torch(model: Module) -> Module:
    """Replace every fastrnn layer and cell in a model by torch.nn's: the inverse of `convert`.

    Arguments:
        model: any module; it is changed in place. Users' classes that `convert` converted are
            converted back. Classes derived from fastrnn's layers may compute something else, so
            they are not changed.

    Returns:
        The model; if the model itself is one of fastrnn's layers or cells, the new layer.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: a layer has an option that torch.nn does not have; the message names both, and
            the model is not changed. ``forget_bias`` and ``recompute`` are allowed, because they
            do not change a layer's results.

    >>> import fastrnn
    >>> to_torch(fastrnn.GRU(3, 4))
    GRU(3, 4)
    >>> to_torch(fastrnn.GRU(3, 4, reset_after=False))
    Traceback (most recent call last):
        ...
    ValueError: the GRU at the top of the model has reset_after=False, which torch.nn does not have
    """
    check_model(model)

    def target(path: str, module: Module) -> type[Module] | None:
        cls = _plain_class(module)
        return _TORCHS.get(cls) or users_class(cls)

    for path, module in model.named_modules():
        if target(path, module):
            _check_torch_has_it(path, module)
    return swap(model, target, _to_torchs)


def swap(
    model: Module,
    target: Callable[[str, Module], type[Module] | None],
    change: Callable[[Module, type[Module]], Module],
) -> Module:
    """Change every module that has a target, in all places where it occurs."""
    swapped: dict[Module, Module] = {}
    for path, module in list(model.named_modules()):
        cls = target(path, module)
        if cls is not None:
            swapped[module] = change(module, cls)
    for parent in [*model.modules(), *swapped.values()]:
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child]
    for module in [*model.modules(), *swapped.values()]:
        _rebind_functions(module, swapped)
    return swapped.get(model, model)


def _plain_class(module: Module) -> type[Module]:
    """The class of the module, or the one it had before it was parametrized."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _to_ours(module: Module, target: type[Module]) -> Module:
    ours: Any = _build(module, target)
    state = _shared_state(module, _TORCH_DERIVED)
    base = RecurrentLayer if is_a(ours, RecurrentLayer) else RecurrentCell
    base.__setstate__(ours, state)  # not the user's override
    if users_class(target):
        for name in _own_options(ours).keys() - state.keys():  # the user's class does not read them
            vars(ours).pop(name, None)
    return _rebind_hooks(ours)


def _to_torchs(module: Module, target: type[Module]) -> Module:
    own = _own_options(module)
    dropped = [*_OUR_DERIVED, "_own"]
    if users_class(_plain_class(module)) is None:
        dropped += [name for name in own if vars(module).get(name) == own[name]]
    layer: Any = _build(module, target)
    layer.__dict__.update(_shared_state(module, dropped))
    if is_a(layer, BASES[0]):
        layer._init_flat_weights()
    return _rebind_hooks(layer)


def _shared_state(module: Module, dropped: Iterable[str]) -> dict[str, Any]:
    """The module's attributes; the tensors are shared, the dictionaries that hold them are copies.

    The dictionaries of hooks are the same objects, so that handles that users hold still remove
    their hooks.
    """
    state = {name: value for name, value in vars(module).items() if name not in dropped}
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = state[name].copy()
    return state


def _build(module: Module, target: type[Module]) -> Module:
    """An empty instance of the target class, parametrized if the module is."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), own)
    return target.__new__(target)


def _rebind_functions(module: Module, swapped: dict[Module, Module]) -> None:
    """Make functions stored on a module, for example a forward, refer to the new modules."""
    if module in swapped:  # a replaced module, which stays as it was
        return
    for name, value in vars(module).items():
        if callable(value):
            vars(module)[name] = rebound(value, swapped)


def _rebind_hooks(module: Module) -> Module:
    """Make hooks that hold their module hold the new module."""
    hooks: Iterable[Any] = module._load_state_dict_pre_hooks.values()
    for hook in hooks:
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)
    return module


def _own_options(module: Module) -> dict[str, Any]:
    """The values of the options that torch.nn does not have."""
    return vars(module)["_own"] if is_a(module, RecurrentLayer, RecurrentCell) else {}


def _check_torch_has_it(path: str, module: Any) -> None:
    where = f"at {path!r}" if path else "at the top of the model"
    values = dict(_own_options(module))
    defaults = dict(module.own_options)
    if is_a(module, RNN, RNNCell):
        values["nonlinearity"] = module.nonlinearity
        defaults["nonlinearity"] = "relu" if module.nonlinearity == "relu" else "tanh"
    for name, value in values.items():
        off = (defaults[name], (0, 0), [0, 0])  # zoneout may be a pair
        if value not in off and name not in _COMPUTE_THE_SAME:
            raise ValueError(
                f"the {_plain_class(module).__name__} {where} has {name}={value!r}, "
                "which torch.nn does not have"
            )
