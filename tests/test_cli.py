"""The command line: help with examples, errors on stderr with exit code 2, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import fastrnn
from fastrnn import _C, _certificate, _engine, cli
from fastrnn.bench import cases, explain
from fastrnn.info import render

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastrnn.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("arguments", [[], ["info"], ["bench"], ["certify"]], ids=" ".join)
def test_help_shows_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, "--help"])
    assert done.value.code == 0
    assert "examples:\n  fastrnn " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"fastrnn {fastrnn.__version__}\n"


def test_info_json_parses_and_names_what_runs() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["fastrnn"] == fastrnn.__version__
    assert known["cpu"]["isa"] in known["cpu"]["isas"]
    assert known["routes"]["cuda"].startswith("cuDNN, through torch's own operator")
    assert known["cuda"]["devices"] is not None


def test_info_says_which_route_cuda_tensors_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def route() -> str:
        return str(fastrnn.info()["routes"]["cuda"])

    monkeypatch.setattr(_engine, "built_with_cuda", lambda: False)
    assert route() == "cuDNN, through torch's own operator (this build has no CUDA kernels)"
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    monkeypatch.delenv("FASTRNN_CUDA_KERNELS", raising=False)
    assert route() == (
        "cuDNN, through torch's own operator; the engine's kernels for cases that the device's "
        "certificate covers"
    )
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "0")
    assert route() == "cuDNN, through torch's own operator (FASTRNN_CUDA_KERNELS is 0)"
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "1")
    assert route() == "engine CUDA, one launch per step (FASTRNN_CUDA_KERNELS is 1)"
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "persistent")
    assert route().startswith("engine CUDA, one launch per sequence if there is a kernel for it")
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "yes")
    assert route() == "none: FASTRNN_CUDA_KERNELS: expected auto, 0, 1 or persistent, got 'yes'"


DEVICE = {"name": "NVIDIA H200", "capability": (9, 0)}


def test_info_says_in_which_state_certificates_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTRNN_CERTIFICATES", str(tmp_path))
    known = {"devices": [DEVICE, {**DEVICE, "name": "NVIDIA T4"}], "error": None, "driver": "13"}
    monkeypatch.setattr(_C, "cuda_info", lambda: known)
    (tmp_path / "nvidia-h200-sm-9-0.json").write_text("half a certifi")
    first, second = fastrnn.info()["cuda"]["certificates"].values()
    assert "nvidia-h200-sm-9-0.json is ignored: it is damaged" in first
    assert second == "no certificate of this device; `fastrnn certify` makes one"


@pytest.mark.parametrize(
    ("devices", "error", "expected"),
    [
        ([], "no driver", "build 13.0, runtime 13.0: no GPU found (no driver)"),
        ([DEVICE], None, "build 13.0, runtime 13.0, cuBLASLt 13: 1 GPU found"),
    ],
)
def test_info_says_whether_a_gpu_is_found(
    devices: list[Any], error: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = {"build": "13.0", "runtime": "13.0", "driver": None, "cublaslt": "cuBLASLt 13"}
    known = {**build, "devices": devices, "error": error}
    monkeypatch.setattr(_C, "cuda_info", lambda: known)
    assert f"cuda build    {expected}\n" in render(fastrnn.info())


def explained(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert cli.main(["info", "--json", "--explain", *arguments]) == 0
    known: dict[str, str] = json.loads(capsys.readouterr().out)
    return known


def test_explain_names_what_computes_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    known = explained("LSTM,64,50,512,256", "--dtype", "bfloat16", capsys=capsys)
    assert known["case"] == "LSTM T50 B64 I512 H256 bfloat16"
    assert known["device"] == "cpu"
    for pass_ in ("inference", "training"):
        assert known[pass_].startswith(f"engine {fastrnn.info()['cpu']['isa']}, at most ")
    assert cli.main(["info", "--explain", "LSTM,64,50,512,256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "case          LSTM T50 B64 I512 H256"


BY_TORCH = "cuDNN, through torch's own operator"
NO_CERTIFICATE = "no certificate of this device; `fastrnn certify` makes one"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    monkeypatch.setattr(_C, "cuda_info", lambda: {"devices": [DEVICE], "error": None})
    monkeypatch.setenv("FASTRNN_CERTIFICATES", str(tmp_path))
    monkeypatch.delenv("FASTRNN_CUDA_KERNELS", raising=False)
    _certificate.of_device.cache_clear()


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("LSTM,16,50,512,512", BY_TORCH),
        ("GRU T50 B16 I8 H8 L3 bi float64", BY_TORCH),
        ("GRU T65535 B1 I8 H8", BY_TORCH),
        ("GRU T65536 B1 I8 H8",
         "ATen, through torch's own operator: cuDNN takes fewer than 65536 steps"),
        ("RNN T50 B16 I8 H8 relu lengths", f"{BY_TORCH}, as packed episodes"),
        ("RNN T50 B16 I8 H8 reset0.1", f"{BY_TORCH}, as packed episodes"),
        ("LSTM T50 B16 I8 H8 heads2", "composed torch operations"),
    ],
)  # fmt: skip
def test_explain_names_what_computes_on_cuda_without_a_certificate(
    case: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = explained(case, "--device", "cuda", capsys=capsys)
    for pass_ in ("inference", "training"):
        assert known[pass_] == f"{expected} ({NO_CERTIFICATE})"
    assert known["certificate"] == NO_CERTIFICATE
    assert "on an H200" not in known


@pytest.mark.usefixtures("one_gpu")
def test_explain_names_the_certificate_and_what_it_lets_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = _certificate.Key(*"abcdefg")
    trusted = {
        "cell": "LSTM", "dtype": "tf32", "bidirectional": False, "pass": "inference",
        "kernels": "steps", "hidden": [512, 1024], "rows": [1, 16], "trusted": True, "steps": 1,
        "ratio": 1.25,
    }  # fmt: skip
    monkeypatch.setattr(_certificate, "key_of", lambda _: key)
    path = _certificate.write({"format": 1, "key": key._asdict(), "classes": [trusted]})
    case = ("LSTM,16,50,512,512", "--device", "cuda")
    known = explained(*case, "--dtype", "tf32", capsys=capsys)
    assert known["certificate"] == f"{path}: 1 class trusted"
    assert known["inference"] == (
        "engine CUDA, one launch per step (certified on this device, 1.25 times as fast as torch's)"
    )
    assert known["training"].startswith(f"{BY_TORCH} (the certificate of this device does not")
    assert explained(*case, capsys=capsys)["inference"] == known["training"]
    _certificate.of_device.cache_clear()


def test_explain_says_what_is_missing_on_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def training(case: str) -> str:
        return explained(case, "--device", "cuda", capsys=capsys)["training"]

    monkeypatch.setenv("FASTRNN_CERTIFICATES", str(tmp_path))
    monkeypatch.setattr(_C, "cuda_info", lambda: None)
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: False)
    assert training("GRU,4,5,6,7") == f"{BY_TORCH} (this build has no CUDA kernels)"
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    monkeypatch.setattr(_C, "cuda_info", lambda: {"devices": [], "error": "no driver"})
    assert training("GRU,4,5,6,7") == f"{BY_TORCH} (no CUDA device is here: no driver)"
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "1")
    assert training("GRU,4,5,6,7") == "no CUDA device is here (no driver)"
    reason = "(no CUDA kernel has layer norm and members)"
    assert (
        training("GRU T5 B4 I6 H8 heads4 layernorm members2")
        == f"composed torch operations {reason}"
    )


KERNELS = {False: (True, "ring, bfloat16"), True: (False, "more blocks than multiprocessors")}


def test_explain_names_the_persistent_kernel_of_each_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernels(options: object, dtype: str, *sizes: object) -> tuple[bool, str]:
        assert (dtype, sizes[:4], sizes[5]) == ("bfloat16", (5, 4, 6, 7), False)
        asked.append(sizes[6])
        return KERNELS[bool(sizes[4])]

    asked: list[object] = []
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "persistent")
    monkeypatch.setattr(_C, "cuda_kernels", kernels)
    monkeypatch.setattr(_C, "cuda_info", lambda: {"devices": [{}], "error": None})
    monkeypatch.setattr(explain, "_current_device", lambda: 3)
    case = ("LSTM,4,5,6,7", "--dtype", "bfloat16", "--device", "cuda")
    known = explained(*case, capsys=capsys)
    asked_for = "FASTRNN_CUDA_KERNELS is persistent"
    assert known["inference"] == (
        f"engine CUDA, one launch per sequence (ring, bfloat16), {asked_for}"
    )
    assert known["training"] == (
        "forward engine CUDA, one launch per sequence (ring, bfloat16); backward engine CUDA, "
        f"one launch per step (more blocks than multiprocessors), {asked_for}"
    )
    assert "on an H200" not in known
    assert asked == [3, 3, 3]
    monkeypatch.setattr(_C, "cuda_info", lambda: {"devices": [], "error": "no driver"})
    known = explained(*case, capsys=capsys)
    assert known["inference"] == "no CUDA device is here (no driver)"
    assert known["on an H200"].endswith("(by its data sheet, FASTRNN_CUDA_KERNELS=persistent)")
    assert asked[3:] == [None, None]


def test_explain_reads_every_case_as_bench_names_it() -> None:
    for suite in cases.load_suites().values():
        for case in suite:
            for precision in cases.PRECISIONS:
                chosen = explain.parse_case(case.label(), precision)
                assert explain.parse_case(chosen.label()) == chosen
                assert chosen.precision == precision
            assert explain.parse_case(case.label()) == case


@pytest.mark.parametrize(
    ("device", "dtype", "route"),
    [
        ("cpu", "float64", "a program of fastrnn.Recurrent"),
        ("cpu", "bfloat16", "a loop of torch operations, run by fastrnn.Recurrent"),
        ("cuda", "float32", "a loop of torch operations, run by fastrnn.Recurrent"),
    ],
)
def test_explain_tells_where_a_step_is_a_program(device: str, dtype: str, route: str) -> None:
    known = explain.explain(explain.parse_case("slstm,4,10,8,16", dtype), device)
    assert known["case"].startswith("sLSTM T10 B4 I8 H16")
    assert known["inference"] == known["training"]
    assert known["training"].endswith(route)


def test_info_is_a_function_of_the_package() -> None:
    known = fastrnn.info()
    assert known["numpy"] is not None
    assert json.loads(json.dumps(known)) == known


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_info_lists_the_engine_among_loaded_libraries() -> None:
    assert any(name.startswith("fastrnn/_C.") for name in fastrnn.info()["libraries"])


def test_info_as_text_has_one_line_for_each_fact() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    for fact in ("fastrnn", "torch", "cpu", "isa", "cuda build", "cuda tensors", "libraries"):
        assert f"\n{fact} " in "\n" + done.stdout


WRONG = {
    "no command": ([], "required"),
    "unknown suite": (["bench", "--suite", "slow"], "suite 'slow' is not known; there are: quick"),
    "unknown cell": (["bench", "--cell", "MLP"], "--cell 'MLP' is not known; there are: LSTM"),
    "unknown dtype": (["bench", "--dtype", "int8"], "--dtype 'int8' is not known"),
    "unknown pass": (["bench", "--pass", "sideways"], "--pass 'sideways' is not known"),
    "unknown peer": (["bench", "--against", "abacus"], "peer 'abacus' is not known; there are:"),
    "no case left": (["bench", "--suite", "fastrnns", "--cell", "GRU"], "no case left"),
    "no threads": (["bench", "--threads", "0"], "--threads: 0: expected a finite number above 0"),
    "half a thread": (["bench", "--threads", "1,x"], "argument --threads: "),
    "endless": (["bench", "--seconds", "inf"], "--seconds: inf: expected a finite number above 0"),
    "no name": (["bench", "--cell", ","], "--cell: ',': expected at least one name"),
    "nothing to compare": (["bench", "--compare", "nowhere.json"], "nowhere.json"),
    "explain nothing": (["info", "--explain", ""], "expected CELL,B,T,I,H"),
    "explain three sizes": (["info", "--explain", "GRU,1,2,3"], "expected CELL,B,T,I,H"),
    "explain a word": (["info", "--explain", "GRU,1,2,3,4x"], "'H4x' is not known"),
    "explain half a case": (["info", "--explain", "GRU T5 H8"], "B, I is missing"),
    "explain a cell": (["info", "--explain", "MLP,1,2,3,4"], "CELL is one of LSTM, GRU, RNN"),
    "explain int8": (["info", "--explain", "GRU,1,2,3,4", "--dtype", "i8"], "'i8' is not known"),
    "explain tf32": (
        ["info", "--explain", "GRU,1,2,3,4", "--dtype", "tf32"],
        "--dtype tf32 is only for CUDA devices; add --device cuda",
    ),
    "device alone": (
        ["info", "--device", "cuda"],
        "--device describes a case: use it with --explain CASE",
    ),
    "no folder": (["bench", "--json", "nowhere/new.json"], "there is no folder"),
    "a folder": (["bench", "--json", "."], ".: expected the name of a file, got a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_an_error_goes_to_stderr_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    with pytest.raises(SystemExit) as done:  # argparse's own way to end
        sys.exit(cli.main(arguments))
    captured = capsys.readouterr()
    assert done.value.code == 2
    assert message in captured.err
    assert captured.out == ""


def test_a_missing_peer_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda n: None if n == "onnxruntime" else find_spec(n))
    assert cli.main(["bench", "--against", "onnxruntime"]) == 2
    assert "onnxruntime is not installed; to install it: pip install" in capsys.readouterr().err


def test_a_missing_cuda_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device on this machine")
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_list_names_every_suite_and_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastrnn.cli import main; sys.exit(main(['bench', '--list']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "quick (12 cases)\n  LSTM T1 B1 I256 H256\n" in done.stdout
    assert "deepbench-training (53 cases)" in done.stdout
