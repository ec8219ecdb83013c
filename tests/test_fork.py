"""A process forked from one that has run the engine on several threads (a DataLoader worker)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
import warnings

import numpy as np

from fastrnn import _C, functional

rng = np.random.default_rng(0)
x = rng.normal(size=(20, 16, 128))
weights = [rng.normal(size=shape) / 12 for shape in [(512, 128), (512, 128), 512, 512]]


def run():
    output, hx_n, saved = functional.lstm(x, None, weights, return_saved=True)
    d_input, _, _ = functional.lstm_backward(np.ones(output.shape), None, saved)
    return output.numpy().tobytes() + d_input.numpy().tobytes()


assert _C.max_threads() == 2
before = run()
warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about threads and fork
child = os.fork()
if child == 0:
    os._exit(0 if run() == before else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert run() == before
print("equal")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_the_same_and_does_not_hang() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
