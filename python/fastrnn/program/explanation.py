"""How a step over leaves runs, for reading: what `fastrnn.explain` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .execute import DTYPES
from .grad import Needs
from .ir import COSTLY, INPUTS, Graph, Product
from .passes import Pass, Passes, backward_pass, passes
from .run import recorded, sizes_of, width_of

if TYPE_CHECKING:
    import torch

    from .recording import Recording

_TITLES = (
    "for all steps of a block at once, before them",
    "step by step",
    "for all steps of a block at once, after them",
)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` shows it.

    Attributes:
        engine: whether the engine runs the step; else a loop of torch operations does.
        reason: why the loop runs: the operation and the line of the step; empty where it does not.
        saved_bytes: what forward keeps for backward, for each step and row, beside xs and ys.
        text: the program: one line for each operation.
    """

    engine: bool
    reason: str
    saved_bytes: int
    text: str
    report: str

    def __str__(self) -> str:
        return self.report


def explained(step: Any, init: list[torch.Tensor], xs: list[torch.Tensor]) -> Explanation:
    """Of a step over leaves."""
    ways = list(sizes_of(init, xs))
    if not ways:
        reason = (
            "tensors that are not float32 or float64 on the CPU, or a transform of torch around it"
        )
        return Explanation(False, reason, 0, "", f"A loop of torch operations: {reason}.")
    first: Recording | None = None
    for sizes in ways:
        recording, tensors = recorded(step, sizes)
        if recording.graph is not None:
            break
        first = first or recording
    else:
        assert first is not None
        return Explanation(
            False, first.reason, 0, "",
            f"A loop of torch operations, as the engine cannot run {first.reason}.",
        )  # fmt: skip
    graph = recording.graph
    shared = [tensors[slot].is_floating_point() for slot, _ in recording.shared]
    needs = Needs(
        tuple(leaf[1].is_floating_point for leaf in sizes.carry),
        tuple(leaf[1].is_floating_point for leaf in sizes.xs),
        (True,) * len(recording.fixed),
        tuple(shared),
    )
    widths = {k: width_of(leaf) for k, leaf in enumerate(sizes.carry)}
    both = passes(graph, widths, needs)
    bytes_ = sum(both.saved) * sizes.dtype.itemsize
    bytes_ += (
        sum(widths[k] for k, (kind, _) in both.states.items() if kind == "state")
        * sizes.dtype.itemsize
    )
    report = _report(graph, both, bytes_, DTYPES[sizes.dtype])
    return Explanation(True, "", bytes_, graph.text(), report)


def _report(graph: Graph, both: Passes, saved: int, dtype: str) -> str:
    operations = [n for n in graph.nodes if n.op not in INPUTS]
    products = sum(isinstance(n.info, Product) for n in operations)
    costly = sum(n.op in COSTLY for n in operations)
    first = (
        f"The engine runs this step, {dtype}: {len(operations)} operations, {products} of them "
        f"products, {costly} exponentials and the like."
    )
    lines = [
        first,
        "",
        "Forward",
        *_pass(both.forward),
        f"  kept for backward: {saved} bytes for each step and row, beside xs and ys",
    ]
    backward = backward_pass(graph, both, False)
    lines += ["Backward", *_pass(backward)]
    sums = len(backward.code.reductions)
    lines.append(f"  over all steps and rows: {sums} sums for what the step closes over")
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
