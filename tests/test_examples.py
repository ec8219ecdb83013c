"""The examples run, on little data, and say what they found."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Example = Callable[..., tuple[int, list[str]]]

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Example:
    """Runs one in this process, which has torch loaded; its exit code, and the lines it printed."""

    def run(name: str, *options: str, needs: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        for package in ("torch", "matplotlib", *needs):
            pytest.importorskip(package)
        picture = tmp_path / "new" / f"{name}.png"
        monkeypatch.chdir(EXAMPLES)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--output", str(picture)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(f"{name}.py", run_name="__main__")
        assert picture.read_bytes().startswith(b"\x89PNG")
        return end.value.code, capsys.readouterr().out.splitlines()  # type: ignore[return-value]

    return run


def test_digits_trains_alike_with_torch_and_fails_where_the_accuracy_is_too_low(
    example: Example,
) -> None:
    """Losses that differ would be said first."""
    code, lines = example("digits", "--epochs", "1", needs=("sklearn",))
    assert code == 1
    for layer in ("LSTM ", "GRU ", "LSTM, relu "):
        assert next(line for line in lines if line.startswith(layer)).endswith("too low")


def test_streaming_reads_digits_in_every_dtype_and_fails_where_the_accuracy_is_too_low(
    example: Example,
) -> None:
    code, lines = example("streaming", "--epochs", "4", needs=("sklearn",))
    assert code == 1
    rows = {line.split()[0]: line.split() for line in lines if line}
    accuracies = {
        name: float(rows[name][1].rstrip("%")) for name in ("float32", "bfloat16", "int8")
    }
    assert accuracies["float32"] > 60  # a tenth would be chance
    assert max(accuracies.values()) - min(accuracies.values()) < 5
    assert float(rows["bfloat16"][2]) < 0.1
    assert float(rows["int8"][2]) < 0.1
    assert all(rows[name][-2:] == ["too", "low"] for name in accuracies)


def test_gradient_flow_finds_what_it_says(example: Example) -> None:
    code, lines = example("gradient_flow", "--updates", "20", "--quick")
    assert code == 0
    found = [line.partition(";")[0] for line in lines if ";" in line]
    large = ["RNN, large weights: exploding", "RNN, large weights, clipped: exploding"]
    large.append("RNN, large weights, grad_clip: steady")
    assert found == ["RNN: vanishing", "LSTM: steady", *large]


@pytest.mark.parametrize(("processes", "epochs"), [(1, 1), (2, 2)])
def test_distributed_trains_as_one_process_does(
    processes: int, epochs: int, tmp_path: Path
) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    if not pytest.importorskip("torch.distributed").is_available():
        pytest.skip("this torch has no torch.distributed")
    picture = tmp_path / "curves.png"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    launcher = torchrun if processes > 1 else ()
    options = ("--epochs", str(epochs), "--output", str(picture))
    done = subprocess.run(
        [sys.executable, *launcher, "distributed.py", *options],
        cwd=EXAMPLES,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"processes: {processes}; process 0 holds" in done.stdout


@pytest.mark.parametrize(
    ("name", "options", "needs", "says"),
    [
        ("audio", ("--updates", "2"), (), "by the loudest tones alone"),
        ("cartpole", ("--updates", "1"), (), "times as fast as the loop"),
        ("cells", ("--epochs", "1"), ("statsmodels",), "both ways reach the same losses"),
        ("characters", ("--updates", "3"), (), "held-out perplexity"),
        ("dates", ("--updates", "2"), (), "completely correct dates"),
        ("private", ("--updates", "2"), ("sklearn",), "epsilon"),
        ("strips", ("--updates", "2"), ("sklearn",), "on strips of held-out images"),
        ("sunspots", ("--epochs", "1", "--networks", "1"), ("statsmodels",), "seasonal-naive"),
    ],
)
def test_an_example_runs(
    name: str, options: tuple[str, ...], needs: tuple[str, ...], says: str, example: Example
) -> None:
    code, lines = example(name, *options, "--quick", needs=needs)
    assert code == 0, lines
    assert says in " ".join(lines)
    assert any(line.startswith("What to see: ") for line in lines)
    assert lines[-1] == "ok"


def test_tagging_beats_the_most_frequent_tag_before_it_says_ok(example: Example) -> None:
    """Also in a quick run, in which every tag occurs or is said to be absent."""
    code, lines = example("tagging", "--epochs", "1", "--quick")
    assert (code, lines[-1]) == (0, "ok")
    found = next(line for line in lines if line.startswith("correct characters"))
    accuracy, baseline = map(float, re.findall(r"([\d.]+)%", found))
    assert accuracy > baseline
    assert "nan" not in " ".join(lines)


def test_a_cpp_process_runs_a_package_of_aotinductor(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler}")
    done = subprocess.run(
        [sys.executable, "inductor.py", "--output", str(tmp_path)],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")
