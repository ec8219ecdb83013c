"""Checks of what the public functions are given, of torch and of every other array alike.

Each error names the argument, says what it was and what was expected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .._engine import NO_EXTRAS, Extras

if TYPE_CHECKING:
    from .._options import Options

REAL = ("float32", "float64", "bfloat16", "float16")


class Description(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    device: str


Describe = Callable[[str, Any], Description]  # raises TypeError where it is no array


class Arguments(NamedTuple):
    """The arguments of one call that are arrays, as given."""

    input: Any
    hx: tuple[Any, ...] | None  # (h0,) or (h0, c0)
    weights: tuple[Any, ...]
    lengths: Any
    reset: Any
    extras: Extras = NO_EXTRAS


def arguments(
    options: Options,
    input: Any,
    hx: Any,
    weights: Any,
    lengths: Any,
    reset: Any,
    extras: Extras,
) -> Arguments:
    """The arguments in tuples, once their number is right."""
    if hx is not None:
        hx = _by_state(options, "hx", hx, "(h0, c0)")
    check_number_of_weights(options, weights)
    return Arguments(input, hx, tuple(weights), lengths, reset, extras)


def check_number_of_weights(options: Options, weights: Any) -> None:
    """Check that weights are a list as long as the options say, whose names are made after this."""
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"weights must be a list of arrays, got {type(weights).__name__}")
    kinds = options.weight_kinds
    number = len(kinds) * options.num_layers * options.directions
    if len(weights) != number:
        raise ValueError(
            f"weights must hold {number} arrays, {', '.join(kinds)} of each layer and direction; "
            f"got {len(weights)}"
        )


def make_extras(options: Options, reset_hx: Any, dropout_mask: Any, zoneout_mask: Any) -> Extras:
    """The arrays that options ask for, once their number is right."""
    states: list[tuple[Any, ...]] = []
    for name, given in (("reset_hx", reset_hx), ("zoneout_mask", zoneout_mask)):
        parts = () if given is None else _by_state(options, name, given, "(h, c)")
        states.append((*parts, None, None)[:2])
    (reset_h, reset_c), (keep_h, keep_c) = states
    return Extras(reset_h, reset_c, dropout_mask, keep_h, keep_c)


def _by_state(options: Options, name: str, given: Any, parts: str) -> tuple[Any, ...]:
    """What is given for each state, for h alone or for h and c."""
    if options.cell != "LSTM":
        return (given,)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        got = f"{len(given)} of them" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(f"{name} must be None or two arrays, {parts}, got {got}")
    return tuple(given)


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor, found out without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def weight_names(options: Options) -> list[str]:
    """The parameters of a stack, torch's in torch's order and by torch's names, then our own."""
    kinds = options.weight_kinds
    return [
        f"{kind}_l{layer}{direction}"
        for layer in range(options.num_layers)
        for direction in ("", "_reverse")[: options.directions]
        for kind in kinds
    ]


def check(
    options: Options,
    given: Arguments,
    describe: Describe,
    *,
    batch_first: bool,
    dtypes: Sequence[str] = REAL,
) -> None:
    """Check shapes, dtypes and devices; ``lengths`` and ``reset`` have their own functions."""
    input = describe("input", given.input)
    if len(input.shape) != 3:
        axes = "(B, T, I)" if batch_first else "(T, B, I)"
        raise ValueError(f"input must have 3 dimensions, {axes}, got shape {input.shape}")
    if input.dtype not in dtypes:
        raise TypeError(f"input must have dtype {' or '.join(dtypes)}, got {input.dtype}")
    T, B, I = _time_major(input.shape, batch_first)  # noqa: E741 - the sizes' names everywhere
    if T == 0:
        raise ValueError(f"input must have at least one step, got shape {input.shape}")
    directions = options.directions
    names = weight_names(options)
    weights = list(map(describe, names, given.weights))
    H = _hidden_size(options, weights[1], names[1])
    out = options.proj_size or H
    per_layer = len(names) // options.num_layers
    first, later = (options.weight_shapes(width, H) for width in (I, directions * out))
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        shapes = first if index < per_layer else later
        _check_like(name, weight, shapes[name.rsplit("_l", 1)[0]], input)
    groups = options.num_layers * directions
    for name, state, units in zip(("h0", "c0"), given.hx or (), (out, H), strict=False):
        _check_like(name, describe(name, state), (groups, B, units), input)
    _check_extras(options, given.extras, describe, input, (T, B), (out, H))


def _check_extras(
    options: Options,
    extras: Extras,
    describe: Describe,
    input: Description,
    steps: tuple[int, ...],
    units: tuple[int, int],
) -> None:
    groups = options.num_layers * options.directions
    for index, size in enumerate(units):
        part = f"[{index}]" if options.cell == "LSTM" else ""
        name, anew, keep = f"reset_hx{part}", extras[index], extras[3 + index]
        if anew is not None:
            _check_like(name, describe(name, anew), (groups, size), input)
        if keep is not None:
            name = f"zoneout_mask{part}"
            got = describe(name, keep)
            if got.dtype != "bool":
                raise TypeError(f"{name} must be bool, got {got.dtype}")
            _check_like(name, got, (groups, *steps, size), input._replace(dtype="bool"))
    if extras.dropout_mask is not None:
        got = describe("dropout_mask", extras.dropout_mask)
        _check_like("dropout_mask", got, (groups, steps[1], units[0]), input)


def check_lengths(values: Sequence[int], steps: int) -> None:
    """Check that each length is between 0 and ``steps``."""
    for row, value in enumerate(values):
        if not 0 <= value <= steps:
            raise ValueError(f"lengths must be between 0 and {steps}, got {value} for row {row}")


def check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ValueError(f"{name} must have shape {expected}, got {got}")


def check_gradient(name: str, got: Description, of: Description) -> None:
    """A gradient is as the array that it is the gradient of."""
    _check_like(name, got, of.shape, of)


def _check_like(name: str, got: Description, shape: tuple[int, ...], like: Description) -> None:
    check_shape(name, got.shape, shape)
    if got.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of input, {like.dtype}, got {got.dtype}")
    if got.device != like.device:
        raise ValueError(f"{name} must be on the device of input, {like.device}, got {got.device}")


def _hidden_size(options: Options, weight_hh: Description, name: str) -> int:
    shape, gates, heads = weight_hh.shape, options.gates, options.heads
    if heads > 1:
        if len(shape) != 3 or shape[0] != heads or not shape[1] or shape[1] % gates:
            raise ValueError(
                f"{name} must have shape (heads, {gates}·H/heads, O/heads): {heads} heads, "
                f"{gates} gates of H units, got {shape}"
            )
        return heads * shape[1] // gates
    if len(shape) != 2 or shape[0] == 0 or shape[0] % gates:
        raise ValueError(
            f"{name} must have shape ({gates}·H, O): {gates} gates of H units, got {shape}"
        )
    return shape[0] // gates


def _time_major(shape: tuple[int, ...], batch_first: bool) -> tuple[int, ...]:
    return (shape[1], shape[0], *shape[2:]) if batch_first else shape
