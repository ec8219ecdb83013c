"""A cell over a sequence inside torch.compile: one node of dynamo's graph, traced by AOTAutograd.

Imported only while dynamo traces, because the decorator needs torch._dynamo, a slow import.
"""

from __future__ import annotations

from typing import Any

import torch

from .cell import Cell, Run


@torch._dynamo.nonstrict_trace
def call(
    cell: torch.nn.Module,
    name: str,
    return_states: bool,
    reverse: bool,
    sequence: torch.Tensor,
    given: dict[str, Any],
) -> Any:
    """The result of `cell.Run`; ``given``: those of valid, state and starts that are given."""
    run = Run(Cell(cell, name), return_states, given.get("valid"), reverse)
    final, (output, states) = run(sequence, given.get("state"), given.get("starts"))
    return (final, output, states) if return_states else (final, output)
