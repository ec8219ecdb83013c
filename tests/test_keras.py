"""`from_keras`: Keras's weights give Keras's numbers, by its formulas and by Keras itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import fastrnn

if TYPE_CHECKING:
    from pathlib import Path

I, H, T, B = 3, 4, 5, 2  # noqa: E741
GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
OPTIONS = {  # of each cell: every way that Keras's arguments may stand
    "LSTM": [{}, {"use_bias": False}],
    "GRU": [
        {"reset_after": reset_after, "use_bias": use_bias}
        for reset_after in (True, False)
        for use_bias in (True, False)
    ],
    "SimpleRNN": [{}, {"use_bias": False}],
}
CASES = [(cell, options) for cell, each in OPTIONS.items() for options in each]
every_cell = pytest.mark.parametrize("cell", GATES)
every_case = pytest.mark.parametrize(
    ("cell", "options"), CASES, ids=[f"{cell}{options or ''}" for cell, options in CASES]
)

ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_sigmoid of Keras 2": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
}


def keras_weights(
    cell: str, *, width: int = I, use_bias: bool = True, reset_after: bool = True
) -> list[np.ndarray]:
    """kernel, recurrent_kernel and bias in the shapes of ``layer.get_weights()``."""
    shapes: list[tuple[int, ...]] = [(width, GATES[cell] * H), (H, GATES[cell] * H)]
    if use_bias:
        two = cell == "GRU" and reset_after
        shapes.append((2, GATES[cell] * H) if two else (GATES[cell] * H,))
    return [np.random.standard_normal(shape) * 0.5 for shape in shapes]


def keras_step(
    cell: str,
    x: np.ndarray,
    state: tuple[np.ndarray, ...],
    weights: list[np.ndarray],
    **options: Any,
) -> tuple[np.ndarray, ...]:
    """One step as keras/src/layers/rnn/{lstm,gru,simple_rnn}.py have it, of h and, LSTM, c."""
    kernel, recurrent_kernel = weights[:2]
    bias = weights[2] if len(weights) == 3 else np.zeros(kernel.shape[1])
    act = ACTIVATIONS[options.get("activation", "tanh")]
    gate = ACTIVATIONS[options.get("recurrent_activation", "sigmoid")]
    h = state[0]
    if cell == "SimpleRNN":
        return (act(x @ kernel + bias + h @ recurrent_kernel),)
    if cell == "LSTM":
        z = x @ kernel + h @ recurrent_kernel + bias
        z_i, z_f, z_c, z_o = np.split(z, 4, axis=1)
        c = gate(z_f) * state[1] + gate(z_i) * act(z_c)
        return gate(z_o) * act(c), c
    input_bias, recurrent_bias = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
    x_z, x_r, x_h = np.split(x @ kernel + input_bias, 3, axis=1)
    if options.get("reset_after", True):
        h_z, h_r, h_h = np.split(h @ recurrent_kernel + recurrent_bias, 3, axis=1)
        z, r = gate(x_z + h_z), gate(x_r + h_r)
        candidate = act(x_h + r * h_h)
    else:
        u_z, u_r, u_h = np.split(recurrent_kernel, 3, axis=1)
        z, r = gate(x_z + h @ u_z), gate(x_r + h @ u_r)
        candidate = act(x_h + (r * h) @ u_h)
    return (z * h + (1 - z) * candidate,)


def keras_layer(cell: str, x: np.ndarray, weights: list[np.ndarray], **options: Any) -> np.ndarray:
    """return_sequences=True over x (B, T, I)."""
    state = (np.zeros((len(x), H)),) * (2 if cell == "LSTM" else 1)
    outputs = []
    for t in range(x.shape[1]):
        state = keras_step(cell, x[:, t], state, weights, **options)
        outputs.append(state[0])
    return np.stack(outputs, 1)


def bidirectional(
    cell: str, x: np.ndarray, weights: list[np.ndarray], **options: Any
) -> np.ndarray:
    """Bidirectional, merge_mode="concat"."""
    half = len(weights) // 2
    there = keras_layer(cell, x, weights[:half], **options)
    back = keras_layer(cell, x[:, ::-1], weights[half:], **options)[:, ::-1]
    return np.concatenate([there, back], -1)


def ours(weights: Any, cell: str, x: np.ndarray, **options: Any) -> np.ndarray:
    layer = fastrnn.from_keras(weights, cell, **options)
    assert layer.batch_first
    with torch.no_grad():
        return layer(torch.from_numpy(np.ascontiguousarray(x)))[0].numpy()


def input_of(width: int = I) -> np.ndarray:
    return np.random.standard_normal((B, T, width))


def assert_equal(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@every_case
def test_the_numbers_are_keras_formulas(cell: str, options: dict[str, bool]) -> None:
    weights, x = keras_weights(cell, **options), input_of()
    reset = {k: v for k, v in options.items() if k == "reset_after"}
    assert_equal(ours(weights, cell, x, **reset), keras_layer(cell, x, weights, **reset))


@every_case
def test_bidirectional(cell: str, options: dict[str, bool]) -> None:
    weights = keras_weights(cell, **options) + keras_weights(cell, **options)
    x, reset = input_of(), {k: v for k, v in options.items() if k == "reset_after"}
    assert_equal(ours(weights, cell, x, **reset), bidirectional(cell, x, weights, **reset))


@every_cell
@pytest.mark.parametrize("both", [False, True])
def test_a_stack_of_layers(cell: str, both: bool) -> None:
    run = bidirectional if both else keras_layer
    stack = [
        [w for _ in range(1 + both) for w in keras_weights(cell, width=width)]
        for width in (I, (1 + both) * H, (1 + both) * H)
    ]
    x = input_of()
    want = x
    for weights in stack:
        want = run(cell, want, weights)
    assert_equal(ours(stack, cell, x), want)
    assert fastrnn.from_keras(stack, cell).num_layers == 3


@every_cell
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "linear"])
def test_activations(cell: str, activation: str) -> None:
    weights, x = keras_weights(cell), input_of()
    want = keras_layer(cell, x, weights, activation=activation)
    assert_equal(ours(weights, cell, x, activation=activation), want)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_hard_sigmoid_is_that_of_the_keras_version(
    cell: str, reset_after: bool, version: int
) -> None:
    weights = [4 * w for w in keras_weights(cell, reset_after=reset_after)]  # some gates saturate
    x = input_of()
    function = "hard_sigmoid of Keras 2" if version == 2 else "hard_sigmoid"
    reset = {"reset_after": reset_after} if cell == "GRU" else {}
    want = keras_layer(cell, x, weights, recurrent_activation=function, **reset)
    given = {"recurrent_activation": "hard_sigmoid", "keras_version": version, **reset}
    assert_equal(ours(weights, cell, x, **given), want)


@every_cell
def test_final_states_are_keras_outputs_without_sequences(cell: str) -> None:
    weights = keras_weights(cell) + keras_weights(cell)
    x = input_of()
    half = len(weights) // 2
    layer = fastrnn.from_keras(weights, cell)
    h_n = layer(torch.from_numpy(x))[1]
    h_n = h_n[0] if cell == "LSTM" else h_n
    there = keras_layer(cell, x, weights[:half])[:, -1]
    back = keras_layer(cell, x[:, ::-1], weights[half:])[:, -1]
    assert_equal(h_n.detach().numpy(), np.stack([there, back]))


@every_cell
def test_dtype_is_that_of_the_kernel_or_as_given(cell: str) -> None:
    weights = keras_weights(cell)
    assert fastrnn.from_keras(weights, cell).weight_ih_l0.dtype == torch.float64
    single = [w.astype(np.float32) for w in weights]
    assert fastrnn.from_keras(single, cell).weight_ih_l0.dtype == torch.float32
    half = fastrnn.from_keras(weights, cell, dtype=torch.bfloat16)
    assert half.weight_hh_l0.dtype == torch.bfloat16
    assert fastrnn.from_keras(weights, cell, device="meta").weight_hh_l0.is_meta
    layer = fastrnn.from_keras(weights, cell)
    assert all(p.requires_grad for p in layer.parameters())
    before = layer.weight_hh_l0.detach().clone()
    weights[1][:] = 0  # the layer has its own memory
    assert torch.equal(layer.weight_hh_l0, before)


def test_the_class_follows_the_cell() -> None:
    for cell, kind in (("LSTM", "LSTM"), ("GRU", "GRU"), ("SimpleRNN", "RNN")):
        assert type(fastrnn.from_keras(keras_weights(cell), cell)) is getattr(fastrnn, kind)
    assert fastrnn.from_keras(keras_weights("GRU", reset_after=False), "GRU").reset_after is False
    assert fastrnn.from_keras(keras_weights("GRU", use_bias=False), "GRU").reset_after is True


LSTM, GRU = keras_weights("LSTM"), keras_weights("GRU")
ERRORS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("cell", LSTM, {"cell": "lstm"}, ValueError, "cell must be one of 'LSTM', 'GRU', 'SimpleRNN'"),
    ("activation", LSTM, {"activation": "gelu"}, ValueError, "activation must be one of"),
    (
        "recurrent_activation",
        LSTM,
        {"recurrent_activation": "tanh"},
        ValueError,
        "recurrent_activation must be one of 'sigmoid', 'hard_sigmoid', got 'tanh'",
    ),
    ("version", LSTM, {"keras_version": 1}, ValueError, "keras_version must be 2 or 3, got 1"),
    ("array", LSTM[0], {}, TypeError, "weights must be a list of arrays, got ndarray"),
    ("empty", [], {}, TypeError, "weights must be a list of arrays"),
    ("five", [*LSTM, *LSTM[:2]], {}, ValueError, "weights must hold kernel, .* got 5 arrays"),
    ("integers", [np.ones((3, 16), int), *LSTM[1:]], {}, TypeError, r"weights\[0\] .* got int64"),
    ("strings", ["a", "b", "c"], {}, TypeError, r"weights\[0\] must be an array with dtype"),
    (
        "another cell's",
        GRU,
        {},
        ValueError,
        r"weights\[1\], the recurrent_kernel of 'LSTM', must have the shape \(H, 4·H\)",
    ),
    (
        "kernel",
        [LSTM[0][:, :8], *LSTM[1:]],
        {},
        ValueError,
        r"weights\[0\], the kernel, must have the shape \(I, 16\)",
    ),
    (
        "bias",
        [*LSTM[:2], np.zeros((2, 16))],
        {},
        ValueError,
        r"weights\[2\], the bias, must have the shape \(16,\), got \(2, 16\)",
    ),
    (
        "reset_after",
        GRU,
        {"cell": "GRU", "reset_after": False},
        ValueError,
        r"reset_after=False does not match a bias of shape \(2, 12\)",
    ),
    (
        "not of an LSTM",
        LSTM,
        {"reset_after": True},
        ValueError,
        "reset_after must be None for cell 'LSTM': only cell 'GRU' has it",
    ),
    (
        "not of a SimpleRNN",
        keras_weights("SimpleRNN"),
        {"cell": "SimpleRNN", "recurrent_activation": "hard_sigmoid"},
        ValueError,
        "recurrent_activation must be left out for cell 'SimpleRNN'.*, got 'hard_sigmoid'",
    ),
    ("unequal", [LSTM, LSTM[:2]], {}, ValueError, r"weights\[1\] differs from weights\[0\]"),
    ("width", [LSTM, LSTM], {}, ValueError, r"weights\[1\]\[0\], the kernel, must have 4 rows"),
]


@pytest.mark.parametrize(
    ("weights", "given", "error", "said"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_what_does_not_fit_is_refused(
    weights: Any, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fastrnn.from_keras(weights, **{"cell": "LSTM", **given})


# ---- against Keras itself ------------------------------------------------------------------------

KERAS = """
import sys
import keras
import numpy as np
x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype("float32")
found = {"x": x}
for k, (cell, options, both, layers) in enumerate(CASES):
    keras.utils.set_random_seed(k)
    make = getattr(keras.layers, cell)
    stack = [make(4, return_sequences=True, bias_initializer="normal", **options)
             for _ in range(layers)]
    if both:
        stack = [keras.layers.Bidirectional(layer) for layer in stack]
    y = x
    for n, layer in enumerate(stack):
        y = layer(y)
        for m, weight in enumerate(layer.get_weights()):
            found[f"{k}.{n}.{m}"] = weight
    found[f"{k}.y"] = keras.ops.convert_to_numpy(y)
found["version"] = keras.__version__
np.savez(sys.argv[1], **found)
"""
KERAS_CASES = [
    (cell, {**options, **more}, both, layers)
    for cell, options in CASES
    for more in ({}, {"activation": "relu"}, {"recurrent_activation": "hard_sigmoid"})
    if cell != "SimpleRNN" or "recurrent_activation" not in more
    for both in (False, True)
    for layers in (1, 2)
]


@pytest.mark.skipif(find_spec("keras") is None, reason="Keras is not installed")
def test_the_numbers_are_those_of_keras_itself(tmp_path: Path) -> None:
    """Keras runs in a process of its own, on torch: what it changes of torch stays there."""
    code = f"CASES = {KERAS_CASES!r}\n" + textwrap.dedent(KERAS)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "keras.npz")],
        env={**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "keras.npz")
    for k, (cell, options, both, layers) in enumerate(KERAS_CASES):
        each = (2 + options.get("use_bias", True)) * (1 + both)
        stack = [[found[f"{k}.{n}.{m}"] for m in range(each)] for n in range(layers)]
        given = {name: v for name, v in options.items() if name != "use_bias"}
        got = ours(stack if layers > 1 else stack[0], cell, found["x"], **given)
        np.testing.assert_allclose(got, found[f"{k}.y"], rtol=1e-5, atol=1e-6, err_msg=cell)
