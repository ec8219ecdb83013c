"""Every cell of torchrecurrent, a package of published cells, through `fastrnn.Recurrent`.

The yardstick is the package's own layer around the same cell in float64, which is a loop over the
steps. A warning is an error here, so that a cell which the engine does not run fails too.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastrnn
from tolerances import assert_close

torchrecurrent = pytest.importorskip("torchrecurrent")

NAMES = [name.removesuffix("Cell") for name in torchrecurrent.__all__ if name.endswith("Cell")]
T, B, I, H = 6, 3, 5, 9  # noqa: E741 - the field's names
SAME_SIZES = ("IntersectionRNN",)  # it adds its input to its output


class Delayed(nn.Module):
    """tauGRU's cell, which wants the state of the step before the last as an argument of its own:
    here it is a part of the state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        h, before = state or (x.new_zeros(x.shape[0], H),) * 2
        return self.cell(x, h, before), h


class Hardsigmoid(nn.Module):
    """torch's own has a slope of 1/6 in float32 digits, in float64 too."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def their_layer(name: str, layers: int = 1) -> nn.Module:
    """torchrecurrent's layer in float64, with weights that are not zero anywhere."""
    inputs = H if name in SAME_SIZES else I
    layer: nn.Module = getattr(torchrecurrent, name)(inputs, H, num_layers=layers).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.6, 0.6)
    for cell in layer.cells:
        if isinstance(getattr(cell, "gate_act", None), nn.Hardsigmoid):
            cell.gate_act = Hardsigmoid()
    return layer


def our_layer(theirs: nn.Module, dtype: torch.dtype = torch.float64) -> fastrnn.Recurrent:
    cells = copy.deepcopy(theirs.cells).to(dtype)
    if isinstance(theirs, torchrecurrent.tauGRU):
        cells = [Delayed(cell) for cell in cells]
    return fastrnn.Recurrent(list(cells) if len(cells) > 1 else cells[0])


def results(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Output and final states, and the gradients of both together, by their quantity."""
    x = x.to(dtype).requires_grad_()
    output, state = layer(x)
    # Theirs gives the input that TGRU and TLSTM keep without the axis of the layers.
    finals = [leaf.reshape(-1, B, leaf.shape[-1]) for leaf in pytree.tree_leaves(state)]
    if isinstance(getattr(layer, "cell", None), Delayed):
        finals = finals[:1]  # theirs does not return the delayed one
    values = [output, *finals]
    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(v.shape, generator=generator).to(dtype) for v in values]
    d_input, *d_weights = torch.autograd.grad(values, [x, *layer.parameters()], starts)
    return {"output": values, "d_input": [d_input], "d_weight": d_weights}


def test_all_cells_are_here() -> None:
    assert len(NAMES) >= 41


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_gives_the_outputs_and_gradients_of_its_loop(name: str, dtype: torch.dtype) -> None:
    theirs = their_layer(name)
    x = torch.randn(T, B, theirs.input_size)
    expected = results(theirs, x, torch.float64)
    found = results(our_layer(theirs, dtype), x, dtype)
    kind = str(dtype).removeprefix("torch.")
    for quantity, arrays in expected.items():
        for ours, loop in zip(found[quantity], arrays, strict=True):
            assert ours.dtype == dtype
            assert_close(ours.detach(), loop.detach(), kind, quantity)


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_makes_a_stack(name: str) -> None:
    theirs = their_layer(name, layers=2)
    x = torch.randn(T, B, theirs.input_size, dtype=torch.float64)
    with torch.no_grad():
        assert_close(our_layer(theirs)(x)[0], theirs(x)[0], "float64", "output")


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_cell_end_at_their_lengths(name: str) -> None:
    layer = our_layer(their_layer(name))
    x = torch.randn(T, B, H if name in SAME_SIZES else I, dtype=torch.float64)
    lengths = [T, 2, 4]
    with torch.no_grad():
        output, state = layer(x, lengths=lengths)
        for row, length in enumerate(lengths):
            alone, last = layer(x[:length, row : row + 1])
            assert_close(output[:length, row : row + 1], alone, "float64", "output")
            assert not output[length:, row].any()
            for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(last), strict=True):
                assert_close(a[:, row : row + 1], b, "float64", "output")
