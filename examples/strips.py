"""Two kinds of input: a strip of digit images, and the signs between them.

"7 − 3 + 9 …": the digits are images (scikit-learn's), read by a small convolutional network; the
signs are symbols with an embedding. An LSTM takes both at every step and predicts the running
total. The strips have different lengths; loss and accuracy cover only the existing steps.

    python examples/strips.py

Exit code 1 if too few totals of strips of held-out images are correct.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastrnn
from common import WIDTH, arguments, progress, save, verdict

SEED, UNITS, LONGEST, LIMIT, LOWEST_ACCURACY = 0, 128, 6, 20, 0.8
SIGNS = "+-"


class Calculator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        self.sign = nn.Embedding(len(SIGNS), 16)
        self.layer = fastrnn.LSTM(64 + 16, UNITS)
        self.head = nn.Linear(UNITS, 2 * LIMIT + 1)  # totals from -LIMIT to LIMIT

    def forward(self, images: Tensor, signs: Tensor, lengths: Tensor) -> Tensor:
        """Logits (T, B, totals) from images (T, B, 8, 8) and the sign before each image (T, B)."""
        seen = self.eye(images.flatten(0, 1)[:, None]).unflatten(0, images.shape[:2])
        output, _ = self.layer(torch.cat([seen, self.sign(signs)], -1), lengths=lengths)
        return self.head(output)


class Strips:
    """Draws strips of images, with signs that keep every total within LIMIT."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
        self.images, self.labels, self.random = images, labels, np.random.default_rng(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (T, count, 8, 8), signs and totals (T, count), lengths (count,)."""
        chosen = self.random.integers(len(self.images), size=(LONGEST, count))
        digits, signs = self.labels[chosen], np.zeros((LONGEST, count), np.int64)
        totals = digits.copy()
        for t in range(1, LONGEST):
            minus = self.random.random(count) < 0.5
            minus = np.where(totals[t - 1] + digits[t] > LIMIT, True, minus)
            minus = np.where(totals[t - 1] - digits[t] < -LIMIT, False, minus)
            signs[t] = minus
            totals[t] = totals[t - 1] + np.where(minus, -digits[t], digits[t])
        lengths = self.random.integers(2, LONGEST + 1, size=count)
        return tuple(map(torch.from_numpy, (self.images[chosen], signs, totals, lengths)))


def real_steps(lengths: Tensor) -> Tensor:
    return torch.arange(LONGEST)[:, None] < lengths


def train(model: Calculator, strips: Strips, updates: int) -> list[float]:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=updates)
    losses = []
    for update in range(updates):
        images, signs, totals, lengths = strips.draw(128)
        real = real_steps(lengths)
        logits = model(images, signs, lengths)
        loss = F.cross_entropy(logits[real], totals[real] + LIMIT)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        losses.append(loss.item())
        progress("update", update + 1, updates, losses[-1])
    return losses


def plot(images: Tensor, signs: Tensor, lengths: Tensor, found: Tensor) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.2))
    grid = figure.subplots(4, LONGEST)
    for row, axes in enumerate(grid):
        for t, ax in enumerate(axes):
            ax.axis("off")
            if t < lengths[row]:
                ax.imshow(images[t, row].numpy(), cmap="gray_r")
                sign = SIGNS[int(signs[t, row])] if t else ""
                ax.set_title(f"{sign}  → {int(found[t, row])}", fontsize=12)
    figure.suptitle("the sign before each image → the running total after it")
    return figure


def main() -> int:
    options = arguments("Add up strips of digit images.", "strips.png", updates=800)
    torch.manual_seed(SEED)
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32).reshape(-1, 8, 8)
    images, held_out, digits, held_out_digits = train_test_split(
        pixels, labels, test_size=0.2, random_state=SEED, stratify=labels
    )
    model = Calculator()
    train(model, Strips(images, digits, SEED), options.updates)
    images, signs, totals, lengths = Strips(held_out, held_out_digits, SEED + 1).draw(1000)
    with torch.inference_mode():
        found = model(images, signs, lengths).argmax(-1) - LIMIT
    right = found == totals
    for t in range(LONGEST):
        there = lengths > t
        print(f"after {t + 1} digits: {right[t][there].float().mean().item():6.1%} correct")
    accuracy = right[real_steps(lengths)].float().mean().item()
    print(f"all steps: {accuracy:.1%} correct, on strips of held-out images")
    save(plot(images, signs, lengths, found), options.output)
    return verdict(
        options.quick or accuracy >= LOWEST_ACCURACY,
        f"below {LOWEST_ACCURACY:.0%}",
        "each row of the picture is one strip; the total after an arrow is the previous total plus "
        "or minus the digit below. One misread digit spoils the rest of its strip.",
    )


if __name__ == "__main__":
    sys.exit(main())
