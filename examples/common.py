"""What the examples share: their command line, their picture, their verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure


def arguments(description: str, picture: str, **numbers: int) -> argparse.Namespace:
    """An example's options: ``--output``, ``--quick`` and whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--quick", action="store_true", help="ask for no result")
    parser.add_argument("--output", type=Path, default=Path("demo") / picture, help="the picture")
    return parser.parse_args()


def curve(values: list[float], **labels: str) -> Figure:
    """A line over its own index, with ``title``, ``xlabel`` and ``ylabel``."""
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
    """The exit code, which the last line of the output explains."""
    print("ok" if good else complaint)
    return int(not good)
