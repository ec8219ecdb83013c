"""Show the gradient over 200 steps of backpropagation through time, and its effect on learning.

The adding problem (Hochreiter & Schmidhuber 1997): a sequence of random numbers, of which two are
marked, one in each half; the target is their sum. To learn it, the gradient from the end must reach
the marks. `fastrnn.gradient_flow` shows how much of it arrives. An RNN's gradient vanishes. With
larger recurrent weights it explodes, and without clipping (Pascanu et al. 2013) the first update
ruins the weights. The gradient of an LSTM whose forget gates start open does neither, and the LSTM
learns.

    python examples/gradient_flow.py

Exit code 1 if a gradient or a training run does not behave as described.
"""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, save, verdict

SEED, BATCH, UNITS, STEPS = 0, 32, 64, 200
CLIP = 1.0  # the largest norm of the gradient of all weights together
GUESS = 1 / 6  # the mean squared error of always answering 1, the mean of the sums
LARGE = 4.0  # how much larger the large recurrent weights are


class Case(NamedTuple):
    layer: nn.Module
    clip: float | None
    flow: str  # the verdict before training
    stays: bool = True  # whether the weights stay below 100 in training


LOOKS: list[dict[str, Any]] = [
    {"color": "C0"}, {"color": "C1", "lw": 2},
    {"color": "C3"}, {"color": "C2", "lw": 4, "alpha": 0.4}, {"color": "C4", "ls": "--"},
]  # fmt: skip


def made(cell: str, gain: float = 1.0, **options: Any) -> nn.Module:
    """A layer from the fixed seed, with its recurrent weights multiplied by ``gain``."""
    torch.manual_seed(SEED)
    layer = getattr(fastrnn, cell)(2, UNITS, batch_first=True, **options)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(gain)
        if cell == "LSTM":  # time constants of 1 … STEPS steps (Tallec & Ollivier 2018)
            keep = torch.linspace(1.0, STEPS - 1.0, UNITS).log()
            layer.bias_ih_l0.copy_(torch.cat([-keep, keep, torch.zeros(2 * UNITS)]))
            layer.bias_hh_l0.zero_()
    return layer


CASES = {
    "RNN": Case(made("RNN"), CLIP, "vanishing"),
    "LSTM": Case(made("LSTM"), CLIP, "steady"),
    "RNN, large weights": Case(made("RNN", LARGE), None, "exploding", stays=False),
    "RNN, large weights, clipped": Case(made("RNN", LARGE), CLIP, "exploding"),
    "RNN, large weights, grad_clip": Case(made("RNN", LARGE, grad_clip=1e-3), None, "steady"),
}


def adding_problem(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers and marks (rows, STEPS, 2), and the sums of the marked numbers (rows, 1)."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(rows, STEPS, generator=generator)
    half = STEPS // 2
    places = torch.randint(half, (rows, 2), generator=generator) + torch.tensor([0, half])
    marks = torch.zeros(rows, STEPS).scatter_(1, places, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdim=True)


class Run:
    """A layer with a linear read-out of its last output, and its measurements."""

    def __init__(self, case: Case) -> None:
        self.layer, self.clip, self.expected, self.stays = case
        torch.manual_seed(SEED)
        self.head = nn.Linear(UNITS, 1)
        self.parameters = [*self.layer.parameters(), *self.head.parameters()]
        with fastrnn.gradient_flow(self.layer) as flow:
            self.loss(SEED).backward()
        self.curve = list(flow.norms.values())[-1]  # of h, of an LSTM c
        self.verdict = list(flow.summary.values())[-1].verdict
        self.table = flow.table()
        self.losses: list[float] = []
        self.largest: list[float] = []  # the largest weight before each update

    def loss(self, seed: int) -> Tensor:
        inputs, sums = adding_problem(BATCH, seed)
        return F.mse_loss(self.head(self.layer(inputs)[0][:, -1]), sums)

    def train(self, optimiser: torch.optim.Optimizer, updates: int) -> None:
        for update in range(updates):
            self.largest.append(max(p.abs().max().item() for p in self.parameters))
            optimiser.zero_grad()
            loss = self.loss(update)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)
            optimiser.step()
            self.losses.append(loss.item())


def plot(runs: dict[str, Run]) -> Figure:
    figure, flow, learning, clipping = panels(3, height=9.6)
    for (name, run), look in zip(runs.items(), LOOKS, strict=True):
        if name.startswith("RNN, large"):
            clipping.semilogy(run.largest, label=name, **look)
        else:
            mean = torch.tensor(run.losses).unfold(0, min(25, len(run.losses)), 1).mean(-1)
            learning.semilogy(mean, label=name, **look)
        if not name.endswith("clipped"):  # clipping acts on the weights' gradient, after this one
            flow.semilogy(run.curve, **look)
            below = {"RNN": 16, "RNN, large weights, grad_clip": -16}.get(name, 6)  # in points
            here = (STEPS // 10, run.curve[STEPS // 10])
            flow.annotate(name, here, (0, below), textcoords="offset points", color=look["color"])
    learning.axhline(GUESS, color="grey", linestyle=":", label="a constant answer")
    flow.set(title="norm of the state's gradient at each step, untrained", xlabel="step")
    learning.set(title="mean squared error of the adding problem", xlabel="update")
    clipping.set(title="the largest weight, trained with SGD", xlabel="update")
    flow.set_yticks([10.0**power for power in range(-40, 21, 20)])
    learning.legend()
    clipping.legend()
    return figure


def main() -> int:
    options = arguments(
        "Show vanishing and exploding gradients.", "gradient_flow.png",
        "do not check that the LSTM learns", updates=1000,
    )  # fmt: skip
    runs = {name: Run(case) for name, case in CASES.items()}
    failed = False
    for name, run in runs.items():
        large = name.startswith("RNN, large")
        kind, updates = (torch.optim.SGD, 100) if large else (torch.optim.Adam, options.updates)
        run.train(kind(run.parameters, lr=0.01), updates)
        error = statistics.mean(run.losses[-50:])
        failed |= run.verdict != run.expected or (run.largest[-1] < 100) != run.stays
        failed |= not options.quick and (error < GUESS / 10) != (name == "LSTM")
        print(f"{name}: {run.verdict}; after training: error {error:.4f},", end=" ")
        print(f"largest weight {run.largest[-1]:.1e}\n{run.table}\n")
    save(plot(runs), options.output)
    return verdict(
        not failed,
        "a gradient or a training run does not behave as described",
        "from the last step to the first, the RNN's gradient vanishes, with large weights it "
        "explodes, and the LSTM's keeps its size: only the LSTM learns. Clipping, of the whole "
        "gradient or at every step (grad_clip), saves the large weights from the first update.",
    )


if __name__ == "__main__":
    sys.exit(main())
