"""The fuzz campaign itself: that it finds nothing, and that it would find something."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fuzz import __main__ as fuzz  # noqa: E402 - after the skip
from fuzz import calls  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def test_a_short_campaign_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ends = fuzz.campaign(seed=5, first=0, count=300, size=100)
    assert capsys.readouterr().out == ""
    assert ends["findings"] == 0
    assert sum(ends.values()) == 300
    assert ends["compared"] > 30  # with torch.nn


def crash() -> None:
    os.abort()


def hang() -> None:
    time.sleep(60)


def turn() -> None:
    while True:
        pass


def unclear() -> None:
    raise IndexError("list index out of range")


def wrong() -> Any:
    return torch.full((1,), 7.0)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (crash, "crash: the process ended with -6"),
        (hang, "hang: no answer for 1 s"),
        (turn, "hang: no answer for 1 s"),
        (unclear, "error: a title; as it should be → a valid call is refused: IndexError: list"),
        (wrong, "compared: a title; as it should be → result: Tensor-likes are not close"),
    ],
)
def test_a_fault_is_a_line_with_seed_and_number(
    fault: Any, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        calls, "draw_call", lambda draw: calls.Call("a title", set(), fault, lambda: torch.ones(1))
    )
    ends = fuzz.campaign(7, first=3, count=2, size=2, patience=1 if fault in (hang, turn) else 60)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"--seed 7 --only 3: {line}")
    assert second.startswith(f"--seed 7 --only 4: {line}")
    assert ends["findings"] == 2


def test_a_call_is_repeated_by_seed_and_number() -> None:
    def titles(seed: int) -> list[str]:
        drawn = [calls.draw_call(fuzz.Draw(f"{seed}:{index}")).title for index in range(20)]
        return [" ".join(title.split()) for title in drawn]

    assert titles(1) == titles(1)
    assert titles(1) != titles(2)


@pytest.mark.parametrize(
    ("error", "clear"),
    [
        (ValueError("input must have 3 dimensions"), True),
        (ValueError("it must have 3 dimensions"), False),
        (ValueError(""), False),
        (KeyError("input"), False),
        (MemoryError("std::bad_alloc"), False),
        (MemoryError("out of memory: 7 bytes cannot be allocated"), True),
        (TypeError("'NoneType' object has no attribute 'input'"), False),
        (AttributeError("input"), False),
    ],
    ids=repr,
)
def test_what_a_clear_error_is(error: Exception, clear: bool) -> None:
    assert (fuzz.verdict.unclear(error, {"input"}, None) is None) == clear


def test_torch_s_own_error_is_clear() -> None:
    error = RuntimeError("something")
    assert fuzz.verdict.unclear(error, {"input"}, RuntimeError("something")) is None
    assert fuzz.verdict.unclear(error, {"input"}, ValueError("something")) is not None
