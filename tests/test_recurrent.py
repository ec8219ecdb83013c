"""`fastrnn.Recurrent`: a layer from any cell equals torch.nn's layers and the cell's own loop."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils import _pytree as pytree

import fastrnn
from fastrnn.any_cell.recurrent import Recurrent
from pairs import LAYERS, STACKS, backward, outcome, tensors
from steps import loop as loop_of_steps

T, B, SIZE, H = 6, 4, 3, 5
F64 = torch.float64


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    """Every layer by its class's name."""
    return str(request.param)


def cells_of(layer: Any) -> tuple[list[Any], list[Any]]:
    """torch.nn's cells with the parameters of a layer, forwards and backwards."""
    directions: tuple[list[Any], list[Any]] = ([], [])
    for k in range(layer.num_layers):
        for cells, suffix in zip(directions, ("", "_reverse"), strict=True):
            if suffix and not layer.bidirectional:
                continue
            width = getattr(layer, f"weight_ih_l{k}{suffix}").shape[1]
            cell = getattr(nn, f"{layer.mode[:4].strip('_')}Cell")(width, H, layer.bias, dtype=F64)
            for key, _ in list(cell.named_parameters()):
                setattr(cell, key, getattr(layer, f"{key}_l{k}{suffix}"))
            cells.append(cell)
    return directions


def pair(name: str, home: Any = fastrnn, **options: Any) -> tuple[Any, Recurrent]:
    """A layer, and ours of cells with its parameters."""
    layer = getattr(home, name)(SIZE, H, dtype=F64, **options)
    cells, back = cells_of(layer)
    rest = {key: options[key] for key in ("batch_first", "dropout") if key in options}
    if layer.num_layers == 1:
        return layer, Recurrent(cells[0], back[0] if back else None, **rest)
    return layer, Recurrent(cells, back or None, **rest)


def arguments(name: str, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """A batch (T, B, I) or (B, T, I) and initial states, leaves that want gradients."""
    shape = (B, T, SIZE) if options.get("batch_first") else (T, B, SIZE)
    groups = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    states = [leaf(groups, B, H) for _ in range(2)]
    return leaf(*shape), tuple(states) if name == "LSTM" else states[0]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, requires_grad=True)


def assert_same(actual: Any, expected: Any, inputs: list[Tensor]) -> None:
    """Values, and the gradients of the inputs, agree."""
    found = []
    for outputs in (list(tensors(actual)), list(tensors(expected))):
        backward([o for o in outputs if o.requires_grad])
        gradients = [torch.zeros_like(i) if i.grad is None else i.grad for i in inputs]
        found.append([*(o.detach() for o in outputs), *gradients])
        for input in inputs:
            input.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


# ---- the same as the layers -------------------------------------------------------------------


@pytest.mark.parametrize("options", STACKS)
def test_torch_cells_equal_torch_layers(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, nn, **options)
    input, state = arguments(name, options)
    weights = list(theirs.parameters())
    assert_same(ours(input), theirs(input), [input, *weights])
    inputs = [input, *tensors(state), *weights]
    assert_same(ours(input, state), theirs(input, state), inputs)


@pytest.mark.parametrize("options", STACKS)
@pytest.mark.parametrize("with_states", [False, True])
def test_lengths_resets_and_states_equal_our_layers(
    name: str, options: dict[str, Any], with_states: bool
) -> None:
    layer, ours = pair(name, **options)
    input, state = arguments(name, options)
    state = state if with_states else None
    inputs = [input, *tensors(state), *layer.parameters()]
    reset = torch.rand(input.shape[:2]) < 0.4
    for lengths in (None, [4, 0, T, 1]):
        for given_reset in (None, reset):
            how: Any = {"lengths": lengths, "reset": given_reset, "return_states": True}
            actual = ours(input, state, **how)
            assert type(actual[1]) is (tuple if name == "LSTM" else Tensor)
            assert_same(actual, layer(input, state, **how), inputs)


@given(data=st.data(), T=st.integers(1, 5), B=st.integers(1, 3))
def test_any_lengths_and_resets_equal_our_layers(data: st.DataObject, T: int, B: int) -> None:
    layer, ours = pair("LSTM", bidirectional=True)
    input = leaf(T, B, SIZE)
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    flags = st.lists(st.booleans(), min_size=B, max_size=B)
    reset = data.draw(st.none() | st.lists(flags, min_size=T, max_size=T).map(torch.tensor))
    how: Any = {"lengths": lengths, "reset": reset, "return_states": True}
    assert_same(ours(input, **how), layer(input, **how), [input, *layer.parameters()])


@pytest.mark.parametrize("options", STACKS[:3])
@pytest.mark.parametrize("with_states", [False, True])
def test_a_packed_sequence_equals_our_layers(
    name: str, options: dict[str, Any], with_states: bool
) -> None:
    layer, ours = pair(name, **options)
    sequences = [leaf(steps, SIZE) for steps in (2, 5, 1, 5)]
    state = arguments(name, options)[1] if with_states else None
    packed = pack_sequence(sequences, enforce_sorted=False)
    actual = ours(packed, state, return_states=True)
    for mine, theirs in zip(actual[0][1:], packed[1:], strict=True):
        assert torch.equal(mine, theirs)
    inputs = [*sequences, *tensors(state), *layer.parameters()]
    again = pack_sequence(sequences, enforce_sorted=False)
    assert_same(actual, layer(again, state, return_states=True), inputs)


def test_a_sorted_packed_sequence(name: str) -> None:
    layer, ours = pair(name)
    packed = pack_padded_sequence(torch.randn(T, 2, SIZE, dtype=F64), [5, 3])
    output, state_n = ours(packed)
    assert output.sorted_indices is None
    torch.testing.assert_close((output.data, state_n), (layer(packed)[0].data, layer(packed)[1]))


@pytest.mark.parametrize("options", STACKS[:3])
def test_one_sequence_without_a_batch(name: str, options: dict[str, Any]) -> None:
    layer, ours = pair(name, **options)
    input, state = arguments(name, options)
    input, state = input[:, 0], pytree.tree_map(lambda s: s[:, 0], state)
    reset = torch.rand(T) < 0.4
    for at_first in (None, state):
        for how in ({}, {"lengths": 4}, {"lengths": [T]}, {"reset": reset}):
            actual = ours(input, at_first, return_states=True, **how)
            expected = layer(input, at_first, return_states=True, **how)
            torch.testing.assert_close(list(tensors(actual)), list(tensors(tuple(expected))))


def test_dropout_between_layers_draws_the_masks_of_torch(name: str) -> None:
    theirs, ours = pair(name, nn, num_layers=3, dropout=0.5)
    input = torch.randn(T, B, SIZE, dtype=F64)
    expected, actual = (outcome(layer, input) for layer in (theirs, ours))
    torch.testing.assert_close(actual.outputs, expected.outputs)
    torch.testing.assert_close(actual.d_inputs, expected.d_inputs)
    ours.eval()
    assert torch.equal(ours(input)[0], ours(input)[0])
    torch.testing.assert_close(ours(input), theirs.eval()(input))


def test_no_rows_and_one_step(name: str) -> None:
    _, ours = pair(name, bidirectional=True)
    for shape in ((T, 0, SIZE), (1, B, SIZE), (1, 0, SIZE)):
        reset = torch.zeros(shape[:2], dtype=torch.bool)
        for how in ({}, {"lengths": [1] * shape[1]}, {"reset": reset}):
            output, state_n, states = ours(torch.randn(shape, dtype=F64), return_states=True, **how)
            assert output.shape == (*shape[:2], 2 * H)
            assert all(s.shape == (2, shape[1], H) for s in tensors(state_n))
            assert all(s.shape == (1, *shape[:2], 2 * H) for s in tensors(states))


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_gets_no_gradient_and_may_hold_anything(name: str, reverse: bool) -> None:
    _, ours = pair(name, bidirectional=reverse)
    input = torch.randn(T, B, SIZE, dtype=F64)
    input[3:, 1] = float("nan")
    input[:, 2] = float("inf")
    input.requires_grad_()
    for how in ({}, {"reset": torch.rand(T, B) < 0.4}):
        output, state_n = ours(input, lengths=[T, 3, 0, T], **how)
        sum(t.square().sum() for t in tensors((output, state_n))).backward()
        assert torch.equal(input.grad[3:, 1], torch.zeros(T - 3, SIZE, dtype=F64))
        assert not input.grad[:, 2].any()
        assert input.grad[:3, 1].abs().min() > 0
        assert all(p.grad.isfinite().all() for p in ours.parameters())
        input.grad = None


# ---- any cell ---------------------------------------------------------------------------------


class Elman(nn.Module):
    """What the cells below share: h of x and of a state's first tensor."""

    def __init__(self, size: int = SIZE, hidden: int = H) -> None:
        super().__init__()
        self.ih = nn.Linear(size, hidden, dtype=F64)
        self.hh = nn.Linear(hidden, hidden, dtype=F64)

    def zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.hh.in_features)

    def move(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.ih(x) + self.hh(h))


class OutputAndState(Elman):
    """(output, state), the state one tensor."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.move(x, self.zeros(x) if h is None else h)
        return h * 2, h


class OutputAndPair(Elman):
    """(output, (h, c))."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, c = (self.zeros(x), self.zeros(x)) if state is None else state
        c = 0.5 * c + self.move(x, h)
        return c.sin(), (c.tanh(), c)


class OutputAndRest(Elman):
    """(output, h, c) of a state (h, c)."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, c = (self.zeros(x), self.zeros(x)) if state is None else state
        c = 0.5 * c + self.move(x, h)
        return c.sin(), c.tanh(), c


class Nested(Elman):
    """(h, (c, [n])), all of it the state: the output is its first entry."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if state is None:
            state = (self.zeros(x), (self.zeros(x), [x.new_zeros(x.shape[:-1])]))
        h, (c, [n]) = state
        c = 0.9 * c + h
        return self.move(x, c), (c, [n + 1])


class Learned(Elman):
    """A state that is learned where none is given."""

    def __init__(self) -> None:
        super().__init__()
        self.h_0 = nn.Parameter(torch.randn(H, dtype=F64))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.move(x, self.h_0.expand(x.shape[0], -1) if h is None else h)


class Listed(Elman):
    """A state that is a list."""

    def forward(self, x: Tensor, state: Any = None) -> list[Tensor]:
        h, c = [self.zeros(x), self.zeros(x)] if state is None else state
        return [self.move(x, h + c), h]


class Branching(OutputAndPair):
    """A cell that looks at values."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        output, (h, c) = super().forward(x, state)
        return (output if float(c.detach().sum()) > 0 else -output), (h, c)


CELLS = [OutputAndState, OutputAndPair, OutputAndRest, Nested, Learned, Branching]


def call(cell: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """(output, state), by the class."""
    result = cell(x, state)
    if isinstance(cell, OutputAndState | OutputAndPair):
        return result
    if isinstance(cell, OutputAndRest):
        return result[0], result[1:]
    return (result if isinstance(result, Tensor) else result[0]), result


def loop(cell: Any, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """The specification: output (T, B, H), and the final state without an axis of layers."""
    state, output = loop_of_steps(lambda state, x: call(cell, x, state)[::-1], state, input)
    return output, state


def with_layer_axis(state: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.unsqueeze(0), state)


def without_layer_axis(state: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.squeeze(0), state)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a cell that only the loop can run
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("steps", [1, T])
def test_every_way_to_return_a_state_equals_the_loop(kind: Any, steps: int) -> None:
    cell = kind()
    layer, input = Recurrent(cell), leaf(steps, B, SIZE)
    inputs = [input, *cell.parameters()]
    output, state = loop(cell, input)
    found = layer(input)
    assert pytree.tree_structure(found[1]) == pytree.tree_structure(state)
    assert_same(found, (output, with_layer_axis(state)), inputs)
    given = pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), with_layer_axis(state))
    output, state = loop(cell, input, without_layer_axis(given))
    inputs += tensors(given)
    assert_same(layer(input, given), (output, with_layer_axis(state)), inputs)


@pytest.mark.parametrize("kind", [OutputAndState, OutputAndPair, Nested])
@pytest.mark.parametrize("backwards", [False, True])
def test_cutting_a_sequence_in_two_changes_nothing(kind: Any, backwards: bool) -> None:
    layer, input = Recurrent(kind(), kind() if backwards else None), leaf(T, B, SIZE)
    output, state = layer(input)
    first, between = layer(input[:2])
    second, last = layer(input[2:], between)
    torch.testing.assert_close(torch.cat([first, second])[..., :H], output[..., :H])
    for one, other in zip(tensors(last), tensors(state), strict=True):
        torch.testing.assert_close(one[0], other[0])


def test_an_episode_starts_with_the_learned_state_of_the_cell() -> None:
    cell, other = Learned(), Learned()
    layer, input = Recurrent(cell, other), leaf(T, 1, SIZE)
    reset = torch.zeros(T, 1, dtype=torch.bool)
    reset[2] = reset[5] = True
    bounds = [(0, 2), (2, 5), (5, T)]
    forwards = torch.cat([loop(cell, input[a:b])[0] for a, b in bounds])
    backwards = torch.cat([loop(other, input[a:b].flip(0))[0].flip(0) for a, b in bounds])
    expected = torch.cat([forwards, backwards], -1)
    inputs = [input, *layer.parameters()]
    assert_same(layer(input, reset=reset)[0], expected, inputs)
    # The state that is given is that of the first episode in each direction.
    state = leaf(2, 1, H)
    output, state_n = layer(input, state, reset=reset)
    torch.testing.assert_close(output[2:, :, :H], forwards[2:])
    torch.testing.assert_close(output[:5, :, H:], backwards[:5])
    torch.testing.assert_close(output[:2, :, :H], loop(cell, input[:2], state[0])[0])
    torch.testing.assert_close(state_n, torch.stack([forwards[-1], backwards[0]]))


def test_a_sequence_starts_with_the_learned_state_of_the_cell() -> None:
    cell, other = Learned(), Learned()
    layer, input, lengths = Recurrent(cell, other), leaf(T, B, SIZE), [4, 1, T, 3]
    for reset in (None, torch.zeros(T, B, dtype=torch.bool)):
        output, state_n = layer(input, lengths=lengths, reset=reset)
        for b, length in enumerate(lengths):
            row = input[:length, b : b + 1]
            expected = torch.cat([loop(cell, row)[0], loop(other, row.flip(0))[0].flip(0)], -1)
            torch.testing.assert_close(output[:length, b : b + 1], expected)
            ends = torch.stack([expected[-1, 0, :H], expected[0, 0, H:]])
            torch.testing.assert_close(state_n[:, b], ends)


def test_a_state_that_the_cell_replaces_may_hold_nan() -> None:
    layer, input = Recurrent(nn.GRUCell(SIZE, H, dtype=F64)), leaf(T, B, SIZE)
    state = torch.randn(1, B, H, dtype=F64)
    state[:, 1] = float("nan")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = True
    output, _ = layer(input, state, reset=reset)
    torch.testing.assert_close(output[:, 1], layer(input[:, 1])[0])
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_an_episode_that_became_nan_does_not_reach_the_next() -> None:
    layer, input = Recurrent(nn.GRUCell(SIZE, H, dtype=F64)), torch.randn(T, B, SIZE, dtype=F64)
    input[2] = float("nan")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    output, state_n = layer(input, reset=reset)
    torch.testing.assert_close((output[3:], state_n), layer(input[3:]))


def test_reset_cuts_the_gradient_in_both_directions(name: str) -> None:
    _, layer = pair(name, num_layers=2, bidirectional=True)
    input = leaf(T, B, SIZE)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    output, _ = layer(input, reset=reset)
    for mine, others in ((slice(0, 3), slice(3, T)), (slice(3, T), slice(0, 3))):
        (gradient,) = torch.autograd.grad(output[mine].sum(), input, retain_graph=True)
        assert gradient[mine].abs().min() > 0
        assert not gradient[others].any()


@pytest.mark.parametrize("how", [{}, {"lengths": [2, T, 0, 1]}, {"reset": True}])
def test_a_state_of_one_number_for_each_row(how: dict[str, Any]) -> None:
    layer = Recurrent(Nested(), Nested())
    if how.get("reset"):
        how = {"reset": torch.rand(T, B) < 0.4}
    _, (_, (c_n, [n])), (h, (c, [every])) = layer(leaf(T, B, SIZE), return_states=True, **how)
    assert c_n.shape == (2, B, H)
    assert n.shape == (2, B)
    assert h.shape == c.shape == (1, T, B, 2 * H)
    assert every.shape == (1, T, B, 2)
    if "lengths" in how:
        assert n.tolist() == [[2, T, 0, 1]] * 2
    elif not how:
        assert every[0, :, 0].tolist() == [[t + 1, T - t] for t in range(T)]


@pytest.mark.parametrize("backwards", [False, True])
def test_states_of_different_cells_are_lists(backwards: bool) -> None:
    D = 2 if backwards else 1
    cells = [nn.GRUCell(SIZE, H, dtype=F64), nn.LSTMCell(D * H, 2, dtype=F64)]
    back = [nn.GRUCell(SIZE, H, dtype=F64), nn.GRUCell(D * H, 2, dtype=F64)] if backwards else None
    layer, input = Recurrent(cells, back), leaf(T, B, SIZE)
    output, state_n, states = layer(input, return_states=True)
    assert output.shape == (T, B, 2 * D)
    assert len(state_n) == len(states) == 2 * D
    assert state_n[0].shape == (B, H)
    h_n, c_n = state_n[D]
    assert h_n.shape == c_n.shape == (B, 2)
    assert torch.equal(states[D][0], output[..., :2])
    assert torch.equal(states[D][1][-1], c_n)
    if not backwards:  # it is taken in the same form
        _, between = layer(input[:2])
        torch.testing.assert_close(layer(input[2:], between)[0], output[2:])


def test_a_state_that_is_a_list_stands_in_a_list() -> None:
    layer, input = Recurrent(Listed()), leaf(T, B, SIZE)
    output, state_n = layer(input)
    assert len(state_n) == 1
    assert [s.shape for s in state_n[0]] == [(B, H), (B, H)]
    _, between = layer(input[:2])
    torch.testing.assert_close(layer(input[2:], between)[0], output[2:])


def test_a_state_may_be_given_by_layer_and_direction() -> None:
    layer, ours = pair("LSTM", num_layers=2, bidirectional=True)
    input, state = arguments("LSTM", {"num_layers": 2, "bidirectional": True})
    by_cell = [(state[0][k], state[1][k]) for k in range(4)]
    torch.testing.assert_close(ours(input, by_cell), layer(input, state))
    by_cell[1:] = [None] * 3  # type: ignore[list-item]
    state = tuple(torch.cat([s[:1], torch.zeros(3, B, H)]) for s in state)
    torch.testing.assert_close(ours(input, by_cell), layer(input, state))


@pytest.mark.filterwarnings("ignore:fastrnn runs this step as a loop.*convolution")
def test_a_cell_of_several_feature_axes() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Conv1d(2 + 3, 3, 3, padding=1, dtype=F64)

        def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
            h = x.new_zeros(x.shape[0], 3, x.shape[2]) if h is None else h
            return torch.tanh(self.both(torch.cat([x, h], 1)))

    cell, input = Convolution(), leaf(T, B, 2, 7)
    layer = Recurrent(cell)
    output, state = loop(cell, input)
    assert_same(layer(input), (output, state[None]), [input, *cell.parameters()])
    cut = layer(input, lengths=[3, T, 0, 1])[0]
    torch.testing.assert_close(cut[:3, 0], output[:3, 0])
    assert not cut[3:, 0].any()
    layer.batch_first = True
    torch.testing.assert_close(layer(input.transpose(0, 1))[0], output.transpose(0, 1))


def test_one_cell_may_stand_in_several_places() -> None:
    cell = nn.GRUCell(H, H, dtype=F64)
    input = leaf(T, B, H)
    output, state_n = Recurrent(cell, cell)(input)
    torch.testing.assert_close(output[..., H:], Recurrent(cell)(input.flip(0))[0].flip(0))
    once = Recurrent(cell)(input)[0]
    twice = Recurrent([cell, cell])
    torch.testing.assert_close(twice(input)[0], Recurrent(cell)(once)[0])
    assert len(list(twice.parameters())) == 4
    assert state_n.shape == (2, B, H)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of an operation that only the loop knows
def test_probing_a_cell_for_its_state_draws_no_random_numbers() -> None:
    class Noisy(OutputAndPair):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            return super().forward(nn.functional.dropout(x, 0.5), state)

    cell, input = Noisy(), torch.randn(T, B, SIZE, dtype=F64)
    torch.manual_seed(5)
    expected = loop(cell, input)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(Recurrent(cell)(input)[0], expected)


# ---- as a module ------------------------------------------------------------------------------


def test_parameters_are_the_cells_own() -> None:
    cell = nn.GRUCell(SIZE, H)
    layer = Recurrent(cell, nn.GRUCell(SIZE, H))
    keys = [f"{c}.{p}" for c in ("cell", "reverse_cell") for p in cell.state_dict()]
    assert list(layer.state_dict()) == keys
    assert layer.cell is cell
    other = nn.GRUCell(SIZE, H)
    layer.cell.load_state_dict(other.state_dict())
    assert torch.equal(cell.weight_ih, other.weight_ih)
    stack = Recurrent([nn.GRUCell(SIZE, H), nn.GRUCell(H, H)])
    assert list(stack.state_dict())[:5] == [
        *(f"cells.0.{p}" for p in cell.state_dict()),
        "cells.1.weight_ih",
    ]
    stack = Recurrent(nn.ModuleList([cell]), [other])
    assert list(stack.state_dict())[4] == "reverse_cells.0.weight_ih"


def test_a_changed_weight_and_a_replaced_cell_are_seen() -> None:
    layer, input = Recurrent(nn.GRUCell(SIZE, H, dtype=F64)), leaf(T, B, SIZE)
    before = layer(input)[0]
    with torch.no_grad():
        layer.cell.weight_hh.mul_(2)
    torch.testing.assert_close(layer(input)[0], loop(layer.cell, input)[0])
    assert not torch.equal(layer(input)[0], before)
    layer.cell = OutputAndState()
    torch.testing.assert_close(layer(input)[0], loop(layer.cell, input)[0])


def test_copies_and_pickles_give_the_same() -> None:
    _, layer = pair("LSTM", num_layers=2, bidirectional=True, dropout=0.5)
    layer.eval()
    input = torch.randn(T, B, SIZE, dtype=F64)
    expected = layer(input)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for other in (*others, torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(input), expected, rtol=0, atol=0)
        assert other.cells[0].weight_ih is not layer.cells[0].weight_ih


def test_hooks_on_the_layer_run_once_a_call() -> None:
    layer, seen = Recurrent(nn.GRUCell(SIZE, H)), []
    layer.register_forward_hook(lambda module, args, result: seen.append(result))
    result = layer(torch.randn(T, B, SIZE))
    assert len(seen) == 1
    assert seen[0] is result


def test_hooks_of_a_cell_do_not_see_the_probe_of_its_state() -> None:
    cell, seen = OutputAndPair(), []
    cell.register_forward_hook(lambda module, args, result: seen.extend(tensors(result)))
    output, _ = Recurrent(cell)(leaf(1, B, SIZE))
    assert all(type(tensor) is Tensor for tensor in seen)
    assert output.shape == (1, B, H)


def test_the_modules_mode_reaches_the_cells() -> None:
    layer = Recurrent([nn.GRUCell(SIZE, H), nn.GRUCell(H, H)], dropout=0.5)
    assert not layer.eval().cells[1].training
    assert layer.double().cells[1].weight_ih.dtype == F64


def test_repr_shows_the_cells_and_the_options() -> None:
    assert repr(Recurrent(nn.GRUCell(3, 5))) == "Recurrent(\n  (cell): GRUCell(3, 5)\n)"
    cells = [nn.GRUCell(3, 5), nn.GRUCell(5, 5)]
    shown = repr(Recurrent(cells, batch_first=True, dropout=0.5))
    assert shown.startswith("Recurrent(\n  batch_first=True, dropout=0.5\n")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_numbers_without_gradients_are_the_same(name: str, mode: Any) -> None:
    _, layer = pair(name, bidirectional=True)
    input = leaf(T, B, SIZE)
    how: Any = {"lengths": [T, 2, 0, 1], "reset": torch.rand(T, B) < 0.4}
    expected = layer(input, **how)
    with mode():
        found = layer(input, **how)
    assert not found[0].requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", [{}, {"lengths": [3, 1]}])
def test_first_and_second_derivatives(name: str, how: dict[str, Any]) -> None:
    _, layer = pair(name, bidirectional=True)
    input = leaf(3, 2, SIZE)
    weights = dict(layer.named_parameters())

    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(weights, given, strict=True))
        output, state_n = torch.func.functional_call(layer, named, (x,), how)
        return (output, *tensors(state_n))

    assert torch.autograd.gradcheck(run, (input, *weights.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (input, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("kind", [OutputAndState, OutputAndPair, Nested])
def test_vmap_over_inputs(kind: Any) -> None:
    layer, input = Recurrent(kind(), kind()), torch.randn(2, T, B, SIZE, dtype=F64)
    found = torch.func.vmap(lambda x: layer(x, lengths=[T, 2, 0, 1])[0])(input)
    expected = torch.stack([layer(x, lengths=[T, 2, 0, 1])[0] for x in input])
    torch.testing.assert_close(found, expected)


def test_vmap_over_weights() -> None:
    cells = [OutputAndPair() for _ in range(3)]
    layer, input = Recurrent(cells[0]), torch.randn(T, B, SIZE, dtype=F64)
    weights, _ = torch.func.stack_module_state([Recurrent(cell) for cell in cells])

    def run(weights: Any) -> Tensor:
        return torch.func.functional_call(layer, weights, (input,))[0]

    expected = torch.stack([loop(cell, input)[0] for cell in cells])
    torch.testing.assert_close(torch.func.vmap(run)(weights), expected)


def test_autocast_leaves_a_states_dtype(name: str) -> None:
    layer = Recurrent(getattr(nn, f"{name}Cell")(SIZE, H), getattr(nn, f"{name}Cell")(SIZE, H))
    input = torch.randn(T, B, SIZE)
    expected, state = layer(input)
    zeros = pytree.tree_map(torch.zeros_like, state)
    with torch.autocast("cpu", torch.bfloat16):
        for at_first in (None, zeros):
            for how in ({}, {"reset": torch.zeros(T, B, dtype=torch.bool)}):
                output, state_n = layer(input, at_first, **how)
                torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.05)
                if at_first is not None:
                    assert all(s.dtype == torch.float32 for s in tensors(state_n))


@pytest.mark.parametrize("kind", [nn.LSTMCell, OutputAndPair])
def test_under_torch_compile(kind: Any) -> None:
    cells = [OutputAndPair(), OutputAndPair()]
    if kind is nn.LSTMCell:
        cells = [nn.LSTMCell(SIZE, H, dtype=F64), nn.LSTMCell(SIZE, H, dtype=F64)]
    layer = Recurrent(*cells)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    input = torch.randn(2, 2, SIZE, dtype=F64)
    torch.testing.assert_close(compiled(input, lengths=[1, 2]), layer(input, lengths=[1, 2]))


# ---- refusals ---------------------------------------------------------------------------------


def test_cells_that_are_none_are_refused() -> None:
    cell = nn.GRUCell(SIZE, H)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((nn.GRUCell,), {}, TypeError, "cell must be a cell, got the class GRUCell; make one"),
        ((torch.tanh,), {}, TypeError, "cell must be a torch.nn.Module, got builtin_function_or_m"),
        ((None,), {}, TypeError, "cell must be a torch.nn.Module, got NoneType"),
        (([cell, 3],), {}, TypeError, r"cell\[1\] must be a torch.nn.Module, got int"),
        (([],), {}, ValueError, "cell must hold at least one cell, got an empty list"),
        ((nn.GRU(3, 5),), {}, TypeError, "cell must be a cell, which makes one step, got the lay"),
        ((fastrnn.GRU(3, 5),), {}, TypeError, "got the layer GRU, which makes all; call the layer"),
        ((Recurrent(cell),), {}, TypeError, "got the layer Recurrent"),
        ((cell, [cell]), {}, TypeError, "reverse_cell must be a torch.nn.Module, got list"),
        (([cell], cell), {}, TypeError, "reverse_cell must be a list where cell is a list, got GR"),
        (([cell], [cell] * 2), {}, ValueError, "reverse_cell must have as many cells as cell, 1, "),
        ((cell,), {"batch_first": 1}, TypeError, "batch_first must be a bool, got int"),
        ((cell,), {"dropout": 1.5}, ValueError, "dropout must be a number from 0 to 1, got 1.5"),
        ((cell,), {"dropout": "0"}, TypeError, "dropout must be a number from 0 to 1, got str"),
    ]
    for arguments, options, error, message in wrong:
        with pytest.raises(error, match=message):
            Recurrent(*arguments, **options)


def test_dropout_of_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="dropout is applied between layers.* got dropout=0.5"):
        Recurrent(nn.GRUCell(SIZE, H), dropout=0.5)


def test_arguments_that_do_not_fit_are_refused() -> None:
    layer, x = Recurrent(nn.LSTMCell(SIZE, H), nn.LSTMCell(SIZE, H)), torch.zeros(T, B, SIZE)
    h, reset = torch.zeros(2, B, H), torch.zeros(T, B, dtype=torch.bool)
    packed = pack_sequence([torch.zeros(3, SIZE), torch.zeros(2, SIZE)])
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (([1.0],), {}, TypeError, "input must be a Tensor, got list"),
        ((x[0, 0],), {}, ValueError, r"input must be \(T, B, …\), or \(T, I\) for one sequence"),
        ((x[:0],), {}, RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
        ((x, (h, 1)), {}, TypeError, r"state\[1\] must be a Tensor, got int"),
        ((x, (h, h[:1])), {}, ValueError, r"state\[1\] must have shape \(2, 4, …\), L·D and B fi"),
        ((x, (h[:, 1:], h)), {}, ValueError, r"state\[0\] must have .* got \(2, 3, 5\)"),
        ((x, [h]), {}, ValueError, "state must be a list of 2, one state for each layer and dir"),
        ((x, [(h[0], h[0]), h]), {}, ValueError, r"state\[1\] must have shape \(4, …\), B first"),
        ((x[:, 0], (h, h[:1, 0])), {}, ValueError, r"state\[1\] must have shape \(2, …\), L·D fir"),
        ((x,), {"return_states": 1}, TypeError, "return_states must be a bool, got int"),
        ((x,), {"lengths": [1, 2]}, ValueError, r"lengths must have shape \(4,\)"),
        ((x,), {"lengths": [T + 1] * B}, ValueError, "lengths must lie between 0 and the 6 steps"),
        ((x,), {"reset": reset.t()}, ValueError, r"reset must have shape \(T, B\), here \(6, 4\)"),
        ((x,), {"reset": [True]}, TypeError, "reset must be a bool tensor, got list"),
        (
            (packed,),
            {"lengths": [3, 2]},
            ValueError,
            "lengths must be None where input is a Packed",
        ),
        ((packed,), {"reset": reset}, ValueError, "reset must be None where input is a PackedSeq"),
        (
            (PackedSequence(torch.zeros(5), packed.batch_sizes),),
            {},
            ValueError,
            r"the data of input must be \(N, …\), got 1-D",
        ),
    ]
    for arguments, options, error, message in wrong:
        with pytest.raises(error, match=message):
            layer(*arguments, **options)


class Returns(nn.Module):
    """A cell that returns what it was told to."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.what(x, state)


def test_cells_that_return_something_else_are_refused() -> None:
    x = torch.zeros(T, B, SIZE)
    state = torch.zeros(1, B, H)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (lambda x, s: 1.0, None, TypeError, "cell must return its state, of which .* got float"),
        (lambda x, s: None, None, TypeError, "cell must return its state.* got None"),
        (lambda x, s: {"h": x}, None, TypeError, r"got \{'h': Tensor\}"),
        (lambda x, s: ((x, x), x), None, TypeError, r"got \(\(Tensor, Tensor\), Tensor\)"),
        (lambda x, s: x[:1], None, ValueError, r"cell: state must have .* B = 4, got \(1, 3\)"),
        (lambda x, s: (x, 1), None, TypeError, "cell: state must be a Tensor, got int; ret"),
        (
            lambda x, s: s[:, 1:],
            state,
            ValueError,
            r"cell: state was \(4, 5\) float32 before and is \(4, 4\) float32 after the step; ",
        ),
        (
            lambda x, s: s.double(),
            state,
            ValueError,
            r"is \(4, 5\) float64 after the step; cast it to the same dtype: .to\(torch.float32",
        ),
        (
            lambda x, s: (x, x, x),
            (state, state),
            TypeError,
            r"cell: state was \(Tensor, Tensor\) before and is \(Tensor, Tensor, Tensor\) after",
        ),
    ]
    for what, given_state, error, message in wrong:
        with pytest.raises(error, match=message):
            Recurrent(Returns(what))(x, given_state)
    stack = Recurrent([nn.GRUCell(SIZE, H), Returns(lambda x, s: x[:, : 5 if s is None else 4])])
    with pytest.raises(ValueError, match=r"cells\[1\]: state was \(4, 5\) float32 before and is"):
        stack(x)


def test_an_error_of_the_cell_is_the_callers() -> None:
    layer = Recurrent(nn.GRUCell(SIZE, H))
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 4 expected 3"):
        layer(torch.zeros(T, B, SIZE + 1))
