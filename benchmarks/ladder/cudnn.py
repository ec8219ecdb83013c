"""The baselines: torch.nn's layers (cuDNN) over the suites, in every type, timed on the device.

    python benchmarks/ladder/cudnn.py --json cudnn.json
    python benchmarks/ladder/cudnn.py --suite flashrnn --mode tf32 --mode float16

Modes are float32 (TF32 off), tf32, bfloat16 and float16. Nothing of fastrnn's engine runs: the
cases, the data, the clocks and the torch provider are those of `fastrnn bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastrnn.bench import cases, records
from fastrnn.bench.data import make_data
from fastrnn.bench.precision import precision
from fastrnn.bench.providers import Torch, UnsupportedError
from fastrnn.bench.report import Table, milliseconds
from fastrnn.bench.timing import make_clock, measure

if TYPE_CHECKING:
    from collections.abc import Sequence

SUITES = ("deepbench-training", "deepbench-inference", "flashrnn", "fastrnns", "stacks")
MODES = ("float32", "tf32", "bfloat16", "float16")  # of `cases.PRECISIONS`
NO_DEVICE = 77


def baseline(suite: str, case: cases.Case, mode: str, pass_: cases.Pass, seconds: float) -> dict:
    """One row: the case's time, or why there is none."""
    row = {"suite": suite, "case": case.as_record(), "mode": mode, "pass": pass_}
    try:
        data = make_data(case, "cuda")
        prepared = Torch().prepare(case, data, pass_)
        timing = measure({"torch": prepared}, make_clock("cuda"), len(data.inputs), seconds)[
            "torch"
        ]
    except (UnsupportedError, RuntimeError) as error:
        torch.cuda.empty_cache()
        return {**row, "reason": str(error).splitlines()[0]}
    step = timing.median * 1e3 / (case.T * case.layers)
    return {
        **row,
        "kernel": prepared.kernel,
        "median_ms": timing.median,
        "p10_ms": timing.p10,
        "p90_ms": timing.p90,
        "us_a_step": step,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="append", choices=sorted(cases.load_suites()))
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each case and pass")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing measured")
        return NO_DEVICE
    rows = []
    for mode in parsed.mode or MODES:
        chosen = cases.select(cases.load_suites(), parsed.suite or SUITES, cases.CELLS, [mode])
        with precision(mode == "tf32"):
            rows += [
                baseline(suite, case, mode, pass_, parsed.seconds)
                for suite, case in chosen
                if case.heads == 1
                for pass_ in cases.PASSES
                if not (suite == "deepbench-inference" and pass_ == "training")
            ]
        if parsed.json:  # what is measured is kept, whatever ends the program
            document = {**records.environment(), "rows": rows}
            records.save(document, parsed.json)
    print(table(rows).text())
    return 0


def table(rows: Sequence[dict]) -> Table:
    """A row for each case that ran."""
    columns = ["case", "mode", "pass", "kernel", "ms", "us a step"]
    return Table(
        columns,
        [
            [
                f"{row['suite']}: {cases.Case(**row['case']).label()}",
                row["mode"],
                row["pass"],
                row["kernel"],
                milliseconds(row["median_ms"]),
                f"{row['us_a_step']:.2f}",
            ]
            for row in rows
            if "reason" not in row
        ],
        4,
    )


if __name__ == "__main__":
    sys.exit(main())
