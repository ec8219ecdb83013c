"""Plots of a run: the ratios to the best peer for each case, and the roofline."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from fastrnn.bench.cases import Case
from fastrnn.bench.report import Record, ours, size, threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COLOURS = {"inference": "#2a6f97", "training": "#e07a3f"}
PROVIDERS = {
    "fastrnn": "#d1495b",
    "frozen": "#9d2b40",
    "stream": "#f19c79",
    "torch": "#2a6f97",
    "onnxruntime": "#66a182",
}
MORE_PROVIDERS = ("#8d6a9f", "#edae49", "#5c5c5c")
MARKERS = {"inference": "o", "training": "^"}
APART = 1.4  # bandwidths closer than this share a line


def plot(document: dict[str, Any], path: Path) -> None:
    """Write the plot; the suffix of `path` selects the format."""
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
    ratio.xaxis.set_major_formatter("{x:g}")
    ratio.set_ylim(-1, len(records))
    ratio.set_yticks(places, [f"{Case(**r['case']).label()}, {r['pass']}" for r in records])
    ratio.invert_yaxis()
    ratio.set_xlabel("best peer's time / fastrnn's (right of the line: fastrnn is faster)")
    drawn = roof.barh(places, [r["roof_fraction"] for r in records], color=colours)
    roof.set_xlim(0, 1)
    shown = dict(zip((r["pass"] for r in records), drawn, strict=True))
    roof.legend(shown.values(), shown.keys(), loc="lower right")
    roof.set_xlabel("share of the measured roof")
    figure.suptitle(_title(header), fontsize="medium")
    _save(figure, path)


def roofline(document: dict[str, Any], path: Path) -> None:
    """Write a plot of GFLOP/s against operations per byte of weights (`Case.intensity`).

    It has one point for each case, pass and provider, under the peak and the bandwidths of the run.
    """
    from matplotlib.figure import Figure

    header, records = document["header"], document["records"]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    intensities = [Case(**r["case"]).intensity(r["pass"]) for r in records]
    reached = [r["gflops"] for r in records]
    peaks = {dtype: roof["gflops"] for dtype, roof in header["roof"].items()}
    axes.set_xlim(min(intensities) / 3, max(intensities) * 2)
    axes.set_ylim(min(reached) / 2, max(*peaks.values(), *reached) * 1.6)
    _draw_roofs(axes, peaks, _apart(header["bandwidth"]))
    colours = _provider_colours(records)
    for provider, colour in reversed(colours.items()):  # fastrnn last, on top
        for pass_, marker in MARKERS.items():
            chosen = [
                i for i, r in enumerate(records) if (r["provider"], r["pass"]) == (provider, pass_)
            ]
            if chosen:
                axes.scatter(
                    [intensities[i] for i in chosen], [reached[i] for i in chosen], s=34,
                    color=colour, marker=marker, alpha=0.8, edgecolor="white", linewidth=0.5,
                    label=f"{provider}, {pass_}", zorder=3,
                )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right")
    axes.set_xlabel("multiplications and additions for each byte of weights that streams by")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(_title(header), fontsize="medium")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Save without a date and with a fixed salt, so that the same run gives the same SVG file."""
    from matplotlib import rc_context

    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "fastrnn"}):
        figure.savefig(path, dpi=130, metadata=metadata)


def _draw_roofs(axes: Any, peaks: dict[str, float], bandwidths: dict[str, float]) -> None:
    """Draw the peaks as horizontal lines, and each bandwidth as a line up to the highest peak."""
    left, right = axes.get_xlim()
    for dtype, peak in peaks.items():
        axes.hlines(peak, left, right, color="black", linewidth=1)
        axes.annotate(
            f"{dtype} peak, {peak:.0f} GFLOP/s", (right, peak), (-4, 4),
            textcoords="offset points", ha="right", fontsize="small",
        )  # fmt: skip
    for name, rate in bandwidths.items():
        meets = max(peaks.values()) / rate
        axes.plot([left, meets], [left * rate, meets * rate], color="grey", linewidth=0.9)
        axes.text(
            meets * 0.93, meets * 0.93 * rate, f"{name}, {rate:.0f} GB/s ", color="dimgrey",
            ha="right", va="bottom", rotation=math.degrees(math.atan(rate)), clip_on=True,
            rotation_mode="anchor", transform_rotates_text=True, fontsize="small",
        )  # fmt: skip


def _apart(bandwidths: Sequence[dict[str, float]]) -> dict[str, float]:
    """The bandwidths that are distinguishable in the plot, by the size of their array."""
    told: dict[str, float] = {}
    for entry in bandwidths:
        if all(rate > APART * entry["gbs"] for rate in told.values()):
            told[size(int(entry["bytes"]))] = entry["gbs"]
    return told


def _provider_colours(records: Sequence[Record]) -> dict[str, str]:
    names = dict.fromkeys(r["provider"] for r in records)
    more = itertools.cycle(MORE_PROVIDERS)
    return {name: PROVIDERS.get(name) or next(more) for name in names}


def _title(header: dict[str, Any]) -> str:
    where = threads(header["threads"]) if header["device"] == "cpu" else header["device"]
    return f"fastrnn {header['versions']['fastrnn']}, {header['machine']['cpu']}, {where}"
