"""Small stacks with random data in torch, moved, captured, or as a function of tensors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrnn._engine import NO_EXTRAS, Extras
from problems import random_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastrnn._options import Options
    from problems import Problem

SIZES = (4, 3, 2, 3)  # T, B, I, H


class Arguments(NamedTuple):
    """The arguments of `recurrent`: a problem of problems.py as torch's tensors."""

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

    def with_leaves(self, *leaves: Tensor) -> Arguments:
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
    layout: str = "padded",
    *,
    sizes: tuple[int, int, int, int] = SIZES,
    extras: Sequence[str] = (),
    seed: int = 0,
    **how: Any,
) -> Arguments:
    """Random data of a stack in one of `cases.LAYOUTS`, with some of `cases.EXTRAS`."""
    T, B, I, H = sizes  # noqa: E741
    data: Any = {"T": T, "B": B, "input_size": I, "hidden_size": H}
    return in_torch(random_problem(options, layout=layout, extras=extras, seed=seed, **data), **how)


def in_torch(
    problem: Problem, *, dtype: torch.dtype = torch.float64, requires_grad: bool = True
) -> Arguments:
    """The arrays of a problem as torch's, all but steps and masks in ``dtype``."""

    def tensor(x: Any) -> Tensor:
        return torch.from_numpy(x).to(dtype, copy=True).requires_grad_(requires_grad)

    given = problem.extras
    reset_h, reset_c = (*map(tensor, given.get("reset_hx", ())), None, None)[:2]
    keep = (None if m is None else torch.from_numpy(m) for m in given.get("zoneout_mask", ()))
    dropout = given.get("dropout_mask")
    return Arguments(
        problem.options,
        tensor(problem.input),
        tuple(map(tensor, problem.hx or ())),
        list(map(tensor, problem.weights)),
        {name: torch.from_numpy(x.copy()) for name, x in problem.rows.items()},
        Extras(
            reset_h,
            reset_c,
            None if dropout is None else torch.from_numpy(dropout).to(dtype),
            *(*keep, None, None)[:2],
        ),
    )


def moved(case: Arguments, device: torch.device) -> Arguments:
    """The case on a device, batch_sizes apart, its leaves leaves there."""

    def move(x: Tensor) -> Tensor:
        return x.detach().to(device).requires_grad_(x.requires_grad)

    steps = {k: v if k == "batch_sizes" else v.to(device) for k, v in case.steps.items()}
    return case._replace(steps=steps).with_leaves(*map(move, case.leaves))


def as_function(
    case: Arguments, run: Callable[[Arguments], list[Tensor]]
) -> tuple[Callable[..., list[Tensor]], tuple[Tensor, ...]]:
    """``run`` as a function of tensors alone, as a compiler wants it, and the case's own."""
    names, count = tuple(case.steps), len(case.leaves)

    def call(*tensors: Tensor) -> list[Tensor]:
        given = case.with_leaves(*tensors[:count])
        return run(given._replace(steps=dict(zip(names, tensors[count:], strict=True))))

    return call, (*case.leaves, *case.steps.values())


def replayed(
    case: Arguments,
    other: Arguments,
    run: Callable[[Arguments], list[Tensor]],
    gradients: Callable[[Arguments, list[Tensor]], tuple[Tensor, ...]],
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
