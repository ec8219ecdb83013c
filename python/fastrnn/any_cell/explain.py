"""`explain`: how a step or a cell runs."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from .. import _checks
from ..program import api as program
from .cell import Cell, Run
from .scan import Calls, Tree, check_step, count_steps


def explain(step: Any, init: Any, xs: Any) -> program.Explanation:
    """How `scan` would run a step: its plan, or why it would be a loop.

    The sequence is not run.

    Arguments:
        step: as that of `scan`, or a cell as `Recurrent` takes it.
        init: the carry before the first step; of a cell a state, or None.
        xs: the inputs, with T first; of a cell (T, B, …).

    Returns:
        what `print` shows; its attributes ``engine`` (whether the engine runs the step),
        ``reason`` (why not), ``saved_bytes`` (what forward keeps for backward, for each step and
        row, beside xs and ys) and ``text`` (the program).

    Raises:
        TypeError: step cannot be called, or a leaf is no tensor.
        ValueError: xs hold no tensor, disagree in T, or do not suit a cell.

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
    check_step(step)
    carry, x = Tree("init", init), Tree("xs", xs)
    count_steps(x)
    return program.explained(Calls(step, carry, x), carry.tensors, x.tensors)


def _of_cell(cell: Module, state: Any, sequence: Any) -> program.Explanation:
    _checks.check_tensor("xs", sequence)
    if sequence.dim() < 3:
        raise ValueError(f"xs must be (T, B, …) for a cell, got shape {tuple(sequence.shape)}")
    run = Run(Cell(cell, "step"), False, None, False)
    if state is None:
        state = program.start(run.step, sequence)
        if state is None:
            state = run.first(sequence.new_zeros(sequence.shape[1:]))[0]
    carry, x = Tree("init", state), Tree("xs", sequence)
    calls = Calls(run.step, carry, x, who="step", carry_name="state")
    return program.explained(calls, carry.tensors, x.tensors)
