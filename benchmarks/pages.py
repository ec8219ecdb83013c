"""Write the site's pages of results: docs/benchmarks/, one page with two plots for each run.

The newest run of the suite real on two threads also gives gain.svg, the picture of the first page.

    python benchmarks/pages.py           write the pages (make benchmark-docs)
    python benchmarks/pages.py --check   list the differences, exit with 1 if there are any

Everything on a page comes from its file in benchmarks/results. --check only tests that the plots
exist, because their bytes change with the version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrnn.bench import plot, records, report
from fastrnn.bench.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"
GAIN = PAGES / "gain.svg"


def page(document: dict[str, Any], source: str) -> str:
    """The page of one run, whose JSON is the file `source`."""
    header = document["header"]
    machine, day = header["machine"], header["date"][:10]
    title = f"{machine['cpu']}, {machine['isa']}, {report.threads(header['threads'])}, {day}"
    stem = Path(source).stem
    origin = f"Written by `make benchmark-docs` from `benchmarks/results/{source}`."
    parts = [
        f"# {title}",
        f"{origin} [What is measured, and how](../benchmarks.md).",
        "\n".join(f"- {line}" for line in report.heading(header)),
        "## Geometric means",
        "Of a peer's time divided by fastrnn's: above 1 fastrnn is faster.",
        report.means(document["records"]).markdown(),
        "## Roofline",
        f"![GFLOP/s of every case under the peak]({stem}-roofline.svg)",
        "## Every case",
        "\n".join(f"- {line}" for line in report.MEANINGS.splitlines()),
        report.cases(document["records"]).markdown(),
        f"![The ratio and the share of the roof of every case]({stem}-ratios.svg)",
    ]
    if document["not_run"]:
        parts += ["## Not run", "\n".join(f"- {line}" for line in report.not_run(document))]
    return "\n\n".join(parts) + "\n"


def _with_project(cases: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each case of a suite without its project, and the project."""
    for case in cases:
        yield {key: value for key, value in case.items() if key != "project"}, case["project"]


def gain(document: dict[str, Any], path: Path) -> None:
    """How many times as fast as torch.nn each project's layers are: one row for each project."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    suites = json.loads((resources.files("fastrnn.bench") / "suites.json").read_text("utf-8"))
    projects = {Case(**case).label(): project for case, project in _with_project(suites["real"])}
    medians = {
        (r["provider"], r["pass"], Case(**r["case"]).label()): r["median_ms"]
        for r in document["records"]
    }
    rows = {
        project: [medians["torch", p, at] / medians["fastrnn", p, at] for p in plot.COLOURS]
        for at, project in projects.items()
    }
    names = sorted(rows, key=lambda name: math.prod(rows[name]))
    places = range(len(names))
    with rc_context({"svg.hashsalt": "fastrnn", "font.size": 11}):
        figure = Figure(figsize=(7, 6.8), layout="constrained")
        axes = figure.subplots()
        axes.hlines(places, [min(rows[n]) for n in names], [max(rows[n]) for n in names], "0.75")
        for k, (kind, colour) in enumerate(plot.COLOURS.items()):
            axes.plot([rows[n][k] for n in names], places, "o", color=colour, label=kind)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xscale("log")
        ticks = (1, 1.5, 2, 3, 5, 10, 15)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_yticks(places, names, fontsize=9)
        axes.set_ylim(-0.8, len(names) - 0.2)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("times as fast as torch.nn")
        axes.legend(loc="lower right")
        figure.savefig(path, metadata={"Date": None})


def newest() -> Path:
    """The results of the newest run of the suite real on two threads."""
    return max(RESULTS.glob("*-2threads-real-*.json"), key=lambda path: path.stem[-10:])


def expected() -> dict[Path, str]:
    """The text of every page, by its path."""
    return {
        PAGES / f"{source.stem}.md": page(records.load(source), source.name)
        for source in sorted(RESULTS.glob("*.json"))
    }


def pictures(source: Path) -> list[Path]:
    return [PAGES / f"{source.stem}-{name}.svg" for name in ("roofline", "ratios")]


def write() -> None:
    PAGES.mkdir(exist_ok=True)
    for old in (*PAGES.glob("*.md"), *PAGES.glob("*.svg")):
        old.unlink()
    for path, text in expected().items():
        path.write_text(text, encoding="utf-8")
    for source in sorted(RESULTS.glob("*.json")):
        document = records.load(source)
        for draw, path in zip((plot.roofline, plot.plot), pictures(source), strict=True):
            draw(document, path)
    gain(records.load(newest()), GAIN)


def stale() -> list[str]:
    """The changes that `write` would make, one line each."""
    pages = expected()
    drawn = {GAIN, *(path for source in RESULTS.glob("*.json") for path in pictures(source))}
    there = {*PAGES.glob("*.md"), *PAGES.glob("*.svg")}
    lines = [f"{path}: belongs to no file of results" for path in there - drawn - set(pages)]
    lines += [f"{path}: is missing" for path in (drawn | set(pages)) - there]
    for path in there & set(pages):
        if path.read_text(encoding="utf-8") != pages[path]:
            lines.append(f"{path}: differs from its results")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The site's pages of benchmark results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    if not parser.parse_args().check:
        write()
        return 0
    lines = stale()
    print("\n".join([*lines, "run: make benchmark-docs"] if lines else ["up to date"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
