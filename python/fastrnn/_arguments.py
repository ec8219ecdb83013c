"""Checks of what the public functions are given, of torch and of every other array alike.

Each error names the argument, says what it was and what was expected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

from ._engine import engine_options, scalars
from ._options import Cell, Options

_GATES = {cell: engine_options(*scalars(Options(cell))).gates for cell in get_args(Cell)}
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


def arguments(
    options: Options, input: Any, hx: Any, weights: Any, lengths: Any, reset: Any
) -> Arguments:
    """The arguments in tuples, once their number is right."""
    if hx is not None and options.cell == "LSTM":
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx must be None or two arrays, (h0, c0), got {got}")
        hx = tuple(hx)
    elif hx is not None:
        hx = (hx,)
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"weights must be a list of arrays, got {type(weights).__name__}")
    names = weight_names(options)
    if len(weights) != len(names):
        raise ValueError(
            f"weights must hold {len(names)} arrays, {', '.join(names)}; got {len(weights)}"
        )
    return Arguments(input, hx, tuple(weights), lengths, reset)


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor, found out without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def weight_names(options: Options) -> list[str]:
    """The parameters of a stack in torch's order and by torch's names."""
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["bias_ih", "bias_hh"] if options.bias else []
    kinds += ["weight_hr"] if options.proj_size else []
    directions = ("", "_reverse") if options.bidirectional else ("",)
    return [
        f"{kind}_l{layer}{direction}"
        for layer in range(options.num_layers)
        for direction in directions
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
    gates = _GATES[options.cell]
    directions = 2 if options.bidirectional else 1
    names = weight_names(options)
    weights = list(map(describe, names, given.weights))
    H = _hidden_size(gates, weights[1], names[1])
    out = options.proj_size or H
    per_group = len(names) // (options.num_layers * directions)
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        first_layer = index < per_group * directions
        columns = {"weight_ih": I if first_layer else directions * out, "weight_hh": out}
        kind = name.rsplit("_l", 1)[0]
        if kind == "weight_hr":
            expected: tuple[int, ...] = (options.proj_size, H)
        else:
            expected = (gates * H, *([columns[kind]] if kind in columns else []))
        _check_like(name, weight, expected, input)
    groups = options.num_layers * directions
    for name, state, units in zip(("h0", "c0"), given.hx or (), (out, H), strict=False):
        _check_like(name, describe(name, state), (groups, B, units), input)


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


def _hidden_size(gates: int, weight_hh: Description, name: str) -> int:
    shape = weight_hh.shape
    if len(shape) != 2 or shape[0] == 0 or shape[0] % gates:
        raise ValueError(
            f"{name} must have shape ({gates}·H, O): {gates} gates of H units, got {shape}"
        )
    return shape[0] // gates


def _time_major(shape: tuple[int, ...], batch_first: bool) -> tuple[int, ...]:
    return (shape[1], shape[0], *shape[2:]) if batch_first else shape
