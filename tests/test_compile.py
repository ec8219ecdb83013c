"""torch.compile, torch.export and opcheck: a stack is one node, for any batch and any length."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from cases import LAYOUTS, STACKS
from fastrnn import functional
from fastrnn._options import Options
from fastrnn.calls import call, operators
from fastrnn.calls.call import recurrent
from operators import opcheck
from stacks import Arguments, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

every_step = pytest.mark.parametrize("steps", LAYOUTS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def runner(case: Arguments, **extra: Any) -> Callable[..., Any]:
    """The call as a function of the tensors, the step arrays last."""
    names = tuple(case.steps)

    def run(*tensors: Tensor) -> Any:
        count = len(case.leaves)
        given = case.with_leaves(*tensors[:count])
        return recurrent(
            case.options,
            given.input,
            given.hx,
            given.weights,
            **dict(zip(names, tensors[count:], strict=True)),
            extras=given.extras,
            **extra,
        )

    return run


def tensors_of(case: Arguments) -> tuple[Tensor, ...]:
    return (*case.leaves, *case.steps.values())


def flat(result: Any) -> list[Tensor]:
    output, hx_n, states = result
    return [output, *hx_n, *(s for s in states or () if s is not None)]


def gradients(case: Arguments, values: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(y.pow(2).sum() for y in values), case.leaves)


@pytest.mark.parametrize(
    ("stack", "steps"),
    [(stack, steps) for stack in STACKS for steps in ("lengths-reset", "packed")]
    + [("lstm-bidirectional-2", steps) for steps in ("padded", "lengths", "reset")],
)
def test_compiled_equals_eager(stack: str, steps: str) -> None:
    """Every stack with all that says which rows run; one stack with each part of that left out."""
    case = make(STACKS[stack], steps)
    run = runner(case, return_states=True)
    expected = flat(run(*tensors_of(case)))
    got = flat(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors_of(case)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(case, got), gradients(case, expected), rtol=0, atol=0)


def test_the_composed_route_compiles(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does for tensors on devices without kernels."""
    monkeypatch.setattr(call, "_route", lambda *_: call._composed_route)
    options = Options(cell, bidirectional=True)  # type: ignore[arg-type]
    case = make(options, "lengths-reset", sizes=(3, 3, 2, 3))  # every step is compiled
    run = runner(case, return_states=True)
    expected = flat(run(*tensors_of(case)))
    got = flat(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors_of(case)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = gradients(case, got), gradients(case, expected)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_compiled_without_gradient(cell: str) -> None:
    case = make(Options(cell, num_layers=2))  # type: ignore[arg-type]
    run = runner(case)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, got = flat(run(*tensors_of(case))), flat(compiled(*tensors_of(case)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_compiled_dropout_draws_the_masks_of_eager(cell: str) -> None:
    case = make(Options(cell, num_layers=3))  # type: ignore[arg-type]
    run = runner(case, dropout=0.5)
    torch.manual_seed(3)
    expected = flat(run(*tensors_of(case)))
    torch.manual_seed(3)
    got = flat(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors_of(case)))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_compiled_function_of_the_public_interface(cell: str) -> None:
    case = make(Options(cell, bidirectional=True), "lengths-reset")  # type: ignore[arg-type]
    function = getattr(functional, cell.lower())

    def run() -> Any:
        hx = case.hx if cell == "LSTM" else case.hx[0]
        return function(case.input, hx, case.weights, bidirectional=True, **case.steps)

    expected, _ = run()
    got, _ = torch.compile(run, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@every_step
def test_no_graph_breaks_and_one_node(cell: str, steps: str) -> None:
    options = Options(cell, num_layers=3, bidirectional=True)  # type: ignore[arg-type]
    case = make(options, steps)
    explained = torch._dynamo.explain(runner(case))(*tensors_of(case))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    called = [n.target for n in explained.graphs[0].graph.nodes if n.op == "call_function"]
    assert called.count(torch.ops.fastrnn.forward.default) == 1


def test_batch_and_steps_change_without_compiling_again(cell: str) -> None:
    options = Options(cell, num_layers=2, bidirectional=True)  # type: ignore[arg-type]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, hx, w: recurrent(options, x, hx, w), fullgraph=True, backend=counter
    )
    for t, b in ((5, 3), (9, 2), (2, 7), (31, 4)):
        case = make(options, sizes=(t, b, 2, 3))
        torch._dynamo.mark_dynamic(case.input, [0, 1])
        for state in case.hx:
            torch._dynamo.mark_dynamic(state, 1)
        got = flat(compiled(case.input, case.hx, case.weights))
        expected = flat(recurrent(options, case.input, case.hx, case.weights))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(gradients(case, got), gradients(case, expected), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_compiled_graph_does_not_grow_with_the_steps(cell: str) -> None:
    sizes = []
    for t in (3, 3000):
        torch._dynamo.reset()
        case = make(Options(cell), sizes=(t, 2, 2, 3))  # type: ignore[arg-type]
        counter = CompileCounterWithBackend("eager")
        torch.compile(runner(case), fullgraph=True, backend=counter)(*tensors_of(case))
        sizes.append(counter.op_count)
    assert sizes[0] == sizes[1]


class _Model(torch.nn.Module):
    def __init__(self, case: Arguments) -> None:
        super().__init__()
        self.options = case.options
        self.parameters_ = torch.nn.ParameterList(w.detach() for w in case.weights)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        output, hx_n, _ = recurrent(
            self.options, x.transpose(0, 1), None, list(self.parameters_), lengths=lengths
        )
        return output.transpose(0, 1), hx_n[0]


def test_export_with_dynamic_batch_and_steps(cell: str) -> None:
    model = _Model(make(Options(cell, num_layers=2, bidirectional=True)))  # type: ignore[arg-type]
    batch, steps = Dim("batch"), Dim("steps")

    def inputs(b: int, t: int) -> tuple[Tensor, Tensor]:
        return torch.randn(b, t, 2, dtype=torch.float64), torch.arange(b) % (t + 1)

    program = torch.export.export(
        model, inputs(3, 5), dynamic_shapes=({0: batch, 1: steps}, {0: batch})
    )
    nodes = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert nodes.count(torch.ops.fastrnn.forward.default) == 1
    exported = program.module()
    for b, t in ((3, 5), (2, 11), (8, 2)):
        x, lengths = inputs(b, t)
        with torch.no_grad():
            torch.testing.assert_close(exported(x, lengths), model(x, lengths), rtol=0, atol=0)


class _Seen(TorchDispatchMode):
    """The names of the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_dispatch_modes_and_the_profiler_see_the_operators(cell: str) -> None:
    case = make(Options(cell))  # type: ignore[arg-type]
    run = runner(case)
    with _Seen() as seen:
        gradients(case, flat(run(*case.leaves)))
    assert {"fastrnn::forward", "fastrnn::backward"} <= set(seen.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(case, flat(run(*case.leaves)))
    names = {event.key for event in profile.key_averages()}
    assert {"fastrnn::forward", "fastrnn::backward"} <= names


def test_fake_tensors_give_shapes(cell: str) -> None:
    case = make(Options(cell, bidirectional=True), "lengths")  # type: ignore[arg-type]
    expected = flat(runner(case)(*tensors_of(case)))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in tensors_of(case)]
        got = flat(runner(case)(*fake))
    assert [(y.shape, y.stride()) for y in got] == [(y.shape, y.stride()) for y in expected]


def test_negative_views_are_read_with_their_sign() -> None:
    case = make(Options("GRU"), requires_grad=False)
    numbers = torch.complex(case.input, -case.input)
    assert numbers.conj().imag.is_neg()
    run = runner(case)
    (got, *_), (expected, *_) = run(numbers.conj().imag, *case.leaves[1:]), run(*case.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    case = make(Options("LSTM", num_layers=2), dtype=torch.float32)

    def run(*leaves: Tensor) -> Tensor:
        output, (h_n, c_n), _ = runner(case)(*leaves)
        return (output.transpose(0, 1).tanh().sum(1) + h_n[0] * c_n[-1]).sum()

    expected = torch.autograd.grad(run(*case.leaves), case.leaves)
    compiled = torch.compile(run, fullgraph=True)
    got = torch.autograd.grad(compiled(*case.leaves), case.leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # for that see operators.py
@pytest.mark.parametrize(("operator", "cell"), [("forward", "GRU"), ("backward", "LSTM")])
def test_compiled_autograd_takes_the_gradient_of_an_operator(operator: str, cell: str) -> None:
    """Compiled autograd traces what eager operators have recorded, ours among them."""
    case = make(Options(cell), sizes=(2, 3, 2, 3))  # type: ignore[arg-type]
    arguments = forward_arguments(case, states=True, save=True)

    def loss() -> Tensor:
        output, h_n, _, hidden, cell, gates = operators.forward_op(*arguments)
        if operator == "forward":
            return output.square().sum() + h_n.sum()
        saved = [x.detach() for x in (hidden, cell, gates)]
        given = (*arguments[:12], *saved, None, None, None, torch.ones_like(h_n), None)
        needs = [x is not None for x in (*arguments[:3], *case.extras[:2])]
        needs += [True] * len(case.weights)
        found = operators.backward_op(*given, case.options.text, needs, False)
        return sum((d.square().sum() for d in found), torch.zeros(()))

    expected = torch.autograd.grad(loss(), case.leaves)
    recorded = loss()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        got = torch.autograd.grad(recorded, case.leaves)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---- opcheck -------------------------------------------------------------------------------------


def forward_arguments(case: Arguments, states: bool, save: bool) -> tuple[Any, ...]:
    h0, c0 = (*case.hx, None)[:2]
    steps = [case.steps.get(name) for name in ("batch_sizes", "lengths", "reset")]
    given = (case.input, h0, c0, case.weights, *steps, *case.extras)
    return (*given, case.options.text, states, save, False)


@pytest.mark.parametrize(
    ("stack", "steps"), [*((stack, "packed") for stack in STACKS), ("lstm-projected", "padded")]
)
def test_opcheck_forward(stack: str, steps: str) -> None:
    """Lengths and resets are in test_options.py, with every option and with none."""
    arguments = forward_arguments(make(STACKS[stack], steps), states=True, save=True)
    opcheck(torch.ops.fastrnn.forward.default, arguments)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_forward_without_gradient(cell: str, states: bool, dtype: torch.dtype) -> None:
    case = make(Options(cell, num_layers=2), dtype=dtype, requires_grad=False)  # type: ignore[arg-type]
    arguments = forward_arguments(case, states, save=False)
    opcheck(torch.ops.fastrnn.forward.default, arguments)


@pytest.mark.parametrize(
    ("stack", "steps", "which"),
    [
        *((stack, "packed", "some") for stack in STACKS),
        ("lstm-projected", "padded", "some"),
        ("lstm-projected", "packed", "all"),
    ],
)
def test_opcheck_backward(stack: str, steps: str, which: str) -> None:
    """All gradients, with lengths and resets, are in test_options.py."""
    options = STACKS[stack]
    case = make(options, steps, requires_grad=False)
    arguments = forward_arguments(case, states=True, save=True)
    output, h_n, c_n, hidden, cell, gates = operators.forward_op(*arguments)
    two = options.cell == "LSTM"
    d_output, d_hidden = torch.randn_like(output), torch.randn_like(hidden)
    d_cell = torch.randn_like(cell) if two else None
    d_c_n = torch.randn_like(c_n) if two else None
    needs = [
        True,
        True,
        two,
        *[x is not None for x in case.extras[:2]],
        *[True] * len(case.weights),
    ]
    if which == "some":
        d_hidden = d_cell = d_c_n = None
        needs = [k % 2 == 0 and need for k, need in enumerate(needs)]
    opcheck(
        torch.ops.fastrnn.backward.default,
        (
            *arguments[:12],
            hidden,
            cell,
            gates,
            d_output,
            d_hidden,
            d_cell,
            torch.randn_like(h_n),
            d_c_n,
            options.text,
            needs,
            False,
        ),
    )
