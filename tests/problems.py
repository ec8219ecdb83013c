"""Random problems for the reference and the engine: a stack, its data, gradients to send back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import reference
from fastrnn.reference import Options, States

Array = npt.NDArray[np.float64]

LAYOUTS = ("padded", "lengths", "packed", "reset", "lengths and reset")


@dataclass(frozen=True)
class Gradients:
    """What flows back: into `output`, `hx_n` and, where wanted, every state."""

    output: Array | None
    hx_n: tuple[Array | None, ...] | None
    states: States | None = None


@dataclass(frozen=True)
class Problem:
    """One call, time-major; `rows` holds batch_sizes, lengths and reset where there are any."""

    options: Options
    input: Array
    hx: tuple[Array, ...] | None
    weights: list[Array]
    d: Gradients
    rows: dict[str, Array] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        return len(self.weights[0]) // reference.CELLS[self.options.cell].gates

    @property
    def steps(self) -> int:
        return len(self.rows.get("batch_sizes", self.input))

    @property
    def batch(self) -> int:
        if "batch_sizes" in self.rows:
            return int(self.rows["batch_sizes"][0])
        return self.input.shape[1]

    def solve(self) -> Solution:
        """Forward and backward of the reference."""
        result = reference.forward(self.options, self.input, self.hx, self.weights, **self.rows)
        back = reference.backward(result.saved, self.d.output, self.d.hx_n, d_states=self.d.states)
        return Solution(result.output, result.hx_n, result.states, *back)


@dataclass(frozen=True)
class Solution:
    """What a forward and a backward pass give."""

    output: Any
    hx_n: tuple[Any, ...]
    states: States
    d_input: Any
    d_hx: tuple[Any, ...]
    d_weights: list[Any]

    def named(self) -> dict[str, tuple[str, Any]]:
        """Every array by name, with the quantity that its tolerance goes by."""
        out: dict[str, tuple[str, Any]] = {
            "output": ("output", self.output),
            "states.h": ("output", self.states.h),
            "d_input": ("d_input", self.d_input),
        }
        if self.states.c is not None:
            out["states.c"] = ("output", self.states.c)
        for name, last, d_first in zip("hc", self.hx_n, self.d_hx, strict=False):
            out[f"{name}_n"] = ("output", last)
            out[f"d_{name}0"] = ("d_input", d_first)
        for k, d_weight in enumerate(self.d_weights):
            out[f"d_weights[{k}]"] = ("d_weight", d_weight)
        return out


def random_weights(
    options: Options, input_size: int, hidden_size: int, rng: np.random.Generator
) -> list[Array]:
    """Weights in the flat order, uniform in ±1/√H."""
    rows = reference.CELLS[options.cell].gates * hidden_size
    output_size = options.proj_size or hidden_size
    D = 2 if options.bidirectional else 1
    shapes: list[tuple[int, ...]] = []
    for layer in range(options.num_layers):
        for _ in range(D):
            shapes += [(rows, D * output_size if layer else input_size), (rows, output_size)]
            shapes += [(rows,)] * 2 if options.bias else []
            shapes += [(output_size, hidden_size)] if options.proj_size else []
    return [rng.uniform(-1, 1, shape) / np.sqrt(hidden_size) for shape in shapes]


def random_rows(layout: str, T: int, B: int, rng: np.random.Generator) -> dict[str, Array]:
    """Lengths include T and, from two rows on, 0; resets the first step of the first row."""
    rows: dict[str, Any] = {}
    if layout == "packed":
        lengths = np.sort(rng.integers(1, T + 1, B))
        lengths[-1:] = T
        rows["batch_sizes"] = (lengths > np.arange(T)[:, None]).sum(axis=1)
    if layout.startswith("lengths"):
        rows["lengths"] = rng.integers(0, T + 1, B)
        rows["lengths"][:2] = [T, 0][:B]
    if layout.endswith("reset"):
        rows["reset"] = rng.random((T, B)) < 0.3
        rows["reset"][0, :1] = True
    return rows


def random_problem(
    options: Options,
    *,
    T: int = 6,
    B: int = 5,
    input_size: int = 5,
    hidden_size: int = 19,
    layout: str = "padded",
    hx: bool = True,
    d_states: bool = False,
    seed: int = 0,
) -> Problem:
    """A stack with data, in one of `LAYOUTS`, and gradients for everything that it puts out."""
    rng = np.random.default_rng(seed)
    cell = reference.CELLS[options.cell]
    D = 2 if options.bidirectional else 1
    L, output_size = options.num_layers, options.proj_size or hidden_size
    rows = random_rows(layout, T, B, rng)
    where = (int(rows["batch_sizes"].sum()),) if layout == "packed" else (T, B)
    sizes = [output_size] + [hidden_size] * (cell.states - 1)
    states = [rng.normal(size=(L * D, B, size)) for size in sizes]
    gradients = Gradients(
        rng.normal(size=(*where, D * output_size)),
        tuple(rng.normal(size=s.shape) for s in states),
        States(*(rng.normal(size=(L, *where, D * size)) for size in sizes)) if d_states else None,
    )
    return Problem(
        options,
        rng.normal(size=(*where, input_size)),
        tuple(states) if hx else None,
        random_weights(options, input_size, hidden_size, rng),
        gradients,
        rows,
    )


def only(problem: Problem, b: int) -> Problem:
    """Row b of a padded problem, by itself, with the steps that its length gives it."""
    T = int(problem.rows["lengths"][b]) if "lengths" in problem.rows else problem.steps

    def cut(d: Any) -> Any:
        return None if d is None else d[..., :T, b : b + 1, :]

    def cut_state(s: Any) -> Any:
        return None if s is None else s[:, b : b + 1]

    rows = {"reset": problem.rows["reset"][:T, b : b + 1]} if "reset" in problem.rows else {}
    d = problem.d
    return replace(
        problem,
        input=cut(problem.input),
        hx=None if problem.hx is None else tuple(map(cut_state, problem.hx)),
        d=Gradients(
            cut(d.output),
            None if d.hx_n is None else tuple(map(cut_state, d.hx_n)),
            None if d.states is None else States(*map(cut, d.states)),
        ),
        rows=rows,
    )
