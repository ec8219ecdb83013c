"""The command `fastrnn`: `info`, `bench` and `certify`. Errors go to stderr with exit code 2."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastrnn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERRUPTED = 130

BENCH_EXAMPLES = """\
examples:
  fastrnn bench                                     the quick suite, all installed peers
  fastrnn bench --suite cpu --threads 2 --json new.json --plot new.png
  fastrnn bench --suite cpu --roofline roofline.png
  fastrnn bench --suite cpu --cell LSTM,GRU --pass inference --compare old.json
  fastrnn bench --suite real --threads 1,2,4,8,16   times side by side
  fastrnn bench --suite stacks --suite fastrnns --against torch --seconds 3
  fastrnn bench --device cuda --suite deepbench-training --dtype float16,tf32
  fastrnn bench --list
"""
INFO_EXAMPLES = """\
examples:
  fastrnn info
  fastrnn info --json
  fastrnn info --explain LSTM,64,50,512,512         # CELL,B,T,I,H
  fastrnn info --explain "GRU T100 B16 I256 H768 bi" --dtype bfloat16 --device cuda
"""
CERTIFY_EXAMPLES = """\
examples:
  fastrnn certify --quick                           the most common classes, two minutes
  fastrnn certify --device cuda:1                   all classes, ten minutes
  fastrnn certify --json report.json                also write a report that you can send in
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, for example head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CommandError as error:
        print(f"fastrnn: error: {error}", file=sys.stderr)
        return 2


class CommandError(Exception):
    """An error that the user can fix; the message says how."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrnn",
        description="Recurrent layers on a C++ engine: show the installation, measure its speed.",
        epilog="examples:\n  fastrnn info\n  fastrnn bench --suite quick\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"fastrnn {fastrnn.__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="{info,bench,certify}")
    _add_info(commands)
    _add_bench(commands)
    _add_certify(commands)
    return parser


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="print versions, CPU, CUDA, loaded libraries, and the route of a tensor or a case",
        epilog=INFO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--explain", metavar="CASE",
        help="print instead which kernels compute a case, and why "
        "(CELL,B,T,I,H, or a name of bench --list)",
    )  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="device of the case (default cpu)")
    add("--dtype", metavar="NAME",
        help="dtype of the case: float32 (default), float64, bfloat16, float16; on CUDA also tf32",
    )  # fmt: skip
    parser.set_defaults(command=_info)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="compare the speed of the layers with other libraries",
        description="Every case runs fastrnn and each peer in turn, interleaved, in one process.",
        epilog=BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", action="append", metavar="NAME", help="repeatable; default quick")
    add("--list", action="store_true", help="list the suites and their cases, run nothing")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--cell", type=_names, metavar="LSTM,GRU,RNN", help="only these cells (see --list)")
    add("--dtype", type=_names, default=["float32"], metavar="NAMES",
        help="float32 (default), float64, bfloat16, float16; on CUDA also tf32")  # fmt: skip
    add("--pass", dest="passes", type=_names, default=["inference", "training"], metavar="NAMES",
        help="inference,training (default both)")  # fmt: skip
    add("--threads", type=_counts, metavar="N,…",
        help="default: torch's; several numbers print side by side, for example 1,2,4,8,16",
    )  # fmt: skip
    add("--against", type=_names, metavar="PEERS",
        help="torch,onnxruntime,flashrnn,torch_compile; for the suite cells loop,compile,layer; "
        "default: all installed peers that support the device, without torch_compile, "
        "which compiles for up to a minute per case")  # fmt: skip
    add("--seconds", type=_positive(float), default=1.0, metavar="S",
        help="time for each case and pass, all providers together (default 1)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the records")
    add("--keep-going", action="store_true",
        help="list a case that fails and continue; write the records after each case")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="plot ratios and shares of the roof (matplotlib)")
    add("--roofline", type=Path, metavar="FILE",
        help="plot GFLOP/s against operations per byte of weights (matplotlib)")  # fmt: skip
    add("--compare", type=Path, metavar="OLD.json", help="print old / new for every case")
    add("--wide", action="store_true",
        help="print all columns, one row per case and pass, beyond 80 columns")  # fmt: skip
    parser.set_defaults(command=_bench)


def _add_certify(commands: Any) -> None:
    parser = commands.add_parser(
        "certify",
        help="find the CUDA kernels that are correct and faster than torch's on this machine",
        description=(
            "Compare the CUDA kernels with torch's layers, in a separate process with a watchdog, "
            "and write to the user's cache which of them are correct and faster. These kernels "
            "then run by default on this device, in this environment."
        ),
        epilog=CERTIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", type=_cuda_device, default="cuda:0", metavar="cuda:N", help="default cuda:0")
    add("--quick", action="store_true", help="only the most common classes, two minutes")
    add("--json", nargs="?", const="-", metavar="FILE",
        help="write the report with all cases; without FILE print it in place of the table",
    )  # fmt: skip
    parser.set_defaults(command=_certify)


def _cuda_device(text: str) -> str:
    found = re.fullmatch(r"cuda(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected cuda or cuda:N")
    return f"cuda:{found[1] or 0}"


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least one name")
    return names


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(int(_positive(int)(count)) for count in text.split(",")))


_counts.__name__ = "list of int"  # argparse prints the name in its message


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a finite number above 0")
        return value

    convert.__name__ = kind.__name__  # argparse prints the name in its message
    return convert


def _info(parsed: argparse.Namespace) -> int:
    from fastrnn.info import info, render

    if parsed.explain is not None:
        return _explain(parsed)
    for option in ("device", "dtype"):
        if getattr(parsed, option):
            raise CommandError(f"--{option} describes a case: use it with --explain CASE")
    print(json.dumps(info(), indent=1) if parsed.json else render(info()))
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    from fastrnn.bench.cases import PRECISIONS
    from fastrnn.bench.explain import explain, parse_case, render

    try:
        if parsed.dtype is not None and parsed.dtype not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise ValueError(f"--dtype {parsed.dtype!r} is not known; there are: {names}")
        known = explain(parse_case(parsed.explain, parsed.dtype), parsed.device or "cpu")
    except (ValueError, RuntimeError) as error:
        raise CommandError(error) from error
    print(json.dumps(known, indent=1) if parsed.json else render(known))
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    if parsed.list:
        return _list_suites()
    _require("torch", "pip install torch")
    if parsed.plot or parsed.roofline:
        _require("matplotlib", "pip install matplotlib")
    for path in (parsed.json, parsed.plot, parsed.roofline):
        if path:
            _check_file(path)
    for path in (parsed.plot, parsed.roofline):
        if path:
            _check_picture(path)
            if parsed.threads is not None and len(parsed.threads) > 1:
                raise CommandError(
                    f"{path}: a plot is of one number of threads; give --threads one"
                )

    from fastrnn.bench import compare, plot, records, report
    from fastrnn.bench.prepare import MissingPeerError
    from fastrnn.bench.progress import progress
    from fastrnn.bench.runner import MismatchError, run_each

    try:
        old = records.load(parsed.compare) if parsed.compare else None
        request = _request(parsed)
        with progress(len(request.cases) * len(request.passes)) as on_case:
            runs = run_each(request, parsed.threads or [None], on_case, _writer(parsed))
    except (ValueError, MissingPeerError, MismatchError) as error:
        raise CommandError(error) from error
    document = records.document(*runs)
    print(report.render(document, parsed.wide))
    if old is not None:
        print("\n" + compare.render(old, document, parsed.wide))
    try:
        if parsed.json:
            records.save(document, parsed.json)
        if parsed.plot and document["records"]:
            plot.plot(document, parsed.plot)
        if parsed.roofline and document["records"]:
            plot.roofline(document, parsed.roofline)
    except OSError as error:  # no permission to write
        raise CommandError(error) from error
    return INTERRUPTED if runs[0].interrupted else 0


def _certify(parsed: argparse.Namespace) -> int:
    _require("torch", "pip install torch")
    if parsed.json not in (None, "-"):
        _check_file(Path(parsed.json))

    from fastrnn import _certificate, certify
    from fastrnn._engine import CUDA_SWITCH
    from fastrnn.bench.progress import progress
    from fastrnn.certify.table import render

    folder = _certificate.folder()
    unwritable = (
        f"{folder}: certificates cannot be written there ({{}}); "
        f"set {_certificate.FOLDER_VARIABLE} to a folder that can be written to"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # fail now, not after minutes of tests
        raise CommandError(unwritable.format(error)) from error
    grid = certify.QUICK if parsed.quick else certify.WHOLE
    try:
        with progress(len(certify.plan(grid))) as on_class:
            document = certify.run(parsed.device, grid, on_class)
    except certify.CertifyError as error:
        raise CommandError(error) from error
    text = json.dumps(document, indent=1)
    if parsed.json == "-":
        print(text)
    else:
        print(render(document))
    try:
        if parsed.json not in (None, "-"):
            Path(parsed.json).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(error) from error
    try:
        path = _certificate.write(document)
    except OSError as error:
        raise CommandError(unwritable.format(error)) from error
    trusted = sum(entry["trusted"] for entry in document["classes"])
    summary = (
        f"The certificate is {path}. {trusted} of {len(document['classes'])} classes are trusted "
        "and use the engine's kernels from now on; all other calls use torch's own operator."
    )
    if not document["complete"]:
        summary += " The time limit ended the run before all classes were tested."
    if switch := os.environ.get(CUDA_SWITCH):
        summary += f" The environment variable {CUDA_SWITCH}={switch} overrides the certificate."
    print(f"\n{summary}", file=sys.stderr if parsed.json == "-" else sys.stdout)
    return 0


def _writer(parsed: argparse.Namespace) -> Callable[[Any], None]:
    """The function called after each case: with --keep-going it writes the records so far."""
    from fastrnn.bench import records

    def write(runs: Any) -> None:
        if parsed.keep_going and parsed.json:
            records.save(records.document(*runs), parsed.json)

    return write


def _request(parsed: argparse.Namespace) -> Any:
    """The request that the options describe.

    Raises:
        ValueError: an option has an unknown name.
    """
    from fastrnn.bench import cases
    from fastrnn.bench.runner import Request

    known_cells = (*cases.CELLS, *cases.STEPS)
    cells = [cases.cell_named(name) or name for name in parsed.cell or known_cells]
    for option, chosen, known in (
        ("--cell", cells, known_cells),
        ("--dtype", parsed.dtype, cases.PRECISIONS),
        ("--pass", parsed.passes, cases.PASSES),
    ):
        for name in chosen:
            if name not in known:
                raise ValueError(f"{option} {name!r} is not known; there are: {', '.join(known)}")
    suites = parsed.suite or ["quick"]
    return Request(
        cases=cases.select(cases.load_suites(), suites, cells, parsed.dtype),
        device=parsed.device,
        passes=parsed.passes,
        peers=parsed.against,
        seconds=parsed.seconds,
        keep_going=parsed.keep_going,
    )


def _list_suites() -> int:
    from fastrnn.bench.cases import load_suites

    for name, cases in load_suites().items():
        print(f"{name} ({len(cases)} cases)")
        for case in cases:
            print(f"  {case.label()}")
    return 0


def _check_file(path: Path) -> None:
    """Raise an error if the file cannot be written, before the work starts."""
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise CommandError(f"{path}: expected the name of a file, got a folder")


def _check_picture(path: Path) -> None:
    """Raise an error if matplotlib does not write the format, before the work starts."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise CommandError(
            f"{path}: expected the name of a picture that ends in one of "
            f"{', '.join('.' + name for name in sorted(known))}, got {path.suffix or 'no ending'}"
        )


def _require(package: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{package} is not installed; to install it: {install}")


if __name__ == "__main__":
    sys.exit(main())
