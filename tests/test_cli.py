"""The command line: help with examples, errors on stderr with exit code 2, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fastrnn
from fastrnn import _engine, cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastrnn.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("arguments", [[], ["info"], ["bench"]], ids=" ".join)
def test_help_shows_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, "--help"])
    assert done.value.code == 0
    assert "examples:\n  fastrnn " in capsys.readouterr().out


def test_info_json_parses_and_names_what_runs() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["fastrnn"] == fastrnn.__version__
    assert known["cpu"]["isa"] in known["cpu"]["isas"]
    assert known["routes"]["cuda"].startswith("composed torch operations (")
    assert known["cuda"]["devices"] is not None


def test_info_says_which_route_cuda_tensors_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def route() -> str:
        return str(fastrnn.info()["routes"]["cuda"])

    monkeypatch.setattr(_engine, "built_with_cuda", lambda: False)
    assert route() == "composed torch operations (this build has no CUDA kernels)"
    monkeypatch.setattr(_engine, "built_with_cuda", lambda: True)
    monkeypatch.delenv("FASTRNN_CUDA_KERNELS", raising=False)
    assert route().startswith("composed torch operations (FASTRNN_CUDA_KERNELS=1 turns on")
    monkeypatch.setenv("FASTRNN_CUDA_KERNELS", "1")
    assert route() == "engine CUDA, a launch for each step (FASTRNN_CUDA_KERNELS is set)"


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
    "no threads": (["bench", "--threads", "0"], "--threads: 0: expected a number above 0"),
    "nothing to compare": (["bench", "--compare", "nowhere.json"], "nowhere.json"),
    "no folder": (["bench", "--json", "nowhere/new.json"], "there is no folder"),
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
        pytest.skip("there is one")
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
