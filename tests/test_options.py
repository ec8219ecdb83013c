"""The options on torch tensors: both routes against the reference, derivatives, transforms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cases import ALONE, EXTRAS, PAIRS, Case
from fastrnn import functional
from fastrnn._options import Options
from fastrnn.calls import call, operators
from fastrnn.calls.call import recurrent
from operators import opcheck
from problems import problem_of
from stacks import Arguments, in_torch, make
from tolerances import assert_close

every_case = pytest.mark.parametrize("case", [*ALONE, *PAIRS], ids=str)
alone = pytest.mark.parametrize("case", ALONE, ids=str)
# For what takes long: the LSTM has every option but the GRU's own; the other cells without any.
PLAIN = [Case(Options(cell, num_layers=2, bidirectional=True)) for cell in ("RNN", "GRU")]
each_option_once = pytest.mark.parametrize(
    "case",
    [c for c in ALONE if c.options.cell == "LSTM" or not c.options.reset_after or c in PLAIN],
    ids=str,
)


def given(case: Case, **changes: Any) -> Arguments:
    return make(case.options, case.layout, sizes=(4, 3, 2, 6), extras=case.extras, **changes)


def run(case: Arguments, **changes: Any) -> tuple[Tensor, ...]:
    """Output, final states and all states, flat."""
    arguments = {"extras": case.extras, "return_states": True, **case.steps, **changes}
    output, hx_n, states = recurrent(case.options, case.input, case.hx, case.weights, **arguments)
    return (output, *hx_n, *(s for s in states or () if s is not None))


def composed(case: Arguments, **changes: Any) -> tuple[Tensor, ...]:
    """The same by plain torch operations."""
    with patch.object(call, "_route", lambda *_: call._composed_route):
        return run(case, **changes)


def weighting(values: tuple[Tensor, ...]) -> list[Tensor]:
    """An uneven gradient for each output."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in values]


def gradients(case: Arguments, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        values, case.leaves, weighting(values), allow_unused=True, materialize_grads=True
    )


def numpy_extras(case: Arguments) -> dict[str, Any]:
    """The extras as the reference and the functions take them, without autograd."""
    reset_h, reset_c, dropout, keep_h, keep_c = (
        None if x is None else x.detach().numpy() for x in case.extras
    )
    two, out = case.options.cell == "LSTM", {}
    if reset_h is not None:
        out["reset_hx"] = (reset_h, reset_c)[: 1 + two]
    if dropout is not None:
        out["dropout_mask"] = dropout
    if keep_h is not None or keep_c is not None:
        out["zoneout_mask"] = (keep_h, keep_c)[: 1 + two]
    return out


# ---- The same as the reference -------------------------------------------------------------------


@pytest.mark.parametrize("route", [run, composed])
@every_case
def test_matches_the_reference(case: Case, route: Any) -> None:
    problem = problem_of(case, T=4, B=3, input_size=2, hidden_size=6, d_states=True)
    arguments = in_torch(problem)
    values = route(arguments)
    expected = problem.solve()
    states = [s for s in expected.states if s is not None]
    for y, want in zip(values, (expected.output, *expected.hx_n, *states), strict=True):
        assert_close(y.detach(), want, "float64", "output")
    d = [problem.d.output, *problem.d.hx_n, *problem.d.states[: len(states)]]
    found = torch.autograd.grad(
        values, arguments.leaves, [torch.from_numpy(d_y) for d_y in d], materialize_grads=True
    )
    wanted = (expected.d_input, *expected.d_hx, *expected.d_weights, *expected.d_reset)
    kinds = ["d_input"] * (1 + len(expected.d_hx)) + ["d_weight"] * len(wanted)
    for got, want, kind in zip(found, wanted, kinds, strict=False):
        assert_close(got, want, "float64", kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@alone
def test_half_types_on_both_routes(case: Case, dtype: torch.dtype) -> None:
    torchs = given(case, dtype=dtype)
    ours, plain = run(torchs), composed(torchs)
    assert [y.dtype for y in ours] == [y.dtype for y in plain]
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


# ---- Derivatives ---------------------------------------------------------------------------------


@every_case
def test_gradcheck(case: Case) -> None:
    """Without the clamp, which is no derivative."""
    torchs = given(case._replace(options=replace(case.options, grad_clip=0.0)))
    assert gradcheck(
        lambda *leaves: run(torchs.with_leaves(*leaves)), torchs.leaves, fast_mode=True
    )


@alone
def test_gradgradcheck(case: Case) -> None:
    """Of one layer; test_autograd.py has stacks, whose layers meet in their inputs alone."""
    torchs = given(case._replace(options=replace(case.options, grad_clip=0.0, num_layers=1)))
    assert gradgradcheck(
        lambda *leaves: run(torchs.with_leaves(*leaves), return_states=False),
        torchs.leaves,
        fast_mode=True,
    )


@pytest.mark.parametrize("case", [c for c in ALONE if c.options.grad_clip > 0], ids=str)
def test_the_clamped_gradient_differentiates_again(case: Case) -> None:
    """Against central differences of the clamped gradient itself, which is a function too."""
    torchs = given(case._replace(options=replace(case.options, grad_clip=0.5)))

    def gradient(*leaves: Tensor) -> Tensor:
        moved = torchs.with_leaves(*leaves)
        values = run(moved, return_states=False)
        found = torch.autograd.grad(values, moved.input, weighting(values), create_graph=True)
        return found[0]

    assert gradcheck(gradient, torchs.leaves, fast_mode=True)


def test_clamped_gradients_of_an_identity(cell: Any) -> None:
    """Every part of the gradient of h_0 … is at most what the clamp and the weights let through."""
    case = given(Case(Options(cell, grad_clip=1e-3), "padded"))
    values = run(case, return_states=False)
    d_input = torch.autograd.grad(values, case.input, [1e6 * d for d in weighting(values)])[0]
    bound = 2e-3 * case.weights[0].abs().sum(0)  # h and, of an LSTM, c: through every gate
    assert torch.all(d_input.abs() <= bound)
    assert d_input.abs().max() > 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # torch's own
@alone
def test_transforms(case: Case) -> None:
    torchs = given(case, requires_grad=False)

    def output(x: Tensor, w: Tensor) -> Tensor:
        weights = [torchs.weights[0], w, *torchs.weights[2:]]
        return run(torchs._replace(input=x, weights=weights))[0]

    x, w = torchs.input, torchs.weights[1]
    many = torch.stack([x, 2 * x])
    one_by_one = torch.stack([output(each, w) for each in many])
    in_one = torch.func.vmap(output, in_dims=(0, None))(many, w)
    torch.testing.assert_close(in_one, one_by_one, rtol=1e-10, atol=1e-10)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return output(x, w).pow(2).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, w), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x, w), expected, rtol=1e-10, atol=1e-10)
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(many, w)
    torch.testing.assert_close(samples[0], expected, rtol=1e-10, atol=1e-10)
    jacobian = torch.func.jacrev(output)(x, w)
    if case.options.grad_clip == 0:  # forward-mode differentiation does not clamp
        forward = torch.func.jacfwd(output)(x, w)
        torch.testing.assert_close(forward, jacobian, rtol=1e-10, atol=1e-10)
        curved = torch.func.hessian(loss)(x, w)
        twice = torch.func.jacrev(torch.func.jacrev(loss))(x, w)
        torch.testing.assert_close(curved, twice, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # torch's own
def test_forward_mode_passes_a_clamp_as_it_is(cell: Any) -> None:
    clipped = given(Case(Options(cell, grad_clip=0.01), "padded"), requires_grad=False)
    plain = clipped._replace(options=replace(clipped.options, grad_clip=0.0))
    tangent = torch.ones_like(clipped.input)
    along = [
        torch.func.jvp(lambda x, c=case: run(c._replace(input=x))[0], (case.input,), (tangent,))
        for case in (clipped, plain)
    ]
    torch.testing.assert_close(along[0], along[1], rtol=1e-12, atol=1e-12)


@alone
def test_complex_numbers(case: Case) -> None:
    if case.extras and "dropout" in case.extras:
        case = case._replace(extras=tuple(e for e in case.extras if e != "dropout"))
    torchs = given(case, dtype=torch.complex128)
    values = run(torchs)
    found = gradients(torchs, values)
    assert all(y.is_complex() for y in values)
    assert all(torch.isfinite(torch.view_as_real(d)).all() for d in found)
    real = [torch.complex(x.real, torch.zeros_like(x.real)) for x in torchs.leaves]
    double = given(case).with_leaves(*(x.real for x in real))
    want = run(double)
    got = run(torchs.with_leaves(*real))
    torch.testing.assert_close([y.real for y in got], list(want), rtol=1e-10, atol=1e-10)


# ---- Backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["padded", "lengths-reset", "packed"])
def test_recomputing_gives_equal_gradients(cell: Any, steps: str) -> None:
    options = Options(cell, num_layers=2, bidirectional=True)
    case = make(options, steps)
    again = case._replace(options=replace(options, recompute=True))
    values, mine = run(case), run(again)
    torch.testing.assert_close(mine, values, rtol=0, atol=0)
    expected = gradients(case, values)
    torch.testing.assert_close(gradients(again, mine), expected, rtol=1e-12, atol=1e-12)


def test_recomputing_keeps_less(cell: Any) -> None:
    """The bytes that the graph holds beside the arguments and the outputs."""

    def kept(recompute: bool) -> int:
        case = make(Options(cell, num_layers=2, recompute=recompute), sizes=(9, 4, 3, 32))
        mine = {x.data_ptr() for x in case.leaves}
        sizes = {}

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in mine:
                sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = recurrent(case.options, case.input, case.hx, case.weights)[0]
        mine.add(output.data_ptr())
        return sum(size for pointer, size in sizes.items() if pointer not in mine)

    assert kept(recompute=True) <= 0.8 * kept(recompute=False)


@alone
def test_backward_twice_with_retain_graph(case: Case) -> None:
    torchs = given(case)
    values = run(torchs)
    first = torch.autograd.grad(
        values, torchs.leaves, weighting(values), retain_graph=True, materialize_grads=True
    )
    torch.testing.assert_close(gradients(torchs, values), first, rtol=0, atol=0)


def test_a_boundary_lets_no_gradient_through_but_to_the_state_after_it(cell: Any) -> None:
    options = Options(cell, bidirectional=True, layer_norm=True, zoneout_h=0.2)
    case = make(options, sizes=(4, 3, 2, 6), extras=("reset_hx",))
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[2] = True
    output, *_ = run(case, reset=reset)
    leaves = (case.input, *case.hx, case.extras.reset_h)
    early = torch.autograd.grad(output[:2].sum(), leaves, retain_graph=True)
    late = torch.autograd.grad(output[2:].sum(), leaves)
    assert early[0][:2].abs().min() > 0
    assert not early[0][2:].any()
    assert not late[0][:2].any()
    assert late[0][2:].abs().min() > 0
    assert not early[1][1].any()  # the reverse direction begins with hx behind the boundary
    assert not late[1][0].any()
    assert not early[-1][0].any()  # the forward direction begins with the state after a reset
    assert early[-1][1].abs().min() > 0
    assert late[-1][0].abs().min() > 0
    assert not late[-1][1].any()


# ---- Functions -----------------------------------------------------------------------------------


def keywords(options: Options) -> dict[str, Any]:
    """The options as the functions take them."""
    names = ["num_layers", "bidirectional", "bias", "layer_norm", "heads", "recompute"]
    out = {name: getattr(options, name) for name in names}
    zoneout: Any = options.zoneout_h
    if options.cell == "LSTM":
        zoneout = (options.zoneout_h, options.zoneout_c)
    out |= {"zoneout": zoneout, "grad_clip": options.grad_clip or None}
    if options.cell == "RNN":
        return {**out, "nonlinearity": options.activation}
    out |= {"activation": options.activation, "gate_activation": options.gate_activation}
    if options.cell == "GRU":
        return {**out, "reset_after": options.reset_after}
    return {**out, "peephole": options.peephole, "proj_size": options.proj_size}


def by_state(cell: str, parts: Any) -> Any:
    return tuple(parts) if cell == "LSTM" else parts[0]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", [c for c in ALONE if c.layout != "packed"], ids=str)
def test_functions_on_numpy_equal_those_on_torch(case: Case, batch_first: bool) -> None:
    torchs = given(case, requires_grad=False)
    cell = case.options.cell
    function = getattr(functional, cell.lower())
    backward = getattr(functional, f"{cell.lower()}_backward")

    def turned(x: Any) -> Any:
        return x.swapaxes(0, 1) if batch_first else x

    def call(to: Any) -> tuple[Any, ...]:
        extras = dict(numpy_extras(torchs))
        for name in ("reset_hx", "zoneout_mask"):
            if name in extras:
                extras[name] = by_state(cell, [None if x is None else to(x) for x in extras[name]])
        if "dropout_mask" in extras:
            extras["dropout_mask"] = to(extras["dropout_mask"])
        steps = {n: x.numpy() for n, x in torchs.steps.items()}
        if "reset" in steps:
            steps["reset"] = turned(steps["reset"])
        output, _, saved = function(
            to(turned(torchs.input.numpy())),
            by_state(cell, [to(s.numpy()) for s in torchs.hx]),
            [to(w.numpy()) for w in torchs.weights],
            batch_first=batch_first,
            return_saved=True,
            **keywords(case.options),
            **{n: to(x) for n, x in steps.items()},
            **extras,
        )
        d_output = to(np.ones(tuple(output.shape)))
        d_input, d_hx, d_weights, *d_reset = backward(d_output, None, saved)
        assert len(d_reset) == ("reset_hx" in extras)
        d_hx, *d_reset = (d if cell == "LSTM" else (d,) for d in (d_hx, *d_reset))
        anew = [d for part in d_reset for d in part]
        return [np.asarray(x) for x in (output, d_input, *d_hx, *d_weights, *anew)]

    for mine, theirs in zip(call(np.asarray), call(torch.from_numpy), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_functions_name_the_option_they_refuse() -> None:
    x, one = np.ones((3, 2, 4)), np.ones((4, 4))
    weights = [one, one]

    def refused(match: str, error: type[Exception] = ValueError, **options: Any) -> None:
        for array in (np.asarray, torch.from_numpy):
            with pytest.raises(error, match=match):
                functional.rnn(array(x), None, [*map(array, weights)], bias=False, **options)

    refused("heads must be at least 1, got 0", heads=0)
    refused("heads must be an int, got float", TypeError, heads=2.0)
    refused(r"weight_hh_l0 must have shape \(heads, 1·H/heads, O/heads\)", heads=2)
    refused("zoneout must be a number from 0 to 1, got 1.5", zoneout=1.5)
    refused("zoneout must be one number: of RNN there is no c", zoneout=(0.1, 0.1))
    refused("grad_clip must be None or greater than 0, got 0", grad_clip=0)
    refused("grad_clip must be None or a number, got str", TypeError, grad_clip="1")
    refused("layer_norm must be a bool, got int", TypeError, layer_norm=1)
    refused("recompute must be a bool, got NoneType", TypeError, recompute=None)
    refused("weights must hold 4 arrays, .*norm_ih, norm_hh of each .* got 2", layer_norm=True)


def test_functions_name_the_array_they_refuse() -> None:
    x, weights = np.ones((3, 2, 4)), [np.ones((4, 4)), np.ones((4, 4))]

    def refused(match: str, error: type[Exception] = ValueError, **arrays: Any) -> None:
        with pytest.raises(error, match=match):
            functional.rnn(x, None, weights, bias=False, **arrays)
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
        inputs = torch.from_numpy(x), None, [*map(torch.from_numpy, weights)]
        with pytest.raises(error, match=match):
            functional.rnn(*inputs, bias=False, **tensors)

    refused(r"reset_hx must have shape \(1, 4\), got \(4,\)", reset_hx=np.ones(4))
    refused(r"dropout_mask must have shape \(1, 2, 4\)", dropout_mask=np.ones((1, 3, 4)))
    refused(
        "dropout_mask must have the dtype of input",
        TypeError,
        dropout_mask=np.ones((1, 2, 4), np.float32),
    )
    refused("zoneout_mask must be bool, got float64", TypeError, zoneout_mask=np.ones((1, 3, 2, 4)))
    shape = r"zoneout_mask must have shape \(1, 3, 2, 4\)"
    refused(shape, zoneout_mask=np.ones((1, 2, 4), np.bool_))
    lstm = [np.ones((16, 4)), np.ones((16, 4))]
    for name in ("reset_hx", "zoneout_mask"):
        with pytest.raises(
            TypeError, match=rf"{name} must be None or two arrays, \(h, c\), got nd"
        ):
            functional.lstm(x, None, lstm, bias=False, **{name: np.ones((1, 4))})
    with pytest.raises(ValueError, match=r"reset_hx\[1\] must have shape \(1, 4\)"):
        functional.lstm(x, None, lstm, bias=False, reset_hx=(np.ones((1, 4)), np.ones(4)))


# ---- Compiled ------------------------------------------------------------------------------------


@each_option_once
def test_compiled_equals_eager(case: Case) -> None:
    torch._dynamo.reset()
    torchs = given(case)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return run(torchs.with_leaves(*leaves))

    expected = call(*torchs.leaves)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*torchs.leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    found, wanted = gradients(torchs, got), gradients(torchs, expected)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def operator_arguments(case: Arguments, save: bool) -> tuple[Any, ...]:
    h0, c0 = (*case.hx, None)[:2]
    steps = [case.steps.get(name) for name in ("batch_sizes", "lengths", "reset")]
    rest = (*steps, *case.extras, case.options.text, True, save, False)
    return (case.input, h0, c0, case.weights, *rest)


@each_option_once
def test_opcheck(case: Case) -> None:
    """test_compile.py has stacks without options."""
    torchs = given(case)
    arguments = operator_arguments(torchs, save=True)
    opcheck(torch.ops.fastrnn.forward.default, arguments)
    detached = given(case, requires_grad=False)
    arguments = operator_arguments(detached, save=True)
    output, h_n, c_n, hidden, cell, gates = operators.forward_op(*arguments)
    two = case.options.cell == "LSTM"
    anew = [x is not None for x in detached.extras[:2]]
    needs = [True, True, two, *anew, *[True] * len(detached.weights)]
    d = [torch.randn_like(x) for x in (output, hidden, cell, h_n, c_n)]
    d_output, d_hidden, d_cell, d_h_n, d_c_n = d
    d_c = (d_cell, d_h_n, d_c_n) if two else (None, d_h_n, None)
    opcheck(
        torch.ops.fastrnn.backward.default,
        (
            *arguments[:12],
            *(hidden, cell, gates, d_output, d_hidden, *d_c),
            case.options.text,
            needs,
            False,
        ),
    )


def test_every_extra_is_in_some_case() -> None:
    assert {name for case in ALONE for name in case.extras} == set(EXTRAS)
