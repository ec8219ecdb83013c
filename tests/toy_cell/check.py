"""Runs the engine built with `minimal_gated_unit.h` against one NumPy function pair.

A program of its own, because the module that it is given stands in for `fastrnn._C`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from replaced_module import load

load(sys.argv[1])

from engine import check_against_reference  # noqa: E402
from fastrnn import reference  # noqa: E402
from fastrnn.reference import Parameters, linear, linear_backward  # noqa: E402
from problems import LAYOUTS, random_problem  # noqa: E402


@dataclass(frozen=True, slots=True)
class ToyOptions(reference.Options):
    """Options of a cell that the package does not know."""

    def __post_init__(self) -> None:
        assert self.cell == "MGU"

    @property
    def gates(self) -> int:
        return 2


def mgu_cell(x, state, p, options, masks):
    act = reference.ACTIVATIONS[options.activation]
    gate = reference.GATE_ACTIVATIONS[options.gate_activation]
    (h,) = state
    a_f, a_n = np.split(linear(x, p.weight_ih, p.bias_ih), 2, axis=1)
    b_f, b_n = np.split(linear(h, p.weight_hh, p.bias_hh), 2, axis=1)
    f = gate.value(a_f + b_f)
    n = act.value(a_n + f * b_n)
    return ((1.0 - f) * h + f * n,), (x, h, f, n, b_n)


def mgu_cell_backward(d_state, saved, p, options, masks):
    act = reference.ACTIVATIONS[options.activation]
    gate = reference.GATE_ACTIVATIONS[options.gate_activation]
    x, h, f, n, b_n = saved
    (d_h,) = d_state
    d_n = d_h * f * act.slope(n)
    d_f = (d_h * (n - h) + d_n * b_n) * gate.slope(f)
    d_b = np.concatenate([d_f, d_n * f], axis=1)
    d_a = np.concatenate([d_f, d_n], axis=1)
    d_x, d_weight_ih, d_bias_ih = linear_backward(d_a, x, p.weight_ih)
    d_previous, d_weight_hh, d_bias_hh = linear_backward(d_b, h, p.weight_hh)
    d_p = Parameters(d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh)
    return d_x, (d_previous + d_h * (1.0 - f),), d_p


reference.CELLS["MGU"] = reference.Cell(mgu_cell, mgu_cell_backward, gates=2, states=1)

checked = 0
for layout in LAYOUTS:
    for num_layers, bidirectional in ((1, False), (1, True), (2, True)):
        for dtype in ("float32", "float64", "float16"):
            options = ToyOptions("MGU", num_layers=num_layers, bidirectional=bidirectional)
            problem = random_problem(options, layout=layout, seed=checked)
            check_against_reference(problem, dtype, threads=2)
            checked += 1
print(f"{checked} problems agree")
