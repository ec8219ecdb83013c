"""Training with differential privacy: per-sample gradients with clipping and noise (DP-SGD).

The trained model must not depend much on any single image (Abadi et al. 2016). `vmap` over `grad`
computes the gradient of each image separately, through a GRU that reads the digit row by row. Each
gradient is scaled down to norm CLIP, and Gaussian noise with standard deviation noise · CLIP is
added to the sum. The privacy budget epsilon is computed with Rényi differential privacy (Mironov,
Talwar and Zhang 2019).

    python examples/private.py

Exit code 1 if the accuracy of the private model on held-out digits is too low.
"""

from __future__ import annotations

import math
import sys
import time

import torch
import torch.nn.functional as F
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastrnn
from common import Figure, arguments, panels, save, verdict

SEED, UNITS, CLIP, DELTA, LOWEST_ACCURACY = 0, 64, 0.5, 1e-4, 0.75
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)  # of epsilon's axis
SHARE = 0.1  # each image takes part in an update with this probability


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = fastrnn.GRU(8, UNITS, batch_first=True), nn.Linear(UNITS, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images)[0][:, -1])


def epsilon(noise: float, updates: int) -> float:
    """The privacy budget of the sampled Gaussian mechanism, over integer orders (eq. 9 there)."""
    spent = []
    for order in range(2, 65) if noise > 0 else ():
        terms = [
            math.log(math.comb(order, k)) + (order - k) * math.log1p(-SHARE) + k * math.log(SHARE)
            + k * (k - 1) / (2 * noise**2) for k in range(order + 1)
        ]  # fmt: skip
        most = max(terms)
        log_moment = most + math.log(sum(math.exp(t - most) for t in terms))
        spent.append((updates * log_moment - math.log(DELTA)) / (order - 1))
    return min(spent, default=math.inf)


def loss_of_one(
    parameters: dict[str, Tensor], model: Reader, image: Tensor, label: Tensor
) -> Tensor:
    logits = functional_call(model, parameters, (image[None],))
    return F.cross_entropy(logits, label[None])


def private_gradients(
    model: Reader, images: Tensor, labels: Tensor, noise: float, size: float
) -> None:
    """Write private gradients to `.grad`; a batch has `size` images on average."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    of_each = vmap(grad(loss_of_one), in_dims=(None, None, 0, 0))
    gradients = of_each(parameters, model, images, labels)  # {name: (images, *shape)}
    lengths = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    scale = (CLIP / lengths).clamp(max=1.0)
    for name, parameter in model.named_parameters():
        total = torch.einsum("n,n...->...", scale, gradients[name])
        parameter.grad = (total + noise * CLIP * torch.randn_like(total)) / size


def train(images: Tensor, labels: Tensor, noise: float, updates: int) -> Reader:
    torch.manual_seed(SEED)
    model = Reader()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(updates):
        chosen = (torch.rand(len(images)) < SHARE).nonzero()[:, 0]  # random, as epsilon assumes
        private_gradients(model, images[chosen], labels[chosen], noise, SHARE * len(images))
        optimiser.step()
    return model


def plot(rows: list[tuple[float, float, float, float]]) -> Figure:
    """Accuracy over epsilon; the first row is the training without noise."""
    figure, axes = panels()
    _, spent, right, _ = zip(*rows[1:], strict=True)
    axes.semilogx(spent, right, "o-", label="with noise")
    for noise, budget, accuracy, _ in rows[1:]:
        axes.annotate(f"noise {noise:g}", (budget, accuracy), (6, -14), textcoords="offset points")
    axes.axhline(rows[0][2], color="k", ls="--", lw=1, label="clipped, without noise")
    ticks = [t for t in TICKS if min(spent) / 2 <= t <= max(spent) * 2]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(spent) / 1.3, max(spent) * 1.6)
    axes.set_ylim(min(right) - 0.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(title="more privacy (left) costs accuracy", ylabel="held-out accuracy")
    axes.set(xlabel=f"epsilon at delta = {DELTA:g}, logarithmic")
    axes.legend(loc="lower right")
    return figure


def main() -> int:
    options = arguments("Train a digit reader with DP-SGD.", "private.png", updates=150)
    pixels, names = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, names, test_size=0.2, random_state=SEED, stratify=names)
    images, held_out = (torch.tensor(x, dtype=torch.float32).view(-1, 8, 8) for x in split[:2])
    labels, held_out_labels = map(torch.tensor, split[2:])
    rows = []
    for noise in (0.0, 0.7, 1.0, 2.0, 4.0):
        start = time.perf_counter()
        model = train(images, labels, noise, options.updates)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            right = (model(held_out).argmax(1) == held_out_labels).float().mean().item()
        rows.append((noise, epsilon(noise, options.updates), right, seconds))

    save(plot(rows), options.output)

    print(f"{options.updates} updates; per-sample gradients clipped to norm {CLIP}")
    print("noise  epsilon  held-out accuracy  seconds")
    for noise, spent, right, seconds in rows:
        print(f"{noise:5.1f}  {spent:7.1f}  {right:17.1%}  {seconds:7.1f}")
    return verdict(
        options.quick or rows[1][2] >= LOWEST_ACCURACY,
        f"below {LOWEST_ACCURACY:.0%} with noise {rows[1][0]}",
        f"noise {rows[1][0]:g} lowers the accuracy from {rows[0][2]:.0%} to {rows[1][2]:.0%}, and "
        f"bounds what the model can tell about any one image (epsilon {rows[1][1]:.1f}).",
    )


if __name__ == "__main__":
    sys.exit(main())
