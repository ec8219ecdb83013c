"""Random data for the cases of cases.py in NumPy: the arrays of a call, and gradients to send back.

The tests of the reference, of the engine and, through stacks.py, of the torch routes share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrnn import reference
from fastrnn.reference import Options, States

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cases import Case

Array = npt.NDArray[np.float64]


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
    extras: dict[str, Any] = field(default_factory=dict)  # reset_hx, dropout_mask, zoneout_mask

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

    def run(self) -> reference.Result:
        """Forward of the reference."""
        more = {**self.rows, **self.extras}
        return reference.forward(self.options, self.input, self.hx, self.weights, **more)

    def solve(self) -> Solution:
        """Forward and backward of the reference."""
        result = self.run()
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
    d_reset: tuple[Any, ...] = ()  # where the problem has reset_hx

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
        for name, d_anew in zip("hc", self.d_reset, strict=False):
            out[f"d_reset_{name}"] = ("d_weight", d_anew)
        for k, d_weight in enumerate(self.d_weights):
            out[f"d_weights[{k}]"] = ("d_weight", d_weight)
        return out


def random_weights(
    options: Options, input_size: int, hidden_size: int, rng: np.random.Generator
) -> list[Array]:
    """Weights in the flat order, uniform in ±1/√H."""
    D = options.directions
    shapes: list[tuple[int, ...]] = []
    for layer in range(options.num_layers):
        width = D * (options.proj_size or hidden_size) if layer else input_size
        shapes += [*options.weight_shapes(width, hidden_size).values()] * D
    return [rng.uniform(-1, 1, shape) / np.sqrt(hidden_size) for shape in shapes]


def random_rows(layout: str, T: int, B: int, rng: np.random.Generator) -> dict[str, Array]:
    """Lengths include T and, from two rows on, 0; resets the first step of the first row.

    The sizes of packed batches, which are the shape of the data, are the same for every generator.
    """
    rows: dict[str, Any] = {}
    if layout == "packed":
        lengths = np.random.default_rng(B).integers(1, T + 1, B)
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
    extras: Sequence[str] = (),
    seed: int = 0,
) -> Problem:
    """A stack with data, in one of `cases.LAYOUTS`, and gradients of all its outputs.

    `extras` are some of `cases.EXTRAS`.
    """
    rng = np.random.default_rng(seed)
    cell = reference.CELLS[options.cell]
    D = options.directions
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
        random_extras(extras, L * D, where, len(states[0][0]), sizes, rng),
    )


def problem_of(case: Case, **changes: Any) -> Problem:
    """A random problem of a case; `changes` are arguments of `random_problem`."""
    return random_problem(case.options, **{"layout": case.layout, "extras": case.extras, **changes})


def random_extras(
    names: Sequence[str],
    groups: int,
    where: tuple[int, ...],
    rows: int,
    sizes: Sequence[int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Some of `cases.EXTRAS`, of `groups` layers and directions, as the reference takes them."""
    out: dict[str, Any] = {}
    if "reset_hx" in names:
        out["reset_hx"] = tuple(rng.normal(size=(groups, size)) for size in sizes)
    if "dropout" in names:
        out["dropout_mask"] = (rng.random((groups, rows, sizes[0])) < 0.6) / 0.6
    if "zoneout_h" in names or "zoneout_c" in names:
        out["zoneout_mask"] = tuple(
            rng.random((groups, *where, size)) < 0.3 if name in names else None
            for name, size in zip(("zoneout_h", "zoneout_c"), sizes, strict=False)
        )
    return out


def only(problem: Problem, b: int) -> Problem:
    """Row b of a padded problem, by itself, with the steps that its length gives it."""
    T = int(problem.rows["lengths"][b]) if "lengths" in problem.rows else problem.steps

    def cut(d: Any) -> Any:
        return None if d is None else d[..., :T, b : b + 1, :]

    def cut_state(s: Any) -> Any:
        return None if s is None else s[:, b : b + 1]

    rows = {"reset": problem.rows["reset"][:T, b : b + 1]} if "reset" in problem.rows else {}
    extras = dict(problem.extras)
    if "dropout_mask" in extras:
        extras["dropout_mask"] = cut_state(extras["dropout_mask"])
    if "zoneout_mask" in extras:
        extras["zoneout_mask"] = tuple(map(cut, extras["zoneout_mask"]))
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
        extras=extras,
    )
