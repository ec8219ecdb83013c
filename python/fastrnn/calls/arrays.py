"""The public functions on arrays of any library except torch.

Arrays are read through DLPack, without a copy; the results are ``fastrnn.Tensor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _C
from .._engine import Extras, States, engine_options
from .arguments import (
    Arguments,
    Description,
    arguments,
    check,
    check_gradient,
    check_lengths,
    check_shape,
    is_torch,
    weight_names,
)
from .by_program import Call, Cotangents, Given, Outputs, gradients, shapes, takes, takes_backward
from .program_numpy import NumPyArrays, writable

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._options import Options


class Saved(NamedTuple):
    """The arguments of ``forward``, time-major, and its results, for ``backward``."""

    options: Options
    batch_first: bool
    given: Arguments
    hidden: _C.Tensor
    h_n: _C.Tensor
    c_n: _C.Tensor | None
    cell: _C.Tensor | None
    kept: _C.Tensor | None  # other values that backward needs; None with `recompute`


class Results(NamedTuple):
    output: _C.Tensor
    hx_n: tuple[_C.Tensor, ...]
    states: States | None
    saved: Saved | None


def forward(
    options: Options,
    input: Any,
    hx: Any,
    weights: Any,
    lengths: Any,
    reset: Any,
    extras: Extras,
    *,
    batch_first: bool,
    return_states: bool,
    return_saved: bool,
) -> Results:
    given = _taken(options, arguments(options, input, hx, weights, lengths, reset, extras))
    if given.input.device.startswith("cuda"):
        raise ValueError(
            f"input must be in host memory, got {given.input.device}: on a GPU, pass torch tensors"
        )
    check(options, given, _describe, batch_first=batch_first)
    given = _time_major(given, batch_first)
    program = _program(options, given, takes)
    if program is not None:
        written = _new_outputs(options, given, return_states, return_saved)
        program.forward(Outputs(*map(writable, written)))
    else:
        h0, c0 = _pair(given.hx)
        rows, resets = (None, given.lengths, given.reset), given.extras[:2]
        call = _C.Call(engine_options(options), given.input, h0, c0, given.weights, *rows, resets)
        # If programs compute backward, they recompute the values that the cells would save.
        again = takes_backward(options, given.extras)
        flags = (return_states or return_saved, False) if again else (return_states, return_saved)
        written = Outputs(*call.forward(*flags))
    output, h_n, c_n, hidden, cell, kept = written
    saved = None
    if return_saved and hidden is not None:
        saved = Saved(options, batch_first, given, hidden, h_n, c_n, cell, kept)
    return Results(
        output.transpose(0, 1) if batch_first else output,
        (h_n,) if c_n is None else (h_n, c_n),
        States(hidden, cell) if return_states else None,
        saved,
    )


def backward(
    d_output: Any, d_hx_n: tuple[Any, ...], saved: Saved, d_states: States
) -> tuple[
    _C.Tensor,
    tuple[_C.Tensor, ...] | None,
    list[_C.Tensor],
    tuple[_C.Tensor | None, ...] | None,
]:
    options, batch_first, given, hidden, h_n, c_n, cell, kept = saved
    last = hidden[-1]
    d_output = _gradient("d_output", d_output, last.transpose(0, 1) if batch_first else last)
    if d_output is not None and batch_first:
        d_output = d_output.transpose(0, 1)
    d_h_n, d_c_n = _pair(d_hx_n)
    d_h, d_c = d_states
    h0, c0 = _pair(given.hx)
    cotangents = Cotangents(
        d_output,
        _gradient("d_states.h", d_h, hidden),
        _gradient("d_states.c", d_c, cell),
        _gradient("d_h_n", d_h_n, h_n),
        _gradient("d_c_n", d_c_n, c_n),
    )
    program = _program(options, given, takes_backward)
    if program is not None:
        leaves = (given.input, h0, c0, *given.extras[:2], *given.weights)
        found: list[Any] = [
            x if x is None else _C.empty(x.shape, given.input.dtype) for x in leaves
        ]
        program.backward(
            Outputs(None, None, hidden=hidden, cell=cell, saved=writable(kept)),
            cotangents,
            gradients(list(map(writable, found))),
        )
        d_input, d_h0, d_c0, *d_reset = found[:5]
        d_weights = found[5:]
    else:
        d_reset = [None, None]
        d_input, d_h0, d_c0, *d_weights = _C.backward(
            engine_options(options),
            given.input,
            h0,
            c0,
            given.weights,
            None,
            given.lengths,
            given.reset,
            hidden,
            cell,
            kept,
            *cotangents,
            (True, *(x is not None for x in (h0, c0)), *(True,) * len(given.weights)),
        )
    d_hx = tuple(d for d in (d_h0, d_c0) if d is not None)
    if batch_first:
        d_input = d_input.transpose(0, 1)
    has_reset = any(d is not None for d in d_reset)
    return d_input, d_hx or None, d_weights, tuple(d_reset) if has_reset else None


def _program(
    options: Options, given: Arguments, takes: Callable[[Options, Extras], bool]
) -> Call | None:
    """The call for programs; None if the engine's cells compute the pass."""
    if not takes(options, given.extras):
        return None
    dtype = str(given.input.dtype)
    arguments = Given(
        given.input,
        *_pair(given.hx),
        given.weights,
        lengths=given.lengths,
        reset=given.reset,
        extras=given.extras,
    )
    return Call(NumPyArrays(dtype), options, dtype, arguments)


def _new_outputs(
    options: Options, given: Arguments, return_states: bool, return_saved: bool
) -> Outputs:
    """Arrays for the results of a program."""
    arguments = (given.input, *_pair(given.hx), given.weights, None, given.lengths, given.reset)
    every, keeps = return_states or return_saved, return_saved and not options.recompute
    sizes = shapes(options, (*arguments, *given.extras), given.input.shape[1], every, keeps)
    dtype = given.input.dtype
    compute = "float64" if dtype == "float64" else "float32"
    dtypes = (*(dtype,) * 4, compute, compute)
    arrays = (s if s is None else _C.empty(s, d) for s, d in zip(sizes, dtypes, strict=True))
    return Outputs(*arrays)


def _taken(options: Options, given: Arguments) -> Arguments:
    """The arrays as ``fastrnn.Tensor``, sharing their memory."""
    names = ("reset_hx", "reset_hx", "dropout_mask", "zoneout_mask", "zoneout_mask")
    return Arguments(
        _array("input", given.input),
        given.hx
        and tuple(_array(name, x) for name, x in zip(("h0", "c0"), given.hx, strict=False)),
        tuple(map(_array, weight_names(options), given.weights)),
        given.lengths,
        given.reset,
        Extras(
            *(x if x is None else _array(n, x) for n, x in zip(names, given.extras, strict=True))
        ),
    )


def _array(name: str, x: Any) -> _C.Tensor:
    if is_torch(x):
        raise TypeError(f"{name} must not be a torch.Tensor: input is not one")
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{name} must be an array (NumPy or another with __dlpack__), got {x!r:.40}"
        )
    try:
        return _C.from_dlpack(x)
    except (TypeError, ValueError, BufferError) as error:
        reason = str(error).removeprefix("x: ")
        raise TypeError(f"{name} cannot be used as an array: {reason}") from error


def _describe(name: str, x: _C.Tensor) -> Description:
    return Description(tuple(x.shape), str(x.dtype), str(x.device))


def _time_major(given: Arguments, batch_first: bool) -> Arguments:
    """The arguments with input and reset as (T, B, …), lengths and reset as the engine's dtypes."""
    input = given.input.transpose(0, 1) if batch_first else given.input
    T, B, _ = input.shape
    lengths, reset = given.lengths, given.reset
    if lengths is not None:
        lengths = _values("lengths", lengths)
        kind = lengths.dtype.kind
        if kind not in "iu" and (lengths.size or kind != "f"):  # an empty list has kind f
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        check_shape("lengths", lengths.shape, (B,))
        lengths = np.array(lengths, dtype=np.int64)
        check_lengths(lengths.tolist(), T)
    if reset is not None:
        reset = _values("reset", reset)
        if reset.dtype != np.bool_:
            raise TypeError(f"reset must be bool, got {reset.dtype}")
        check_shape("reset", reset.shape, (B, T) if batch_first else (T, B))
        reset = reset.T if batch_first else reset
    return given._replace(input=input, lengths=lengths, reset=reset)


def _values(name: str, x: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} cannot be used as an array: {error}") from error


def _gradient(name: str, d: Any, of: _C.Tensor | None) -> _C.Tensor | None:
    if d is None:
        return None
    if of is None:
        raise ValueError(f"{name} must be None: there is no such state, got {d!r:.40}")
    taken = _array(name, d)
    check_gradient(name, _describe(name, taken), _describe(name, of))
    return taken


def _pair(hx: tuple[Any, ...] | None) -> tuple[Any, Any]:
    h, c = (*(hx or ()), None, None)[:2]
    return h, c
