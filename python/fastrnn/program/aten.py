"""Lowering of torch's pointwise operations, views and new tensors.

aten_sums.py lowers products and sums. Each function takes the `Lowering` and the arguments of the
ATen operator that it is registered for, with tensors as `View`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .lowering import Lowering, Operand, Unknown, View

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPERATIONS: dict[str, Callable[..., Any]] = {}  # by the name of the ATen operator

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def operation(*names: str) -> Callable[[_Function], _Function]:
    """Registers a function for these ATen operators."""

    def register(function: _Function) -> _Function:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def _pointwise(code: str, is_bool: bool = False) -> Callable[..., View]:
    def apply(low: Lowering, *operands: Operand) -> View:
        return low.pointwise(code, *operands, is_bool=is_bool)

    return apply


for _code in (
    "neg abs sqrt rsqrt exp expm1 log log1p sin cos erf sigmoid tanh relu reciprocal "
    "maximum minimum sign"
).split():
    operation(f"aten.{_code}.default")(_pointwise(_code))
operation("aten.sgn.default")(_pointwise("sign"))
for _code in ("mul", "div"):
    operation(f"aten.{_code}.Tensor", f"aten.{_code}.Scalar")(_pointwise(_code))
for _code in "lt le gt ge eq ne".split():
    operation(f"aten.{_code}.Tensor", f"aten.{_code}.Scalar")(_pointwise(_code, is_bool=True))


@operation("aten.add.Tensor", "aten.add.Scalar")
def _add(low: Lowering, a: Operand, b: Operand, alpha: float = 1) -> View:
    return low.pointwise("add", a, scaled(low, b, alpha))


@operation("aten.sub.Tensor", "aten.sub.Scalar")
def _sub(low: Lowering, a: Operand, b: Operand, alpha: float = 1) -> View:
    return low.pointwise("sub", a, scaled(low, b, alpha))


@operation("aten.rsub.Tensor", "aten.rsub.Scalar")
def _rsub(low: Lowering, a: Operand, b: Operand, alpha: float = 1) -> View:
    return low.pointwise("sub", b, scaled(low, a, alpha))


def scaled(low: Lowering, x: Operand, by: float) -> Operand:
    if by == 1:
        return x
    return low.pointwise("mul", x, by) if isinstance(x, View) else x * by


@operation("aten.pow.Tensor_Scalar", "aten.square.default")
def power(low: Lowering, x: View, exponent: float = 2) -> View:
    whole: dict[float, Callable[[], View]] = {
        0.5: lambda: low.pointwise("sqrt", x),
        -0.5: lambda: low.pointwise("rsqrt", x),
        -1: lambda: low.pointwise("reciprocal", x),
        1: lambda: x,
        2: lambda: low.pointwise("mul", x, x),
        3: lambda: low.pointwise("mul", low.pointwise("mul", x, x), x),
        4: lambda: power(low, power(low, x)),
        -2: lambda: low.pointwise("reciprocal", low.pointwise("mul", x, x)),
    }
    if exponent not in whole:
        raise Unknown(f"has the exponent {exponent}")
    return whole[exponent]()


@operation("aten.isnan.default")
def _isnan(low: Lowering, x: View) -> View:
    return low.pointwise("ne", x, x, is_bool=True)


@operation("aten.logical_not.default", "aten.bitwise_not.default")
def _not(low: Lowering, x: View) -> View:
    return low.pointwise("eq", x, 0, is_bool=True)


def _logical(code: str) -> Callable[..., View]:
    def apply(low: Lowering, a: View, b: View) -> View:
        return low.pointwise(code, _truth(low, a), _truth(low, b), is_bool=True)

    return apply


_and = _logical("mul")
operation("aten.logical_and.default", "aten.bitwise_and.Tensor")(_and)
operation("aten.logical_or.default", "aten.bitwise_or.Tensor")(_logical("maximum"))
operation("aten.logical_xor.default", "aten.bitwise_xor.Tensor")(_logical("ne"))


def _truth(low: Lowering, x: View) -> View:
    return x if x.is_bool else low.pointwise("ne", x, 0, is_bool=True)


@operation(
    "aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar"
)
def _where(low: Lowering, condition: View, a: Operand, b: Operand) -> View:
    both = all(v.is_bool if isinstance(v, View) else isinstance(v, bool) for v in (a, b))
    return low.pointwise("where", condition, a, b, is_bool=both)


@operation("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(low: Lowering, x: View, mask: View, value: Operand) -> View:
    return low.pointwise("where", mask, value, x)


@operation("aten.clamp.default", "aten.clamp.Tensor")
def _clamp(
    low: Lowering, x: View, low_end: Operand | None = None, high_end: Operand | None = None
) -> View:
    """As in torch, x gets the gradient at both bounds too."""
    return _between(low, x, low_end, high_end, "ge", "le")


def _between(
    low: Lowering,
    x: View,
    low_end: Operand | None,
    high_end: Operand | None,
    above: str,
    below: str,
) -> View:
    """x gets the gradient inside the bounds, the bounds get it outside; NaN passes none."""
    out, inside = low.stop(x), None
    for end, code, compare in ((low_end, "maximum", above), (high_end, "minimum", below)):
        if end is not None:
            out = low.pointwise(code, out, end)
            within = low.pointwise(compare, x, end, is_bool=True)
            inside = within if inside is None else _and(low, inside, within)
    return low.pointwise("where", inside, x, out) if inside is not None else x


@operation("aten.clamp_min.default", "aten.clamp_min.Tensor")
def _clamp_min(low: Lowering, x: View, end: Operand) -> View:
    return _clamp(low, x, end)


@operation("aten.clamp_max.default", "aten.clamp_max.Tensor")
def _clamp_max(low: Lowering, x: View, end: Operand) -> View:
    return _clamp(low, x, None, end)


@operation("aten.hardtanh.default")
def _hardtanh(low: Lowering, x: View, low_end: float = -1, high_end: float = 1) -> View:
    """As in torch, x gets no gradient at the bounds."""
    return _between(low, x, low_end, high_end, "gt", "lt")


@operation("aten.relu6.default")
def _relu6(low: Lowering, x: View) -> View:
    return _hardtanh(low, x, 0, 6)


@operation("aten.hardsigmoid.default")
def _hardsigmoid(low: Lowering, x: View) -> View:
    """relu6(x + 3) / 6."""
    return low.pointwise("div", _hardtanh(low, low.pointwise("add", x, 3), 0, 6), 6)


@operation("aten.hardswish.default")
def _hardswish(low: Lowering, x: View) -> View:
    return low.pointwise("mul", x, _hardsigmoid(low, x))


@operation("aten.leaky_relu.default")
def _leaky_relu(low: Lowering, x: View, slope: float = 0.01) -> View:
    positive = low.pointwise("gt", x, 0, is_bool=True)
    return low.pointwise("where", positive, x, low.pointwise("mul", x, slope))


@operation("aten.threshold.default")
def _threshold(low: Lowering, x: View, threshold: float, value: float) -> View:
    return low.pointwise("where", low.pointwise("le", x, threshold, is_bool=True), value, x)


@operation("aten.softplus.default")
def _softplus(low: Lowering, x: View, beta: float = 1, threshold: float = 20) -> View:
    scaled = low.pointwise("mul", x, beta)
    soft = low.pointwise("div", low.pointwise("softplus1", scaled), beta)
    return low.pointwise("where", low.pointwise("gt", scaled, threshold, is_bool=True), x, soft)


@operation("aten.log_sigmoid_forward.default")
def _log_sigmoid(low: Lowering, x: View) -> tuple[View, None]:
    return low.pointwise("neg", low.pointwise("softplus1", low.pointwise("neg", x))), None


@operation("aten.silu.default")
def _silu(low: Lowering, x: View) -> View:
    return low.pointwise("mul", x, low.pointwise("sigmoid", x))


@operation("aten.mish.default")
def _mish(low: Lowering, x: View) -> View:
    return low.pointwise("mul", x, low.pointwise("tanh", low.pointwise("softplus1", x)))


@operation("aten.gelu.default")
def _gelu(low: Lowering, x: View, approximate: str = "none") -> View:
    if approximate == "none":
        inner = low.pointwise("erf", low.pointwise("mul", x, math.sqrt(0.5)))
    else:
        cube = low.pointwise("mul", power(low, x, 3), 0.044715)
        sum_ = low.pointwise("add", x, cube)
        inner = low.pointwise("tanh", low.pointwise("mul", sum_, math.sqrt(2 / math.pi)))
    half = low.pointwise("mul", x, 0.5)
    return low.pointwise("mul", half, low.pointwise("add", inner, 1))


@operation("aten.elu.default")
def _elu(
    low: Lowering, x: View, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> View:
    positive = low.pointwise("gt", x, 0, is_bool=True)
    # Where x is positive, exp(x) is not used; it must not overflow, or its gradient would be NaN.
    negative = low.pointwise("where", positive, 0, x)
    soft = low.pointwise("expm1", scaled(low, negative, input_scale))
    return low.pointwise(
        "where", positive, scaled(low, x, scale), low.pointwise("mul", soft, alpha * scale)
    )


@operation("aten.celu.default")
def _celu(low: Lowering, x: View, alpha: float = 1) -> View:
    return _elu(low, x, alpha, 1, 1 / alpha)


@operation("aten.lerp.Scalar", "aten.lerp.Tensor")
def _lerp(low: Lowering, a: View, b: View, weight: Operand) -> View:
    if isinstance(weight, (int, float)) and weight >= 0.5:
        back = low.pointwise("mul", low.pointwise("sub", b, a), 1 - weight)
        return low.pointwise("sub", b, back)
    return low.pointwise("add", a, low.pointwise("mul", weight, low.pointwise("sub", b, a)))


@operation("aten.addcmul.default")
def _addcmul(low: Lowering, x: View, a: View, b: View, value: float = 1) -> View:
    return low.pointwise("add", x, scaled(low, low.pointwise("mul", a, b), value))


@operation("aten.addcdiv.default")
def _addcdiv(low: Lowering, x: View, a: View, b: View, value: float = 1) -> View:
    return low.pointwise("add", x, scaled(low, low.pointwise("div", a, b), value))


# ---- views ---------------------------------------------------------------------------------------


def _indexing(index_of: Callable[..., Any]) -> Callable[..., Any]:
    """A view, or a list of views, from a function of the index and the operator's arguments."""

    def apply(low: Lowering, x: View, *arguments: Any) -> View | list[View]:
        index = index_of(x.index, *arguments)
        return [x.viewed(i) for i in index] if isinstance(index, list) else x.viewed(index)

    return apply


def _slice(
    index: Any, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    at = [slice(None)] * index.ndim
    at[axis] = slice(start, end, step)
    return index[tuple(at)]


def _split(index: Any, size: int, axis: int = 0) -> list[Any]:
    cuts = range(size, index.shape[axis], size) if size else []
    return np.split(index, list(cuts), axis=axis)


def _roll(index: Any, shifts: Sequence[int], axes: Sequence[int] = ()) -> Any:
    if not axes:
        return np.roll(index.reshape(-1), shifts[0]).reshape(index.shape)
    return np.roll(index, tuple(shifts), tuple(axes))


_VIEWS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(["view.default", "_unsafe_view.default", "reshape.default"], np.reshape),
    "t.default": np.transpose,
    "permute.default": np.transpose,
    "transpose.int": lambda index, a, b: np.swapaxes(index, a, b) if index.ndim else index,
    "unsqueeze.default": np.expand_dims,
    "select.int": lambda index, axis, i: np.take(index, i, axis=axis),
    "slice.Tensor": _slice,
    **dict.fromkeys(["split.Tensor", "unsafe_split.Tensor"], _split),
    **dict.fromkeys(
        ["split_with_sizes.default", "unsafe_split_with_sizes.default"],
        lambda index, sizes, axis=0: np.split(index, np.cumsum(sizes)[:-1], axis=axis),
    ),
    "unbind.int": lambda index, axis=0: list(np.moveaxis(index, axis, 0)),
    "flip.default": np.flip,
    "roll.default": _roll,
    "repeat.default": np.tile,
    "diagonal.default": np.diagonal,
}
for _name, _function in _VIEWS.items():
    operation(f"aten.{_name}")(_indexing(_function))


@operation("aten.expand.default")
def _expand(low: Lowering, x: View, shape: Sequence[int], implicit: bool = False) -> View:
    lead = len(shape) - x.index.ndim
    full = [x.index.shape[i - lead] if s == -1 else s for i, s in enumerate(shape)]
    return x.viewed(np.broadcast_to(x.index, full))


@operation("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(low: Lowering, x: View, axes: int | Sequence[int] | None = None) -> View:
    if axes is None:
        axes = range(x.index.ndim)
    axes = [axes] if isinstance(axes, int) else list(axes)
    gone = {a % max(x.index.ndim, 1) for a in axes}
    shape = [s for i, s in enumerate(x.index.shape) if i not in gone or s != 1]
    return x.viewed(x.index.reshape(shape))


@operation(
    "aten.alias.default",
    "aten.clone.default",
    "aten._to_copy.default",
    "aten.lift_fresh.default",
    "aten.contiguous.default",
)
def _same(low: Lowering, x: View, **_: Any) -> View:
    return x


@operation("aten.detach.default")
def _detach(low: Lowering, x: View) -> View:
    return low.stop(x)


@operation("aten.cat.default")
def cat(low: Lowering, views: Sequence[View], axis: int = 0) -> View:
    views = [v for v in views if v.index.shape != (0,)]
    return low.cat(views, axis)


@operation("aten.stack.default")
def _stack(low: Lowering, views: Sequence[View], axis: int = 0) -> View:
    return low.cat([v.viewed(np.expand_dims(v.index, axis)) for v in views], axis)


@operation("aten.constant_pad_nd.default")
def _pad(low: Lowering, x: View, pads: Sequence[int], value: float = 0) -> View:
    """``pads``: before and after along the last axis, then along the one before it, …"""
    for i in range(0, len(pads), 2):
        axis, sizes = x.index.ndim - 1 - i // 2, pads[i : i + 2]
        if min(sizes) < 0:
            raise Unknown("removes elements")
        before, after = (
            [_filled(low, [n if a == axis else s for a, s in enumerate(x.index.shape)], value)]
            * (n > 0)
            for n in sizes
        )
        x = low.cat([*before, x, *after], axis)
    return x


# ---- new tensors ---------------------------------------------------------------------------------


def _filled(low: Lowering, shape: Sequence[int], value: float) -> View:
    node = low.graph.const(value)
    return View(node.value, np.zeros(tuple(shape), np.int64), False, isinstance(value, bool))


def _new_tensors(name: str, *fixed: float) -> None:
    """Registers aten.``name`` and its forms; without ``fixed`` their last argument is the value."""

    @operation(f"aten.{name}.default")
    def filled(low: Lowering, shape: Sequence[int], *value: float) -> View:
        return _filled(low, shape, *(fixed or value))

    @operation(f"aten.{name}_like.default")
    def like(low: Lowering, x: View, *value: float) -> View:
        return filled(low, x.index.shape, *value)

    @operation(f"aten.new_{name}.default")
    def new(low: Lowering, x: View, *arguments: Any) -> View:
        return filled(low, *arguments)


_new_tensors("zeros", 0.0)
_new_tensors("ones", 1.0)
_new_tensors("full")


@operation("aten.scalar_tensor.default")
def _scalar(low: Lowering, value: float) -> View:
    return _filled(low, (), value)
