"""Read digits row by row, with torch's recurrent layers and with fastrnn's, and compare them.

An image of 8 rows of 8 pixels is a sequence of 8 steps: a recurrent layer of 128 units reads it,
and a linear layer classifies the digit from the last output. Each model is trained twice from the
same seed, with torch's layer and with fastrnn's. The epochs alternate, so that both run under the
same load of the machine.

    python examples/digits.py

Exit code 1 if an accuracy is too low, or the two loss curves differ.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastrnn
from common import Figure, arguments, panels, progress, save, verdict

SEED, BATCH, UNITS, LARGEST_GRADIENT = 0, 64, 128, 1.0
LOWEST_ACCURACY = 0.95  # on held-out images
FIRST_DIFFERENCE = 1e-4  # between the two mean losses of the first epoch


class LoopLSTM(nn.LSTM):
    """An LSTM with relu in place of tanh, in plain torch, because torch.nn has no such option."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = c = x.new_zeros(x.shape[0], self.hidden_size)
        outputs = []
        for step in F.linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1):
            i, f, g, o = (step + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.relu()
            h = o.sigmoid() * c.relu()
            outputs.append(h)
        return torch.stack(outputs, 1), (h[None], c[None])


LAYERS = {  # torch's, fastrnn's, largest difference of an epoch (relu's kink amplifies rounding)
    "LSTM": (nn.LSTM, fastrnn.LSTM, 0.001),
    "GRU": (nn.GRU, fastrnn.GRU, 0.001),
    "LSTM, relu": (LoopLSTM, partial(fastrnn.LSTM, activation="relu"), 0.1),
}


class Run:
    """One model in training, with a loss and a time for each epoch."""

    def __init__(self, make_layer: type[nn.Module], epochs: int) -> None:
        torch.manual_seed(SEED)  # the same seed gives the same weights
        self.layer, self.head = make_layer(8, UNITS, batch_first=True), nn.Linear(UNITS, 10)
        self.parameters = [*self.layer.parameters(), *self.head.parameters()]
        # A large eps keeps Adam from amplifying rounding errors of gradients near zero.
        self.optimiser = torch.optim.Adam(self.parameters, lr=4e-3, eps=1e-3)
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, epochs)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def predict(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images)[0][:, -1])

    def train_epoch(self, images: Tensor, labels: Tensor) -> None:
        order = torch.randperm(len(images), generator=torch.manual_seed(len(self.losses)))
        start, total = time.perf_counter(), 0.0
        for batch in order.split(BATCH):
            self.optimiser.zero_grad()
            loss = F.cross_entropy(self.predict(images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
            self.optimiser.step()
            total += loss.item() * len(batch)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(total / len(images))
        self.rate.step()

    @torch.inference_mode()
    def test(self, images: Tensor, labels: Tensor) -> float:
        return (self.predict(images).argmax(1) == labels).float().mean().item()


def plot(pairs: dict[str, list[Run]]) -> Figure:
    figure, above, below = panels(2, height=6.0, height_ratios=(3, 2))
    for name, colour, (theirs, ours) in zip(pairs, ("C0", "C1", "C2"), pairs.values(), strict=True):
        above.semilogy(theirs.losses, color=colour, lw=5, alpha=0.35, label=f"{name}, torch")
        above.semilogy(ours.losses, color=colour, lw=1.5, ls="--", label=f"{name}, fastrnn")
    above.set(title="the same training loss", xlabel="epoch", ylabel="cross-entropy")
    above.legend(ncols=2)
    places = torch.arange(len(pairs)).numpy()
    for k, label in enumerate(("torch", "fastrnn")):
        seconds = [statistics.median(pair[k].seconds) for pair in pairs.values()]
        bars = below.barh(places + 0.4 * k - 0.2, seconds, 0.4, color=("0.6", "C3")[k], label=label)
        below.bar_label(bars, fmt=" %.2f")
    below.set_yticks(places, pairs)
    below.set(title="seconds of an epoch", xlim=(0, 1.3 * below.get_xlim()[1]))
    below.invert_yaxis()
    below.grid(visible=False)
    below.legend(loc="lower right")
    return figure


def main() -> int:
    options = arguments("Train a digit reader with torch and fastrnn.", "digits.png", epochs=30)
    pixels, names = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, names, test_size=0.2, random_state=SEED, stratify=names)
    images, held_out = (torch.tensor(x, dtype=torch.float32).view(-1, 8, 8) for x in split[:2])
    labels, held_out_labels = map(torch.tensor, split[2:])

    rows, pairs, failed = [], {}, False
    for name, (*makers, limit) in LAYERS.items():
        pair = pairs[name] = [Run(make, options.epochs) for make in makers]
        for epoch in range(options.epochs):
            for run in pair if epoch % 2 else reversed(pair):
                run.train_epoch(images, labels)
            progress(name, epoch + 1, options.epochs, pair[1].losses[-1])
        accuracies = [run.test(held_out, held_out_labels) for run in pair]
        apart = [abs(a - b) for a, b in zip(*(run.losses for run in pair), strict=True)]
        agree = apart[0] <= FIRST_DIFFERENCE and max(apart) <= limit
        accurate = options.quick or min(accuracies) >= LOWEST_ACCURACY
        failed |= not (agree and accurate)
        finding = "losses differ" if not agree else "ok" if accurate else "too low"
        theirs, ours = (statistics.median(run.seconds) for run in pair)
        found = f"{accuracies[0]:8.1%} {accuracies[1]:8.1%} {max(apart):13.1e}"
        times = f"{theirs:8.3f} {ours:8.3f} {theirs / ours:7.2f}"
        rows.append(f"{name:<11} {found} {times}  {finding}")

    save(plot(pairs), options.output)
    print(f"\n{options.epochs} epochs, {torch.get_num_threads()} threads; held-out accuracy")
    print("layer          torch  fastrnn  largest loss  seconds per epoch  torch /")
    print("            accuracy accuracy   difference    torch  fastrnn  fastrnn")
    print(*rows, sep="\n")
    print("torch has no LSTM with relu; its column is a loop of torch operations (LoopLSTM)")
    return verdict(
        not failed,
        "not as expected: see the last column",
        "the dashed curves of fastrnn lie on the wide ones of torch, because the same seed gives "
        "the same weights and the same training; the bars show the time of an epoch.",
    )


if __name__ == "__main__":
    sys.exit(main())
