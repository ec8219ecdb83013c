"""Everything that needs a GPU, by one command, with time limits: `make gpu-check`.

    python benchmarks/gpu_check.py --out build/gpu-check
    python benchmarks/gpu_check.py --out build/gpu-check --parts tests,bench --suites stacks
    python benchmarks/gpu_check.py --out build/gpu-check --dry-run

- build      the package by pip, with CUDA, and the programs of benchmarks/ladder
- tests      the whole test suite, with the CUDA cases of every route
- sanitizer  compute-sanitizer's memcheck and racecheck on the smallest case of each kernel
- ladder     what an exchange costs; every persistent kernel against plain ones
- bench      the suites against torch.nn (cuDNN), in float32, tf32, bfloat16, float16: by the
             persistent kernels, then by a launch for each step

Each part has a time limit of its own and none takes the others' results along: what a command
printed is kept in OUT/<part>.log, its exit code and time in OUT/gpu-check.json, with every record
of the benchmark; OUT/summary.md says it in words. The exit code is 0 where every command's was; 1
where one failed; 77, with a message, where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
NO_DEVICE = 77
PARTS = ("build", "tests", "sanitizer", "ladder", "bench")
LIMITS = {"build": 240.0, "tests": 150.0, "sanitizer": 90.0, "ladder": 90.0, "bench": 240.0}
SUITES = (
    "flashrnn", "fastrnns", "stacks", "reinforcement", "deepbench-training", "deepbench-inference",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "tf32", "float32")
INFERENCE_ALONE = ("deepbench-inference",)
SWITCH = "FASTRNN_CUDA_KERNELS"
ROUTES = {"persistent": "persistent", "steps": "1"}  # what the switch says for each
SKIPPED = "not there"  # instead of an exit code


@dataclass(frozen=True)
class Command:
    """One command of a part: `share` is its share of the time that the part has left."""

    name: str
    arguments: tuple[str, ...]
    share: float = 1.0
    json: str = ""  # the file that it writes, in OUT
    route: str = ""  # of `ROUTES`, which its environment then says


@dataclass
class Outcome:
    part: str
    command: str
    rc: int | str
    seconds: float
    timed_out: bool = False


@dataclass
class Options:
    out: Path
    parts: tuple[str, ...] = PARTS
    suites: tuple[str, ...] = SUITES
    dtypes: tuple[str, ...] = DTYPES
    minutes: float = 9.5
    seconds: float = 0.06  # of a case and pass of the benchmark
    python: str = sys.executable
    architecture: str = "90a"
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ladder(self) -> Path:
        return self.out / "ladder"


def commands(part: str, options: Options) -> list[Command]:
    """What a part runs."""
    return {
        "build": build,
        "tests": tests,
        "sanitizer": sanitizer,
        "ladder": ladder,
        "bench": bench,
    }[part](options)


def build(options: Options) -> list[Command]:
    defines = {
        "FASTRNN_CUDA": "ON",
        "FASTRNN_CUDA_PERSISTENT": "ON",
        "FASTRNN_CUDA_ARCHITECTURES": options.architecture,
    }
    install = [options.python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    install += [f"--config-settings=cmake.define.{k}={v}" for k, v in defines.items()]
    configure = ["cmake", "-S", str(ROOT), "-B", str(options.ladder), "-G", "Ninja"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DFASTRNN_PYTHON=OFF", "-DFASTRNN_WATCHDOG=ON"]
    configure += [f"-D{k}={v}" for k, v in defines.items()]
    return [
        Command("package", (*install, str(ROOT)), 0.5),
        Command("configure the ladder", tuple(configure), 0.2),
        Command("the ladder", ("cmake", "--build", str(options.ladder), "--target", "ladder")),
    ]


def tests(options: Options) -> list[Command]:
    pytest = [options.python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    workers = min(8, os.cpu_count() or 1)
    side_by_side = ("-n", str(workers)) if _has("xdist", options.python) else ()
    of_cuda = "tests/test_cuda.py"
    return [
        Command("pytest, CUDA", (*pytest, *side_by_side, of_cuda), 0.7),
        Command("pytest, all else", (*pytest, *side_by_side, "tests", f"--ignore={of_cuda}")),
    ]


def sanitizer(options: Options) -> list[Command]:
    check = str(options.ladder / "benchmarks" / "ladder" / "ladder_persistent_check")
    smallest = (options.python, str(Path(__file__).resolve()), "--smallest-cases")
    listed = []
    for tool in ("memcheck", "racecheck"):
        # Not the errors of CUDA's own calls, by which libraries find out what a driver can.
        with_tool = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        with_tool += ("--report-api-errors", "no")
        listed += [
            Command(f"{tool}, persistent kernels", (*with_tool, check, "--small"), 0.4),
            Command(f"{tool}, layers", (*with_tool, *smallest), 0.5),
        ]
    return listed


def ladder(options: Options) -> list[Command]:
    programs = options.ladder / "benchmarks" / "ladder"
    return [
        Command(
            "exchange",
            (str(programs / "ladder_exchange"), str(options.out / "exchange.json")),
            0.3,
            "exchange.json",
        ),
        Command(
            "persistent kernels",
            (
                str(programs / "ladder_persistent_check"),
                "--json",
                str(options.out / "persistent.json"),
            ),
            json="persistent.json",
        ),
    ]


def bench(options: Options) -> list[Command]:
    runs = [(suite, route) for route in ROUTES for suite in options.suites]
    listed = []
    for left, (suite, route) in zip(range(len(runs), 0, -1), runs, strict=True):
        file = f"bench-{suite}-{route}.json"
        passes = "inference" if suite in INFERENCE_ALONE else "inference,training"
        arguments = (
            options.python, "-m", "fastrnn.cli", "bench", "--device", "cuda", "--suite", suite,
            "--dtype", ",".join(options.dtypes), "--pass", passes, "--keep-going",
            "--seconds", str(options.seconds), "--json", str(options.out / file),
        )  # fmt: skip
        listed.append(Command(f"{suite}, {route}", arguments, 1.0 / left, file, route))
    return listed


def _has(module: str, python: str) -> bool:
    command = [python, "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# ---- running ------------------------------------------------------------------------------------


def run_command(command: Command, log: Path, limit: float) -> tuple[int | str, bool]:
    """The exit code and whether the limit ended it; all that it started ends with it."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n==== {command.name}: {' '.join(command.arguments)}\n")
        file.flush()
        if shutil.which(command.arguments[0]) is None:
            file.write(f"{command.arguments[0]} is not there\n")
            return SKIPPED, False
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if command.route:
            environment[SWITCH] = ROUTES[command.route]
        process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit), False
        except subprocess.TimeoutExpired:
            _end(process)
            file.write(f"\n==== ended after {limit:.0f} s, its limit\n")
            return process.returncode if process.returncode is not None else SKIPPED, True


def _end(process: subprocess.Popen[bytes]) -> None:
    """First by an interrupt, so that a benchmark writes what it has; then by force."""
    for sign, patience in ((signal.SIGINT, 5.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
            return


def run_part(part: str, options: Options, end: float) -> None:
    log = options.out / f"{part}.log"
    log.unlink(missing_ok=True)
    part_end = min(end, time.monotonic() + LIMITS[part])
    for command in commands(part, options):
        limit = (part_end - time.monotonic()) * command.share
        if limit < 1.0:
            options.outcomes.append(Outcome(part, command.name, "no time left", 0.0, True))
            continue
        print(f"{part}: {command.name} (at most {limit:.0f} s)", flush=True)
        if command.json:
            (options.out / command.json).unlink(missing_ok=True)
        start = time.monotonic()
        rc, timed_out = run_command(command, log, limit)
        taken = time.monotonic() - start
        options.outcomes.append(Outcome(part, command.name, rc, round(taken, 1), timed_out))
        print(f"{part}: {command.name}: {describe(options.outcomes[-1])}", flush=True)
        write(options)


def describe(outcome: Outcome) -> str:
    if outcome.timed_out:
        return f"stopped by its time limit after {outcome.seconds:.0f} s"
    if isinstance(outcome.rc, str):
        return outcome.rc
    return f"{'passed' if outcome.rc == 0 else f'FAILED ({outcome.rc})'} in {outcome.seconds:.0f} s"


# ---- what is written ----------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def document(options: Options) -> dict[str, Any]:
    """One document: outcomes, the ladder's rows, and the benchmark's header and records."""
    found: dict[str, Any] = {
        "outcomes": [asdict(outcome) for outcome in options.outcomes],
        "device": device(),
        "ladder": {},
        "header": None,
        "records": [],
        "not_run": [],
    }
    for part in options.parts:
        for command in commands(part, options) if part in ("ladder", "bench") else ():
            written = read_json(options.out / command.json) if command.json else None
            if written is None:
                continue
            if part == "ladder":
                found["ladder"][command.name] = written
            else:
                _add_run(found, written, command.route)
    return found


def _add_run(found: dict[str, Any], run: dict[str, Any], route: str) -> None:
    """A suite's document by one route: one header, its peaks and completeness those of all."""
    if found["header"] is None:
        found["header"] = run["header"]
    else:
        found["header"]["roof"].update(run["header"]["roof"])
        found["header"]["complete"] = found["header"]["complete"] and run["header"]["complete"]
    found["records"] += [{**record, "route": route} for record in run["records"]]
    found["not_run"] += run["not_run"]


def summary(options: Options, found: dict[str, Any]) -> str:
    lines = ["# GPU check", "", found["device"] or "no device", ""]
    lines += ["| part | command | outcome |", "|---|---|---|"]
    lines += [f"| {o.part} | {o.command} | {describe(o)} |" for o in options.outcomes]
    if found["records"]:
        lines += ["", "## Against torch.nn (cuDNN)", "", *ratios(found["records"])]
    for name, rows in found["ladder"].items():
        lines += ["", f"## Ladder: {name}", "", "```"]
        lines += [f"{r['what']}: {r.get('text') or _number(r)}" for r in rows]
        lines += ["```"]
    reasons = sorted({f"{e['provider']}: {e['reason']}" for e in found["not_run"]})
    if reasons:
        lines += ["", "## Not run", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def _number(row: dict[str, Any]) -> str:
    return f"{row['value']:.4g} {row['unit']}".rstrip()


def ratios(records: Sequence[dict[str, Any]]) -> list[str]:
    """By suite, route, precision and pass: cases, geometric mean, least, how many below 1."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for record in records:
        ratio = record["ratio_to_best_peer"]
        if record["provider"] == "fastrnn" and ratio:
            case = record["case"]
            kind = "tf32" if case.get("tf32") else case["dtype"]
            key = (record["suite"], record["route"], kind, record["pass"])
            groups.setdefault(key, []).append(ratio)
    lines = ["| suite | route | precision | pass | cases | mean | least | below 1 |"]
    lines += ["|---|---|---|---|---:|---:|---:|---:|"]
    for (suite, route, kind, pass_), values in groups.items():
        mean = 1.0
        for value in values:
            mean *= value ** (1.0 / len(values))
        below = sum(value < 1 for value in values)
        lines.append(
            f"| {suite} | {route} | {kind} | {pass_} | {len(values)} | {mean:.2f} "
            f"| {min(values):.2f} | {below} |"
        )
    return lines


def write(options: Options) -> None:
    found = document(options)
    path = options.out / "gpu-check.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "summary.md").write_text(summary(options, found), encoding="utf-8")


# ---- the device ---------------------------------------------------------------------------------


def device() -> str:
    """Name, driver and memory, or nothing where there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def architecture() -> str:
    """The first device's, as CMake names it: 90a for Hopper, whose own instructions it takes."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        number = done.stdout.split()[0].replace(".", "")
    except (OSError, subprocess.SubprocessError, IndexError):
        return "90a"
    return "90a" if number == "90" else number


def smallest_cases() -> int:
    """Each cell in each type by each route, forward and backward, as small as it gets."""
    import torch

    import fastrnn

    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for route, cell, kind in product(ROUTES, ("LSTM", "GRU", "RNN"), kinds):
        os.environ[SWITCH] = ROUTES[route]
        layer = getattr(fastrnn, cell)(3, 5, num_layers=2, bidirectional=True).to("cuda", kind)
        x = torch.randn(4, 3, 3, device="cuda", dtype=kind, requires_grad=True)
        reset = torch.rand(4, 3, device="cuda") < 0.3
        output, _ = layer(x, reset=reset)
        output.sum().backward()
        torch.cuda.synchronize()
        print(route, cell, kind, bool(torch.isfinite(output).all()), flush=True)
    return 0


# ---- the command --------------------------------------------------------------------------------


def chosen(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names in a list with commas, in the order of `known`.

    Raises:
        ValueError: a name is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not known; there are: {', '.join(known)}")
    return tuple(name for name in known if name in names) if names else tuple(known)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="where results go")
    add("--parts", default="", help=f"of {','.join(PARTS)}; default all")
    add("--suites", default="", help=f"of {','.join(SUITES)}; default all")
    add("--dtypes", default="", help=f"of {','.join(DTYPES)}; default all")
    add("--minutes", type=float, default=9.5, help="for everything together")
    add("--seconds", type=float, default=0.06, help="for each case and pass of the benchmark")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add("--smallest-cases", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.smallest_cases:
        return smallest_cases()
    try:
        options = Options(
            parsed.out.resolve(),
            chosen(parsed.parts, PARTS, "part"),
            chosen(parsed.suites, SUITES, "suite"),
            chosen(parsed.dtypes, DTYPES, "dtype"),
            parsed.minutes,
            parsed.seconds,
        )
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    if parsed.dry_run:
        for part in options.parts:
            for command in commands(part, options):
                print(f"{part}: {' '.join(command.arguments)}")
        return 0
    if not device():
        print("gpu_check: no GPU on this machine (nvidia-smi names none): nothing was run")
        return NO_DEVICE
    return check(options)


def check(options: Options) -> int:
    """Runs the parts in their order."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.architecture = architecture()
    end = time.monotonic() + 60.0 * options.minutes
    for part in options.parts:
        run_part(part, options, end)
    write(options)
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    failed = [o for o in options.outcomes if o.rc not in (0, SKIPPED) or o.timed_out]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
