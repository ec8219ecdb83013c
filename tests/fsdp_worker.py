"""One of the processes of test_distributed.py, started by torchrun: the file for the result."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from ddp_worker import Net, model_and_batch

STEPS = 4


def train(net: Any, rows: torch.Tensor) -> dict[str, Any]:
    """A few steps of Adam; the losses of training and, between the steps, of evaluation."""
    optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
    losses, evaluated, gradients = [], [], {}
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = net(rows).square().mean()
        loss.backward()
        if not gradients:
            gradients = {name: whole(p.grad) for name, p in net.named_parameters()}
        optimiser.step()
        losses.append(loss.detach())
        for _ in range(3):  # weights that stay the same are kept packed
            with torch.no_grad():
                evaluated.append(net(rows).square().mean())
    weights = {name: whole(p.detach()) for name, p in net.named_parameters()}
    return {
        "losses": torch.stack(losses),
        "evaluated": torch.stack(evaluated),
        "gradients": gradients,
        "weights": weights,
    }


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor whose rows lie on several processes."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    layers, batch = model_and_batch()
    net = Net(layers)
    for layer in layers.values():
        fully_shard(layer)
    fully_shard(net)
    found = train(net, batch.chunk(world)[rank])
    found["held"] = sum(p.to_local().numel() for p in net.parameters())
    for name in ("losses", "evaluated"):
        dist.all_reduce(found[name])
        found[name] /= world
    if rank == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
