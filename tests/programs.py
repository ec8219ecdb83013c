"""Programs that a test runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_program(code: str, timeout: float = 300) -> str:
    """Runs a program, given as an indented text, that must succeed; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
