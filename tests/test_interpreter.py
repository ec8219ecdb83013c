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


WORK = {
    "a layer": "layer = fastrnn.LSTM(64, 256)\ndef work():\n    with torch.no_grad(): layer(x)",
    "training": "layer = fastrnn.GRU(64, 256)\ndef work(): layer(x)[0].sum().backward()",
    "NumPy": (
        "a, w = x.numpy(), [np.ones(s, 'f4') for s in ((256, 64), (256, 256))]\n"
        "def work(): fastrnn.functional.rnn(a, None, w, bias=False)"
    ),
    "a stream": (
        "stream = fastrnn.Stream(fastrnn.GRU(64, 512), 512); one = torch.randn(512, 64)\n"
        "def work(): stream.step(one)"
    ),
}

DAEMON = """
import threading
import time

import fastrnn
import numpy as np
import torch

x = torch.randn(300, 32, 64)
{work}
begun = threading.Event()


def forever():
    while True:
        work()
        begun.set()


threading.Thread(target=forever, daemon=True).start()
begun.wait()
time.sleep(0.05)
"""


@pytest.mark.parametrize("work", WORK.values(), ids=WORK.keys())
def test_a_daemon_thread_at_work_does_not_disturb_the_end(work: str) -> None:
    pytest.importorskip("torch")
    for _ in range(2):
        done = run(DAEMON.format(work=work))
        assert (done.returncode, done.stderr) == (0, "")


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
