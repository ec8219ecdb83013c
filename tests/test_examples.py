"""The examples run, on little data, and say what they found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(
    name: str, *options: str, needs: tuple[str, ...] = (), launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    for package in ("torch", "matplotlib", *needs):
        pytest.importorskip(package)
    return subprocess.run(
        [sys.executable, *launcher, f"{name}.py", *options],
        cwd=EXAMPLES,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def output_of(done: subprocess.CompletedProcess[str], picture: Path) -> str:
    """What a run that did well has printed; its picture is there."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout


def test_digits_trains_alike_with_torch_and_with_fastrnn(tmp_path: Path) -> None:
    picture = tmp_path / "curves" / "digits.png"
    options = ("--epochs", "1", "--quick", "--output", str(picture))
    printed = output_of(run("digits", *options, needs=("sklearn",)), picture)
    for layer in ("LSTM ", "GRU ", "LSTM, relu "):
        row = next(line for line in printed.splitlines() if line.startswith(layer))
        assert row.endswith("ok")


def test_streaming_reads_digits_in_every_dtype(tmp_path: Path) -> None:
    picture = tmp_path / "streaming.png"
    options = ("--epochs", "4", "--quick", "--output", str(picture))
    printed = output_of(run("streaming", *options, needs=("sklearn",)), picture)
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    accuracies = {
        name: float(rows[name][1].rstrip("%")) for name in ("float32", "bfloat16", "int8")
    }
    assert accuracies["float32"] > 60  # a tenth would be chance
    assert max(accuracies.values()) - min(accuracies.values()) < 5
    assert float(rows["bfloat16"][2]) < 0.1
    assert float(rows["int8"][2]) < 0.1


@pytest.mark.parametrize("name", ["digits", "streaming"])
def test_an_example_fails_where_the_accuracy_is_too_low(name: str, tmp_path: Path) -> None:
    options = ("--epochs", "1", "--output", str(tmp_path / "a.png"))
    done = run(name, *options, needs=("sklearn",))
    assert done.returncode == 1
    assert "too low" in done.stdout


def test_gradient_flow_finds_what_it_says(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "flow.png"
    options = ("--updates", "20", "--quick", "--output", str(picture))
    printed = output_of(run("gradient_flow", *options), picture)
    found = [line.partition(";")[0] for line in printed.splitlines() if ";" in line]
    large = ["RNN, large weights: exploding", "RNN, large weights, clipped: exploding"]
    large.append("RNN, large weights, grad_clip: steady")
    assert found == ["RNN: vanishing", "LSTM: steady", *large]


@pytest.mark.parametrize("processes", [1, 2])
def test_distributed_trains_as_one_process_does(processes: int, tmp_path: Path) -> None:
    if not pytest.importorskip("torch.distributed").is_available():
        pytest.skip("this torch has no torch.distributed")
    picture = tmp_path / "curves.png"
    options = ("--epochs", "2", "--output", str(picture))
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    launcher = torchrun if processes > 1 else ()
    printed = output_of(
        run("distributed", *options, needs=("sklearn",), launcher=launcher), picture
    )
    assert f"processes: {processes}; process 0 holds" in printed


@pytest.mark.parametrize(
    ("name", "options", "needs", "says"),
    [
        ("cartpole", ("--updates", "1"), (), "times as fast as the loop"),
        ("cells", ("--epochs", "1"), ("statsmodels",), "Both reach the same losses"),
        ("characters", ("--updates", "3"), (), "held-out perplexity"),
        ("dates", ("--updates", "2"), (), "completely correct dates"),
        ("private", ("--updates", "2"), ("sklearn",), "epsilon"),
        ("strips", ("--updates", "2"), ("sklearn",), "on strips of held-out images"),
        ("sunspots", ("--epochs", "1", "--networks", "1"), ("statsmodels",), "seasonal-naive"),
        ("tagging", ("--epochs", "1"), (), "correct characters"),
    ],
)
def test_an_example_runs(
    name: str, options: tuple[str, ...], needs: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    picture = tmp_path / "new" / f"{name}.png"
    done = run(name, *options, "--quick", "--output", str(picture), needs=needs)
    printed = output_of(done, picture)
    assert says in printed
    assert printed.splitlines()[-1] == "ok"
