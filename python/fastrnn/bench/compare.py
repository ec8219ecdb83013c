"""Compare this run with an earlier one: the ratio old / new of fastrnn's medians for each case."""

from __future__ import annotations

from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from fastrnn.bench.cases import Case
from fastrnn.bench.report import Record, Table, key, milliseconds, ours

if TYPE_CHECKING:
    from collections.abc import Sequence


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[Record, Record]]:
    """Pairs of fastrnn's records, (old, new), for every measurement in both documents."""
    earlier = {key(record): record for record in ours(old["records"])}
    return [(earlier[key(r)], r) for r in ours(new["records"]) if key(r) in earlier]


def render(old: dict[str, Any], new: dict[str, Any], wide: bool = False) -> str:
    """The comparison as plain text, with the number of measurements in only one document."""
    pairs = compare(old, new)
    commit = old["header"]["commit"] or "not known"
    lines = [f"Compared with the run of {old['header']['date']}, commit {commit}"]
    for name in ("cpu", "isa"):
        then, now = old["header"]["machine"][name], new["header"]["machine"][name]
        if then != now:
            lines.append(f"  not the same machine: {name} was {then}, is {now}")
    if pairs:
        lines.append(_table(pairs, wide))
        changed = sum(before["kernel"] != now["kernel"] for before, now in pairs)
        if changed and not wide:
            lines.append(f"another kernel ran in {changed} of {len(pairs)} (--wide names both)")
        speedup = geometric_mean([before["median_ms"] / now["median_ms"] for before, now in pairs])
        lines.append(f"geometric mean old / new: {speedup:.2f}; above 1 this run is faster")
    new_only = len(ours(new["records"])) - len(pairs)
    old_only = len(ours(old["records"])) - len(pairs)
    if new_only or old_only:
        lines.append(f"not compared: {new_only} only in this run, {old_only} only in the old one")
    return "\n".join(lines)


def _table(pairs: Sequence[tuple[Record, Record]], wide: bool) -> str:
    rows = [
        [
            Case(**now["case"]).label(),
            now["pass"],
            *([before["kernel"], now["kernel"]] if wide else []),
            milliseconds(before["median_ms"]),
            milliseconds(now["median_ms"]),
            f"{before['median_ms'] / now['median_ms']:.2f}",
        ]
        for before, now in pairs
    ]
    kernels = ["old kernel", "kernel"] if wide else []
    columns = ["case", "pass", *kernels, "old ms", "ms", "old / new"]
    return Table(columns, rows, 2 + len(kernels)).text()
