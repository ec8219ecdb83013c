"""Small stacks to test with: every option, and the ways to say which rows run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrnn._arguments import weight_names
from fastrnn._engine import NO_EXTRAS, Extras
from fastrnn._options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = (4, 3, 2, 3)  # T, B, I, H
P = 2

STACKS = {
    "rnn": Options("RNN"),
    "rnn-sigmoid-2": Options("RNN", num_layers=2, activation="sigmoid"),
    "gru": Options("GRU"),
    "gru-bidirectional-2": Options("GRU", num_layers=2, bidirectional=True),
    "gru-before-no-bias": Options("GRU", bias=False, reset_after=False),
    "lstm": Options("LSTM"),
    "lstm-identity-hard": Options("LSTM", activation="identity", gate_activation="hardsigmoid"),
    "lstm-bidirectional-2": Options("LSTM", num_layers=2, bidirectional=True, bias=False),
    "lstm-projected": Options("LSTM", num_layers=2, bidirectional=True, proj_size=P),
}
STEPS = ("padded", "lengths", "reset", "lengths-reset", "packed")
EXTRAS = ("reset_hx", "dropout", "zoneout_h", "zoneout_c")


class Case(NamedTuple):
    """The arguments of `recurrent`."""

    options: Options
    input: Tensor
    hx: tuple[Tensor, ...]
    weights: list[Tensor]
    steps: dict[str, Tensor]
    extras: Extras = NO_EXTRAS

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        anew = (x for x in self.extras[:2] if x is not None)
        return (self.input, *self.hx, *self.weights, *anew)

    def with_leaves(self, *leaves: Tensor) -> Case:
        states, weights = 1 + len(self.hx), 1 + len(self.hx) + len(self.weights)
        anew = dict(zip(("reset_h", "reset_c"), leaves[weights:], strict=False))
        return self._replace(
            input=leaves[0],
            hx=leaves[1:states],
            weights=list(leaves[states:weights]),
            extras=self.extras._replace(**anew),
        )


def make(
    options: Options,
    steps: str = "padded",
    *,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
    seed: int = 0,
    sizes: tuple[int, int, int, int] = SIZES,
    extras: Sequence[str] = (),
) -> Case:
    """A stack with random arguments; ``steps`` is one of `STEPS`, ``extras`` some of `EXTRAS`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.7).to(dtype)
        return x.requires_grad_(requires_grad)

    t, b, i, h = sizes
    out = options.proj_size or h
    directions = options.directions
    weights = []
    for name in weight_names(options):
        kind, _, layer = name.removesuffix("_reverse").rpartition("_l")
        width = i if layer == "0" else directions * out
        weights.append(random(*options.weight_shapes(width, h)[kind]))
    groups = options.num_layers * directions
    hx: tuple[Tensor, ...] = (random(groups, b, out),)
    if options.cell == "LSTM":
        hx += (random(groups, b, h),)
    given: dict[str, Any] = {}
    if "lengths" in steps:
        given["lengths"] = torch.tensor([(3, 0, t)[k % 3] for k in range(b)])
    if "reset" in steps:
        given["reset"] = torch.rand(t, b, generator=generator) < 0.4
    if steps == "packed":
        given["batch_sizes"] = torch.tensor([max(1, b - k) for k in range(t)])
        input = random(int(given["batch_sizes"].sum()), i)
    else:
        input = random(t, b, i)
    case = Case(options, input, hx, weights, given)
    if not extras:
        return case

    def drawn(*shape: int) -> Tensor:
        return torch.rand(groups, *shape, generator=generator) < 0.4

    two, where = options.cell == "LSTM", input.shape[:-1]
    learned = "reset_hx" in extras
    return case._replace(
        extras=Extras(
            random(groups, out) if learned else None,
            random(groups, h) if learned and two else None,
            drawn(b, out).to(dtype) / 0.4 if "dropout" in extras else None,
            drawn(*where, out) if "zoneout_h" in extras else None,
            drawn(*where, h) if "zoneout_c" in extras and two else None,
        )
    )


def moved(case: Case, device: torch.device) -> Case:
    """The case on a device, batch_sizes apart, its leaves leaves there."""

    def move(x: Tensor) -> Tensor:
        return x.detach().to(device).requires_grad_(x.requires_grad)

    steps = {k: v if k == "batch_sizes" else v.to(device) for k, v in case.steps.items()}
    return case._replace(steps=steps).with_leaves(*map(move, case.leaves))


def as_function(
    case: Case, run: Callable[[Case], list[Tensor]]
) -> tuple[Callable[..., list[Tensor]], tuple[Tensor, ...]]:
    """``run`` as a function of tensors alone, as a compiler wants it, and the case's own."""
    names, count = tuple(case.steps), len(case.leaves)

    def call(*tensors: Tensor) -> list[Tensor]:
        given = case.with_leaves(*tensors[:count])
        return run(given._replace(steps=dict(zip(names, tensors[count:], strict=True))))

    return call, (*case.leaves, *case.steps.values())


def replayed(
    case: Case,
    other: Case,
    run: Callable[[Case], list[Tensor]],
    gradients: Callable[[Case, list[Tensor]], tuple[Tensor, ...]],
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Forward and backward of ``case`` captured in one CUDA graph, and replayed with the values of
    ``other``.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradients(case, run(case))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = run(case)
        found = gradients(case, values)
    with torch.no_grad():
        for mine, theirs in zip(case.leaves, other.leaves, strict=True):
            mine.copy_(theirs)
        for name in set(case.steps) - {"batch_sizes"}:
            case.steps[name].copy_(other.steps[name])
    graph.replay()
    return values, found
