"""The report of a run: a header, the cases, geometric means, skipped cases.

It fits 80 columns: one row per provider, grouped by case and pass. `wide` has all columns, one row
per case and pass.
"""

from __future__ import annotations

import math
import textwrap
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
MEANINGS_BY_PROVIDER = """\
ms: milliseconds of a pass, the median; p10-p90: the 10th and 90th percentiles
roof: the share of this machine's limit for these products
ratio: the best peer's time divided by this one; above 1, fastrnn is faster"""
# Providers that are fastrnn's: its layer, the layer after `fastrnn.freeze`, and `fastrnn.Stream`.
OURS = ("fastrnn", "frozen", "stream")
WIDTH = 80  # of the report, without `wide`
SPREAD = 1.5  # a machine is busy where times vary more between their 10th and 90th percentiles
SHARE = 1.05  # a share of the peak or the roof that only a limit measured under load gives
CORES = 0.5  # cores that other processes may use beside a quiet run


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


def render(document: dict[str, Any], wide: bool = False) -> str:
    """The report of a document (see records.py) as plain text."""
    header, measured = document["header"], document["records"]
    parts = [_wrapped(heading(header), wide)]
    if measured and len(header.get("thread_counts", ())) > 1:
        parts.append(scaling(measured))
    elif measured and wide:
        parts.append(cases(measured).text() + "\n" + MEANINGS)
    elif measured:
        parts.append(by_provider(measured) + "\n" + MEANINGS_BY_PROVIDER)
    if measured:
        parts += busy(measured, header)
        parts.append("Geometric means of a peer's time / ours\n" + means(measured).text())
    if document["not_run"]:
        parts.append("Not run\n" + _wrapped([f"  {line}" for line in not_run(document)], wide))
    if not header["complete"]:
        parts.append("Interrupted: the report contains the cases measured before.")
    return "\n\n".join(parts)


def _wrapped(lines: Sequence[str], wide: bool) -> str:
    """The lines, each broken at the report's width and continued further right."""
    if wide:
        return "\n".join(lines)
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    )


def busy(records: Sequence[Record], header: dict[str, Any]) -> list[str]:
    """A warning with each sign that the machine was busy, so that the ratios say little."""
    signs = []
    spread = [r for r in records if r["p90_ms"] > SPREAD * r["p10_ms"]]
    if len(spread) * 4 > len(records):
        signs.append(
            f"in {len(spread)} of {len(records)} measurements the 90th percentile is more than "
            f"{SPREAD} times the 10th"
        )
    # Half types may exceed the peak, which is float32's; on CUDA it is torch's best product.
    beyond = [
        r
        for r in records
        if max(r["peak_fraction"], r["roof_fraction"]) > SHARE
        and (r["device"], r["case"]["dtype"][:5]) == ("cpu", "float")
        and r["case"]["dtype"] != "float16"
    ]
    if beyond:
        signs.append(f"{len(beyond)} measurements exceed the peak or the roof")
    others, cores = header.get("others"), header["machine"]["cores"]
    if others is not None and cores and header["device"] == "cpu":
        most = max(header.get("thread_counts") or [header["threads"]])
        if others + most > cores + CORES:
            signs.append(
                f"other processes used {others:.1f} of {cores} cores, the benchmark {most}"
            )
    if not signs:
        return []
    text = (
        f"Warning: {'; '.join(signs)}: the machine is busy. Do not trust these ratios; run again "
        "when nothing else runs, or give each case more time (--seconds)."
    )
    return [textwrap.fill(text, WIDTH, break_on_hyphens=False)]


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
    counts = header.get("thread_counts") or [header["threads"]]
    shown = threads(counts[0]) if len(counts) == 1 else f"{', '.join(map(str, counts))} threads"
    used = (machine["cpu"], machine["isa"], shown, header["device"])
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


def peers_of(records: Sequence[Record]) -> list[str]:
    """The peers, in the order of the records."""
    return list(dict.fromkeys(r["provider"] for r in records if r["provider"] not in OURS))


def _label(record: Record, records: Sequence[Record]) -> str:
    """The case, with its suite where there are several."""
    label = Case(**record["case"]).label()
    several = len({r["suite"] for r in records}) > 1
    return f"{record['suite']}: {label}" if several else label


def _spread(record: Record) -> str:
    return f"{milliseconds(record['p10_ms'])}-{milliseconds(record['p90_ms'])}"


def by_provider(records: Sequence[Record]) -> str:
    """One row for each record; the case and the pass stand to the left of a group of rows."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    columns = ["provider", "ms", "p10-p90", "roof", "ratio"]
    rows = [
        [
            [
                record["provider"],
                milliseconds(record["median_ms"]),
                _spread(record),
                f"{record['roof_fraction']:.2f}",
                ratio(record["ratio_to_best_peer"]),
            ]
            for record in group
        ]
        for group in groups.values()
    ]
    lefts = [[_label(group[0], records), group[0]["pass"]] for group in groups.values()]
    return _grouped(columns, rows, lefts)


def _grouped(
    columns: Sequence[str], groups: Sequence[list[list[str]]], lefts: Sequence[list[str]]
) -> str:
    """A table whose first column has the lines of `lefts`, broken to fit the report's width."""
    cells = [columns, *(row for group in groups for row in group)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    room = max(12, WIDTH - sum(widths) - 2 * len(widths))
    rows = []
    for group, left in zip(groups, lefts, strict=True):
        lines = [part for line in left for part in textwrap.wrap(line, room)]
        for i in range(max(len(lines), len(group))):
            cell = lines[i] if i < len(lines) else ""
            rows.append([cell, *(group[i] if i < len(group) else [""] * len(columns))])
    return Table(["case and pass", *columns], rows, 2).text()


def scaling(records: Sequence[Record]) -> str:
    """The times of every provider by the number of threads, side by side, with the speed-up of the
    largest number over the smallest."""
    counts = sorted({r["threads"] for r in records})
    groups: dict[tuple[Any, ...], list[Record]] = {}
    times: dict[tuple[Any, ...], float] = {}
    for record in records:
        of_case = tuple(k for k in key(record) if not isinstance(k, int))
        group = groups.setdefault(of_case, [])
        if all(record["provider"] != r["provider"] for r in group):
            group.append(record)
        times[of_case, record["provider"], record["threads"]] = record["median_ms"]
    rows: list[list[list[str]]] = []
    for of_case, group in groups.items():
        rows.append([])
        for record in group:
            row = [times.get((of_case, record["provider"], count)) for count in counts]
            first, last = row[0], row[-1]
            gain = "-" if first is None or last is None else f"{first / last:.2f}"
            shown = ("-" if ms is None else milliseconds(ms) for ms in row)
            rows[-1].append([record["provider"], *shown, gain])
    lefts = [[_label(group[0], records), group[0]["pass"]] for group in groups.values()]
    columns = ["ms, threads:", *map(str, counts), "gain"]
    meaning = (
        f"gain: the time with {threads(counts[0])} divided by the time with {threads(counts[-1])}"
    )
    return _grouped(columns, rows, lefts) + "\n" + meaning


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def cases(records: Sequence[Record]) -> Table:
    """One row for each of fastrnn's records, with the times of its other ways and of the peers."""
    others = [name for name in OURS[1:] if any(r["provider"] == name for r in records)]
    others += peers_of(records)
    by_name = {(key(r), r["provider"]): r for r in records}
    shares = {"peak": "peak_fraction", "roof": "roof_fraction"}
    if all(math.isclose(r["peak_fraction"], r["roof_fraction"]) for r in ours(records)):
        del shares["peak"]
    columns = ["case", "pass", "kernel", "fastrnn ms", "p10-p90", "GFLOP/s", *shares]
    for other in others:
        columns += [f"{other} ms", "p10-p90"]
    columns.append("ratio")
    rows = []
    for record in ours(records):
        found = [by_name.get((key(record), other)) for other in others]
        rows.append(
            [
                _label(record, records),
                record["pass"],
                record["kernel"],
                milliseconds(record["median_ms"]),
                _spread(record),
                f"{record['gflops']:.1f}",
                *(f"{record[share]:.2f}" for share in shares.values()),
                *(
                    cell
                    for r in found
                    for cell in ((milliseconds(r["median_ms"]), _spread(r)) if r else ("-", "-"))
                ),
                ratio(record["ratio_to_best_peer"]),
            ]
        )
    return Table(columns, rows, 3)


def means(records: Sequence[Record]) -> Table:
    """For each suite, pass and way to run fastrnn, geometric means of the ratios to each peer and
    to the best one."""
    peers = peers_of(records)
    several = len({r["threads"] for r in records}) > 1
    times = {(key(r), r["provider"]): r["median_ms"] for r in records}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["provider"] in OURS:
            place = (record["suite"], record["threads"], record["pass"], record["provider"])
            groups.setdefault(place, []).append(record)
    rows = []
    for (suite, count, pass_, name), group in groups.items():
        compared = []
        for peer in peers:
            pairs = [(times.get((key(r), peer)), r["median_ms"]) for r in group]
            compared.append(_mean([theirs and theirs / mine for theirs, mine in pairs]))
        best = _mean([r["ratio_to_best_peer"] for r in group])
        roof = _mean([r["roof_fraction"] for r in group])
        if several:
            rows.append([suite, str(count), pass_, name, *compared, best])
        else:
            rows.append([suite, pass_, name, str(len(group)), *compared, best, roof])
    if several:
        return Table(["suite", "threads", "pass", "ours", *peers, "best"], rows, 4)
    return Table(["suite", "pass", "ours", "cases", *peers, "best", "roof"], rows, 3)


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
