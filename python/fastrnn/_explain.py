"""`explain`: how a step or a cell runs."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from . import program
from ._any_cell import Cell, Run
from ._scan import Calls, Tree


def explain(step: Any, init: Any, xs: Any) -> program.Explanation:
    """How `scan` would run a step: its plan, or why it would be a loop.

    Nothing is computed.

    Arguments:
        step: as that of `scan`, or a cell as `Recurrent` takes it.
        init: the carry before the first step; of a cell a state, or None.
        xs: the inputs, with T first.

    >>> import torch
    >>> cell = torch.nn.GRUCell(3, 4)
    >>> def step(h, x):
    ...     h = cell(x, h)
    ...     return h, h
    >>> plan = explain(step, torch.zeros(2, 4), torch.zeros(5, 2, 3))
    >>> plan.engine, plan.saved_bytes
    (True, 64)
    """
    if isinstance(step, Module):
        return _of_cell(step, init, xs)
    carry, x = Tree("init", init), Tree("xs", xs)
    return program.explained(Calls(step, carry, x), carry.tensors, x.tensors)


def _of_cell(cell: Module, state: Any, sequence: Any) -> program.Explanation:
    run = Run(Cell(cell, "cell"), False, None, False)
    if state is None:
        state = program.start(run.step, sequence)
        if state is None:
            state = run.first(sequence[0])[0]
    carry, x = Tree("state", state), Tree("input", sequence)
    calls = Calls(run.step, carry, x, who="cell", carry_name="state")
    return program.explained(calls, carry.tensors, x.tensors)
