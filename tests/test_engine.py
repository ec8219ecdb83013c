"""The engine against the reference: every cell, dtype, stack and layout, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from cases import LAYOUTS
from engine import (
    DTYPES,
    EngineCall,
    check_against_reference,
    compute_dtype,
    rounded,
    run_engine,
    to_float64,
)
from fastrnn import _C, reference
from fastrnn.reference import Options
from problems import Gradients, Problem, only, random_problem
from tolerances import assert_close

CELLS = (("RNN", 0), ("LSTM", 0), ("LSTM", 7), ("GRU", 0))
# The derivatives of relu and hardsigmoid jump, and the rounding of a half type may cross the jump.
SMOOTH = ("tanh", "sigmoid", "identity")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cell", "proj_size"), CELLS)
def test_matches_the_reference(
    cell: Any,
    proj_size: int,
    dtype: str,
    bidirectional: bool,
    layers: int,
    bias: bool,
    layout: str,
) -> None:
    options = Options(cell, layers, bidirectional, bias, proj_size)
    check_against_reference(random_problem(options, layout=layout, d_states=True), dtype)


@pytest.mark.parametrize(
    ("dtype", "activation", "gate_activation"),
    [
        (dtype, activation, gate)
        for dtype in DTYPES
        for activation in reference.ACTIVATIONS
        for gate in reference.GATE_ACTIVATIONS
        if compute_dtype(dtype) == dtype or (activation in SMOOTH and gate in SMOOTH)
    ],
)
@pytest.mark.parametrize(
    ("cell", "reset_after"), [("RNN", True), ("LSTM", True), ("GRU", True), ("GRU", False)]
)
def test_activations_match_the_reference(
    cell: Any, reset_after: bool, activation: str, gate_activation: str, dtype: str
) -> None:
    options = Options(
        cell,
        activation=activation,
        gate_activation=gate_activation,
        reset_after=reset_after,
        bidirectional=True,
    )
    check_against_reference(random_problem(options, layout="lengths-reset"), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(5, 40, 24, 100), (20, 1, 3, 130), (4, 3, 24, 430)])
@pytest.mark.parametrize(
    ("cell", "reset_after"), [("RNN", True), ("LSTM", True), ("GRU", True), ("GRU", False)]
)
def test_larger_sizes_match_the_reference(
    cell: Any, reset_after: bool, sizes: tuple[int, ...], threads: int, dtype: str
) -> None:
    T, B, input_size, hidden_size = sizes
    options = Options(cell, 2, True, reset_after=reset_after)
    problem = random_problem(
        options, T=T, B=B, input_size=input_size, hidden_size=hidden_size, layout="lengths"
    )
    check_against_reference(problem, dtype, threads=threads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (31, 32), (64, 33), (65, 70)])
@pytest.mark.parametrize(("cell", "proj_size"), CELLS)
def test_odd_and_even_sizes_match_the_reference(
    cell: Any, proj_size: int, sizes: tuple[int, int], dtype: str
) -> None:
    """Half types may be multiplied in pairs, and whole vectors of them converted at once."""
    options = Options(cell, 2, True, proj_size=min(proj_size, sizes[1] - 1))
    problem = random_problem(
        options, input_size=sizes[0], hidden_size=sizes[1], layout="lengths-reset"
    )
    check_against_reference(problem, dtype)
    check_against_reference(problem, dtype, arrange=spread)


# ---- Instruction sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        Options("RNN", 2, True, activation="relu"),
        Options("LSTM", 2, True, proj_size=7),
        Options("LSTM", 1, False, gate_activation="hardsigmoid"),
        Options("GRU", 2, True),
        Options("GRU", 1, True, reset_after=False),
    ],
    ids=lambda o: o.cell,
)
def test_compact(options: Options, dtype: str) -> None:
    """One of each, on the instruction set that FASTRNN_ISA asks for."""
    assert _C.isa() == os.environ.get("FASTRNN_ISA", _C.isa())
    if dtype in ("bfloat16", "float16"):
        options = replace(options, activation="tanh", gate_activation="sigmoid")
    for k, (layout, hidden_size) in enumerate(zip(LAYOUTS, (8, 19, 33, 64, 100), strict=True)):
        problem = random_problem(
            options, B=4 * k + 1, hidden_size=hidden_size, layout=layout, d_states=True
        )
        check_against_reference(problem, dtype, threads=1 + k % 2)


@pytest.mark.parametrize("isa", _C.isas())
def test_every_instruction_set_matches_the_reference(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_compact"]
    done = subprocess.run(
        [*command, __file__],
        env={**os.environ, "FASTRNN_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = 20 if find_spec("torch") else 15  # bfloat16 arrays are torch's
    assert f"{passed} passed" in done.stdout


# ---- What may be absent, empty, or laid out in another way ---------------------------------------


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_inference_matches_the_reference(cell: Any) -> None:
    """Without saved values, and with the last layer's output alone."""
    problem = rounded(random_problem(Options(cell, 3, True), layout="lengths"), "float32")
    call = EngineCall(problem)
    call.forward(all_layers=False, save=False)
    expected = problem.solve()
    assert_close(to_float64(call.output), expected.output, "float32", "output")
    assert_close(to_float64(call.h_n), expected.hx_n[0], "float32", "output")
    if call.c_n is not None:
        assert_close(to_float64(call.c_n), expected.hx_n[1], "float32", "output")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_absent_states_and_gradients_stand_for_zeros(cell: Any, layout: str) -> None:
    problem = random_problem(Options(cell, 2, True), layout=layout, hx=False, d_states=True)
    check_against_reference(replace(problem, d=replace(problem.d, output=None)), "float64")
    check_against_reference(replace(problem, d=replace(problem.d, hx_n=None)), "float64")
    check_against_reference(replace(problem, d=Gradients(problem.d.output, None)), "float64")


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_each_gradient_can_be_left_out(cell: Any) -> None:
    problem = random_problem(Options(cell, 2, True))
    whole = run_engine(problem).named()
    names = [name for name in whole if name.startswith("d_")]
    call = EngineCall(problem)
    call.forward()
    for name in names:
        call.backward(lambda other, name=name: other != name)  # type: ignore[misc]
        others = [call.d_input, call.d_h0, call.d_c0, *call.d_weights]
        assert sum(x is None for x in others) == 1 + (call.c_n is None)
        call.backward(lambda other, name=name: other == name)  # type: ignore[misc]
        alone = {"d_input": call.d_input, "d_h0": call.d_h0, "d_c0": call.d_c0}
        alone |= {f"d_weights[{k}]": w for k, w in enumerate(call.d_weights)}
        np.testing.assert_array_equal(alone[name], whole[name][1], err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2, 17), (7, 1, 1, 16), (3, 2, 33, 1)])
@pytest.mark.parametrize(("cell", "proj_size"), [("RNN", 0), ("LSTM", 0), ("LSTM", 1), ("GRU", 0)])
def test_smallest_sizes_match_the_reference(
    cell: Any, proj_size: int, sizes: tuple[int, ...], dtype: str
) -> None:
    T, B, input_size, hidden_size = sizes
    options = Options(cell, 2, True, proj_size=proj_size)
    for layout in LAYOUTS:
        problem = random_problem(
            options, T=T, B=B, input_size=input_size, hidden_size=hidden_size, layout=layout
        )
        check_against_reference(problem, dtype)


@pytest.mark.parametrize("layout", ["padded", "lengths-reset"])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_an_empty_batch_has_empty_results_and_zero_weight_gradients(cell: Any, layout: str) -> None:
    problem = random_problem(Options(cell, 2, True), B=0, layout=layout, d_states=True)
    solution = run_engine(problem)
    assert solution.output.shape == (6, 0, 38)
    assert solution.hx_n[0].shape == (4, 0, 19)
    for d_weight in solution.d_weights:
        assert not d_weight.any()


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_all_lengths_zero(cell: Any) -> None:
    problem = random_problem(Options(cell, 2, True), layout="lengths")
    check_against_reference(replace(problem, rows={"lengths": np.zeros(5, np.int64)}), "float64")


def spread(x: Any) -> Any:
    """Equal values in other memory: axes backwards, gaps between them, not from the beginning."""
    if not isinstance(x, np.ndarray):
        torch = pytest.importorskip("torch")
        shape = [2 * n + 1 for n in reversed(x.shape)]
        memory = torch.full(shape, float("nan"), dtype=x.dtype).permute(*reversed(range(x.ndim)))
        memory[tuple(slice(1, None, 2) for _ in shape)] = x
        return memory[tuple(slice(1, None, 2) for _ in shape)]
    shape = [2 * n + 1 for n in reversed(x.shape)]
    memory = np.full(shape, True if x.dtype == np.bool_ else np.nan, x.dtype).T
    view = memory[tuple(slice(1, None, 2) for _ in shape)]
    view[...] = x
    return view


def mirrored(x: Any) -> Any:
    """Equal values, the last axis running backwards through memory."""
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cell", "proj_size"), CELLS)
def test_strided_arrays_match_the_reference(
    cell: Any, proj_size: int, dtype: str, layout: str
) -> None:
    options = Options(cell, 2, True, proj_size=proj_size)
    problem = random_problem(options, layout=layout, d_states=True)
    check_against_reference(problem, dtype, arrange=spread)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_negative_strides_match_the_reference(cell: Any) -> None:
    problem = random_problem(Options(cell, 2, True), layout="reset", d_states=True)
    check_against_reference(problem, "float32", arrange=mirrored)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_expanded_gradients_match_the_reference(cell: Any) -> None:
    """The gradient of a sum: one number, all strides zero."""
    problem = random_problem(Options(cell))
    ones = replace(problem.d, output=np.ones_like(problem.d.output))

    def expand(x: Any) -> Any:
        return np.broadcast_to(x[:1, :1, :1], x.shape) if x.ndim == 3 and (x == 1).all() else x

    check_against_reference(replace(problem, d=ones), "float32", arrange=expand)


# ---- Numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_nan_and_infinity_pass_through_as_in_the_reference(
    cell: Any, activation: str, value: float
) -> None:
    problem = random_problem(Options(cell, activation=activation))
    problem.input[2, 1, 3] = value
    with np.errstate(invalid="ignore"):
        expected = problem.solve()
    actual = run_engine(problem, "float64")
    assert_close(actual.output, expected.output, "float64", "output")
    for last, expected_last in zip(actual.hx_n, expected.hx_n, strict=True):
        assert_close(last, expected_last, "float64", "output")
    other_rows = [0, 2, 3, 4]
    assert np.isfinite(actual.output[:, other_rows]).all()
    assert_close(
        actual.d_input[:, other_rows], expected.d_input[:, other_rows], "float64", "d_input"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [18, 19])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_gates_that_an_infinite_input_saturates_stay_finite(
    cell: Any, hidden_size: int, dtype: str
) -> None:
    """Padding of weights and states is never multiplied by an infinity."""
    problem = rounded(random_problem(Options(cell), hidden_size=hidden_size), dtype)
    problem.input[2, 1, 3] = np.inf
    with np.errstate(invalid="ignore"):
        expected = problem.solve()
    call = EngineCall(problem, dtype)
    call.forward()
    assert np.isfinite(to_float64(call.hidden)).all()
    assert_close(to_float64(call.hidden)[0], expected.output, dtype, "output")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_saturate_at_large_arguments(activation: str, dtype: str) -> None:
    """Through the whole range of exponents, over the edge of what e^x can hold and to the end."""
    x = np.concatenate([np.linspace(80, 95, 301), np.linspace(700, 750, 301), [1e4, 1e30, np.inf]])
    one = np.ones((1, 1))
    problem = Problem(
        Options("RNN", activation=activation, bias=False),
        np.concatenate([x, -x]).reshape(1, -1, 1),
        None,
        [one, one],
        Gradients(None, None),
    )
    call = EngineCall(problem, dtype)
    call.forward()
    result = reference.forward(problem.options, problem.input, None, problem.weights)
    assert_close(to_float64(call.hidden)[0], result.output, dtype, "output")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_what_padding_holds_has_no_influence(cell: Any, value: float) -> None:
    problem = random_problem(Options(cell, 2, True), layout="lengths", d_states=True)
    clean = run_engine(problem).named()
    d = problem.d
    assert d.output is not None
    assert d.states is not None
    for b, length in enumerate(problem.rows["lengths"]):
        for padded in (problem.input[length:, b], d.output[length:, b]):
            padded[...] = value
        for states in d.states:
            if states is not None:
                states[:, length:, b] = value
    for name, (_, actual) in run_engine(problem).named().items():
        np.testing.assert_array_equal(actual, clean[name][1], err_msg=name)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_a_reset_stops_nan(cell: Any) -> None:
    """A state or a gradient that is not a number does not pass a boundary."""
    problem = random_problem(Options(cell, bidirectional=True), B=1)
    reset = np.zeros((6, 1), np.bool_)
    reset[[0, 3]] = True
    problem = replace(problem, rows={"reset": reset})
    clean = run_engine(problem)
    assert problem.hx is not None
    assert problem.d.output is not None
    for state in problem.hx:
        state[0] = np.nan  # the forward direction starts afresh at step 0
    problem.input[4] = np.nan
    problem.d.output[5] = np.nan
    actual = run_engine(problem)
    np.testing.assert_array_equal(actual.output[:3], clean.output[:3])
    np.testing.assert_array_equal(actual.d_input[:3], clean.d_input[:3])
    np.testing.assert_array_equal(actual.d_hx[0][0], 0)
    assert np.isnan(actual.output[4]).all()


# ---- Long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_a_hundred_thousand_steps(cell: Any) -> None:
    """The last steps equal those of a run that begins shortly before, from the state there."""
    T, near = 100_000, 100_000 - 50
    problem = rounded(
        random_problem(Options(cell), T=T, B=1, input_size=3, hidden_size=4), "float64"
    )
    whole = run_engine(problem, "float64")
    start = tuple(s[:, near - 1] for s in whole.states if s is not None)
    d = replace(problem.d, output=problem.d.output[near:])  # type: ignore[index]
    tail = replace(problem, input=problem.input[near:], hx=start, d=d).solve()
    assert_close(whole.output[near:], tail.output, "float64", "output")
    assert_close(whole.d_input[near:], tail.d_input, "float64", "d_input")
    assert all(np.isfinite(w).all() and w.any() for w in whole.d_weights)


def test_rows_of_lengths_equal_rows_alone_in_the_engine() -> None:
    problem = random_problem(Options("LSTM", 2, True), layout="lengths-reset")
    whole = run_engine(problem)
    for b, length in enumerate(problem.rows["lengths"]):
        if length:
            alone = run_engine(only(problem, b))
            np.testing.assert_array_equal(whole.output[:length, [b]], alone.output)
            np.testing.assert_array_equal(whole.d_input[:length, [b]], alone.d_input)
