"""A program as torch operators, for graphs: ``fastrnn::program`` and ``fastrnn::program_backward``.

The program is a constant of the graph: its text (ir.py). Arrays are as in execute.py. ``needs``
states for each of states, xs, fixed and shared, in this order, whether its gradient is wanted; it
is empty without a backward pass. ``program`` returns the final states, ys, and with ``needs`` the
values saved for backward; ``program_backward`` returns the wanted gradients. No result shares
memory with an input.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .execute import Executable, Inputs
from .grad import Needs
from .ir import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

_ARRAYS = "str text, Tensor[] states, Tensor[] xs, Tensor[] fixed, Tensor[] shared"
library: Any = torch.library.Library("fastrnn", "FRAGMENT")  # type: ignore[no-untyped-call]
library.define(f"program({_ARRAYS}, bool reverse, bool[] needs) -> Tensor[]")
library.define(
    f"program_backward({_ARRAYS}, Tensor[] ys, Tensor[] kept, Tensor?[] d_finals, Tensor?[] d_ys, "
    "bool reverse, bool[] needs) -> Tensor[]"
)


@lru_cache(maxsize=256)
def executable(text: str, widths: tuple[int, ...], dtype: torch.dtype) -> Executable:
    graph = parse(text)
    return Executable(graph, dict(zip(sorted(graph.nexts), widths, strict=True)), dtype)


def executable_of(text: str, states: Sequence[Tensor], xs: Sequence[Tensor]) -> Executable:
    return executable(text, tuple(int(s.shape[1]) for s in states), xs[0].dtype)


class _Operands:
    """The operands of a call."""

    def __init__(
        self,
        text: str,
        states: Sequence[Tensor],
        xs: Sequence[Tensor],
        fixed: Sequence[Tensor],
        shared: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        self.program = executable_of(text, states, xs)
        self.steps, self.rows = xs[0].shape[:2]
        carries = sorted(self.program.graph.nexts)
        self.inputs = Inputs(dict(zip(carries, states, strict=True)), xs, fixed, shared)
        self.needs = None
        if needs:
            of_carries, *others = _groups(tuple(map(len, (states, xs, fixed, shared))), needs)
            wanted = dict(zip(carries, of_carries, strict=True))
            of_states = tuple(wanted.get(k, False) for k in range(max(carries, default=-1) + 1))
            self.needs = Needs(of_states, *map(tuple, others))

    def kept(self) -> list[tuple[str, int]]:
        """The values that forward saves, in the order of the operator's results."""
        plan = self.program.forward(self.needs).plan
        return [what for what in plan.sequences if what[0] in ("saved", "state")]

    def width(self, what: tuple[str, int]) -> int:
        both = self.program.passes(self.needs)
        return both.saved[what[1]] if what[0] == "saved" else self.program.widths[what[1]]


def _forward(
    text: str, states: list[Tensor], xs: list[Tensor], fixed: list[Tensor], shared: list[Tensor],
    reverse: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    call = _Operands(text, states, xs, fixed, shared, needs)
    out = call.program.run_forward(call.inputs, call.steps, call.rows, reverse, call.needs)
    kept = [out.kept[what] for what in call.kept()] if call.needs else []
    return [*out.finals, *out.ys, *kept]


def _forward_fake(
    text: str, states: list[Tensor], xs: list[Tensor], fixed: list[Tensor], shared: list[Tensor],
    reverse: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    call = _Operands(text, states, xs, fixed, shared, needs)
    new = xs[0].new_empty
    finals = [new((call.rows, s.shape[1])) for s in states]
    graph = call.program.graph
    ys = [new((call.steps, call.rows, graph.widths[i])) for i in graph.ys]
    kept = [call.width(what) for what in call.kept()] if call.needs else []
    return [*finals, *ys, *(new((call.steps, call.rows, width)) for width in kept)]


def _backward(
    text: str, states: list[Tensor], xs: list[Tensor], fixed: list[Tensor], shared: list[Tensor],
    ys: list[Tensor], kept: list[Tensor], d_finals: list[Tensor | None], d_ys: list[Tensor | None],
    reverse: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    call = _Operands(text, states, xs, fixed, shared, needs)
    assert call.needs is not None
    names = call.kept()
    found = call.program.run_backward(
        call.inputs, ys, dict(zip(names, kept, strict=True)), d_finals, d_ys, call.steps,
        call.rows, reverse, call.needs,
    )  # fmt: skip
    gradients = [
        *map(found.states.get, call.inputs.states),
        *map(found.xs.get, range(len(xs))),
        *map(found.fixed.get, range(len(fixed))),
        *map(found.shared.get, range(len(shared))),
    ]
    arrays = [*states, *xs, *fixed, *shared]
    return [
        torch.zeros_like(array) if d is None else d
        for d, array, wanted in zip(gradients, arrays, needs, strict=True)
        if wanted
    ]


def _backward_fake(
    text: str, states: list[Tensor], xs: list[Tensor], fixed: list[Tensor], shared: list[Tensor],
    ys: list[Tensor], kept: list[Tensor], d_finals: list[Tensor | None], d_ys: list[Tensor | None],
    reverse: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    arrays = [*states, *xs, *fixed, *shared]
    return [torch.empty_like(a) for a, wanted in zip(arrays, needs, strict=True) if wanted]


library.impl("program", _forward, "CPU")
library.impl("program_backward", _backward, "CPU")
torch.library.register_fake("fastrnn::program", _forward_fake, lib=library)
torch.library.register_fake("fastrnn::program_backward", _backward_fake, lib=library)


class _Recorded(torch.autograd.Function):
    """``fastrnn::program`` under autograd; its backward calls ``program_backward``."""

    @staticmethod
    def forward(
        ctx: Any, text: str, counts: tuple[int, ...], reverse: bool, *arrays: Tensor
    ) -> Any:
        needs = list(ctx.needs_input_grad[3:])
        groups = _groups(counts, arrays)
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.fastrnn.program(text, *groups, reverse, needs)
        states, xs, fixed, shared = groups
        call = _Operands(text, states, xs, fixed, shared, needs)
        assert call.needs is not None
        finals, ys = len(states), len(call.program.graph.ys)
        ctx.text, ctx.counts, ctx.reverse, ctx.ys = text, counts, reverse, ys
        ctx.save_for_backward(*arrays, *out[finals:])
        ctx.set_materialize_grads(False)
        active = [a for group in call.program.active(call.needs) for a in group]
        ctx.mark_non_differentiable(
            *(o for o, a in zip(out, active, strict=False) if not a), *out[finals + ys :]
        )
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor | None) -> Any:
        needs = list(ctx.needs_input_grad[3:])
        saved = ctx.saved_tensors
        count = sum(ctx.counts)
        groups = _groups(ctx.counts, saved[:count])
        finals = len(groups[0])
        ys, kept = list(saved[count : count + ctx.ys]), list(saved[count + ctx.ys :])
        found = iter(
            torch.ops.fastrnn.program_backward(
                ctx.text, *groups, ys, kept, list(d_out[:finals]),
                list(d_out[finals : finals + ctx.ys]), ctx.reverse, needs,
            )
        )  # fmt: skip
        return (None, None, None, *(next(found) if wanted else None for wanted in needs))


def _groups(counts: tuple[int, ...], items: Sequence[Any]) -> list[list[Any]]:
    left = iter(items)
    return [list(islice(left, count)) for count in counts]


def _autograd(
    text: str, states: list[Tensor], xs: list[Tensor], fixed: list[Tensor], shared: list[Tensor],
    reverse: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    groups = (states, xs, fixed, shared)
    arrays = [a for group in groups for a in group]
    if torch.is_grad_enabled() and any(a.requires_grad for a in arrays):
        counts = tuple(map(len, groups))
        return list(_Recorded.apply(text, counts, reverse, *arrays))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return list(torch.ops.fastrnn.program(text, *groups, reverse, needs))


library.impl("program", _autograd, "Autograd")


def run(text: str, inputs: Inputs, reverse: bool) -> list[Tensor]:
    """The final states and ys; one node of a graph."""
    states = [inputs.states[k] for k in sorted(inputs.states)]
    out = torch.ops.fastrnn.program(
        text, states, list(inputs.xs), list(inputs.fixed), list(inputs.shared), reverse, []
    )
    count = len(states) + len(executable_of(text, states, inputs.xs).graph.ys)
    return list(out)[:count]
