"""The options in the reference: finite differences, sequences run piece by piece, special cases."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cases import ALONE, EXTRAS, PAIRS, Case
from differences import check_gradients
from fastrnn import reference
from fastrnn.reference import Options, States
from problems import Array, Gradients, Problem, Solution, only, problem_of, random_problem
from tolerances import assert_close

every_case = pytest.mark.parametrize("case", [*ALONE, *PAIRS], ids=str)


def full_problem(case: Case, **changes: Any) -> Problem:
    """A small problem that sends a gradient into everything."""
    sizes = {"T": 4, "B": 4, "input_size": 2, "hidden_size": 6}
    return problem_of(case, **{"d_states": True, **sizes, **changes})


def assert_same(actual: Solution, expected: Solution) -> None:
    for key, (quantity, value) in expected.named().items():
        assert_close(actual.named()[key][1], value, "float64", quantity, key)


# ---- Gradients -----------------------------------------------------------------------------------


@every_case
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    """But for the clamp, which is no derivative."""
    check_gradients(full_problem(case._replace(options=replace(case.options, grad_clip=0.0))))


def test_a_wide_clamp_changes_nothing(cell: Any) -> None:
    problem = full_problem(Case(Options(cell, num_layers=2, bidirectional=True)))
    wide = replace(problem, options=replace(problem.options, grad_clip=1e6))
    assert_same(wide.solve(), problem.solve())


def test_the_whole_gradient_of_each_state_is_clamped() -> None:
    """h = x + w h' with w = 2: of each step min(own + 2 · that of the next, 0.5)."""
    x, one = np.ones((4, 1, 1)), np.ones((1, 1))
    options = Options("RNN", bias=False, activation="identity", grad_clip=0.5)
    d_output = np.array([0.3, -4.0, 0.1, 0.05]).reshape(4, 1, 1)
    d = Gradients(d_output, (np.full((1, 1, 1), 0.1),))
    solution = Problem(options, x, (np.zeros((1, 1, 1)),), [one, 2 * one], d).solve()
    #        0.05 + 0.1;  0.1 + 0.3;  -4 + 0.8, clamped;  0.3 - 1.0, clamped
    expected = [-0.5, -0.5, 0.4, 0.15]
    assert solution.d_input.ravel() == pytest.approx(expected)
    assert solution.d_hx[0].item() == pytest.approx(-1.0)  # that of the initial state is not


def test_the_gradient_of_c_is_clamped_with_the_part_through_h() -> None:
    """All gates 1/2 and g = 0: c = c'/2, h = c/2; the gradient of c is 1/2 d_h + d_c."""
    options = Options("LSTM", bias=False, activation="identity", grad_clip=1.0)
    weights = [np.zeros((4, 1)), np.zeros((4, 1))]
    hx = (np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
    d_hx_n = (np.full((1, 1, 1), 0.8), np.full((1, 1, 1), 0.9))
    problem = Problem(options, np.ones((1, 1, 1)), hx, weights, Gradients(None, d_hx_n))
    assert problem.solve().d_hx[1].item() == pytest.approx(0.5)  # (0.4 + 0.9 → 1) / 2
    zoned = replace(problem, options=replace(options, zoneout_c=0.5))
    # c after zoneout: 0.9; c before it: 0.9 / 2 + 0.4; c': 0.9 / 2 + (that) / 2
    assert zoned.solve().d_hx[1].item() == pytest.approx(0.45 + 0.85 / 2)


# ---- Piece by piece ------------------------------------------------------------------------------


@every_case
def test_lengths_equal_each_sequence_alone(case: Case) -> None:
    problem = full_problem(case, layout="lengths-reset")
    whole = problem.solve()
    total = [np.zeros_like(d) for d in (*whole.d_weights, *whole.d_reset)]
    for b, length in enumerate(problem.rows["lengths"]):
        assert not whole.output[length:, b].any()
        assert not whole.d_input[length:, b].any()
        if length == 0:
            for last, first in zip(whole.hx_n, problem.hx or (), strict=True):
                np.testing.assert_array_equal(last[:, b], first[:, b])
            continue
        alone = only(problem, b).solve()
        total = [t + d for t, d in zip(total, (*alone.d_weights, *alone.d_reset), strict=True)]
        assert_close(whole.output[:length, [b]], alone.output, "float64", "output")
        assert_close(whole.d_input[:length, [b]], alone.d_input, "float64", "d_input")
        for k in range(len(whole.hx_n)):
            assert_close(whole.hx_n[k][:, [b]], alone.hx_n[k], "float64", "output")
            assert_close(whole.d_hx[k][:, [b]], alone.d_hx[k], "float64", "d_input")
    for d, expected in zip((*whole.d_weights, *whole.d_reset), total, strict=True):
        assert_close(d, expected, "float64", "d_weight")


@every_case
def test_packed_equals_lengths(case: Case) -> None:
    packed = full_problem(case, layout="packed")
    active = np.arange(packed.batch) < packed.rows["batch_sizes"][:, None]

    def pad(x: Any) -> Any:
        return None if x is None else reference._pad(x, active)

    d, extras = packed.d, dict(packed.extras)
    if "zoneout_mask" in extras:
        extras["zoneout_mask"] = tuple(map(pad, extras["zoneout_mask"]))
    states = None if d.states is None else States(*map(pad, d.states))
    padded = replace(
        packed,
        input=pad(packed.input),
        rows={"lengths": active.sum(axis=0)},
        d=replace(d, output=pad(d.output), states=states),
        extras=extras,
    )
    got, want = packed.solve().named(), padded.solve().named()
    assert got.keys() == want.keys()
    for key, (quantity, value) in want.items():
        mine = got[key][1]
        mine = pad(mine) if key in ("output", "d_input", "states.h", "states.c") else mine
        assert_close(mine, value, "float64", quantity, key)


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_reset_equals_each_episode_alone(case: Case, first_step: bool) -> None:
    """Three episodes in one sequence, each begun with the state after a reset where it is not the
    one that a direction begins with."""
    options = replace(case.options, num_layers=1)
    starts = [0, 2, 3, 7]
    reset = np.zeros((7, 2), np.bool_)
    reset[starts[1:-1]] = True
    reset[0] = first_step
    extras = ("reset_hx", *case.extras)
    problem = random_problem(options, T=7, B=2, hidden_size=6, d_states=True, extras=extras)
    whole = replace(problem, rows={"reset": reset}).solve()

    total = [np.zeros_like(w) for w in problem.weights]
    d_reset = [np.zeros_like(d) for d in whole.d_reset]
    for start, stop in pairwise(starts):
        alone = episode(problem, start, stop, first_step).solve()
        total = [t + d for t, d in zip(total, alone.d_weights, strict=True)]
        assert_close(whole.output[start:stop], alone.output, "float64", "output")
        assert_close(whole.d_input[start:stop], alone.d_input, "float64", "d_input")
        begins = (start == 0 and not first_step, stop == 7)  # with the state that was given
        ends = (stop == 7, start == 0)
        for k, d_anew in enumerate(d_reset):
            for direction in range(2):
                mine, theirs = whole.d_hx[k][direction], alone.d_hx[k][direction]
                if begins[direction]:
                    assert_close(mine, theirs, "float64", "d_input")
                else:
                    d_anew[direction] += theirs.sum(axis=0)
                if ends[direction]:
                    mine, theirs = whole.hx_n[k][direction], alone.hx_n[k][direction]
                    assert_close(mine, theirs, "float64", "output")
            if first_step:
                assert not whole.d_hx[k][0].any()
    for d, expected in zip((*whole.d_weights, *whole.d_reset), (*total, *d_reset), strict=True):
        assert_close(d, expected, "float64", "d_weight")


def episode(problem: Problem, start: int, stop: int, anew_first: bool) -> Problem:
    """Steps start…stop alone, both directions."""
    assert problem.hx
    assert problem.d.hx_n
    assert problem.d.states
    assert problem.d.output is not None
    begins = np.reshape([start == 0 and not anew_first, stop == problem.steps], (2, 1, 1))
    ends = np.reshape([stop == problem.steps, start == 0], (2, 1, 1))
    anew = [s[:, None] for s in problem.extras["reset_hx"]]
    hx = tuple(np.where(begins, s, n) for s, n in zip(problem.hx, anew, strict=True))
    extras = {key: value for key, value in problem.extras.items() if key != "reset_hx"}
    if "zoneout_mask" in extras:
        keep = extras["zoneout_mask"]
        extras["zoneout_mask"] = tuple(None if k is None else k[:, start:stop] for k in keep)
    d = problem.d
    d = replace(
        d,
        output=d.output[start:stop],
        hx_n=tuple(s * ends for s in d.hx_n),
        states=States(*(None if s is None else s[:, start:stop] for s in d.states)),
    )
    return replace(problem, input=problem.input[start:stop], hx=hx, d=d, extras=extras)


# ---- Special cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("reset_after", [True, False])
def test_heads_are_layers_side_by_side(cell: Any, reset_after: bool) -> None:
    """Each head with its rows of the other weights is a layer of H / heads units by itself."""
    options = Options(cell, heads=2, reset_after=reset_after)
    problem = random_problem(options, hidden_size=6, input_size=3)
    whole = problem.run()
    gates = reference.CELLS[cell].gates
    for k in range(2):
        rows = np.arange(gates * 6).reshape(gates, 2, 3)[:, k].ravel()
        weight_ih, weight_hh, *biases = problem.weights
        weights = [weight_ih[rows], weight_hh[k], *(b[rows] for b in biases)]
        units = slice(3 * k, 3 * k + 3)
        alone = reference.forward(
            replace(options, heads=1),
            problem.input,
            tuple(s[..., units] for s in problem.hx or ()),
            weights,
        )
        assert_close(whole.output[..., units], alone.output, "float64", "output")
        for both, one in zip(whole.hx_n, alone.hx_n, strict=True):
            assert_close(both[..., units], one, "float64", "output")


def test_block_diagonal_and_back() -> None:
    blocks = np.random.default_rng(0).normal(size=(3, 8, 5))
    whole = reference.block_diagonal(blocks, gates=4)
    assert whole.shape == (24, 15)
    np.testing.assert_array_equal(reference.diagonal_blocks(whole, gates=4, heads=3), blocks)
    assert np.count_nonzero(whole) == blocks.size


def test_zoneout_of_every_unit_keeps_the_state_and_of_none_changes_nothing(cell: Any) -> None:
    case = Case(Options(cell), "padded", ("zoneout_h", "zoneout_c"))
    problem = full_problem(case)
    for keep in (True, False):
        masks = tuple(np.full_like(m, keep) for m in problem.extras["zoneout_mask"])
        got = replace(problem, extras={"zoneout_mask": masks}).run()
        plain = replace(problem, extras={}).run()
        for k, (last, first) in enumerate(zip(got.hx_n, problem.hx or (), strict=True)):
            np.testing.assert_array_equal(last, first if keep else plain.hx_n[k])


def test_zoneout_without_a_mask_is_the_expectation(cell: Any) -> None:
    problem = full_problem(Case(Options(cell), "padded"), T=1)
    zoneout_c = 0.6 if cell == "LSTM" else 0.0
    options = replace(problem.options, zoneout_h=0.3, zoneout_c=zoneout_c)
    got, plain = replace(problem, options=options).run(), problem.run()
    for p, new, old, mixed in zip(
        (0.3, zoneout_c), plain.hx_n, problem.hx or (), got.hx_n, strict=False
    ):
        assert_close(mixed, p * old + (1 - p) * new, "float64", "output")


def test_recurrent_dropout_of_every_unit_equals_zero_recurrent_weights() -> None:
    problem = full_problem(Case(Options("RNN"), "padded", ("dropout",)))
    mask = np.zeros_like(problem.extras["dropout_mask"])
    got = replace(problem, extras={"dropout_mask": mask}).run()
    weights = [problem.weights[0], 0 * problem.weights[1], *problem.weights[2:]]
    without = replace(problem, extras={}, weights=weights).run()
    np.testing.assert_array_equal(got.output, without.output)


def layer_normed(a: Array, gain: Array, bias: Array) -> Array:
    centred = a - a.mean()
    return gain * centred / np.sqrt((centred**2).mean() + 1e-5) + bias


@pytest.mark.parametrize("reset_after", [True, False])
def test_layer_norm_of_one_step_of_the_gru(reset_after: bool) -> None:
    """n = tanh(a_n + r b_n) with both sides normalised; one row, written out."""
    options = Options("GRU", layer_norm=True, reset_after=reset_after)
    problem = random_problem(options, T=1, B=1, input_size=2, hidden_size=3)
    w_ih, w_hh, b_ih, b_hh, g_ih, g_hh = problem.weights
    x, h = problem.input[0, 0], (problem.hx or ())[0][0, 0]
    a_r, a_z, a_n = np.split(layer_normed(w_ih @ x, g_ih, b_ih), 3)
    sigmoid = reference.SIGMOID.value
    if reset_after:
        b_r, b_z, b_n = np.split(layer_normed(w_hh @ h, g_hh, b_hh), 3)
        r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
        n = np.tanh(a_n + r * b_n)
    else:
        b_r, b_z = np.split(layer_normed(w_hh[:6] @ h, g_hh[:6], b_hh[:6]), 2)
        r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
        n = np.tanh(a_n + layer_normed(w_hh[6:] @ (r * h), g_hh[6:], b_hh[6:]))
    assert_close(problem.run().output[0, 0], (1 - z) * n + z * h, "float64", "output")


def test_layer_norm_and_peepholes_of_one_step_of_the_lstm() -> None:
    options = Options("LSTM", layer_norm=True, peephole=True)
    problem = random_problem(options, T=1, B=1, input_size=2, hidden_size=3)
    w_ih, w_hh, b_ih, b_hh, w_ci, w_cf, w_co, g_ih, g_hh, g_c, b_c = problem.weights
    x, (h, c) = problem.input[0, 0], (s[0, 0] for s in problem.hx or ())
    a = layer_normed(w_ih @ x, g_ih, b_ih) + layer_normed(w_hh @ h, g_hh, b_hh)
    a_i, a_f, a_g, a_o = np.split(a, 4)
    sigmoid = reference.SIGMOID.value
    new = sigmoid(a_f + w_cf * c) * c + sigmoid(a_i + w_ci * c) * np.tanh(a_g)
    out = sigmoid(a_o + w_co * new) * np.tanh(layer_normed(new, g_c, b_c))
    result = problem.run()
    assert_close(result.output[0, 0], out, "float64", "output")
    assert_close(result.hx_n[1][0, 0], new, "float64", "output")


def test_the_extras_are_listed() -> None:
    """Each of them is in some case, so that the tests above are about all of them."""
    assert {name for case in ALONE for name in case.extras} == set(EXTRAS)
