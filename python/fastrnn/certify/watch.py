"""A child process with a watchdog: if it does not answer in time, its process group is killed."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

START_SECONDS = 180.0  # importing torch from a network file system takes long
END_SECONDS = 10.0  # after the child has closed its output


class LostError(Exception):
    """The child hung or died; the message says which."""


class Child:
    """A process that answers each line on its stdin with a line of JSON."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - `kill` closes it
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # its own group, to kill as a whole; Ctrl-C goes to the parent
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a question and return the answer.

        Raises:
            LostError: there was no answer in time, or the process ended.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # the process has ended; `answer` raises the error
            print(json.dumps(question), file=self._process.stdin, flush=True)
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer that the child writes; raises as `ask`."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise LostError(f"hung: no answer in {seconds:g} s") from None
        if line is None:
            raise LostError(self._death())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise LostError(f"no answer: {line.strip()!r}") from None
        return answer

    def _death(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "hung: it closed its output and did not end"
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"died ({how})" + (f": {said[-1]}" if said else "")

    def kill(self) -> None:
        """Kill the process and the processes that it started, if they still run."""
        if sys.platform == "win32":
            self._process.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the driver may block its exit for a while
            self._process.wait(END_SECONDS)
        self._reader.join(END_SECONDS)
        assert self._process.stdin is not None
        with suppress(OSError):  # from a question that the child has not read
            self._process.stdin.close()
        self._errors.close()
