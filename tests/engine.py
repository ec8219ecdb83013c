"""The engine's one call per pass, `fastrnn._C`, on the problems of `problems.py`."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from fastrnn import _C
from fastrnn._engine import CUDA_SWITCH, NO_EXTRAS, Extras, engine_options
from fastrnn.calls import by_program
from fastrnn.calls.program_numpy import NumPyArrays
from fastrnn.reference import States
from problems import Gradients, Problem, Solution
from tolerances import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DTYPES = ("float32", "float64", "bfloat16", "float16")


def compute_dtype(dtype: str) -> str:
    """What the engine calculates in, and keeps c and the saved values in."""
    return "float64" if dtype == "float64" else "float32"


def engine_array(x: npt.ArrayLike, dtype: str) -> Any:
    """A NumPy array of the dtype; torch's, for bfloat16, which NumPy lacks."""
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch", reason="bfloat16 arrays are torch's")
        return torch.from_numpy(np.array(x, dtype=np.float64)).to(torch.bfloat16)
    return np.array(x, dtype=dtype)


def to_float64(x: Any) -> npt.NDArray[np.float64]:
    """The exact values of an `engine_array`, or of the engine's results."""
    x = numpy_or_same(x)
    return np.array(x if isinstance(x, np.ndarray) else x.double().cpu().numpy(), dtype=np.float64)


def rounded(problem: Problem, dtype: str) -> Problem:
    """The problem with all its values rounded to what the dtype can hold."""

    def storage(x: Any) -> Any:
        return None if x is None else to_float64(engine_array(x, dtype))

    def compute(x: Any) -> Any:
        return None if x is None else to_float64(engine_array(x, compute_dtype(dtype)))

    rounded_extras = dict(problem.extras)  # masks of zoneout stay as they are
    if "reset_hx" in rounded_extras:
        rounded_extras["reset_hx"] = tuple(map(storage, rounded_extras["reset_hx"]))
    if "dropout_mask" in rounded_extras:
        rounded_extras["dropout_mask"] = storage(rounded_extras["dropout_mask"])
    d = problem.d
    return replace(
        problem,
        input=storage(problem.input),
        hx=None if problem.hx is None else tuple(map(storage, problem.hx)),
        weights=list(map(storage, problem.weights)),
        extras=rounded_extras,
        d=Gradients(
            storage(d.output),
            None if d.hx_n is None else tuple(map(storage, d.hx_n)),
            None if d.states is None else States(storage(d.states.h), compute(d.states.c)),
        ),
    )


def same(x: Any) -> Any:
    return x


def tensor_or_none(x: Any) -> Any:
    """A NumPy array as torch's; anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


def numpy_or_same(x: Any) -> Any:
    """A ``fastrnn.Tensor`` as NumPy's or, of bfloat16, torch's array; anything else as it is."""
    if not isinstance(x, _C.Tensor):
        return x
    return x.torch() if x.dtype == "bfloat16" else x.numpy()


def on_device(device: Any) -> tuple[Callable[[Any], Any], tuple[Any, ...]]:
    """What brings arrays to a CUDA device, and what a call there is given besides."""
    import torch

    def workspace(size: int) -> Any:
        return torch.empty(size, dtype=torch.uint8, device=device)

    stream = torch.cuda.current_stream(device).cuda_stream
    work = (workspace, stream, False, os.environ.get(CUDA_SWITCH) == "persistent")
    return lambda x: torch.as_tensor(x).to(device), work


@contextmanager
def blank() -> Iterator[None]:
    """New arrays of the engine hold NaN, so that an element that it leaves unwritten shows."""
    before = _C.fill_new_arrays(0xFF)
    try:
        yield
    finally:
        _C.fill_new_arrays(before)


class EngineCall:
    """One problem in the engine's arrays.

    `arrange` may change the memory behind the arrays that the engine reads. On a CUDA `device` all
    arrays are torch's, there.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: str = "float32",
        *,
        threads: int = 1,
        arrange: Callable[[Any], Any] = same,
        device: Any = None,
    ) -> None:
        self.problem, self.dtype, self.threads = problem, dtype, threads
        self.options = engine_options(problem.options)
        self.place, self.work = same, None
        if device is not None:
            self.place, self.work = on_device(device)
        place = self.place
        self.storage = lambda x: None if x is None else arrange(place(engine_array(x, dtype)))
        self.compute = lambda x: (
            None if x is None else arrange(place(engine_array(x, compute_dtype(dtype))))
        )
        rows = problem.rows
        self.batch_sizes = (
            np.array(rows["batch_sizes"], np.int64) if "batch_sizes" in rows else None
        )
        self.lengths = place(np.array(rows["lengths"], np.int64)) if "lengths" in rows else None
        self.reset = arrange(place(np.array(rows["reset"], np.bool_))) if "reset" in rows else None

        self.L = problem.options.num_layers
        self.D = problem.options.directions
        self.H = problem.hidden_size
        self.O = problem.options.proj_size or self.H
        self.where = problem.input.shape[:-1]
        hx = problem.hx or (None,) * self.options.states
        self.read = (
            self.storage(problem.input),
            self.storage(hx[0]),
            self.storage(hx[1]) if self.options.states == 2 else None,
            [self.storage(w) for w in problem.weights],
            self.batch_sizes,
            self.lengths,
            self.reset,
        )
        self.extras = self._extras(arrange)
        own = Extras(*self.extras) if self.extras else NO_EXTRAS
        self.program: Any = None
        self.of_program: Callable[[Any], Any] = same
        if device is None and by_program.takes_backward(problem.options, own):
            self.program = self._program(own)
        self.forward_too = device is None and by_program.takes(problem.options, own)

    def _extras(self, arrange: Callable[[Any], Any]) -> tuple[Any, ...] | None:
        """`extras` of the engine: states after a reset and masks; None where there are none."""
        given = self.problem.extras
        if not given:
            return None
        anew = (*given.get("reset_hx", ()), None, None)[:2]
        keep = (*given.get("zoneout_mask", ()), None, None)[:2]
        keep = (None if k is None else arrange(np.array(k, np.bool_)) for k in keep)
        dropout = self.storage(given.get("dropout_mask"))
        return (*map(self.storage, anew), dropout, *keep)

    def _program(self, extras: Extras) -> by_program.Call:
        arrays: Any = NumPyArrays(self.dtype)
        if self.dtype == "bfloat16":
            from fastrnn.calls.program_torch import TorchArrays

            arrays = TorchArrays(self.read[0].dtype)
            self.of_program = tensor_or_none
            batch_sizes, lengths, reset = map(tensor_or_none, self.read[4:])
            extras = Extras(*map(tensor_or_none, extras))
            self.read = (*self.read[:4], batch_sizes, lengths, reset)
        arrays.threads = self.threads
        given = by_program.Given(*self.read, extras)
        return by_program.Call(arrays, self.problem.options, self.dtype, given)

    def blank(self, *shape: int, dtype: str = "") -> Any:
        return self.of_program(engine_array(np.full(shape, np.nan), dtype or self.dtype))

    def _blank_outputs(self, every: bool, save: bool) -> by_program.Outputs:
        """Arrays for a program to write, where it runs the forward pass."""
        options, compute = self.problem.options, compute_dtype(self.dtype)
        arguments = (*self.read, *(self.extras or NO_EXTRAS))
        keeps = save and not options.recompute
        shapes = by_program.shapes(options, arguments, self.problem.batch, every, keeps)
        dtypes = (*(self.dtype,) * 4, compute, compute)
        return by_program.Outputs(
            *(
                None if shape is None else self.blank(*shape, dtype=dtype)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            )
        )

    def forward(self, *, all_layers: bool = True, save: bool = True) -> None:
        """Leaves `output`, `h_n`, `c_n`, `hidden`, `cell` and `saved`, None where not asked for."""
        if self.forward_too:
            results = self._blank_outputs(all_layers or save, save)
            self.program.forward(results)
        else:
            made_again = self.program is not None
            flags = (all_layers or save, False) if made_again else (all_layers, save)
            resets = self.extras and self.extras[:2]
            call = _C.Call(self.options, *self.read, resets, self.threads)
            with blank():
                results = call.forward(*flags, False, self.work)
        self.output, self.h_n, self.c_n, self.hidden, self.cell, self.saved = results

    def backward(
        self, wanted: Callable[[str], bool] = lambda name: True, consume_saved: bool = False
    ) -> None:
        """Leaves `d_input`, `d_h0`, `d_c0`, `d_weights` and `d_reset`; None where `wanted(name)` is
        False, or there is nothing to differentiate by."""
        d = self.problem.d
        d_h_n, d_c_n = (*(d.hx_n or ()), None, None)[:2]
        cotangents = (
            self.storage(d.output),
            self.storage(d.states.h) if d.states else None,
            self.compute(d.states.c) if d.states else None,
            self.storage(d_h_n),
            self.storage(d_c_n),
        )
        weights = [f"d_weights[{k}]" for k in range(len(self.problem.weights))]
        names = ["d_input", "d_h0", "d_c0", *weights]
        self.d_reset = []
        if self.program is not None:
            found = self._by_program(names, cotangents, wanted)
        else:
            needs = tuple(map(wanted, names))
            saved = (self.hidden, self.cell, self.saved, *cotangents)
            flags = (needs, consume_saved, self.threads, False, self.work)
            with blank():
                found = _C.backward(self.options, *self.read, *saved, *flags)
        self.d_input, self.d_h0, self.d_c0, *self.d_weights = found

    def _by_program(
        self, names: list[str], cotangents: tuple[Any, ...], wanted: Callable[[str], bool]
    ) -> list[Any]:
        groups, B = self.L * self.D, self.problem.batch
        states = [(groups, B, self.O), (groups, B, self.H) if self.options.states == 2 else None]
        weights = [w.shape for w in self.problem.weights]
        shapes = [self.problem.input.shape, *states, *weights]
        found = [
            self.blank(*shape) if shape is not None and wanted(name) else None
            for name, shape in zip(names, shapes, strict=True)
        ]
        self.d_reset = [
            self.blank(*x.shape) if x is not None and wanted(name) else None
            for name, x in zip(("d_reset_h", "d_reset_c"), self.extras or (), strict=False)
        ]
        d_reset_h, d_reset_c = (*self.d_reset, None, None)[:2]
        saved = None if not self.forward_too else self.saved
        outputs = (None, None, None, self.hidden, self.cell, saved)
        self.program.backward(
            by_program.Outputs(*map(self.of_program, map(numpy_or_same, outputs))),
            by_program.Cotangents(*map(self.of_program, cotangents)),
            by_program.Gradients(*found[:3], d_reset_h, d_reset_c, found[3:]),
        )
        return found

    def solution(self) -> Solution:
        """What both passes gave, in float64."""
        two = self.options.states == 2
        hidden = to_float64(self.hidden)
        return Solution(
            hidden[-1],
            tuple(to_float64(s) for s in ((self.h_n, self.c_n) if two else (self.h_n,))),
            States(hidden, to_float64(self.cell) if two else None),
            to_float64(self.d_input),
            tuple(to_float64(s) for s in ((self.d_h0, self.d_c0) if two else (self.d_h0,))),
            [to_float64(w) for w in self.d_weights],
            tuple(to_float64(d) for d in self.d_reset if d is not None),
        )


def run_engine(
    problem: Problem,
    dtype: str = "float32",
    *,
    threads: int = 1,
    arrange: Callable[[Any], Any] = same,
    device: Any = None,
) -> Solution:
    """Forward and backward."""
    call = EngineCall(problem, dtype, threads=threads, arrange=arrange, device=device)
    call.forward()
    call.backward()
    return call.solution()


def check_against_reference(
    problem: Problem,
    dtype: str,
    *,
    threads: int = 1,
    arrange: Callable[[Any], Any] = same,
    device: Any = None,
    looser: float = 1.0,
) -> None:
    """Both passes of the engine agree with the reference on the same, rounded values.

    `looser` multiplies the tolerances, for sums that are longer than those of the other tests.
    """
    problem = rounded(problem, dtype)
    expected = problem.solve().named()
    actual = run_engine(problem, dtype, threads=threads, arrange=arrange, device=device).named()
    for name, (quantity, value) in expected.items():
        assert_close(actual[name][1], value, dtype, quantity, name, looser)


def assert_bitwise(actual: Any, expected: Any, name: str = "") -> None:
    """The same bits; NaN equals NaN."""
    np.testing.assert_array_equal(actual, expected, err_msg=name)
    numbers = ~np.isnan(np.asarray(expected))
    np.testing.assert_array_equal(
        np.signbit(actual)[numbers], np.signbit(expected)[numbers], err_msg=f"sign of {name}"
    )


def assert_solutions_bitwise(
    actual: Solution, expected: Solution, leave_out: Sequence[str] = ()
) -> None:
    got = actual.named()
    for name, (_, value) in expected.named().items():
        if not name.startswith(tuple(leave_out)):
            assert_bitwise(got[name][1], value, name)
