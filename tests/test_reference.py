"""The reference against finite differences, against itself run piecewise, and against the docs."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path

import numpy as np
import pytest

from cases import LAYOUTS
from differences import check_gradients
from fastrnn import reference
from fastrnn._options import GATES
from fastrnn.reference import Cell, Options, Parameters
from problems import Array, Gradients, Problem, Solution, only, random_problem
from tolerances import assert_close

MATHS = Path(__file__).parents[1] / "docs" / "maths.md"

CELLS = [
    *(Options("RNN", activation=name) for name in reference.ACTIVATIONS),
    *(
        Options("LSTM", activation=name, gate_activation=gate)
        for name in reference.ACTIVATIONS
        for gate in reference.GATE_ACTIVATIONS
    ),
    *(
        Options("GRU", activation=name, gate_activation=gate, reset_after=reset_after)
        for name in reference.ACTIVATIONS
        for gate in reference.GATE_ACTIVATIONS
        for reset_after in (True, False)
    ),
]
STACKS = [
    Options(cell, num_layers=layers, bidirectional=bidirectional, bias=bias, proj_size=proj_size)
    for cell, proj_size in (("RNN", 0), ("LSTM", 0), ("LSTM", 2), ("GRU", 0))
    for layers in (1, 2)
    for bidirectional in (False, True)
    for bias in (True, False)
]


def name(options: Options) -> str:
    return ", ".join(str(getattr(options, field)) for field in options.__dataclass_fields__)


# ---- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CELLS, ids=name)
def test_gradients_of_every_cell_are_those_of_finite_differences(options: Options) -> None:
    check_gradients(random_problem(options, T=4, B=3, input_size=2, hidden_size=3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_gradients_of_every_stack_are_those_of_finite_differences(
    options: Options, layout: str
) -> None:
    sizes = {"T": 4, "B": 4, "input_size": 2, "hidden_size": 3}
    check_gradients(random_problem(options, layout=layout, d_states=True, **sizes))


def test_absent_gradients_and_states_stand_for_zeros() -> None:
    problem = random_problem(Options("LSTM", bidirectional=True), d_states=True)
    zeros = replace(
        problem,
        hx=tuple(0 * s for s in problem.hx or ()),
        d=replace(problem.d, hx_n=(0 * problem.d.hx_n[0], problem.d.hx_n[1]), states=None),
    )
    absent = replace(zeros, hx=None, d=replace(zeros.d, hx_n=(None, zeros.d.hx_n[1])))
    assert_same(absent.solve(), zeros.solve())


# ---- Which rows run ------------------------------------------------------------------------------


def assert_same(actual: Solution, expected: Solution) -> None:
    for key, (quantity, value) in expected.named().items():
        assert_close(actual.named()[key][1], value, "float64", quantity, key)


@pytest.mark.parametrize("options", STACKS, ids=name)
def test_lengths_equal_each_sequence_alone(options: Options) -> None:
    problem = random_problem(options, layout="lengths-reset", d_states=True)
    whole = problem.solve()
    total = [np.zeros_like(w) for w in problem.weights]
    for b, length in enumerate(problem.rows["lengths"]):
        assert not whole.output[length:, b].any()
        assert not whole.d_input[length:, b].any()
        if length == 0:
            for last, first in zip(whole.hx_n, problem.hx or (), strict=True):
                np.testing.assert_array_equal(last[:, b], first[:, b])
            for d_first, d_last in zip(whole.d_hx, problem.d.hx_n or (), strict=True):
                np.testing.assert_array_equal(d_first[:, b], d_last[:, b])
            continue
        alone = only(problem, b).solve()
        total = [t + d for t, d in zip(total, alone.d_weights, strict=True)]
        assert_close(whole.output[:length, [b]], alone.output, "float64", "output")
        assert_close(whole.d_input[:length, [b]], alone.d_input, "float64", "d_input")
        for k in range(len(whole.hx_n)):
            assert_close(whole.hx_n[k][:, [b]], alone.hx_n[k], "float64", "output")
            assert_close(whole.d_hx[k][:, [b]], alone.d_hx[k], "float64", "d_input")
    for d_weight, expected in zip(whole.d_weights, total, strict=True):
        assert_close(d_weight, expected, "float64", "d_weight")


@pytest.mark.parametrize("options", STACKS, ids=name)
def test_packed_equals_lengths(options: Options) -> None:
    packed = random_problem(options, layout="packed", d_states=True)
    active = np.arange(packed.batch) < packed.rows["batch_sizes"][:, None]

    def pad(x: Array) -> Array:
        return reference._pad(x, active)

    d = packed.d
    assert d.output is not None
    assert d.states is not None
    padded = replace(
        packed,
        input=pad(packed.input),
        rows={"lengths": active.sum(axis=0)},
        d=replace(
            d,
            output=pad(d.output),
            states=reference.States(*(None if s is None else pad(s) for s in d.states)),
        ),
    )
    got, want = packed.solve(), padded.solve()
    assert_close(pad(got.output), want.output, "float64", "output")
    assert_close(pad(got.d_input), want.d_input, "float64", "d_input")
    assert_close(pad(got.states.h), want.states.h, "float64", "output")
    for key in set(got.named()) - {"output", "d_input", "states.h", "states.c"}:
        quantity, value = want.named()[key]
        assert_close(got.named()[key][1], value, "float64", quantity, key)


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("options", [o for o in STACKS if o.num_layers == 1 and o.bias], ids=name)
def test_reset_equals_each_episode_alone(options: Options, first_step: bool) -> None:
    """Three episodes in one sequence; the outer states belong to those processed first and last."""
    starts = [0, 2, 3, 7]
    reset = np.zeros((7, 2), np.bool_)
    reset[starts[1:-1]] = True
    reset[0] = first_step
    problem = random_problem(options, T=7, B=2, d_states=True)
    whole = replace(problem, rows={"reset": reset}).solve()

    total = [np.zeros_like(w) for w in problem.weights]
    for start, stop in pairwise(starts):
        alone = episode(problem, start, stop, first_step).solve()
        total = [t + d for t, d in zip(total, alone.d_weights, strict=True)]
        assert_close(whole.output[start:stop], alone.output, "float64", "output")
        assert_close(whole.d_input[start:stop], alone.d_input, "float64", "d_input")
        for k in range(len(whole.hx_n)):
            if stop == 7:  # the forward direction ends here, the backward one begins
                assert_close(whole.hx_n[k][0], alone.hx_n[k][0], "float64", "output")
                assert_close(whole.d_hx[k][1:], alone.d_hx[k][1:], "float64", "d_input")
            if start == 0:
                assert_close(whole.hx_n[k][1:], alone.hx_n[k][1:], "float64", "output")
                expected = np.zeros_like(alone.d_hx[k][0]) if first_step else alone.d_hx[k][0]
                assert_close(whole.d_hx[k][0], expected, "float64", "d_input")
    for d_weight, expected in zip(whole.d_weights, total, strict=True):
        assert_close(d_weight, expected, "float64", "d_weight")


def episode(problem: Problem, start: int, stop: int, zero_first: bool) -> Problem:
    """Steps start…stop alone; each direction takes hx only where it enters the whole sequence and
    gets a gradient of its last state only where it leaves it."""
    assert problem.hx
    assert problem.d.hx_n
    assert problem.d.states
    assert problem.d.output is not None
    ends = [start == 0 and not zero_first, stop == problem.steps]
    leaves = [stop == problem.steps, start == 0]
    D = len(problem.hx[0])
    d = problem.d
    return replace(
        problem,
        input=problem.input[start:stop],
        hx=tuple(s * np.reshape(ends[:D], (D, 1, 1)) for s in problem.hx),
        d=replace(
            d,
            output=d.output[start:stop],
            hx_n=tuple(s * np.reshape(leaves[:D], (D, 1, 1)) for s in d.hx_n),
            states=reference.States(*(None if s is None else s[:, start:stop] for s in d.states)),
        ),
    )


def test_states_hold_every_layer_and_end_in_hx_n() -> None:
    problem = random_problem(Options("LSTM", num_layers=2, bidirectional=True, proj_size=3))
    result = problem.solve()
    np.testing.assert_array_equal(result.states.h[-1], result.output)
    for states, last in zip(result.states, result.hx_n, strict=True):
        size = last.shape[-1]
        np.testing.assert_array_equal(states[:, -1, :, :size], last[0::2])
        np.testing.assert_array_equal(states[:, 0, :, size:], last[1::2])


# ---- Arguments -----------------------------------------------------------------------------------


def test_a_wrong_number_of_weights_is_refused() -> None:
    problem = random_problem(Options("GRU", num_layers=2))
    with pytest.raises(ValueError, match=r"weights must hold 8 arrays.*got 7"):
        replace(problem, weights=problem.weights[:-1]).solve()


@pytest.mark.parametrize("key", ["lengths", "reset"])
def test_packed_data_takes_neither_lengths_nor_reset(key: str) -> None:
    problem = random_problem(Options("RNN"), layout="packed")
    with pytest.raises(ValueError, match="batch_sizes cannot be combined"):
        replace(problem, rows={**problem.rows, key: np.ones(5, np.int64)}).solve()


def test_reset_of_another_shape_is_refused() -> None:
    problem = random_problem(Options("RNN"))
    with pytest.raises(ValueError, match=r"reset must have shape \(6, 5\), got \(5, 6\)"):
        replace(problem, rows={"reset": np.zeros((5, 6), np.bool_)}).solve()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("cell", "lstm"),
        ("num_layers", 0),
        ("proj_size", -1),
        ("activation", "gelu"),
        ("gate_activation", "tanh"),
    ],
)
def test_options_name_the_argument_they_refuse(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        Options(**{"cell": "LSTM", argument: value})


@pytest.mark.parametrize("cell", ["RNN", "GRU"])
def test_projection_belongs_to_the_lstm(cell: str) -> None:
    with pytest.raises(ValueError, match="proj_size is only supported for LSTM"):
        Options(cell, proj_size=2)


# ---- A cell of one's own -------------------------------------------------------------------------


def minimal_gated_unit(x, state, p, options, masks):
    """f = sigmoid(W_f x + U_f h'), n = tanh(W_n x + U_n (f h')), h = (1 - f) h' + f n.

    (Zhou et al. 2016)
    """
    (h_prev,) = state
    (w_f, w_n), (u_f, u_n) = np.split(p.weight_ih, 2), np.split(p.weight_hh, 2)
    f = reference.SIGMOID.value(x @ w_f.T + h_prev @ u_f.T)
    n = np.tanh(x @ w_n.T + (f * h_prev) @ u_n.T)
    return ((1 - f) * h_prev + f * n,), (x, h_prev, f, n)


def minimal_gated_unit_backward(d_state, saved, p, options, masks):
    x, h_prev, f, n = saved
    (d_h,) = d_state
    u_f, u_n = np.split(p.weight_hh, 2)
    d_n = d_h * f * (1 - n * n)
    d_fh = d_n @ u_n
    d_f = (d_h * (n - h_prev) + d_fh * h_prev) * f * (1 - f)
    d_a = np.concatenate([d_f, d_n], axis=1)
    d_weight_hh = np.concatenate([d_f.T @ h_prev, d_n.T @ (f * h_prev)])
    d_h_prev = d_h * (1 - f) + d_fh * f + d_f @ u_f
    zeros = np.zeros(len(p.weight_ih))
    return d_a @ p.weight_ih, (d_h_prev,), Parameters(d_a.T @ x, d_weight_hh, zeros, zeros)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_cell_is_one_pair_of_functions(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(minimal_gated_unit, minimal_gated_unit_backward, gates=2, states=1)
    monkeypatch.setitem(reference.CELLS, "MGU", cell)
    monkeypatch.setitem(GATES, "MGU", cell.gates)
    options = Options("RNN", num_layers=2, bidirectional=True, bias=False)
    object.__setattr__(options, "cell", "MGU")  # the name is in the tables alone
    check_gradients(random_problem(options, hidden_size=3, layout=layout, d_states=True))


# ---- The worked examples of the documentation ----------------------------------------------------


def table(label: str) -> list[list[str]]:
    """The rows of the first table after `(label)=` in the maths page, without its head."""
    text = MATHS.read_text(encoding="utf-8")
    lines = text[text.index(f"({label})=") :].splitlines()
    rows = dropwhile(lambda line: not line.startswith("|"), lines)
    cells = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in takewhile(lambda line: line.startswith("|"), rows)
    ]
    return cells[2:]


def numbers(cell: str) -> list[float]:
    """The numbers in a cell, in order."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", cell)]


def assert_sum(cell: str) -> None:
    """`a + b + c = d`, each rounded to as many decimals as it shows."""
    terms, total = cell.split("=")
    assert sum(numbers(terms)) == pytest.approx(numbers(total)[0], abs=1e-9), cell


def scalar_rnn(bias: float) -> Solution:
    """The sigmoid RNN over 1, 2, 3, 4, and the gradient of its last output."""
    one, x = np.ones((1, 1)), np.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    weights = [one, one, np.array([1.0]), np.array([bias - 1.0])]
    d = Gradients(None, (np.ones((1, 1, 1)),))
    return Problem(Options("RNN", activation="sigmoid"), x, None, weights, d).solve()


def test_the_sigmoid_example_of_the_maths_page_is_right() -> None:
    h = scalar_rnn(bias=1.0).output.ravel()
    rows = table("sigmoid-example-forward")
    assert len(rows) == 4
    for t, (step, x, a, shown) in enumerate(rows):
        assert (numbers(step), numbers(x)) == ([t + 1], [t + 1])
        assert_sum(a)
        before = h[t - 1] if t else 0.0
        assert numbers(a)[:3] == pytest.approx([t + 1, before, 1], abs=6e-7)
        assert numbers(shown) == pytest.approx([h[t]], abs=6e-7)


def test_the_sigmoid_example_with_both_biases_one_is_right() -> None:
    shown = [numbers(row[1])[0] for row in table("sigmoid-example-two-biases")]
    assert shown == pytest.approx(scalar_rnn(bias=2.0).output.ravel(), abs=6e-7)


def test_the_gradients_of_the_sigmoid_example_are_right() -> None:
    solution = scalar_rnn(bias=1.0)
    h = solution.output.ravel()
    rows = table("sigmoid-example-backward")
    assert [numbers(row[0])[0] for row in rows] == [4, 3, 2, 1]
    d_h, d_w_ih, d_w_hh, d_b = 1.0, 0.0, 0.0, 0.0
    for t, row in zip((3, 2, 1, 0), rows, strict=True):
        slope = h[t] * (1 - h[t])
        shown_d_h, shown_slope, shown_d_a = (numbers(cell)[0] for cell in row[1:])
        assert shown_d_h == pytest.approx(d_h, rel=1e-4)
        assert shown_slope == pytest.approx(slope, rel=1e-4)
        assert shown_d_a == pytest.approx(d_h * slope, rel=1e-4)
        d_h *= slope
        d_w_ih += d_h * (t + 1)
        d_w_hh += d_h * (h[t - 1] if t else 0.0)
        d_b += d_h
    assert [d.item() for d in solution.d_weights[:3]] == pytest.approx([d_w_ih, d_w_hh, d_b])
    shown = [numbers(row[1])[-1] for row in table("sigmoid-example-gradients")]
    assert shown == pytest.approx([d_w_ih, d_w_hh, d_b], abs=6e-7)


def test_the_relu_example_of_the_maths_page_is_right() -> None:
    given = {row[0].strip("$"): numbers(row[1]) for row in table("relu-example")}
    matrix = {key: np.reshape(value, (2, 2)) for key, value in given.items() if len(value) == 4}
    x = np.array([given["x_1"], given["x_2"]]).reshape(2, 1, 2)
    weights = [matrix["W_{ih}"], matrix["W_{hh}"], np.array(given["b"]), np.zeros(2)]
    d = Gradients(None, (np.ones((1, 1, 2)),))
    options = Options("RNN", activation="relu")
    solution = Problem(options, x, None, weights, d).solve()
    shown = {row[0].strip("$"): numbers(row[-1]) for row in table("relu-example-steps")}
    h = solution.output.reshape(2, 2)
    d_input = solution.d_input.reshape(2, 2)
    expected = {
        "h_1": h[0],
        "h_2": h[1],
        "d W_{ih}": solution.d_weights[0].ravel(),
        "d W_{hh}": solution.d_weights[1].ravel(),
        "d b": solution.d_weights[2],
        "d x_1": d_input[0],
        "d x_2": d_input[1],
    }
    for key, value in expected.items():
        assert shown[key] == list(value), key
    before_relu = x.reshape(2, 2) @ weights[0].T + [[0, 0], h[0]] @ weights[1].T + weights[2]
    assert [shown["a_1"], shown["a_2"]] == before_relu.tolist()
