"""Gradients of the torch route: right to the second order, and well-behaved inside autograd."""

from __future__ import annotations

import gc
import weakref
from itertools import chain
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from cases import LAYOUTS, STACKS
from fastrnn import _C
from fastrnn._options import Options
from fastrnn.calls import call, composed, operators
from fastrnn.calls.call import recurrent
from stacks import Arguments, make

if TYPE_CHECKING:
    from torch import Tensor

every_stack = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS.keys())
every_step = pytest.mark.parametrize("steps", LAYOUTS)


def outputs(case: Arguments, **extra: Any) -> tuple[Tensor, ...]:
    """Output, final states and all states, flat."""
    output, hx_n, states = recurrent(
        case.options,
        case.input,
        case.hx,
        case.weights,
        **case.steps,
        extras=case.extras,
        **extra,
    )
    return (output, *hx_n, *(s for s in states or () if s is not None))


def loss(values: tuple[Tensor, ...]) -> Tensor:
    """A scalar that depends on every element of every output differently."""
    total = torch.zeros((), dtype=torch.float64)
    for k, y in enumerate(values):
        weight = torch.linspace(-1, 1 + k, y.numel(), dtype=torch.float64).view(y.shape)
        total = total + (weight * y).sum()
    return total


def by_operations(case: Arguments, **extra: Any) -> tuple[Tensor, ...]:
    """The same by plain torch operations."""
    with patch.object(call, "_route", lambda *_: call._composed_route):
        return outputs(case, **extra)


@every_stack
@every_step
def test_operator_equals_composed(options: Options, steps: str) -> None:
    case = make(options, steps)
    ours, plain = outputs(case, return_states=True), by_operations(case, return_states=True)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss(y), case.leaves) for y in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@every_stack
@every_step
def test_gradcheck(options: Options, steps: str) -> None:
    case = make(options, steps)
    assert gradcheck(
        lambda *leaves: outputs(case.with_leaves(*leaves), return_states=True),
        case.leaves,
        fast_mode=True,
    )


@every_stack
@every_step
def test_gradgradcheck(options: Options, steps: str) -> None:
    case = make(options, steps)
    assert gradgradcheck(
        lambda *leaves: outputs(case.with_leaves(*leaves)), case.leaves, fast_mode=True
    )


def test_third_derivative_equals_composed(cell: str) -> None:
    def third(route: Any) -> Tensor:
        case = make(Options(cell))  # type: ignore[arg-type]
        value = loss(route(case))
        for _ in range(2):
            (d_x,) = torch.autograd.grad(value, case.input, create_graph=True)
            value = d_x.pow(2).sum()
        return torch.autograd.grad(value, case.weights[1])[0]

    torch.testing.assert_close(third(outputs), third(by_operations), rtol=1e-9, atol=1e-9)


def test_double_backward_of_arguments_that_depend_on_each_other() -> None:
    case = make(Options("GRU"))

    def second(route: Any) -> Tensor:
        tied = case._replace(input=case.weights[0][:8].reshape(4, 1, 4)[..., :2].expand(4, 3, 2))
        (d_w,) = torch.autograd.grad(loss(route(tied)), case.weights[0], create_graph=True)
        return torch.autograd.grad(d_w.pow(2).sum(), case.weights[0])[0]

    torch.testing.assert_close(second(outputs), second(by_operations), rtol=1e-9, atol=1e-9)


def test_backward_twice_with_retain_graph(cell: str) -> None:
    case = make(Options(cell))  # type: ignore[arg-type]
    value = loss(outputs(case))
    first = torch.autograd.grad(value, case.leaves, retain_graph=True)
    second = torch.autograd.grad(value, case.leaves)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, case.leaves)


@every_stack
def test_frozen_arguments_get_no_gradient_and_no_work(options: Options) -> None:
    case = make(options, requires_grad=False)
    trained = case.weights[1].requires_grad_()
    asked = []
    original = _C.backward

    def spy(*arguments: Any, **more: Any) -> Any:
        asked.append(arguments[16])
        return original(*arguments, **more)

    with patch.object(_C, "backward", spy):
        loss(outputs(case)).backward()
    assert trained.grad is not None
    assert all(x.grad is None for x in case.leaves if x is not trained)
    (needs,) = asked
    assert [x is trained for x in case.leaves] == [
        need for need, x in zip(needs, padded_leaves(case), strict=True) if x is not None
    ]
    everything = make(options)
    whole = torch.autograd.grad(loss(outputs(everything)), everything.weights[1])[0]
    torch.testing.assert_close(trained.grad, whole, rtol=1e-10, atol=1e-12)


def padded_leaves(case: Arguments) -> tuple[Tensor | None, ...]:
    """The leaves as the operators take them: every state always has a place."""
    return (case.input, *(*case.hx, None)[:2], *case.weights)


def test_nothing_is_saved_where_no_gradient_is_wanted() -> None:
    case = make(Options("LSTM", num_layers=2), requires_grad=False)
    assert outputs(case)[0].grad_fn is None
    training = make(Options("LSTM", num_layers=2))
    with torch.no_grad(), patch.object(_C, "Call", wraps=_C.Call) as call:
        call.return_value = Mock()
        call.return_value.forward.return_value = (training.input, *(None,) * 5)
        assert outputs(training)[0].grad_fn is None
    assert call.return_value.forward.call_args.args[:2] == (False, False)


def test_unused_outputs_get_no_gradient(cell: str) -> None:
    case = make(Options(cell, num_layers=2))  # type: ignore[arg-type]
    for k in range(len(outputs(case, return_states=True))):
        ours = torch.autograd.grad(
            outputs(case, return_states=True)[k].sum(), case.leaves, materialize_grads=True
        )
        plain = torch.autograd.grad(
            by_operations(case, return_states=True)[k].sum(), case.leaves, materialize_grads=True
        )
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changed", ["weight", "input"])
def test_in_place_change_between_forward_and_backward_is_detected(changed: str) -> None:
    case = make(Options("GRU"))
    output, *_ = outputs(case)
    value = output.sum()
    with torch.no_grad():
        {"weight": case.weights[1], "input": case.input}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("return_states", [False, True])
def test_the_output_may_be_written_to_before_backward(
    cell: str, layers: int, return_states: bool
) -> None:
    case = make(Options(cell, num_layers=layers, bidirectional=True), "lengths-reset")  # type: ignore[arg-type]
    expected = torch.autograd.grad((2 * (outputs(case)[0] + 1)).pow(2).sum(), case.leaves)
    output = outputs(case, return_states=return_states)[0]
    output.add_(1).mul_(2)
    got = torch.autograd.grad(output.pow(2).sum(), case.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_the_output_holds_its_own_bytes_alone(cell: str, layers: int, grad: bool) -> None:
    case = make(Options(cell, num_layers=layers), requires_grad=grad)  # type: ignore[arg-type]
    for states in (False, True):
        output = outputs(case, return_states=states)[0].detach()
        assert output.untyped_storage().nbytes() == output.nbytes


def test_final_states_may_change_in_place(cell: str) -> None:
    case = make(Options(cell))  # type: ignore[arg-type]
    expected = torch.autograd.grad(outputs(case)[0].sum(), case.leaves)
    output, *hx_n = outputs(case)
    for state in hx_n:
        state.detach()[:, 0] = 0  # rows that start anew, as in reinforcement learning
    got = torch.autograd.grad(output.sum(), case.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(cell: str, reentrant: bool) -> None:
    case = make(Options(cell, num_layers=2))  # type: ignore[arg-type]
    expected = torch.autograd.grad(loss(outputs(case)), case.leaves)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return outputs(case.with_leaves(*leaves))

    loss(checkpoint(run, *case.leaves, use_reentrant=reentrant)).backward()
    got = tuple(x.grad for x in case.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_saved_tensors_pass_through_hooks() -> None:
    case = make(Options("LSTM", num_layers=2), "lengths")
    expected = torch.autograd.grad(loss(outputs(case)), case.leaves)
    packed = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(outputs(case))
    assert case.input.shape in packed
    torch.testing.assert_close(torch.autograd.grad(value, case.leaves), expected, rtol=0, atol=0)
    with torch.autograd.graph.save_on_cpu():
        value = loss(outputs(case))
    torch.testing.assert_close(torch.autograd.grad(value, case.leaves), expected, rtol=0, atol=0)


def test_graph_is_freed_without_the_garbage_collector(cell: str) -> None:
    gc.collect()
    gc.disable()
    try:
        case = make(Options(cell))  # type: ignore[arg-type]
        output, *_ = outputs(case)
        (d_x,) = torch.autograd.grad(output.sum(), case.input, create_graph=True)
        watched = [weakref.ref(x) for x in (output, d_x)]
        del output, d_x
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def test_operator_saves_by_itself_where_a_gradient_is_recorded() -> None:
    options = Options("LSTM", num_layers=2)
    case = make(options)
    given = operators.forward_op(
        case.input, *case.hx, case.weights, *(None,) * 8, options.text, False, False, False
    )[:3]
    got = torch.autograd.grad(loss(given), case.leaves)
    expected = torch.autograd.grad(loss(outputs(case)), case.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(cell: str, dtype: torch.dtype) -> None:
    options = Options(cell, num_layers=2, bidirectional=True)  # type: ignore[arg-type]
    case = make(options, "lengths-reset", dtype=dtype)
    ours, plain = outputs(case, return_states=True), by_operations(case, return_states=True)
    assert [y.dtype for y in ours] == [y.dtype for y in plain]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(loss(y), case.leaves) for y in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_masks_are_those_of_torch(cell: str, training: bool) -> None:
    theirs = getattr(torch.nn, cell)(3, 4, num_layers=3, dropout=0.4, bidirectional=True)
    theirs.double().train(training)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    options = Options(cell, num_layers=3, bidirectional=True)  # type: ignore[arg-type]
    torch.manual_seed(7)
    expected, final = theirs(x)
    torch.manual_seed(7)
    got, hx_n, states = recurrent(
        options,
        x,
        None,
        theirs._flat_weights,
        dropout=0.4 if training else 0.0,
        return_states=True,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    final = final if cell == "LSTM" else (final,)
    torch.testing.assert_close(hx_n, final, rtol=1e-12, atol=1e-12)
    assert states is not None
    torch.testing.assert_close(states.h[-1], expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.pow(2).sum(), theirs.parameters()) for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_dropout_masks_of_packed_data_are_those_of_torch(cell: str) -> None:
    theirs = getattr(torch.nn, cell)(3, 4, num_layers=2, dropout=0.4).double()
    x = torch.nn.utils.rnn.pack_sequence(
        [torch.randn(n, 3, dtype=torch.float64) for n in (5, 3, 3, 1)]
    )
    torch.manual_seed(7)
    expected, _ = theirs(x)
    torch.manual_seed(7)
    got, _, _ = recurrent(
        Options(cell, num_layers=2),  # type: ignore[arg-type]
        x.data,
        None,
        theirs._flat_weights,
        batch_sizes=x.batch_sizes,
        dropout=0.4,
    )
    torch.testing.assert_close(got, expected.data, rtol=1e-12, atol=1e-12)


def test_complex_numbers_take_the_composed_route(cell: str) -> None:
    case = make(Options(cell), dtype=torch.complex128)  # type: ignore[arg-type]
    with patch.object(composed, "forward", wraps=composed.forward) as route:
        assert gradcheck(
            lambda *leaves: outputs(case.with_leaves(*leaves)), case.leaves, fast_mode=True
        )
    assert route.called


def test_padding_may_hold_anything(cell: str) -> None:
    """Not even a NaN in the padding reaches an output or a gradient, on either route."""
    case = make(Options(cell, bidirectional=True), "lengths-reset")  # type: ignore[arg-type]
    expected = [y.detach() for y in outputs(case, return_states=True)]
    gradients = torch.autograd.grad(loss(outputs(case, return_states=True)), case.leaves)
    padding = torch.arange(case.input.shape[0])[:, None] >= case.steps["lengths"]
    spoilt = case._replace(
        input=case.input.detach().masked_fill(padding[..., None], torch.nan).requires_grad_()
    )
    for got in (outputs(spoilt, return_states=True), by_operations(spoilt, return_states=True)):
        torch.testing.assert_close([y.detach() for y in got], expected, rtol=1e-10, atol=1e-10)
        again = torch.autograd.grad(loss(got), spoilt.leaves)
        torch.testing.assert_close(again, gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # torch's own
def test_composed_route_under_transforms() -> None:
    case = make(Options("LSTM"), requires_grad=False)

    def run(x: Tensor) -> Tensor:
        return outputs(case._replace(input=x))[0]

    many = torch.stack([case.input, 2 * case.input])
    one_by_one = torch.stack([run(x) for x in many])
    torch.testing.assert_close(torch.func.vmap(run)(many), one_by_one, rtol=1e-10, atol=1e-10)
    tangent = torch.randn_like(case.input)
    _, along = torch.func.jvp(run, (case.input,), (tangent,))
    x = case.input.clone().requires_grad_()
    (back,) = torch.autograd.grad(run(x).sum(), x)
    torch.testing.assert_close(along.sum(), (back * tangent).sum(), rtol=1e-10, atol=1e-10)


def test_meta_device_gives_shapes() -> None:
    case = make(Options("LSTM", bidirectional=True), dtype=torch.bfloat16)
    on_meta = case.with_leaves(*(x.detach().to("meta").requires_grad_() for x in case.leaves))
    real = outputs(case, return_states=True)
    meta = outputs(on_meta, return_states=True)
    assert [(y.shape, y.dtype, y.stride()) for y in meta] == [
        (y.shape, y.dtype, y.stride()) for y in real
    ]
    gradients = torch.autograd.grad(sum(y.float().sum() for y in meta), on_meta.leaves)
    assert [g.shape for g in gradients] == [x.shape for x in case.leaves]


def test_autocast_leaves_the_dtypes_alone() -> None:
    case = make(Options("GRU"), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = (*outputs(case), *by_operations(case))
    assert {y.dtype for y in chain(values)} == {torch.float32}
