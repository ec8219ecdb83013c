"""The options in the engine: equal to the reference, and as repeatable as the plain layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cases import ALONE, EXTRAS, PAIRS, Case
from engine import (
    EngineCall,
    assert_bitwise,
    assert_solutions_bitwise,
    check_against_reference,
    run_engine,
    to_float64,
)
from fastrnn.reference import Options
from problems import Problem, only, problem_of, random_problem

alone = pytest.mark.parametrize("case", ALONE, ids=str)


def full_problem(case: Case, **changes: Any) -> Problem:
    """A problem that sends a gradient into everything."""
    return problem_of(case, **{"hidden_size": 20, "d_states": True, **changes})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [*ALONE, *PAIRS], ids=str)
def test_matches_the_reference(case: Case, dtype: str) -> None:
    check_against_reference(full_problem(case), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@alone
def test_half_types_match_the_reference(case: Case, dtype: str) -> None:
    check_against_reference(full_problem(case), dtype)


@pytest.mark.parametrize("sizes", [(3, 40, 24, 100), (5, 1, 3, 130), (2, 3, 70, 260)])
@alone
def test_larger_sizes_match_the_reference(case: Case, sizes: tuple[int, ...]) -> None:
    T, B, input_size, hidden_size = sizes
    problem = full_problem(case, T=T, B=B, input_size=input_size, hidden_size=hidden_size)
    check_against_reference(problem, "float64", threads=2)


@pytest.mark.parametrize("layout", ["padded", "lengths", "packed", "reset", "lengths-reset"])
def test_everything_at_once(cell: Any, layout: str) -> None:
    own: dict[str, Any] = {"peephole": True, "zoneout_c": 0.2} if cell == "LSTM" else {}
    options = Options(
        cell,
        num_layers=2,
        bidirectional=True,
        layer_norm=True,
        heads=4,
        zoneout_h=0.3,
        grad_clip=0.5,
        recompute=True,
        **own,
    )
    check_against_reference(full_problem(Case(options, layout, EXTRAS)), "float64")


def test_one_head_for_each_unit(cell: Any) -> None:
    """The recurrence of Li et al. (2018): every unit sees itself alone."""
    options = Options(cell, heads=20, bidirectional=True)
    check_against_reference(full_problem(Case(options, "padded")), "float64")


# ---- The same bits -------------------------------------------------------------------------------


@alone
def test_the_same_bits_twice_and_on_any_number_of_threads(case: Case) -> None:
    problem = full_problem(case, B=9)
    first = run_engine(problem)
    for threads in (1, 2, 4):
        assert_solutions_bitwise(run_engine(problem, threads=threads), first)


@alone
def test_a_row_is_the_same_bits_in_any_batch(case: Case) -> None:
    problem = full_problem(case, layout="reset", B=7)
    call = EngineCall(problem)
    call.forward(save=False)
    hidden, h_n = to_float64(call.hidden), to_float64(call.h_n)
    for b in (0, 4):
        one = EngineCall(only(problem, b))
        one.forward(save=False)
        assert_bitwise(to_float64(one.hidden)[..., 0, :], hidden[..., b, :], "hidden")
        assert_bitwise(to_float64(one.h_n)[:, 0], h_n[:, b], "h_n")


@pytest.mark.parametrize(
    "case", [c for c in ALONE if c.options.cell != "GRU" or c.options.reset_after], ids=str
)
def test_a_sequence_in_pieces_is_the_same_bits(case: Case) -> None:
    options = replace(case.options, num_layers=1, bidirectional=False)
    whole = random_problem(options, T=6, hidden_size=20, extras=case.extras)
    call = EngineCall(whole)
    call.forward(save=False)
    hx = whole.hx
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        extras = dict(whole.extras)
        if "zoneout_mask" in extras:
            keep = extras["zoneout_mask"]
            extras["zoneout_mask"] = tuple(None if k is None else k[:, start:stop] for k in keep)
        piece = EngineCall(replace(whole, input=whole.input[start:stop], hx=hx, extras=extras))
        piece.forward(save=False)
        assert_bitwise(to_float64(piece.hidden), to_float64(call.hidden)[:, start:stop], "hidden")
        hx = tuple(to_float64(s) for s in (piece.h_n, piece.c_n) if s is not None)
    assert_bitwise(to_float64(piece.h_n), to_float64(call.h_n), "h_n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputing_changes_no_bit_of_the_forward_pass(cell: Any, dtype: str) -> None:
    problem = full_problem(Case(Options(cell, num_layers=2, bidirectional=True)))
    again = replace(problem, options=replace(problem.options, recompute=True))
    plain, mine = run_engine(problem, dtype), run_engine(again, dtype)
    gradients = [name for name in plain.named() if name.startswith("d_")]
    assert_solutions_bitwise(mine, plain, leave_out=gradients)


def test_gradients_that_are_not_wanted_are_left_out() -> None:
    options = Options("LSTM", bidirectional=True, peephole=True, layer_norm=True, heads=2)
    problem = full_problem(Case(options, extras=("reset_hx",)))
    expected = run_engine(problem, "float64").named()
    for name in expected:
        if not name.startswith("d_"):
            continue
        call = EngineCall(problem, "float64")
        call.forward()
        call.backward(wanted=lambda key, name=name: key == name)
        found = {
            "d_input": call.d_input,
            "d_h0": call.d_h0,
            "d_c0": call.d_c0,
            **{f"d_weights[{k}]": d for k, d in enumerate(call.d_weights)},
            **dict(zip(("d_reset_h", "d_reset_c"), call.d_reset, strict=True)),
        }
        assert [key for key, d in found.items() if d is not None] == [name]
        np.testing.assert_array_equal(found[name], expected[name][1])
