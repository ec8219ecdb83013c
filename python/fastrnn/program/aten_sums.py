"""Lowering of torch's products, sums over axes, norms and softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .aten import OPERATIONS, cat, operation, power, scaled, squeeze
from .lowering import Lowering, Unknown, View

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OPERATIONS"]

# ---- products ------------------------------------------------------------------------------------


operation("aten.mm.default", "aten.bmm.default")(Lowering.product)


@operation("aten.addmm.default", "aten.baddbmm.default")
def _addmm(low: Lowering, bias: View, x: View, w: View, beta: float = 1, alpha: float = 1) -> View:
    product = scaled(low, low.product(x, w), alpha)
    return low.pointwise("add", scaled(low, bias, beta), product) if beta else product  # type: ignore[return-value]


@operation("aten.mv.default")
def _mv(low: Lowering, w: View, x: View) -> View:
    out = low.product(w, x.viewed(x.index[:, None]))
    return out.viewed(out.index[:, 0])


@operation("aten.addmv.default")
def _addmv(low: Lowering, bias: View, w: View, x: View, beta: float = 1, alpha: float = 1) -> View:
    return low.pointwise("add", scaled(low, bias, beta), scaled(low, _mv(low, w, x), alpha))


@operation("aten.dot.default")
def _dot(low: Lowering, a: View, b: View) -> View:
    return low.reduce("sum", low.pointwise("mul", a, b), [0], False)


@operation("aten.linear.default")
def _linear(low: Lowering, x: View, w: View, bias: View | None = None) -> View:
    flat = x.viewed(x.index.reshape(-1, x.index.shape[-1]))
    out = low.product(flat, w.viewed(w.index.T))
    out = out.viewed(out.index.reshape(*x.index.shape[:-1], w.index.shape[0]))
    return out if bias is None else low.pointwise("add", out, bias)


# ---- sums over axes ------------------------------------------------------------------------------


def _axes(axes: int | Sequence[int] | None) -> list[int]:
    return [] if axes is None else [axes] if isinstance(axes, int) else list(axes)


@operation("aten.sum.dim_IntList", "aten.sum.default")
def _sum(
    low: Lowering, x: View, axes: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> View:
    return low.reduce("sum", x, _axes(axes), keepdim)


def _count(x: View, axes: Sequence[int]) -> int:
    return math.prod(x.index.shape[a] for a in (axes or range(x.index.ndim)))


@operation("aten.mean.dim", "aten.mean.default")
def _mean(
    low: Lowering, x: View, axes: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> View:
    total = low.reduce("sum", x, _axes(axes), keepdim)
    return low.pointwise("div", total, _count(x, _axes(axes)))


def _centered(low: Lowering, x: View, axes: Sequence[int]) -> tuple[View, View]:
    mean = _mean(low, x, axes, True)
    return mean, low.pointwise("sub", x, mean)


@operation("aten.var.correction")
def _var(
    low: Lowering,
    x: View,
    axes: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> View:
    axes = _axes(axes)
    squares = power(low, _centered(low, x, axes)[1])
    total = low.reduce("sum", squares, axes, keepdim)
    left = _count(x, axes) - (1 if correction is None else correction)
    return low.pointwise("div", total, max(left, 0))


@operation("aten.std.correction")
def _std(low: Lowering, x: View, axes: Sequence[int] | None = None, **options: Any) -> View:
    return _root(low, _var(low, x, axes, **options))


def _root(low: Lowering, x: View) -> View:
    """The square root of a sum of squares; as in torch, no gradient where it is 0."""
    zero = low.pointwise("eq", x, 0, is_bool=True)
    root = low.pointwise("sqrt", low.pointwise("where", zero, 1, x))
    return low.pointwise("where", zero, 0, root)


@operation("aten.var_mean.correction")
def _var_mean(
    low: Lowering,
    x: View,
    axes: Sequence[int] | None = None,
    *,
    keepdim: bool = False,
    **options: Any,
) -> tuple[View, View]:
    return _var(low, x, axes, keepdim=keepdim, **options), _mean(low, x, axes, keepdim)


@operation("aten.amax.default")
def _amax(low: Lowering, x: View, axes: Sequence[int] = (), keepdim: bool = False) -> View:
    return low.reduce("max", x, _axes(axes), keepdim)


@operation("aten.amin.default")
def _amin(low: Lowering, x: View, axes: Sequence[int] = (), keepdim: bool = False) -> View:
    largest = low.reduce("max", low.pointwise("neg", x), _axes(axes), keepdim)
    return low.pointwise("neg", largest)


@operation("aten.linalg_vector_norm.default")
def _norm(
    low: Lowering,
    x: View,
    order: float = 2,
    axes: Sequence[int] | None = None,
    keepdim: bool = False,
    **_: Any,
) -> View:
    if order == 1:
        return low.reduce("sum", low.pointwise("abs", x), _axes(axes), keepdim)
    if order != 2:
        raise Unknown(f"has the order {order}")
    return _root(low, low.reduce("sum", power(low, x), _axes(axes), keepdim))


def _exponents(low: Lowering, x: View, axis: int) -> tuple[View, View]:
    """x - max(x) and its exponential; no gradient flows through the maximum."""
    largest = low.stop(low.reduce("max", x, [axis], True))
    shifted = low.pointwise("sub", x, largest)
    return shifted, low.pointwise("exp", shifted)


@operation("aten._softmax.default")
def _softmax(low: Lowering, x: View, axis: int, half: bool = False) -> View:
    _, e = _exponents(low, x, axis)
    return low.pointwise("div", e, low.reduce("sum", e, [axis], True))


@operation("aten._log_softmax.default")
def _log_softmax(low: Lowering, x: View, axis: int, half: bool = False) -> View:
    shifted, e = _exponents(low, x, axis)
    return low.pointwise("sub", shifted, low.pointwise("log", low.reduce("sum", e, [axis], True)))


@operation("aten.logsumexp.default")
def _logsumexp(low: Lowering, x: View, axes: Sequence[int], keepdim: bool = False) -> View:
    largest = low.stop(low.reduce("max", x, axes, True))
    # An infinite maximum is not subtracted: inf - inf is NaN.
    infinite = low.pointwise("eq", low.pointwise("abs", largest), math.inf, is_bool=True)
    largest = low.pointwise("where", infinite, 0, largest)
    e = low.pointwise("exp", low.pointwise("sub", x, largest))
    out = low.pointwise("add", low.pointwise("log", low.reduce("sum", e, axes, True)), largest)
    return out if keepdim else squeeze(low, out, axes)


@operation("aten.cumsum.default")
def _cumsum(low: Lowering, x: View, axis: int, **_: Any) -> View:
    size = x.index.shape[axis]
    lower = [x.viewed(np.take(x.index, range(i + 1), axis=axis)) for i in range(size)]
    return cat(low, [low.reduce("sum", part, [axis], True) for part in lower], axis)


def _normalized(low: Lowering, x: View, axes: Sequence[int], eps: float) -> tuple[View, View, View]:
    mean, centered = _centered(low, x, axes)
    variance = _mean(low, power(low, centered), axes, True)
    scale = low.pointwise("rsqrt", low.pointwise("add", variance, eps))
    return low.pointwise("mul", centered, scale), mean, scale


def _affine_of(low: Lowering, y: View, weight: View | None, bias: View | None) -> View:
    if weight is not None:
        y = low.pointwise("mul", y, weight)
    return y if bias is None else low.pointwise("add", y, bias)


@operation("aten.native_layer_norm.default")
def _layer_norm(
    low: Lowering, x: View, shape: Sequence[int], weight: View | None, bias: View | None, eps: float
) -> tuple[View, View, View]:
    y, mean, scale = _normalized(low, x, range(-len(shape), 0), eps)
    return _affine_of(low, y, weight, bias), mean, scale


@operation("aten._fused_rms_norm.default")
def _rms_norm(
    low: Lowering, x: View, shape: Sequence[int], weight: View | None, eps: float | None
) -> tuple[View, View]:
    mean = _mean(low, power(low, x), list(range(-len(shape), 0)), True)
    if eps is None:
        raise Unknown("has no eps")
    scale = low.pointwise("rsqrt", low.pointwise("add", mean, eps))
    return _affine_of(low, low.pointwise("mul", x, scale), weight, None), scale


@operation("aten.native_group_norm.default")
def _group_norm(
    low: Lowering,
    x: View,
    weight: View | None,
    bias: View | None,
    N: int,
    C: int,
    HxW: int,
    groups: int,
    eps: float,
) -> tuple[View, View, View]:
    folded = x.viewed(x.index.reshape(N, groups, -1))
    y, *moments = _normalized(low, folded, [-1], eps)
    mean, scale = (squeeze(low, m, -1) for m in moments)
    y = y.viewed(y.index.reshape(x.index.shape))
    along = (C, *(1,) * (x.index.ndim - 2))
    weight, bias = (None if v is None else v.viewed(v.index.reshape(along)) for v in (weight, bias))
    return _affine_of(low, y, weight, bias), mean, scale
