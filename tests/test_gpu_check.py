"""`make gpu-check`, without a GPU: what it would run, its time limits, and what it writes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replaced_module import virtual_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_check")


@pytest.fixture
def options(gpu_check: Any, tmp_path: Path) -> Any:
    return gpu_check.Options(tmp_path)


def python_command(gpu_check: Any, name: str, code: str, **more: Any) -> Any:
    return gpu_check.Command(name, (sys.executable, "-c", code), **more)


def test_a_dry_run_names_every_command(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in gpu_check.PARTS:
        assert f"{part}: " in printed
    for suite in gpu_check.SUITES:
        assert f"--suite {suite} --dtype bfloat16,float16,tf32,float32" in printed
    assert "--tool racecheck" in printed
    assert "fastrnn.cli certify --quick --json" in printed


def test_the_package_is_built_with_cuda_and_the_watchdog(gpu_check: Any, options: Any) -> None:
    package = gpu_check.build(options)[0]
    assert package.arguments[1:4] == ("-m", "pip", "install")
    for name in ("FASTRNN_CUDA", "FASTRNN_CUDA_PERSISTENT", "FASTRNN_WATCHDOG"):
        assert f"--config-settings=cmake.define.{name}=ON" in package.arguments


@pytest.mark.parametrize("parts", ["build,ladder,sanitizer", "tests,bench"])
def test_the_parts_can_be_split_over_two_calls(gpu_check: Any, parts: str) -> None:
    assert set(gpu_check.chosen(parts, gpu_check.PARTS, "part")) == set(parts.split(","))


def test_parts_and_suites_can_be_chosen(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--parts", "bench,tests", "--suites", "stacks", "--dtypes", "tf32"]
    assert gpu_check.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*["tests"] * 3, *["bench"] * 3]
    for line in lines[3:]:
        assert "--suite stacks --dtype tf32 --pass inference,training" in line


@pytest.mark.parametrize(
    ("option", "what"), [("--parts", "part"), ("--suites", "suite"), ("--dtypes", "dtype")]
)
def test_a_name_that_is_not_known_is_an_error(
    gpu_check: Any, capsys: pytest.CaptureFixture[str], option: str, what: str
) -> None:
    assert gpu_check.main([option, "everything"]) == 2
    assert f"{what} 'everything' is not known; there are: " in capsys.readouterr().err


def test_every_suite_it_names_exists(gpu_check: Any) -> None:
    from fastrnn.bench.cases import load_suites

    assert set(gpu_check.SUITES) <= set(load_suites())


def test_without_a_gpu_it_says_so_and_runs_nothing(
    gpu_check: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_check, "device", lambda: "")
    out = tmp_path / "results"
    assert gpu_check.main(["--out", str(out)]) == 77
    assert "no GPU on this machine" in capsys.readouterr().out
    assert not out.exists()


def test_a_command_that_hangs_is_ended_at_its_limit_with_its_children(
    gpu_check: Any, tmp_path: Path
) -> None:
    log = tmp_path / "part.log"
    code = (
        "import subprocess, sys, time\n"
        "print('started', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    _, timed_out = gpu_check.run_command(python_command(gpu_check, "hangs", code), log, 2.0)
    assert timed_out
    assert time.monotonic() - start < 60
    text = log.read_text()
    assert "started" in text
    assert "ended after 2 s, its limit" in text


def test_the_benchmark_takes_every_route_by_environment_variable(
    gpu_check: Any, options: Any, tmp_path: Path
) -> None:
    def suite(command: Any) -> str:
        return str(command.arguments[command.arguments.index("--suite") + 1])

    runs = {(command.route, suite(command)) for command in gpu_check.bench(options)}
    assert runs == {(r, s) for r in ("default", "persistent", "steps") for s in gpu_check.SUITES}
    log = tmp_path / "part.log"
    code = "import os; print('switch', os.environ['FASTRNN_CUDA_KERNELS'])"
    for route in gpu_check.ROUTES:
        command = python_command(gpu_check, route, code, route=route)
        assert gpu_check.run_command(command, log, 60.0) == (0, False)
    assert [line for line in log.read_text().splitlines() if line.startswith("switch")] == [
        "switch 0",
        "switch persistent",
        "switch 1",
    ]


def test_a_tool_or_module_that_is_not_there_is_a_failure(
    gpu_check: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(part: str, _: Any) -> list[Any]:
        needs = python_command(gpu_check, "a module", "", needs="no_such_module")
        return [gpu_check.Command("a tool", ("no-such-tool",)), needs] if part == "tests" else []

    monkeypatch.setattr(gpu_check, "commands", commands)
    monkeypatch.setattr(gpu_check, "device", lambda: "A device")
    assert gpu_check.check(replace(options, parts=("tests",))) == 1
    summary = (options.out / "summary.md").read_text()
    assert "| a tool | FAILED: no-such-tool is not on this machine |" in summary
    assert f"| a module | FAILED: {sys.executable} has no module no_such_module |" in summary


@pytest.mark.parametrize(("ratio", "rc"), [(0.96, 1), (0.98, 0)])
def test_a_default_route_slower_than_torch_is_a_failure(
    gpu_check: Any, options: Any, monkeypatch: pytest.MonkeyPatch, ratio: float, rc: int
) -> None:
    case = {"cell": "GRU", "dtype": "float32"}
    record = {"suite": "tiny", "case": case, "pass": "training", "provider": "fastrnn"}
    written = {
        "header": {"roof": {}, "complete": True},
        "records": [{**record, "ratio_to_best_peer": ratio}],
        "not_run": [],
    }
    code = f"import pathlib; pathlib.Path({str(options.out / 'b.json')!r}).write_text"
    command = python_command(
        gpu_check, "tiny", f"{code}({json.dumps(written)!r})", json="b.json", route="default"
    )
    monkeypatch.setattr(gpu_check, "commands", lambda part, _: [command])
    monkeypatch.setattr(gpu_check, "device", lambda: "A device")
    assert gpu_check.check(replace(options, parts=("bench",))) == rc
    assert ("tiny, training: 0.960" in (options.out / "summary.md").read_text()) == bool(rc)


@pytest.mark.virtual_device
def test_the_smallest_cases_reach_every_family_of_persistent_kernels() -> None:
    """On an H200: three cells, four operands, two passes, three ways of exchange."""
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from replaced_module import load;"
        "load(sys.argv[1]); import gpu_check as g;"
        "print(sum(len(set().union(*(f for *_, f in g.reaching(c, o, None))))"
        " for c in g.CELLS for o in g.OPERANDS))"
    )
    paths = [virtual_module(), ROOT / "tests", ROOT / "benchmarks"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "72\n", done.stderr


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_pytest_stops_at_the_first_error_that_cuda_does_not_recover_from(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    (tmp_path / "test_device.py").write_text(
        "import pytest, torch\n"
        "broken = []\n"
        "def synchronize():\n"
        "    if broken: raise RuntimeError('CUDA error: an illegal memory access\\nmore')\n"
        "torch.cuda.synchronize = synchronize\n"
        "torch.backends.cuda.is_built = lambda: True\n"
        "@pytest.fixture\n"
        "def cuda(): pass\n"
        "def test_wrong(cuda): raise AssertionError\n"
        "def test_breaks(cuda): broken.append(1); raise RuntimeError('CUDA error')\n"
        "def test_after(cuda): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *workers]
    done = subprocess.run(
        [*command, "-rA", "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lost = "CUDA is lost to this process after test_device.py::test_breaks: CUDA error: an illegal"
    assert lost in done.stdout, done.stdout + done.stderr
    assert "2 failed" in done.stdout
    assert "test_after" not in done.stdout


def test_a_part_that_fails_leaves_the_others_their_results(
    gpu_check: Any,
    options: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = {
        "cell": "LSTM", "T": 3, "B": 2, "I": 4, "H": 4, "layers": 1, "bidirectional": False,
        "dtype": "float32", "tf32": True,
    }  # fmt: skip
    record = {"suite": "tiny", "case": case, "pass": "training", "provider": "fastrnn"}
    written = {
        "header": {"roof": {}, "complete": True},
        "records": [{**record, "ratio_to_best_peer": ratio} for ratio in (4.0, 1.0)],
        "not_run": [{"provider": "torch", "reason": "torch.nn has no heads"}],
    }
    save = f"import pathlib; pathlib.Path({str(options.out / 'b.json')!r}).write_text"
    rows = [{"what": "exchange", "value": 1.5, "unit": "us a step"}]
    save_rows = f"import pathlib; pathlib.Path({str(options.out / 'l.json')!r}).write_text"

    def commands(part: str, _: Any) -> list[Any]:
        return {
            "tests": [python_command(gpu_check, "pytest", "raise SystemExit(3)")],
            "ladder": [
                python_command(
                    gpu_check, "exchange", f"{save_rows}({json.dumps(rows)!r})", json="l.json"
                )
            ],
            "bench": [
                python_command(
                    gpu_check,
                    "tiny",
                    f"{save}({json.dumps(written)!r})",
                    json="b.json",
                    route="steps",
                )
            ],
        }[part]

    monkeypatch.setattr(gpu_check, "commands", commands)
    monkeypatch.setattr(gpu_check, "device", lambda: "A device, 1.0, 1 MiB")
    chosen = replace(options, parts=("tests", "ladder", "bench"))
    assert gpu_check.check(chosen) == 1
    document = json.loads((options.out / "gpu-check.json").read_text())
    assert [(o["part"], o["rc"]) for o in document["outcomes"]] == [
        ("tests", 3), ("ladder", 0), ("bench", 0),
    ]  # fmt: skip
    assert document["records"] == [{**r, "route": "steps"} for r in written["records"]]
    assert document["ladder"] == {"exchange": rows}
    summary = (options.out / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "| tests | pytest | FAILED (3) in" in summary
    assert "| tiny | steps | tf32 | training | 2 | 2.00 | 1.00 | 0 |" in summary
    assert "exchange: 1.5 us a step" in summary
    assert "- torch: torch.nn has no heads" in summary


def test_the_suites_share_the_time_that_is_left(gpu_check: Any, options: Any) -> None:
    shares = [command.share for command in gpu_check.commands("bench", options)]
    left = 1.0
    for share in shares:
        assert left * share == pytest.approx(1.0 / len(shares))
        left -= left * share
