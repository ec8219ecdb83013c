"""What the engine's own estimate predicts for more threads than a machine has.

    python benchmarks/predict_scaling.py           print the table
    python benchmarks/predict_scaling.py --write   write it into docs/benchmarks.md
    python benchmarks/predict_scaling.py --check   exit with 1 if the page has another table

The engine divides a layer among threads by an estimate of its forward time (csrc/cpu/team.cpp) with
the costs of csrc/cpu/host.h. This script repeats the formula and reads the costs. It predicts the
time of fastrnn's layer in inference with n threads as the measured time with one, times the
estimate's ratio. Beside the prediction for two threads is what was measured, which shows how far
the estimate can be believed.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fastrnn.bench import records
from fastrnn.bench.cases import Case
from fastrnn.bench.report import Table, key, milliseconds, ours

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- predict_scaling.py: begin -->", "<!-- predict_scaling.py: end -->"
THREADS = (2, 8, 16)


def costs() -> dict[str, float]:
    """The constants of csrc/cpu/host.h, by name."""
    text = (ROOT / "csrc" / "cpu" / "host.h").read_text(encoding="utf-8")
    found = re.findall(r"constexpr double (k\w+) = ([\d. <]+);", text)
    return {name: _number(value) for name, value in found}


def _number(text: str) -> float:
    one, _, shift = text.partition("<<")
    return float(int(one) << int(shift)) if shift else float(one)


@dataclass(frozen=True)
class Tiles:
    """How AVX-512's kernels divide a float32 layer of a cell (csrc/cpu/tiling.h, gemm.h)."""

    gates: int
    lanes: int = 16

    @property
    def tiles(self) -> int:
        return 1 if self.gates >= 3 else 4 // self.gates

    @property
    def rows(self) -> int:
        return 24 // (self.gates * self.tiles)

    @property
    def units(self) -> int:
        return self.tiles * self.lanes


class Estimate:
    """team.cpp's `layer_time` and `make_plan` for float32 inference; nanoseconds."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.costs = costs()
        self.tiles = Tiles(case.stack.gates)

    def product(self, rows: float, weights: float, between: float) -> float:
        k = self.costs
        rate = 2 * k["kClock"] * self.tiles.lanes
        blocks = math.ceil(rows / self.tiles.rows)
        block = weights * rows / blocks / rate
        near = between * 4 <= k["kInnerBytes"]
        first = weights * 4 / (k["kInner"] if near else k["kOuter"])
        return max(block, first) + (blocks - 1) * max(block, weights * 4 / k["kInner"])

    def layer(self, inputs: int, rows: int, columns: int) -> float:
        """One direction of one layer, its rows divided by `rows` and its units by `columns`."""
        case, k, gates = self.case, self.costs, self.tiles.gates
        pairs, threads = case.T * case.B, rows * columns
        of_input = gates * case.H * inputs / columns
        of_state = gates * case.H * case.H / columns
        both = of_input + of_state
        project = self.product(math.ceil(pairs / rows), of_input, both)
        cells = pairs * case.H * k["kCell"] / threads
        mine = math.ceil(case.B / rows)
        step = self.product(mine, of_state, of_state if case.T > 1 else both)
        step += k["kBarrier"] if columns > 1 else 0
        return project + cells + case.T * step + (k["kRegion"] if threads > 1 else 0)

    def best(self, inputs: int, threads: int) -> float:
        """The time of the plan that make_plan chooses for a layer."""
        k, directions = self.costs, self.case.directions
        blocks = math.ceil(self.case.H / self.tiles.units)
        chosen = directions * self.layer(inputs, 1, 1)
        least = k["kGain"] * chosen
        for apart in range(1, min(directions, threads) + 1):
            for rows in range(1, min(threads // apart, self.case.B) + 1):
                columns = min(threads // apart // rows, blocks)
                time = self.layer(inputs, rows, columns) * (directions // apart)
                time += k["kRegion"] if apart > 1 and rows * columns == 1 else 0
                weighed = time / (k["kGainOfUnits"] if columns > 1 else 1)
                if weighed < least:
                    least, chosen = weighed, time
        return chosen

    def seconds(self, threads: int) -> float:
        layers = range(self.case.layers)
        sizes = (self.case.I if n == 0 else self.case.directions * self.case.H for n in layers)
        return sum(self.best(inputs, threads) for inputs in sizes) / 1e9

    def gain(self, threads: int) -> float:
        """How much faster than with one thread."""
        return self.seconds(1) / self.seconds(threads)


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
        predicted = [Estimate(case).gain(count) for count in THREADS]
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
