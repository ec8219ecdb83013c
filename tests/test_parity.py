"""The layers and cells are torch.nn's, case by case of torch's own test suite."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastrnn
from pairs import CELLS, LAYERS, Outcome, assert_same, fresh, outcome, pair, tensors
from tolerances import tolerance

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning"  # torch's own layer
)

NAMES = LAYERS + CELLS
ENTRIES = {entry.module_cls: entry for entry in module_db}
DTYPES = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def module_inputs(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    """torch's inputs for a layer or cell, the packed ones too."""
    torch.manual_seed(0)
    entry = ENTRIES[getattr(torch.nn, name)]
    return list(
        entry.module_inputs_func(
            entry,
            device="cpu",
            dtype=dtype,
            requires_grad=False,
            training=training,
            with_packed_sequence=True,
        )
    )


@functools.cache
def module_errors(name: str, dtype: torch.dtype) -> list[Any]:
    """torch's wrong inputs for a layer or cell."""
    torch.manual_seed(0)
    entry = ENTRIES[getattr(torch.nn, name)]
    return list(
        entry.module_error_inputs_func(
            entry, device="cpu", dtype=dtype, requires_grad=False, training=False
        )
    )


CASES = [
    (name, training, index)
    for name in NAMES
    for training in (True, False)
    for index in range(len(module_inputs(name, torch.float32, training)))
]
ERRORS = [
    (name, index) for name in NAMES for index in range(len(module_errors(name, torch.float32)))
]


def construct(name: str, case: Any, dtype: torch.dtype, training: bool) -> tuple[Any, Any]:
    """torch's layer and ours, as one of torch's cases asks for them."""
    arguments = case.constructor_input
    theirs, ours = pair(name, *arguments.args, **{**arguments.kwargs, "dtype": dtype})
    return theirs.train(training), ours.train(training)


# ---- torch's own cases ------------------------------------------------------------------------


def test_every_torch_case_is_covered() -> None:
    assert len(CASES) >= 270
    assert len(ERRORS) >= 50


@pytest.mark.parametrize(("name", "training", "index"), CASES)
def test_outputs_and_gradients(name: str, training: bool, index: int) -> None:
    case = module_inputs(name, torch.float64, training)[index]
    theirs, ours = construct(name, case, torch.float64, training)
    arguments = case.forward_input.args
    assert_same(outcome(ours, *arguments), outcome(theirs, *arguments), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("name", "training", "index"), CASES)
def test_narrow_types_are_as_exact_as_torchs(
    name: str, training: bool, index: int, dtype: torch.dtype
) -> None:
    """Ours is as close to float64, on the same rounded values, as torch's own narrow type is."""
    case = module_inputs(name, dtype, training)[index]
    theirs, ours = construct(name, case, dtype, training)
    arguments = case.forward_input.args
    actual, expected = outcome(ours, *arguments), outcome(theirs, *arguments)
    assert [o.dtype for o in actual.outputs] == [o.dtype for o in expected.outputs]
    exact = outcome(theirs.double(), *_in(torch.float64, arguments))
    limit = tolerance(str(dtype).removeprefix("torch."), "d_weight")
    for mine, other, truth in zip(_flat(actual), _flat(expected), _flat(exact), strict=True):
        allowed = 2 * (other - truth).abs().max() + limit * (truth.abs() + truth.abs().max())
        assert torch.all((mine - truth).abs() <= allowed)


def _flat(result: Outcome) -> list[torch.Tensor]:
    return [t.double() for t in (*result.outputs, *result.d_inputs, *result.d_weights.values())]


@pytest.mark.parametrize(("name", "training", "index"), CASES)
def test_state_dict_and_repr(name: str, training: bool, index: int) -> None:
    case = module_inputs(name, torch.float32, training)[index]
    theirs, ours = construct(name, case, torch.float32, training)
    assert repr(ours) == repr(theirs)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key, value in other.items():
        assert torch.equal(mine[key], value)
    ours.load_state_dict(other, strict=True)
    theirs.load_state_dict(mine, strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), ERRORS)
def test_error_types_and_messages(name: str, index: int, dtype: torch.dtype) -> None:
    error = module_errors(name, dtype)[index]
    constructor = error.module_error_input.constructor_input
    forward = error.module_error_input.forward_input
    while_constructing = error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR
    raised = []
    for home in (torch.nn, fastrnn):
        call, arguments = getattr(home, name), constructor
        if not while_constructing:
            call, arguments = call(*constructor.args, **constructor.kwargs), forward
        with pytest.raises(error.error_type, match=error.error_regex) as caught:
            call(*arguments.args, **arguments.kwargs)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[1] == raised[0]


@pytest.mark.parametrize(("name", "training", "index"), CASES)
def test_what_is_not_contiguous_gives_the_same(name: str, training: bool, index: int) -> None:
    case = module_inputs(name, torch.float64, training)[index]
    theirs, ours = construct(name, case, torch.float64, training)
    for parameter in ours.parameters():
        parameter.data = _strided(parameter.data)
    arguments = case.forward_input.args
    expected = outcome(theirs, *arguments)
    assert_same(outcome(ours, *_strided(arguments)), expected, torch.float64)


def _strided(value: Any) -> Any:
    """The same values, every other one in memory."""
    if isinstance(value, torch.Tensor):
        return torch.stack((value, value), dim=-1)[..., 0]
    if isinstance(value, PackedSequence):
        return value._replace(data=_strided(value.data))
    return type(value)(_strided(part) for part in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("name", "index"), [(n, i) for n, training, i in CASES if not training])
def test_second_derivatives(name: str, index: int) -> None:
    case = module_inputs(name, torch.float64, False)[index]
    results = []
    for layer in construct(name, case, torch.float64, False):
        leaves = [p for p in layer.parameters() if p.requires_grad]
        arguments = fresh(case.forward_input.args)
        leaves += [t for t in tensors(arguments) if t.is_floating_point()]
        torch.manual_seed(2)
        loss = sum((t**3).sum() for t in tensors(layer(*arguments)))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        results.append((first, second))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_read_where_torch_reads_it(name: str) -> None:
    for case in module_inputs(name, torch.float32, True):
        for layer in construct(name, case, torch.float32, True):
            del layer.training
            if ENTRIES[getattr(torch.nn, name)].train_and_eval_differ:
                with pytest.raises(AttributeError, match="'training'"):
                    layer(*case.forward_input.args)
            else:
                layer(*case.forward_input.args)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_a_device_context_is_where_parameters_are_made(name: str, device: str) -> None:
    for case in module_inputs(name, torch.float32, True):
        arguments = case.constructor_input
        with torch.device(device):
            ours = getattr(fastrnn, name)(*arguments.args, **arguments.kwargs)
        assert {parameter.device.type for parameter in ours.parameters()} == {device}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_conversions_under_torchs_flags_of_the_future(
    name: str, overwrite: bool, swap: bool
) -> None:
    future = torch.__future__
    future.set_overwrite_module_params_on_conversion(overwrite)
    future.set_swap_module_params_on_conversion(swap)
    try:
        for case in module_inputs(name, torch.float64, False)[:4]:
            theirs, ours = construct(name, case, torch.float64, False)
            arguments = case.forward_input.args
            with torch.no_grad():
                ours(*arguments)
            for dtype in (torch.float32, torch.float64):
                kept = list(ours.parameters())
                ours.to(dtype), theirs.to(dtype)
                same = [a is b for a, b in zip(ours.parameters(), kept, strict=True)]
                assert same == [swap or not overwrite] * len(kept)
                narrow = tuple(_in(dtype, value) for value in arguments)
                with torch.no_grad():
                    torch.testing.assert_close(ours(*narrow), theirs(*narrow))
    finally:
        future.set_overwrite_module_params_on_conversion(False)
        future.set_swap_module_params_on_conversion(False)


def _in(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(_in(dtype, part) for part in value)
    return value.to(dtype)


# ---- more errors ------------------------------------------------------------------------------


def _states(name: str, *shape: int) -> Any:
    return (torch.randn(shape), torch.randn(shape)) if "LSTM" in name else torch.randn(shape)


def _packed(*steps: int, dtype: torch.dtype = torch.float32, enforce_sorted: bool = True) -> Any:
    return pack_sequence([torch.randn(t, 3, dtype=dtype) for t in steps], enforce_sorted)


LAYER_ERRORS: dict[str, Any] = {
    "no steps": lambda layer, name: layer(torch.randn(0, 2, 3)),
    "no steps, unbatched": lambda layer, name: layer(torch.randn(0, 3)),
    "input of four dimensions": lambda layer, name: layer(torch.randn(5, 2, 3, 3)),
    "wrong input size": lambda layer, name: layer(torch.randn(5, 2, 7)),
    "integers": lambda layer, name: layer(torch.ones(5, 2, 3, dtype=torch.long)),
    "wrong batch": lambda layer, name: layer(torch.randn(5, 2, 3), _states(name, 1, 3, 4)),
    "wrong hidden size": lambda layer, name: layer(torch.randn(5, 2, 3), _states(name, 1, 2, 5)),
    "unbatched states": lambda layer, name: layer(torch.randn(5, 2, 3), _states(name, 2, 4)),
    "batched states": lambda layer, name: layer(torch.randn(5, 3), _states(name, 1, 1, 4)),
    "input on another device": lambda layer, name: layer(torch.randn(5, 2, 3, device="meta")),
    "states on another device": lambda layer, name: (
        layer(torch.randn(5, 2, 3), _states(name, 1, 2, 4).to("meta"))
        if name != "LSTM"
        else layer(torch.randn(5, 2, 3), [s.to("meta") for s in _states(name, 1, 2, 4)])
    ),
}
# Where torch's own error is Python's and names no argument.
NAMED_ERRORS: dict[str, Any] = {
    "a list": (lambda layer: layer([[1.0]]), TypeError, "input must be a Tensor, got list"),
    "no states": (
        lambda layer: layer(torch.randn(5, 2, 3), ()),
        (TypeError, RuntimeError),
        "hx must be a Tensor, got tuple|lstm expects two hidden states",
    ),
    "a text for dropout": (
        lambda layer: type(layer)(3, 4, dropout="a"),
        ValueError,
        "dropout should be a number in range",
    ),
    "half a layer": (
        lambda layer: type(layer)(3, 4, num_layers=1.5),
        TypeError,
        "num_layers should be of type int, got: float",
    ),
}


@pytest.mark.parametrize("what", LAYER_ERRORS)
@pytest.mark.parametrize("name", LAYERS)
def test_more_layer_errors(name: str, what: str) -> None:
    raised = []
    for layer in pair(name, 3, 4):
        with pytest.raises((RuntimeError, ValueError, AttributeError, IndexError)) as caught:
            LAYER_ERRORS[what](layer, name)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[1] == raised[0]


@pytest.mark.parametrize("what", NAMED_ERRORS)
@pytest.mark.parametrize("name", LAYERS)
def test_errors_that_name_the_argument_where_torchs_do_not(name: str, what: str) -> None:
    call, error, message = NAMED_ERRORS[what]
    theirs, ours = pair(name, 3, 4)
    with pytest.raises((TypeError, ValueError, AttributeError, IndexError, RuntimeError)) as caught:
        call(theirs)
    assert not any(word in str(caught.value) for word in ("input", "hx", "num_layers"))
    with pytest.raises(error, match=message):
        call(ours)


def test_three_states_for_an_lstm() -> None:
    for layer in pair("LSTM", 3, 4):
        with pytest.raises(RuntimeError, match=r"^lstm expects two hidden states$"):
            layer(torch.randn(5, 2, 3), (torch.randn(1, 2, 4),) * 3)
        with pytest.raises(TypeError, match=r"hx|lstm"):
            layer(torch.randn(5, 2, 3), torch.randn(2, 1, 2, 4))


CELL_ERRORS: dict[str, Any] = {
    "input of three dimensions": lambda cell, name: cell(torch.randn(1, 2, 3)),
    "wrong input size": lambda cell, name: cell(torch.randn(7)),
    "wrong batch": lambda cell, name: cell(torch.randn(2, 3), _states(name, 3, 4)),
    "unbatched states": lambda cell, name: cell(torch.randn(2, 3), _states(name, 4)),
    "batched states": lambda cell, name: cell(torch.randn(3), _states(name, 1, 4)),
    "wrong hidden size": lambda cell, name: cell(torch.randn(3), _states(name, 5)),
}


@pytest.mark.parametrize("what", CELL_ERRORS)
@pytest.mark.parametrize("name", CELLS)
def test_more_cell_errors(name: str, what: str) -> None:
    raised = []
    for cell in pair(name, 3, 4):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            CELL_ERRORS[what](cell, name)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[1] == raised[0]


def test_an_rnn_cell_of_unknown_nonlinearity() -> None:
    for cell in pair("RNNCell", 3, 4, nonlinearity="step"):
        with pytest.raises(RuntimeError, match=r"^Unknown nonlinearity: step$"):
            cell(torch.randn(2, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": True},
        {"dropout": 2},
        {"num_layers": -1},
        {"proj_size": -1},
        {"proj_size": 4},
        {"hidden_size": -4},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LAYERS)
def test_more_construction_errors(name: str, options: dict[str, Any]) -> None:
    raised = []
    for home in (torch.nn, fastrnn):
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(home, name)(**{"input_size": 3, "hidden_size": 4, **options})
        raised.append((type(caught.value), str(caught.value)))
    assert raised[1] == raised[0]


# Where torch's message comes from a matrix product deep inside, ours says which argument it was.
def test_dtypes_that_do_not_match_are_refused_by_name() -> None:
    for name in LAYERS:
        theirs, ours = pair(name, 3, 4)
        states = _states(name, 1, 2, 4)
        wide = tuple(s.double() for s in states) if name == "LSTM" else states.double()
        for layer in (theirs, ours):
            said = "hidden tensor with Double" if layer is ours else None
            with pytest.raises(RuntimeError, match=said):
                layer(torch.randn(5, 2, 3), wide)
    for name in CELLS:
        said = "must have the same dtype, but got Double and Float"
        for cell in pair(name, 3, 4):
            with pytest.raises(RuntimeError, match=said):
                cell(torch.randn(2, 3, dtype=torch.float64))
            wide = torch.randn(2, 4, dtype=torch.float64)
            hx = (wide, wide) if name == "LSTMCell" else wide
            with pytest.raises(RuntimeError, match=said):
                cell(torch.randn(2, 3), hx)


@pytest.mark.parametrize("name", LAYERS)
def test_states_too_few_for_a_packed_batch_are_refused(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    input = _packed(2, 5, 3, enforce_sorted=False)
    for layer in (theirs, ours):
        with pytest.raises(RuntimeError, match="Expected hidden" if layer is ours else None):
            layer(input, _states(name, 1, 2, 4))


# ---- construction -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_constructor_takes_torchs_arguments_in_torchs_order(name: str) -> None:
    nonlinearity = ("relu",) if name == "RNN" else ()
    positional = (3, 4, 2, *nonlinearity, False, True, 0.5, True, 2 if name == "LSTM" else 0)
    theirs, ours = pair(name, *positional, "cpu", torch.float64)
    assert ours.__constants__ == theirs.__constants__
    for attribute in theirs.__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.dropout == 0.5
    assert ours.weight_ih_l0.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_own_options_are_keyword_only(name: str) -> None:
    own = {"activation", "gate_activation", "reset_after", "peephole", "layer_norm", "heads"}
    own |= {"recurrent_dropout", "zoneout", "learn_initial_state", "forget_bias", "grad_clip"}
    own |= {"recompute"}
    for parameter in inspect.signature(getattr(fastrnn, name)).parameters.values():
        assert (parameter.name in own) == (parameter.kind is parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_the_same_weights_and_leaves_the_same_generator(name: str) -> None:
    results = []
    for home in (torch.nn, fastrnn):
        torch.manual_seed(7)
        layer = getattr(home, name)(5, 6)
        first = copy.deepcopy(layer.state_dict())
        layer.reset_parameters()
        results.append((first, layer.state_dict(), torch.get_rng_state()))
    for mine, other in zip(results[1][:2], results[0][:2], strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in other)
    assert torch.equal(results[1][2], results[0][2])


@pytest.mark.parametrize("name", LAYERS)
def test_attributes(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True)
    for attribute in ("mode", "_flat_weights_names", "_all_weights"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for mine, other in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert [weight.shape for weight in mine] == [weight.shape for weight in other]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert ours.flatten_parameters() is None
    if name == "RNN":
        assert fastrnn.RNN(3, 4, nonlinearity="relu").mode == "RNN_RELU"
        assert ours.nonlinearity == "tanh"


# ---- layouts ----------------------------------------------------------------------------------

LAYOUTS = ("time first", "batch first", "unbatched", "packed", "packed unsorted")


def _input(layout: str, dtype: torch.dtype) -> Any:
    if layout == "packed":
        return _packed(5, 4, 2, dtype=dtype)
    if layout == "packed unsorted":
        return _packed(2, 5, 4, dtype=dtype, enforce_sorted=False)
    return (
        torch.randn(5, 3, dtype=dtype) if layout == "unbatched" else torch.randn(5, 4, 3).to(dtype)
    )


@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_torchs_masks(
    name: str, layout: str, bidirectional: bool, num_layers: int
) -> None:
    theirs, ours = pair(
        name,
        3,
        4,
        num_layers,
        dropout=0.4,
        bidirectional=bidirectional,
        batch_first=layout == "batch first",
        dtype=torch.float64,
    )
    input = _input(layout, torch.float64)
    expected = outcome(theirs, input)
    after = torch.get_rng_state()
    assert_same(outcome(ours, input), expected, torch.float64)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(outcome(ours.eval(), input), outcome(theirs.eval(), input), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "proj_size"), [*((name, 0) for name in LAYERS), ("LSTM", 2)])
def test_layouts_with_given_states(
    name: str, proj_size: int, layout: str, bidirectional: bool, dtype: torch.dtype
) -> None:
    theirs, ours = pair(
        name,
        3,
        4,
        2,
        bidirectional=bidirectional,
        batch_first=layout == "batch first",
        dtype=dtype,
        **({"proj_size": proj_size} if proj_size else {}),
    )
    batch = {"unbatched": (), "time first": (4,), "batch first": (5,)}.get(layout, (3,))
    groups = 4 if bidirectional else 2
    hx: Any = torch.randn(groups, *batch, proj_size or 4, dtype=dtype)
    if name == "LSTM":
        hx = [hx, torch.randn(groups, *batch, 4, dtype=dtype)]
    input = _input(layout, dtype)
    assert_same(outcome(ours, input, hx), outcome(theirs, input, hx), dtype)


@pytest.mark.parametrize("layout", LAYOUTS[3:])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_input_gives_packed_output(name: str, layout: str) -> None:
    theirs, ours = pair(name, 3, 4)
    input = _input(layout, torch.float32)
    expected, actual = theirs(input)[0], ours(input)[0]
    assert torch.equal(actual.batch_sizes, expected.batch_sizes)
    assert (actual.sorted_indices is None) == (expected.sorted_indices is None)
    if expected.sorted_indices is not None:
        assert torch.equal(actual.sorted_indices, expected.sorted_indices)
        assert torch.equal(actual.unsorted_indices, expected.unsorted_indices)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_strides_of_the_output_are_torchs(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, 3, 4, **options)
    input = torch.randn(5, 2, 3)
    assert ours(input)[0].stride() == theirs(input)[0].stride()


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    input = torch.randn(2, 0, 3) if name in LAYERS else torch.randn(0, 3)
    assert_same(outcome(ours, input), outcome(theirs, input), torch.float32)
    if name in LAYERS:
        theirs, ours = pair(name, 3, 4, 2, batch_first=True, bidirectional=True)
        input = torch.randn(0, 2, 3)
        assert_same(outcome(ours, input), outcome(theirs, input), torch.float32)


def test_one_tensor_as_both_states() -> None:
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for layer in pair("LSTM", 3, 4, dtype=torch.float64):
        state = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 4).requires_grad_()
        output, (h_n, c_n) = layer(input, (state, state))
        (output.sum() + (h_n * c_n).sum()).backward()
        results.append((output.detach(), state.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_strided_input(name: str) -> None:
    theirs, ours = pair(name, 3, 4, bias=False, dtype=torch.float64)
    input = torch.randn(3, 2, 10, dtype=torch.float64).permute(2, 1, 0)[::2]
    for view in (input, input[:1, :1].expand(5, 2, 3), torch.randn(3).double().expand(4, 2, 3)):
        x = view if name in LAYERS else view[0]
        assert_same(outcome(ours, x), outcome(theirs, x), torch.float64)


# ---- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_complex(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.complex128)
    input = torch.randn(5, 2, 3, dtype=torch.complex128)
    input = input if name in LAYERS else input[0]
    expected, actual = list(tensors(theirs(input))), list(tensors(ours(input)))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


AUTOCAST = list(
    itertools.product(NAMES, HALVES, (torch.float32, *HALVES), (None, torch.float32, *HALVES))
)


@pytest.mark.parametrize(("name", "dtype", "input_dtype", "state_dtype"), AUTOCAST, ids=str)
def test_autocast(
    name: str, dtype: torch.dtype, input_dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    theirs, ours = pair(name, 3, 4)
    batch = (2, 3) if name in CELLS else (5, 2, 3)
    hx = None
    if state_dtype is not None:
        state = torch.randn((2, 4) if name in CELLS else (1, 2, 4)).to(state_dtype)
        hx = (state, state.flip(-1)) if "LSTM" in name else state
    arguments = (torch.randn(batch).to(input_dtype), hx)
    actual = outcome(ours, *arguments, under=torch.autocast("cpu", dtype=dtype))
    try:
        expected = outcome(theirs, *arguments, under=torch.autocast("cpu", dtype=dtype))
    except RuntimeError as error:
        # torch took oneDNN's LSTM, which many a CPU does not have in half precision.
        if name != "LSTM" or "primitive" not in str(error):
            raise
        assert {output.dtype for output in actual.outputs} == {dtype}
        return
    assert [o.dtype for o in actual.outputs] == [o.dtype for o in expected.outputs]
    assert_same(actual, expected, max((dtype, input_dtype), key=lambda d: torch.finfo(d).eps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_of_a_projection(layout: str) -> None:
    theirs, ours = pair("LSTM", 3, 4, 2, proj_size=2, batch_first=layout == "batch first")
    input = _input(layout, torch.float32)
    expected = outcome(theirs, input, under=torch.autocast("cpu", dtype=torch.bfloat16))
    actual = outcome(ours, input, under=torch.autocast("cpu", dtype=torch.bfloat16))
    assert [o.dtype for o in actual.outputs] == [o.dtype for o in expected.outputs]
    assert_same(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_float64_alone(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    input = input if name in LAYERS else input[0]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    expected = outcome(theirs, input, under=autocast)
    assert_same(outcome(ours, input, under=autocast), expected, torch.float64)
    with autocast:
        for layer in (theirs.float(), ours.float()):
            with pytest.raises(RuntimeError, match="same dtype"):
                layer(input)
