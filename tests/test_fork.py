"""A process forked from one whose OpenMP threads have run: a DataLoader's worker, a web server's.

Each program forks and its child must end soon, with the results that the parent has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# in_child(f): what f gives in a forked child, by its end; `soon` limits everything.
START = """
import os
import warnings

import numpy as np

warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about threads and fork


def in_child(compute):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(compute())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    return answer
"""

NUMPY = (
    START
    + """
rng = np.random.default_rng(0)
x = rng.normal(size=(20, 16, 128))
weights = [rng.normal(size=shape) / 12 for shape in [(512, 128), (512, 128), 512, 512]]


def run():
    from fastrnn import functional

    output, hx_n, saved = functional.lstm(x, None, weights, return_saved=True)
    d_input, _, _ = functional.lstm_backward(np.ones(output.shape), None, saved)
    return output.numpy().tobytes() + d_input.numpy().tobytes()
"""
)

TORCH = (
    START
    + """
import torch

torch.set_num_threads(2)
torch.manual_seed(0)
x = torch.randn(20, 16, 128)
large = torch.randn(1000, 1000)


def use_torch():
    (large @ large + large).sum()


def train(layer):
    layer.zero_grad()
    output, _ = layer(x)
    output.sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    return b"".join(t.detach().numpy().tobytes() for t in (output, *gradients))
"""
)


def ends_well(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_child_computes_the_same_and_does_not_hang() -> None:
    ends_well(NUMPY + "before = run(); assert in_child(run) == before; assert run() == before")


def test_a_child_of_a_child_too() -> None:
    ends_well(
        NUMPY + "before = run(); assert in_child(lambda: in_child(run) + run()) == 2 * before"
    )


def test_a_child_may_use_threads_again() -> None:
    program = """
    def threads_of():
        run()
        return str(len(os.listdir("/proc/self/task"))).encode()

    run()
    assert int(in_child(threads_of)) == 2
    """
    if not os.path.isdir("/proc/self/task"):  # noqa: PTH112 - one question, no path kept
        pytest.skip("this system does not list a process's threads")
    import textwrap

    ends_well(NUMPY + textwrap.dedent(program))


needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


@needs_torch
def test_a_child_of_a_process_where_torch_alone_used_the_threads() -> None:
    program = """
import fastrnn

layer = fastrnn.LSTM(128, 128)
use_torch()
in_child(lambda: train(layer))
"""
    ends_well(TORCH + program)


@needs_torch
def test_torch_s_own_layers_work_in_a_child_where_fastrnn_is_loaded() -> None:
    program = """
import fastrnn._C

layer = torch.nn.LSTM(128, 128)
before = train(layer)
assert in_child(lambda: train(layer)) == before
"""
    ends_well(TORCH + program)


@needs_torch
def test_a_child_trains_to_the_same_bits() -> None:
    program = """
import fastrnn

layer = fastrnn.LSTM(128, 128, num_layers=2, bidirectional=True)
before = train(layer)
assert in_child(lambda: train(layer)) == before
assert train(layer) == before
"""
    ends_well(TORCH + program)


@needs_torch
def test_a_child_that_imports_fastrnn_only_after_the_fork() -> None:
    program = """
from importlib.util import find_spec


def infer():
    import fastrnn

    torch.manual_seed(0)
    layer = fastrnn.LSTM(128, 128)
    with torch.no_grad():
        return b"".join(layer(x)[0].numpy().tobytes() for _ in range(3))


use_torch()
lonely = in_child(infer)
assert lonely == infer()
"""
    ends_well(TORCH + program)
