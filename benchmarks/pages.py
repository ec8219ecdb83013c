"""Write the site's pages of results: docs/benchmarks/, one page with two plots for each run.

    python benchmarks/pages.py           write the pages (make benchmark-docs)
    python benchmarks/pages.py --check   list the differences, exit with 1 if there are any

Everything on a page comes from its file in benchmarks/results. --check only tests that the plots
exist, because their bytes change with the version of matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastrnn.bench import plot, records, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"


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


def stale() -> list[str]:
    """The changes that `write` would make, one line each."""
    pages = expected()
    drawn = {path for source in RESULTS.glob("*.json") for path in pictures(source)}
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
