"""The fuzz campaign itself: that it finds nothing, and that it would find something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def campaign(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the campaign; `code` runs before it in the same process."""
    program = f"import sys; sys.argv[1:] = {list(arguments)!r}; {code}\n"
    program += "from fuzz.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_short_campaign_finds_nothing() -> None:
    done = campaign("--seed", "5", "--calls", "400", "--batch", "150")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("seed 5: 400 calls")
    assert "0 findings" in done.stdout


SABOTAGE = {
    "crash": ("os.abort()", "crash: the process ended with -6"),
    "unclear error": ("raise IndexError('input')", "a IndexError"),
    "wrong result": ("return torch.zeros(1), None", "result"),
}


@pytest.mark.parametrize(("what", "line"), SABOTAGE.values(), ids=SABOTAGE.keys())
def test_a_fault_is_a_line_with_seed_and_number_that_repeat_it(what: str, line: str) -> None:
    code = f"""import os, torch, fastrnn
def forward(self, *_, **__):
    {what}
fastrnn.GRU.forward = forward"""
    done = campaign("--seed", "5", "--calls", "40", "--batch", "20", code=code)
    assert done.returncode == 1
    found = [text for text in done.stdout.splitlines() if line in text]
    assert found, done.stdout
    assert found[0].startswith("--seed 5 --only ")
    again = campaign(*found[0].partition(":")[0].split(), code=code)
    assert again.returncode != 0


def test_a_hang_is_found() -> None:
    code = """import time, fastrnn, fuzz.__main__
fuzz.__main__.PATIENCE = 1
fastrnn.GRU.forward = lambda *_, **__: time.sleep(60)"""
    done = campaign("--seed", "5", "--calls", "8", code=code)
    assert "hang: no answer for 1 s" in done.stdout
