"""What the engine's own estimate predicts for more threads than a machine has.

    python benchmarks/predict_scaling.py           print the table
    python benchmarks/predict_scaling.py --write   write it into docs/benchmarks.md
    python benchmarks/predict_scaling.py --check   exit with 1 if the page has another table

The engine divides a layer among threads by an estimate of its forward time (csrc/cpu/team.cpp). The
time of fastrnn's layer in inference with n threads is predicted as the measured time with one,
times the estimate's ratio, for the instruction set in use: the results are AVX-512's. Beside the
prediction for two threads is what was measured, which shows how far the estimate can be believed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fastrnn import _C
from fastrnn._engine import engine_options
from fastrnn.bench import records
from fastrnn.bench.cases import Case
from fastrnn.bench.report import Table, key, milliseconds, ours

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- predict_scaling.py: begin -->", "<!-- predict_scaling.py: end -->"
THREADS = (2, 8, 16)


def gain(case: Case, threads: int) -> float:
    """How much faster the engine expects to be than with one thread."""
    sizes = (case.T, case.B, case.I, case.H)
    engine = engine_options(case.stack)
    one, several = (_C.estimated_time(engine, case.dtype, *sizes, count) for count in (1, threads))
    return one / several


def table() -> Table:
    """One row per case of the suite `real`: measured times, and predictions from one thread's."""
    one, two = (_newest(count) for count in ("1thread", "2threads"))
    measured = {key(r)[:3]: r for r in ours(two["records"]) if r["pass"] == "inference"}
    rows, gains = [], []
    for record in ours(one["records"]):
        if record["pass"] != "inference":
            continue
        case = Case(**record["case"])
        of_two = measured[key(record)[:3]]["median_ms"]
        predicted = [gain(case, count) for count in THREADS]
        gains.append([record["median_ms"] / of_two, *predicted])
        times = (milliseconds(record["median_ms"] / gain) for gain in predicted[1:])
        shown = (f"{gain:.2f}" for gain in gains[-1])
        rows.append([case.label(), milliseconds(record["median_ms"]), *shown, *times])
    means = [f"{geometric_mean(column):.2f}" for column in zip(*gains, strict=True)]
    rows.append(["geometric mean", "", *means, "", ""])
    predicted_by = [f"× {count}, predicted" for count in THREADS]
    times_by = [f"ms at {count}, predicted" for count in THREADS[1:]]
    columns = ["case", "ms at 1, measured", "× 2, measured", *predicted_by, *times_by]
    return Table(columns, rows, 1)


def _newest(count: str) -> dict[str, Any]:
    paths = (ROOT / "benchmarks" / "results").glob(f"*-{count}-real-*.json")
    return records.load(max(paths, key=lambda path: path.stem[-10:]))


def section() -> str:
    return f"{BEGIN}\n\n{table().markdown()}\n\n{END}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it differs")
    options = parser.parse_args()
    if not (options.write or options.check):
        print(table().text())
        return 0
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    wanted = before + section() + after
    if options.write:
        PAGE.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        print(f"{PAGE}: differs; run: python benchmarks/predict_scaling.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
