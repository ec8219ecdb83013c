"""A stack with int8 weights, on torch tensors: the operator ``fastrnn::int8_forward``, and `run`.

The operator has the results of ``fastrnn::forward`` (operators.py) but for ``saved``: it has no
gradient. ``packed`` is what ``_C.pack_int8`` made; ``options`` is `Options.text`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C
from .._engine import States, engine_options
from .._options import parse
from . import call, operators  # noqa: F401 - call.py gives the binding what it asks of torch

if TYPE_CHECKING:
    from .._options import Options

operators.library.define(
    "int8_forward(Tensor input, Tensor? h0, Tensor? c0, Tensor packed, Tensor? batch_sizes, "
    "Tensor? lengths, Tensor? reset, Tensor? reset_h, Tensor? reset_c, str options, "
    "int hidden_size, bool states) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor hidden, "
    "Tensor cell)"
)


def _engine(options: Options, given: tuple[Any, ...], states: bool) -> tuple[Any, ...]:
    input, h0, c0, packed, batch_sizes, lengths, reset, reset_h, reset_c = given
    resets = None if reset_h is None else (reset_h, reset_c)
    engine, threads = engine_options(options, int8=True), torch.get_num_threads()
    checked = _C.Call(
        engine, input, h0, c0, (packed,), batch_sizes, lengths, reset, resets, threads
    )
    return checked.forward(states)[:5]


def _kernel(*arguments: Any) -> tuple[Tensor, ...]:
    *given, text, _, states = arguments
    outputs = _engine(parse(text), tuple(given), states)
    return operators.whole((*outputs, None), given[0])[:5]


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    input, h0, c0, _, *rows, text, hidden_size, states = arguments
    weight = input.new_empty((parse(text).gates * hidden_size, 1))
    given = (input, h0, c0, [weight], *rows, *[None] * 3)
    return operators.forward_fake(*given, text, states, False, False)[:5]


operators.library.impl("int8_forward", _kernel, "CPU")
torch.library.register_fake("fastrnn::int8_forward", _fake, lib=operators.library)
int8_forward_op = torch.ops.fastrnn.int8_forward.default


def run(
    options: Options,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    packed: Tensor,
    hidden_size: int,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_hx: tuple[Tensor, ...] | None = None,
    return_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], States | None]:
    """Run a stack over a time-major input: output, final states, states of every step or None.

    Arguments:
        packed: the weights, as ``_C.pack_int8`` made them.
        reset_hx: the states after a reset, (L·D, O) and, of an LSTM, (L·D, H); None: zeros.
    """
    h0, c0 = (*(hx or ()), None, None)[:2]
    reset_h, reset_c = (*(reset_hx or ()), None, None)[:2]
    given = (input, h0, c0, packed, batch_sizes, lengths, reset, reset_h, reset_c)
    if torch.compiler.is_compiling() or not _C.bypass_is_unobservable(
        (input, h0, c0, packed, reset_h, reset_c)
    ):
        outputs: Any = int8_forward_op(*given, options.text, hidden_size, return_states)
    else:
        outputs = _engine(options, given, return_states)
    output, h_n, c_n, hidden, cell = outputs
    if options.cell != "LSTM":
        c_n = cell = None
    states = States(hidden, cell) if return_states else None
    return output, (h_n,) if c_n is None else (h_n, c_n), states
