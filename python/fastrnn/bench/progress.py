"""Progress on stderr: a bar on a terminal if rich is installed, else one plain line per case."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with the name of each of `total` items before it starts."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(total) as advance:
            yield advance
    else:
        yield _lines(total)


def _lines(total: int) -> Callable[[str], None]:
    started = 0

    def advance(label: str) -> None:
        nonlocal started
        started += 1
        print(f"[{started}/{total}] {label}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    # Drawn only between cases: a refresh thread would disturb the measurement.
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        "{task.description}",
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    with bar:
        task = bar.add_task("preparing", total=total)
        started = 0

        def advance(label: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=label, refresh=True)
            started += 1

        yield advance
