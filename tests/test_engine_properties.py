"""The engine against the reference over random shapes and options."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cases import LAYOUTS
from engine import check_against_reference
from fastrnn import reference
from fastrnn.reference import Options
from problems import Problem, random_problem


@st.composite
def stacks(draw: st.DrawFn, hidden_size: int) -> Options:
    cell = draw(st.sampled_from(["RNN", "LSTM", "GRU"]))
    return Options(
        cell,  # type: ignore[arg-type]
        num_layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        proj_size=draw(st.integers(0, hidden_size)) if cell == "LSTM" else 0,
        activation=draw(st.sampled_from(list(reference.ACTIVATIONS))),
        gate_activation=draw(st.sampled_from(list(reference.GATE_ACTIVATIONS))),
        reset_after=draw(st.booleans()),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    hidden_size = draw(st.integers(1, 70))
    options = draw(stacks(hidden_size))
    return random_problem(
        options,
        T=draw(st.integers(1, 12)),
        B=draw(st.integers(1, 20)),
        input_size=draw(st.integers(1, 40)),
        hidden_size=hidden_size,
        layout=draw(st.sampled_from(LAYOUTS)),
        hx=draw(st.booleans()),
        d_states=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(), threads=st.sampled_from([1, 2]))
def test_random_problems_match_the_reference_in_float64(problem: Problem, threads: int) -> None:
    check_against_reference(problem, "float64", threads=threads)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_random_smooth_problems_match_the_reference(problem: Problem, dtype: str) -> None:
    """Functions whose derivative jumps are left to float64, whose rounding hardly meets a jump."""
    smooth = replace(problem.options, activation="tanh", gate_activation="sigmoid")
    check_against_reference(replace(problem, options=smooth), dtype)
