"""The report of a run: a header, one row per case and pass, geometric means, skipped cases."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from fastrnn.bench.cases import Case

if TYPE_CHECKING:
    from collections.abc import Sequence

Record = dict[str, Any]

MEANINGS = """\
ratio: the best peer's time divided by fastrnn's; above 1 fastrnn is faster
peak, roof: fastrnn's share of the machine's peak, and of its limit for these products"""
SPREAD = 1.5  # a machine is busy where times vary more between their 10th and 90th percentiles


@dataclass(frozen=True)
class Table:
    """Rows of cells: the first `text_columns` columns are text, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int

    def text(self) -> str:
        """Plain text, with text aligned left and numbers aligned right."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            aligned = (
                cell.ljust(width) if i < self.text_columns else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(aligned).rstrip()

        return "\n".join(map(line, [self.columns, ["-" * width for width in widths], *self.rows]))

    def markdown(self) -> str:
        numbers = len(self.columns) - self.text_columns
        rule = [":---"] * self.text_columns + ["---:"] * numbers
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [self.columns, rule, *self.rows])


def render(document: dict[str, Any]) -> str:
    """The report of a document (see records.py) as plain text."""
    parts = ["\n".join(heading(document["header"]))]
    if document["records"]:
        parts.append(cases(document["records"]).text() + "\n" + MEANINGS)
        parts += busy(document["records"])
        parts.append("Geometric means\n" + means(document["records"]).text())
    if document["not_run"]:
        parts.append("\n".join(["Not run", *(f"  {line}" for line in not_run(document))]))
    if not document["header"]["complete"]:
        parts.append("Interrupted: the report contains the cases measured before.")
    return "\n\n".join(parts)


def busy(records: Sequence[Record]) -> list[str]:
    """A warning where the times of a run vary so much that its ratios say little."""
    spread = [r for r in records if r["p90_ms"] > SPREAD * r["p10_ms"]]
    if len(spread) * 4 <= len(records):
        return []
    lines = (
        f"Warning: in {len(spread)} of {len(records)} measurements the 90th percentile is more",
        f"than {SPREAD} times the 10th: the machine is busy. Do not trust these ratios; run again",
        "when nothing else runs, or give each case more time (--seconds).",
    )
    return ["\n".join(lines)]


def milliseconds(value: float) -> str:
    """Three significant digits: 0.0391, 2.27, 16.9, 241."""
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def size(count: int) -> str:
    """Bytes in the largest suitable unit: 16 KiB, 4 MiB."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def ours(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["provider"] == "fastrnn"]


def key(record: Record) -> tuple[Any, ...]:
    """The fields that identify a measurement, without the provider."""
    case = tuple(sorted(record["case"].items()))
    return (record["suite"], case, record["device"], record["threads"], record["pass"])


def heading(header: dict[str, Any]) -> list[str]:
    """Lines with the machine, the versions, the commit and date, the peaks and the bandwidths."""
    machine, versions = header["machine"], header["versions"]
    used = (machine["cpu"], machine["isa"], threads(header["threads"]), header["device"])
    lines = [
        ", ".join(map(str, used)),
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"commit {header['commit'] or 'not known'}, {header['date']}",
    ]
    lines += [
        f"peak: {roof['gflops']:.0f} GFLOP/s, {roof['method']}" for roof in header["roof"].values()
    ]
    if header["bandwidth"]:
        reads = (f"{size(b['bytes'])} {b['gbs']:.0f}" for b in header["bandwidth"])
        lines.append(f"reading, GB/s by the size of each thread's array: {', '.join(reads)}")
    return lines


def cases(records: Sequence[Record]) -> Table:
    """One row for each of fastrnn's records, with the peers' times."""
    peers = list(dict.fromkeys(r["provider"] for r in records if r["provider"] != "fastrnn"))
    suites = list(dict.fromkeys(r["suite"] for r in records))
    times = {(key(r), r["provider"]): milliseconds(r["median_ms"]) for r in records}
    shares = {"peak": "peak_fraction", "roof": "roof_fraction"}
    if all(math.isclose(r["peak_fraction"], r["roof_fraction"]) for r in ours(records)):
        del shares["peak"]
    columns = ["case", "pass", "kernel", "fastrnn ms", "p10-p90", "GFLOP/s", *shares]
    columns += [f"{peer} ms" for peer in peers] + ["ratio"]
    rows = []
    for record in ours(records):
        label = Case(**record["case"]).label()
        ratio = record["ratio_to_best_peer"]
        rows.append(
            [
                label if len(suites) == 1 else f"{record['suite']}: {label}",
                record["pass"],
                record["kernel"],
                milliseconds(record["median_ms"]),
                f"{milliseconds(record['p10_ms'])}-{milliseconds(record['p90_ms'])}",
                f"{record['gflops']:.1f}",
                *(f"{record[share]:.2f}" for share in shares.values()),
                *(times.get((key(record), peer), "-") for peer in peers),
                "-" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return Table(columns, rows, 3)


def means(records: Sequence[Record]) -> Table:
    """For each suite and pass, geometric means of the ratios to each peer and to the best peer."""
    peers = list(dict.fromkeys(r["provider"] for r in records if r["provider"] != "fastrnn"))
    mine = {key(r): r for r in ours(records)}
    rows = []
    for suite, pass_ in dict.fromkeys((r["suite"], r["pass"]) for r in mine.values()):
        group = {k: r for k, r in mine.items() if (r["suite"], r["pass"]) == (suite, pass_)}
        ratios: dict[str, list[float]] = {peer: [] for peer in peers}
        for r in records:
            if r["provider"] in ratios and key(r) in group:
                ratios[r["provider"]].append(r["median_ms"] / group[key(r)]["median_ms"])
        best = [r["ratio_to_best_peer"] for r in group.values()]
        roof = [r["roof_fraction"] for r in group.values()]
        shown = [_mean(values) for values in (*ratios.values(), best, roof)]
        rows.append([suite, pass_, str(len(group)), *shown])
    compared = [f"{peer} / fastrnn" for peer in (*peers, "best")]
    columns = ["suite", "pass", "cases", *compared, "roof"]
    return Table(columns, rows, 2)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{geometric_mean(known):.2f}" if known else "-"


def not_run(document: dict[str, Any]) -> list[str]:
    """The skipped cases, with one line for each reason."""
    entries = document["not_run"]
    counted = Counter((e["suite"], e["provider"], e["pass"], e["reason"]) for e in entries)
    lines = []
    for (suite, provider, pass_, reason), count in counted.items():
        where = "" if suite is None else f", {suite} {pass_}, {count} case{'s' * (count != 1)}"
        lines.append(f"{provider}{where}: {reason}")
    return lines
