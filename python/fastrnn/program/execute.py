"""Runs a program on torch tensors: each pass of an `Executable` is one call of the engine.

The last axis of all arrays is contiguous: states and fixed inputs (B, width), xs and outputs
(T, B, width). Shared tensors are dense in memory, with any order of axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .prepared import Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .grad import Needs
    from .ir import Graph

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class Inputs(NamedTuple):
    """The inputs of one call."""

    states: dict[int, Tensor]  # the states that a step changes
    xs: Sequence[Tensor]
    fixed: Sequence[Tensor]
    shared: Sequence[Tensor]


class Outputs(NamedTuple):
    finals: list[Tensor]  # the final states
    ys: list[Tensor]
    kept: dict[tuple[str, int], Tensor]  # the other arrays that backward reads


class Gradients(NamedTuple):
    """Gradients; a missing one is zero."""

    states: dict[int, Tensor]
    xs: dict[int, Tensor]
    fixed: dict[int, Tensor]
    shared: dict[int, Tensor]


class Executable(Prepared):
    """A program on torch tensors."""

    def __init__(self, graph: Graph, widths: dict[int, int], dtype: torch.dtype) -> None:
        super().__init__(graph, widths, DTYPES[dtype])
        self.torch_dtype = dtype

    def run_forward(
        self, inputs: Inputs, steps: int, rows: int, reverse: bool, needs: Needs | None
    ) -> Outputs:
        plan, program = self.forward(needs)
        widths: dict[str, Any] = {
            "y": self.graph.widths,
            "saved": self.passes(needs).saved,
            "state": self.widths,
        }

        def empty(kind: str, i: int) -> Tensor:
            return torch.empty(steps, rows, widths[kind][i], dtype=self.torch_dtype)

        ys = {("y", i): empty("y", i) for i in self.graph.ys}
        kept = {(kind, i): empty(kind, i) for kind, i in plan.sequences if kind not in ("x", "y")}
        finals = [torch.empty(rows, width, dtype=self.torch_dtype) for width in plan.widths]
        arrays = {("x", i): x for i, x in enumerate(inputs.xs)} | ys | kept
        sequences = [arrays[what] for what in plan.sequences]
        program.run(
            steps, rows, reverse, 0,
            [inputs.shared[j] for j in plan.shared],
            sequences, [None] * len(sequences),
            [inputs.fixed[j] for j in plan.fixed],
            [inputs.states[k] for k in plan.carries],
            finals, [],
        )  # fmt: skip
        return Outputs(finals, list(ys.values()), kept)

    def run_backward(
        self,
        inputs: Inputs,
        ys: Sequence[Tensor | None],
        kept: dict[tuple[str, int], Tensor],
        d_finals: Sequence[Tensor | None],
        d_ys: Sequence[Tensor | None],
        steps: int,
        rows: int,
        reverse: bool,
        needs: Needs,
    ) -> Gradients:
        """``ys`` and ``kept``: those of `run_forward` that `read_back` names."""
        plan, program = self.backward(needs, reverse)
        options: Any = {"dtype": self.torch_dtype}
        arrays: dict[tuple[str, int], Any] = dict(kept)
        arrays |= {("x", i): x for i, x in enumerate(inputs.xs)}
        arrays |= {("y", i): y for i, y in zip(self.graph.ys, ys, strict=True)}
        arrays |= {("dy", i): d for i, d in zip(self.graph.ys, d_ys, strict=True)}
        d_xs: dict[int, Tensor] = {}
        for what in plan.sequences:
            kind, i = what
            if kind == "dx":
                arrays[what] = d_xs[i] = torch.empty(steps, rows, inputs.xs[i].shape[2], **options)
            elif kind == "dy" and arrays[what] is None:
                zeros = torch.zeros(self.graph.widths[i], **options)
                arrays[what] = zeros.expand(steps, rows, -1)
            elif kind == "dy":
                arrays[what] = unit(arrays[what])
        sequences = [arrays[what] for what in plan.sequences]
        begins = dict(zip(self.forward(needs).plan.carries, d_finals, strict=True))
        inits = [begins[k] for k in plan.carries] + [None] * len(plan.fixed_sums)
        finals = [torch.empty(rows, width, **options) for width in plan.widths]
        sums = [torch.empty(inputs.shared[j].numel(), **options) for j in plan.targets]
        program.run(
            steps, rows, not reverse, 0,
            [inputs.shared[j] for j in plan.shared],
            sequences,
            [None if k is None else inputs.states[k] for k in plan.firsts],
            [inputs.fixed[j] for j in plan.fixed],
            [None if d is None else unit(d) for d in inits],
            finals, sums,
        )  # fmt: skip
        count = len(plan.carries)
        return Gradients(
            dict(zip(plan.carries, finals[:count], strict=True)),
            d_xs,
            dict(zip(plan.fixed_sums, finals[count:], strict=True)),
            {
                j: d.as_strided(inputs.shared[j].shape, inputs.shared[j].stride())
                for j, d in zip(plan.targets, sums, strict=True)
            },
        )

    def read_back(self, needs: Needs, reverse: bool) -> list[tuple[str, int]]:
        """The sequences that `run_backward` reads: ("x", i), ("y", i), ("saved", j), …"""
        return self.backward(needs, reverse).plan.sequences

    def active(self, needs: Needs) -> tuple[list[bool], list[bool]]:
        """Which final states and which ys have a gradient."""
        both = self.passes(needs)
        return (
            [k in both.active_nexts for k in both.forward.carries],
            [i in both.active_ys for i in self.graph.ys],
        )


def unit(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last axis."""
    if tensor.shape[-1] != 1 and tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor
