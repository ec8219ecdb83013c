"""Measure what the suites of `fastrnn bench` do not measure, interleaved with torch.

    python benchmarks/goals.py                      every part, one table each
    python benchmarks/goals.py memory step          these parts
    python benchmarks/goals.py scaling --threads 8 --json scaling.json

- memory      additional memory of a training step, and of inference without its outputs, for 100
              and 1000 steps: one process for each figure
- contention  a case while other processes keep cores busy, compared with the same case without them
- lengths     rows with uniformly distributed lengths, with `lengths=` and as a PackedSequence,
              compared with the padded batch and torch's packed layers
- step        one step with one row, in microseconds: a layer, frozen and as a stream, compared with
              torch and ONNX Runtime; a cell compared with torch's
- stream      a step of a stream in each dtype, with one row, compared with the layer and ONNX
              Runtime
- recompute   memory and time of training with `recompute`, compared with training without it
- bfloat16    bfloat16 compared with fastrnn's float32 and torch's bfloat16
- scaling     1, 2, 4 … threads up to --threads
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.bench import records, report
from fastrnn.bench.cases import PASSES, Case, Pass
from fastrnn.bench.data import make_data
from fastrnn.bench.prepare import MissingPeerError, Prepared, Provider, prepare_layer
from fastrnn.bench.providers import make_provider
from fastrnn.bench.runner import check
from fastrnn.bench.timing import HostClock, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Row = dict[str, Any]  # a cell of the table by the name of its column

LIBRARIES = ("fastrnn", "torch")
RECOMPUTE = "fastrnn recompute"
MEBIBYTE = 1 << 20
# malloc returns freed blocks above this size to the system, so resident memory is live memory.
PROBE_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**5))"


@dataclass(frozen=True)
class Options:
    threads: int
    seconds: float  # for each case and pass, all providers together
    competitors: int
    tiny: bool

    @property
    def cells(self) -> tuple[str, ...]:
        return ("LSTM",) if self.tiny else ("LSTM", "GRU")

    def case(self, cell: str, T: int, B: int, H: int, **more: Any) -> Case:
        """A case with as many inputs as hidden units; reduced in size if `tiny`."""
        if self.tiny:
            T, B, H = min(T, 4), min(B, 3), 8
        return Case(cell, T=T, B=B, I=H, H=H, **more)


def time_in_turns(options: Options, prepared: dict[str, Prepared]) -> dict[str, float]:
    """Median milliseconds of each."""
    timings = measure(prepared, HostClock(), 1, options.seconds)
    return {name: timing.median for name, timing in timings.items()}


def prepare(case: Case, pass_: Pass, *names: str) -> dict[str, Prepared]:
    """The installed providers, prepared, after a check that their results agree."""
    data = make_data(case, "cpu")
    providers = [provider for provider in map(_installed, names) if provider is not None]
    prepared = {provider.name: provider.prepare(case, data, pass_) for provider in providers}
    check(case, data, pass_, prepared)
    return prepared


def _installed(name: str) -> Provider | None:
    try:
        return make_provider(name)
    except MissingPeerError as missing:
        print(missing, file=sys.stderr)
        return None


def columns(times: dict[str, float], unit: str = "ms") -> Row:
    scale = 1e3 if unit == "µs" else 1.0
    return {f"{name} {unit}": time * scale for name, time in times.items()}


# ---- memory -------------------------------------------------------------------------------------


def memory(options: Options) -> list[Row]:
    """MiB of resident memory."""
    rows = []
    for cell in options.cells:
        for layers in (1,) if options.tiny else (1, 2):
            case = options.case(cell, 200, 32, 512, layers=layers)
            needed = _needed(options, case, "training")
            rows.append(_memory_row(f"training step, {case.label()}", needed))
        beyond = []
        for steps in (100, 1000):
            case = options.case(cell, steps, 32, 512)
            beyond.append(_needed(options, case, "inference"))
            rows.append(_memory_row(f"inference beyond outputs, {case.label()}", beyond[-1]))
        growth = {name: beyond[1][name] - beyond[0][name] for name in LIBRARIES}
        rows.append(_memory_row(f"growth of that, {cell}", growth))
    return rows


def _memory_row(what: str, needed: dict[str, float]) -> Row:
    return {"what": what, **_mebibytes(needed)}


def _mebibytes(needed: dict[str, float]) -> Row:
    return {f"{name} MiB": count / MEBIBYTE for name, count in needed.items()}


def _needed(
    options: Options, case: Case, pass_: Pass, libraries: Sequence[str] = LIBRARIES
) -> dict[str, float]:
    """Bytes by library, each in a separate process."""
    needed = {}
    for library in libraries:
        asked = {"library": library, "case": case.as_record(), "pass": pass_}
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--probe",
                json.dumps(asked),
                f"--threads={options.threads}",
            ],
            env={**os.environ, **PROBE_ENVIRONMENT},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        needed[library] = float(done.stdout)
    return needed


def probe(library: str, case: Case, pass_: Pass) -> int:
    """The rise of resident memory, in bytes, without the outputs of inference.

    A small layer runs first, so that threads and libraries exist already. The scratch that the
    engine keeps from it is too small for the measured call, so the new scratch counts.
    """
    layer_of = getattr(torch.nn if library == "torch" else fastrnn, case.cell)
    if library == RECOMPUTE:
        layer_of = partial(layer_of, recompute=True)
    run = _train if pass_ == "training" else _infer
    run(layer_of(8, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8))
    layer = layer_of(case.I, case.H, case.layers)
    x, d_output = torch.randn(case.T, case.B, case.I), torch.randn(case.T, case.B, case.H)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark to the current value
    outputs = run(layer, x, d_output)
    return _status("VmHWM") - before - sum(t.numel() * t.element_size() for t in outputs)


def _train(layer: torch.nn.Module, x: Tensor, d_output: Tensor) -> list[Tensor]:
    output, _ = layer(x.requires_grad_())
    output.backward(d_output)
    return []


def _infer(layer: torch.nn.Module, x: Tensor, d_output: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        output, hx = layer(x)
    return [output, *(hx if isinstance(hx, tuple) else (hx,))]


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


# ---- contention ---------------------------------------------------------------------------------


def contention(options: Options) -> list[Row]:
    """Milliseconds; busy / quiet is the cost of the competitors."""
    rows = []
    for cell in options.cells:
        for case in (options.case(cell, 100, 32, 256), options.case(cell, 50, 64, 512)):
            for pass_ in PASSES:
                prepared = prepare(case, pass_, *LIBRARIES)
                quiet = time_in_turns(options, prepared)
                with _competitors(options.competitors):
                    busy = time_in_turns(options, prepared)
                row: Row = {"case": case.label(), "pass": pass_}
                for name in LIBRARIES:
                    row[f"{name} quiet"], row[f"{name} busy"] = quiet[name], busy[name]
                    row[f"{name} busy / quiet"] = busy[name] / quiet[name]
                rows.append(row)
    return rows


@contextmanager
def _competitors(count: int) -> Iterator[None]:
    """Busy processes; each exits on its own if this one is killed."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    time.sleep(0.3)  # until they are busy
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


# ---- lengths ------------------------------------------------------------------------------------


def lengths(options: Options) -> list[Row]:
    """Milliseconds; `steps` is the share of (step, row) pairs with data."""
    rows = []
    for cell in options.cells:
        case = options.case(cell, 100, 64, 256)
        # Evenly spaced in 1…T, so that the share of steps does not depend on a random draw.
        drawn = torch.linspace(1, case.T, case.B).round().long()
        drawn = drawn[torch.randperm(case.B, generator=torch.Generator().manual_seed(0))]
        for pass_ in PASSES:
            times = time_in_turns(options, _of_lengths(case, pass_, drawn))
            padded, packed = times["padded"], times["packed"]
            rows.append(
                {
                    "case": case.label(),
                    "pass": pass_,
                    "steps": float(drawn.sum()) / (case.T * case.B),
                    **columns(times),
                    "lengths / padded": times["lengths="] / padded,
                    "packed / padded": packed / padded,
                    "torch packed / fastrnn": times["torch packed"] / packed,
                }
            )
    return rows


def _of_lengths(case: Case, pass_: Pass, drawn: Tensor) -> dict[str, Prepared]:
    theirs = torch.nn.__dict__[case.cell](case.I, case.H)
    ours = fastrnn.convert(theirs)
    x = torch.randn(case.T, case.B, case.I)
    packed = pack_padded_sequence(x, drawn, enforce_sorted=False)
    training = pass_ == "training"
    for tensor in (x, packed.data):
        tensor.requires_grad_(training)

    def prepared(layer: torch.nn.Module, leaf: Tensor, given: Any, **call: Any) -> Prepared:
        wanted = [leaf, *layer.parameters()]

        def run(_: int) -> Any:
            output, _ = layer(given, **call)
            output = output if isinstance(output, Tensor) else output.data
            return torch.autograd.grad(output.sum(), wanted) if training else output

        context = torch.enable_grad if training else torch.inference_mode
        return Prepared(run, dict, context=context)

    return {
        "padded": prepared(ours, x, x),
        "lengths=": prepared(ours, x, x, lengths=drawn),
        "packed": prepared(ours, packed.data, packed),
        "torch packed": prepared(theirs, packed.data, packed),
    }


# ---- one step -----------------------------------------------------------------------------------


def step(options: Options) -> list[Row]:
    """Microseconds of inference; the last row contains the geometric means of the ratios."""
    rows = []
    for cell in ("LSTM", "GRU", "RNN"):
        for H in (32,) if options.tiny else (32, 64, 128, 256, 384, 640, 1024):
            case = options.case(cell, 1, 1, H)
            layer = getattr(fastrnn, cell)(case.I, case.H)
            prepared = prepare(case, "inference", *LIBRARIES, "onnxruntime")
            prepared["stream"] = _stream(layer, "float32")
            data = make_data(case, "cpu")
            prepared["frozen"] = prepare_layer(layer.eval(), data, "inference", {})
            fastrnn.freeze(layer)
            times = time_in_turns(options, prepared | _cells(case))
            ratios = {
                "torch / layer": times["torch"] / times["fastrnn"],
                "torch / cell": times["torch cell"] / times["cell"],
            }
            if "onnxruntime" in times:
                for ours in ("frozen", "stream"):
                    ratios[f"onnxruntime / {ours}"] = times["onnxruntime"] / times[ours]
            rows.append({"case": f"{cell} I{case.I} H{case.H}", **columns(times, "µs"), **ratios})
    means = {name: geometric_mean([row[name] for row in rows]) for name in ratios}
    return [*rows, {"case": "geometric mean", **means}]


def _cells(case: Case) -> dict[str, Prepared]:
    theirs = getattr(torch.nn, f"{case.cell}Cell")(case.I, case.H)
    x, h, c = torch.randn(case.B, case.I), *torch.randn(2, case.B, case.H)
    hx = (h, c) if case.cell == "LSTM" else h

    def prepared(cell: torch.nn.Module) -> Prepared:
        return Prepared(lambda _: cell(x, hx), dict, context=torch.inference_mode)

    return {"cell": prepared(fastrnn.convert(theirs)), "torch cell": prepared(theirs)}


# ---- streams ------------------------------------------------------------------------------------


def stream(options: Options) -> list[Row]:
    """Microseconds of a step."""
    rows = []
    for cell in options.cells:
        for H in (64,) if options.tiny else (64, 256, 1024):
            case = options.case(cell, 1, 1, H)
            layer = getattr(fastrnn, cell)(case.I, case.H)
            streams = {dtype: _stream(layer, dtype) for dtype in ("float32", "bfloat16", "int8")}
            others = prepare(case, "inference", "fastrnn", "onnxruntime")
            others["layer"] = others.pop("fastrnn")
            times = time_in_turns(options, streams | others)
            row = {"case": case.label(), **columns(times, "µs")}
            row["float32 / int8"] = times["float32"] / times["int8"]
            if "onnxruntime" in times:
                row["onnxruntime / float32"] = times["onnxruntime"] / times["float32"]
            rows.append(row)
    return rows


def _stream(layer: Any, dtype: str) -> Prepared:
    made = fastrnn.Stream(layer, dtype=dtype)
    x = torch.randn(1, layer.input_size)
    x = x.bfloat16() if dtype == "bfloat16" else x
    step = made.step
    return Prepared(lambda _: step(x), dict)


# ---- recompute ----------------------------------------------------------------------------------


def recompute(options: Options) -> list[Row]:
    """Milliseconds and MiB of a training step."""
    rows = []
    for cell in options.cells:
        for steps in (512,) if options.tiny else (512, 4096):
            case = options.case(cell, steps, 16, 512)
            layer = getattr(fastrnn, cell)(case.I, case.H)
            again = getattr(fastrnn, cell)(case.I, case.H, recompute=True)
            again.load_state_dict(layer.state_dict())
            data = make_data(case, "cpu")
            both = {"fastrnn": layer, RECOMPUTE: again}
            prepared = {n: prepare_layer(made, data, "training", {}) for n, made in both.items()}
            times = time_in_turns(options, prepared)
            needed = _needed(options, case, "training", (*both, "torch"))
            row = {"case": case.label(), **columns(times), **_mebibytes(needed)}
            row["recompute / fastrnn, time"] = times[RECOMPUTE] / times["fastrnn"]
            row["recompute / fastrnn, memory"] = needed[RECOMPUTE] / needed["fastrnn"]
            rows.append(row)
    return rows


# ---- bfloat16 -----------------------------------------------------------------------------------


def bfloat16(options: Options) -> list[Row]:
    """Milliseconds."""
    rows = []
    for cell in options.cells:
        single = options.case(cell, 50, 64, 512)
        half = options.case(cell, 50, 64, 512, dtype="bfloat16")
        for pass_ in PASSES:
            ours = prepare(single, pass_, "fastrnn")["fastrnn"]
            both = prepare(half, pass_, *LIBRARIES)
            times = time_in_turns(
                options,
                {
                    "fastrnn float32": ours,
                    "fastrnn bfloat16": both["fastrnn"],
                    "torch bfloat16": both["torch"],
                },
            )
            rows.append(
                {
                    "case": single.label(),
                    "pass": pass_,
                    **columns(times),
                    "float32 / bfloat16": times["fastrnn float32"] / times["fastrnn bfloat16"],
                    "torch / fastrnn": times["torch bfloat16"] / times["fastrnn bfloat16"],
                }
            )
    return rows


# ---- scaling ------------------------------------------------------------------------------------


def scaling(options: Options) -> list[Row]:
    """Milliseconds; the efficiency is one thread's time divided by n times that of n threads."""
    rows = []
    for cell in options.cells:
        sizes = ((50, 64, 512), (50, 256, 1024), (100, 1, 1024))
        for case in (options.case(cell, *size) for size in sizes):
            for pass_ in PASSES:
                rows += _scaled(options, case, pass_)
    return rows


def _scaled(options: Options, case: Case, pass_: Pass) -> list[Row]:
    rows, alone = [], dict[str, float]()
    for count in _thread_counts(options.threads):
        with _threads(count):
            times = time_in_turns(options, prepare(case, pass_, *LIBRARIES))
        alone = alone or times
        efficiency = {f"{n} efficiency": alone[n] / (count * t) for n, t in times.items()}
        ratio = times["torch"] / times["fastrnn"]
        row: Row = {"case": case.label(), "pass": pass_, "threads": count}
        rows.append({**row, **columns(times), **efficiency, "torch / fastrnn": ratio})
    return rows


def _thread_counts(most: int) -> list[int]:
    """1, 2, 4 … and `most`."""
    powers = [1 << k for k in range(most.bit_length()) if 1 << k < most]
    return [*powers, most]


# ---- the command --------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Options], list[Row]]] = {
    "memory": memory,
    "contention": contention,
    "lengths": lengths,
    "step": step,
    "stream": stream,
    "recompute": recompute,
    "bfloat16": bfloat16,
    "scaling": scaling,
}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(rows: Sequence[Row]) -> str:
    """The rows as text; a missing value is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    words = [name for name in names if isinstance(rows[0].get(name), str)]
    ordered = words + [name for name in names if name not in words]
    cells = [[_shown(row.get(name, "-")) for name in ordered] for row in rows]
    return report.Table(ordered, cells, len(words)).text()


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all of them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and pass")
    parser.add_argument("--competitors", type=int, default=2, help="busy processes in contention")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test that it runs")
    parser.add_argument("--probe", type=json.loads, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.parts if name not in PARTS]
    if unknown:
        parser.error(f"part {unknown[0]!r} is not known; there are: {', '.join(PARTS)}")
    with _threads(parsed.threads):
        if parsed.probe:
            asked = parsed.probe
            print(probe(asked["library"], Case(**asked["case"]), asked["pass"]))
            return 0
        options = Options(parsed.threads, parsed.seconds, parsed.competitors, parsed.tiny)
        document = {**records.environment(), "threads": options.threads, "parts": {}}
        print(
            ", ".join(map(str, (document["machine"]["cpu"], document["machine"]["isa"]))), end=", "
        )
        print(report.threads(options.threads))
        for name in parsed.parts or PARTS:
            rows = document["parts"][name] = PARTS[name](options)
            about = (PARTS[name].__doc__ or "").splitlines()[0]
            print(f"\n{name}: {about}\n{table(rows)}", flush=True)
    if parsed.json:
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
