"""`routed`: a step over a sequence by the engine, where it can be."""

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
    """Of a call: its rows, None where the step has no axis of rows, and its leaves."""

    batch: int | None
    dtype: torch.dtype
    carry: tuple[Leaf, ...]
    xs: tuple[Leaf, ...]


def routed(
    step: Any, init: Leaves, xs: Leaves, steps: int, reverse: bool
) -> tuple[Leaves, Leaves] | Recording | None:
    """As `any_cell.scan.run`, where the engine runs the step.

    None where it is to run as a loop, and a recording where `warn` is to say so.
    """
    first: Recording | None = None
    for sizes in sizes_of(init, xs):
        recording, tensors = recorded(step, sizes)
        if recording.graph is not None:
            return Call(recording, sizes, init, xs, tensors, steps, reverse).run()
        first = first or recording
    return first if first is not None and not first.told else None


def warn(recording: Recording) -> None:
    """Warns, once for a recording, that the step runs as a loop, and why."""
    recording.told = True
    warnings.warn(
        "fastrnn runs this step as a loop of torch operations: the engine cannot run "
        f"{recording.reason}. fastrnn.explain shows what it makes of a step",
        stacklevel=_user_level(),
    )


def _user_level() -> int:
    """The stack level of the first caller outside of this package and torch."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    inside = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _here(tensors: Leaves) -> bool:
    """Whether this is a call for the engine at all."""
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
    """Whether tensors stand for those of a graph that is being made (torch.compile, export)."""
    return torch._C._len_torch_dispatch_stack() > 0


# A step that mixes its rows, or has none, runs as one row of all its numbers, up to so many.
_MOST_OF_ONE_ROW = 4096


def sizes_of(init: Leaves, xs: Leaves) -> Iterator[Sizes]:
    """How the leaves may be taken, the likeliest first; none where this is no call for the engine.

    The rows are the first axis of each leaf of the state (of x where there is no state).
    """
    dtype = next((t.dtype for t in (*init, *xs) if t.dtype.is_floating_point), None)
    if dtype not in DTYPES or not _here([*init, *xs]):
        return
    carry = [tuple(t.shape) for t in init]
    x = [tuple(t.shape[1:]) for t in xs]
    batch = next((s[0] for s in carry or x if len(s) > 1), None)
    if batch is None:  # a number for each row, beside x of several
        firsts = [s[0] for s in x if len(s) > 1]
        batch = next((s[0] for s in carry if len(s) == 1 and s[0] in firsts), None)
    if batch is not None:
        yield _taken(batch, dtype, carry, x, init, xs)
    if not in_graph() and all(math.prod(s) <= _MOST_OF_ONE_ROW for s in (*carry, *x)):
        yield _taken(None, dtype, carry, x, init, xs)


def _taken(
    rows: int | None, dtype: torch.dtype, carry: Any, x: Any, init: Leaves, xs: Leaves
) -> Sizes:
    def leaf(shape: tuple[int, ...], of: torch.dtype) -> Leaf:
        rowed = rows is not None and len(shape) > 0 and bool(shape[0] == rows)  # also symbols
        return Leaf((tuple(map(int, shape[1:] if rowed else shape)), of, rowed))

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
    """What the step does, found anew where it has changed, and the tensors that it closes over."""
    key = (sizes.batch is None, *sizes[1:], torch.is_grad_enabled(), torch.get_default_dtype())
    known = _recordings.get(key, [])
    for at, recording in enumerate(known):
        tensors = replay.replay(recording, step, len(sizes.carry), sizes.batch)
        if tensors is not None:
            if at:
                _recordings[key] = [recording, *(r for r in known if r is not recording)]
            return recording, tensors
    recording, tensors = trace.record(step, sizes.carry, sizes.xs, sizes.batch, sizes.dtype)
    _recordings.pop(key, None)  # and last again
    _recordings[key] = [recording, *known[: _MOST_OF_KEY - 1]]
    while len(_recordings) > _MOST_KEYS:
        _recordings.pop(next(iter(_recordings)), None)
    return recording, tensors


def executable_of(recording: Recording, sizes: Sizes) -> Executable:
    """A recording's program, made once."""
    if recording.executable is None:
        assert recording.graph is not None
        widths = {k: width_of(leaf) for k, leaf in enumerate(sizes.carry)}
        recording.executable = Executable(recording.graph, widths, sizes.dtype)
    found: Executable = recording.executable
    return found


def width_of(leaf: Leaf) -> int:
    return math.prod(leaf[0])


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
        self.program = executable_of(recording, sizes)
        self.graph = self.program.graph
        self.init, self.xs = init, xs
        self.steps, self.reverse = steps, reverse
        self.rows = sizes.batch if sizes.batch is not None else 1
        self.shared = [
            self._shared(tensors[slot], slot, elements) for slot, elements in recording.shared
        ]
        self.fixed = [tensors[i] if kind == "captured" else init[i] for kind, i in recording.fixed]
        self.fixed_rowed = [kind == "captured" or sizes.carry[i][2] for kind, i in recording.fixed]

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
        """The caller's tensors as the engine takes them."""
        sizes = self.sizes
        return Inputs(
            {k: self._rows(init[k], sizes.carry[k][2]) for k in self.graph.nexts},
            [self._steps(x, leaf[2]) for x, leaf in zip(xs, sizes.xs, strict=True)],
            [self._rows(t, rowed) for t, rowed in zip(fixed, self.fixed_rowed, strict=True)],
            shared,
        )

    def _rows(self, tensor: Tensor, rowed: bool) -> Tensor:
        """(B, width)."""
        if tensor.dtype is not self.sizes.dtype:
            tensor = tensor.to(self.sizes.dtype)
        if not rowed:
            return tensor.reshape(1, -1).expand(self.rows, -1)
        if tensor.dim() != 2:
            tensor = tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
        return unit(tensor)

    def _steps(self, tensor: Tensor, rowed: bool) -> Tensor:
        """(T, B, width)."""
        if tensor.dtype is not self.sizes.dtype:
            tensor = tensor.to(self.sizes.dtype)
        if not rowed:
            return tensor.reshape(self.steps, 1, -1).expand(-1, self.rows, -1)
        if tensor.dim() != 3:
            tensor = tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)
        return unit(tensor)

    def _results(self, outputs: Leaves) -> tuple[Leaves, Leaves]:
        """States after the last step and ys, in the caller's shapes."""
        recording, sizes = self.recording, self.sizes
        out = iter(outputs)
        carry = []
        for k, leaf in enumerate(sizes.carry):
            if k in recording.kept:
                carry.append(self.init[k])
                continue
            final = next(out)
            before = self.init[k]
            carry.append((final if leaf[2] else final[0]).view(before.shape).to(before.dtype))
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
        found = self.program.run_backward(
            inputs,
            ys,
            kept,
            d_out[:count],
            d_out[count:],
            self.steps,
            self.rows,
            self.reverse,
            needs,
        )
        sizes = self.sizes
        d_init = [
            self._like(found.states.get(k), init[k], leaf[2], 0, needs.carry[k])
            for k, leaf in enumerate(sizes.carry)
        ]
        d_xs = [
            self._like(found.xs.get(i), xs[i], leaf[2], 1, needs.xs[i])
            for i, leaf in enumerate(sizes.xs)
        ]
        d_fixed = [
            self._like(found.fixed.get(j), t, rowed, 0, needs.fixed[j])
            for j, (t, rowed) in enumerate(zip(fixed, self.fixed_rowed, strict=True))
        ]
        d_shared = [
            self._like(found.shared.get(j), t, True, 0, needs.shared[j])
            for j, t in enumerate(shared)
        ]
        return [*d_init, *d_xs, *d_fixed, *d_shared]

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
        """The states after the last step and ys, in torch's operations: to be differentiated."""
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
    """A dense tensor's elements in the order in which they lie, differentiably."""
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], -shape[axis]))
    return tensor.permute(order).reshape(-1)


class _Recorded(torch.autograd.Function):
    """One call under autograd. A gradient of the gradient goes through `Call.interpreted`."""

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
    """Gradients that can be differentiated."""
    with torch.enable_grad():
        outputs = call.interpreted(leaves)
        pairs = [
            (o, d) for o, d in zip(outputs, d_out, strict=True) if d is not None and o.requires_grad
        ]
        chosen = [t for t, w in zip(leaves, wanted, strict=True) if w]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                chosen,
                [d for _, d in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
        return [next(found) if w else None for w in wanted]
