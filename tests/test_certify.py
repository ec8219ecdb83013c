"""`fastrnn certify`: trusts what is right and faster; what is wrong, hangs or dies is a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from fastrnn import _C, _certificate, _engine, certify, cli
from fastrnn._engine import cuda_route
from fastrnn._options import Options
from fastrnn.bench import cases
from fastrnn.certify import plan, table, watch
from replaced_module import virtual_module

if TYPE_CHECKING:
    from collections.abc import Callable

CHILD = Path(__file__).with_name("virtual_certify.py")
TINY = certify.Grid(
    stacks=((1, False),),
    dtypes=("float32",),
    hidden=((6, 9),),
    rows=((1, 2),),
    steps=3,
    measured_seconds=0.001,
)
FAULTS = {
    "LSTM inference steps": "wrong",
    "LSTM training persistent": "hang",
    "LSTM training steps": "late",
    "GRU inference persistent": "abort",
    "GRU inference steps": "error",
    "GRU training steps": "kill",
    "RNN inference steps": "sticky",
    "RNN training persistent": "restless",
    "RNN training steps": "slow",
}


def command(faults: dict[str, str] | None = None) -> tuple[str, ...]:
    """What runs on the virtual device, in the child's place."""
    module = virtual_module()
    return sys.executable, str(CHILD), str(module), json.dumps(faults or {})


def virtual_run(faults: dict[str, str] | None = None, **options: Any) -> Callable[..., Any]:
    return partial(certify.run, child=command(faults), **options)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this test's certificates go."""
    monkeypatch.setenv(_certificate.FOLDER_VARIABLE, str(tmp_path / "certificates"))
    monkeypatch.setenv("FASTRNN_CUBLASLT", "none")
    monkeypatch.delenv(_engine.CUDA_SWITCH, raising=False)
    return tmp_path / "certificates"


# ---- faults --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> dict[str, Any]:
    """The report of a device on which nine of twelve kernels have a fault each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRNN_CUBLASLT", "none")
        document: dict[str, Any] = virtual_run(FAULTS, trial_seconds=10)("cuda:0", TINY)
    return document


def entry(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (
        entry
        for entry in document["classes"]
        if f"{entry['cell']} {entry['pass']} {entry['kernels']}" == name
    )
    return dict(found)


@pytest.mark.virtual_device
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LSTM inference steps", "wrong: h_n differs from torch's by "),
        ("LSTM training persistent", "hung: no answer in 10 s"),
        ("LSTM training steps", "error: the device was unusable afterwards"),
        ("GRU inference persistent", f"died (signal {int(signal.SIGABRT)}): the kernel aborts"),
        ("GRU inference steps", "error: out of memory"),
        ("GRU training steps", f"died (signal {int(signal.SIGKILL)})"),
        ("RNN inference steps", "error: CUDA error: an illegal memory access was encountered"),
        ("RNN training persistent", "not repeatable: h_n has other bits in the second run"),
        ("RNN training steps", "right, but only 0.50 times as fast as torch's"),
    ],
)
def test_a_faulty_kernel_is_a_line_and_not_trusted(
    faulty: dict[str, Any], name: str, why: str
) -> None:
    found = entry(faulty, name)
    assert not found["trusted"]
    assert found["why"].startswith(f"{name.split(maxsplit=1)[0]} T3 B1 I6 H6: {why}")


@pytest.mark.virtual_device
def test_the_kernels_without_a_fault_are_trusted_all_the_same(faulty: dict[str, Any]) -> None:
    names = {f"{e['cell']} {e['pass']} {e['kernels']}" for e in faulty["classes"] if e["trusted"]}
    assert names == {
        "LSTM inference persistent",
        "GRU training persistent",
        "RNN inference persistent",
    }
    assert faulty["complete"]


@pytest.mark.virtual_device
def test_of_a_refused_class_no_more_is_run(faulty: dict[str, Any]) -> None:
    runs = [case for case in faulty["cases"] if case["case"].startswith("GRU")]
    assert sum(case["pass"] == "training" and case["kernels"] == "steps" for case in runs) == 1
    assert sum(case["pass"] == "training" and case["kernels"] == "persistent" for case in runs) == 7


@pytest.mark.virtual_device
def test_the_table_says_of_each_class_what_was_found(faulty: dict[str, Any]) -> None:
    lines = table.render(faulty).splitlines()
    start = "float32 one layer"
    assert [line.split() for line in lines[:7]] == [
        "class steps persistent runs now".split(),
        f"LSTM {start} inference H 6–9 B 1–2 wrong right, same bits, 2.00× persistent".split(),
        f"LSTM {start} training H 6–9 B 1–2 error hung torch's own operator".split(),
        f"GRU {start} inference H 6–9 B 1–2 error died torch's own operator".split(),
        f"GRU {start} training H 6–9 B 1–2 died right, same bits, 2.00× persistent".split(),
        f"RNN {start} inference H 6–9 B 1–2 error right, same bits, 2.00× persistent".split(),
        f"RNN {start} training H 6–9 B 1–2 slower not repeatable torch's own operator".split(),
    ]
    assert lines[7] == ""
    assert len(lines[8:]) == 8
    assert any(line.startswith("training persistent: LSTM T3 B1 I6 H6: hung") for line in lines[8:])


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def on_virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastrnn certify` runs on the virtual device, and on little."""
    grid = replace(TINY, cells=("GRU",), passes=("training",), dtypes=("bfloat16",))
    monkeypatch.setattr(certify, "QUICK", grid)
    monkeypatch.setattr(certify, "run", virtual_run())


@pytest.mark.virtual_device
@pytest.mark.usefixtures("on_virtual")
def test_certify_writes_what_the_route_then_takes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["certify", "--quick"]) == 0
    captured = capsys.readouterr()
    (path,) = folder.iterdir()
    assert f"The certificate is {path}. 2 of 2 classes are trusted" in captured.out
    assert "[2/2] GRU bfloat16 one layer training H 6–9 B 1–2 steps" in captured.err

    document = json.loads(path.read_text())
    monkeypatch.setattr(_certificate, "key_of", lambda _: _certificate.Key(**document["key"]))
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    _certificate.of_device.cache_clear()
    assert cuda_route(Options("GRU"), "bfloat16", 2, 8, True, 0, 1).kernels
    assert not cuda_route(Options("GRU"), "bfloat16", 2, 8, False, 0, 1).kernels
    _certificate.of_device.cache_clear()


@pytest.mark.virtual_device
@pytest.mark.usefixtures("on_virtual")
def test_two_layers_in_both_directions_are_run_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = replace(certify.QUICK, stacks=((2, True),), kernels=("steps",))
    (found,) = certify.run("cuda:0", grid)["classes"]
    assert found["trusted"], found["why"]


@pytest.mark.virtual_device
@pytest.mark.usefixtures("on_virtual")
@pytest.mark.parametrize("to", ["stdout", "a file"])
def test_the_report_can_be_sent_in(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    assert cli.main(["certify", "--quick", "--json", *([str(file)] if to == "a file" else [])]) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text() if to == "a file" else out)
    assert report["key"]["device"] == "virtual device"
    assert {case["found"] for case in report["cases"]} == {"right"}
    assert {case["kernel"] for case in report["cases"]} == {"virtual steps", "virtual persistent"}


@pytest.mark.virtual_device
@pytest.mark.usefixtures("on_virtual")
def test_a_device_that_is_not_there_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["certify", "--quick", "--device", "cuda:3"]) == 2
    assert "error: --device cuda:3: there is one virtual device" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.virtual_device
def test_ctrl_c_leaves_no_child_and_no_certificate(folder: Path, tmp_path: Path) -> None:
    virtual_module()  # or a skip: the program below could only fail
    program = tmp_path / "certify_a_hanging_kernel.py"
    program.write_text(
        "import signal, sys\n"
        # Whoever runs the tests in the background may have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(CHILD.parent)!r})\n"
        "import test_certify as tests\n"
        "from fastrnn import certify, cli\n"
        "certify.QUICK = tests.TINY\n"
        "certify.run = tests.virtual_run({'LSTM inference persistent': 'hang'})\n"
        "sys.exit(cli.main(['certify', '--quick']))\n"
    )
    process = subprocess.Popen([sys.executable, program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("[1/12] LSTM")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc to find the child by")
    (child,) = children.read_text().split()
    process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.wait(60) == 130
    assert not Path(f"/proc/{child}").exists()
    assert list(folder.iterdir()) == []


# ---- without any device --------------------------------------------------------------------------


def test_without_a_gpu_certify_says_what_is_needed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device on this machine")
    assert cli.main(["certify"]) == 2
    error = capsys.readouterr().err
    assert ("sees no such CUDA device" in error) or ("has no CUDA kernels" in error)
    assert list(folder.iterdir()) == []


def test_without_torch_certify_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert cli.main(["certify"]) == 2
    assert "torch is not installed; to install it: pip install torch" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_named_before_anything_runs(
    trouble: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("read-only file system")

    if trouble == "a file":
        folder.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(certify, "run", lambda *_: pytest.fail("it ran"))
    assert cli.main(["certify"]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: certificates cannot be written there" in error
    assert "set FASTRNN_CERTIFICATES to a folder that can be written to" in error


@pytest.mark.parametrize("device", ["cpu", "cuda:", "cuda:x", "gpu"])
def test_a_device_of_another_kind_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["certify", "--device", device])
    assert done.value.code == 2
    assert f"{device!r}: expected cuda or cuda:N" in capsys.readouterr().err


def answers(program: str) -> tuple[str, ...]:
    """A child that runs ``program``, in which `say` writes an answer."""
    say = "import json, sys, time\ndef say(**x): print(json.dumps(x), flush=True)\n"
    return sys.executable, "-c", say + program


KEY = dict.fromkeys(_certificate.Key._fields, "x")
READY = f"say(key={KEY})\n"
ONE = replace(TINY, cells=("GRU",), passes=("training",), kernels=("steps",))
EACH = "for line in sys.stdin: say(found='right', sound=True, kernel='', ms=[[1, 2], [3, 6]])"


@pytest.mark.parametrize(
    ("environment", "seconds", "said"),
    [
        ({}, 60, "all other calls use torch's own operator."),
        ({_engine.CUDA_SWITCH: "0"}, 60, "FASTRNN_CUDA_KERNELS=0 overrides the certificate."),
        ({}, -1, "The time limit ended the run before all classes were tested."),
    ],
)
def test_certify_ends_with_what_runs_from_now_on(
    environment: dict[str, str],
    seconds: float,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(certify, "QUICK", replace(ONE, seconds=seconds))
    monkeypatch.setattr(certify, "run", partial(certify.run, child=answers(READY + EACH)))
    assert cli.main(["certify", "--quick"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"The certificate is {folder / 'x-sm-x.json'}. ")
    assert last.endswith(said)


def test_what_time_does_not_suffice_for_is_not_trusted() -> None:
    report = certify.run(grid=replace(ONE, seconds=-1), child=answers(READY + EACH))
    (found,) = report["classes"]
    assert not found["trusted"]
    assert found["why"].endswith("not run: out of time")
    assert report["complete"] is False
    assert "not run" in table.render(report)


def test_a_class_is_as_fast_as_its_slowest_case() -> None:
    program = READY + (
        "for n, line in enumerate(sys.stdin):\n"
        "    say(found='right', sound=True, ms=[[1, 2], [3, 9 - n / 2]])"
    )
    (found,) = certify.run(grid=ONE, child=answers(program))["classes"]
    assert found["ratio"] == pytest.approx((9 - 6 / 2) / 3)


def test_a_class_is_trusted_from_the_latest_of_its_cases_on() -> None:
    program = READY + (
        "for n, line in enumerate(sys.stdin):\n"
        "    say(found='right', sound=True, ms=[[9 if n == 2 else 1, 2], [30, 90]])"
    )
    grid = replace(ONE, steps=100)
    (found,) = certify.run(grid=grid, child=answers(program))["classes"]
    assert found["trusted"]
    assert 1 < found["steps"] < 100


def test_a_child_that_does_not_start_is_an_error() -> None:
    with pytest.raises(certify.CertifyError, match=r"died \(exit code 3\): no libcudart"):
        certify.run(grid=ONE, child=answers("print('no libcudart', file=sys.stderr); sys.exit(3)"))


def test_the_watchdog_kills_what_the_child_started(tmp_path: Path) -> None:
    file = tmp_path / "grandchild"
    program = (
        "import subprocess\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e6)'])\n"
        f"open({str(file)!r}, 'w').write(str(p.pid))\n" + READY + "time.sleep(1e6)"
    )
    if sys.platform == "win32":
        pytest.skip("there are no process groups")
    report = certify.run(grid=ONE, child=answers(program), trial_seconds=0.2)
    assert report["classes"][0]["why"].endswith("hung: no answer in 0.2 s")
    deadline = time.monotonic() + 20
    while _is_alive(int(file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(int(file.read_text()))


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc").exists()
    return state != "Z"


def test_a_child_that_does_not_start_again_is_a_line(tmp_path: Path) -> None:
    """The device is lost: what is left is not trusted, and what was found is kept."""
    grid = replace(ONE, kernels=("steps", "persistent"))
    program = (
        f"import os\nif os.path.exists({str(tmp_path / 'once')!r}): sys.exit(4)\n"
        f"open({str(tmp_path / 'once')!r}, 'w')\n" + READY + "sys.stdin.readline(); os.abort()"
    )
    first, second = certify.run(grid=grid, child=answers(program))["classes"]
    assert "died (signal" in first["why"]
    assert "died (exit code 4)" in second["why"]


def test_a_child_that_says_nonsense_is_a_line() -> None:
    program = READY + "for line in sys.stdin: print('Segmentation fault', flush=True)"
    (found,) = certify.run(grid=ONE, child=answers(program))["classes"]
    assert not found["trusted"]
    assert "no answer: 'Segmentation fault'" in found["why"]


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [certify.QUICK, certify.WHOLE])
def test_every_class_has_both_ends_of_h_at_both_ends_of_b(grid: certify.Grid) -> None:
    for found, trials in certify.plan(grid).items():
        sizes = {(t.case.H, t.case.B) for t in trials}
        assert {(h, b) for h in found.hidden for b in found.rows} <= sizes
        assert {t.case.cell for t in trials} == {found.cell}
        assert {t.case.precision for t in trials} == {found.dtype}
        assert {t.kernels for t in trials} == {found.kernels}
        assert {t.pass_ for t in trials} == {found.pass_}
        assert any(t.case.H % 2 and t.case.B % 2 and not t.case.options for t in trials)
        assert {name for t in trials for name in t.case.options} == {"lengths", "resets"}


def test_what_is_quick_is_a_part_of_the_whole() -> None:
    quick, whole = certify.plan(certify.QUICK), certify.plan(certify.WHOLE)
    assert {c: set(t) for c, t in quick.items()} == {c: set(whole[c]) for c in quick}


def test_an_rnn_computes_relu_in_its_odd_case() -> None:
    for found, trials in certify.plan(certify.WHOLE).items():
        relu = [t for t in trials if t.case.nonlinearity == "relu"]
        assert len(relu) == (found.cell == "RNN")


def test_a_certificate_covers_every_class_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class and route name things alike."""
    key = _certificate.Key(*"abcdefg")
    monkeypatch.setattr(_certificate, "key_of", lambda _: key)
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    verdict = {"trusted": True, "steps": 1, "ratio": 2.0, "why": ""}
    for found, trials in list(certify.plan(certify.WHOLE).items())[::37]:
        entries = [found.as_record() | verdict]
        _certificate.write({"format": 1, "key": key._asdict(), "classes": entries})
        for trial in trials:
            case = trial.case
            stack = replace(case.stack, activation=case.nonlinearity)
            training = trial.pass_ == "training"
            sizes = (case.B, case.H, training, 0, 1)
            if not case.options or _within(found, case):
                assert cuda_route(stack, case.precision, *sizes).kernels, trial.label()
    _certificate.of_device.cache_clear()


def _within(found: plan.Class, case: Any) -> bool:
    (h, h_last), (b, b_last) = found.hidden, found.rows
    return h <= case.H <= h_last and b <= case.B <= b_last


def test_the_child_uses_the_switch_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrnn.bench.prepare import Prepared
    from fastrnn.certify.device import SWITCH_OF, switched

    seen = []

    def note(*_: Any) -> dict[str, Any]:
        seen.append(os.environ.get(_engine.CUDA_SWITCH))
        return {}

    def prepare() -> Prepared:
        note()
        return Prepared(note, note)

    assert set(SWITCH_OF) == set(_certificate.KERNELS)
    prepared = switched(SWITCH_OF["persistent"], prepare)
    prepared.results()
    with prepared.context():
        prepared.run(0)
    assert seen == ["persistent"] * 3
    assert _engine.CUDA_SWITCH not in os.environ


@pytest.mark.parametrize("options", [{}, {"lengths": True}, {"reset_rate": 0.3}], ids=str)
@pytest.mark.parametrize("pass_", cases.PASSES)
def test_the_two_of_a_pair_compute_the_same(
    options: dict[str, Any], pass_: cases.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but that tensors and clock are the CPU's."""
    from fastrnn.bench import data, timing
    from fastrnn.certify import child, device

    monkeypatch.setattr(device, "make_data", lambda case, _: data.make_data(case, "cpu"))
    gpu = device.Cuda.__new__(device.Cuda)
    gpu.number, gpu.clock = 0, timing.HostClock()
    case = cases.Case("LSTM", 4, 3, 5, 6, **options)
    asked = {"case": case.as_record(), "pass": pass_, "kernels": "steps"}
    found = child.attempt(gpu, {**asked, "steps": [1, 4], "seconds": 0.001})
    assert found["found"] == "right"
    assert [len(pair) for pair in found["ms"]] == [2, 2]
    assert found["kernel"].startswith("engine ")


def test_a_build_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrnn.certify import device

    monkeypatch.setattr(device, "built_with_cuda", lambda: False)
    with pytest.raises(device.RefusedError, match="no CUDA kernels to certify"):
        device.Cuda("cuda:0")


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fastrnn.certify import device

    monkeypatch.setattr(device, "built_with_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_C, "cuda_info", lambda: {"error": "no driver", "devices": []})
    with pytest.raises(
        device.RefusedError, match=r"cuda:1: .*sees no such CUDA device \(no driver"
    ):
        device.Cuda("cuda:1")


def test_a_late_answer_is_lost() -> None:
    child = watch.Child(answers("time.sleep(1e6)"))
    try:
        with pytest.raises(watch.LostError, match=r"hung: no answer in 0\.1 s"):
            child.answer(0.1)
    finally:
        child.kill()
