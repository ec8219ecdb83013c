"""The JSON document of a run: a header, one record per case, pass and provider, skipped cases.

Top level: ``header``, ``records``, ``not_run``. A record's ``case`` contains the cell, the sizes
and the dtype, and options that differ from the default (nonlinearity, heads, reset_rate, tf32).
Times are milliseconds per call. ``peak_gflops`` is the machine's peak measured with the case, and
``peak_fraction`` the share of it; ``roof_fraction`` is the time of the roof (see roof.py) divided
by the provider's time. ``header["roof"]`` has the median peak of each dtype,
``header["bandwidth"]`` the GB/s of all threads for each number of bytes that a thread reads.
``ratio_to_best_peer`` is the fastest peer's median divided by this provider's: above 1 this
provider is faster; fastrnn's own ways (``fastrnn``, ``frozen``, ``stream``) are no peers.
``header["others"]`` is the number of cores that other processes used during the run (None:
unknown), ``header["thread_counts"]`` the numbers of threads that were measured.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastrnn
from fastrnn.bench.cases import Case
from fastrnn.bench.report import OURS, ours
from fastrnn.info import info

if TYPE_CHECKING:
    from fastrnn.bench.runner import Results

RECORD_FIELDS = (
    "suite", "case", "device", "threads", "pass", "provider", "provider_version", "median_ms",
    "p10_ms", "p90_ms", "gflops", "peak_gflops", "peak_fraction", "roof_fraction",
    "ratio_to_best_peer", "kernel",
)  # fmt: skip


def document(*runs: Results) -> dict[str, Any]:
    """The whole document, ready for `json.dump`.

    Of several runs, with different numbers of threads, it has all records; the header is that of
    the largest number, with every number under ``thread_counts``.
    """
    largest = max(runs, key=lambda run: run.threads)
    found = header(largest)
    found["thread_counts"] = [run.threads for run in runs]
    entries = [entry for run in runs for entry in run.not_run]
    return {
        "header": found,
        "records": [record for run in runs for record in run.records],
        "not_run": entries if len(runs) == 1 else _distinct(entries),
    }


def _distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]


def environment() -> dict[str, Any]:
    """The machine, the versions, the commit and the date."""
    known = info()
    machine = {
        "platform": known["platform"],
        "cpu": known["cpu"]["model"],
        "cores": known["cpu"]["cores"],
        "isa": known["cpu"]["isa"],
        "cuda": known["cuda"],
    }
    versions = {name: known[name] for name in ("fastrnn", "python", "numpy")}
    versions["torch"] = known["torch"] and known["torch"]["version"]
    return {
        "machine": machine,
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def header(results: Results) -> dict[str, Any]:
    found = environment()
    found["versions"] |= {
        r["provider"]: r["provider_version"] for r in results.records if r["provider"] not in OURS
    }
    return {
        **found,
        "device": results.device,
        "threads": results.threads,
        "seconds_per_case": results.seconds,
        "others": results.others,
        "roof": _peaks(results),
        "bandwidth": [
            {"bytes": size, "gbs": results.roof.bandwidth[size]}
            for size in sorted(results.roof.bandwidth)
        ],
        "complete": not results.interrupted,
    }


def _peaks(results: Results) -> dict[str, dict[str, Any]]:
    """For each dtype, the median of the peaks measured with its cases, and the method."""
    found: dict[str, list[float]] = {}
    for record in ours(results.records):
        found.setdefault(Case(**record["case"]).precision, []).append(record["peak_gflops"])
    return {
        dtype: {"gflops": statistics.median(peaks), "method": results.roof.method(dtype)}
        for dtype, peaks in found.items()
    }


def commit() -> str | None:
    """The git commit of the project's checkout, with ``-dirty`` if files were changed."""
    here = Path(fastrnn.__file__).parent
    top = _git(here, "rev-parse", "--show-toplevel")
    if top is None or not Path(top, "python", "fastrnn", "bench").is_dir():
        return None
    return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def load(path: Path) -> dict[str, Any]:
    """Read a document.

    Raises:
        ValueError: the file cannot be read or is not a document of `fastrnn bench`.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(loaded, dict) or not {"header", "records"} <= set(loaded):
        raise ValueError(f"{path}: not written by fastrnn bench --json (no header and records)")
    header = loaded["header"]
    header.setdefault("bandwidth", [])
    for record in loaded["records"]:
        _fill_in(record, header)
        missing = [field for field in RECORD_FIELDS if field not in record]
        if missing:
            raise ValueError(f"{path}: a record lacks {', '.join(missing)}")
    return loaded


def _fill_in(record: dict[str, Any], header: dict[str, Any]) -> None:
    """Fill in fields of 0.1.0, whose roof was torch's best product, one for each dtype."""
    if "peak_gflops" not in record and "roof" in header and "case" in record:
        record["peak_gflops"] = header["roof"][record["case"]["dtype"]]["gflops"]
        record["peak_fraction"] = record["roof_fraction"]


def save(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
