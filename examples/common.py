"""Shared by the examples: the command line, the plot, the verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure


def arguments(description: str, picture: str, **numbers: int) -> argparse.Namespace:
    """An example's options: ``--output``, ``--quick`` and integers with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--quick", action="store_true", help="do not check the result")
    parser.add_argument("--output", type=Path, default=Path("demo") / picture, help="the plot")
    return parser.parse_args()


def curve(values: list[float], **labels: str) -> Figure:
    """A line plot over the index, with ``title``, ``xlabel`` and ``ylabel``."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(values)
    axes.set(**labels)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print("picture:", path)


def verdict(good: bool, complaint: str) -> int:
    """Print the verdict as the last line, and return the exit code."""
    print("ok" if good else complaint)
    return int(not good)
