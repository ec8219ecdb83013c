"""The end of the interpreter, and interpreters beside the first one."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


# One call that takes seconds: the end comes while it is in the engine. (Where torch itself asks for
# the GIL meanwhile, torch ends the process: a loop of backward does so with torch.nn too.)
WORK = {
    "a layer": "layer = fastrnn.LSTM(64, 256)\ndef work():\n    with torch.no_grad(): layer(x)",
    "training, forward": "layer = fastrnn.GRU(64, 256)\ndef work(): layer(x)",
    "training, backward": (
        "layer = fastrnn.GRU(64, 256)\noutput = layer(x)[0].sum()\ndef work(): output.backward()"
    ),
    "NumPy": (
        "a, w = x.numpy(), [np.ones(s, 'f4') for s in ((2048, 64), (2048, 512))]\n"
        "def work(): fastrnn.functional.lstm(a, None, w, bias=False)"
    ),
    "a stream": (
        "stream = fastrnn.Stream(fastrnn.GRU(64, 512), 512); one = np.ones((512, 64), 'f4')\n"
        "def work():\n    while True: stream.step(one)"
    ),
}

DAEMON = """
import threading
import time

import fastrnn
import numpy as np
import torch

torch.set_num_threads(1)
x = torch.randn(10000, 32, 64)
{work}
begun = threading.Event()


def once():
    begun.set()
    work()
    print("the call was too short for this test")


threading.Thread(target=once, daemon=True).start()
begun.wait()
time.sleep(0.3)
"""


@pytest.mark.parametrize("work", WORK.values(), ids=WORK.keys())
def test_a_daemon_thread_at_work_does_not_disturb_the_end(work: str) -> None:
    pytest.importorskip("torch")
    done = run(DAEMON.format(work=work))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

if {first}:
    import fastrnn._C
other = interpreters.create()
code = '''
try:
    import {module}
except ImportError as error:
    print("refused:", error)
'''
interpreters.run_string(other, code)
interpreters.destroy(other)
"""


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after the main interpreter"])
@pytest.mark.parametrize("module", ["fastrnn._C", "fastrnn.functional"])
def test_a_subinterpreter_is_refused_with_an_import_error(module: str, first: bool) -> None:
    done = run(SUBINTERPRETER.format(module=module, first=first))
    assert done.returncode == 0, done.stderr
    assert "subinterpreter" in done.stdout
