"""The operators where torch's dispatcher brings them: under torch.func, in a trace, in a compiler.

The transforms of ``torch.func`` nest, and each meets an operator in turn, the innermost first. For
each of them the operators have a rule:

- vmap: an axis that is mapped over what has rows (input, states, lengths, reset, masks) joins the
  rows, and the operator runs once. Where weights or states after a reset are mapped too, or where
  each sample is to have gradients of its own, the operator of ensembles runs once, with a member
  for each place of the axis; what the members share they share by a stride of 0. An axis mapped
  over an ensemble joins the rows or the members in the same way.
- grad, vjp: ``forward`` saves, ``backward`` reads what it saved. The gradient of ``backward`` is
  that of the same in composed operations.
- jvp, forward mode: composed operations. They are chosen before an operator is called
  (call.py), but for a graph that torch.compile has recorded.

Nothing of a transform may be used inside an operator's kernel; where one is (``torch.func.vjp``),
it is in a gradient, which runs outside.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree

from .. import _checks
from .._engine import Extras
from .._options import Options, parse
from . import composed, flops, operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class _Pair(NamedTuple):
    forward: Any
    backward: Any
    members: int  # leading axes that every tensor has besides: 0, or 1 of an ensemble


ONE = _Pair(operators.forward_op, operators.backward_op, 0)
_ENSEMBLE = _Pair(operators.forward_members_op, operators.backward_members_op, 1)


# ---- Arguments -----------------------------------------------------------------------------------


def _tensor_names(operator: Any) -> list[str]:
    """The operator's arguments before `options`."""
    names = [argument.name for argument in operator._schema.arguments]
    return names[: names.index("options")]


_FORWARD = _tensor_names(operators.forward_op)
_BACKWARD = _tensor_names(operators.backward_op)
_WEIGHTS = _FORWARD.index("weights")
_LEAVES = [_FORWARD.index(name) for name in ("input", "h0", "c0", "reset_h", "reset_c")]
_COTANGENTS = _BACKWARD[-5:]  # d_output, d_hidden, d_cell, d_h_n, d_c_n

# The axis of the rows, counted from the last one. What is not here has none.
_ROWS = {
    **dict.fromkeys(("input", "h0", "c0", "dropout_mask", "zoneout_h_mask", "zoneout_c_mask"), 2),
    **dict.fromkeys(("lengths", "reset"), 1),
}


def _flat(arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Tensor arguments: the leaves, the weights, then what has no gradient."""
    leaves = (arguments[i] for i in _LEAVES)
    others = (x for i, x in enumerate(arguments) if i not in _LEAVES and i != _WEIGHTS)
    return (*leaves, *arguments[_WEIGHTS], *others)


def _nested(flat: Sequence[Any], names: Sequence[str]) -> tuple[Any, ...]:
    """The inverse of `_flat`, for the arguments of these names."""
    first, end = len(_LEAVES), len(flat) - (len(names) - 1 - len(_LEAVES))
    placed = {**dict(zip(_LEAVES, flat, strict=False)), _WEIGHTS: list(flat[first:end])}
    others = iter(flat[end:])
    return tuple(placed[i] if i in placed else next(others) for i in range(len(names)))


def _leaf_count(arguments: Sequence[Any]) -> int:
    """How many tensors have gradients: the first ones of `_flat`, as `needs` counts them."""
    return len(_LEAVES) + len(arguments[_WEIGHTS])


def is_transforming() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def _records(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ---- vmap ----------------------------------------------------------------------------------------


def _is_mapped(dim: Any) -> bool:
    return any(d is not None for d in dim) if isinstance(dim, list) else dim is not None


def _check_mapped(size: int, in_dims: Sequence[Any]) -> None:
    if size == 0:
        raise RuntimeError("vmap: expected a mapped axis of size 1 or more, got size 0")
    if in_dims[_FORWARD.index("batch_sizes")] is not None:
        raise RuntimeError(_checks.MAPPED_BATCH_SIZES)


def _among_rows(name: str, x: Any, dim: int | None, size: int) -> Any:
    """An argument with the mapped axis right after each row: row b of place e is b·size + e."""
    if x is None or name not in (*_ROWS, "batch_sizes"):
        return x
    if name == "batch_sizes":
        return x * size
    rows = x.dim() - (dim is not None) - _ROWS[name]
    if dim is None:
        shape = list(x.shape)
        x = x.unsqueeze(rows + 1).expand(*shape[: rows + 1], size, *shape[rows + 1 :])
    else:
        x = x.movedim(dim, rows + 1)
    x = x.flatten(rows, rows + 1)
    return x.contiguous() if name == "lengths" else x  # as the engine asks


def _from_rows(y: Tensor, size: int) -> tuple[Tensor, int | None]:
    if y.dim() == 1:  # not wanted
        return y, None
    return torch.unflatten(y, -2, (y.shape[-2] // size, size)), y.dim() - 1


def _as_members(pair: _Pair, name: str, x: Any, dim: Any, size: int) -> Any:
    """An argument with the mapped axis as the members, before the members it has."""
    if x is None or name == "batch_sizes":
        return x
    if name in ("cell_state", "saved") and x.dim() == 1:  # there are none
        return x
    if isinstance(x, (list, tuple)):
        dims = [None] * len(x) if dim is None else dim
        return [_as_members(pair, name, w, d, size) for w, d in zip(x, dims, strict=True)]
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1) if pair.members else x


def _from_members(pair: _Pair, y: Tensor, size: int) -> tuple[Tensor, int | None]:
    if y.dim() == 1:  # not wanted
        return y, None
    return (torch.unflatten(y, 0, (size, y.shape[0] // size)) if pair.members else y), 0


def _map_forward(
    pair: _Pair, info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size, save = info.batch_size, arguments[-2]
    _check_mapped(size, in_dims)
    named = list(zip(_FORWARD, arguments, in_dims, strict=False))
    scalars = arguments[len(_FORWARD) :]
    # What a gradient reads (save) must be each member's own.
    if save or any(_is_mapped(dim) for name, _, dim in named if name not in _ROWS):
        outputs = _ENSEMBLE.forward(
            *(_as_members(pair, name, x, dim, size) for name, x, dim in named), *scalars
        )
        mapped = [_from_members(pair, y, size) for y in outputs]
    else:
        outputs = pair.forward(
            *(_among_rows(name, x, dim, size) for name, x, dim in named), *scalars
        )
        mapped = [_from_rows(y, size) for y in outputs]
    return tuple(y for y, _ in mapped), tuple(dim for _, dim in mapped)


def _map_backward(
    pair: _Pair, info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[list[Tensor], list[int | None]]:
    size = info.batch_size
    _check_mapped(size, in_dims)
    named = zip(_BACKWARD, arguments, in_dims, strict=False)
    found = _ENSEMBLE.backward(
        *(_as_members(pair, name, x, dim, size) for name, x, dim in named),
        *arguments[len(_BACKWARD) :],
    )
    mapped = [_from_members(pair, d, size) for d in found]
    return [d for d, _ in mapped], [dim for _, dim in mapped]


# torch.autograd.grad(is_grads_batched=True), of which torch.autograd.functional's vectorize=True is
# made, maps by an older vmap than torch.func's, one without rules for operators.


class _Info(NamedTuple):
    batch_size: int


def _is_grads_batched(tensors: Iterable[Tensor | None]) -> bool:
    is_mapped = torch._C._functorch.is_legacy_batchedtensor
    return any(x is not None and is_mapped(x) for x in tensors)


def is_mapped(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors may be a transform's, without memory of its own."""
    return is_transforming() or _is_grads_batched(tensors)


def backward(*arguments: Any) -> list[Tensor]:
    """The operator ``backward``, also where autograd itself maps the cotangents."""
    end = len(_BACKWARD)
    places = range(end - len(_COTANGENTS), end)
    if not _is_grads_batched(arguments[i] for i in places):
        found: list[Tensor] = operators.backward_op(*arguments)
        return found
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    given, size = list(arguments), 0
    dims: list[int | None] = [None] * len(given)
    for i in places:
        if _is_grads_batched(given[i : i + 1]):
            given[i] = torch._remove_batch_dim(given[i], level, 0, 0)
            dims[i], size = 0, given[i].shape[0]
    found, mapped = _map_backward(ONE, _Info(size), tuple(dims), *given)
    return [
        d if dim is None else torch._add_batch_dim(d, dim, level)
        for d, dim in zip(found, mapped, strict=True)
    ]


# ---- grad ----------------------------------------------------------------------------------------


class _AtOneTransform(_SingleLevelFunction):
    """A gradient at the transform that runs now, which has brought the dispatcher here.

    The base of ``torch.autograd.Function``, from which torch derives its own rule for grad.
    ``Function`` itself refuses ``forward(ctx, …)`` under a transform, and with ``setup_context``
    makes a class at every call. ``torch.library.register_autograd`` is made of such a ``Function``:
    under ``torch.func.grad`` its operators fail (torch 2.10 to 2.14).
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @classmethod
    def run(cls, *arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return cls.apply(*arguments)  # type: ignore[attr-defined]


def _as_asked(outputs: tuple[Tensor, ...], states: bool, save: bool) -> tuple[Tensor, ...]:
    """Of everything (``save=True``) what the operator gives for these flags."""
    output, h_n, c_n, hidden, cell, saved = outputs
    if save:
        return outputs
    if not states:
        hidden, cell = hidden.new_empty(0), cell.new_empty(0)
    return output, h_n, c_n, hidden, cell, saved.new_empty(0)


def _further_out(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function at the transform further out, or on its device, from a ``forward`` of autograd.

    That has turned the recording of gradients off, which must hold for this transform alone.
    """
    with torch.set_grad_enabled(is_transforming()), torch._C._AutoDispatchBelowAutograd():
        return function(*arguments)


class _Recorded(_AtOneTransform):
    """The operator ``forward`` with its gradient, the operator ``backward``."""

    @staticmethod
    def forward(
        ctx: Any, pair: _Pair, scalars: tuple[Any, ...], *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        options, states, save, by_torch = scalars
        everything = _further_out(
            pair.forward, *_nested(flat, _FORWARD), options, states, True, by_torch
        )
        ctx.pair, ctx.options, ctx.by_torch = pair, options, by_torch
        ctx.parsed = parse(options)  # here, where no compiler traces
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, *everything[3:])
        outputs: tuple[Tensor, ...] = _further_out(_as_asked, everything, states, save)
        ctx.mark_non_differentiable(*(y for y in outputs[:5] if y.dim() == 1), outputs[5])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        *flat, hidden, cell, saved = ctx.saved_tensors
        if all(d is None for d in gradients):
            return (None,) * (2 + len(flat))
        arguments = _nested(flat, _FORWARD)
        needs = list(ctx.needs_input_grad[2 : 2 + _leaf_count(arguments)])
        d_output, d_h_n, d_c_n, d_hidden, d_cell, _ = gradients
        cotangents = (d_output, d_hidden, d_cell, d_h_n, d_c_n)
        if forward_ad._current_level >= 0:
            found = gradients_of(ctx.pair, ctx.parsed, arguments, needs, cotangents)
        else:
            found = ctx.pair.backward(
                *arguments, hidden, cell, saved, *cotangents, ctx.options, needs, ctx.by_torch
            )
        wanted = (d if need else None for d, need in zip(found, needs, strict=True))
        return (None, None, *wanted, *(None,) * (len(flat) - len(needs)))


class _Gradients(_AtOneTransform):
    """The operator ``backward`` with its gradient, by composed operations.

    What ``forward`` saved has none: it depends on the arguments, and through these it counts.
    """

    @staticmethod
    def forward(
        ctx: Any, pair: _Pair, scalars: tuple[Any, ...], *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        options, needs, by_torch = scalars
        arguments = _nested(flat, _BACKWARD)
        found = _further_out(pair.backward, *arguments, options, needs, by_torch)
        ctx.pair, ctx.parsed, ctx.needs = pair, parse(options), needs
        ctx.set_materialize_grads(False)
        given = _flat(arguments[: len(_FORWARD)])
        ctx.count, ctx.skipped = len(given), len(flat) - len(given) - len(_COTANGENTS)
        ctx.save_for_backward(*given, *arguments[-len(_COTANGENTS) :])
        ctx.mark_non_differentiable(*(d for d, need in zip(found, needs, strict=True) if not need))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        given, cotangents = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        arguments = _nested(given, _FORWARD)
        leaves = _leaf_count(arguments)
        flat = [*given, *(None,) * ctx.skipped, *cotangents]
        answer: list[Tensor | None] = [None] * len(flat)
        wanted = [need and d is not None for d, need in zip(gradients, ctx.needs, strict=True)]
        # Of the leaves and the cotangents those that were recorded.
        places = [*range(leaves), *range(len(flat) - len(_COTANGENTS), len(flat))]
        places = [i for i in places if ctx.needs_input_grad[2 + i]]
        if not any(wanted) or not places:
            return (None, None, *answer)

        def first(*values: Tensor) -> tuple[Tensor, ...]:
            now = list(flat)
            for i, x in zip(places, values, strict=True):
                now[i] = x
            found = gradients_of(
                ctx.pair,
                ctx.parsed,
                _nested(now[: ctx.count], _FORWARD),
                wanted,
                tuple(now[-len(_COTANGENTS) :]),
            )
            return tuple(d for d in found if d is not None)

        pull = torch.func.vjp(first, *(flat[i] for i in places))[1]
        second = pull(tuple(d for d, want in zip(gradients, wanted, strict=True) if want))
        for i, d in zip(places, second, strict=True):
            answer[i] = d
        return (None, None, *answer)


def gradients_of(
    pair: _Pair,
    options: Options,
    arguments: tuple[Any, ...],
    needs: Sequence[bool],
    cotangents: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """What the operator ``backward`` gives, by composed operations: under every transform.

    None for what is not needed.
    """
    one: Any = partial(_gradients_of_one, options, needs)
    if pair.members:
        dims = pytree.tree_map(lambda x: None if x is None else 0, (arguments, cotangents))
        dims = (_replaced(dims[0], _FORWARD.index("batch_sizes"), None), dims[1])
        one = torch.func.vmap(one, in_dims=dims)
    found = iter(one(arguments, cotangents))
    return [next(found) if need else None for need in needs]


def _gradients_of_one(
    options: Options,
    needs: Sequence[bool],
    arguments: tuple[Any, ...],
    cotangents: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    flat = _flat(arguments)
    needed = [i for i, need in enumerate(needs) if need]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        now = list(flat)
        for i, x in zip(needed, values, strict=True):
            now[i] = x
        stack = _stack(options, _nested(now, _FORWARD))
        every: tuple[Callable[[], Tensor | None], ...] = (
            lambda: stack.hidden[-1],
            lambda: torch.stack(stack.hidden),
            lambda: torch.stack(stack.cell),
            lambda: stack.h_n,
            lambda: stack.c_n,
        )
        made = (y() for y, d in zip(every, cotangents, strict=True) if d is not None)
        return tuple(y for y in made if y is not None)

    pull = torch.func.vjp(outputs, *(flat[i] for i in needed))[1]
    found: tuple[Tensor, ...] = pull(tuple(d for d in cotangents if d is not None))
    return found


def _stack(options: Options, arguments: tuple[Any, ...]) -> composed.Stack:
    input, h0, c0, weights, batch_sizes, lengths, reset, *extras = arguments
    return composed.forward(
        options,
        input,
        tuple(x for x in (h0, c0) if x is not None) or None,
        weights,
        batch_sizes=batch_sizes,
        lengths=lengths,
        reset=reset,
        extras=Extras(*extras),
    )


def _replaced(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


# ---- forward mode --------------------------------------------------------------------------------


def _forward_mode() -> bool:
    """Whether tangents may come along, here or at a transform further out."""
    if forward_ad._current_level >= 0:
        return True
    layers = get_interpreter_stack() or ()  # None outside of transforms
    return any(layer.key() == TransformType.Jvp for layer in layers)


def _composed_outputs(
    pair: _Pair, arguments: Sequence[Any], scalars: Sequence[Any]
) -> tuple[Tensor, ...]:
    """What the operator ``forward`` gives, by composed operations."""
    text, states, save, _ = scalars
    if save:
        raise NotImplementedError("save must be False in forward mode, which saves nothing")
    if pair.members:
        size = arguments[0].shape[0]
        each = [_composed_outputs(ONE, _member(arguments, index), scalars) for index in range(size)]
        return tuple(
            ys[0] if ys[0].dim() == 1 else torch.stack(ys) for ys in zip(*each, strict=True)
        )
    stack = _stack(parse(text), tuple(arguments))
    last = stack.hidden[-1]
    compute = operators.compute_dtype(last.dtype)
    with_cell = states and len(stack.cell) > 0
    return (
        last,
        stack.h_n,
        last.new_empty(0) if stack.c_n is None else stack.c_n,
        torch.stack(stack.hidden) if states else last.new_empty(0),
        torch.stack(stack.cell) if with_cell else last.new_empty(0, dtype=compute),
        last.new_empty(0, dtype=compute),
    )


def _member(arguments: Sequence[Any], index: int) -> tuple[Any, ...]:
    at = _FORWARD.index("batch_sizes")
    flat = pytree.tree_map(lambda x: None if x is None else x.select(0, index), list(arguments))
    return _replaced(tuple(flat), at, arguments[at])


# ---- Registration --------------------------------------------------------------------------------


def _forward_autograd(pair: _Pair, *arguments: Any) -> tuple[Tensor, ...]:
    given, scalars = arguments[: len(_FORWARD)], arguments[len(_FORWARD) :]
    if _forward_mode():
        return _composed_outputs(pair, given, scalars)
    flat = _flat(given)
    outputs: tuple[Tensor, ...]
    if _records(flat):
        outputs = _Recorded.run(pair, scalars, *flat)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = pair.forward(*arguments)
    return outputs


def _backward_autograd(pair: _Pair, *arguments: Any) -> list[Tensor]:
    flops.register()
    flat = _flat(arguments[: len(_BACKWARD)])
    if _records(flat):
        return list(_Gradients.run(pair, arguments[len(_BACKWARD) :], *flat))
    with torch._C._AutoDispatchBelowAutograd():
        found: list[Tensor] = pair.backward(*arguments)
    return found


for _pair in (ONE, _ENSEMBLE):
    for _operator, _autograd, _map in (
        (_pair.forward, _forward_autograd, _map_forward),
        (_pair.backward, _backward_autograd, _map_backward),
    ):
        _name = _operator._schema.name
        operators.library.impl(_name.partition("::")[2], partial(_autograd, _pair), "Autograd")
        torch.library.register_vmap(_name, partial(_map, _pair), lib=operators.library)
