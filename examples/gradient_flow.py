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

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn
from common import save

SEED, BATCH, UNITS, STEPS = 0, 32, 64, 200
CLIP = 1.0  # the largest norm of the gradient of all weights together
GUESS = 1 / 6  # the mean squared error of always answering 1, the mean of the sums
LARGE = 4.0  # how much larger the large recurrent weights are


class Case(NamedTuple):
    layer: nn.Module
    clip: float | None
    flow: str  # the verdict before training
    stays: bool = True  # whether the weights stay below 100 in training


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


def plot(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    flow, learning, clipping = figure.subplots(1, 3)
    for name, run in runs.items():
        if name.startswith("RNN, large"):
            clipping.semilogy(run.largest, label=name)
        else:
            mean = torch.tensor(run.losses).unfold(0, min(25, len(run.losses)), 1).mean(-1)
            learning.semilogy(mean, label=name)
        if not name.endswith("clipped"):
            flow.semilogy(run.curve, label=name)
    learning.axhline(GUESS, color="grey", linestyle=":", label="a constant answer")
    flow.set(title="norm of the state's gradient, untrained", xlabel="step")
    learning.set(title="mean squared error", xlabel="update")
    clipping.set(title="the largest weight, with SGD", xlabel="update")
    for axes in (flow, learning, clipping):
        axes.legend()
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show vanishing and exploding gradients.")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="do not check that the LSTM learns")
    parser.add_argument("--output", type=Path, default=Path("demo/gradient_flow.png"))
    options = parser.parse_args()
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
    plot(runs, options.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
