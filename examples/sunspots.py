"""Forecast the yearly number of sunspots, one to eleven years ahead.

The series (1700 to 2008, from statsmodels) has cycles of about eleven years. A GRU reads 44 years
and predicts the next eleven in one step; the forecast is the mean of several networks trained from
different seeds. It is compared with two baselines: the value of eleven years before
(seasonal-naive), and an autoregression of nine years (statsmodels' AutoReg). All of them are fitted
only to the years up to 1930, and forecast from every later year.

    python examples/sunspots.py

Exit code 1 if the network is worse than the seasonal-naive forecast.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from statsmodels.datasets import sunspots
from statsmodels.tsa.ar_model import AutoReg
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, save, verdict

WINDOW, HORIZON, CYCLE, ORDER = 44, 11, 11, 9  # years
LAST_TRAINING_YEAR = 1930
UNITS = 32
ZERO = 2.0  # zero sunspots are about so many standard deviations below the mean


class Forecaster(nn.Module):
    """Predicts the next years from a window, as differences from the window's last value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fastrnn.GRU(1, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, HORIZON)

    def forward(self, windows: Tensor) -> Tensor:
        output, _ = self.layer(windows[..., None])
        return windows[:, -1:] + self.head(output[:, -1])


def windows_of(series: Tensor) -> tuple[Tensor, Tensor]:
    """Every window of the series, and the years that follow it."""
    pieces = series.unfold(0, WINDOW + HORIZON, 1)
    return pieces[:, :WINDOW], pieces[:, WINDOW:]


def train(series: Tensor, seed: int, epochs: int) -> Forecaster:
    torch.manual_seed(seed)
    model, (windows, targets) = Forecaster(), windows_of(series)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(windows)).split(32):
            optimiser.zero_grad()
            # Data augmentation, because 200 years are few: scaled cycles, and noise.
            height = torch.empty(len(batch), 1).uniform_(0.7, 1.3)
            past, future = ((x[batch] + ZERO) * height - ZERO for x in (windows, targets))
            past = past + 0.2 * torch.randn_like(past)
            loss = nn.functional.smooth_l1_loss(model(past), future)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        rate.step()
    return model


def autoregression(training: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The forecasts of an AutoReg fitted to the training years, from each window."""
    fitted = AutoReg(training, ORDER).fit().params
    past = windows.copy()
    for _ in range(HORIZON):
        following = fitted[0] + past[:, : -ORDER - 1 : -1] @ fitted[1:]
        past = np.concatenate([past, following[:, None]], 1)
    return past[:, WINDOW:]


def plot(years: np.ndarray, truth: np.ndarray, found: dict[str, np.ndarray], rmse: dict) -> Figure:
    figure, above, below = panels(2, height=6.4)
    above.plot(years, truth[:, 4], "k", lw=2, label="observed")
    for name, forecast in found.items():
        above.plot(years, forecast[:, 4], lw=1.2, label=name)
        below.plot(range(1, HORIZON + 1), rmse[name], "o-", ms=4, label=name)
    above.set(title="the number of sunspots, forecast five years ahead", xlabel="year")
    above.set_ylim(0, 1.3 * truth.max())
    below.set(title="error on the years after training", xlabel="years ahead")
    below.set(ylabel="RMSE, sunspots a year", ylim=(0, None))
    above.legend(ncols=4, loc="upper center")
    below.legend()
    return figure


def main() -> int:
    options = arguments("Forecast sunspots with a GRU.", "sunspots.png", epochs=40, networks=5)
    data = sunspots.load_pandas().data
    years, spots = (data[c].to_numpy(np.float64) for c in ("YEAR", "SUNACTIVITY"))
    root = np.sqrt(spots)  # which makes the cycles more even in height
    split = int(LAST_TRAINING_YEAR - years[0]) + 1
    mean, scale = root[:split].mean(), root[:split].std()
    scaled = torch.tensor((root - mean) / scale, dtype=torch.float32)

    models = [train(scaled[:split], seed, options.epochs) for seed in range(options.networks)]
    windows, targets = windows_of(scaled[split - WINDOW :])
    with torch.inference_mode():
        gru = torch.stack([model(windows) for model in models]).mean(0)

    def spots_of(values: np.ndarray) -> np.ndarray:
        return np.maximum(values * scale + mean, 0) ** 2

    past, truth = windows.double().numpy(), spots_of(targets.double().numpy())
    found = {
        "seasonal-naive": spots_of(past[:, WINDOW - CYCLE :]),
        f"AR({ORDER})": spots_of(autoregression(scaled[:split].double().numpy(), past)),
        "GRU": spots_of(gru.double().numpy()),
    }
    rmse = {name: np.sqrt(((f - truth) ** 2).mean(0)) for name, f in found.items()}
    save(plot(years[split + 4 :][: len(truth)], truth, found, rmse), options.output)

    print(f"Forecasts from {len(truth)} years after {LAST_TRAINING_YEAR}; RMSE, sunspots a year")
    print(f"{'years ahead':<15}" + "".join(f"{h:>7}" for h in (1, 2, 3, 5, 8, 11)) + "   mean")
    for name, errors in rmse.items():
        chosen = "".join(f"{errors[h - 1]:7.1f}" for h in (1, 2, 3, 5, 8, 11))
        print(f"{name:<15}{chosen}{errors.mean():7.1f}")
    better = rmse["GRU"].mean() < rmse["seasonal-naive"].mean()
    return verdict(
        options.quick or better,
        "worse than the seasonal-naive forecast",
        "one year ahead the GRU and the autoregression have half the error of repeating the last "
        "cycle (seasonal-naive); over all eleven years the GRU's mean error is the lowest.",
    )


if __name__ == "__main__":
    sys.exit(main())
