"""Run everything that needs a GPU in one command, with time limits: `make gpu-check`.

    python benchmarks/gpu_check.py --out build/gpu-check
    python benchmarks/gpu_check.py --out build/gpu-check --parts tests,bench --suites stacks
    python benchmarks/gpu_check.py --out build/gpu-check --dry-run

- build      install the package with pip, with CUDA and the watchdog; build benchmarks/ladder
- tests      the whole test suite, with the CUDA cases of every route
- sanitizer  compute-sanitizer's memcheck and racecheck on a small case of every step kernel and of
             every family of persistent kernels (cell, operand, pass, way of exchange)
- certify    `fastrnn certify --quick`, with its certificate in OUT
- ladder     the cost of an exchange
- bench      the suites compared with torch.nn (cuDNN), in float32, tf32, bfloat16, float16: with
             the default route, with the persistent kernels, and with one launch per step

Each part has its own time limit, and a failing part does not affect the results of the others. The
output of the commands goes to OUT/<part>.log; exit codes, times, the report of certify and all
records of the benchmark go to OUT/gpu-check.json; OUT/summary.md summarises them. The exit code is
0 if every command succeeded and the default route was never slower than torch.nn; 1 if a command
failed, had no time left or lacked a tool, which the summary names; 77, with a message, if there is
no GPU.
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
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
NO_DEVICE = 77
LIMITS = {
    "build": 240.0, "tests": 240.0, "sanitizer": 120.0, "certify": 150.0, "ladder": 30.0,
    "bench": 240.0,
}  # fmt: skip
PARTS = tuple(LIMITS)
SUITES = (
    "flashrnn", "fastrnns", "stacks", "reinforcement", "deepbench-training", "deepbench-inference",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "tf32", "float32")
INFERENCE_ALONE = ("deepbench-inference",)
SWITCH = "FASTRNN_CUDA_KERNELS"
ROUTES = {"default": "0", "persistent": "persistent", "steps": "1"}  # the value of SWITCH for each
FEWEST = 0.97  # the least speed of the default route relative to torch.nn: the same call, noise

# The smallest cases. On an H200, for each family of persistent kernels there is a pair of sizes
# (rows, hidden_size) for which it is chosen.
CELLS = ("LSTM", "GRU", "RNN")
OPERANDS = {
    "bfloat16": ("bfloat16", False),
    "float16": ("float16", False),
    "tf32": ("float32", True),
    "float32": ("float32", False),
}
WAYS = ("block", "cluster", "ring")
SIZES = (
    (3, 5), (3, 20), (3, 40), (3, 72), (3, 120), (3, 136), (3, 264),
    (400, 72), (400, 88), (400, 116), (600, 20),
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of a part: `share` is its share of the part's remaining time."""

    name: str
    arguments: tuple[str, ...]
    share: float = 1.0
    json: str = ""  # the file that it writes, in OUT
    route: str = ""  # one of `ROUTES`, set in its environment
    needs: str = ""  # a Python module that it needs


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
    seconds: float = 0.06  # for each case and pass of the benchmark
    python: str = sys.executable
    architecture: str = "90a"
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ladder(self) -> Path:
        return self.out / "ladder"


def commands(part: str, options: Options) -> list[Command]:
    """The commands of a part."""
    return {
        "build": build,
        "tests": tests,
        "sanitizer": sanitizer,
        "certify": certify,
        "ladder": ladder,
        "bench": bench,
    }[part](options)


def build(options: Options) -> list[Command]:
    defines = {
        "FASTRNN_CUDA": "ON",
        "FASTRNN_CUDA_PERSISTENT": "ON",
        "FASTRNN_CUDA_ARCHITECTURES": options.architecture,
        "FASTRNN_WATCHDOG": "ON",
    }
    install = [options.python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    install += [f"--config-settings=cmake.define.{k}={v}" for k, v in defines.items()]
    configure = ["cmake", "-S", str(ROOT), "-B", str(options.ladder), "-G", "Ninja"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DFASTRNN_PYTHON=OFF"]
    configure += [f"-D{k}={v}" for k, v in defines.items()]
    return [
        Command("package", (*install, str(ROOT)), 0.5),
        Command("configure the ladder", tuple(configure), 0.2),
        Command(
            "the ladder",
            ("cmake", "--build", str(options.ladder), "--target", "ladder_exchange"),
        ),
    ]


def tests(options: Options) -> list[Command]:
    pytest = [options.python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    if _has("xdist", options.python):
        pytest += ["-n", str(min(8, os.cpu_count() or 1))]
    by_torch, of_cuda = "tests/test_cuda_by_torch.py", "tests/test_cuda.py"
    others = ["tests", f"--ignore={by_torch}", f"--ignore={of_cuda}", "-m", "not virtual_device"]
    # A file that needs a missing module is one error; the other files still run.
    others.append("--continue-on-collection-errors")
    return [
        Command("pytest, the default route", (*pytest, by_torch), 0.4, needs="pytest"),
        Command("pytest, the kernels", (*pytest, of_cuda), 0.8, needs="pytest"),
        Command("pytest, all else", (*pytest, *others), needs="pytest"),
    ]


def sanitizer(options: Options) -> list[Command]:
    smallest = (options.python, str(Path(__file__).resolve()), "--smallest-cases")
    listed: list[Command] = []
    for tool, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        # Only fastrnn's kernels. No API errors, because libraries probe the driver's features with
        # calls that may fail.
        with_tool: tuple[str, ...] = (
            _of_toolkit("compute-sanitizer"),
            "--tool",
            tool,
            "--error-exitcode",
            "9",
        )
        with_tool += ("--report-api-errors", "no", "--kernel-name", "kns=fastrnn")
        listed.append(Command(tool, (*with_tool, *smallest), share))
    return listed


def certify(options: Options) -> list[Command]:
    file = "certify.json"
    command = (options.python, "-m", "fastrnn.cli", "certify", "--quick", "--json")
    return [Command("certify", (*command, str(options.out / file)), json=file)]


def ladder(options: Options) -> list[Command]:
    program = options.ladder / "benchmarks" / "ladder" / "ladder_exchange"
    file = "exchange.json"
    return [Command("exchange", (str(program), str(options.out / file)), json=file)]


def bench(options: Options) -> list[Command]:
    runs = [(suite, route) for route in ROUTES for suite in options.suites]
    listed: list[Command] = []
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
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _of_toolkit(tool: str) -> str:
    """The path of a CUDA tool, from PATH or nvcc's folder."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), *beside])) or tool


# ---- running ------------------------------------------------------------------------------------


def run_command(command: Command, log: Path, limit: float) -> tuple[int | str, bool]:
    """Run a command; return its exit code, and whether the time limit ended its process group."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n==== {command.name}: {' '.join(command.arguments)}\n")
        file.flush()
        if missing := _missing(command):
            file.write(f"{missing}\n")
            return missing, False
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        # So that the user's certificates are neither read nor written; platformdirs is not needed.
        environment["FASTRNN_CERTIFICATES"] = str(log.parent / "certificates")
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
            return process.returncode if process.returncode is not None else "did not end", True


def _missing(command: Command) -> str:
    """The missing program or module of the command; empty if nothing is missing."""
    program = command.arguments[0]
    if shutil.which(program) is None:
        return f"{program} is not on this machine"
    if command.needs and not _has(command.needs, program):
        return f"{program} has no module {command.needs}"
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process group first, so that a benchmark writes its records; then kill it."""
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
        return f"FAILED: {outcome.rc}"
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
        "certify": None,
        "ladder": {},
        "header": None,
        "records": [],
        "not_run": [],
    }
    for part in options.parts:
        for command in commands(part, options) if part in ("certify", "ladder", "bench") else ():
            written = read_json(options.out / command.json) if command.json else None
            if written is None:
                continue
            if part == "certify":
                found["certify"] = written
            elif part == "ladder":
                found["ladder"][command.name] = written
            else:
                _add_run(found, written, command.route)
    return found


def _add_run(found: dict[str, Any], run: dict[str, Any], route: str) -> None:
    """Add one suite's document of one route; merge the headers' peaks and completeness."""
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
    if slow := slower_by_default(found["records"]):
        lines += ["", f"## Default route slower than {FEWEST} of torch.nn", "", *slow]
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
    """For each suite, route, precision and pass: cases, geometric mean, minimum, number below 1."""
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


def slower_by_default(records: Sequence[dict[str, Any]]) -> list[str]:
    """The cases in which the default route is slower than torch.nn's layer."""
    return [
        f"- {r['suite']}, {r['pass']}: {r['ratio_to_best_peer']:.3f} in {r['case']}"
        for r in records
        if r["route"] == "default"
        and r["provider"] == "fastrnn"
        and (r["ratio_to_best_peer"] or FEWEST) < FEWEST
    ]


def write(options: Options) -> dict[str, Any]:
    found = document(options)
    path = options.out / "gpu-check.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "summary.md").write_text(summary(options, found), encoding="utf-8")
    return found


# ---- the device ---------------------------------------------------------------------------------


def device() -> str:
    """Name, driver and memory of the GPU; empty if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def architecture() -> str:
    """The first device's architecture by CMake's name: 90a for Hopper, for its own instructions."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        number = done.stdout.split()[0].replace(".", "")
    except (OSError, subprocess.SubprocessError, IndexError):
        return "90a"
    return "90a" if number == "90" else number


# ---- the smallest cases -------------------------------------------------------------------------


def reaching(
    cell: str, operand: str, device: int | None
) -> Iterator[tuple[int, int, set[tuple[str, str]]]]:
    """The entries of `SIZES` that reach families of persistent kernels not reached before.

    Yields:
        Rows, hidden size, and the families, each a pass and a way of exchange. `device` None: for
        an H200.
    """
    from fastrnn import _C
    from fastrnn._engine import engine_options
    from fastrnn._options import Options as LayerOptions

    options = engine_options(LayerOptions(cell))  # type: ignore[arg-type]
    dtype, tf32 = OPERANDS[operand]
    reached: set[tuple[str, str]] = set()
    for rows, hidden_size in SIZES:
        found = set()
        for backward in (False, True):
            sizes = (dtype, 3, rows, 3, hidden_size)
            plan = _C.cuda_kernels(options, *sizes, backward, tf32, device)
            if plan is not None and plan[0]:
                found.add(("backward" if backward else "forward", plan[1].split(",")[0]))
        if not found <= reached:
            reached |= found
            yield rows, hidden_size, found


def run_smallest(cell: str, dtype: str, rows: int, hidden_size: int, **options: Any) -> None:
    """Forward and backward of three steps, with lengths and resets."""
    import torch

    import fastrnn

    kind = getattr(torch, dtype)
    layer = getattr(fastrnn, cell)(3, hidden_size, **options).to("cuda", kind)
    x = torch.randn(3, rows, 3, device="cuda", dtype=kind, requires_grad=True)
    lengths = torch.randint(0, 4, (rows,), device="cuda")
    output, _ = layer(x, lengths=lengths, reset=torch.rand(3, rows, device="cuda") < 0.3)
    output.sum().backward()
    torch.cuda.synchronize()


def smallest_cases() -> int:
    """Run a small case of every step kernel and of every family of persistent kernels, and print
    the families that the sizes do not reach on this device.
    """
    from fastrnn.bench.precision import precision

    os.environ[SWITCH] = ROUTES["steps"]
    more: dict[str, list[dict[str, Any]]] = {
        "LSTM": [{"proj_size": 2}],
        "GRU": [{"reset_after": False}],
    }
    for cell, dtype in product(CELLS, ("float32", "float64", "bfloat16", "float16")):
        for options in ({}, *more.get(cell, [])):
            run_smallest(cell, dtype, 3, 5, num_layers=2, bidirectional=True, **options)
            print("steps:", cell, dtype, options or "", flush=True)
    os.environ[SWITCH] = ROUTES["persistent"]
    left_out = []
    for cell, operand in product(CELLS, OPERANDS):
        wanted = set(product(("forward", "backward"), WAYS))
        for rows, hidden_size, families in reaching(cell, operand, 0):
            with precision(operand == "tf32"):
                run_smallest(cell, OPERANDS[operand][0], rows, hidden_size)
            wanted -= families
            names = ", ".join(" by ".join(family) for family in sorted(families))
            print(f"persistent: {cell} {operand} B {rows} H {hidden_size}: {names}", flush=True)
        left_out += [f"{cell} {operand} {' by '.join(family)}" for family in sorted(wanted)]
    print("families of persistent kernels left out:", ", ".join(left_out) or "none")
    return 0


# ---- the command --------------------------------------------------------------------------------


def chosen(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in the order of `known`.

    Raises:
        ValueError: a name is not in `known`.
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
        print("gpu_check: no GPU on this machine (nvidia-smi reports none): nothing was run")
        return NO_DEVICE
    return check(options)


def check(options: Options) -> int:
    """Run the parts in order."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.architecture = architecture()
    end = time.monotonic() + 60.0 * options.minutes
    for part in options.parts:
        run_part(part, options, end)
    found = write(options)
    print((options.out / "summary.md").read_text(encoding="utf-8"))
    failed = [o for o in options.outcomes if o.rc != 0 or o.timed_out]
    return 1 if failed or slower_by_default(found["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
