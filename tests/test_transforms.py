"""torch.func over the layers: what a transform gives equals what loops and autograd give.

`vmap` equals a loop to the bit, whatever is mapped, and is one call of the engine.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from cases import ALONE, EXTRAS, LAYOUTS, PAIRS, STACKS, Case
from fastrnn import _C, functional
from fastrnn._engine import NO_EXTRAS, Extras
from fastrnn._options import Options
from fastrnn.calls import by_program, composed, operators, program_torch
from fastrnn.calls.call import recurrent
from fastrnn.layers import random_masks
from operators import opcheck
from stacks import Arguments, make
from tolerances import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# torch's own, at its first forward-mode derivative
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

SIZE = 3  # of a mapped axis
every_stack = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS.keys())
every_step = pytest.mark.parametrize("steps", LAYOUTS)
MAPPED = {
    "input": ("input",),
    "states": ("hx",),
    "rows": ("input", "hx", "lengths", "reset", *Extras._fields[2:]),
    "weights": ("weights",),
    "everything": ("input", "hx", "weights", "lengths", "reset", *Extras._fields),
}
every_mapping = pytest.mark.parametrize("mapped", MAPPED)
every_option = pytest.mark.parametrize(
    "case", [*ALONE, *(case for case in PAIRS if case.layout == "packed")], ids=str
)
# Every option that has a derivative, in each cell.
TOGETHER = [
    Case(
        Options(cell, layer_norm=True, heads=2, peephole=cell == "LSTM", zoneout_h=0.3),
        layout,
        EXTRAS if cell == "LSTM" else EXTRAS[:-1],
    )
    for cell, layout in (("RNN", "packed"), ("LSTM", "reset"), ("GRU", "lengths-reset"))
]
options_together = pytest.mark.parametrize("case", TOGETHER, ids=str)


# ---- A stack as a function of a dictionary of arguments ------------------------------------------


def arguments_of(case: Arguments) -> dict[str, Any]:
    extras = {name: x for name, x in case.extras._asdict().items() if x is not None}
    return {"input": case.input, "hx": case.hx, "weights": case.weights, **case.steps, **extras}


def several(options: Options, steps: str, size: int = SIZE, **how: Any) -> list[dict[str, Any]]:
    """The arguments of several stacks; lengths and resets differ, batch_sizes do not."""
    found = []
    for k in range(size):
        given = arguments_of(make(options, steps, seed=k, requires_grad=False, **how))
        if "lengths" in given:
            given["lengths"] = given["lengths"].roll(k)
        found.append(given)
    return found


def several_with(case: Case, size: int = SIZE, **how: Any) -> list[dict[str, Any]]:
    """The same of a case with options; the masks and the states after a reset differ."""
    how = {"sizes": (4, 3, 2, 6), "extras": case.extras, **how}
    return several(case.options, case.layout, size, **how)


def choose(several: Sequence[dict[str, Any]], mapped: str) -> tuple[list[dict[str, Any]], Any]:
    """What is mapped differs, all else is the first one's; and the dimensions for `vmap`."""
    names = [name for name in MAPPED[mapped] if name in several[0]]
    each = [{**several[0], **{name: given[name] for name in names}} for given in several]
    dims = {
        name: dims_like(value, 0 if name in names else None) for name, value in several[0].items()
    }
    return each, dims


def dims_like(value: Any, dim: int | None) -> Any:
    return type(value)(dim for _ in value) if isinstance(value, (tuple, list)) else dim


def stacked(each: Sequence[dict[str, Any]], dims: dict[str, Any]) -> dict[str, Any]:
    """One argument for `vmap`: stacked where it is mapped."""

    def stack(values: Sequence[Any], dim: Any) -> Any:
        if isinstance(dim, (tuple, list)):
            return type(dim)(stack(parts, d) for *parts, d in zip(*values, dim, strict=True))
        return values[0] if dim is None else torch.stack(list(values), dim)

    return {name: stack([given[name] for given in each], dims[name]) for name in dims}


def run(options: Options, given: dict[str, Any], **extra: Any) -> tuple[Tensor, ...]:
    """Output, final states and all states, flat."""
    extras = Extras(**{name: given[name] for name in Extras._fields if name in given})
    rest = {name: value for name, value in given.items() if name not in Extras._fields}
    output, hx_n, states = recurrent(options, return_states=True, extras=extras, **rest, **extra)
    return (output, *hx_n, *(s for s in states or () if s is not None))


def weighted(values: Sequence[Tensor]) -> Tensor:
    """A scalar that depends on every element of every output differently."""
    total = values[0].new_zeros(())
    for k, y in enumerate(values):
        weight = torch.linspace(-1, 1 + k, y.numel(), dtype=y.dtype).view(y.shape)
        total = total + (weight * y).sum()
    return total


def transposed(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], quantity: str) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert_close(a.detach(), b.detach(), str(b.dtype).removeprefix("torch."), quantity)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often the engine's cells or its programs are entered meanwhile, and how often the
    composed route is taken."""
    names = {"Call": "forward", "layer": "layer"}
    names |= dict.fromkeys(("backward", "forward_members", "backward_members"), "")
    calls: dict[str, int] = {}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            result = function(*arguments, **more)
            if result is not None or name != "layer":  # None: the call goes another way
                calls[name] = calls.get(name, 0) + 1
            return result

        return call

    with (
        patch.multiple(_C, **{n: count(label or n, getattr(_C, n)) for n, label in names.items()}),
        patch.object(composed, "forward", count("composed", composed.forward)),
        patch.multiple(
            program_torch,
            _ProgramCall=count("program", program_torch._ProgramCall),
            _by_program=count("program_backward", program_torch._by_program),
        ),
    ):
        yield calls


class ByEach(TorchDispatchMode):
    """Sees to it that a kernel for one member after the other gives the bits of the ensemble's."""

    kernels: ClassVar = {
        operators.forward_members_op: operators._forward_of_each,
        operators.backward_members_op: operators._backward_of_each,
    }
    compared = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if func in self.kernels:
            assert_equal(tuple(self.kernels[func](*args)), tuple(result))
            self.compared += 1
        return result


# ---- vmap ----------------------------------------------------------------------------------------


@every_stack
@every_step
def test_one_member_after_the_other(options: Options, steps: str) -> None:
    each, dims = choose(several(options, steps), "everything")
    given = stacked(each, dims)
    for x in (given["input"], *given["hx"], *given["weights"]):
        x.requires_grad_()
    with ByEach() as mode:
        weighted(vmap(partial(run, options), in_dims=(dims,))(given)).backward()
    assert mode.compared == 2


@every_stack
@every_step
@every_mapping
def test_vmap_equals_a_loop(options: Options, steps: str, mapped: str) -> None:
    each, dims = choose(several(options, steps), mapped)
    expected = transposed([run(options, given) for given in each])
    with counted() as calls:
        got = vmap(partial(run, options), in_dims=(dims,))(stacked(each, dims))
    assert_equal(got, expected)
    assert calls == {"forward_members" if "weights" in MAPPED[mapped] else "forward": 1}


@every_mapping
def test_gradients_through_vmap_equal_those_of_a_loop(cell: str, mapped: str) -> None:
    options = Options(cell, num_layers=2, bidirectional=True)  # type: ignore[arg-type]
    each, dims = choose(several(options, "lengths-reset"), mapped)
    given = stacked(each, dims)
    leaves = [given["input"], *given["hx"], *given["weights"]]
    for x in leaves:
        x.requires_grad_()
    with counted() as calls:
        values = vmap(partial(run, options), in_dims=(dims,))(given)
        got = torch.autograd.grad(weighted(values), leaves)
    kind = "_members" if "weights" in MAPPED[mapped] else ""
    assert calls == {f"forward{kind}": 1, f"backward{kind}": 1}
    part = partial(part_of, given, dims)
    loop = transposed([run(options, part(k)) for k in range(SIZE)])
    expected = torch.autograd.grad(weighted(loop), leaves)
    assert_near(got, expected, "d_weight")


@every_option
@pytest.mark.parametrize("mapped", ["rows", "everything"])
def test_vmap_of_options_equals_a_loop(case: Case, mapped: str) -> None:
    each, dims = choose(several_with(case), mapped)
    given = stacked(each, dims)
    leaves = leaves_of(given)
    for x in leaves:
        x.requires_grad_()
    with counted() as calls:
        got = vmap(partial(run, case.options), in_dims=(dims,))(given)
        found = torch.autograd.grad(weighted(got), leaves)
    assert calls == calls_of_options(case, mapped == "everything")
    part = partial(part_of, given, dims)
    loop = transposed([run(case.options, part(k)) for k in range(SIZE)])
    assert_equal(got, loop)
    assert_near(found, torch.autograd.grad(weighted(loop), leaves), "d_weight")


def calls_of_options(case: Case, members: bool) -> dict[str, int]:
    """Those of a case forward and backward."""
    # h stands for both states after a reset.
    names = ("reset_hx", "", "dropout", "zoneout_h", "zoneout_c")
    given = Extras(*(name if name in case.extras else None for name in names))
    return calls_of(case.options, given, members=members)


def calls_of(
    options: Options, extras: Extras = NO_EXTRAS, *, members: bool = True, backward: bool = True
) -> dict[str, int]:
    """How the engine is entered: for its cells once, for an ensemble of programs by each member."""
    kind, times = ("_members", SIZE) if members else ("", 1)
    calls = {"program": times} if by_program.takes(options, extras) else {f"forward{kind}": 1}
    if backward:
        programs = by_program.takes_backward(options, extras)
        calls |= {"program_backward": times} if programs else {f"backward{kind}": 1}
    return calls


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    """The arguments that have gradients."""
    anew = [given[name] for name in ("reset_h", "reset_c") if name in given]
    return [given["input"], *given["hx"], *given["weights"], *anew]


def part_of(given: dict[str, Any], dims: dict[str, Any], k: int) -> dict[str, Any]:
    def select(value: Any, dim: Any) -> Any:
        if isinstance(dim, (tuple, list)):
            return type(dim)(select(v, d) for v, d in zip(value, dim, strict=True))
        return value if dim is None else value.select(dim, k)

    return {name: select(value, dims[name]) for name, value in given.items()}


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_second_derivatives_through_vmap(options: Options, steps: str) -> None:
    each, dims = choose(several(options, steps, 2, sizes=(3, 3, 2, 2)), "everything")
    given = stacked(each, dims)
    leaves = tuple(x.requires_grad_() for x in (given["input"], *given["hx"], *given["weights"]))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        states = len(given["hx"])
        now = {
            **given,
            "input": leaves[0],
            "hx": leaves[1 : 1 + states],
            "weights": list(leaves[1 + states :]),
        }
        return vmap(partial(run, options), in_dims=(dims,))(now)

    assert gradgradcheck(function, leaves, fast_mode=True)


@options_together
def test_second_derivatives_through_vmap_of_options(case: Case) -> None:
    each, dims = choose(several_with(case, 2, sizes=(3, 3, 2, 4)), "everything")
    given = stacked(each, dims)
    names = ("input", "hx", "weights", *(n for n in ("reset_h", "reset_c") if n in given))
    counts = [len(given[n]) if n in ("hx", "weights") else 1 for n in names]
    leaves = tuple(x.requires_grad_() for x in leaves_of(given))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest, now = list(leaves), dict(given)
        for name, count in zip(names, counts, strict=True):
            taken, rest = rest[:count], rest[count:]
            now[name] = type(given[name])(taken) if name in ("hx", "weights") else taken[0]
        return vmap(partial(run, case.options), in_dims=(dims,))(now)

    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapped", ["rows", "everything"])
def test_vmap_equals_a_loop_in_other_dtypes(cell: str, dtype: torch.dtype, mapped: str) -> None:
    options = Options(cell, num_layers=2)  # type: ignore[arg-type]
    sizes = (5, 2, 3, 17)
    each, dims = choose(several(options, "lengths-reset", dtype=dtype, sizes=sizes), mapped)
    expected = transposed([run(options, given) for given in each])
    assert_equal(vmap(partial(run, options), in_dims=(dims,))(stacked(each, dims)), expected)


@pytest.mark.parametrize("weights_outside", [True, False])
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_vmap_of_vmap_is_one_call(cell: str, weights_outside: bool, steps: str) -> None:
    """Every member of an ensemble over every one of several inputs."""
    options = Options(cell, bidirectional=True)  # type: ignore[arg-type]
    members, inputs = several(options, steps), several(options, steps, 2)
    weights = [torch.stack(ws) for ws in zip(*(m["weights"] for m in members), strict=True)]
    x = torch.stack([given["input"] for given in inputs])
    rest = {name: v for name, v in members[0].items() if name not in ("input", "weights")}

    def one(weights: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        return run(options, {**rest, "weights": weights, "input": x})

    over_weights, over_inputs = {"in_dims": (0, None)}, {"in_dims": (None, 0)}
    with counted() as calls:
        if weights_outside:
            got = vmap(vmap(one, **over_inputs), **over_weights)(weights, x)
        else:
            got = vmap(vmap(one, **over_weights), **over_inputs)(weights, x)
            got = tuple(y.transpose(0, 1) for y in got)
    assert calls == {"forward_members": 1}
    expected = transposed(
        [transposed([one(m["weights"], g["input"]) for g in inputs]) for m in members]
    )
    assert_equal(got, expected)


def test_vmap_of_vmap_over_weights_is_one_call(cell: str) -> None:
    options = Options(cell)  # type: ignore[arg-type]
    members = several(options, "lengths", 6)
    weights = [
        torch.stack(ws).unflatten(0, (2, 3))
        for ws in zip(*(m["weights"] for m in members), strict=True)
    ]
    rest = {name: v for name, v in members[0].items() if name != "weights"}

    def one(weights: list[Tensor]) -> tuple[Tensor, ...]:
        return run(options, {**rest, "weights": weights})

    with counted() as calls:
        got = vmap(vmap(one))(weights)
    assert calls == {"forward_members": 1}
    expected = transposed([one(m["weights"]) for m in members])
    assert_equal(tuple(y.flatten(0, 1) for y in got), expected)


def test_in_dims_out_dims_and_chunks(cell: str) -> None:
    case = make(Options(cell), requires_grad=False)  # type: ignore[arg-type]
    many = torch.randn(4, 3, 7, 2, dtype=torch.float64)

    def one(x: Tensor) -> tuple[Tensor, Tensor]:
        output, hx_n, _ = recurrent(case.options, x, case.hx, case.weights)
        return output, hx_n[0]

    loop = [one(many[:, :, k]) for k in range(7)]
    expected = torch.stack([y for y, _ in loop], 1), torch.stack([h for _, h in loop], 3)
    assert_equal(vmap(one, in_dims=2, out_dims=(1, 3))(many), expected)
    with counted() as calls:
        assert_equal(vmap(one, in_dims=2, out_dims=(1, 3), chunk_size=3)(many), expected)
    assert calls == {"forward": 3}


def test_some_weights_may_be_mapped_alone(cell: str) -> None:
    case = make(Options(cell), requires_grad=False)  # type: ignore[arg-type]
    biases = torch.randn(SIZE, *case.weights[2].shape, dtype=torch.float64)

    def one(bias: Tensor) -> tuple[Tensor, ...]:
        weights = [*case.weights[:2], bias, case.weights[3]]
        return run(case.options, {**arguments_of(case), "weights": weights})

    with counted() as calls:
        got = vmap(one)(biases)
    assert calls == {"forward_members": 1}
    assert_equal(got, transposed([one(bias) for bias in biases]))


def test_an_ensemble_gives_the_same_bits_on_any_number_of_threads(cell: str) -> None:
    options = Options(cell, num_layers=2, bidirectional=True)  # type: ignore[arg-type]
    size = 5
    each, dims = choose(several(options, "lengths", size, sizes=(20, 8, 16, 64)), "everything")
    given = stacked(each, dims)

    def outcome() -> tuple[Tensor, ...]:
        leaves = [w.detach().requires_grad_() for w in given["weights"]]
        values = vmap(partial(run, options), in_dims=(dims,))({**given, "weights": leaves})
        return (*values, *torch.autograd.grad(weighted(values), leaves))

    torch.set_num_threads(1)
    expected = outcome()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_equal(outcome(), expected)


def test_a_backward_pass_is_mapped_by_itself(cell: str) -> None:
    """vmap over autograd, of a graph that was recorded without transforms."""
    case = make(Options(cell, num_layers=2))  # type: ignore[arg-type]

    def pull(output: Tensor, d: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            output, case.leaves, d, retain_graph=True, create_graph=create_graph
        )

    output, *_ = run(case.options, arguments_of(case))
    many = torch.randn(SIZE, *output.shape, dtype=torch.float64)
    expected = transposed([pull(output, d) for d in many])
    for _ in range(2):  # the second time forward runs again
        with counted() as calls:
            got = vmap(lambda d: pull(output, d))(many)
        assert calls["backward_members"] == 1
        assert_near(got, expected, "d_weight")
    got = vmap(lambda d: pull(output, d, create_graph=True))(many)
    expected = transposed([pull(output, d, create_graph=True) for d in many])
    assert_near(got, expected, "d_weight")
    second = [torch.autograd.grad(weighted(y), case.weights[1])[0] for y in (got, expected)]
    assert_near(second[:1], second[1:], "d_weight")


@pytest.mark.parametrize("own", [{}, {"layer_norm": True, "recompute": True}], ids=str)
@pytest.mark.parametrize("return_states", [False, True])
def test_is_grads_batched(cell: str, return_states: bool, own: dict[str, Any]) -> None:
    """The vmap of autograd itself, which is not torch.func's."""
    case = make(Options(cell, num_layers=2, **own))  # type: ignore[arg-type]
    output, *_ = recurrent(**arguments_of(case), options=case.options, return_states=return_states)
    many = torch.randn(SIZE, *output.shape, dtype=torch.float64)
    loop = [torch.autograd.grad(output, case.leaves, d, retain_graph=True) for d in many]
    with counted() as calls:
        got = torch.autograd.grad(output, case.leaves, many, is_grads_batched=True)
    of_members = calls_of(case.options)
    for name in {"backward_members", "program_backward"} & of_members.keys():
        assert calls[name] == of_members[name]
    assert_near(got, transposed(loop), "d_weight")

    def function(x: Tensor) -> Tensor:
        return recurrent(case.options, x, case.hx, case.weights)[0]

    jacobian = torch.autograd.functional.jacobian
    by_rows, at_once = (jacobian(function, case.input, vectorize=v) for v in (False, True))
    assert_near([at_once], [by_rows], "d_input")


def test_an_axis_without_places_is_refused(cell: str) -> None:
    layer = getattr(fastrnn, cell)(2, 3)
    with pytest.raises(RuntimeError, match="expected a mapped axis of size 1 or more, got size 0"):
        vmap(lambda x: layer(x)[0])(torch.randn(0, 5, 4, 2))


# ---- Modules -------------------------------------------------------------------------------------

LAYERS = {
    "RNN": lambda: fastrnn.RNN(2, 3, nonlinearity="relu"),
    "LSTM": lambda: fastrnn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2),
    "GRU": lambda: fastrnn.GRU(2, 3, batch_first=True, reset_after=False),
    "RNNCell": lambda: fastrnn.RNNCell(2, 3),
    "LSTMCell": lambda: fastrnn.LSTMCell(2, 3),
    "GRUCell": lambda: fastrnn.GRUCell(2, 3, bias=False),
    "options RNN": lambda: drawn(
        fastrnn.RNN(2, 4, layer_norm=True, heads=2, learn_initial_state=True, grad_clip=0.5)
    ),
    "options LSTM": lambda: drawn(
        fastrnn.LSTM(
            *(2, 4),
            num_layers=2,
            bidirectional=True,
            peephole=True,
            layer_norm=True,
            learn_initial_state=True,
        )
    ),
    "heads LSTM": lambda: fastrnn.LSTM(2, 4, heads=2, proj_size=2, zoneout=(0.1, 0.3)).eval(),
    "options GRU": lambda: drawn(
        fastrnn.GRU(*(2, 4), heads=2, reset_after=False, learn_initial_state=True, recompute=True)
    ),
    "options LSTMCell": lambda: drawn(
        fastrnn.LSTMCell(2, 4, peephole=True, layer_norm=True, learn_initial_state=True)
    ),
}


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other parameters: gains and learned states start alike in all of them."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


every_layer = pytest.mark.parametrize("name", LAYERS)


def flat(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(y for v in value for y in flat(v))


def input_for(name: str, rows: int = 4) -> Tensor:
    return torch.randn(rows, 2) if name.endswith("Cell") else torch.randn(5, rows, 2)


@every_layer
@pytest.mark.parametrize("shared_input", [True, False])
def test_an_ensemble_of_modules_equals_a_loop(name: str, shared_input: bool) -> None:
    models = [LAYERS[name]() for _ in range(SIZE)]
    parameters, buffers = stack_module_state(models)
    x = input_for(name) if shared_input else torch.stack([input_for(name) for _ in models])

    def one(parameters: Any, buffers: Any, x: Tensor) -> tuple[Tensor, ...]:
        return flat(functional_call(models[0], (parameters, buffers), (x,)))

    in_dims = (0, 0, None if shared_input else 0)
    xs = [x] * SIZE if shared_input else list(x)
    with counted() as calls:
        got = vmap(one, in_dims=in_dims)(parameters, buffers, x)
    assert calls == calls_of(models[0]._options, backward=False)
    assert_equal(got, transposed([flat(m(x)) for m, x in zip(models, xs, strict=True)]))


@every_layer
def test_an_ensemble_trains_as_each_model_by_itself(name: str) -> None:
    models = [LAYERS[name]() for _ in range(SIZE)]
    parameters, buffers = stack_module_state(models)
    x = input_for(name)

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return weighted(flat(functional_call(models[0], (parameters, buffers), (x,))))

    with counted() as calls:
        losses = vmap(loss, in_dims=(0, 0, None))(parameters, buffers, x)
        losses.sum().backward()
    assert calls == calls_of(models[0]._options)
    each = [torch.autograd.grad(weighted(flat(m(x))), tuple(m.parameters())) for m in models]
    got = [parameters[n].grad for n, _ in models[0].named_parameters()]
    assert_near(got, transposed(each), "d_weight")


@every_layer
def test_per_sample_gradients_equal_a_loop(name: str) -> None:
    model = LAYERS[name]()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    many = torch.stack([input_for(name, rows=1) for _ in range(SIZE)])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return weighted(flat(functional_call(model, parameters, (x,))))

    with counted() as calls:
        got = vmap(grad(loss), in_dims=(None, 0))(parameters, many)
    assert calls == calls_of(model._options)
    own = tuple(model.parameters())
    each = [torch.autograd.grad(weighted(flat(model(x))), own) for x in many]
    assert_near(list(got.values()), transposed(each), "d_weight")


def test_members_restart_from_their_own_learned_states(cell: str) -> None:
    options = {"bidirectional": True, "learn_initial_state": True}
    models = [drawn(getattr(fastrnn, cell)(2, 3, **options)) for _ in range(SIZE)]
    parameters, _ = stack_module_state(models)
    x, reset = torch.randn(SIZE, 5, 4, 2), torch.rand(SIZE, 5, 4) < 0.4

    def one(parameters: dict[str, Tensor], x: Tensor, reset: Tensor) -> Tensor:
        return weighted(flat(functional_call(models[0], parameters, (x,), {"reset": reset})))

    with counted() as calls:
        got = vmap(one)(parameters, x, reset)
        got.sum().backward()
    assert calls == calls_of(models[0]._options, Extras(reset_h="given"))
    losses = [weighted(flat(m(x, reset=r))) for m, x, r in zip(models, x, reset, strict=True)]
    assert_near([got], [torch.stack(losses)], "output")
    each = [
        torch.autograd.grad(y, tuple(m.parameters())) for m, y in zip(models, losses, strict=True)
    ]
    own = [parameters[n].grad for n, _ in models[0].named_parameters()]
    assert_near(own, transposed(each), "d_weight")


def test_layers_take_lengths_resets_and_single_sequences_under_vmap(cell: str) -> None:
    layer = getattr(fastrnn, cell)(2, 3, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(SIZE, 5, 2), torch.tensor([5, 0, 3])
    reset = torch.rand(SIZE, 5) < 0.4

    def one(x: Tensor, length: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
        values = layer(x, lengths=length, reset=reset, return_states=True)
        return tuple(flat_states(values))

    with counted() as calls, torch.no_grad():
        got = vmap(one)(x, lengths, reset)
    assert calls == {"forward": 1}
    with torch.no_grad():
        loop = [one(*values) for values in zip(x, lengths, reset, strict=True)]
    assert_equal(got, transposed(loop))


def flat_states(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from flat_states(value)


def test_functions_take_what_vmap_and_grad_give(cell: str) -> None:
    case = make(Options(cell), "lengths-reset", requires_grad=False)  # type: ignore[arg-type]
    function = getattr(functional, cell.lower())
    hx = case.hx if cell == "LSTM" else case.hx[0]
    many = torch.randn(SIZE, *case.input.shape, dtype=torch.float64)
    lengths = torch.stack([case.steps["lengths"].roll(k) for k in range(SIZE)])

    def one(x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = function(x, hx, case.weights, lengths=lengths, reset=case.steps["reset"])
        return output

    got = vmap(one)(many, lengths)
    assert_equal(got, torch.stack([one(*v) for v in zip(many, lengths, strict=True)]))
    (d_x,) = torch.autograd.grad(one(x := many[0].requires_grad_(), lengths[0]).sum(), x)
    assert_near([grad(lambda x: one(x, lengths[0]).sum())(many[0])], [d_x], "d_input")


def test_autocast_under_vmap_equals_a_loop(cell: str) -> None:
    layer, many = getattr(fastrnn, cell)(2, 3), torch.randn(SIZE, 5, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got = vmap(lambda x: flat(layer(x)))(many)
        assert_equal(got, transposed([flat(layer(x)) for x in many]))


# ---- Packed sequences ----------------------------------------------------------------------------


def test_packed_sequences_under_vmap(cell: str) -> None:
    """Data may be mapped, of the same lengths all along the axis; so may the weights be."""
    layer = getattr(fastrnn, cell)(2, 3)
    packed = pack_padded_sequence(torch.randn(5, 4, 2), [5, 2, 3, 5], enforce_sorted=False)
    many = torch.randn(SIZE, *packed.data.shape)

    def one(data: Tensor) -> tuple[Tensor, ...]:
        output, hx_n = layer(packed._replace(data=data))
        return (output.data, *flat(hx_n))

    with torch.no_grad():
        assert_equal(vmap(one)(many), transposed([one(data) for data in many]))
    models = [getattr(fastrnn, cell)(2, 3) for _ in range(SIZE)]
    parameters, _ = stack_module_state(models)

    def member(parameters: Any) -> tuple[Tensor, ...]:
        output, hx_n = functional_call(models[0], parameters, (packed,))
        return (output.data, *flat(hx_n))

    expected = []
    for model in models:
        output, hx_n = model(packed)
        expected.append((output.data, *flat(hx_n)))
    assert_equal(vmap(member)(parameters), transposed(expected))


def test_batch_sizes_cannot_be_mapped(cell: str) -> None:
    layer = getattr(fastrnn, cell)(2, 3)
    data, batch_sizes = torch.randn(2, 5, 2), torch.tensor([[3, 2], [4, 1]])
    with pytest.raises(RuntimeError, match=r"batch_sizes of a PackedSequence cannot be mapped"):
        vmap(lambda x, sizes: layer(PackedSequence(x, sizes))[0].data)(data, batch_sizes)
    case = make(Options(cell), "packed", requires_grad=False)  # type: ignore[arg-type]
    sizes = torch.stack([case.steps["batch_sizes"]] * 2)
    with pytest.raises(RuntimeError, match=r"batch_sizes of a PackedSequence cannot be mapped"):
        vmap(lambda s: recurrent(case.options, case.input, None, case.weights, batch_sizes=s)[0])(
            sizes
        )


# ---- Derivatives ---------------------------------------------------------------------------------


def loss_of(case: Arguments) -> Callable[..., Tensor]:
    """A scalar of the leaves."""

    def loss(*leaves: Tensor) -> Tensor:
        return weighted(run(case.options, arguments_of(case.with_leaves(*leaves))))

    return loss


@every_stack
@every_step
def test_grad_equals_autograd(options: Options, steps: str) -> None:
    case = make(options, steps)
    expected = torch.autograd.grad(loss_of(case)(*case.leaves), case.leaves)
    leaves = tuple(x.detach() for x in case.leaves)
    with counted() as calls:
        got = grad(loss_of(case), argnums=tuple(range(len(leaves))))(*leaves)
    assert calls == {"forward": 1, "backward": 1}
    assert_near(got, expected, "d_weight")


def test_grad_of_the_output_alone(cell: str) -> None:
    case = make(Options(cell, num_layers=2))  # type: ignore[arg-type]

    def loss(*leaves: Tensor) -> Tensor:
        given = arguments_of(case.with_leaves(*leaves))
        return recurrent(case.options, **given)[0].pow(2).sum()

    expected = torch.autograd.grad(loss(*case.leaves), case.leaves)
    leaves = tuple(x.detach() for x in case.leaves)
    assert_near(grad(loss, argnums=tuple(range(len(leaves))))(*leaves), expected, "d_weight")


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_jvp_equals_finite_differences(options: Options, steps: str) -> None:
    case = make(options, steps, requires_grad=False)
    tangents = tuple(torch.randn_like(x) for x in case.leaves)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return run(options, arguments_of(case.with_leaves(*leaves)))

    _, got = jvp(function, case.leaves, tangents)
    h = 1e-6
    above = function(*(x + h * t for x, t in zip(case.leaves, tangents, strict=True)))
    below = function(*(x - h * t for x, t in zip(case.leaves, tangents, strict=True)))
    expected = [(a - b) / (2 * h) for a, b in zip(above, below, strict=True)]
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, "finite differences", "d_input")
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(case.leaves, tangents, strict=True)]
        again = [forward_ad.unpack_dual(y).tangent for y in function(*duals)]
    assert_near(again, got, "d_input")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own
def test_linearize_equals_jvp(cell: str) -> None:
    case = make(Options(cell), requires_grad=False)  # type: ignore[arg-type]

    def function(x: Tensor) -> Tensor:
        return run(case.options, {**arguments_of(case), "input": x})[0]

    tangent = torch.randn_like(case.input)
    _, push = linearize(function, case.input)
    _, expected = jvp(function, (case.input,), (tangent,))
    assert_near([push(tangent)], [expected], "d_input")


@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_jacrev_equals_jacfwd(cell: str, steps: str) -> None:
    options = Options(cell, num_layers=2)  # type: ignore[arg-type]
    case = make(options, steps, requires_grad=False, sizes=(3, 3, 2, 2))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return run(options, arguments_of(case.with_leaves(*leaves)))

    every = tuple(range(len(case.leaves)))
    with counted() as calls:
        backwards = jacrev(function, argnums=every)(*case.leaves)
    assert "composed" not in calls
    forwards = jacfwd(function, argnums=every)(*case.leaves)
    for rows, columns in zip(backwards, forwards, strict=True):
        assert_near(rows, columns, "d_weight")
    few = jacrev(function, argnums=every, chunk_size=2)(*case.leaves)
    for rows, columns in zip(few, forwards, strict=True):
        assert_near(rows, columns, "d_weight")


def expected_hessian(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    rows = [torch.autograd.grad(d, x, retain_graph=True)[0] for d in first.flatten()]
    return torch.stack(rows).view(*x.shape, *x.shape)


SECOND: dict[str, Callable[[Any], Any]] = {
    "hessian": hessian,
    "jacfwd-jacrev": lambda f: jacfwd(jacrev(f)),
    "jacrev-jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacrev-jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd-jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev-grad": lambda f: jacrev(grad(f)),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("steps", ["padded", "lengths-reset"])
def test_second_derivatives_equal_autograd(cell: str, second: str, steps: str) -> None:
    options = Options(cell, bidirectional=True)  # type: ignore[arg-type]
    case = make(options, steps, requires_grad=False, sizes=(3, 2, 2, 2))
    for name in ("input", "weight"):
        at = 0 if name == "input" else 1 + len(case.hx)

        def loss(x: Tensor, at: int = at) -> Tensor:
            leaves = [*case.leaves[:at], x, *case.leaves[at + 1 :]]
            return weighted(run(options, arguments_of(case.with_leaves(*leaves)))).tanh()

        x = case.leaves[at]
        assert_near([SECOND[second](loss)(x)], [expected_hessian(loss, x)], "d_weight")


def test_grad_of_grad_and_third_derivative(cell: str) -> None:
    case = make(Options(cell), requires_grad=False)  # type: ignore[arg-type]

    def loss(x: Tensor) -> Tensor:
        return weighted(run(case.options, {**arguments_of(case), "input": x})).tanh()

    def norm_of_grad(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: grad(f)(x).pow(2).sum()

    def expected(order: int) -> Tensor:
        x = case.input.detach().requires_grad_()
        value = loss(x)
        for _ in range(order - 1):
            (d,) = torch.autograd.grad(value, x, create_graph=True)
            value = d.pow(2).sum()
        return torch.autograd.grad(value, x)[0]

    assert_near([grad(norm_of_grad(loss))(case.input)], [expected(2)], "d_weight")
    third = grad(norm_of_grad(norm_of_grad(loss)))(case.input)
    assert_near([third], [expected(3)], "d_weight")


def test_per_sample_hessians_and_jacobians(cell: str) -> None:
    case = make(Options(cell), requires_grad=False, sizes=(2, 1, 2, 2))  # type: ignore[arg-type]

    def loss(x: Tensor) -> Tensor:
        return weighted(run(case.options, {**arguments_of(case), "input": x})).tanh()

    many = torch.randn(SIZE, *case.input.shape, dtype=torch.float64)
    expected = torch.stack([expected_hessian(loss, x) for x in many])
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(grad(f))):
        assert_near([vmap(second(loss))(many)], [expected], "d_weight")
    expected = torch.stack([grad(loss)(x) for x in many])
    for first in (jacrev, jacfwd, grad):
        assert_near([vmap(first(loss))(many)], [expected], "d_weight")
    jacobian = jacrev(vmap(loss))(many)  # nothing off the diagonal
    assert_near([jacobian.diagonal(dim1=0, dim2=1).movedim(-1, 0)], [expected], "d_weight")


def test_per_sample_gradients_of_every_member(cell: str) -> None:
    """vmap over members of vmap over samples of grad: one call forward, one backward."""
    options = Options(cell)  # type: ignore[arg-type]
    members, inputs = several(options, "lengths"), several(options, "padded", 2)
    weights = [torch.stack(ws) for ws in zip(*(m["weights"] for m in members), strict=True)]
    x = torch.stack([given["input"] for given in inputs])
    lengths = members[0]["lengths"]

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        return weighted(recurrent(options, x, None, weights, lengths=lengths)[0:1])

    with counted() as calls:
        got = vmap(vmap(grad(loss), (None, 0)), (0, None))(weights, x)
    assert calls == {"forward_members": 1, "backward_members": 1}
    for m, member in enumerate(members):
        for k, given in enumerate(inputs):
            own = [w.detach().requires_grad_() for w in member["weights"]]
            expected = torch.autograd.grad(loss(own, given["input"]), own)
            assert_near([d[m, k] for d in got], expected, "d_weight")


@every_option
def test_per_sample_gradients_of_options(case: Case) -> None:
    each, dims = choose(several_with(case), "rows")
    given = stacked(each, dims)
    shared = [name for name in ("weights", "reset_h", "reset_c") if name in given]
    leaves = {name: given.pop(name) for name in shared}

    def loss(leaves: dict[str, Any], given: dict[str, Any]) -> Tensor:
        return weighted(run(case.options, {**given, **leaves}))

    rest = {name: dims[name] for name in given}
    with counted() as calls:
        got = vmap(grad(loss), in_dims=(None, rest))(leaves, given)
    assert calls == calls_of_options(case, members=True)
    own = [x.requires_grad_() for x in flat(leaves.values())]
    loop = [torch.autograd.grad(loss(leaves, part_of(given, rest, k)), own) for k in range(SIZE)]
    assert_near(flat(got.values()), transposed(loop), "d_weight")


@options_together
def test_forward_mode_of_an_ensemble_with_options(case: Case) -> None:
    each, dims = choose(several_with(case), "everything")
    given = stacked(each, dims)

    def along(given: dict[str, Any], weights: list[Tensor]) -> tuple[Tensor, ...]:
        def function(weights: list[Tensor]) -> tuple[Tensor, ...]:
            return run(case.options, {**given, "weights": weights})

        return jvp(function, (given["weights"],), (weights,))[1]

    tangents = [torch.randn_like(w) for w in given["weights"]]
    got = vmap(along, in_dims=(dims, 0))(given, tangents)
    loop = [along(one, [t[k] for t in tangents]) for k, one in enumerate(each)]
    assert_near(got, transposed(loop), "d_input")

    def ensemble(weights: list[Tensor]) -> tuple[Tensor, ...]:
        return vmap(partial(run, case.options), in_dims=(dims,))({**given, "weights": weights})

    assert_near(jvp(ensemble, (given["weights"],), (tangents,))[1], got, "d_input")


def test_a_gradient_penalty_over_an_ensemble(cell: str) -> None:
    """Autograd outside, vmap of grad inside: a loss that holds per-sample gradients."""
    options = Options(cell)  # type: ignore[arg-type]
    each, dims = choose(several(options, "reset"), "everything")
    given = stacked(each, dims)
    leaves = [w.requires_grad_() for w in given["weights"]]

    def penalty(given: dict[str, Any]) -> Tensor:
        def value(x: Tensor) -> Tensor:
            return weighted(run(options, {**given, "input": x})).tanh()

        return grad(value)(given["input"]).pow(2).sum()

    got = torch.autograd.grad(vmap(penalty, in_dims=(dims,))(given).sum(), leaves)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(SIZE):
        part = part_of(given, dims, k)
        x = part["input"].detach().requires_grad_()
        value = weighted(run(options, {**part, "input": x})).tanh()
        (d,) = torch.autograd.grad(value, x, create_graph=True)
        total = total + d.pow(2).sum()
    assert_near(got, torch.autograd.grad(total, leaves), "d_weight")


def test_vjp_outlives_its_transform(cell: str) -> None:
    case = make(Options(cell, num_layers=2))  # type: ignore[arg-type]

    def function(x: Tensor) -> Tensor:
        return run(case.options, {**arguments_of(case), "input": x})[0]

    x = case.input.detach()
    output, pull = vjp(function, x)
    cotangent = torch.randn_like(output).requires_grad_()
    (expected,) = torch.autograd.grad(function(case.input), case.input, cotangent.detach())
    (got,) = pull(cotangent.detach())
    assert_near([got], [expected], "d_input")
    (again,) = pull(cotangent)  # recorded: the gradient is linear in the cotangent
    (d,) = torch.autograd.grad(again.pow(2).sum(), cotangent)
    y = function(case.input)
    (d_x,) = torch.autograd.grad(y, case.input, cotangent, create_graph=True)
    (expected,) = torch.autograd.grad(d_x.pow(2).sum(), cotangent)
    assert_near([d], [expected], "d_input")
    many = torch.randn(SIZE, *output.shape, dtype=torch.float64)
    assert_near(
        [vmap(lambda d: pull(d)[0])(many)], [torch.stack([pull(d)[0] for d in many])], "d_input"
    )


def test_forward_mode_through_a_backward_pass(cell: str) -> None:
    """The tangent of a gradient, whose graph was recorded outside of forward mode."""
    case = make(Options(cell))  # type: ignore[arg-type]
    output, *_ = run(case.options, arguments_of(case))
    d, t = torch.randn_like(output), torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, case.input, t, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(d, t)
        (d_x,) = torch.autograd.grad(output, case.input, dual, retain_graph=True)
        tangent = forward_ad.unpack_dual(d_x).tangent
    assert_near([tangent], [expected], "d_input")
    _, pull = vjp(
        lambda x: run(case.options, {**arguments_of(case), "input": x})[0], case.input.detach()
    )
    _, (tangent,) = jvp(pull, (d,), (t,))
    assert_near([tangent], [expected], "d_input")


# ---- Randomness ----------------------------------------------------------------------------------


def test_dropout_follows_the_randomness_of_vmap(cell: str) -> None:
    layer = getattr(fastrnn, cell)(2, 8, num_layers=2, dropout=0.5).train()
    many = torch.randn(1, 5, 4, 2).expand(SIZE, 5, 4, 2)

    def one(x: Tensor) -> Tensor:
        return layer(x)[0]

    with torch.no_grad():
        with pytest.raises(RuntimeError, match="random operation"):
            vmap(one)(many)
        same = vmap(one, randomness="same")(many)
        different = vmap(one, randomness="different")(many)
        assert_equal(same[0], same[1])
        assert not torch.equal(different[0], different[1])
        torch.manual_seed(1)
        got = vmap(one, randomness="same")(many)
        torch.manual_seed(1)
        assert_equal(got[0], one(many[0]))


def test_dropout_masks_of_an_ensemble_are_those_of_torch(cell: str) -> None:
    models = [getattr(fastrnn, cell)(2, 8, num_layers=2, dropout=0.5) for _ in range(SIZE)]
    parameters, _ = stack_module_state(models)
    x = torch.randn(5, 4, 2)
    lower, upper = (
        partial(getattr(functional, cell.lower()), x, None),
        getattr(functional, cell.lower()),
    )

    def one(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], parameters, (x,))[0]

    def by_hand(parameters: dict[str, Tensor]) -> Tensor:
        weights = list(parameters.values())
        middle = torch.nn.functional.dropout(lower(weights[:4])[0], 0.5)
        return upper(middle, None, weights[4:])[0]

    for randomness in ("same", "different"):
        torch.manual_seed(5)
        got = vmap(one, randomness=randomness)(parameters)
        torch.manual_seed(5)
        assert_equal(got, vmap(by_hand, randomness=randomness)(parameters))


def layer_that_draws(cell: str) -> Any:
    zoneout = (0.3, 0.2) if cell == "LSTM" else 0.3
    options = {"bidirectional": True, "recurrent_dropout": 0.5, "zoneout": zoneout}
    return getattr(fastrnn, cell)(2, 8, num_layers=2, **options).train()


def test_masks_follow_the_randomness_of_vmap(cell: str) -> None:
    layer = layer_that_draws(cell)
    many = torch.randn(1, 5, 4, 2).expand(SIZE, 5, 4, 2)

    def one(x: Tensor) -> Tensor:
        return layer(x)[0]

    with torch.no_grad():
        with pytest.raises(RuntimeError, match="random operation"):
            vmap(one)(many)
        torch.manual_seed(1)
        with counted() as calls:
            same = vmap(one, randomness="same")(many)
            different = vmap(one, randomness="different")(many)
        assert calls == {"program": 2}  # the masks join the rows
        torch.manual_seed(1)
        assert_equal(same, one(many[0]).expand_as(same))
        assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("mapped", ["input", "weights"])
def test_masks_drawn_under_vmap_mask_as_those_of_a_loop(
    cell: str, randomness: str, mapped: str
) -> None:
    """Values, and gradients of each sample or member by itself."""
    layers = [layer_that_draws(cell) for _ in range(SIZE)]
    options, weights = layers[0]._options, [layer._flat_weights for layer in layers]
    x = torch.randn(SIZE, 5, 4, 2)
    over_input = mapped == "input"
    given = (
        ([w.detach() for w in weights[0]], x)
        if over_input
        else ([torch.stack(ws).detach() for ws in zip(*weights, strict=True)], x[0])
    )
    over = {"in_dims": (None, 0) if over_input else (0, None), "randomness": randomness}

    def one(weights: list[Tensor], x: Tensor) -> Tensor:
        named = dict(zip(layers[0]._flat_weights_names, weights, strict=True))
        return functional_call(layers[0], named, (x,))[0].pow(2).sum()

    def masks(weights: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        drawn = random_masks.draw(options, x, x.shape[1], 8, 0.5)
        return tuple(mask for mask in drawn if mask is not None)

    def by_hand(weights: list[Tensor], x: Tensor, extras: Extras) -> Tensor:
        return recurrent(options, x, None, weights, extras=extras)[0].pow(2).sum()

    torch.manual_seed(3)
    drawn = vmap(masks, **over)(*given)
    assert torch.equal(drawn[0][0], drawn[0][1]) == (randomness == "same")
    extras = [Extras(None, None, *(mask[k] for mask in drawn)) for k in range(SIZE)]
    each = [
        (given[0], x[k]) if over_input else ([w[k] for w in given[0]], x[0]) for k in range(SIZE)
    ]
    expected = torch.stack([by_hand(*v, e) for v, e in zip(each, extras, strict=True)])
    torch.manual_seed(3)
    assert_near([vmap(one, **over)(*given)], [expected], "output")
    torch.manual_seed(3)
    with counted() as calls:
        got = vmap(grad(one), **over)(*given)
    assert calls == {"program": SIZE, "program_backward": SIZE}
    loop = [grad(by_hand)(*v, e) for v, e in zip(each, extras, strict=True)]
    assert_near(got, transposed(loop), "d_weight")


# ---- Errors --------------------------------------------------------------------------------------


def test_lengths_out_of_range_are_refused_under_vmap(cell: str) -> None:
    layer, x = getattr(fastrnn, cell)(2, 3), torch.randn(SIZE, 5, 1, 2)
    for lengths in ([[5], [6], [1]], [[5], [-1], [1]]):
        with pytest.raises(ValueError, match=r"^lengths: expected values from 0 to"):
            vmap(lambda x, n: layer(x, lengths=n)[0])(x, torch.tensor(lengths))


def test_shapes_are_checked_as_without_transforms(cell: str) -> None:
    layer = getattr(fastrnn, cell)(2, 3)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        vmap(lambda x: layer(x)[0])(torch.randn(SIZE, 5, 1, 4))
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 1D"):
        vmap(lambda x: layer(x)[0])(torch.randn(SIZE, 5))


def test_return_saved_is_refused_under_transforms(cell: str) -> None:
    case = make(Options(cell), requires_grad=False)  # type: ignore[arg-type]
    function = getattr(functional, cell.lower())
    for transform in (vmap, grad):
        with pytest.raises(RuntimeError, match="return_saved must be False under the transforms"):
            transform(lambda x: function(x, None, case.weights, return_saved=True)[0].sum())(
                torch.stack([case.input] * 2) if transform is vmap else case.input
            )


# ---- Compilers -----------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda f: vmap(f, in_dims=(None, 0)),
    "ensemble": lambda f: vmap(f, in_dims=(0, None)),
    "grad": grad,
    "per-sample": lambda f: vmap(grad(f), in_dims=(None, 0)),
    "jacrev": jacrev,
    "jacrev of vmap": lambda f: jacrev(vmap(f, in_dims=(None, 0)), argnums=1),
    "jvp": lambda f: lambda w, x: jvp(partial(f, w), (x,), (torch.ones_like(x),)),
    "jvp of an ensemble": lambda f: (
        lambda w, x: jvp(lambda x: vmap(f, in_dims=(0, None))(w, x), (x,), (torch.ones_like(x),))
    ),
    "hessian": lambda f: hessian(f, argnums=1),
    "grad of grad": lambda f: grad(lambda w, x: grad(f, argnums=1)(w, x).pow(2).sum()),
}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("cell", "transform"),
    [("LSTM", transform) for transform in TRANSFORMS]
    + [(cell, transform) for cell in ("RNN", "GRU") for transform in ("per-sample", "hessian")],
)
def test_compiled_transforms_equal_eager(cell: str, transform: str) -> None:
    """Each of the cell with two states; of the others one in reverse, one in forward mode too."""
    options = Options(cell)  # type: ignore[arg-type]
    members = several(options, "padded", sizes=(2, 2, 2, 2))
    weights, x = members[0]["weights"], members[0]["input"]
    if "ensemble" in transform:
        weights = [torch.stack(ws) for ws in zip(*(m["weights"] for m in members), strict=True)]
    if transform in ("vmap", "per-sample", "jacrev of vmap"):
        x = torch.stack([m["input"] for m in members])

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        output, hx_n, _ = recurrent(options, x, None, weights)
        return output.pow(2).sum() + hx_n[0].sum()

    function = TRANSFORMS[transform](loss)
    expected = function(weights, x)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(weights, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_ensemble_trains(cell: str) -> None:
    options = Options(cell)  # type: ignore[arg-type]
    members = several(options, "padded")
    weights = [torch.stack(ws) for ws in zip(*(m["weights"] for m in members), strict=True)]
    x = members[0]["input"]
    for w in weights:
        w.requires_grad_()

    def losses(weights: list[Tensor], x: Tensor) -> Tensor:
        def loss(weights: list[Tensor]) -> Tensor:
            return recurrent(options, x, None, weights)[0].pow(2).sum()

        return vmap(loss)(weights).sum()

    expected = torch.autograd.grad(losses(weights, x), weights)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    with counted() as calls:
        got = torch.autograd.grad(compiled(weights, x), weights)
    assert calls == {"forward_members": 1, "backward_members": 1}
    assert_near(got, expected, "d_weight")


@pytest.mark.usefixtures("_fresh_compiler")
@options_together
def test_compiled_per_sample_gradients_of_options_equal_eager(case: Case) -> None:
    each, dims = choose(several_with(case), "everything")
    given = stacked(each, dims)

    def loss(given: dict[str, Any]) -> Tensor:
        return weighted(run(case.options, given))

    def gradients(given: dict[str, Any]) -> Any:
        def one(given: dict[str, Any]) -> Any:
            return grad(lambda w: loss({**given, "weights": w}))(given["weights"])

        return vmap(one, in_dims=(dims,))(given)

    got = torch.compile(gradients, fullgraph=True, backend="aot_eager")(given)
    torch.testing.assert_close(got, gradients(given), rtol=1e-12, atol=1e-12)


def members_arguments(each: list[dict[str, Any]], requires_grad: bool) -> tuple[Any, ...]:
    """The arguments of the operators of ensembles, up to the options."""
    each, dims = choose(each, "everything")
    given = stacked(each, dims)
    for x in leaves_of(given):
        x.requires_grad_(requires_grad)
    h0, c0 = (*given["hx"], None)[:2]
    names = ("batch_sizes", "lengths", "reset", *Extras._fields)
    return (given["input"], h0, c0, given["weights"], *(given.get(name) for name in names))


def opcheck_backward_members(options: Options, each: list[dict[str, Any]]) -> None:
    arguments = members_arguments(each, requires_grad=False)
    given = operators.forward_members_op(*arguments, options.text, True, True, False)
    output, h_n, _, hidden, cell, gates = given
    two = options.cell == "LSTM"
    anew = [x is not None for x in arguments[7:9]]
    needs = [True, True, two, *anew, *[True] * len(arguments[3])]
    cotangents = (
        torch.randn_like(output),
        torch.randn_like(hidden),
        torch.randn_like(cell) if two else None,
        torch.randn_like(h_n),
        None,
    )
    opcheck(
        operators.backward_members_op,
        (*arguments, hidden, cell, gates, *cotangents, options.text, needs, False),
    )


@options_together
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck_members_with_options(case: Case, recompute: bool) -> None:
    options = replace(case.options, recompute=recompute)
    arguments = members_arguments(several_with(case), requires_grad=True)
    opcheck(operators.forward_members_op, (*arguments, options.text, True, True, False))
    opcheck_backward_members(options, several_with(case))


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward_members(options: Options, steps: str, save: bool) -> None:
    arguments = members_arguments(several(options, steps), requires_grad=True)
    opcheck(operators.forward_members_op, (*arguments, options.text, True, save, False))


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_opcheck_backward_members(options: Options, steps: str) -> None:
    opcheck_backward_members(options, several(options, steps))
