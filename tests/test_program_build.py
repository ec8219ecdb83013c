"""The programs of our options (program/build.py): made without torch, equal to the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cases import ALONE, PAIRS, Case
from engine import check_against_reference, run_engine
from fastrnn._options import Options
from fastrnn.program.build import Spec, layer_program
from fastrnn.program.ir import contracted, parse
from problems import random_problem


def spec_of(options: Options, **given: Any) -> Spec:
    plain: dict[str, Any] = {
        "dtype": "float32", "lengths": False, "reset": False, "learned": (False, False),
        "dropout": False, "keep": (False, False), "cell": options.cell == "LSTM",
    }  # fmt: skip
    return Spec(options, 3, 4, **{**plain, **given})


def test_a_program_reads_as_the_step() -> None:
    program = layer_program(spec_of(Options("RNN", bias=False, grad_clip=0.5)))
    assert (program.xs, program.fixed) == (("x",), ())
    assert program.shared == ("weight_ih", "weight_hh")
    assert program.graph.text().splitlines() == [
        "%0[3] = x 0",
        "%1[12] = shared 0",
        "%2[16] = shared 1",
        "%3[4] = carry 0",
        "%4[4] = product %0 by %1 offset=0 groups=1 in_group=3 w_group=0 w_k=1 w_n=3 K=3 N=4",
        "%5[4] = product %3 by %2 offset=0 groups=1 in_group=4 w_group=0 w_k=1 w_n=4 K=4 N=4",
        "%6[4] = add %4 %5",
        "%7[4] = tanh %6",
        "%8[1] = const 0x1.0000000000000p-1",
        "%9[4] = clip %7 %8!",
        "next 0 = %9",
        "y 0[4] = %9",
    ]


@pytest.mark.parametrize("case", [*ALONE, *PAIRS], ids=str)
def test_the_text_of_a_program_is_the_program(case: Case) -> None:
    options = replace(case.options, num_layers=1, bidirectional=False)
    units = 8 if options.heads > 1 or options.proj_size else 4
    ragged, reset = "reset" not in case.layout, case.layout.endswith("reset")
    spec = spec_of(options, lengths=ragged, reset=reset)._replace(hidden_size=units)
    graph = layer_program(spec).graph
    again = parse(graph.text())
    assert again.nodes == graph.nodes
    assert (again.nexts, again.ys, again.widths) == (graph.nexts, graph.ys, graph.widths)


def test_one_specification_has_one_program() -> None:
    assert layer_program(spec_of(Options("GRU", layer_norm=True))) is layer_program(
        spec_of(Options("GRU", layer_norm=True))
    )


def test_inputs_are_what_the_call_gives() -> None:
    options = Options("LSTM", peephole=True, zoneout_h=0.1)
    program = layer_program(
        spec_of(
            options, lengths=True, reset=True, learned=(True, True), dropout=True, keep=(True, True)
        )
    )
    assert program.xs == ("x", "valid", "fresh", "keep_h", "keep_c")
    assert program.fixed == ("dropout",)
    assert program.shared == (*options.weight_kinds, "reset_h", "reset_c")


def test_a_sum_of_a_product_is_one_operation() -> None:
    graph = parse(
        "%0[4] = x 0\n%1[4] = carry 0\n%2[4] = mul %0 %1\n%3[4] = add %1 %2\n"
        "%4[4] = mul %3 %1\n%5[4] = add %4 %4\nnext 0 = %5\n"
    )
    assert contracted(graph).text() == (
        "%0[4] = x 0\n%1[4] = carry 0\n%2[4] = fma %0 %1 %1\n%3[4] = mul %2 %1\n"
        "%4[4] = add %3 %3\nnext 0 = %4\n"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_is_the_reference_over_any_layout(case: Case, dtype: str) -> None:
    check_against_reference(
        random_problem(case.options, layout=case.layout, extras=case.extras, hidden_size=12),
        dtype,
    )


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_what_stands_in_the_padding_reaches_no_gradient(cell: Any) -> None:
    options = Options(cell, layer_norm=True, bidirectional=True)
    problem = random_problem(options, layout="lengths", hidden_size=6)
    past = np.arange(problem.steps)[:, None] >= problem.rows["lengths"]
    poisoned = replace(problem, input=np.where(past[..., None], np.nan, problem.input))
    expected, found = run_engine(problem).named(), run_engine(poisoned).named()
    for name, (_, value) in expected.items():
        np.testing.assert_array_equal(found[name][1], value, err_msg=name)
