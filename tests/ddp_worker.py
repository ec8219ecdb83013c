"""One of the processes of test_modules.py's DDP test: rank, world size, rendezvous file, result."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastrnn


def model_and_batch() -> tuple[torch.nn.Module, torch.Tensor]:
    """The same on every rank and in the test."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "lstm": fastrnn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
            "gru": fastrnn.GRU(8, 5, batch_first=True),
        }
    ).double()
    return model, torch.randn(6, 5, 3, dtype=torch.float64)


class Net(torch.nn.Module):
    """The two layers, one on the other."""

    def __init__(self, layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = self.layers["lstm"](input)[0]
        return self.layers["gru"](hidden)[0]


def main() -> None:
    rank, world, rendezvous, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    layers, batch = model_and_batch()
    net = DistributedDataParallel(Net(layers))
    net(batch.chunk(world)[rank]).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in layers.named_parameters()}, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
