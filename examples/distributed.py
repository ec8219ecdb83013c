"""Train one model with sharded parameters on several processes, and compare with one process.

A stack of an LSTM and a GRU reads the rows of digit images. With FSDP2 (`fully_shard`) each process
keeps its part of the parameters, of their gradients and of the optimiser's state; FSDP gathers a
layer's parameters before the layer runs. Each process reads its part of every batch. The time axis
is not split: each process runs a layer's whole recurrence for its rows. The same model is also
trained with the whole batch in one process: the losses must be equal.

    torchrun --nproc-per-node 2 examples/distributed.py
    python examples/distributed.py

Exit code 1 if the two losses differ, or the loss does not fall.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fastrnn
from common import Figure, arguments, panels, save, verdict

SEED, BATCH, UNITS = 0, 64, 64
LARGEST_DIFFERENCE = 1e-3  # of a loss: the gradients are summed in different orders


class Reader(nn.Module):
    """A bidirectional LSTM, a GRU, and a linear classifier of the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastrnn.LSTM(8, UNITS, bidirectional=True)
        self.gru = fastrnn.GRU(2 * UNITS, UNITS)
        self.head = nn.Linear(UNITS, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Steps first, because a layer with batch_first returns a view, about which FSDP warns.
        return self.head(self.gru(self.lstm(images.transpose(0, 1))[0])[0][-1])


def start() -> tuple[int, int]:
    """Join the processes that torchrun has started, or run alone; return rank and world size."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def sharded(model: Reader) -> Reader:
    """Shard layer by layer, so that only one layer is gathered at a time."""
    for part in (model.lstm, model.gru, model.head):
        fully_shard(part)
    return fully_shard(model)


def train(model: Reader, images: Tensor, labels: Tensor, epochs: int, part: slice) -> list[float]:
    """The mean loss of each epoch; this process reads ``part`` of every batch."""
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3, eps=1e-3)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        total = torch.zeros(())
        batches = order[: len(order) // BATCH * BATCH].split(BATCH)
        for batch in batches:
            rows = batch[part]
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimiser.step()
            total += loss.detach()
        losses.append(total.item() / len(batches))
    return losses


def plot(curves: dict[str, list[float]]) -> Figure:
    figure, axes = panels()
    looks = ({"lw": 6, "alpha": 0.35}, {"lw": 1.5, "ls": "--"})
    for (label, losses), look in zip(curves.items(), looks, strict=True):
        axes.semilogy(range(1, len(losses) + 1), losses, label=label, **look)
    axes.set(title="one model, sharded and whole", xlabel="epoch", ylabel="training loss")
    axes.legend()
    return figure


def main() -> int:
    options = arguments("Train on several processes.", "distributed.png", epochs=15)
    rank, world = start()
    if BATCH % world:
        sys.exit(f"a batch of {BATCH} rows cannot be split evenly over {world} processes")
    pixels, names = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 8, 8)
    labels = torch.tensor(names)

    torch.manual_seed(SEED)  # the same seed gives the same weights
    model = sharded(Reader())
    rows = BATCH // world
    mine = train(model, images, labels, options.epochs, slice(rank * rows, (rank + 1) * rows))
    mean = torch.tensor(mine)
    dist.all_reduce(mean)
    together = (mean / world).tolist()
    held = sum(parameter.to_local().numel() for parameter in model.parameters())

    failed = 0
    if rank == 0:
        torch.manual_seed(SEED)
        whole = Reader()
        alone = train(whole, images, labels, options.epochs, slice(None))
        apart = max(abs(a - b) for a, b in zip(together, alone, strict=True))
        falls = options.quick or options.epochs == 1 or together[-1] < together[0]
        curves = {f"sharded over {world}": together, "in one process": alone}
        save(plot(curves), options.output)
        parameters = sum(parameter.numel() for parameter in whole.parameters())
        print(f"processes: {world}; process 0 holds {held:,} of {parameters:,} parameters")
        print(f"loss of epoch {options.epochs}: {together[-1]:.4f} sharded, {alone[-1]:.4f} alone")
        print(f"largest difference of an epoch: {apart:.1e}")
        failed = verdict(
            apart <= LARGEST_DIFFERENCE and falls,
            "the losses differ" if falls else "the loss does not fall",
            "the dashed curve lies on the wide one: the sharded model trains like the whole one, "
            "although each process holds only its part of the parameters.",
        )
    dist.barrier()
    dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    sys.exit(main())
