"""Arguments that torch.nn leaves to chance: each is an error that names it, before any work."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional
from pairs import LAYERS

# ---- PackedSequence -----------------------------------------------------------------------------

DATA = torch.arange(18.0).reshape(6, 3)

BATCH_SIZES = {
    "negative": [-1, 4, 3],
    "zero": [3, 3, 0],
    "none": [],
    "increasing": [1, 2, 3],
    "too few": [3, 2],
    "too many": [3, 2, 2],
    "one step": [2**40],
    "overflow": [2**62] * 4 + [6],
    "of many steps": [1] * 7,
}


def tampered(**parts: Any) -> PackedSequence:
    """A packed batch of 3 sequences with other parts, past the constructor's checks."""
    packed = pack_padded_sequence(
        torch.ones(3, 3, 3), torch.tensor([1, 3, 2]), enforce_sorted=False
    )
    fields = packed._asdict() | {"data": DATA} | parts
    return tuple.__new__(PackedSequence, fields.values())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sizes", BATCH_SIZES.values(), ids=BATCH_SIZES.keys())
def test_batch_sizes_that_cannot_be(cell: str, sizes: list[int], grad: bool) -> None:
    layer = getattr(fastrnn, cell)(3, 4).requires_grad_(grad)
    packed = tampered(batch_sizes=torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"^batch_sizes of a PackedSequence must be"):
        layer(packed)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (torch.tensor([3, 2, 1], dtype=torch.int32), RuntimeError, "must be int64 .*int32"),
        (torch.tensor([3.0, 2.0, 1.0]), RuntimeError, "must be int64 .*float32"),
        (torch.tensor([[3, 2, 1]]), RuntimeError, r"must be int64 \(T,\) .* shape \(1, 3\)"),
        (torch.tensor([3, 2, 1], device="meta"), RuntimeError, "must be on the CPU, got meta"),
        (torch.tensor([1]).expand(2**45), RuntimeError, "must be at least 1"),
        ([3, 2, 1], TypeError, "must be a Tensor, got list"),
        (None, TypeError, "must be a Tensor, got NoneType"),
    ],
)
def test_batch_sizes_of_another_kind(sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^batch_sizes .*{message}"):
        fastrnn.GRU(3, 4)(tampered(batch_sizes=sizes))


def test_batch_sizes_with_strides_are_as_good_as_contiguous_ones(cell: str) -> None:
    layer = getattr(fastrnn, cell)(3, 4)
    spread = torch.tensor([3, 0, 2, 0, 1, 0])[::2]
    found = layer(tampered(batch_sizes=spread))[0]
    assert torch.equal(found.data, layer(tampered())[0].data)


@pytest.mark.parametrize("which", ["sorted_indices", "unsorted_indices"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 1, 3]), "between 0 and 2, got 3"),
        (torch.tensor([0, -1, 2]), "between 0 and 2, got -1"),
        (torch.tensor([0, 1]), r"integers of shape \(3,\), got torch.int64 of shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"integers of shape \(3,\), got torch.float32"),
        (torch.tensor([0, 1, 2], device="meta"), "on the device of its data, cpu, got meta"),
        ([0, 1, 2], "a Tensor, got list"),
    ],
)
def test_indices_that_are_no_order_of_the_rows(which: str, indices: Any, message: str) -> None:
    packed = tampered(**{which: indices})
    with pytest.raises((RuntimeError, TypeError), match=f"^{which} .*{message}"):
        fastrnn.LSTM(3, 4)(packed)


@pytest.mark.parametrize("data", [torch.ones(6), torch.ones(2, 3, 3), torch.tensor(1.0), [[1.0]]])
def test_packed_data_that_are_no_rows(data: Any) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"^input must "):
        fastrnn.RNN(3, 4)(tampered(data=data))


ROUTES = {"real": torch.float32, "composed": torch.complex64}


@pytest.mark.parametrize("dtype", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("sizes", BATCH_SIZES.values(), ids=BATCH_SIZES.keys())
def test_every_route_checks_batch_sizes_before_it_asks_for_memory(
    sizes: list[int], dtype: torch.dtype
) -> None:
    from fastrnn._options import Options

    layer = fastrnn.GRU(3, 4, dtype=dtype).requires_grad_(False)
    weights = list(layer.parameters())
    batch_sizes = torch.tensor(sizes, dtype=torch.int64)
    with pytest.raises((RuntimeError, ValueError), match=r"^batch_sizes"):
        functional.recurrent(Options("GRU"), DATA.to(dtype), None, weights, batch_sizes=batch_sizes)


# ---- what is no tensor, or none with strides ----------------------------------------------------

NO_TENSORS = {
    "a list": ([[1.0]], "list"),
    "None": (None, "NoneType"),
    "an array of NumPy": (np.ones((2, 1, 3), np.float32), "ndarray"),
    "a number": (3.0, "float"),
    "sparse": (torch.ones(2, 1, 3).to_sparse(), "layout torch.sparse_coo"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("value", "given"), NO_TENSORS.values(), ids=NO_TENSORS.keys())
def test_an_input_that_is_no_dense_tensor(cell: str, value: Any, given: str) -> None:
    for kind in (cell, f"{cell}Cell"):
        with pytest.raises(TypeError, match=rf"^input must be a (dense )?Tensor, got .*{given}"):
            getattr(fastrnn, kind)(3, 4)(value)


@pytest.mark.parametrize(("value", "given"), NO_TENSORS.values(), ids=NO_TENSORS.keys())
def test_states_that_are_no_dense_tensors(cell: str, value: Any, given: str) -> None:
    if value is None:
        pytest.skip("hx may be None")
    hx = (value, value) if cell == "LSTM" else value
    name = r"hx\[0\]" if cell == "LSTM" else "hx"
    for kind, x in ((cell, torch.ones(2, 1, 3)), (f"{cell}Cell", torch.ones(1, 3))):
        with pytest.raises(TypeError, match=rf"^{name} must be a (dense )?Tensor, got .*{given}"):
            getattr(fastrnn, kind)(3, 4)(x, hx)


@pytest.mark.parametrize("hx", [(), (torch.zeros(1, 1, 4),), 3.0, {}, "text", torch.zeros(1, 1, 4)])
def test_states_of_an_lstm_that_are_no_pair(hx: Any) -> None:
    with pytest.raises((TypeError, RuntimeError), match=r"two (hidden states|tensors)"):
        fastrnn.LSTM(3, 4)(torch.ones(2, 1, 3), hx)
    with pytest.raises((TypeError, RuntimeError), match=r"two (hidden states|tensors)"):
        fastrnn.LSTMCell(3, 4)(torch.ones(3), hx)


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_replaced_by_no_tensor(name: str) -> None:
    layer = getattr(fastrnn, name)(3, 4)
    del layer.weight_hh_l0
    layer.weight_hh_l0 = [1.0]
    with pytest.raises(TypeError, match=r"^weight_hh_l0 must be a Tensor, got list"):
        layer(torch.ones(2, 1, 3))


def test_lengths_with_a_negation_pending_are_read_as_they_are(cell: str) -> None:
    layer, x, lengths = getattr(fastrnn, cell)(3, 4), torch.randn(5, 2, 3), torch.tensor([2, 5])
    negated = torch._neg_view(-lengths)
    assert torch.equal(layer(x, lengths=negated)[0], layer(x, lengths=lengths)[0])


# ---- sizes --------------------------------------------------------------------------------------

SIZES = [2**63, -(2**63), 2**70, 1.5, "3", None, [3], torch.float32]


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers", "proj_size"])
def test_sizes_of_layers_that_cannot_be(name: str, size: Any) -> None:
    given = {"input_size": 3, "hidden_size": 4, name: size}
    with pytest.raises((TypeError, ValueError), match=rf"^{name} "):
        fastrnn.LSTM(**given)


@pytest.mark.parametrize("one", [True, np.int64(1)], ids=repr)
def test_what_converts_to_an_int_is_accepted_as_one(cell: str, one: Any) -> None:
    torch.manual_seed(0)
    layer, x = getattr(fastrnn, cell)(3, 4, one), torch.randn(5, 2, 3)
    torch.manual_seed(0)
    assert torch.equal(layer(x)[0], getattr(fastrnn, cell)(3, 4, 1)(x)[0])
    function, weights = getattr(functional, cell.lower()), list(layer.parameters())
    assert torch.equal(function(x, None, weights, num_layers=one)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("option", ["peephole", "layer_norm", "learn_initial_state"])
def test_a_bool_stands_for_a_size_of_one(kind: str, option: str) -> None:
    modules = []
    for one in (True, 1):
        torch.manual_seed(0)
        modules.append(getattr(fastrnn, kind)(3, one, **{option: True}))
    x = torch.randn((5, 2, 3) if kind == "LSTM" else (2, 3))
    first, second = (module(x)[0] for module in modules)
    assert torch.equal(first, second)


def test_a_nonlinearity_that_cannot_be_hashed() -> None:
    with pytest.raises(ValueError, match=r"nonlinearity"):
        fastrnn.RNN(3, 4, nonlinearity=["tanh"])


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_a_large_int_as_forget_bias(kind: str) -> None:
    module = getattr(fastrnn, kind)(3, 4, forget_bias=2**70)
    bias = next(p for name, p in module.named_parameters() if name.startswith("bias_ih"))
    assert torch.equal(bias[4:8], torch.full((4,), 2.0**70))
    with pytest.raises(ValueError, match=r"^forget_bias must be None or a finite number"):
        getattr(fastrnn, kind)(3, 4, forget_bias=10**400)


@pytest.mark.parametrize("number", [2**16 + 1, 2**63, 2**70])
def test_more_layers_than_can_be_named(number: int) -> None:
    with pytest.raises(ValueError, match=r"^num_layers must be "):
        fastrnn.LSTM(3, 4, number)
    with pytest.raises(ValueError, match=r"^num_layers must be at most 65536, got "):
        functional.rnn(np.ones((1, 1, 1)), None, [], num_layers=number)


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize("name", ["input_size", "hidden_size"])
def test_sizes_of_cells_that_cannot_be(cell: str, name: str, size: Any) -> None:
    given = {"input_size": 3, "hidden_size": 4, name: size}
    with pytest.raises((TypeError, ValueError), match=rf"^{name} "):
        getattr(fastrnn, f"{cell}Cell")(**given)


@pytest.mark.parametrize("size", [2**63, 2**31, 0, -1, True, 1.0, "1", None, np.float32(1)])
def test_a_stream_s_batch_size_that_cannot_be(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^batch_size must be"):
        fastrnn.Stream(fastrnn.LSTM(3, 4), size)


def test_a_stream_without_enough_memory_says_how_much_it_takes() -> None:
    with pytest.raises(MemoryError, match=r"^out of memory: \d+ bytes cannot be allocated$"):
        fastrnn.Stream(fastrnn.LSTM(64, 512), 2**31 - 1)


def test_functions_without_enough_memory_say_how_much_they_take() -> None:
    x = np.broadcast_to(np.ones((1, 1, 1), np.float32), (2**45, 1, 1))
    weights = [np.ones((4, 1), np.float32), np.ones((4, 4), np.float32)]
    with pytest.raises(MemoryError, match=re.escape(f"out of memory: {2**45 * 16} bytes")):
        functional.rnn(x, None, weights, bias=False)


# ---- tensors of inference mode ------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_return_saved_takes_tensors_of_inference_mode(inside: bool) -> None:
    def given() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        return torch.randn(4, 2, 3), [torch.randn(s) / 2 for s in ((8, 3), (8, 2), (8,), (8,))]

    def run(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        output, (h_n, c_n), saved = functional.lstm(x, None, weights, return_saved=True)
        d_input, _, d_weights = functional.lstm_backward(torch.ones_like(output), None, saved)
        return [output, h_n, c_n, d_input, *d_weights]

    expected = run(*given())
    with torch.inference_mode():
        tensors = given()
        found = run(*tensors) if inside else []
    if not inside:
        found = run(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_tensors_of_inference_mode_beside_a_gradient_are_torch_s_error(cell: str) -> None:
    with torch.inference_mode():
        x = torch.ones(2, 1, 3)
    for library in (fastrnn, torch.nn):
        with pytest.raises(RuntimeError, match=r"^Inference tensors cannot be saved for backward"):
            getattr(library, cell)(3, 4)(x)
