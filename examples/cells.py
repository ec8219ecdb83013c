"""Five user-written cells as layers, each a plain torch module.

The weekly carbon dioxide series of Mauna Loa (1958 to 2001, from statsmodels) lacks some weeks, and
this example hides two thirds of the others. Five recurrent cells, each a torch module of about ten
lines (see `fastrnn.bench.cells`), read two years of the remaining values week by week, and predict
at each week the difference of the next week from the last observed value. `fastrnn.Recurrent(cell)`
makes the layer. For comparison the same cell is trained with a loop over the steps, for two epochs
from the same weights and in turn: the losses are the same, and the times are compared.

    python examples/cells.py

Exit code 1 if the losses differ, or a cell is not better than the last observed value.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch
from statsmodels.datasets import co2
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, save, verdict
from fastrnn.bench.cells import CELLS, Loop

WINDOW, BURN_IN, STRIDE = 104, 26, 4  # weeks
TRAINING_WEEKS = 1600  # up to November 1988
SHOWN = 1 / 3
UNITS, BATCH = 32, 32
LOOP_EPOCHS = 2
LARGEST_DIFFERENCE = 1e-3  # relative difference of the mean losses of these epochs


class Forecaster(nn.Module):
    """Predicts at each week the difference of the next week from the last observed value."""

    def __init__(self, make_layer: type[nn.Module], cell: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = make_layer(cell(3, UNITS)), nn.Linear(UNITS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])[..., 0]


class Weeks:
    """Windows of the series, (T, N, …): the input, the target, and a mask of existing targets."""

    def __init__(self, values: np.ndarray, shown: np.ndarray) -> None:
        present = np.isfinite(values)
        shown = shown & present
        weeks = np.arange(len(values))
        latest = np.maximum.accumulate(np.where(shown, weeks, 0))  # the week of the last value
        last = np.where(present, values, 0)[latest]
        elapsed = weeks - np.concatenate([[0], latest[:-1]])  # since the previous value
        self.starts = range(int(shown.argmax()), len(values) - WINDOW, STRIDE)

        def cut(series: np.ndarray, by: int = 0) -> np.ndarray:
            return np.stack([series[s + by : s + by + WINDOW] for s in self.starts], 1)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.tensor(array, dtype=torch.float32)

        mask, seen = cut(shown), cut(last)
        # Relative to the window's first value, so that the model also fits later, higher years.
        x = np.where(mask, seen - seen[0], 0)
        self.input = tensor(np.stack([x / 3, mask, cut(elapsed) / 4], -1))
        self.target = tensor(np.nan_to_num(cut(values, 1) - seen))
        counts = cut(present, 1)
        counts[:BURN_IN] = False
        self.counts = torch.tensor(counts)
        self.seen, self.truth = seen, cut(values, 1)

    def loss(self, model: nn.Module, of: Tensor | slice) -> Tensor:
        """The mean squared error, in ppm²."""
        counts, target = self.counts[:, of], self.target[:, of]
        return ((model(self.input[:, of]) - target)[counts] ** 2).mean()


class Run:
    """One model being trained: a loss and a time for each epoch."""

    def __init__(self, make_layer: type[nn.Module], cell: type[nn.Module], epochs: int) -> None:
        torch.manual_seed(0)  # the same seed gives the same weights
        self.model = Forecaster(make_layer, cell)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-2, eps=1e-4)
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, epochs)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train_epoch(self, weeks: Weeks) -> None:
        generator = torch.Generator().manual_seed(len(self.losses))
        start, losses = time.perf_counter(), []
        for batch in torch.randperm(len(weeks.starts), generator=generator).split(BATCH):
            self.optimiser.zero_grad()
            loss = weeks.loss(self.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(statistics.fmean(losses))
        self.rate.step()


def plot(times: dict[str, list[float]], weeks: Weeks, forecasts: dict[str, Tensor]) -> Figure:
    figure, above, below = panels(2, height=7.0, height_ratios=(2, 3))
    places = np.arange(len(times))
    for k, label in enumerate(("fastrnn.Recurrent", "a loop in torch")):
        bars = above.barh(places + 0.4 * k - 0.2, [p[k] for p in times.values()], 0.4, label=label)
        above.bar_label(bars, fmt=" %.2f")
    above.set(title="seconds of an epoch", xlim=(0, 1.6 * max(map(max, times.values()))))
    above.set_yticks(places, times)
    above.invert_yaxis()
    above.grid(visible=False)
    above.legend(loc="lower right")
    after, window = slice(BURN_IN, None), len(weeks.starts) // 2
    weeks_shown = np.arange(BURN_IN, WINDOW)
    below.plot(weeks_shown, weeks.truth[after, window], "k", lw=2.5, label="observed")
    seen = weeks.seen[after, window]
    below.step(weeks_shown, seen, "0.6", label="last observed value", where="post")
    for name, forecast in forecasts.items():
        below.plot(weeks_shown, weeks.seen[after, window] + forecast[after, window].numpy(),
                   lw=1.2, label=name)  # fmt: skip
    below.set(title="the next week's carbon dioxide, in a held-out window", xlabel="week")
    below.set_ylabel("CO2, ppm")
    below.legend(ncols=3, loc="upper center")
    low, high = below.get_ylim()
    below.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    return figure


def main() -> int:
    options = arguments("Train five user-written cells.", "cells.png", epochs=20)
    values = co2.load_pandas().data["co2"].to_numpy(np.float64)
    shown = np.random.default_rng(0).random(len(values)) < SHOWN
    training = Weeks(values[:TRAINING_WEEKS], shown[:TRAINING_WEEKS])
    held_out = Weeks(values[TRAINING_WEEKS:], shown[TRAINING_WEEKS:])
    everything = slice(None)

    times, forecasts, errors, agree = {}, {}, {}, True
    for name, cell in CELLS.items():
        ours, loop = (Run(make, cell, options.epochs) for make in (fastrnn.Recurrent, Loop))
        for epoch in range(options.epochs):
            both = [ours, loop] if epoch % 2 else [loop, ours]
            for run in both if epoch < LOOP_EPOCHS else [ours]:
                run.train_epoch(training)
        apart = [abs(a / b - 1) for a, b in zip(ours.losses, loop.losses, strict=False)]
        agree &= max(apart) <= LARGEST_DIFFERENCE
        times[name] = [statistics.median(run.seconds) for run in (ours, loop)]
        with torch.inference_mode():
            errors[name] = held_out.loss(ours.model, everything).sqrt().item()
            forecasts[name] = ours.model(held_out.input)
    naive = held_out.loss(lambda x: torch.zeros(x.shape[:2]), everything).sqrt().item()
    save(plot(times, held_out, forecasts), options.output)

    print(f"\n{len(training.starts)} windows of {WINDOW} weeks, {options.epochs} epochs, {UNITS} "
          f"units, {torch.get_num_threads()} threads")  # fmt: skip
    print("cell       seconds per epoch      loop /  error of the next week,")
    print("         fastrnn        loop   fastrnn  ppm, on held-out years")
    for name, (ours_time, loop_time) in times.items():
        ratio = f"{loop_time / ours_time:10.1f}"
        print(f"{name:<8}{ours_time:8.3f}{loop_time:12.3f}{ratio}{errors[name]:9.2f}")
    print(f"last observed value{naive:28.2f}")
    good = max(errors.values()) < naive
    return verdict(
        agree and (options.quick or good),
        "not better than the last value" if agree else "losses differ",
        "both ways reach the same losses. The loop spends its time in torch's small calls, "
        "thousands for each batch, each with a fixed overhead; the engine has none of them.",
    )


if __name__ == "__main__":
    sys.exit(main())
