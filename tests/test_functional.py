"""The functions of `fastrnn.functional`: equal to the reference, clear about wrong arguments."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import fastrnn
from cases import STACKS
from fastrnn import functional, reference
from fastrnn._options import Options
from problems import random_problem
from stacks import make
from tolerances import assert_close

FUNCTIONS = {"RNN": functional.rnn, "LSTM": functional.lstm, "GRU": functional.gru}
BACKWARDS = {
    "RNN": functional.rnn_backward,
    "LSTM": functional.lstm_backward,
    "GRU": functional.gru_backward,
}
every_stack = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS.keys())
STEPS = ("padded", "lengths", "reset", "lengths-reset")


class FunctionCall:
    """The arguments of one function of `functional`, in NumPy arrays."""

    def __init__(self, options: Options, steps: str = "padded", dtype: str = "float64") -> None:
        problem = random_problem(options, T=4, B=3, input_size=2, hidden_size=3, layout=steps)
        self.options = options
        self.input = problem.input.astype(dtype)
        self.hx = tuple(state.astype(dtype) for state in problem.hx or ())
        self.weights = [weight.astype(dtype) for weight in problem.weights]
        self.steps = problem.rows

    def reference(self) -> reference.Result:
        return reference.forward(self.options, self.input, self.hx, self.weights, **self.steps)

    def keywords(self) -> dict[str, Any]:
        o = self.options
        keywords: dict[str, Any] = {
            "num_layers": o.num_layers,
            "bidirectional": o.bidirectional,
            "bias": o.bias,
        }
        if o.cell == "RNN":
            keywords["nonlinearity"] = o.activation
        else:
            keywords.update(activation=o.activation, gate_activation=o.gate_activation)
        if o.cell == "GRU":
            keywords["reset_after"] = o.reset_after
        if o.cell == "LSTM":
            keywords["proj_size"] = o.proj_size
        return {**keywords, **self.steps}

    def run(self, **changes: Any) -> tuple[Any, ...]:
        """The call, with some arguments changed."""
        given = {
            "input": self.input,
            "hx": self.hx if self.options.cell == "LSTM" else self.hx[0],
            "weights": self.weights,
            **self.keywords(),
            **changes,
        }
        function = FUNCTIONS[self.options.cell]
        return function(given.pop("input"), given.pop("hx"), given.pop("weights"), **given)


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


@every_stack
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_numpy_equals_the_reference(options: Options, steps: str, batch_first: bool) -> None:
    arrays = FunctionCall(options, steps)
    expected = arrays.reference()
    flipped: dict[str, Any] = {}
    if batch_first:
        flipped = {"input": np.ascontiguousarray(arrays.input.swapaxes(0, 1)), "batch_first": True}
        if "reset" in arrays.steps:
            flipped["reset"] = np.ascontiguousarray(arrays.steps["reset"].T)
    output, hx_n, states, saved = arrays.run(return_states=True, return_saved=True, **flipped)

    def flip(x: Any) -> Any:
        return np.swapaxes(x, 0, 1) if batch_first else x

    assert isinstance(output, fastrnn.Tensor)
    assert_close(flip(output.numpy()), expected.output, "float64", "output")
    for got, want in zip(as_tuple(hx_n), expected.hx_n, strict=True):
        assert_close(got.numpy(), want, "float64", "output")
    for got, want in zip(states, expected.states, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got.numpy(), want, "float64", "output")

    rng = np.random.default_rng(0)
    d_output = rng.normal(size=expected.output.shape)
    d_hx_n = tuple(rng.normal(size=state.shape) for state in expected.hx_n)
    d_states = reference.States(
        *(None if s is None else rng.normal(size=s.shape) for s in expected.states)
    )
    d_input, d_hx, d_weights = BACKWARDS[options.cell](
        flip(d_output),
        d_hx_n if options.cell == "LSTM" else d_hx_n[0],
        saved,
        d_states=functional.States(*d_states),
    )
    want_input, want_hx, want_weights = reference.backward(
        expected.saved, d_output, d_hx_n, d_states=d_states
    )
    assert_close(flip(d_input.numpy()), want_input, "float64", "d_input")
    for got, want in zip(as_tuple(d_hx), want_hx, strict=True):
        assert_close(got.numpy(), want, "float64", "d_input")
    for got, want in zip(d_weights, want_weights, strict=True):
        assert_close(got.numpy(), want, "float64", "d_weight")


@every_stack
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_in_single_and_half_precision(options: Options, dtype: str) -> None:
    arrays = FunctionCall(options, "lengths", dtype)
    expected = arrays.reference()
    output, hx_n, saved = arrays.run(return_saved=True)
    assert output.numpy().dtype == dtype
    assert_close(output.numpy(), expected.output, dtype, "output")
    for got, want in zip(as_tuple(hx_n), expected.hx_n, strict=True):
        assert_close(got.numpy(), want, dtype, "output")
    d_output = np.ones_like(arrays.input, shape=output.shape)
    d_input, _, d_weights = BACKWARDS[options.cell](d_output, None, saved)
    want_input, _, want_weights = reference.backward(expected.saved, d_output, None)
    assert_close(d_input.numpy(), want_input, dtype, "d_input")
    for got, want in zip(d_weights, want_weights, strict=True):
        assert_close(got.numpy(), want, dtype, "d_weight")


@every_stack
@pytest.mark.parametrize("steps", STEPS)
def test_torch_equals_numpy(options: Options, steps: str) -> None:
    arrays = FunctionCall(options, steps)
    hx = tuple(map(torch.from_numpy, arrays.hx))
    tensors = {
        "input": torch.from_numpy(arrays.input).requires_grad_(),
        "hx": hx if options.cell == "LSTM" else hx[0],
        "weights": [torch.from_numpy(weight) for weight in arrays.weights],
        **{name: torch.from_numpy(x) for name, x in arrays.steps.items()},
    }
    ours, ours_n, saved = arrays.run(return_saved=True)
    output, hx_n = arrays.run(**tensors)
    assert isinstance(output, torch.Tensor)
    np.testing.assert_array_equal(output.detach().numpy(), ours.numpy())
    for got, want in zip(as_tuple(hx_n), as_tuple(ours_n), strict=True):
        np.testing.assert_array_equal(got.detach().numpy(), want.numpy())
    (d_input,) = torch.autograd.grad(output.sum(), tensors["input"])
    backward = BACKWARDS[options.cell]
    expected = backward(np.ones(ours.shape), None, saved)
    np.testing.assert_array_equal(d_input.numpy(), expected[0].numpy())

    detached, _, saved = arrays.run(**tensors, return_saved=True)
    assert not detached.requires_grad
    got = backward(torch.ones_like(detached), None, saved)
    for mine, want in zip((got[0], *got[2]), (expected[0], *expected[2]), strict=True):
        np.testing.assert_array_equal(mine.numpy(), want.numpy())


def test_hx_none_stands_for_zeros(cell: str) -> None:
    arrays = FunctionCall(Options(cell, num_layers=2, bidirectional=True))  # type: ignore[arg-type]
    zeros = tuple(np.zeros_like(state) for state in arrays.hx)
    output, _ = arrays.run(hx=zeros if cell == "LSTM" else zeros[0])
    without, _, saved = arrays.run(hx=None, return_saved=True)
    np.testing.assert_array_equal(output.numpy(), without.numpy())
    _, d_hx, _ = BACKWARDS[cell](np.ones(output.shape), None, saved)
    assert d_hx is None


def test_strides_of_the_arrays_do_not_matter(cell: str) -> None:
    arrays = FunctionCall(Options(cell))  # type: ignore[arg-type]
    expected, _ = arrays.run()
    odd = np.zeros((*arrays.input.shape[:2], 2 * arrays.input.shape[2]))[:, ::-1, ::2]
    odd[...] = arrays.input
    weights = [np.asfortranarray(weight) for weight in arrays.weights]
    output, _ = arrays.run(input=odd, weights=weights)
    np.testing.assert_array_equal(output.numpy(), expected.numpy())


def test_read_only_arrays_are_taken(cell: str) -> None:
    arrays = FunctionCall(Options(cell))  # type: ignore[arg-type]
    expected, _ = arrays.run()
    for array in (arrays.input, *arrays.hx, *arrays.weights):
        array.flags.writeable = False
    np.testing.assert_array_equal(arrays.run()[0].numpy(), expected.numpy())


def test_arrays_of_the_engine_are_taken() -> None:
    arrays = FunctionCall(Options("GRU"))
    expected, h_n = arrays.run()
    first, h_n = arrays.run(input=fastrnn.from_dlpack(arrays.input))
    np.testing.assert_array_equal(first.numpy(), expected.numpy())
    from_numpy, _ = arrays.run(hx=h_n.numpy())
    from_ours, _ = arrays.run(hx=h_n)
    np.testing.assert_array_equal(from_ours.numpy(), from_numpy.numpy())


@pytest.mark.parametrize("kind", ["list", "tuple", "int32", "uint8", "torch"])
def test_lengths_are_any_integers(kind: str) -> None:
    arrays = FunctionCall(Options("GRU"))
    lengths = [3, 0, 4]
    given: Any = {
        "list": lengths,
        "tuple": tuple(np.int16(n) for n in lengths),
        "int32": np.array(lengths, np.int32),
        "uint8": np.array(lengths, np.uint8),
        "torch": torch.tensor(lengths, dtype=torch.int16),
    }[kind]
    expected, _ = arrays.run(lengths=np.array(lengths))
    np.testing.assert_array_equal(arrays.run(lengths=given)[0].numpy(), expected.numpy())
    tensors = {
        "input": torch.from_numpy(arrays.input),
        "hx": torch.from_numpy(arrays.hx[0]),
        "weights": [torch.from_numpy(weight) for weight in arrays.weights],
    }
    output, _ = arrays.run(**tensors, lengths=given)
    np.testing.assert_array_equal(output.numpy(), expected.numpy())


def test_lengths_may_change_after_the_call() -> None:
    arrays = FunctionCall(Options("GRU"), "lengths")
    output, _, saved = arrays.run(return_saved=True)
    expected = functional.gru_backward(np.ones(output.shape), None, saved)[0].numpy()
    arrays.steps["lengths"][:] = 1
    again = functional.gru_backward(np.ones(output.shape), None, saved)[0].numpy()
    np.testing.assert_array_equal(again, expected)


def test_complex_tensors() -> None:
    case = make(Options("RNN"), dtype=torch.complex128, requires_grad=False)
    output, _ = functional.rnn(case.input, case.hx[0], case.weights)
    theirs = torch.nn.RNN(2, 3, dtype=torch.complex128)
    for parameter, weight in zip(theirs.parameters(), case.weights, strict=True):
        parameter.data = weight
    torch.testing.assert_close(output, theirs(case.input, case.hx[0])[0])


def test_batch_of_no_rows() -> None:
    arrays = FunctionCall(Options("LSTM", num_layers=2))
    output, (h_n, c_n), saved = arrays.run(
        input=arrays.input[:, :0], hx=None, lengths=[], return_saved=True
    )
    assert (output.shape, h_n.shape, c_n.shape) == ((4, 0, 3), (2, 0, 3), (2, 0, 3))
    _, _, d_weights = functional.lstm_backward(np.ones(output.shape), None, saved)
    assert all((d.numpy() == 0).all() for d in d_weights)


# ---- Wrong arguments -----------------------------------------------------------------------------

NAMES = "weight_ih, weight_hh, bias_ih, bias_hh"
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input: a list": ({"input": [1.0]}, TypeError, "input must be an array .* got \\[1.0\\]"),
    "input: rank": (
        {"input": np.ones((4, 2))},
        ValueError,
        r"input must have 3 dimensions, \(T, B, I\), got shape \(4, 2\)",
    ),
    "input: dtype": (
        {"input": np.ones((4, 3, 2), np.int64)},
        TypeError,
        "input must have dtype float32 or float64 or bfloat16 or float16, got int64",
    ),
    "input: complex": ({"input": np.ones((4, 3, 2), complex)}, TypeError, "input .*complex"),
    "input: no steps": (
        {"input": np.ones((0, 3, 2))},
        ValueError,
        r"input must have at least one step, got shape \(0, 3, 2\)",
    ),
    "input: size": (
        {"input": np.ones((4, 3, 5))},
        ValueError,
        r"weight_ih_l0 must have shape \(12, 5\), got \(12, 2\)",
    ),
    "weights: number": (
        {"weights": [np.ones((12, 2))]},
        ValueError,
        f"weights must hold 4 arrays, {NAMES} of each layer and direction; got 1",
    ),
    "weights: of so many layers": (
        {"num_layers": 2**40},
        ValueError,
        f"num_layers must be at most {2**16}, got {2**40}",
    ),
    "weights: one array": (
        {"weights": np.ones((12, 2))},
        TypeError,
        "weights must be a list of arrays, got ndarray",
    ),
    "weights: rows": (
        {"weights": [np.ones((12, 2)), np.ones((11, 3)), np.ones(12), np.ones(12)]},
        ValueError,
        r"weight_hh_l0 must have shape \(4·H, O\).* got \(11, 3\)",
    ),
    "weights: bias": (
        {"weights": [np.ones((12, 2)), np.ones((12, 3)), np.ones(12), np.ones((12, 1))]},
        ValueError,
        r"bias_hh_l0 must have shape \(12,\), got \(12, 1\)",
    ),
    "weights: dtype": (
        {
            "weights": [
                np.ones((12, 2)),
                np.ones((12, 3), np.float32),
                np.ones(12),
                np.ones(12),
            ]
        },
        TypeError,
        "weight_hh_l0 must have the dtype of input, float64, got float32",
    ),
    "hx: one array": ({"hx": np.ones((1, 3, 3))}, TypeError, r"hx must be None or two arrays, \(h"),
    "hx: three": ({"hx": (1, 2, 3)}, TypeError, r"two arrays, \(h0, c0\), got 3 of them"),
    "hx: shape": (
        {"hx": (np.ones((1, 3, 3)), np.ones((1, 1, 3)))},
        ValueError,
        r"c0 must have shape \(1, 3, 3\), got \(1, 1, 3\)",
    ),
    "hx: dtype": (
        {"hx": (np.ones((1, 3, 3), np.float32), np.ones((1, 3, 3)))},
        TypeError,
        "h0 must have the dtype of input, float64, got float32",
    ),
    "lengths: shape": (
        {"lengths": [1, 2]},
        ValueError,
        r"lengths must have shape \(3,\), got \(2,\)",
    ),
    "lengths: dtype": ({"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths must be integers, got .*"),
    "lengths: bool": ({"lengths": [True, True, True]}, TypeError, "lengths must be integers"),
    "lengths: long": (
        {"lengths": [1, 5, 3]},
        ValueError,
        "lengths must be between 0 and 4, got 5 for row 1",
    ),
    "lengths: negative": ({"lengths": [1, 2, -1]}, ValueError, "lengths .* got -1 for row 2"),
    "reset: shape": (
        {"reset": np.zeros((3, 4), bool)},
        ValueError,
        r"reset must have shape \(4, 3\), got \(3, 4\)",
    ),
    "reset: dtype": ({"reset": np.zeros((4, 3))}, TypeError, "reset must be bool, got .*float64"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be one of .* got 'gelu'"),
    "num_layers": ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    "num_layers: text": ({"num_layers": "1"}, TypeError, "num_layers must be an int, got str"),
    "num_layers: float": ({"num_layers": 1.5}, TypeError, "num_layers must be an int, got float"),
    "return_states": ({"return_states": "a"}, TypeError, "return_states must be a bool, got str"),
    "return_saved": ({"return_saved": 1}, TypeError, "return_saved must be a bool, got int"),
    "proj_size": ({"proj_size": -1}, ValueError, "proj_size must be .* got -1"),
    "proj_size: None": ({"proj_size": None}, TypeError, "proj_size must be an int, got NoneType"),
}


def to_torch(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    return type(x)(map(to_torch, x)) if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("arrays_of", ["numpy", "torch"])
def test_errors_name_the_argument(wrong: str, arrays_of: str) -> None:
    changes, error, message = WRONG[wrong]
    if arrays_of == "torch":
        if wrong in ("input: a list", "input: complex"):  # not torch; torch alone
            pytest.skip("of arrays without torch")
        message = message.replace("ndarray", "Tensor").replace("float16, got", "float16.*got")
        changes = {name: x if name == "lengths" else to_torch(x) for name, x in changes.items()}
    arrays = FunctionCall(Options("LSTM"))
    if arrays_of == "torch":
        arrays.input, arrays.hx, arrays.weights = to_torch(
            [arrays.input, arrays.hx, arrays.weights]
        )
    with pytest.raises(error, match=message):
        arrays.run(**changes)


def test_torch_and_other_arrays_do_not_mix() -> None:
    arrays = FunctionCall(Options("GRU"))
    with pytest.raises(TypeError, match=r"weight_ih_l0 must be a torch.Tensor as input is, got nd"):
        arrays.run(input=torch.from_numpy(arrays.input), hx=None)
    with pytest.raises(TypeError, match=r"weight_ih_l0 must not be a torch.Tensor: input is not"):
        arrays.run(weights=to_torch(arrays.weights))
    with pytest.raises(TypeError, match=r"h0 must not be a torch.Tensor: input is not"):
        arrays.run(hx=torch.from_numpy(arrays.hx[0]))


def test_tensors_on_different_devices_are_refused() -> None:
    arrays = FunctionCall(Options("GRU"))
    weights = to_torch(arrays.weights)
    weights[2] = weights[2].to("meta")
    with pytest.raises(
        ValueError, match="bias_ih_l0 must be on the device of input, cpu, got meta"
    ):
        functional.gru(torch.from_numpy(arrays.input), None, weights)


NO_VALUES = {
    "text": "abc",
    "None": [None, 1, 1],
    "too large": [2**70, 1, 1],
    "a set": {1, 2, 3},
    "objects": np.array([1, None, 3]),
    "ragged": [[1], [1, 2]],
    "meta": torch.ones(3, dtype=torch.int64, device="meta"),
}


@pytest.mark.parametrize("value", NO_VALUES.values(), ids=NO_VALUES.keys())
@pytest.mark.parametrize("name", ["lengths", "reset"])
@pytest.mark.parametrize("arrays_of", ["numpy", "torch"])
def test_what_holds_no_values_is_named(name: str, arrays_of: str, value: Any) -> None:
    arrays = FunctionCall(Options("GRU"))
    convert = to_torch if arrays_of == "torch" else lambda x: x
    given = {"input": convert(arrays.input), "weights": convert(arrays.weights), "hx": None}
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        arrays.run(**given, **{name: value})


def test_an_array_that_torch_cannot_take_is_named() -> None:
    arrays = FunctionCall(Options("GRU"))
    reset = np.zeros((4, 3), bool)[::-1]
    with pytest.raises(TypeError, match=r"reset must be .* got ndarray: .*negative"):
        arrays.run(
            input=to_torch(arrays.input), hx=None, weights=to_torch(arrays.weights), reset=reset
        )


def test_reset_after_is_a_bool() -> None:
    with pytest.raises(TypeError, match="reset_after must be a bool, got NoneType"):
        functional.gru(np.ones((1, 1, 1)), None, [], reset_after=None)  # type: ignore[arg-type]


def test_nonlinearity_is_named_as_the_argument_is() -> None:
    message = re.escape("nonlinearity must be one of")
    with pytest.raises(ValueError, match=message):
        functional.rnn(np.ones((1, 1, 1)), None, [], nonlinearity="gelu")


@pytest.mark.parametrize("arrays_of", ["numpy", "torch"])
def test_backward_checks_its_arguments(arrays_of: str) -> None:
    arrays = FunctionCall(Options("LSTM"))
    convert = to_torch if arrays_of == "torch" else lambda x: x
    changes = {
        "input": convert(arrays.input),
        "hx": convert(arrays.hx),
        "weights": convert(arrays.weights),
    }
    output, _, saved = arrays.run(**changes, return_saved=True)
    with pytest.raises(ValueError, match=r"d_output must have shape \(4, 3, 3\), got \(3, 3\)"):
        functional.lstm_backward(output[0], None, saved)
    with pytest.raises(TypeError, match=r"d_output must have the dtype of .*float64, got float32"):
        functional.lstm_backward(convert(np.ones((4, 3, 3), np.float32)), None, saved)
    with pytest.raises(TypeError, match=r"d_hx_n must be None or a pair, \(d_h_n, d_c_n\)"):
        functional.lstm_backward(output, convert(arrays.hx[0]), saved)
    with pytest.raises(ValueError, match=r"d_c_n must have shape \(1, 3, 3\), got \(3, 3\)"):
        functional.lstm_backward(output, (None, convert(np.ones((3, 3)))), saved)
    for d_states in (output, (output, output, output)):
        with pytest.raises(TypeError, match=r"d_states must be None or States, \(d_h, d_c\), got"):
            functional.lstm_backward(output, None, saved, d_states=d_states)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"saved must be what gru\(…, return_saved=True\).*of lstm"):
        functional.gru_backward(output, None, saved)
    with pytest.raises(TypeError, match=r"saved must be what lstm\(.* got int"):
        functional.lstm_backward(output, None, 3)


def test_gradient_of_a_state_that_is_not_there() -> None:
    arrays = FunctionCall(Options("GRU"))
    output, _, saved = arrays.run(return_saved=True)
    d_states = functional.States(None, np.ones((1, 4, 3, 3)))
    with pytest.raises(ValueError, match=r"d_states.c must be None: there is no such state"):
        functional.gru_backward(output, None, saved, d_states=d_states)
