"""A torch.nn layer beside ours with the same weights, and what one forward and backward gives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from tolerances import assert_close

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
STACKS = [
    pytest.param(options, id=",".join(f"{k}={v}" for k, v in options.items()) or "plain")
    for options in (
        {},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "batch_first": True, "bias": False},
    )
]


def pair(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """torch.nn's layer or cell and ours, made under one seed."""
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(*args, **options)
    torch.manual_seed(1)
    return theirs, getattr(fastrnn, name)(*args, **options)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and packed sequences, None left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def fresh(value: Any) -> Any:
    """A copy of the arguments with leaves of their own, of which floating ones want a gradient.

    Strides stay as they are.
    """
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    if isinstance(value, PackedSequence):
        return value._replace(data=fresh(value.data))
    if isinstance(value, tuple | list):
        return type(value)(fresh(part) for part in value)
    return value


class Outcome(NamedTuple):
    """What a layer gave for one set of arguments."""

    outputs: list[Tensor]
    d_inputs: list[Tensor]
    d_weights: dict[str, Tensor]


def outcome(
    layer: Any, *args: Any, under: AbstractContextManager[Any] | None = None, **options: Any
) -> Outcome:
    """Forward under one seed, then backward of one fixed, uneven weighting of all outputs.

    ``under`` is a context for the forward alone.
    """
    args = fresh(args)
    torch.manual_seed(2)
    with under or nullcontext():
        outputs = list(tensors(layer(*args, **options)))
    backward(outputs)
    d_inputs = [x.grad for x in tensors(args) if x.is_floating_point()]
    d_weights = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    return Outcome([o.detach() for o in outputs], d_inputs, d_weights)


def backward(outputs: list[Tensor]) -> None:
    """The gradient of one fixed, uneven weighting of the outputs."""
    generator = torch.Generator().manual_seed(3)
    weighting = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    torch.autograd.backward(outputs, [w.to(o) for w, o in zip(weighting, outputs, strict=True)])


def assert_same(ours: Outcome, theirs: Outcome, dtype: torch.dtype) -> None:
    """Two outcomes agree within the table of tolerances."""
    name = str(dtype).removeprefix("torch.")
    for quantity, mine, other in (
        ("output", ours.outputs, theirs.outputs),
        ("d_input", ours.d_inputs, theirs.d_inputs),
    ):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert a.shape == b.shape
            assert_close(a.double(), b.double(), name, quantity)
    assert ours.d_weights.keys() == theirs.d_weights.keys()
    for key, b in theirs.d_weights.items():
        assert_close(ours.d_weights[key].double(), b.double(), name, "d_weight", key)
