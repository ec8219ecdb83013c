"""A program and torch tensors: each pass of an `Executable` is one call of the engine.

Arrays are as the engine wants them, with contiguous units: states and fixed inputs (B, width), xs
and outputs (T, B, width), shared tensors dense in memory, in whatever order of their axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .prepared import Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .grad import Needs
    from .ir import Graph

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class Inputs(NamedTuple):
    """Of one call."""

    states: dict[int, Tensor]  # those that a step changes
    xs: Sequence[Tensor]
    fixed: Sequence[Tensor]
    shared: Sequence[Tensor]


class Outputs(NamedTuple):
    finals: list[Tensor]  # of the states, in their order
    ys: list[Tensor]
    kept: dict[tuple[str, int], Tensor]  # what backward reads besides


class Gradients(NamedTuple):
    """What is absent is zero."""

    states: dict[int, Tensor]
    xs: dict[int, Tensor]
    fixed: dict[int, Tensor]
    shared: dict[int, Tensor]


class Executable(Prepared):
    """A program of torch tensors, and what the engine made of it for each set of gradients."""

    def __init__(self, graph: Graph, widths: dict[int, int], dtype: torch.dtype) -> None:
        super().__init__(graph, widths, DTYPES[dtype])
        self.torch_dtype = dtype

    def run_forward(
        self, inputs: Inputs, steps: int, rows: int, reverse: bool, needs: Needs | None
    ) -> Outputs:
        plan, program = self.forward(needs)
        graph, kept_widths = self.graph, self.passes(needs).saved
        empty = torch.empty
        dtype = self.torch_dtype
        ys = [empty(steps, rows, graph.widths[i], dtype=dtype) for i in graph.ys]
        finals = [empty(rows, width, dtype=dtype) for width in plan.widths]
        of_y = dict(zip(graph.ys, ys, strict=True))
        kept: dict[tuple[str, int], Tensor] = {}
        sequences = []
        for what in plan.sequences:
            kind, i = what
            if kind == "x":
                sequences.append(inputs.xs[i])
            elif kind == "y":
                sequences.append(of_y[i])
            else:
                width = kept_widths[i] if kind == "saved" else self.widths[i]
                kept[what] = empty(steps, rows, width, dtype=dtype)
                sequences.append(kept[what])
        program.run(
            steps, rows, reverse, 0,
            [inputs.shared[j] for j in plan.shared],
            sequences, [None] * len(sequences),
            [inputs.fixed[j] for j in plan.fixed],
            [inputs.states[k] for k in plan.carries],
            finals, [],
        )  # fmt: skip
        return Outputs(finals, ys, kept)

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
        """``ys`` and ``kept`` as `run_forward` gave them, where `read_back` names them."""
        plan, program = self.backward(needs, reverse)
        dtype = self.torch_dtype
        empty = torch.empty
        of_y = dict(zip(self.graph.ys, ys, strict=True))
        d_of_y = dict(zip(self.graph.ys, d_ys, strict=True))
        d_xs: dict[int, Tensor] = {}
        sequences: list[Tensor] = []
        for what in plan.sequences:
            kind, i = what
            if kind == "x":
                sequences.append(inputs.xs[i])
            elif kind == "y":
                y = of_y[i]
                assert y is not None, "backward reads it"
                sequences.append(y)
            elif kind == "dy":
                sequences.append(self._given(d_of_y[i], steps, rows, self.graph.widths[i]))
            elif kind == "dx":
                width = inputs.xs[i].shape[2]
                d_xs[i] = empty(steps, rows, width, dtype=dtype)
                sequences.append(d_xs[i])
            else:
                sequences.append(kept[what])
        begins = dict(zip(self.forward(needs).plan.carries, d_finals, strict=True))
        inits = [begins[k] for k in plan.carries] + [None] * len(plan.fixed_sums)
        finals = [empty(rows, width, dtype=dtype) for width in plan.widths]
        sums = [empty(inputs.shared[j].numel(), dtype=dtype) for j in plan.targets]  # as they lie
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

    def _given(self, d: Tensor | None, steps: int, rows: int, width: int) -> Tensor:
        if d is None:
            return torch.zeros(width, dtype=self.torch_dtype).expand(steps, rows, width)
        return unit(d)

    def read_back(self, needs: Needs, reverse: bool) -> list[tuple[str, int]]:
        """What `run_backward` reads: ("x", i), ("y", i), ("saved", j), ("state", k)."""
        return self.backward(needs, reverse).plan.sequences

    def active(self, needs: Needs) -> tuple[list[bool], list[bool]]:
        """Which finals and ys have a gradient."""
        both = self.passes(needs)
        return (
            [k in both.active_nexts for k in both.forward.carries],
            [i in both.active_ys for i in self.graph.ys],
        )


def unit(tensor: Tensor) -> Tensor:
    """With contiguous units."""
    if tensor.shape[-1] != 1 and tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor
