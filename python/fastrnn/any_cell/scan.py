"""`scan`: any step over a sequence, with nested values, checks, lengths and resets.

Everything below `scan` works on flat lists of tensors, the leaves of nested tuples, lists and
dicts; a `Tree` stores how they are nested. Lengths and resets are operations around the step
(`_held`, `_restarted`), so they run on every route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _checks
from .._options import check_bool
from ..program import api as program

Leaves = list[Tensor]
# A step on leaves: (carry, x) -> (carry, y).
FlatStep = Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    *,
    reverse: bool = False,
    lengths: _checks.Lengths | None = None,
    reset: Tensor | None = None,
) -> tuple[Any, Any]:
    """Run a step over a sequence: ``carry, y = step(carry, x)`` for each x of xs.

    The signature is that of ``jax.lax.scan``. T stands for steps, B for batch. ``init``, ``xs``,
    ``carry`` and ``y`` are tensors or nested tuples, lists, named tuples and dicts of them, in
    which a leaf may be None. Gradients flow to init, to xs and to every tensor that the step uses,
    such as the parameters of a module.

    Arguments:
        step: takes the carry and one step of xs; returns the next carry, nested like ``init`` with
            the same shapes, dtypes and devices, and y, nested alike at every step.
        init: the carry before the first step.
        xs: the inputs; every tensor has T first.
        reverse: whether to go from the last step to the first; ys stay in the order of xs.
        lengths: integers (B,), each 0…T: the number of valid steps of each sequence. Past a length
            the carry does not change, ys are 0, xs may hold any value and get no gradient; with
            ``reverse`` a sequence starts at its last valid step.
        reset: bool (T, B). True: a new episode begins at this step, with ``init`` as the carry; no
            carry and no gradient crosses the boundary of episodes, in both directions.

    With ``lengths`` or ``reset`` the batch is the first axis of every tensor of carry and y, and
    the second axis of every tensor of xs.

    Returns:
        ``carry, ys``: the carry after the last step, and the y of all steps, each tensor with T
        first. With T = 0 ``carry`` is ``init`` and the tensors of ys are empty.

    Raises:
        TypeError: step is not callable or does not return a pair; a leaf is neither a tensor nor
            None; the carry or y changes its structure; lengths are not integers or reset is not a
            bool tensor.
        ValueError: xs hold no tensor, or tensors with different T; the carry or y changes its
            shape, dtype or device; lengths or reset do not fit.

    >>> import torch
    >>> def step(total, x):
    ...     total = total + x
    ...     return total, {"sum": total, "positive": total > 0}
    >>> total, ys = scan(step, torch.zeros(()), torch.tensor([1.0, -3.0, 4.0]))
    >>> total
    tensor(2.)
    >>> ys["sum"], ys["positive"]
    (tensor([ 1., -2.,  2.]), tensor([ True, False,  True]))
    """
    check_step(step)
    check_bool("reverse", reverse)
    carry_tree, x_tree = Tree("init", init), Tree("xs", xs)
    steps = count_steps(x_tree)
    valid, fresh = _masks(carry_tree, x_tree, reverse, lengths, reset)
    mask = valid if valid is not None else fresh
    calls = Calls(step, carry_tree, x_tree, rows=None if mask is None else mask.shape[1])
    x_leaves = x_tree.tensors if valid is None else [zero_past(valid, x) for x in x_tree.tensors]
    carry, ys = walk(calls, carry_tree.tensors, x_leaves, steps, reverse, valid, fresh)
    return carry_tree.build(carry), calls.build_y(ys)


def run(
    step: FlatStep, init: Leaves, xs: Leaves, steps: int, reverse: bool
) -> tuple[Leaves, Leaves]:
    """The carry after all steps, and y of all steps with T first.

    steps is at least 1, and there is at least one tensor in xs.
    """
    routed = program.routed(step, init, xs, steps, reverse)
    if isinstance(routed, tuple):
        return routed
    results = loop(step, init, xs, steps, reverse)
    if routed is not None:  # after the loop, so that an invalid step raises its error first
        program.warn(routed)
    return results


def loop(
    step: FlatStep, init: Leaves, xs: Leaves, steps: int, reverse: bool
) -> tuple[Leaves, Leaves]:
    """`run` in torch operations, step by step: the reference."""
    carry = init
    ys: list[Leaves] = []
    # unbind, because the gradient of each x[t] would be as large as xs.
    inputs = list(zip(*(x.unbind() for x in xs), strict=True))
    for x in reversed(inputs) if reverse else inputs:
        carry, y = step(carry, list(x))
        ys.append(y)
    if reverse:
        ys.reverse()
    return carry, [torch.stack(leaf) for leaf in zip(*ys, strict=True)]


def walk(
    step: FlatStep,
    init: Leaves,
    xs: Leaves,
    steps: int,
    reverse: bool,
    valid: Tensor | None = None,
    fresh: Tensor | None = None,
    start: Leaves | None = None,
    by_loop: bool = False,
) -> tuple[Leaves, Leaves]:
    """`run` with lengths and resets, also for T = 0.

    Arguments:
        valid: bool (T, B), False past a sequence's length, where xs are 0.
        fresh: bool (T, B), True at valid steps before which `start` replaces the carry.
        start: the initial carry of an episode; None: `init`.
        by_loop: whether to call the step at every step of the sequence.
    """
    if steps == 0:
        return init, _no_steps(step, init, xs)
    size = len(init)
    if valid is not None:
        step, xs = _held(step), [*xs, valid]
    if fresh is not None:
        again = init if start is None else start
        step, init, xs = _restarted(step, size), [*init, *again], [*xs, fresh]
    carry, ys = (loop if by_loop else run)(step, init, xs, steps, reverse)
    if valid is not None:
        ys = [zero_past(valid, y) for y in ys]
    return carry[:size], ys


def _no_steps(step: FlatStep, init: Leaves, xs: Leaves) -> Leaves:
    """Empty ys, with the shapes of one step on zeros."""
    _, ys = step(init, [x.new_zeros(x.shape[1:]) for x in xs])
    return [y.new_empty((0, *y.shape)) for y in ys]


# ---- lengths and resets, as operations around a step ------------------------------------------


def _held(step: FlatStep) -> FlatStep:
    """The step that keeps the carry where its last x, bool (B,), is False."""

    def held(carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        *x, valid = x
        after, y = step(carry, x)
        return [choose(valid, new, old) for new, old in zip(after, carry, strict=True)], y

    return held


def _restarted(step: FlatStep, size: int) -> FlatStep:
    """The step that restarts where its last x, bool (B,), is True.

    Its carry has two halves of `size` leaves: the carry of the step, and the initial carry.
    """

    def restarted(carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        *x, fresh = x
        before, start = carry[:size], carry[size:]
        before = [choose(fresh, new, old) for new, old in zip(start, before, strict=True)]
        after, y = step(before, x)
        return [*after, *start], y

    return restarted


def choose(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`first` where the mask is True and `second` elsewhere; the mask has the leading axes."""
    for _ in range(first.dim() - mask.dim()):
        mask = mask.unsqueeze(-1)
    return torch.where(mask, first, second)


def zero_past(valid: Tensor, value: Tensor) -> Tensor:
    """A value (T, B, …), or of one step (B, …), with 0 at steps that are not valid."""
    return choose(valid, value, value.new_zeros(()))


def valid_steps(lengths: Tensor, sequence: Tensor) -> Tensor:
    """Bool (T, B): whether a step of the sequence (T, B, …) is valid."""
    steps = torch.arange(sequence.shape[0], device=sequence.device)
    return steps.unsqueeze(1) < lengths.to(sequence.device, non_blocking=True)


def fresh_steps(reset: Tensor, valid: Tensor | None, reverse: bool) -> Tensor:
    """Bool (T, B): whether a step is the first one computed of an episode after a reset.

    In reverse an episode starts at its last step, the one before the next reset.
    """
    if valid is not None:
        reset = reset & valid
    return torch.cat([reset[1:], torch.zeros_like(reset[:1])]) if reverse else reset


def _masks(
    carry: Tree, xs: Tree, reverse: bool, lengths: Any, reset: Any
) -> tuple[Tensor | None, Tensor | None]:
    """`valid` and `fresh` of `walk`, after checking the shapes of all arguments."""
    if lengths is None and reset is None:
        return None, None
    which = "lengths" if lengths is not None else "reset"
    for path, x in xs.named():
        if x.dim() < 2:
            raise ValueError(f"{path} must have shape (T, B, …) beside {which}, got {_shape(x)}")
    sequence = xs.tensors[0]
    batch = sequence.shape[1]
    for tree, axis, layout in ((xs, 1, "(T, B, …)"), (carry, 0, "(B, …)")):
        for path, leaf in tree.named():
            if leaf.dim() <= axis or leaf.shape[axis] != batch:
                raise ValueError(
                    f"{path} must have shape {layout} beside {which}, with B = {batch} as in "
                    f"{xs.paths[0]}, got {_shape(leaf)}"
                )
    valid = fresh = None
    if lengths is not None:
        valid = valid_steps(_checks.lengths_tensor(lengths, sequence, False, "xs"), sequence)
    if reset is not None:
        reset = _checks.reset_tensor(reset, sequence, False, False)
        fresh = fresh_steps(reset, valid, reverse)
    return valid, fresh


def check_step(step: Any) -> None:
    """Check that a step is callable."""
    if not callable(step):
        raise TypeError(f"step must be callable as step(carry, x), got {type(step).__name__}")


def count_steps(xs: Tree) -> int:
    """T, the same for all of xs."""
    for path, x in xs.named():
        if x.dim() == 0:
            raise ValueError(f"{path} must have T steps as its first axis, got a 0-D tensor")
        if x.shape[0] != xs.tensors[0].shape[0]:
            raise ValueError(
                f"xs must agree in T, their first axis: {xs.paths[0]} has "
                f"{xs.tensors[0].shape[0]} steps and {path} has {x.shape[0]}"
            )
    if not xs.tensors:
        raise ValueError(
            "xs hold no tensor, so that T is unknown; give at least one tensor with T first, such "
            "as torch.arange(T)"
        )
    return xs.tensors[0].shape[0]


# ---- structures -------------------------------------------------------------------------------


class Tree:
    """The tensors of a nested value, and its structure.

    Attributes:
        tensors: the leaves that are not None.
    """

    def __init__(self, name: str, value: Any, advice: str = "give a tensor or None") -> None:
        """Flatten a value.

        Arguments:
            name: the caller's name for it.
            value: nested tensors.
            advice: what an error advises for a leaf of another type.

        Raises:
            TypeError: a leaf is neither a dense tensor nor None.
        """
        self.name = name
        leaves: list[Any]
        # The usual case, a single tensor, needs no traversal.
        if isinstance(value, Tensor):
            leaves, self._spec = [value], None
        else:
            leaves, self._spec = pytree.tree_flatten(value)
        self._there = [leaf is not None for leaf in leaves]
        self.tensors: Leaves = [leaf for leaf in leaves if leaf is not None]
        for at, leaf in enumerate(self.tensors):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{self.paths[at]} must be a Tensor, got {type(leaf).__name__}; {advice}"
                )
            if type(leaf) is not program.Traced:
                _checks.check_tensor(self.paths[at], leaf)

    @cached_property
    def _all_paths(self) -> list[str]:
        """The paths of all leaves, also of those that are None."""
        if self._spec is None:
            return [self.name]
        nested = self._spec.unflatten(list(range(len(self._there))))
        found, _ = pytree.tree_flatten_with_path(nested)
        return [self.name + pytree.keystr(path) for path, _ in found]

    @cached_property
    def paths(self) -> list[str]:
        """The expression for each tensor, such as ``init['h'][0]``."""
        return [p for p, there in zip(self._all_paths, self._there, strict=True) if there]

    def named(self) -> list[tuple[str, Tensor]]:
        """Each tensor with its path."""
        return list(zip(self.paths, self.tensors, strict=True))

    def build(self, tensors: Sequence[Any]) -> Any:
        """A value with this structure."""
        if self._spec is None:
            return tensors[0]
        left = iter(tensors)
        return self._spec.unflatten([next(left) if there else None for there in self._there])

    def take_apart(self, value: Any, who: str, name: str, given: Leaves | None = None) -> Leaves:
        """The tensors of another value, which must have the same structure, shapes and dtypes.

        Arguments:
            who: the function that returned the value.
            name: its name for the value.
            given: the tensors to compare with; None: `tensors`.

        Raises:
            TypeError: it has another structure, or a leaf has another type.
            ValueError: a tensor has another shape, dtype or device.
        """
        found: list[Any]
        try:
            found = [value] if self._spec is None else self._spec.flatten_up_to(value)
        except ValueError as error:
            expected = outline(self.build(self.tensors))
            raise TypeError(
                f"{who}: {name} was {expected} before and is {outline(value)} after the step; "
                "nest it alike at every step"
            ) from error
        tensors = iter(self.tensors if given is None else given)
        for path, there, leaf in zip(self._all_paths, self._there, found, strict=True):
            before = next(tensors) if there else None
            if before is None or not isinstance(leaf, Tensor):
                if leaf is before:
                    continue
                path = name + path.removeprefix(self.name)
                raise TypeError(
                    f"{who}: {path} was {outline(before)} before and is {outline(leaf)} after the "
                    f"step; return {outline(before)} there at every step"
                )
            if (
                leaf.shape != before.shape
                or leaf.dtype != before.dtype
                or leaf.device != before.device
            ):
                path = name + path.removeprefix(self.name)
                raise ValueError(
                    f"{who}: {path} was {describe(before)} before and is {describe(leaf)} after "
                    f"the step; {self._advice(before, leaf)}"
                )
        return [leaf for leaf in found if leaf is not None]

    def _advice(self, before: Tensor, after: Tensor) -> str:
        if before.shape != after.shape:
            return "a step must keep the shape"
        if before.dtype != after.dtype:
            return f"cast it to the same dtype: .to({before.dtype})"
        return "a step must keep the device"


class Calls:
    """A step as a `FlatStep`: nests the carry and x, calls the step, checks and flattens results.

    Attributes:
        y: the structure of y; None before the first call.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], tuple[Any, Any]],
        carry: Tree,
        x: Tree,
        *,
        who: str = "step",
        carry_name: str = "carry",
        rows: int | None = None,
    ) -> None:
        """Prepare the calls of a step.

        Arguments:
            step: as in `scan`.
            carry: the structure of the carry.
            x: the structure of one step of xs.
            who: the name of the step in errors.
            carry_name: the name of the carry in errors.
            rows: B, if the first axis of y must be B.
        """
        self._step, self._carry, self._x = step, carry, x
        self._who, self._carry_name, self._rows = who, carry_name, rows
        self.y: Tree | None = None
        self._stand_ins = False  # whether the last call was on stand-ins

    def __call__(self, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        result: Any = self._step(self._carry.build(carry), self._x.build(x))
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                f"{self._who} must return a pair (carry, y), got {outline(result)}; y may be None"
            )
        after, y = result
        leaves = self._carry.take_apart(after, self._who, self._carry_name, carry)
        stand_ins = self._stand_ins
        self._stand_ins = type(x[0]) is program.Traced  # their rows differ
        if self.y is None or stand_ins or self._stand_ins:
            self.y = Tree(f"{self._who}: y", y, "return a tensor, as torch.tensor makes, or None")
            for at, leaf in enumerate(self.y.tensors):
                rows = None if self._rows is None else x[0].shape[0]
                if rows is not None and leaf.shape[:1] != (rows,):
                    path = self.y.paths[at]
                    raise ValueError(
                        f"{path} must have shape (B, …) beside lengths or reset, with B = "
                        f"{self._rows}, got {_shape(leaf)}"
                    )
            return leaves, self.y.tensors
        return leaves, self.y.take_apart(y, self._who, "y")

    def build_y(self, tensors: Leaves) -> Any:
        """The ys of all steps, nested as the step returned them."""
        assert self.y is not None
        return self.y.build(tensors)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and, off the CPU, the device.

    >>> describe(torch.zeros(2, 3))
    '(2, 3) float32'
    """
    where = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{_shape(tensor)} {str(tensor.dtype).removeprefix('torch.')}{where}"


def outline(value: Any) -> str:
    """A short description of a value's structure.

    >>> outline((torch.zeros(2), {"n": None}))
    "(Tensor, {'n': None})"
    """
    if isinstance(value, Tensor):
        return "Tensor"
    if value is None:
        return "None"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {outline(part)}" for key, part in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(outline, value)) + "]"
    if isinstance(value, tuple):
        name = "" if type(value) is tuple else type(value).__name__
        parts = ", ".join(map(outline, value)) + ("," if len(value) == 1 and not name else "")
        return f"{name}({parts})"
    return type(value).__name__


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def mapped(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of the tensors of values with one structure; None stays None."""
    if isinstance(values[0], Tensor):
        return function(*values)
    return pytree.tree_map(lambda *at: None if at[0] is None else function(*at), *values)


def fits(value: Any, state: Any) -> bool:
    """Whether a value has the structure and the shapes of the state."""
    found, spec = pytree.tree_flatten(value)
    expected, expected_spec = pytree.tree_flatten(state)
    if spec != expected_spec:
        return False
    pairs = zip(found, expected, strict=True)
    return all(getattr(a, "shape", None) == getattr(b, "shape", None) for a, b in pairs)


def alike(one: Any, other: Any) -> bool:
    """Whether two states can be stacked: same structure, shapes and dtypes."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=False)
    return fits(one, other) and all(a is b or a.dtype == b.dtype for a, b in pairs)
