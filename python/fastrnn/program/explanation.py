"""A readable description of how a step runs, for `fastrnn.explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .execute import DTYPES
from .grad import Needs
from .ir import COSTLY, INPUTS, Graph, Product
from .passes import Pass, Passes, backward_pass, passes
from .run import find

if TYPE_CHECKING:
    import torch

_TITLES = (
    "for all steps of a block at once, before them",
    "step by step",
    "for all steps of a block at once, after them",
)


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`; `print` shows it.

    Attributes:
        engine: whether the engine runs the step; else a loop of torch operations does.
        reason: why the loop runs, with the operation and the line of the step; else empty.
        saved_bytes: how much forward saves for backward per step and row, besides xs and ys.
        text: the program, with one line for each operation.
        report: the text that `print` shows.
    """

    engine: bool
    reason: str
    saved_bytes: int
    text: str
    report: str

    def __str__(self) -> str:
        return self.report


def explained(step: Any, init: list[torch.Tensor], xs: list[torch.Tensor]) -> Explanation:
    """Explains a step over leaves."""
    found = find(step, init, xs)
    if found is None:
        reason = (
            "tensors that are not float32 or float64 on the CPU, or a transform of torch around it"
        )
        return Explanation(False, reason, 0, "", f"A loop of torch operations: {reason}.")
    sizes, recording, tensors = found
    graph = recording.graph
    if graph is None:
        report = f"A loop of torch operations, as the engine cannot run {recording.reason}."
        return Explanation(False, recording.reason, 0, "", report)
    needs = Needs(
        tuple(leaf.dtype.is_floating_point for leaf in sizes.carry),
        tuple(leaf.dtype.is_floating_point for leaf in sizes.xs),
        (True,) * len(recording.fixed),
        tuple(tensors[slot].is_floating_point() for slot, _ in recording.shared),
    )
    widths = {k: leaf.width for k, leaf in enumerate(sizes.carry)}
    both = passes(graph, widths, needs)
    saved = sum(both.saved) + sum(
        widths[k] for k, (kind, _) in both.states.items() if kind == "state"
    )
    bytes_ = saved * sizes.dtype.itemsize
    report = _report(graph, both, bytes_, DTYPES[sizes.dtype])
    return Explanation(True, "", bytes_, graph.text(), report)


def _report(graph: Graph, both: Passes, saved: int, dtype: str) -> str:
    operations = [n for n in graph.nodes if n.op not in INPUTS]
    products = sum(isinstance(n.info, Product) for n in operations)
    costly = sum(n.op in COSTLY for n in operations)
    backward = backward_pass(graph, both, False)
    sums = len(backward.code.reductions)
    lines = [
        (
            f"The engine runs this step, {dtype}: {len(operations)} operations, {products} of them "
            f"products, {costly} exponentials and the like."
        ),
        "",
        "Forward",
        *_pass(both.forward),
        f"  kept for backward: {saved} bytes for each step and row, beside xs and ys",
        "Backward",
        *_pass(backward),
        f"  over all steps and rows: {sums} sums for what the step closes over",
    ]
    return "\n".join(lines)


def _pass(one: Pass) -> list[str]:
    lines = []
    for title, phase in zip(_TITLES, one.code.phases, strict=True):
        if phase:
            lines.append(f"  {title}")
            lines += [f"    {_instruction(i)}" for i in phase]
    return lines


def _instruction(i: tuple[Any, ...]) -> str:
    match i[0]:
        case "product":
            groups, K, N = i[7], i[13], i[14]
            times = f"{groups} times " if groups > 1 else ""
            return f"product {times}{K} → {N}" + (", added to" if i[15] >= 0 else "")
        case "run":
            codes = [op[0] for op in i[2] if op[0] != "copy"]
            return f"{' '.join(codes) or 'copy'} on {i[1]}"
        case "reduce":
            return f"{i[1]} of {i[8]}" + (f", {i[6]} times" if i[6] > 1 else "")
    return f"rearrange {i[5]}"
