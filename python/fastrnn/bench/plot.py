"""A picture of a run: per case the ratio to the best peer, and the share of the measured roof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastrnn.bench.cases import Case
from fastrnn.bench.report import ours, threads

if TYPE_CHECKING:
    from pathlib import Path

COLOURS = {"inference": "#2a6f97", "training": "#e07a3f"}


def plot(document: dict[str, Any], path: Path) -> None:
    """Writes the picture; the ending of `path` chooses the format."""
    from matplotlib.figure import Figure

    records = ours(document["records"])
    header = document["header"]
    height = 1.6 + 0.24 * len(records)
    figure = Figure(figsize=(11, height), layout="constrained")
    ratio, roof = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(records))
    colours = [COLOURS[r["pass"]] for r in records]
    beyond = [(r["ratio_to_best_peer"] or 1.0) - 1.0 for r in records]  # no peer: no bar
    ratio.barh(places, beyond, left=1.0, color=colours)
    ratio.axvline(1.0, color="black", linewidth=0.8)
    ratio.set_xscale("log")
    ratio.set_yticks(places, [f"{Case(**r['case']).label()}, {r['pass']}" for r in records])
    ratio.invert_yaxis()
    ratio.set_xlabel("best peer's time / fastrnn's (right of the line: fastrnn is faster)")
    drawn = roof.barh(places, [r["roof_fraction"] for r in records], color=colours)
    roof.set_xlim(0, 1)
    shown = dict(zip((r["pass"] for r in records), drawn, strict=True))
    roof.legend(shown.values(), shown.keys(), loc="lower right")
    roof.set_xlabel("share of the measured roof")
    where = threads(header["threads"]) if header["device"] == "cpu" else header["device"]
    figure.suptitle(
        f"fastrnn {header['versions']['fastrnn']}, {header['machine']['cpu']}, {where}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=130)
