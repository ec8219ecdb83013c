"""`lengths`, `reset` and `return_states`: each equals torch.nn run piece by piece."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from pairs import LAYERS, STACKS, backward, pair, tensors

T, B, SIZE, H = 6, 4, 3, 5
F64 = torch.float64


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    """Every layer by its class's name."""
    return str(request.param)


def arguments(name: str, options: dict[str, Any], with_states: bool) -> tuple[Tensor, Any]:
    """A batch (T, B, I) or (B, T, I) and initial states, leaves that want gradients."""
    shape = (B, T, SIZE) if options.get("batch_first") else (T, B, SIZE)
    input = torch.randn(shape, dtype=F64, requires_grad=True)
    if not with_states:
        return input, None
    groups = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    states = [torch.randn(groups, B, H, dtype=F64, requires_grad=True) for _ in range(2)]
    return input, tuple(states) if name == "LSTM" else states[0]


def row(hx: Any, b: int) -> Any:
    """The states of one sequence of the batch."""
    if hx is None:
        return None
    return tuple(row(s, b) for s in hx) if isinstance(hx, tuple) else hx[:, b : b + 1]


def assert_equal_with_gradients(actual: Any, expected: Any, leaves: list[Tensor]) -> None:
    """Values, then the gradients with respect to the leaves, agree."""
    found = []
    for outputs in (list(tensors(actual)), list(tensors(expected))):
        backward(outputs)
        found.append([*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def weights_in_common(theirs: Any, ours: Any) -> list[Tensor]:
    """Let both layers use the same Parameter objects."""
    for key, parameter in theirs.named_parameters():
        setattr(ours, key, parameter)
    return list(theirs.parameters())


# ---- lengths ----------------------------------------------------------------------------------


def one_by_one(theirs: Any, input: Tensor, hx: Any, lengths: list[int], batch_first: bool) -> Any:
    """What torch gives for each sequence alone, cut to its length, put together again."""
    sequences = input.transpose(0, 1) if batch_first else input
    directions = 2 if theirs.bidirectional else 1
    groups = theirs.num_layers * directions
    outputs, finals = [], []
    for b, length in enumerate(lengths):
        output = torch.zeros(T, 1, directions * H, dtype=F64)
        mine: Any = row(hx, b)
        if length:
            run, mine = theirs.forward(_as_given(sequences[:length, b : b + 1], batch_first), mine)
            run = run.transpose(0, 1) if batch_first else run
            output = torch.cat([run, output[length:]])
        elif mine is None:
            mine = torch.zeros(groups, 1, H, dtype=F64)
            mine = (mine, mine) if theirs.mode == "LSTM" else mine
        outputs.append(output)
        finals.append(tuple(tensors(mine)))
    output = torch.cat(outputs, dim=1)
    h_n = tuple(torch.cat(parts, dim=1) for parts in zip(*finals, strict=True))
    return _as_given(output, batch_first), h_n


def _as_given(sequences: Tensor, batch_first: bool) -> Tensor:
    return sequences.transpose(0, 1) if batch_first else sequences


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("options", STACKS)
def test_lengths_equal_each_sequence_run_alone(
    name: str, options: dict[str, Any], with_states: bool
) -> None:
    theirs, ours = pair(name, SIZE, H, dtype=F64, **options)
    shared = weights_in_common(theirs, ours)
    input, hx = arguments(name, options, with_states)
    lengths = [4, 0, T, 1]
    expected = one_by_one(theirs, input, hx, lengths, ours.batch_first)
    actual = ours(input, hx, lengths=torch.tensor(lengths))
    assert_equal_with_gradients(actual, expected, [input, *tensors(hx), *shared])


def test_padding_gets_no_gradient_and_may_hold_anything(name: str) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, bidirectional=True, dtype=F64)
    input = torch.randn(T, B, SIZE, dtype=F64)
    input[3:, 1] = float("nan")
    input.requires_grad_()
    output, hx_n = layer(input, lengths=[T, 3, T, T])
    assert not any(t.isnan().any() for t in tensors((output, hx_n)))
    output.square().sum().backward()
    assert torch.equal(input.grad[3:, 1], torch.zeros(T - 3, SIZE, dtype=F64))
    assert input.grad[:3, 1].abs().min() > 0
    assert not any(p.grad.isnan().any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_lengths_of_any_integer_dtype_and_lists(name: str, dtype: torch.dtype) -> None:
    layer, input = getattr(fastrnn, name)(SIZE, H), torch.randn(T, B, SIZE)
    expected = layer(input, lengths=torch.tensor([4, 0, 6, 1]))
    strided = torch.tensor([4, 9, 0, 9, 6, 9, 1], dtype=dtype)[::2]
    given = torch.tensor([4, 0, 6, 1], dtype=dtype)
    for lengths in (given, strided, [4, 0, 6, 1], (4, 0, 6, 1)):
        torch.testing.assert_close(layer(input, lengths=lengths), expected, rtol=0, atol=0)


def test_lengths_of_one_sequence_and_of_none(name: str) -> None:
    layer, input = getattr(fastrnn, name)(SIZE, H), torch.randn(T, SIZE)
    expected = layer(input[:4])
    for lengths in (4, torch.tensor(4), [4]):
        output, hx_n = layer(input, lengths=lengths)
        torch.testing.assert_close((output[:4], hx_n), expected, rtol=0, atol=0)
        assert torch.equal(output[4:], torch.zeros(2, H))
    output, _ = layer(torch.randn(T, 0, SIZE), lengths=[])
    assert output.shape == (T, 0, H)


def test_lengths_that_do_not_fit_are_refused(name: str) -> None:
    layer, input = getattr(fastrnn, name)(SIZE, H), torch.randn(T, B, SIZE)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([1.0, 2.0, 3.0, 4.0], TypeError, "lengths must be integers, got torch.float32"),
        ([True] * B, TypeError, "lengths must be integers, got torch.bool"),
        ([1, 2, 3], ValueError, r"lengths must have shape \(4,\).*got \(3,\)"),
        (torch.ones(B, 1, dtype=torch.int64), ValueError, r"lengths must have shape \(4,\)"),
        ([1, 2, 3, 7], ValueError, "lengths must lie between 0 and the 6 steps of input, got 7"),
        ([1, -2, 3, 4], ValueError, "lengths must lie between 0 and the 6 steps of input, got -2"),
        ("four", TypeError, "lengths must be a tensor or what torch makes one of, got str"),
        ([None, 2, 3, 4], TypeError, "lengths must be .* got list: .*NoneType"),
        ([2**70, 2, 3, 4], TypeError, "lengths must be .* got list: Overflow"),
        ({1, 2, 3, 4}, TypeError, "lengths must be .* got set"),
        (np.array([1, None, 3, 4]), TypeError, "lengths must be .* got ndarray: .*object"),
        (torch.ones(B, device="meta").int(), ValueError, "lengths must have values, got .* meta"),
    ]
    for lengths, error, message in wrong:
        with pytest.raises(error, match=message):
            layer(input, lengths=lengths)
    packed = pack_sequence([torch.randn(3, SIZE), torch.randn(2, SIZE)])
    with pytest.raises(ValueError, match="lengths must be None where input is a PackedSequence"):
        layer(packed, lengths=[3, 2])


# ---- reset ------------------------------------------------------------------------------------


def episode_by_episode(theirs: Any, input: Tensor, hx: Any, reset: Tensor) -> Any:
    """What torch gives for each episode alone, put together again; all time first."""
    two = theirs.bidirectional
    outputs, finals = [], []
    for b in range(B):
        cuts = [0, *(t for t in range(1, T) if reset[t, b]), T]
        pieces, states = [], []
        for start, stop in pairwise(cuts):
            mine = tuple(s[:, b : b + 1].clone() for s in tensors(hx))
            for state in mine:
                if start > 0 or reset[0, b]:
                    state[:: 2 if two else 1] = 0
                if two and stop < T:
                    state[1::2] = 0
            given = mine if theirs.mode == "LSTM" else mine[0]
            output, hx_n = theirs.forward(input[start:stop, b : b + 1], given)
            pieces.append(output)
            states.append(list(tensors(hx_n)))
        outputs.append(torch.cat(pieces))
        merged = [last.clone() for last in states[-1]]
        if two:
            for last, first in zip(merged, states[0], strict=True):
                last[1::2] = first[1::2]
        finals.append(merged)
    return torch.cat(outputs, 1), tuple(torch.cat(p, 1) for p in zip(*finals, strict=True))


@pytest.mark.parametrize("options", STACKS[:3])
def test_reset_equals_each_episode_run_alone(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, SIZE, H, dtype=F64, **options)
    shared = weights_in_common(theirs, ours)
    input, hx = arguments(name, options, with_states=True)
    reset = torch.rand(T, B) < 0.4
    reset[0] = torch.tensor([True, False, True, False])
    expected = episode_by_episode(theirs, input, hx, reset)
    assert_equal_with_gradients(
        ours(input, hx, reset=reset), expected, [input, *tensors(hx), *shared]
    )


def test_reset_cuts_the_gradient_in_both_directions(name: str) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, 2, bidirectional=True, dtype=F64)
    input = torch.randn(T, B, SIZE, dtype=F64, requires_grad=True)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    output, _ = layer(input, reset=reset)
    (gradient,) = torch.autograd.grad(output[:3].sum(), input, retain_graph=True)
    assert gradient[:3].abs().min() > 0
    assert not gradient[3:].any()
    (gradient,) = torch.autograd.grad(output[3:].sum(), input)
    assert not gradient[:3].any()
    assert gradient[3:].abs().min() > 0


def test_reset_in_every_layout(name: str) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, dtype=F64)
    input, reset = torch.randn(T, B, SIZE, dtype=F64), torch.rand(T, B) < 0.4
    output, hx_n = layer(input, reset=reset)
    layer.batch_first = True
    turned, same = layer(input.transpose(0, 1), reset=reset.t())
    torch.testing.assert_close((turned.transpose(0, 1), same), (output, hx_n), rtol=0, atol=0)
    one, one_n = layer(input[:, 2], reset=reset[:, 2])
    expected = (output[:, 2], [s[:, 2] for s in tensors(hx_n)])
    torch.testing.assert_close((one, list(tensors(one_n))), expected, rtol=0, atol=0)


def test_reset_beside_lengths(name: str) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, bidirectional=True, dtype=F64)
    input, lengths = torch.randn(T, 1, SIZE, dtype=F64), [4]
    reset = torch.tensor([False, False, True, False, True, True]).unsqueeze(1)
    expected = layer(input[:4], reset=reset[:4])
    output, hx_n = layer(input, lengths=lengths, reset=reset)
    torch.testing.assert_close((output[:4], hx_n), expected, rtol=1e-12, atol=1e-12)


def test_reset_that_does_not_fit_is_refused(name: str) -> None:
    layer, input = getattr(fastrnn, name)(SIZE, H), torch.randn(T, B, SIZE)
    with pytest.raises(TypeError, match=r"reset must be a bool tensor, got torch\.int64"):
        layer(input, reset=torch.zeros(T, B, dtype=torch.int64))
    with pytest.raises(TypeError, match="reset must be a bool tensor, got list"):
        layer(input, reset=[True])
    reset = torch.zeros(B, T, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reset must have shape \(T, B\), here \(6, 4\), got"):
        layer(input, reset=reset)
    with pytest.raises(ValueError, match=r"reset must have shape \(T,\) beside an unbatched"):
        layer(input[:, 0], reset=reset)
    with pytest.raises(RuntimeError, match="reset tensor at meta"):
        layer(input, reset=reset.t().to("meta"))
    layer.batch_first = True
    with pytest.raises(ValueError, match=r"\(B, T\) with batch_first=True, here \(4, 6\)"):
        layer(input.transpose(0, 1), reset=reset.t())
    packed = pack_sequence([torch.randn(3, SIZE), torch.randn(2, SIZE)])
    with pytest.raises(ValueError, match="reset must be None where input is a PackedSequence"):
        layer(packed, reset=reset)


# ---- return_states ----------------------------------------------------------------------------


def layer_by_layer(theirs: Any, input: Tensor) -> Any:
    """The hidden states of every layer, from torch layers of one layer each."""
    hidden = []
    for k, weights in enumerate(theirs.all_weights):
        one = type(theirs)(SIZE if k == 0 else H, H, dtype=F64)
        for key, weight in zip(one._flat_weights_names, weights, strict=True):
            setattr(one, key, weight)
        input = one(input)[0]
        hidden.append(input)
    return torch.stack(hidden)


def test_return_states_gives_every_layer_at_every_step(name: str) -> None:
    theirs, ours = pair(name, SIZE, H, 3, dtype=F64)
    shared = weights_in_common(theirs, ours)
    input = torch.randn(T, B, SIZE, dtype=F64, requires_grad=True)
    states = ours(input, return_states=True)[2]
    assert_equal_with_gradients(states.h, layer_by_layer(theirs, input), [input, *shared])


def test_return_states_is_a_bool(name: str) -> None:
    layer, input = getattr(fastrnn, name)(SIZE, H), torch.randn(T, B, SIZE)
    for wrong in ("a", None, 0):
        with pytest.raises(TypeError, match="return_states must be a bool, got"):
            layer(input, return_states=wrong)
        with pytest.raises(TypeError, match="return_states must be a bool"), torch.no_grad():
            layer(input, return_states=wrong)


@pytest.mark.parametrize("options", STACKS)
def test_states_agree_with_output_and_final_states(name: str, options: dict[str, Any]) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, dtype=F64, **options)
    input, hx = arguments(name, options, with_states=True)
    output, hx_n, states = layer(input, hx, return_states=True)
    layers, directions = layer.num_layers, 2 if layer.bidirectional else 1
    assert states.h.shape == (layers, T, B, directions * H)
    assert (states.c is not None) == (name == "LSTM")
    last = states.h[-1].transpose(0, 1) if layer.batch_first else states.h[-1]
    assert torch.equal(last, output)
    for final, every in zip(tensors(hx_n), tensors(tuple(states)), strict=True):
        by_direction = every.unflatten(-1, (directions, H))
        final = final.unflatten(0, (layers, directions))
        assert torch.equal(by_direction[:, -1, :, 0], final[:, 0])
        if directions == 2:
            assert torch.equal(by_direction[:, 0, :, 1], final[:, 1])


def test_gradient_of_the_cell_state(name: str) -> None:
    if name != "LSTM":
        assert (
            getattr(fastrnn, name)(SIZE, H)(torch.randn(T, B, SIZE), return_states=True)[2].c
            is None
        )
        return
    layer = fastrnn.LSTM(SIZE, H, 2, bidirectional=True, proj_size=2, dtype=F64)
    input = torch.randn(3, 2, SIZE, dtype=F64, requires_grad=True)
    states = layer(input, return_states=True)[2]
    assert states.h.shape == (2, 3, 2, 4)
    assert states.c.shape == (2, 3, 2, 2 * H)
    assert torch.autograd.gradcheck(lambda x: layer(x, return_states=True)[2].c, input)


def test_states_of_one_sequence_and_of_a_packed_batch(name: str) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, 2, dtype=F64)
    sequences = [torch.randn(t, SIZE, dtype=F64) for t in (5, 3, 2)]
    alone = [layer(sequence, return_states=True)[2] for sequence in sequences]
    assert alone[0].h.shape == (2, 5, H)
    packed, _, states = layer(pack_sequence(sequences), return_states=True)
    assert states.h.shape == (2, 10, H)
    assert torch.equal(states.h[-1], packed.data)
    rows = [[sum((3, 3, 2, 1, 1)[:t]) + b for t in range(len(s))] for b, s in enumerate(sequences)]
    for steps, single in zip(rows, alone, strict=True):
        torch.testing.assert_close(states.h[:, steps], single.h, rtol=1e-13, atol=1e-13)


def test_padding_is_zero_in_the_states_too(name: str) -> None:
    layer = getattr(fastrnn, name)(SIZE, H, 2)
    states = layer(torch.randn(T, B, SIZE), lengths=[4, 0, T, 1], return_states=True)[2]
    for every in tensors(tuple(states)):
        assert not every[:, 4:, 0].any()
        assert not every[:, :, 1].any()
        assert every[:, :4, 0].all()
