"""The promises about bits: repeatable, and independent of batch, threads and chunks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import (
    DTYPES,
    EngineCall,
    assert_bitwise,
    assert_solutions_bitwise,
    run_engine,
    to_float64,
)
from fastrnn.reference import Options, States
from problems import Problem, only, random_problem

SIZES = (1, 3, 16, 17, 33, 64, 100)
STACKS = [
    Options("RNN", 2, True),
    Options("LSTM", 2, True),
    Options("LSTM", 1, True, proj_size=1),
    Options("GRU", 2, True),
    Options("GRU", 1, True, reset_after=False),
]


def name(options: Options) -> str:
    return f"{options.cell} {options.num_layers} {options.proj_size} {options.reset_after}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_twice_the_same(options: Options, dtype: str) -> None:
    problem = random_problem(options, T=9, B=13, hidden_size=64, layout="lengths", d_states=True)
    for threads in (1, 2):
        first = run_engine(problem, dtype, threads=threads)
        assert_solutions_bitwise(run_engine(problem, dtype, threads=threads), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_a_row_alone_equals_the_row_in_a_batch(
    options: Options, hidden_size: int, dtype: str
) -> None:
    problem = random_problem(
        options, B=13, hidden_size=hidden_size, layout="lengths-reset", d_states=True
    )
    whole = run_engine(problem, dtype)
    for b in (0, 2, 7, 12):
        length = problem.rows["lengths"][b]
        if length:
            alone = run_engine(only(problem, b), dtype)
            assert_rows_bitwise(alone, whole, np.s_[:length, [b]], [b])


@pytest.mark.parametrize("batch", [2, 5, 6, 8, 12])
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_a_part_of_a_batch_equals_the_rows_in_the_batch(options: Options, batch: int) -> None:
    problem = random_problem(options, B=13, hidden_size=33)
    whole = run_engine(problem)
    part = run_engine(first_rows(problem, batch))
    assert_rows_bitwise(part, whole, np.s_[:, :batch], np.s_[:batch])


def assert_rows_bitwise(part: Any, whole: Any, where: Any, rows: Any) -> None:
    assert_bitwise(part.output, whole.output[where], "output")
    assert_bitwise(part.d_input, whole.d_input[where], "d_input")
    for k in range(len(whole.hx_n)):
        assert_bitwise(part.hx_n[k], whole.hx_n[k][:, rows], f"hx_n[{k}]")
        assert_bitwise(part.d_hx[k], whole.d_hx[k][:, rows], f"d_hx[{k}]")


def first_rows(problem: Problem, batch: int) -> Problem:
    d = problem.d
    return replace(
        problem,
        input=problem.input[:, :batch],
        hx=tuple(s[:, :batch] for s in problem.hx or ()),
        d=replace(d, output=d.output[:, :batch], hx_n=tuple(s[:, :batch] for s in d.hx_n or ())),
    )


@pytest.mark.parametrize("options", STACKS, ids=name)
def test_packed_equals_lengths(options: Options) -> None:
    packed = random_problem(options, B=13, hidden_size=33, layout="packed")
    active = np.arange(13) < packed.rows["batch_sizes"][:, None]
    padded_input, d_output = np.zeros((6, 13, 5)), np.zeros((6, 13, packed.d.output.shape[-1]))
    padded_input[active], d_output[active] = packed.input, packed.d.output
    padded = replace(
        packed,
        input=padded_input,
        d=replace(packed.d, output=d_output),
        rows={"lengths": active.sum(axis=0)},
    )
    got, want = run_engine(packed), run_engine(padded)
    assert_bitwise(got.output, want.output[active], "output")
    assert_bitwise(got.d_input, want.d_input[active], "d_input")
    for k in range(len(got.hx_n)):
        assert_bitwise(got.hx_n[k], want.hx_n[k], f"hx_n[{k}]")
        assert_bitwise(got.d_hx[k], want.d_hx[k], f"d_hx[{k}]")


SHARED = pytest.mark.parametrize(
    ("threads", "bidirectional", "batch", "hidden_size"),
    [
        pytest.param(2, False, 40, 100, id="rows"),
        pytest.param(2, False, 3, 430, id="units"),
        pytest.param(2, True, 5, 130, id="directions"),
        pytest.param(4, True, 40, 100, id="directions and rows"),
        pytest.param(4, True, 3, 430, id="directions and units"),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES)
@SHARED
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_many_threads_equal_one(
    options: Options, threads: int, bidirectional: bool, batch: int, hidden_size: int, dtype: str
) -> None:
    """Named by what there is enough of to be shared out."""
    options = replace(
        options, bidirectional=bidirectional, proj_size=hidden_size // 2 if options.proj_size else 0
    )
    layout = "lengths" if batch > 5 else "padded"
    problem = random_problem(options, T=10, B=batch, hidden_size=hidden_size, layout=layout)
    many, one = (run_engine(problem, dtype, threads=count) for count in (threads, 1))
    assert_solutions_bitwise(many, one)


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="no list of this process's threads here")
@SHARED
def test_threads_are_used(threads: int, bidirectional: bool, batch: int, hidden_size: int) -> None:
    """That what the test above compares did run on so many, even for the cell of the least work."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engine import run_engine
from fastrnn.reference import Options
from problems import random_problem
options = Options("RNN", 1, {bidirectional})
problem = random_problem(options, T=10, B={batch}, hidden_size={hidden_size})
before = len(os.listdir({str(TASKS)!r}))
run_engine(problem, "float32", threads={threads})
print(len(os.listdir({str(TASKS)!r})) - before + 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) == threads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_chunks_equal_the_whole_sequence(options: Options, hidden_size: int, dtype: str) -> None:
    """Each chunk from the state where the one before it ended, and backward likewise."""
    options = replace(options, bidirectional=False)
    problem = random_problem(options, T=40, B=3, hidden_size=hidden_size)
    whole = run_engine(problem, dtype)
    cuts = [0, 1, 4, 23, 40]
    calls, hx = [], problem.hx
    for start, stop in pairwise(cuts):
        chunk = replace(problem, input=problem.input[start:stop], hx=hx)
        calls.append(EngineCall(chunk, dtype))
        calls[-1].forward()
        hx = tuple(to_float64(s) for s in (calls[-1].h_n, calls[-1].c_n) if s is not None)
    d_hx_n = problem.d.hx_n
    for call, start, stop in zip(calls[::-1], cuts[-2::-1], cuts[:0:-1], strict=True):
        d = replace(problem.d, output=problem.d.output[start:stop], hx_n=d_hx_n)
        call.problem = replace(call.problem, d=d)
        call.backward()
        part = call.solution()
        d_hx_n = part.d_hx
        assert_bitwise(part.output, whole.output[start:stop], "output")
        assert_bitwise(part.d_input, whole.d_input[start:stop], "d_input")
    for k, (last, first) in enumerate(zip(hx, d_hx_n, strict=True)):
        assert_bitwise(last, whole.hx_n[k], f"hx_n[{k}]")
        assert_bitwise(first, whole.d_hx[k], f"d_hx[{k}]")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", STACKS, ids=name)
def test_gradients_in_the_place_of_the_gates(options: Options, dtype: str) -> None:
    problem = random_problem(options, B=7, hidden_size=24, layout="lengths")
    call = EngineCall(problem, dtype)
    call.forward()
    call.backward()
    kept, before = call.solution(), to_float64(call.saved)
    call.backward()  # the gates are still forward's
    assert_solutions_bitwise(call.solution(), kept)
    call.backward(consume_saved=True)
    assert_solutions_bitwise(call.solution(), kept)
    assert np.any(to_float64(call.saved) != before)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_full_lengths_and_no_resets_equal_plain_padding(cell: Any) -> None:
    problem = random_problem(Options(cell, 2, True), B=7)
    rows = {"lengths": np.full(7, 6), "reset": np.zeros((6, 7), np.bool_)}
    assert_solutions_bitwise(run_engine(replace(problem, rows=rows)), run_engine(problem))


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_zero_states_equal_absent_ones(cell: Any) -> None:
    problem = random_problem(Options(cell, 2, True), B=7)
    zeros = replace(
        problem,
        hx=tuple(np.zeros_like(s) for s in problem.hx or ()),
        d=replace(
            problem.d,
            hx_n=tuple(np.zeros_like(s) for s in problem.d.hx_n or ()),
            states=States(np.zeros_like(np.repeat(problem.d.output[None], 2, axis=0))),
        ),
    )
    absent = replace(zeros, hx=None, d=replace(zeros.d, hx_n=None, states=None))
    got, want = run_engine(absent).named(), run_engine(zeros).named()
    for key, (_, value) in want.items():
        np.testing.assert_array_equal(got[key][1], value, err_msg=key)
