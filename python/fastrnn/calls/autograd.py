"""The autograd Function of a call whose engine runs without torch's dispatcher."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import forward_ad

from .. import _C
from . import composed, operators, program_torch, transforms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .._engine import Prepared

_BEFORE = 1  # arguments of `Recurrence.apply` before the tensors
_OTHERS = 5  # tensors before the weights
_NO_OTHERS = (None,) * 8  # reset_h, reset_c, batch_sizes, lengths, reset and three masks


class _Recorded(NamedTuple):
    """What `Recurrence` records, as one argument: autograd looks at each that is no tensor. A
    plain tuple will do.
    """

    own: Prepared  # the stack or the cell
    results: tuple[Any, ...]  # what ``_C.Call.forward`` gave, with what backward needs
    steps: tuple[Tensor | None, ...] | None  # batch_sizes, lengths, reset and masks, if any
    states: bool  # whether hidden and cell are wanted
    loop: _Loop | None  # of a step of a cell, the loop that it is part of


class Recurrence(torch.autograd.Function):
    """A call of the engine with its gradient.

    The engine computes a first gradient; a gradient that is itself differentiated comes from
    composed operations. In ctx style, because ``setup_context`` costs 30 µs a call.
    """

    @staticmethod
    def forward(
        ctx: Any, recorded: _Recorded, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Record a call.

        Arguments:
            tensors: input, h0, c0, reset_h, reset_c and the weights, which have gradients; in a
                loop ``loop.token`` instead of the weights.
        """
        own, results, steps, states, loop = recorded
        output, h_n, c_n, hidden, cell, saved = results
        ctx.own, ctx.stepped = own, steps is not None
        ctx.loop = ctx.next_loop = loop
        ctx.fresh = True  # `saved` is as forward left it
        ctx.set_materialize_grads(False)
        weights = tensors[_OTHERS:] if loop is None else loop.weights
        others = () if steps is None else (*tensors[3:_OTHERS], *steps)
        ctx.save_for_backward(hidden, cell, saved, *tensors[:3], *others, *weights)
        return output, h_n, c_n, hidden if states else None, cell if states else None, None

    @staticmethod
    def backward(
        ctx: Any, d_output: Any, d_h_n: Any, d_c_n: Any, d_hidden: Any, d_cell: Any, _: None
    ) -> tuple[Tensor | None, ...]:
        cotangents = (d_output, d_hidden, d_cell, d_h_n, d_c_n)
        needs = ctx.needs_input_grad
        if all(d is None for d in cotangents):
            return (None,) * len(needs)
        own, loop, tensors = ctx.own, ctx.loop, ctx.saved_tensors
        # Whether this pass reaches the weights.
        taken = loop is not None and torch._C._will_engine_execute_node(loop.token.grad_fn)
        # The gradients of the gates overwrite `saved`. A second backward (retain_graph=True) finds
        # it spent, and runs forward again.
        spent = tensors[2] is not None and not ctx.__dict__.pop("fresh", False)
        found: tuple[Tensor | None, ...] | None = None
        if own.gradient_by_cells and not spent and not ctx.stepped:
            found = _C.recorded_backward(
                own.engine, tensors, cotangents, needs, loop is not None, own.cell
            )
            if found is not None and taken:
                loop.steps.add(tensors[3], tensors[4], tensors[2])
        if found is None:
            found = _in_general(ctx, tensors, cotangents, spent, taken)
        return found if loop is None else (*found[:-1], _token_gradient(tensors[3]))


def _in_general(
    ctx: Any,
    tensors: tuple[Any, ...],
    cotangents: tuple[Tensor | None, ...],
    spent: bool,
    taken: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of a call, or of a backward pass, that is not a usual one."""
    needs = ctx.needs_input_grad[_BEFORE:]
    own, loop = ctx.own, ctx.loop
    hidden, cell, saved, input, h0, c0, *weights = tensors
    others: Sequence[Tensor | None] = _NO_OTHERS
    if ctx.stepped:
        others, weights = weights[: len(_NO_OTHERS)], weights[len(_NO_OTHERS) :]
    plain = not torch.is_grad_enabled() and forward_ad._current_level < 0
    if loop is not None:
        needs = needs[:_OTHERS] + (loop.needs if taken else (False,) * len(weights))
    arguments = (input, h0, c0, weights, *others)
    found: Any = None
    if loop is None and plain and not spent and _C.bypass_is_unobservable(cotangents):
        found = _by_engine(own, arguments, (hidden, cell, saved, *cotangents), needs, ctx.stepped)
    if found is None:
        kept = None if spent or hidden is None else (hidden, cell, saved)
        found = _unusual(own, arguments, kept, cotangents, needs, plain)
        if taken:
            loop.steps.add_gradients(found[_OTHERS:])
    if loop is not None:
        found = (*found[:_OTHERS], None)
    return (*(None,) * _BEFORE, *found)


def _by_engine(
    own: Prepared,
    arguments: tuple[Any, ...],
    saved: tuple[Any, ...],
    needs: tuple[bool, ...],
    stepped: bool,
) -> Any:
    """The gradients by the engine, which may overwrite ``saved``; None where it cannot read one.

    Arguments:
        arguments: input, h0, c0, weights, reset_h, reset_c, batch_sizes, lengths, reset and masks.
    """
    input = arguments[0]
    device = operators.device_of(arguments, own.options, True) if input.is_cuda else None
    try:
        if own.gradient_by_cells and not stepped:
            given = (*arguments[:4], None, None, None)
            return program_torch.cells_backward(
                own.engine, given, saved, needs, True, own.cell, device
            )
        ordered = _as_operator(arguments)
        return program_torch.backward(own.options, ordered, saved, needs, True, own.cell, device)
    except TypeError:  # a gradient that vmap has wrapped, whose memory cannot be read
        if not transforms.is_mapped(saved[3:]):
            raise
    return None


def _as_operator(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """In the order of the operator ``forward``."""
    return (*arguments[:4], *arguments[6:9], *arguments[4:6], *arguments[9:])


def _unusual(
    own: Prepared,
    arguments: tuple[Any, ...],
    saved: tuple[Any, ...] | None,
    cotangents: tuple[Any, ...],
    needs: Sequence[bool],
    plain: bool,
) -> list[Tensor | None]:
    """The gradients where they are differentiated in turn, observed or mapped, or come a second
    time (``saved`` is None).
    """
    given, options = _as_operator(arguments), own.options
    if own.cell:  # with the axes of steps and layers
        given = (*(x if x is None else x.unsqueeze(0) for x in given[:3]), *given[3:])
        cotangents = tuple(d if d is None else d.unsqueeze(0) for d in cotangents)
    found: Any
    if plain or (forward_ad._current_level < 0 and transforms.is_transforming()):
        if saved is None:
            results = operators.forward_op(*given, options.text, False, True, False)
            saved = results[3:]
        empty = given[0].new_empty(0)
        saved = tuple(empty if x is None else x for x in saved)
        found = transforms.backward(*given, *saved, *cotangents, options.text, needs, False)
    elif forward_ad._current_level >= 0:
        found = transforms.gradients_of(transforms.ONE, options, given, needs, cotangents)
    else:
        found = composed.gradients(options, given, cotangents, needs)
    wanted: list[Any] = [d if need else None for d, need in zip(found, needs, strict=True)]
    if own.cell:
        wanted[:3] = [d if d is None else d.squeeze(0) for d in wanted[:3]]
    return wanted


# ---- the steps of a loop -------------------------------------------------------------------------

# A loop over a cell calls it with the state that its last call returned. Each step by itself would
# give the gradient of all weights, and torch would add them up: for few rows, most of the work of
# backward. So from the second step on the weights are one node of the graph, `_Weights`, which
# torch runs after all steps: the steps leave what they read and the gradients of their gates in
# `_Steps`, and the gradient of the weights is one product over the rows of many steps.


class _Pass:
    """What one backward pass has left so far."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []  # input, h0, gates' gradients, two versions
        self.rows = 0  # of all those steps
        self.sums: list[Tensor | None] | None = None  # of earlier steps, by the engine
        self.others: list[Sequence[Tensor | None]] = []  # gradients found otherwise


class _Steps:
    """What the steps of a loop leave for the gradient of the weights, in each backward pass."""

    # The rows of one product: enough for its speed, few enough that the steps are freed on the way.
    _ROWS = 512

    def __init__(self, own: Prepared, weights: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
        self.own, self.weights, self.needs = own, weights, needs
        self._passes: dict[int, _Pass] = {}  # by the number of the pass

    def _this_pass(self) -> _Pass:
        number = torch._C._current_graph_task_id()
        now = self._passes.get(number)
        if now is None:
            now = self._passes[number] = _Pass()
        return now

    def add(self, input: Tensor, h0: Tensor, saved: Tensor) -> None:
        """A step: what it read, and the gradients of its gates."""
        now = self._this_pass()
        now.steps.append((input, h0, saved, input._version, h0._version))
        now.rows += len(input)
        if now.rows >= self._ROWS:
            self._multiply(now)

    def add_gradients(self, found: Sequence[Tensor | None]) -> None:
        """A step whose gradient of the weights is there already."""
        self._this_pass().others.append(found)

    def sum(self) -> tuple[Tensor | None, ...]:
        """The gradients of the weights in this pass."""
        now = self._passes.pop(torch._C._current_graph_task_id(), _Pass())
        if now.steps:
            self._multiply(now)
        total = now.sums or [None] * len(self.weights)
        for each in now.others:
            for i, d in enumerate(each):
                before = total[i]
                total[i] = d if before is None else before if d is None else before + d
        return tuple(total)

    def _multiply(self, now: _Pass) -> None:
        """Add the product over the rows of the steps so far."""
        for input, h0, _, *versions in now.steps:
            if versions != [input._version, h0._version]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: the input or the state of a cell, after backward of its "
                    "step and before that of the weights; do not change it in a hook"
                )
        inputs, states, saved, *_ = zip(*now.steps[::-1], strict=True)
        now.steps, now.rows = [], 0
        if len(inputs) > 1:
            joined = torch.cat(inputs), torch.cat(states), torch.cat(saved, 1)
        else:
            joined = inputs[0], states[0], saved[0]
        needs = (False, False, False, *self.needs)
        found: list[Tensor | None] = _C.parameter_gradients(
            self.own.engine, *joined[:2], self.weights, joined[2], needs, torch.get_num_threads()
        )[3:]
        if now.sums is None:
            now.sums = found
        else:
            for d, more in zip(now.sums, found, strict=True):
                if d is not None and more is not None:
                    d += more


class _Weights(torch.autograd.Function):
    """The weights of a loop as one node; its output, which is empty, stands for them."""

    @staticmethod
    def forward(ctx: Any, steps: _Steps, *weights: Tensor) -> Tensor:
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        return None, *ctx.steps.sum()


def _token_gradient(input: Tensor) -> Tensor | None:
    """None; where torch compiles backward, which adds gradients without looking, an empty one."""
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    compiled = module is not None and module.in_compiled_autograd_region
    return input.new_empty(0) if compiled else None


class _Loop(NamedTuple):
    """The steps of a loop, and the token that stands for the weights in the graph.

    csrc/bind/calls.cpp reads the fields by their places. `_Steps` does not hold the token: a node
    that holds its own output is never freed.
    """

    steps: _Steps
    own: Prepared
    token: Tensor
    weights: tuple[Tensor, ...]
    needs: tuple[bool, ...]


def _continued(node: Any, recorded: tuple[Any, ...], *tensors: Any) -> Any:
    """`Recurrence.apply` of a step of a cell whose state is the output of ``node``: the second step
    of a loop, unless the cell or its weights are others.
    """
    own = recorded[0]
    weights = tensors[_OTHERS:]
    needs = tuple(w.requires_grad for w in weights)
    if node.own is own and own.shares_gradient and any(needs):
        steps = _Steps(own, weights, needs)
        token = _Weights.apply(steps, *weights)  # type: ignore[no-untyped-call]
        node.next_loop = _Loop(steps, own, token, weights, needs)
        recorded = (*recorded[:-1], node.next_loop)
        tensors = (*tensors[:_OTHERS], node.next_loop.token)
    return Recurrence.apply(recorded, *tensors)  # type: ignore[no-untyped-call]


_C.set_recording(
    super(torch.autograd.Function, Recurrence).apply, Recurrence._backward_cls, _continued
)
