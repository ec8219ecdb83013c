"""Sharded over two processes by FSDP2 under torchrun, a model trains as in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddp_worker import Net, model_and_batch
from fsdp_worker import train

TESTS = Path(__file__).parent

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def torchrun(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found."""
    result = tmp_path_factory.mktemp("fsdp") / "found.pt"
    done = torchrun(str(TESTS / "fsdp_worker.py"), str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(result)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds with the whole batch."""
    layers, batch = model_and_batch()
    return train(Net(layers), batch)


@needs_gloo
@pytest.mark.parametrize("quantity", ["losses", "evaluated", "gradients", "weights"])
def test_two_processes_find_what_one_does(
    quantity: str, sharded: dict[str, Any], alone: dict[str, Any]
) -> None:
    torch.testing.assert_close(sharded[quantity], alone[quantity], rtol=1e-9, atol=1e-12)


@needs_gloo
def test_training_moves_and_each_process_holds_half(
    sharded: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert sharded["losses"][-1] < sharded["losses"][0]
    assert bool((sharded["evaluated"].view(-1, 3) == sharded["evaluated"][::3, None]).all())
    parameters = sum(weight.numel() for weight in alone["weights"].values())
    assert sharded["held"] <= parameters / 2 + len(alone["weights"])
