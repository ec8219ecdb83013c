"""The reference's gradients against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tolerances import assert_close

if TYPE_CHECKING:
    from problems import Array, Problem


def loss(problem: Problem) -> float:
    """A scalar whose gradients are those that the problem sends back."""
    result = problem.run()
    d = problem.d
    outputs = [result.output, *result.hx_n, *result.states]
    gradients = [d.output, *(d.hx_n or ()), *(d.states or ())]
    return sum(
        float(np.sum(y * d_y)) for y, d_y in zip(outputs, gradients, strict=False) if y is not None
    )


def check_gradients(problem: Problem) -> None:
    """Each array's gradient, along one random direction, against a central difference."""
    rng = np.random.default_rng(1)
    solution = problem.solve()
    hx, anew = problem.hx or (), problem.extras.get("reset_hx", ())
    analytic = {
        "input": [solution.d_input],
        "hx": solution.d_hx,
        "weights": solution.d_weights,
        "reset_hx": solution.d_reset,
    }

    def along(array: Array, field: str, k: int = 0) -> tuple[float, float]:
        direction, step = rng.normal(size=array.shape), 1e-6
        up, down = (moved(problem, field, k, sign * step * direction) for sign in (1, -1))
        return (loss(up) - loss(down)) / (2 * step), float(np.sum(analytic[field][k] * direction))

    pairs = [along(problem.input, "input"), *(along(s, "hx", k) for k, s in enumerate(hx))]
    pairs += [along(s, "reset_hx", k) for k, s in enumerate(anew)]
    assert_close(*np.transpose(pairs), "finite differences", "d_input")
    pairs = [along(w, "weights", k) for k, w in enumerate(problem.weights)]
    assert_close(*np.transpose(pairs), "finite differences", "d_weight")


def moved(problem: Problem, field: str, k: int, step: Array) -> Problem:
    """The problem with the k-th array of a field moved by `step`."""
    if field == "input":
        return replace(problem, input=problem.input + step)
    arrays = list(problem.extras[field] if field == "reset_hx" else getattr(problem, field))
    arrays[k] = arrays[k] + step
    if field == "reset_hx":
        return replace(problem, extras={**problem.extras, field: tuple(arrays)})
    return replace(problem, **{field: tuple(arrays) if field == "hx" else arrays})
