"""Rebase users' subclasses of torch.nn's layers onto fastrnn's layers; for `convert`.

A converted module gets a new class of the same name, derived from the user's class. In its method
resolution order fastrnn's layer replaces torch's:

    user's class:  MyLSTM, torch.nn.LSTM, torch.nn.RNNBase, Module, object
    new class:     MyLSTM, the user's MyLSTM, fastrnn.LSTM, …, Module, object

Python looks methods up only along this order. So ``super().forward`` in the user's unchanged
methods calls fastrnn's forward, and isinstance of the user's class holds, while the module is no
longer one of torch.nn's layers, which dynamo would refuse. The alternatives are worse: new
``__bases__`` for the user's class would change its other instances, in models that are not
converted; for a copy of the class, method by method, isinstance of the user's class would not hold.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC
from types import CellType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..layers.surface import DERIVED, GIVEN, is_a
from .patch import OURS, TORCHS

if TYPE_CHECKING:
    from collections.abc import Iterator

BASES = tuple(TORCHS[name] for name in ("RNNBase", "RNNCellBase"))
COUNTERPARTS: dict[type, type] = {
    TORCHS[name]: ours for name, ours in OURS.items() if TORCHS[name] not in BASES
}

# Attributes that torch.nn's forward calls or reads and fastrnn's does not.
_INTERNALS = (
    "_all_weights",
    "_flat_weight_refs",
    "_flat_weights",
    "_flat_weights_names",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
    "all_weights",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)
_CONSTRUCTION = ("__new__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
_MARK = "_fastrnn_over_ours"  # only in the dictionary of a class made by over_ours
_ENGINES = ("_VF", "_rnn_impls")  # where torch.nn finds its recurrent functions


class _Substituting(type):
    """The metaclass of a user's class rebased onto fastrnn's layer."""

    def mro(cls) -> list[type]:
        order = super().mro()
        substituted: list[type] = []
        for base in order:
            if base in COUNTERPARTS:
                substituted += [own for own in COUNTERPARTS[base].__mro__ if own not in order]
            elif base not in BASES:
                substituted.append(base)
        return substituted


def over_ours(cls: type) -> type:
    """The user's class rebased onto fastrnn's layer; made once for each class.

    Arguments:
        cls: a class derived from one of torch.nn's layers or cells.
    """
    known: list[type] = cls.__subclasses__()
    for derived in known:
        if users_class(derived) is cls:
            return derived
    kind = type(cls)
    metaclass: type = _Substituting
    if kind is not type:
        metaclass = type("_Substituting", (_Substituting, kind), {})
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours: type = metaclass(cls.__name__, (cls,), {**names, "__reduce_ex__": _reduce_ex})
    setattr(ours, _MARK, True)  # last, because a class exists even if its __init_subclass__ raised
    return ours


def users_class(cls: type) -> type | None:
    """The user's class from which `over_ours` made this class; None for any other class."""
    return cls.__bases__[0] if _MARK in vars(cls) else None


def _reduce_ex(module: Any, protocol: int) -> Any:
    """Pickle by the user's class, which pickle can find by its name."""
    cls = users_class(type(module))
    if cls is None:  # a subclass of the rebased class
        return object.__reduce_ex__(module, protocol)
    return empty, (cls,), module.__getstate__()


def empty(cls: Any) -> Any:
    """An instance of the rebased class without attributes; pickled modules refer to this function.

    If `patch_torch` was called before the user's class was defined, the class itself derives from
    fastrnn's layer.
    """
    if not torchs_class(cls):
        return cls.__new__(cls)
    ours: Any = over_ours(cls)
    return ours.__new__(ours)


def torchs_class(cls: type) -> type | None:
    """The layer or cell class of torch.nn that the class is, or derives from."""
    return next((base for base in cls.__mro__ if base in COUNTERPARTS), None)


def is_torchs(module: Module) -> bool:
    """Whether the module is a recurrent layer or cell of torch.nn, or of a derived class."""
    return is_a(module, *BASES)


# ---- modules that cannot be converted ---------------------------------------------------------


def reason_against(module: Module, cls: type) -> str | None:
    """Why a recurrent module of torch.nn cannot be converted; None if it can.

    Arguments:
        cls: the module's class, or the one it had before it was parametrized.
    """
    torchs = torchs_class(cls)
    if torchs is None:
        return "it derives directly from torch.nn's base class and has its own forward"
    own = _names_of(COUNTERPARTS[torchs], torchs)
    reason = _reason_against_class(cls, torchs, own)
    if reason:
        return reason
    held: set[str] = set()
    for names in (vars(module), module._parameters, module._buffers, module._modules):
        held |= names.keys()
    taken = sorted(held & own)
    if taken:
        return f"its attribute {taken[0]} has another meaning in fastrnn"
    if "forward" in vars(module) and not _calls_forward_of(module, vars(module)["forward"]):
        return "its forward was replaced by one that does not call the layer's own"
    return None


def _names_of(ours: Any, torchs: type) -> set[str]:
    """The names of attributes that fastrnn's layer has and torch's does not."""
    shared = {*dir(torchs), *dir(ABC), *_INTERNALS, "nonlinearity"}
    return {*dir(ours), *DERIVED, GIVEN, "_own"} - shared


def _reason_against_class(cls: type, torchs: type, own: set[str]) -> str | None:
    classes = [c for c in cls.__mro__ if c not in torchs.__mro__]
    for users in classes:
        if users.__module__.partition(".")[0] == "torch":
            return f"{users.__module__}.{users.__qualname__} is one of torch's own classes"
        names = vars(users)
        for name in (*_INTERNALS, *_CONSTRUCTION):
            if name in names:
                return f"{users.__qualname__} defines {name}"
        if names.get("__slots__"):
            return f"{users.__qualname__} has __slots__"
        taken = sorted(own & names.keys())
        if taken:
            return f"{users.__qualname__} defines {taken[0]}, which has another meaning in fastrnn"
    return _reason_against_forward(classes, torchs)


def _reason_against_forward(classes: list[type], torchs: type) -> str | None:
    """Why the forward of the user's classes cannot be kept; None if it only calls torch's."""
    seen: set[str] = set()
    waiting = ["forward"]
    calls = not any("forward" in vars(users) for users in classes)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for users in classes:
            if name not in vars(users):
                continue
            function = _function(vars(users)[name])
            if function is None:
                if name == "forward":
                    return f"forward of {users.__qualname__} is not a plain function"
                continue
            used = set(_names_in(function.__code__))
            for engine in _ENGINES:
                if engine in used:
                    return f"{name} of {users.__qualname__} calls torch's engine, {engine}, itself"
            for own in (torchs, *BASES):  # unless the name refers to the user's own class
                if own.__name__ in used and function.__globals__.get(own.__name__, own) is own:
                    return f"{name} of {users.__qualname__} names torch.nn's {own.__name__} itself"
            calls |= {"super", "forward"} <= used
            waiting += used
    return None if calls else "its forward does not call super().forward"


def _function(value: Any) -> FunctionType | None:
    """The function behind an entry of a class's dictionary, without decorators."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function and the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


# ---- functions that hold a module -------------------------------------------------------------


def _calls_forward_of(module: Module, value: Any, seen: tuple[Any, ...] = ()) -> bool:
    """Whether a function stored on the module captures the module's own forward."""
    if isinstance(value, MethodType):
        return value.__self__ is module and value.__func__.__name__ == "forward"
    if any(value is other for other in seen):  # a function that captures itself
        return False
    return any(_calls_forward_of(module, part, (*seen, value)) for part in _caught(value))


def _caught(value: Any) -> list[Any]:
    """The values that a function or a partial captures."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]
        keywords = value.__kwdefaults__ or {}
        caught = [*(value.__defaults__ or ()), *keywords.values(), *vars(value).values()]
        return [*(cell.cell_contents for cell in cells), *caught]
    return []


def rebound(value: Any, swapped: dict[Module, Module], seen: tuple[Any, ...] = ()) -> Any:
    """The value with old modules replaced by new ones, also inside functions that capture them.

    Methods of an old module become the new module's methods of the same name.
    """
    if isinstance(value, Module):
        return swapped.get(value, value)
    if isinstance(value, MethodType):
        old = value.__self__
        if not isinstance(old, Module) or old not in swapped:
            return value
        new = swapped[old]
        return MethodType(_counterpart(value.__func__, old, new), new)
    if any(value is other for other in seen):
        return value

    def part(caught: Any) -> Any:
        return rebound(caught, swapped, (*seen, value))

    def parts(caught: dict[str, Any] | None) -> dict[str, Any]:
        return {name: part(own) for name, own in (caught or {}).items()}

    def cell(own: CellType) -> CellType:
        return own if own == CellType() else CellType(part(own.cell_contents))

    if not any(part(caught) is not caught for caught in _caught(value)):
        return value
    if isinstance(value, functools.partial):
        return functools.partial(part(value.func), *map(part, value.args), **parts(value.keywords))
    function = FunctionType(
        value.__code__,
        value.__globals__,
        value.__name__,
        tuple(map(part, value.__defaults__ or ())) or None,
        tuple(map(cell, value.__closure__ or ())),
    )
    function.__kwdefaults__ = parts(value.__kwdefaults__) or None
    function.__dict__.update(parts(vars(value)))
    function.__qualname__, function.__module__ = value.__qualname__, value.__module__
    function.__doc__ = value.__doc__
    return function


def _counterpart(function: Any, old: Module, new: Module) -> Any:
    """The new layer's function of the same name if the old layer defines it, else the function."""
    name, layer = function.__name__, _layer_of(type(old))
    for base in layer.__mro__:
        if base is not Module and vars(base).get(name) is function:
            return getattr(_layer_of(type(new)), name)
    return function


def _layer_of(cls: type) -> Any:
    """The layer or cell class of torch.nn or fastrnn that a class is, or derives from."""
    layers = {*COUNTERPARTS, *COUNTERPARTS.values()}
    return next(base for base in cls.__mro__ if base in layers)
