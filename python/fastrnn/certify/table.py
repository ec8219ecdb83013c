"""The report as a table."""

from __future__ import annotations

from typing import Any

from fastrnn._certificate import KERNELS

COLUMNS = ("class", *KERNELS, "runs now")
TORCH = "torch's own operator"


def render(document: dict[str, Any]) -> str:
    """One line for each class, then the failures of rejected classes."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for sizes, kinds in _by_sizes(document).items():
        trusted = [entry for entry in kinds.values() if entry["trusted"]]
        best = max(trusted, key=lambda entry: entry["ratio"], default=None)
        found = [_found(kinds[kind]) if kind in kinds else "" for kind in KERNELS]
        rows.append((sizes, *found, best["kernels"] if best else TORCH))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    reasons = {
        f"{entry['pass']} {entry['kernels']}: {entry['why']}"
        for entry in document["classes"]
        if entry["why"] and _found(entry) not in ("slower", "not run")
    }
    return "\n".join([*lines, *([""] if reasons else []), *sorted(reasons)])


def _by_sizes(document: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The classes grouped by everything except the kind of kernels, then by kind."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in document["classes"]:
        stack = "both directions" if entry["bidirectional"] else "one layer"
        h, b = ("–".join(map(str, entry[name])) for name in ("hidden", "rows"))
        sizes = f"{entry['cell']} {entry['dtype']} {stack} {entry['pass']} H {h} B {b}"
        found.setdefault(sizes, {})[entry["kernels"]] = entry
    return found


def _found(entry: dict[str, Any]) -> str:
    """The result of a class in a few words."""
    if not entry["trusted"]:
        kind = entry["why"].split(": ")[1].split(" (")[0].split(",")[0]
        return "slower" if kind == "right" else kind
    later = f" from T {entry['steps']} on" if entry["steps"] > 1 else ""
    return f"right, same bits, {entry['ratio']:.2f}×{later}"
