"""`routed`: runs a step over a sequence on the engine, if the engine can."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import operators, replay, stand_ins, trace
from .execute import DTYPES, Executable, Inputs, unit
from .grad import Needs
from .interpret import Interpreter
from .recording import Leaf, Recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

Leaves = list[Tensor]

_PLAIN = (Tensor, torch.nn.Parameter)


class Sizes(NamedTuple):
    """The rows of a call, None for a step without rows, and its leaves."""

    batch: int | None
    dtype: torch.dtype
    carry: tuple[Leaf, ...]
    xs: tuple[Leaf, ...]


def routed(
    step: Any, init: Leaves, xs: Leaves, steps: int, reverse: bool
) -> tuple[Leaves, Leaves] | Recording | None:
    """As `any_cell.scan.run`, if the engine runs the step.

    None if it must run as a loop; a recording if `warn` should also say so.
    """
    found = find(step, init, xs)
    if found is None:
        return None
    sizes, recording, tensors = found
    if recording.graph is not None:
        return Call(recording, sizes, init, xs, tensors, steps, reverse).run()
    return None if recording.warned else recording


def find(step: Any, init: Leaves, xs: Leaves) -> tuple[Sizes, Recording, Leaves] | None:
    """The first recording with a program, else the first one; None if the call is not for it."""
    first = None
    for sizes in sizes_of(init, xs):
        recording, tensors = recorded(step, sizes)
        if recording.graph is not None:
            return sizes, recording, tensors
        first = first or (sizes, recording, tensors)
    return first


def warn(recording: Recording) -> None:
    """Warns, once for each recording, that the step runs as a loop, and why."""
    recording.warned = True
    warnings.warn(
        "fastrnn runs this step as a loop of torch operations: the engine cannot run "
        f"{recording.reason}. fastrnn.explain shows what it makes of a step",
        stacklevel=_user_level(),
    )


def _user_level() -> int:
    """The stack level of the first caller outside this package and torch."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    inside = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _supported(tensors: Leaves) -> bool:
    """Whether the engine supports the tensors and the modes of a call."""
    if (
        torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or stand_ins.tracing()
    ):
        return False
    if in_graph():
        return all(type(t) is not stand_ins.Traced and t.device.type == "cpu" for t in tensors)
    return all(
        type(t) in _PLAIN and t.device.type == "cpu" and t.layout is torch.strided for t in tensors
    )


def in_graph() -> bool:
    """Whether a graph is being built (torch.compile, export)."""
    return torch._C._len_torch_dispatch_stack() > 0


# A step that mixes its rows, or has none, runs as one row with at most so many elements.
_MOST_OF_ONE_ROW = 4096


def sizes_of(init: Leaves, xs: Leaves) -> Iterator[Sizes]:
    """The possible interpretations of the leaves, the likeliest first; none if not supported.

    The rows are the first axis of each leaf of the state, or of x if there is no state.
    """
    dtype = next((t.dtype for t in (*init, *xs) if t.dtype.is_floating_point), None)
    if dtype not in DTYPES or not _supported([*init, *xs]):
        return
    carry = [tuple(t.shape) for t in init]
    x = [tuple(t.shape[1:]) for t in xs]
    batch = next((s[0] for s in carry or x if len(s) > 1), None)
    if batch is None:  # a state (B,) with x (T, B, …)
        firsts = [s[0] for s in x if len(s) > 1]
        batch = next((s[0] for s in carry if len(s) == 1 and s[0] in firsts), None)
    if batch is not None:
        yield _sizes(batch, dtype, carry, x, init, xs)
    if not in_graph() and all(math.prod(s) <= _MOST_OF_ONE_ROW for s in (*carry, *x)):
        yield _sizes(None, dtype, carry, x, init, xs)


def _sizes(
    rows: int | None, dtype: torch.dtype, carry: Any, x: Any, init: Leaves, xs: Leaves
) -> Sizes:
    def leaf(shape: tuple[int, ...], of: torch.dtype) -> Leaf:
        rowed = rows is not None and len(shape) > 0 and bool(shape[0] == rows)  # also symbols
        return Leaf(tuple(map(int, shape[1:] if rowed else shape)), of, rowed)

    return Sizes(
        rows,
        dtype,
        tuple([leaf(s, t.dtype) for s, t in zip(carry, init, strict=True)]),
        tuple([leaf(s, t.dtype) for s, t in zip(x, xs, strict=True)]),
    )


# ---- recordings ----------------------------------------------------------------------------------

_MOST_KEYS, _MOST_OF_KEY = 256, 8
_recordings: dict[Any, list[Recording]] = {}


def recorded(step: Any, sizes: Sizes) -> tuple[Recording, Leaves]:
    """The step's recording, a new one if it has changed, and the tensors that it closes over."""
    key = (sizes.batch is None, *sizes[1:], torch.is_grad_enabled(), torch.get_default_dtype())
    known = _recordings.get(key, [])
    for at, recording in enumerate(known):
        tensors = replay.replay(recording, step, len(sizes.carry), sizes.batch)
        if tensors is not None:
            if at:
                _recordings[key] = [recording, *(r for r in known if r is not recording)]
            return recording, tensors
    recording, tensors = trace.record(step, sizes.carry, sizes.xs, sizes.batch, sizes.dtype)
    _recordings.pop(key, None)  # so that the key moves to the end
    _recordings[key] = [recording, *known[: _MOST_OF_KEY - 1]]
    while len(_recordings) > _MOST_KEYS:
        _recordings.pop(next(iter(_recordings)), None)
    return recording, tensors


# ---- one call ------------------------------------------------------------------------------------


class Call:
    """A call of a program: the caller's leaves, and the tensors that the step closes over."""

    def __init__(
        self,
        recording: Recording,
        sizes: Sizes,
        init: Leaves,
        xs: Leaves,
        tensors: Leaves,
        steps: int,
        reverse: bool,
    ) -> None:
        self.recording, self.sizes = recording, sizes
        if recording.executable is None:
            assert recording.graph is not None
            widths = {k: leaf.width for k, leaf in enumerate(sizes.carry)}
            recording.executable = Executable(recording.graph, widths, sizes.dtype)
        self.program: Executable = recording.executable
        self.graph = self.program.graph
        self.init, self.xs = init, xs
        self.steps, self.reverse = steps, reverse
        self.rows = sizes.batch if sizes.batch is not None else 1
        self.shared = [
            self._shared(tensors[slot], slot, elements) for slot, elements in recording.shared
        ]
        self.fixed = [tensors[i] if kind == "captured" else init[i] for kind, i in recording.fixed]
        self.fixed_rowed = [
            kind == "captured" or sizes.carry[i].rowed for kind, i in recording.fixed
        ]

    def _shared(self, tensor: Tensor, slot: int, elements: Tensor | None) -> Tensor:
        captured = self.recording.captured[slot]
        if captured.kind == "alike":
            tensor = tensor[:1]
        if tensor.dtype is not self.sizes.dtype:
            tensor = tensor.to(self.sizes.dtype)
        if elements is not None:
            return tensor.reshape(-1)[elements]
        return tensor if captured.kind == "shared" and captured.dense else tensor.contiguous()

    def run(self) -> tuple[Leaves, Leaves]:
        if in_graph():
            inputs = self.arrays(self.init, self.xs, self.fixed, self.shared)
            return self._results(operators.run(self.graph.text(), inputs, self.reverse))
        leaves = [*self.init, *self.xs, *self.fixed, *self.shared]
        if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
            return self._results(list(_Recorded.apply(self, *leaves)))  # type: ignore[no-untyped-call]
        inputs = self.arrays(self.init, self.xs, self.fixed, self.shared)
        out = self.program.run_forward(inputs, self.steps, self.rows, self.reverse, None)
        return self._results([*out.finals, *out.ys])

    def arrays(self, init: Leaves, xs: Leaves, fixed: Leaves, shared: Leaves) -> Inputs:
        """The caller's tensors in the engine's layout."""
        sizes = self.sizes
        return Inputs(
            {k: self._flat(init[k], sizes.carry[k].rowed) for k in self.graph.nexts},
            [self._flat(x, leaf.rowed, 1) for x, leaf in zip(xs, sizes.xs, strict=True)],
            [self._flat(t, rowed) for t, rowed in zip(fixed, self.fixed_rowed, strict=True)],
            shared,
        )

    def _flat(self, tensor: Tensor, rowed: bool, axis: int = 0) -> Tensor:
        """(B, width) or, if ``axis`` of the rows is 1, (T, B, width)."""
        if tensor.dtype is not self.sizes.dtype:
            tensor = tensor.to(self.sizes.dtype)
        if not rowed:
            steps = tensor.shape[:axis]
            return tensor.reshape(*steps, 1, -1).expand(*steps, self.rows, -1)
        if tensor.dim() > axis + 2:
            tensor = tensor.flatten(axis + 1)
        elif tensor.dim() < axis + 2:
            tensor = tensor.unsqueeze(axis + 1)
        return unit(tensor)

    def _results(self, outputs: Leaves) -> tuple[Leaves, Leaves]:
        """The final states and ys, in the caller's shapes."""
        recording, sizes = self.recording, self.sizes
        out = iter(outputs)
        carry = []
        for k, leaf in enumerate(sizes.carry):
            if k in recording.kept:
                carry.append(self.init[k])
                continue
            final = next(out)
            before = self.init[k]
            carry.append((final if leaf.rowed else final[0]).view(before.shape).to(before.dtype))
        ys = []
        for i, y in zip(self.graph.ys, out, strict=True):
            shape = recording.y_shapes[i]
            if sizes.batch is not None and i not in recording.alike_y:
                y = y if len(shape) == 1 else y.view(self.steps, self.rows, *shape)
            else:
                y = y[:, 0].view(self.steps, *shape)
            ys.append(y.bool() if i in recording.y_bool else y)
        return carry, ys

    # ---- gradients -------------------------------------------------------------------------------

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        a, b = len(self.init), len(self.init) + len(self.xs)
        c = b + len(self.fixed)
        return list(leaves[:a]), list(leaves[a:b]), list(leaves[b:c]), list(leaves[c:])

    def backward(
        self,
        leaves: Sequence[Tensor],
        ys: Sequence[Tensor | None],
        kept: dict[Any, Tensor],
        d_out: Sequence[Tensor | None],
        needs: Needs,
    ) -> list[Tensor | None]:
        """Gradients of the leaves, in their order."""
        init, xs, fixed, shared = self.split(leaves)
        inputs = self.arrays(init, xs, fixed, shared)
        count = len(self.graph.nexts)
        call = (self.steps, self.rows, self.reverse, needs)
        found = self.program.run_backward(inputs, ys, kept, d_out[:count], d_out[count:], *call)
        carry_rowed, xs_rowed = (
            [leaf.rowed for leaf in g] for g in (self.sizes.carry, self.sizes.xs)
        )
        groups: list[tuple[dict[int, Tensor], list[Tensor], list[bool], tuple[bool, ...], int]] = [
            (found.states, init, carry_rowed, needs.carry, 0),
            (found.xs, xs, xs_rowed, needs.xs, 1),
            (found.fixed, fixed, self.fixed_rowed, needs.fixed, 0),
            (found.shared, shared, [True] * len(shared), needs.shared, 0),
        ]
        return [
            self._like(gradients.get(i), leaf, rowed, axis, wanted)
            for gradients, group, are_rowed, needed, axis in groups
            for i, (leaf, rowed, wanted) in enumerate(zip(group, are_rowed, needed, strict=True))
        ]

    def _like(
        self, d: Tensor | None, leaf: Tensor, rowed: bool, axis: int, wanted: bool
    ) -> Tensor | None:
        if not wanted:
            return None
        if d is None:
            return torch.zeros_like(leaf)
        d = d if rowed else d.sum(axis)
        return d if d.shape == leaf.shape else d.reshape(leaf.shape)

    def interpreted(self, leaves: Sequence[Tensor]) -> Leaves:
        """The final states and ys, computed by differentiable torch operations."""
        inputs = self.arrays(*self.split(leaves))
        machine = Interpreter(self.graph, [_in_memory(t) for t in inputs.shared], inputs.fixed)
        carry = inputs.states
        ys: list[Leaves] = [[] for _ in self.graph.ys]
        for t in reversed(range(self.steps)) if self.reverse else range(self.steps):
            carry, out = machine.step(carry, [x[t] for x in inputs.xs])
            for into, y in zip(ys, out.values(), strict=True):
                into.append(y)
        stacked = [torch.stack(y[::-1] if self.reverse else y) for y in ys]
        return [*(carry[k] for k in sorted(carry)), *stacked]


def _in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, differentiable."""
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], -shape[axis]))
    return tensor.permute(order).reshape(-1)


class _Recorded(torch.autograd.Function):
    """One call under autograd; double backward differentiates `Call.interpreted`."""

    @staticmethod
    def forward(ctx: Any, call: Call, *leaves: Tensor) -> tuple[Tensor, ...]:
        init, xs, fixed, shared = call.split(ctx.needs_input_grad[1:])
        needs = Needs(tuple(init), tuple(xs), tuple(fixed), tuple(shared))
        inputs = call.arrays(*call.split(leaves))
        out = call.program.run_forward(inputs, call.steps, call.rows, call.reverse, needs)
        ctx.call, ctx.needs = call, needs
        ctx.set_materialize_grads(False)
        read = call.program.read_back(needs, call.reverse)
        ctx.names = [what for what in out.kept if what in read]
        ctx.ys = [("y", i) in read for i in call.graph.ys]
        saved_ys = [y for y, wanted in zip(out.ys, ctx.ys, strict=True) if wanted]
        ctx.save_for_backward(*leaves, *saved_ys, *(out.kept[what] for what in ctx.names))
        results = [*out.finals, *out.ys]
        states, ys = call.program.active(needs)
        ctx.mark_non_differentiable(
            *(r for r, active in zip(results, [*states, *ys], strict=True) if not active)
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        saved = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 1
        leaves, rest = saved[:count], iter(saved[count:])
        if torch.is_grad_enabled():
            return (None, *_again(call, ctx.needs_input_grad[1:], leaves, d_out))
        ys = [next(rest) if wanted else None for wanted in ctx.ys]
        kept = dict(zip(ctx.names, rest, strict=True))
        return (None, *call.backward(leaves, ys, kept, d_out, ctx.needs))


def _again(
    call: Call,
    wanted: Sequence[bool],
    leaves: Sequence[Tensor],
    d_out: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients with a graph, for double backward."""
    with torch.enable_grad():
        outputs = call.interpreted(leaves)
        pairs = [
            (o, d) for o, d in zip(outputs, d_out, strict=True) if d is not None and o.requires_grad
        ]
        chosen = [t for t, w in zip(leaves, wanted, strict=True) if w]
        found, cotangents = [o for o, _ in pairs], [d for _, d in pairs]
        gradients = iter(
            torch.autograd.grad(found, chosen, cotangents, create_graph=True, allow_unused=True)
        )
        return [next(gradients) if w else None for w in wanted]
