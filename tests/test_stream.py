"""Streams: step by step the bits of the layer over the whole sequence; int8 close to them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import _C

T, B, I, H = 7, 3, 20, 24  # noqa: E741
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYERS = {
    "lstm": lambda **o: fastrnn.LSTM(I, H, **o),
    "gru": lambda **o: fastrnn.GRU(I, H, **o),
    "gru-before": lambda **o: fastrnn.GRU(I, H, reset_after=False, **o),
    "rnn": lambda **o: fastrnn.RNN(I, H, nonlinearity="relu", **o),
    "lstm-projected": lambda **o: fastrnn.LSTM(I, H, proj_size=7, **o),
    "lstm-activations": lambda **o: fastrnn.LSTM(
        I, H, activation="sigmoid", gate_activation="hardsigmoid", **o
    ),
}


def whole(layer: torch.nn.Module, x: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """The output over the whole sequence, and the final states."""
    with torch.no_grad():
        output, hx_n = layer(x, *arguments, **options)
    return [output, *(hx_n if isinstance(hx_n, tuple) else (hx_n,))]


def states(stream: fastrnn.Stream) -> list[Tensor]:
    state = stream.state
    return list(state) if isinstance(state, tuple) else [state]


def steps(stream: fastrnn.Stream, x: Tensor) -> Tensor:
    return torch.stack([stream.step(x_t).clone() for x_t in x])


def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) * 2 - 1).to(dtype)


# ---- the bits of the layer ----------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"bias": False}], ids=str)
def test_steps_give_the_bits_of_the_sequence(
    name: str, dtype: torch.dtype, rows: int, options: dict[str, Any]
) -> None:
    layer = LAYERS[name](dtype=dtype, **options)
    x = uniform(T, rows, I, dtype=dtype)
    output, *finals = whole(layer, x)
    stream = fastrnn.Stream(layer, rows)
    assert torch.equal(steps(stream, x), output)
    h, *c = states(stream)
    assert torch.equal(h, finals[0])
    for mine, theirs in zip(c, finals[1:], strict=True):
        assert torch.equal(mine.to(dtype), theirs)


OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"layer_norm": True},
    "heads": {"heads": 4},
    "zoneout": {"zoneout": 0.2},
    "everything": {"layer_norm": True, "heads": 2, "zoneout": 0.1, "grad_clip": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_with_options_give_the_bits_of_the_sequence(
    cell: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    own = {"peephole": True, **options} if cell == "LSTM" else options
    layer = getattr(fastrnn, cell)(I, H, num_layers=2, dtype=dtype, **own).eval()
    for rows in (1, B):
        x = uniform(T, rows, I, dtype=dtype)
        output, *finals = whole(layer, x)
        stream = fastrnn.Stream(layer, rows)
        assert torch.equal(steps(stream, x), output)
        h, *c = states(stream)
        assert torch.equal(h, finals[0])
        for mine, theirs in zip(c, finals[1:], strict=True):
            assert torch.equal(mine.to(dtype), theirs)


def test_refresh_takes_the_weights_of_programs_anew() -> None:
    layer = fastrnn.LSTM(I, H, layer_norm=True, peephole=True).eval()
    stream = fastrnn.Stream(layer)
    x = uniform(T, 1, I)
    before = steps(stream, x)
    with torch.no_grad():
        layer.weight_ih_l0.mul_(0.5)
    stream.reset()
    assert torch.equal(steps(stream, x), before)
    stream.refresh()
    stream.reset()
    assert torch.equal(steps(stream, x), whole(layer, x)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_dtype_gives_the_bits_of_the_layer_in_it(cell: str, dtype: torch.dtype) -> None:
    layer = getattr(fastrnn, cell)(I, H, num_layers=2)
    x = uniform(T, B, I, dtype=dtype)
    output, *_ = whole(copy.deepcopy(layer).to(dtype), x)
    assert torch.equal(steps(fastrnn.Stream(layer, B, dtype), x), output)
    by_name = fastrnn.Stream(layer, B, dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(steps(by_name, x), output)


def test_threads_change_no_bit() -> None:
    for layer in (
        fastrnn.LSTM(300, 500, num_layers=2),
        fastrnn.LSTM(300, 500, proj_size=290),
        fastrnn.GRU(300, 500, reset_after=False),
    ):
        x = uniform(4, 2, 300)
        for dtype in (None, "bfloat16", "int8"):
            stream = fastrnn.Stream(layer, 2, dtype)
            given = x.bfloat16() if dtype == "bfloat16" else x
            outputs = []
            for threads in (1, 3, 2):  # the number may change while the stream lives
                torch.set_num_threads(threads)
                stream.reset()
                outputs.append(steps(stream, given))
            assert torch.equal(outputs[0], outputs[1])
            assert torch.equal(outputs[0], outputs[2])


def test_a_layer_in_training_mode_with_dropout_is_inferred() -> None:
    layer = fastrnn.GRU(I, H, num_layers=2, dropout=0.5).train()
    x = uniform(T, B, I)
    stream = fastrnn.Stream(layer, B)
    assert torch.equal(steps(stream, x), whole(layer.eval(), x)[0])
    y = stream.step(x[0].requires_grad_())
    assert not y.requires_grad


# ---- resets and states --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reset_rows_give_the_bits_of_the_layers_reset(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name](dtype=dtype, num_layers=2)
    x = uniform(T, B, I, dtype=dtype)
    reset = torch.rand(T, B) < 0.4
    reset[3] = True
    stream = fastrnn.Stream(layer, B)
    got = []
    for t in range(T):
        mask = reset[t]
        if mask.all():
            stream.reset()
        else:
            ways: list[Any] = [mask, mask.numpy(), mask.tolist(), mask.nonzero()[:, 0]]
            stream.reset(ways[t % 4] if mask.any() else [])
        got.append(stream.step(x[t]).clone())
    assert torch.equal(torch.stack(got), whole(layer, x, reset=reset)[0])


def test_reset_takes_indices_from_the_end_too() -> None:
    layer = fastrnn.RNN(I, H)
    stream = fastrnn.Stream(layer, B)
    stream.step(uniform(B, I))
    before = stream.state
    stream.reset(-1)
    assert torch.equal(stream.state[:, :-1], before[:, :-1])
    assert not stream.state[:, -1].any()
    stream.reset(np.array([0]))
    assert not stream.state[:, 0].any()
    assert stream.state[:, 1].any()


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"], ids=str)
def test_a_restored_state_continues_with_the_same_bits(cell: str, dtype: Any) -> None:
    layer = getattr(fastrnn, cell)(I, H, num_layers=2)
    kind = torch.float32 if dtype == "int8" else dtype
    x = uniform(T, B, I, dtype=kind)
    stream = fastrnn.Stream(layer, B, dtype)
    steps(stream, x[:3])
    kept = stream.state
    expected = steps(stream, x[3:])
    other = fastrnn.Stream(layer, B, dtype)
    other.state = kept
    assert torch.equal(steps(other, x[3:]), expected)
    h, *c = states(stream)
    assert h.shape == (2, B, H)
    assert h.dtype == kind
    for wide in c:
        assert wide.shape == (2, B, H)
        assert wide.dtype == (torch.float64 if kind == torch.float64 else torch.float32)


def test_a_state_is_a_copy() -> None:
    stream = fastrnn.Stream(fastrnn.LSTM(I, H))
    stream.step(uniform(1, I))
    h, c = stream.state
    kept = h.clone(), c.clone()
    stream.step(uniform(1, I))
    assert torch.equal(h, kept[0])
    h.fill_(5)
    c.fill_(5)
    assert not (stream.state[0] == 5).any()


def test_a_state_may_begin_where_a_layer_ended() -> None:
    layer = fastrnn.LSTM(I, H, dtype=torch.bfloat16)
    x = uniform(T, B, I, dtype=torch.bfloat16)
    with torch.no_grad():
        _, hx = layer(x[:4])
        expected, _ = layer(x[4:], hx)
    stream = fastrnn.Stream(layer, B)
    stream.state = hx  # c of the layer's dtype
    assert torch.equal(steps(stream, x[4:]), expected)
    stream.state = tuple(s.transpose(0, 2).contiguous().transpose(0, 2) for s in hx)  # any strides
    assert torch.equal(steps(stream, x[4:]), expected)


def test_a_reset_restores_the_learned_initial_state() -> None:
    layer = fastrnn.LSTM(I, H, num_layers=2)
    layer.h_0 = torch.nn.Parameter(uniform(2, 1, H))
    layer.c_0 = torch.nn.Parameter(uniform(2, 1, H))
    x = uniform(T, B, I)
    hx = tuple(state.detach().expand(2, B, H) for state in (layer.h_0, layer.c_0))
    stream = fastrnn.Stream(layer, B)
    assert torch.equal(steps(stream, x), whole(layer, x, hx)[0])
    stream.reset([1])
    for state, initial in zip(stream.state, hx, strict=True):
        assert torch.equal(state[:, 1], initial[:, 1])
        assert not torch.equal(state[:, 0], initial[:, 0])


# ---- arrays in and out --------------------------------------------------------------------------


def test_a_step_returns_the_kind_of_array_it_was_given() -> None:
    layer = fastrnn.GRU(I, H)
    x = uniform(B, I)
    expected = whole(layer, x[None])[0][0]
    stream = fastrnn.Stream(layer, B)
    given = [x, x.numpy(), _C.from_dlpack(x.numpy()), torch.nn.Parameter(x)]
    kinds = [Tensor, np.ndarray, fastrnn.Tensor, Tensor]
    for x_t, kind in zip(given, kinds, strict=True):
        stream.reset()
        y = stream.step(x_t)
        assert type(y) is kind
        assert np.array_equal(np.asarray(y), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_numpy_gives_the_bits_of_torch(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        name = pytest.importorskip("ml_dtypes").bfloat16
    layer = fastrnn.LSTM(I, H, dtype=dtype)
    x = uniform(T, B, I, dtype=dtype)
    expected = steps(fastrnn.Stream(layer, B), x)
    stream = fastrnn.Stream(layer, B)
    for x_t, y_t in zip(x, expected, strict=True):
        y = stream.step(x_t.double().numpy().astype(name))
        assert y.dtype == name
        assert np.array_equal(y.astype(np.float64), y_t.double().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_x_may_have_any_strides(dtype: str) -> None:
    layer = fastrnn.GRU(I, H)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    x = uniform(B, I, dtype=kind)
    stream = fastrnn.Stream(layer, B, dtype)
    expected = stream.step(x).clone()
    wide = uniform(2 * B, 3 * I, dtype=kind)
    wide[::2, ::3] = x
    strided = [x.T.contiguous().T, wide[::2, ::3], x[:1].expand(B, I), x[:, :1].expand(B, I)]
    for x_t in strided:
        stream.reset()
        got = stream.step(x_t).clone()
        stream.reset()
        assert torch.equal(got, stream.step(x_t.contiguous()))
    stream.reset()
    assert torch.equal(stream.step(strided[0]), expected)
    if kind == torch.float32:
        stream.reset()
        backwards = x.numpy()[::-1, ::-1].copy()[::-1, ::-1]  # negative strides
        assert np.array_equal(stream.step(backwards), expected.numpy())


def test_the_output_may_be_the_next_input() -> None:
    layer = fastrnn.GRU(H, H)
    with torch.no_grad():
        y = x = uniform(B, H)
        hx = None
        for _ in range(T):
            y, hx = layer(y[None], hx)
            y = y[0]
    stream = fastrnn.Stream(layer, B)
    fed = stream.step(x)
    for _ in range(T - 1):
        fed = stream.step(fed)
    assert torch.equal(fed, y)


def test_a_pending_negation_is_seen() -> None:
    x = torch.complex(uniform(B, I), uniform(B, I)).conj().imag
    assert x.is_neg()
    layer = fastrnn.RNN(I, H)
    got = fastrnn.Stream(layer, B).step(x).clone()
    assert torch.equal(got, fastrnn.Stream(layer, B).step(x.resolve_neg()))


def test_a_pending_negation_of_weights_and_states_is_seen(cell: str) -> None:
    layer = getattr(fastrnn, cell)(I, H)
    x = uniform(2, B, I)
    stream = fastrnn.Stream(layer, B)
    stream.step(x[0])
    state = stream.state
    negated = tuple(torch._neg_view(-part) for part in states(stream))
    expected = stream.step(x[1]).clone()
    stream.state = negated if cell == "LSTM" else negated[0]
    assert torch.equal(stream.step(x[1]), expected)
    for name, weight in list(layer.named_parameters()):
        setattr(layer, name, torch.nn.Parameter(torch._neg_view(-weight.detach())))
    stream.refresh()
    stream.state = state
    assert torch.equal(stream.step(x[1]), expected)


def test_an_output_made_in_inference_mode_can_be_used_with_a_gradient() -> None:
    layer, head = fastrnn.RNN(I, H), torch.nn.Linear(H, 2)
    stream = fastrnn.Stream(layer)
    with torch.inference_mode():
        stream.step(uniform(1, I))
    head(stream.step(uniform(1, I)).clone()).sum().backward()
    assert head.weight.grad is not None


# ---- nothing is allocated -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_step_allocates_nothing(dtype: str) -> None:
    layer = fastrnn.LSTM(I, H, num_layers=2)
    x: Any = uniform(B, I, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    given = [x] if dtype == "bfloat16" else [x, x.numpy()]
    stream = fastrnn.Stream(layer, B, dtype)
    for x_t in given:
        first = stream.step(x_t)
        address = np.asarray(first.view(torch.uint8) if x_t is x else first).ctypes.data
        tracemalloc.start()
        gc.disable()
        grown = []
        for _ in range(3):  # another thread of the test's process may allocate, too
            for _ in range(3):
                stream.step(x_t)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for _ in range(1000):
                y = stream.step(x_t)
            after, peak = tracemalloc.get_traced_memory()
            grown.append((after - before, peak - before))
        gc.enable()
        tracemalloc.stop()
        assert y is first
        assert np.asarray(y.view(torch.uint8) if x_t is x else y).ctypes.data == address
        assert min(after for after, _ in grown) < 200  # the loop's own number
        assert min(peak for _, peak in grown) < 400


def test_memory_does_not_grow() -> None:
    if sys.platform != "linux":
        pytest.skip("what is resident is counted in another unit here")
    import resource

    stream = fastrnn.Stream(fastrnn.LSTM(64, 64))
    x = uniform(1, 64)

    def resident() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    for _ in range(2000):
        stream.step(x)
    before = resident()
    for _ in range(20000):
        stream.step(x)
    assert resident() - before <= 128  # KiB; a leak of 64 bytes a step would be 1250


# ---- the weights are packed once ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_weights_are_taken_when_the_stream_is_made_and_when_refreshed(dtype: Any) -> None:
    layer = fastrnn.LSTM(I, H, proj_size=5)
    x = uniform(B, I, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    stream = fastrnn.Stream(layer, B, dtype)
    before = stream.step(x).clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    stream.reset()
    assert torch.equal(stream.step(x), before)
    kept = stream.state
    stream.refresh()
    for mine, theirs in zip(stream.state, kept, strict=True):
        assert torch.equal(mine, theirs)
    stream.reset()
    assert torch.equal(stream.step(x), fastrnn.Stream(layer, B, dtype).step(x))
    assert not torch.equal(stream.step(x), before)


def test_a_stream_outlives_its_layers_weights() -> None:
    layer = fastrnn.GRU(I, H)
    x = uniform(T, B, I)
    expected = whole(layer, x)[0]
    stream = fastrnn.Stream(layer, B)
    for name in layer._flat_weights_names:
        setattr(layer, name, None)
    gc.collect()
    assert torch.equal(steps(stream, x), expected)


def test_refresh_refuses_weights_of_other_shapes_and_none() -> None:
    layer = fastrnn.GRU(I, H)
    stream = fastrnn.Stream(layer)
    x = uniform(1, I)
    y = stream.step(x).clone()
    layer.weight_ih_l0 = torch.nn.Parameter(torch.zeros(3 * H, I + 1))
    with pytest.raises(ValueError, match=r"weight_ih_l0\): expected shape \(72, 20\)"):
        stream.refresh()
    layer.weight_ih_l0 = None
    with pytest.raises(TypeError, match="weight_ih_l0 must be a Tensor, got None"):
        stream.refresh()
    stream.reset()
    assert torch.equal(stream.step(x), y)


# ---- int8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("layers", [1, 2])
def test_int8_is_close_to_float32(name: str, rows: int, layers: int) -> None:
    layer = LAYERS[name](num_layers=layers)
    x = uniform(30, rows, I)
    output = whole(layer, x)[0]
    got = steps(fastrnn.Stream(layer, rows, torch.int8), x)
    assert got.dtype == torch.float32
    error = (got - output).abs().max() / output.abs().max()
    assert 0 < error < 0.03


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row as integers within ±127, and its scale."""
    x = x.astype(np.float32)
    most = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, where=most > 0, out=np.zeros_like(most))
    return np.rint(x * inverse).astype(np.int64), (most / np.float32(127)).astype(np.float64)


def int8_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    (q_x, s_x), (q_w, s_w) = quantised(x), quantised(weight)
    return (q_x @ q_w.T) * s_x * s_w.T


@pytest.mark.parametrize("units", [1, 5, 16, 33, 100])
def test_int8_is_what_its_formula_says(cell: str, units: int) -> None:
    """One step from a state, in NumPy: rounding of the float part is all that is left."""
    layer = getattr(fastrnn, cell)(I, units)
    stream = fastrnn.Stream(layer, B, "int8")
    x, h, c = uniform(B, I), uniform(1, B, units), uniform(1, B, units)
    stream.state = (h, c) if cell == "LSTM" else h
    got = stream.step(x).numpy()
    w_ih, w_hh, b_ih, b_hh = (w.detach().numpy() for w in layer.parameters())
    a_x = int8_product(x.numpy(), w_ih) + b_ih
    a_h = int8_product(h[0].numpy(), w_hh) + b_hh

    def sigmoid(a: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-a))

    if cell == "RNN":
        expected = np.tanh(a_x + a_h)
    elif cell == "LSTM":
        i, f, g, o = np.split(a_x + a_h, 4, axis=1)
        c_n = sigmoid(f) * c[0].numpy() + sigmoid(i) * np.tanh(g)
        expected = sigmoid(o) * np.tanh(c_n)
    else:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(a_x, 3, axis=1), np.split(a_h, 3, axis=1)
        z = sigmoid(z_x + z_h)
        n = np.tanh(n_x + sigmoid(r_x + r_h) * n_h)
        expected = (1 - z) * n + z * h[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


ISA_PROGRAM = """
    import sys
    import numpy as np
    import fastrnn
    rng = np.random.default_rng(0)
    found = []
    for cell, gates, more in (
        ("RNN", 1, {}), ("LSTM", 4, {}), ("LSTM", 4, {"proj_size": 37}),
        ("GRU", 3, {}), ("GRU", 3, {"reset_after": False}),
    ):
        n, out = 70, more.get("proj_size", 70)
        shapes = [(gates * n, 45), (gates * n, out), gates * n, gates * n]
        shapes += [(out, n)] if out < n else []
        weights = [rng.uniform(-0.12, 0.12, shape).astype(np.float32) for shape in shapes]
        stream = fastrnn.Stream.from_weights(cell, weights, batch_size=2, dtype="int8", **more)
        for _ in range(20):
            found.append(stream.step(rng.standard_normal((2, 45)).astype(np.float32)).copy())
    np.save(sys.argv[1], np.concatenate([y.ravel() for y in found]))
"""


def test_int8_is_the_same_on_every_instruction_set(tmp_path: Any) -> None:
    """The same bits where the set fuses multiply-adds, as all but the portable one do."""
    results = {}
    for isa in _C.isas():
        path = tmp_path / f"{isa}.npy"
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(ISA_PROGRAM), path],
            env={**os.environ, "FASTRNN_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results[isa] = np.load(path)
    portable = results.pop("portable")
    for isa, found in results.items():
        assert np.array_equal(found, next(iter(results.values()))), isa
        # A value that lies between two integers may be rounded to the other one.
        np.testing.assert_allclose(found, portable, atol=5e-3)


def test_int8_is_independent_of_the_rows_beside() -> None:
    layer = fastrnn.GRU(I, H, num_layers=2)
    x = uniform(T, 9, I)
    together = steps(fastrnn.Stream(layer, 9, "int8"), x)
    alone = steps(fastrnn.Stream(layer, 1, "int8"), x[:, 4:5])
    assert torch.equal(together[:, 4:5], alone)


def test_int8_rows_restart_after_a_reset() -> None:
    layer = fastrnn.LSTM(I, H, num_layers=2)
    x = uniform(T, B, I)
    stream = fastrnn.Stream(layer, B, "int8")
    steps(stream, x[:4])
    stream.reset([1])
    got = steps(stream, x[4:])
    fresh = steps(fastrnn.Stream(layer, B, "int8"), x[4:])
    assert torch.equal(got[:, 1], fresh[:, 1])
    assert not torch.equal(got[:, 0], fresh[:, 0])


def test_int8_zero_and_no_numbers() -> None:
    layer = fastrnn.LSTM(I, H)
    with torch.no_grad():
        layer.weight_ih_l0[3].zero_()
        layer.weight_hh_l0.zero_()
    stream = fastrnn.Stream(layer, B, "int8")
    x = uniform(B, I)
    x[0] = 0
    x[1, 4] = float("nan")
    x[2, 5] = float("inf")
    y = stream.step(x).clone()
    with torch.no_grad():
        expected = layer(torch.zeros(1, 1, I))[0][0, 0]
    torch.testing.assert_close(y[0], expected)
    assert y[1:].isnan().all()


def test_int8_says_which_option_it_lacks() -> None:
    fastrnn.Stream(fastrnn.LSTM(I, H, grad_clip=1.0), dtype="int8")  # of the gradient alone
    for option, value in {"peephole": True, "layer_norm": True, "heads": 2}.items():
        layer = fastrnn.LSTM(I, H, **{option: value})
        with pytest.raises(ValueError, match=f"dtype: int8 does not support {option}={value}"):
            fastrnn.Stream(layer, dtype="int8")


# ---- without torch ------------------------------------------------------------------------------


def test_a_stream_of_weights_equals_that_of_the_layer(cell: str) -> None:
    options: dict[str, Any] = {"RNN": {"nonlinearity": "sigmoid"}, "LSTM": {"proj_size": 5}}.get(
        cell, {"reset_after": False}
    )
    layer = getattr(fastrnn, cell)(I, H, num_layers=2, **options)
    x = uniform(T, B, I)
    weights = [w.detach().numpy() for w in layer.parameters()]
    for dtype in ("float32", "float64", "int8"):
        given = x.double() if dtype == "float64" else x
        expected = steps(fastrnn.Stream(layer, B, dtype), given)
        stream = fastrnn.Stream.from_weights(
            cell, weights, num_layers=2, batch_size=B, dtype=dtype, **options
        )
        for x_t, y_t in zip(given.numpy(), expected.numpy(), strict=True):
            assert np.array_equal(stream.step(x_t), y_t)
        assert all(isinstance(state, np.ndarray) for state in states(stream))


def test_a_stream_of_weights_takes_the_options_of_the_functions() -> None:
    weights = [uniform(4 * H, size).numpy() for size in (I, H)]
    x = uniform(T, 1, I).numpy()
    options: dict[str, Any] = {"bias": False, "zoneout": (0.2, 0.1), "grad_clip": None}
    expected, _ = fastrnn.functional.lstm(x, None, weights, **options)
    stream = fastrnn.Stream.from_weights("LSTM", weights, **options)
    for x_t, y_t in zip(x, expected.numpy(), strict=True):
        assert np.array_equal(stream.step(x_t), y_t)


# ---- copies, threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_a_copy_continues_independently(cell: str, dtype: Any) -> None:
    layer = getattr(fastrnn, cell)(I, H)
    x = uniform(T, B, I, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    stream = fastrnn.Stream(layer, B, dtype)
    steps(stream, x[:3])
    copies = [copy.deepcopy(stream), copy.copy(stream), pickle.loads(pickle.dumps(stream))]
    expected = steps(stream, x[3:])
    for other in copies:
        assert repr(other) == repr(stream)
        assert torch.equal(steps(other, x[3:]), expected)


def test_streams_of_one_layer_in_many_threads() -> None:
    layer = fastrnn.LSTM(64, 160)
    x = uniform(40, 8, 64)
    expected = whole(layer, x)[0]
    failed: list[int] = []

    def run(row: int) -> None:
        stream = fastrnn.Stream(layer)
        got = steps(stream, x[:, row : row + 1])
        if not torch.equal(got, expected[:, row : row + 1]):
            failed.append(row)

    threads = [threading.Thread(target=run, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_one_stream_in_two_threads_at_once_is_an_error_not_a_race() -> None:
    layer = fastrnn.LSTM(512, 1024)
    stream = fastrnn.Stream(layer, 16)
    x = uniform(16, 512)
    start = threading.Barrier(2)
    errors: list[str] = []
    answers: list[int] = []

    def step() -> None:
        start.wait()
        try:
            stream.step(x)
        except RuntimeError as error:
            errors.append(str(error))
        else:
            answers.append(1)

    for _ in range(1000):  # one thread may finish before the other begins; it rarely does
        threads = [threading.Thread(target=step) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            break
    assert answers
    assert "use one stream for each thread" in errors[0]


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(B, I + 1), ValueError, r"x: expected shape \(3, 20\), got shape \(3, 21\)"),
        (torch.zeros(1, B, I), ValueError, r"x: expected shape \(3, 20\), got shape \(1, 3, 20\)"),
        (torch.zeros(I), ValueError, r"x: expected shape \(3, 20\), got shape \(20,\)"),
        (np.zeros((B + 1, I), np.float32), ValueError, r"x: expected shape \(3, 20\)"),
        (torch.zeros(B, I).double(), TypeError, "x: expected dtype float32, got float64"),
        (np.zeros((B, I)), TypeError, "x: expected dtype float32, got float64"),
        (np.zeros((B, I), ">f4"), TypeError, "x"),
        ([[0.0] * I] * B, TypeError, "x: expected an array"),
        (None, TypeError, "x: expected an array"),
        (torch.zeros(B, I, device="meta"), (TypeError, ValueError), "x: "),
    ],
)
def test_x_that_does_not_fit_is_named(dtype: str, x: Any, error: Any, message: str) -> None:
    stream = fastrnn.Stream(fastrnn.GRU(I, H), B, dtype)
    before = stream.state
    with pytest.raises(error, match=message):
        stream.step(x)
    assert torch.equal(stream.state, before)
    stream.step(torch.zeros(B, I))


def test_under_vmap_a_step_is_refused() -> None:
    stream = fastrnn.Stream(fastrnn.GRU(I, H), B)
    with pytest.raises(TypeError, match="x: the array cannot be read"):
        torch.func.vmap(stream.step)(torch.zeros(2, B, I))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: fastrnn.Stream(torch.nn.LSTM(2, 3)),
            TypeError,
            "fastrnn.convert makes one from it",
        ),
        (lambda: fastrnn.Stream(fastrnn.LSTMCell(2, 3)), TypeError, "layer must be"),
        (
            lambda: fastrnn.Stream(fastrnn.LSTM(2, 3, bidirectional=True)),
            ValueError,
            "bidirectional",
        ),
        (lambda: fastrnn.Stream(fastrnn.LSTM(2, 3), 0), ValueError, "batch_size must be at least"),
        (lambda: fastrnn.Stream(fastrnn.LSTM(2, 3), 1.0), TypeError, "batch_size must be an int"),
        (lambda: fastrnn.Stream(fastrnn.LSTM(2, 3), True), TypeError, "batch_size must be an int"),
        (lambda: fastrnn.Stream(fastrnn.LSTM(2, 3), 1, torch.int16), ValueError, "dtype must be"),
        (lambda: fastrnn.Stream(fastrnn.LSTM(2, 3), 1, "int4"), ValueError, "got 'int4'"),
        (lambda: fastrnn.Stream(fastrnn.LSTM(2, 3), 1, 7), TypeError, "dtype must be a dtype"),
        (
            lambda: fastrnn.Stream(fastrnn.LSTM(2, 3, dtype=torch.complex64)),
            ValueError,
            "got 'complex64'",
        ),
        (
            lambda: fastrnn.Stream(fastrnn.LSTM(2, 3, device="meta")),
            ValueError,
            "layer must be on the CPU",
        ),
        (lambda: fastrnn.Stream.from_weights("MGU", []), ValueError, "cell must be one of"),
        (lambda: fastrnn.Stream.from_weights("GRU", []), ValueError, "weights must hold 4 arrays"),
        (lambda: fastrnn.Stream.from_weights("GRU", 3), TypeError, "weights must be a list"),
        (
            lambda: fastrnn.Stream.from_weights("GRU", [1, 2, 3, 4]),
            TypeError,
            "weight_ih_l0 must be an array",
        ),
        (
            lambda: fastrnn.Stream.from_weights("GRU", [], colour="red"),
            TypeError,
            "no option 'colour'",
        ),
        (
            lambda: fastrnn.Stream.from_weights("GRU", [], bidirectional=True),
            ValueError,
            "bidirectional must be False",
        ),
        (
            lambda: fastrnn.Stream.from_weights("GRU", [], num_layers="1"),  # type: ignore[arg-type]
            TypeError,
            "num_layers must be an int, got str",
        ),
        (
            lambda: fastrnn.Stream.from_weights("GRU", [], reset_after=None),
            TypeError,
            "reset_after must be a bool, got NoneType",
        ),
        (
            lambda: fastrnn.Stream.from_weights(
                "GRU", [np.zeros((6, 3)), np.zeros((6, 3))], bias=False
            ),
            ValueError,
            r"weight_hh_l0\): expected shape \(6, 2\)",
        ),
        (
            lambda: fastrnn.Stream.from_weights(
                "RNN", [np.zeros((1, 2**17 + 1)), np.zeros((1, 1))], bias=False, dtype="int8"
            ),
            ValueError,
            "at most 131072 columns",
        ),
    ],
)
def test_what_makes_no_stream_is_named(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([True, False], ValueError, r"rows must have shape \(3,\), got \(2,\)"),
        ([3], IndexError, "there is no row 3 of 3"),
        (-4, IndexError, "there is no row -4"),
        ([0.5], TypeError, "rows must be bools or integers"),
        ("all", TypeError, "rows must be bools or integers"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows: Any, error: Any, message: str) -> None:
    stream = fastrnn.Stream(fastrnn.RNN(I, H), B)
    with pytest.raises(error, match=message):
        stream.reset(rows)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(1, B, H), TypeError, r"state must be two arrays, \(h, c\)"),
        ((torch.zeros(1, B, H),) * 3, TypeError, "3 of them"),
        ((torch.zeros(1, B, H), torch.zeros(1, B, H + 1)), ValueError, r"state\[1\]: expected"),
        ((torch.zeros(B, H), torch.zeros(1, B, H)), ValueError, r"state\[0\]: expected shape"),
        ((torch.zeros(1, B, H).double(), torch.zeros(1, B, H)), TypeError, r"state\[0\]: expected"),
        ((torch.zeros(1, B, H), None), TypeError, r"state\[1\]"),
    ],
)
def test_a_state_that_does_not_fit_is_named(state: Any, error: Any, message: str) -> None:
    stream = fastrnn.Stream(fastrnn.LSTM(I, H), B)
    stream.step(uniform(B, I))
    before = stream.state
    with pytest.raises(error, match=message):
        stream.state = state
    for mine, theirs in zip(stream.state, before, strict=True):
        assert torch.equal(mine, theirs)


def test_on_a_cuda_device_both_layer_and_x_are_refused(cuda: torch.device) -> None:
    layer = fastrnn.GRU(I, H)
    with pytest.raises(ValueError, match="x: expected host memory"):
        fastrnn.Stream(layer, B).step(uniform(B, I).to(cuda))
    with pytest.raises(ValueError, match="layer must be on the CPU"):
        fastrnn.Stream(layer.to(cuda), B)
