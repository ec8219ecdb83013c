"""Without torch: the package imports, computes and trains with NumPy alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from programs import run_program

HOOK = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
import numpy as np
import fastrnn
"""


def run(code: str) -> str:
    """What ``code`` prints in an interpreter where torch cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HOOK + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_functions_equal_the_reference() -> None:
    run("""
        from fastrnn import functional, reference
        rng = np.random.default_rng(0)
        T, B, I, H, L = 7, 3, 5, 6, 2
        for cell, gates, states in (("RNN", 1, 1), ("LSTM", 4, 2), ("GRU", 3, 1)):
            shapes = []
            for layer in range(L):
                for _ in range(2):
                    n = gates * H
                    shapes += [(n, 2 * H if layer else I), (n, H), (n,), (n,)]
            weights = [rng.normal(size=shape) for shape in shapes]
            hx = tuple(rng.normal(size=(2 * L, B, H)) for _ in range(states))
            x = rng.normal(size=(T, B, I))
            steps = {"lengths": [4, 0, 7], "reset": rng.random((T, B)) < 0.3}
            options = reference.Options(cell, num_layers=L, bidirectional=True)
            expected = reference.forward(options, x, hx, weights, **steps)
            output, hx_n, saved = getattr(functional, cell.lower())(
                x, hx if states == 2 else hx[0], weights, num_layers=L, bidirectional=True,
                return_saved=True, **steps
            )
            np.testing.assert_allclose(output.numpy(), expected.output, rtol=1e-12, atol=1e-12)
            finals = hx_n if states == 2 else (hx_n,)
            for got, want in zip(finals, expected.hx_n, strict=True):
                np.testing.assert_allclose(np.asarray(got), want, rtol=1e-12, atol=1e-12)
            backward = getattr(functional, cell.lower() + "_backward")
            d_input, _, d_weights = backward(np.ones_like(expected.output), None, saved)
            want_input, _, want = reference.backward(expected.saved, np.ones(output.shape), None)
            np.testing.assert_allclose(d_input.numpy(), want_input, rtol=1e-10, atol=1e-10)
            for d, w in zip(d_weights, want, strict=True):
                np.testing.assert_allclose(d.numpy(), w, rtol=1e-10, atol=1e-10)
        assert "torch" not in sys.modules
    """)


def test_training_lowers_the_loss() -> None:
    printed = run("""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(6, 8, 3)).astype(np.float32)
        target = x.sum(axis=(0, 2))[:, None] / 6
        weights = [rng.normal(size=s).astype(np.float32) / 4 for s in [(16, 3), (16, 4)]]
        weights += [np.zeros(16, np.float32), np.zeros(16, np.float32)]
        readout = rng.normal(size=(4, 1)).astype(np.float32)
        losses = []
        for _ in range(60):
            output, (h_n, c_n), saved = fastrnn.functional.lstm(x, None, weights, return_saved=True)
            h = np.asarray(h_n)[0]
            d_y = 2 * (h @ readout - target) / len(target)
            losses.append(float(((h @ readout - target) ** 2).mean()))
            d_h_n = np.ascontiguousarray((d_y @ readout.T)[None], dtype=np.float32)
            _, _, d_weights = fastrnn.functional.lstm_backward(None, (d_h_n, None), saved)
            readout -= 0.3 * (h.T @ d_y)
            for weight, d in zip(weights, d_weights, strict=True):
                weight -= 0.3 * d.numpy()
        print(losses[-1] / losses[0])
    """)
    assert float(printed) < 0.2


def test_a_stream_equals_the_function() -> None:
    run("""
        rng = np.random.default_rng(0)
        shapes = {"RNN": (4, 4), "LSTM": (16, 16), "GRU": (12, 12)}
        for cell, (rows, biases) in shapes.items():
            sizes = [(rows, 3), (rows, 4), biases, biases]
            weights = [rng.normal(size=size).astype(np.float32) / 2 for size in sizes]
            x = rng.normal(size=(6, 2, 3)).astype(np.float32)
            expected = getattr(fastrnn.functional, cell.lower())(x, None, weights)[0].numpy()
            stream = fastrnn.Stream.from_weights(cell, weights, batch_size=2)
            int8 = fastrnn.Stream.from_weights(cell, weights, batch_size=2, dtype="int8")
            for x_t, y_t in zip(x, expected, strict=True):
                y = stream.step(x_t)
                assert type(y) is np.ndarray and np.array_equal(y, y_t)
                assert np.abs(int8.step(x_t) - y_t).max() < 0.05
            stream.reset([1])
            h = stream.state[0] if cell == "LSTM" else stream.state
            assert h.shape == (1, 2, 4) and h[:, 0].any() and not h[:, 1].any()
            stream.state = stream.state
            stream.refresh()
        assert "torch" not in sys.modules
    """)


def test_torch_is_named_where_it_is_needed() -> None:
    printed = run("""
        assert {"LSTM", "convert", "functional"} <= set(dir(fastrnn))
        without = []
        for name in dir(fastrnn):
            try:
                getattr(fastrnn, name)
                without.append(name)
            except ModuleNotFoundError as error:
                assert error.name == "torch" and f"fastrnn.{name} needs PyTorch" in str(error)
                if name == "LSTM":
                    print(error)
        assert {"functional", "Stream", "Tensor", "from_dlpack", "reference", "info"} <= {*without}
        assert not {"LSTM", "GRUCell", "nn", "convert", "patch_torch"} & {*without}
        try:
            from fastrnn import GRU
        except ImportError as error:
            print(error)
        try:
            fastrnn.nonsense
        except AttributeError as error:
            print(error)
    """)
    rest = (
        "needs PyTorch, which is not installed: pip install torch. Without PyTorch there are "
        "fastrnn's functional, Stream, Tensor, from_dlpack, reference and info"
    )
    assert printed.splitlines() == [
        f"fastrnn.LSTM {rest}",
        f"fastrnn.GRU {rest}",
        "module 'fastrnn' has no attribute 'nonsense'",
    ]


def test_dir_shows_public_names_alone() -> None:
    run("""
        names = dir(fastrnn)
        assert names == sorted({*fastrnn.__all__, "nn"}), names
        assert [name for name in names if name.startswith("_")] == ["__version__"]
    """)


def test_a_module_that_is_missing_besides_torch_is_named_itself() -> None:
    printed = run("""
        sys.modules["fastrnn._stream"] = None
        try:
            fastrnn.Stream
        except ModuleNotFoundError as error:
            print(error.name)
    """)
    assert printed == "fastrnn._stream\n"


def test_torch_is_imported_when_a_torch_name_is_first_used() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    code = """
        import sys, numpy, fastrnn
        one = numpy.ones((1, 1))
        fastrnn.functional.rnn(numpy.ones((3, 1, 1)), None, [one, one], bias=False)
        assert "torch" not in sys.modules
        assert fastrnn.LSTM.__name__ == "LSTM"
        assert "torch" in sys.modules
    """
    run_program(code)
