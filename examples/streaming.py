"""Read digits as they arrive, row by row, in float32, bfloat16 and int8.

An LSTM of 256 units learns to classify a digit from the 8 rows of its image. Then each held-out
image is streamed, one row of 8 pixels per step, and classified after the last row. The table shows
the accuracy, the largest difference of h from float32, and the time of a step.

    python examples/streaming.py

Exit code 1 if an accuracy is too low, or too far below float32's.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, progress, save, verdict

SEED, BATCH, UNITS, ROWS = 0, 64, 256, 8
LOWEST_ACCURACY = 0.95
LARGEST_LOSS = 0.01  # of accuracy, compared with float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}  # of x


class Streamed(NamedTuple):
    """The results of one dtype: h after every row of every image, and microseconds per step."""

    h: Tensor  # (images, ROWS, UNITS)
    microseconds: float


def train(images: Tensor, labels: Tensor, epochs: int) -> tuple[fastrnn.LSTM, nn.Linear]:
    torch.manual_seed(SEED)
    layer, head = fastrnn.LSTM(8, UNITS, batch_first=True), nn.Linear(UNITS, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(BATCH):
            optimiser.zero_grad()
            loss = F.cross_entropy(head(layer(images[batch])[0][:, -1]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            total += loss.item() * len(batch)
        rate.step()
        progress("training", epoch + 1, epochs, total / len(images))
    return layer.eval(), head


def stream_images(stream: fastrnn.Stream, images: Tensor) -> Streamed:
    h, seconds = torch.empty(len(images), ROWS, UNITS), []
    for image, kept in zip(images.unsqueeze(2), h, strict=True):  # image: (ROWS, 1, 8)
        stream.reset()
        start = time.perf_counter()
        for x, place in zip(image, kept, strict=True):
            place.copy_(stream.step(x)[0])  # copied, because the next step overwrites it
        seconds.append((time.perf_counter() - start) / ROWS)
    return Streamed(h, statistics.median(seconds) * 1e6)


def plot(found: dict[str, Streamed], accuracies: dict[str, float]) -> Figure:
    figure, times, errors = panels(2, height=5.6, height_ratios=(2, 3))
    times.grid(visible=False)
    bars = times.barh(list(found), [one.microseconds for one in found.values()])
    times.bar_label(bars, [f" {accuracies[name]:.1%} accuracy" for name in found])
    times.set(title="time of a step", xlabel="microseconds")
    times.invert_yaxis()
    times.margins(x=0.25)
    for name in list(found)[1:]:
        apart = (found[name].h - found["float32"].h).abs().amax((0, 2))
        errors.plot(range(1, ROWS + 1), apart, "o-", label=name)
    errors.set(title="largest difference of h from float32", xlabel="rows read", yscale="log")
    errors.legend()
    return figure


def main() -> int:
    options = arguments("Stream digits in three dtypes.", "streaming.png", epochs=25)
    pixels, names = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, names, test_size=0.2, random_state=SEED, stratify=names)
    images, held_out = (torch.tensor(x, dtype=torch.float32).view(-1, ROWS, 8) for x in split[:2])
    labels, held_out_labels = map(torch.tensor, split[2:])
    layer, head = train(images, labels, options.epochs)

    found, accuracies, failed = {}, {}, False
    print(f"\n{len(held_out)} images of {ROWS} rows, {torch.get_num_threads()} threads")
    print("dtype     accuracy  largest difference  microseconds per step")
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            stream = fastrnn.Stream(layer, dtype=name)
            one = found[name] = stream_images(stream, held_out.to(dtype))
            named = head(one.h[:, -1]).argmax(1)
            accuracies[name] = (named == held_out_labels).float().mean().item()
            accurate = accuracies[name] >= LOWEST_ACCURACY
            close = accuracies[name] >= accuracies["float32"] - LARGEST_LOSS
            failed |= not (options.quick or (accurate and close))
            finding = "ok" if options.quick or (accurate and close) else "too low"
            apart = (one.h - found["float32"].h).abs().max().item()
            figures = f"{accuracies[name]:8.1%} {apart:19.1e} {one.microseconds:20.2f}"
            print(f"{name:<9} {figures}  {finding}")
    save(plot(found, accuracies), options.output)
    return verdict(
        not failed,
        "an accuracy is too low: see the last column",
        "int8 weights take a quarter of float32's bytes and less time; h moves by a few "
        "hundredths, and the accuracy stays.",
    )


if __name__ == "__main__":
    sys.exit(main())
