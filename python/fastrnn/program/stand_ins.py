"""Stand-ins: tensors without values, on which a step runs to be traced.

``__torch_function__`` passes every use of a stand-in to the active `Session` of the thread.
"""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .. import _C

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from .lowering import View


class Untraceable(Exception):
    """The step runs as a loop; the message names the operation, the reason and the line."""


class _Local(threading.local):
    active: Session | None = None


_local = _Local()

STAND_IN, CAPTURED, NUMBER = range(3)  # kinds of arguments, as in csrc/bind/stand_in.cpp

# Functions of shapes and dtypes, which a stand-in answers itself.
_PASSIVE = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in "shape ndim dtype layout is_sparse is_quantized is_cuda is_mps grad_fn "
        "itemsize".split()
    ]
    + [
        getattr(Tensor, name)
        for name in "size dim ndimension numel nelement element_size stride storage_offset "
        "is_contiguous is_floating_point is_complex __len__ __hash__ get_device".split()
    ]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)

# Types of arguments that are constants of a program.
_CONSTANTS = (
    bool, int, float, complex, str, type(None), type(...), type, np.generic,
    torch.dtype, torch.layout, torch.memory_format, torch.device,
)  # fmt: skip


_CPU, META = torch.device("cpu"), torch.device("meta")

# What a stand-in answers in place of its meta tensor.
_ANSWERS: dict[Any, Any] = {
    Tensor.device.__get__: _CPU,
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}

# Functions that read a value, which a stand-in does not have.
READS = {
    Tensor.requires_grad.__get__: "Tensor.requires_grad",  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__: "Tensor.is_leaf",  # type: ignore[attr-defined]
    Tensor.__bool__: "a Python branch on a value",
    Tensor.__int__: "int() of a value",
    Tensor.__float__: "float() of a value",
    Tensor.__index__: "a value as an index",
    Tensor.__contains__: "`in` over values",
    **{
        getattr(Tensor, name): f"Tensor.{name}"
        for name in ("item", "tolist", "numpy", "__array__", "data_ptr")
    },
    **{getattr(torch, name): f"torch.{name}" for name in ("is_nonzero", "equal", "allclose")},
}


def _elman(activation: Any) -> Any:
    def cell(x: Any, h: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        linear = torch.nn.functional.linear
        return activation(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh))

    return cell


# Functions that cannot run on meta tensors, each with an equivalent that can.
_INSTEAD = {
    getattr(home, f"rnn_{name}_cell"): _elman(getattr(torch, name))
    for home in (torch, torch._VF)
    for name in ("tanh", "relu")
}
_INSTEAD[Tensor.cpu] = lambda x, *_, **__: x


def tracing() -> bool:
    """Whether a step runs on stand-ins in this thread."""
    return _local.active is not None


class Traced(Tensor):
    """A stand-in for a tensor of the step, with a shape and a dtype, without values."""

    traced_number: int
    traced_meta: Tensor
    traced_view: View

    @staticmethod
    def make(meta: Tensor, view: View, number: int) -> Traced:
        made: Traced = Tensor._make_subclass(Traced, meta, meta.dtype.is_floating_point)
        made.traced_meta, made.traced_view, made.traced_number = meta, view, number
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Traced(shape={tuple(self.traced_meta.shape)}, dtype={self.traced_meta.dtype})"


def _asked(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Handles every use of a stand-in except calls that match a replay."""
    session = _local.active
    if func in _PASSIVE:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
    if func in _ANSWERS:
        return _ANSWERS[func]
    if session is None:
        raise RuntimeError(
            "a tensor made inside a step of fastrnn.scan or Recurrent is used after the step. The "
            "step is traced on tensors without values, so a tensor that it stores in an attribute "
            "or a list holds no result. Return it from the step, as part of y or of the state"
        )
    return session.call(func, args, kwargs or {})


# Files whose frames are not part of the step.
_NOT_THE_STEPS = (
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "any_cell"),
    str(Path(torch.__file__).parent),
    "<frozen",
)


def _where() -> str:
    """The current line of the step: the innermost frame outside torch and tracing."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_STEPS):
            return f'File "{name}", line {frame.f_lineno}'
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def name_of(func: Any) -> str:
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or str(func)
    return str(name).replace("_TensorBase", "Tensor").replace("TensorBase", "Tensor")


class Session:
    """One run of a step on stand-ins."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch  # B; None: the step has no rows
        self.grad = torch.is_grad_enabled()
        self.slots: dict[int, int] = {}  # by id of a captured tensor, its index in `tensors`
        self.tensors: list[Tensor] = []  # the captured tensors
        self.failure: Exception | None = None  # the first error that `failed` received

    def step(self, step: Any, carry: list[Any], xs: list[Any]) -> Any:
        """The result of ``step(carry, xs)``."""
        with self.filling(step):
            return step(carry, xs)

    def filling(self, step: Any) -> AbstractContextManager[Any]:
        """For a step without a state: makes its constant tensors stand-ins (see start.py)."""
        return _Filling(self) if getattr(step, "begins", False) else nullcontext()

    def failed(self, error: Exception) -> Exception:
        """Stores an error, because the step may catch it, and returns it for raising."""
        self.failure = self.failure or error
        return error

    def refused(self, what: str) -> Exception:
        return self.failed(Untraceable(f"{what} ({_where()})"))

    def __enter__(self) -> Session:
        if _local.active is not None:
            raise Untraceable("a scan inside the step of another")
        # fx wraps the calls of modules; an exception must not pass through that wrapper.
        self.module_call = torch.nn.Module.__call__
        if self.module_call is not torch.nn.Module._wrapped_call_impl:
            torch.nn.Module.__call__ = torch.nn.Module._wrapped_call_impl  # type: ignore[method-assign]
        _local.active = self
        return self

    def __exit__(self, *error: object) -> None:
        _local.active = None
        if self.module_call is not torch.nn.Module.__call__:
            torch.nn.Module.__call__ = self.module_call  # type: ignore[method-assign]

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _slot(self, tensor: Tensor) -> int:
        raise NotImplementedError

    def watched(self) -> AbstractContextManager[Any]:
        """The context in which calls run on meta tensors."""
        return nullcontext()

    def meta(self, tensor: Tensor) -> Tensor:
        """The meta tensor of a captured tensor."""
        raise NotImplementedError

    def _key(self, value: Any) -> Any:
        kind = type(value)
        if kind is Traced:
            if value.grad_fn is not None:
                name = value.grad_fn.name().removesuffix("Backward")
                raise self.refused(f"{name}, an autograd.Function")
            return ("%", value.traced_number)
        if isinstance(value, Tensor):
            return ("&", self._slot(value))
        if isinstance(value, (tuple, list)):
            return ("(", *[self._key(v) for v in value])
        if kind is dict:
            return ("{", *[(k, self._key(v)) for k, v in value.items()])
        if kind is torch.device and value.type != "cpu":
            raise self.refused(f"a tensor on {value}")
        if kind is slice:
            return ("slice", self._key(value.start), self._key(value.stop), self._key(value.step))
        if kind is float and (value == 0 or value != value):
            return (kind, repr(value))  # 0 and -0 are equal, and NaN is not itself
        if not isinstance(value, _CONSTANTS):  # its changes would be unnoticed
            raise self.refused(f"an argument of the type {kind.__name__}")
        return (kind, value)

    def key(self, args: Any, kwargs: Any) -> Any:
        """The arguments of a call, in a form for comparison."""
        return tuple([self._key(a) for a in args]), self._key(kwargs) if kwargs else None

    def _simple(self, args: Any) -> list[tuple[int, Any]] | None:
        found: list[tuple[int, Any]] = []
        for value in args:
            if type(value) is Traced:
                found.append((STAND_IN, value))
            elif isinstance(value, Tensor):
                found.append((CAPTURED, self._slot(value)))
            elif (
                value is None or type(value) in (int, bool, str) or (type(value) is float and value)
            ):
                found.append((NUMBER, value))
            else:
                return None
        return found


Traced.__torch_function__ = classmethod(  # type: ignore[method-assign, assignment]
    _C.set_stand_ins(_asked, torch.is_grad_enabled)
)


# The functions that fill a new tensor with one number.
FILLED = frozenset({torch.zeros, torch.ones, torch.full})


class _Filling(TorchFunctionMode):
    """Makes tensors that are filled with one number stand-ins, so that their uses are traced."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FILLED and torch.device(kwargs.get("device") or _CPU) == _CPU:
            return Traced.__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def new_meta(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    with _disable_current_modes():
        return torch.empty_strided(shape, strides, dtype=dtype, device=META)


def on_meta(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Runs a call on the meta tensors of stand-ins and captured tensors."""
    if func == Tensor.to:
        args = [torch.device(a) if type(a) is str else a for a in args]
    if type(kwargs.get("device")) is str:
        kwargs = {**kwargs, "device": torch.device(kwargs["device"])}
    if func in FILLED:
        kwargs = {**kwargs, "device": _CPU}
    args, kwargs = plain(session, args), plain(session, kwargs)
    plainly = (torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), _disable_current_modes())
    with plainly[0], plainly[1], plainly[2], session.watched():
        return _INSTEAD.get(func, func)(*args, **kwargs)


def plain(session: Session, value: Any) -> Any:
    kind = type(value)
    if kind is Traced:
        return value.traced_meta
    if isinstance(value, Tensor):
        return session.meta(value)
    if isinstance(value, (list, tuple)) and kind is not torch.Size:
        return (list if isinstance(value, list) else tuple)(plain(session, v) for v in value)
    if kind is dict:
        return {k: plain(session, v) for k, v in value.items()}
    if kind is torch.device:
        if value.type != "cpu":
            raise session.refused(f"a tensor on {value}")
        return META
    return value
