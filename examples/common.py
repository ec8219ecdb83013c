"""Shared by the examples: the command line, the figure, what to see in it, the verdict."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 7.0  # inches of every picture: its text reads well in a column of a page and on a phone
mpl.rcParams.update({
    "font.size": 11, "axes.titlesize": 12, "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.framealpha": 0.9, "legend.edgecolor": "none", "svg.hashsalt": "fastrnn",
})  # fmt: skip


def arguments(
    description: str, picture: str, quick: str = "do not check the result", **numbers: int
) -> argparse.Namespace:
    """An example's options: ``--output``, ``--quick`` and integers with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, default=Path("demo") / picture, help="the plot")
    return parser.parse_args()


def progress(name: str, done: int, total: int, loss: float) -> None:
    """A bar on the error stream: after every epoch on a terminal, else after the last one."""
    if sys.stderr.isatty() or done == total:
        bar, end = "#" * (24 * done // total), "\n" if done == total else "\r"
        print(f"{name:<12}[{bar:<24}] {done}/{total}  loss {loss:.4f}", end=end, file=sys.stderr)


def panels(rows: int = 1, columns: int = 1, height: float = 3.6, **options: Any) -> tuple[Any, ...]:
    """A figure of the house's width, ``height`` inches high, followed by its axes, row by row."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, *axes.flat


def curve(values: list[float], **labels: str) -> Figure:
    """A line plot over the index, with ``title``, ``xlabel`` and ``ylabel``."""
    figure, axes = panels()
    axes.plot(values)
    axes.set(**labels)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if path.suffix == ".svg" else None  # the same figure, the same file
    figure.savefig(path, dpi=150, metadata=undated)
    print("picture:", path)


def verdict(good: bool, complaint: str, see: str) -> int:
    """Print what to see in the picture and the numbers, or the complaint; return the exit code."""
    if good:
        print(textwrap.fill(f"What to see: {see}", 90))
    print("ok" if good else complaint)
    return int(not good)
