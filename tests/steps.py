"""A step run by a plain loop, by the engine, and by the package's own loop."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fastrnn.any_cell import scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def loop(step: Any, init: Any, xs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """The specification of `fastrnn.scan`, for at least one step."""
    steps = next(x for x in pytree.tree_leaves(xs) if x is not None).shape[0]
    carry, ys = init, []
    for t in reversed(range(steps)) if reverse else range(steps):
        carry, y = step(carry, mapped(lambda x: x[t], xs))  # noqa: B023
        ys.append(y)
    return carry, mapped(lambda *y: torch.stack(y), *(reversed(ys) if reverse else ys))


def mapped(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of the leaves of like structures; None stays None."""
    return pytree.tree_map(lambda *v: None if v[0] is None else function(*v), *values)


@contextmanager
def by_loop() -> Iterator[None]:
    """Inside, every step runs as the package's loop of torch operations."""
    routed = scan.program.routed
    scan.program.routed = lambda *_: None
    try:
        yield
    finally:
        scan.program.routed = routed


@contextmanager
def by_engine() -> Iterator[None]:
    """Inside, a step that does not run on the engine is an error."""
    routed = scan.program.routed

    def checked(*call: Any) -> Any:
        result = routed(*call)
        assert isinstance(result, tuple), f"the loop would run: {result and result.reason}"
        return result

    scan.program.routed = checked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        scan.program.routed = routed


def gradients_of(outputs: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum of all outputs, each weighted by other numbers."""
    leaves = [
        o for o in pytree.tree_leaves(outputs) if torch.is_tensor(o) and o.is_floating_point()
    ]
    generator = torch.Generator().manual_seed(1)
    weighted = [
        (o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in leaves
    ]
    total = sum(w for w in weighted if w.requires_grad)
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def both_ways(
    step: Any, init: Any, xs: Any, weights: Sequence[torch.Tensor] = (), **options: Any
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Outputs and gradients of init, xs and weights, by the engine and by the loop."""
    results = []
    for way in (by_engine, by_loop):
        given_init, given_xs = pytree.tree_map(
            lambda t: t.clone().requires_grad_(t.is_floating_point()), (init, xs)
        )
        with way():
            outputs = scan.scan(step, given_init, given_xs, **options)
        inputs = [
            t for t in pytree.tree_leaves((given_init, given_xs, list(weights))) if t.requires_grad
        ]
        results.append((outputs, gradients_of(outputs, inputs)))
    return results[0], results[1]


def assert_both_ways(step: Any, init: Any, xs: Any, weights: Any = (), **options: Any) -> None:
    """The engine gives what the loop gives, forward and backward."""
    tolerance = {k: options.pop(k) for k in ("rtol", "atol") if k in options}
    (ours, d_ours), (theirs, d_theirs) = both_ways(step, init, xs, weights, **options)
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(d_ours, d_theirs, **tolerance)
