"""Runs `fastrnn._C` on arrays of a virtual CUDA device, against the reference.

A separate program, because the module that it is given replaces `fastrnn._C`. That module has the
package's own CUDA backend over the CUDA runtime of cuda/tests/virtual, which runs the kernels' PTX
on the CPU. The device's memory is the host's.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from replaced_module import load

load(sys.argv[1])

import engine  # noqa: E402
from cases import LAYOUTS  # noqa: E402
from fastrnn import _C  # noqa: E402
from fastrnn._options import Options  # noqa: E402
from problems import random_problem  # noqa: E402
from virtual_array import OnDevice, workspace  # noqa: E402

persistent = sys.argv[2] == "persistent"
work = (workspace, 0, False, persistent)
to_float64 = engine.to_float64
engine.on_device = lambda device: (OnDevice, work)
engine.to_float64 = lambda x: to_float64(x.host if isinstance(x, OnDevice) else x)

if persistent:
    found = _C.cuda_kernels(
        engine.engine_options(Options("LSTM")), "float32", 5, 4, 8, 6, False, False, 0
    )
    assert found is not None
    assert found[0], found[1]

CELLS = (
    ("RNN", {}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"heads": 2}),
)

checked = 0
for (cell, own), layout in itertools.product(CELLS, LAYOUTS):
    options = Options(cell, 1 + checked % 2, checked % 3 == 0, **own)
    problem = random_problem(options, layout=layout, seed=checked, hidden_size=6, d_states=True)
    dtype = engine.DTYPES[checked % len(engine.DTYPES)]
    engine.check_against_reference(problem, dtype, device="virtual")
    checked += 1
print(f"{checked} problems agree")
