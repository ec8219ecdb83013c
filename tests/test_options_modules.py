"""The options of the layers and cells: parameters, start, masks, pickles, errors, the call."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn.layers import random_masks
from fastrnn.layers.layer import COMMON_OPTIONS
from pairs import CELLS, LAYERS, tensors

F64 = torch.float64
T, B, SIZE, H = 5, 4, 3, 6
EVERY: dict[str, Any] = {
    "layer_norm": True,
    "heads": 2,
    "zoneout": 0.2,
    "learn_initial_state": True,
    "grad_clip": 0.5,
}
OF_LAYERS: dict[str, Any] = {"recurrent_dropout": 0.3, "recompute": True}
OF_LSTMS: dict[str, Any] = {"peephole": True, "forget_bias": 1.0}


def everything(name: str) -> dict[str, Any]:
    """Every option that a layer or cell has, turned on."""
    own = {**EVERY, **(OF_LAYERS if name in LAYERS else {})}
    return {**own, **OF_LSTMS} if "LSTM" in name else own


def make(name: str, **options: Any) -> Any:
    return getattr(fastrnn, name)(SIZE, H, dtype=F64, **options)


def batch(name: str) -> Tensor:
    return torch.randn((T, B, SIZE) if name in LAYERS else (B, SIZE), dtype=F64)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    """Every layer by its class's name."""
    return str(request.param)


@pytest.fixture(params=CELLS)
def a_cell(request: pytest.FixtureRequest) -> str:
    """Every cell by its class's name."""
    return str(request.param)


@pytest.fixture(params=LAYERS + CELLS)
def name(request: pytest.FixtureRequest) -> str:
    """Every layer and cell by its class's name."""
    return str(request.param)


# ---- Parameters ----------------------------------------------------------------------------------


def test_names_and_shapes_of_the_parameters() -> None:
    lstm = make("LSTM", num_layers=2, bidirectional=True, proj_size=4, **everything("LSTM"))
    expected = []
    for k in range(2):
        for suffix in (f"_l{k}", f"_l{k}_reverse"):
            shapes = {
                "weight_ih": (24, 3 if k == 0 else 8),
                "weight_hh": (2, 12, 2),
                "bias_ih": (24,),
                "bias_hh": (24,),
                "weight_hr": (4, 6),
                "weight_ci": (6,),
                "weight_cf": (6,),
                "weight_co": (6,),
                "norm_ih": (24,),
                "norm_hh": (24,),
                "norm_c": (6,),
                "norm_c_bias": (6,),
            }
            expected += [(kind + suffix, shape) for kind, shape in shapes.items()]
    learned = [("h_0", (4, 1, 4)), ("c_0", (4, 1, 6))]
    found = [(key, tuple(p.shape)) for key, p in lstm.named_parameters()]
    assert found == expected + learned
    assert lstm._flat_weights_names == [key for key, _ in expected]
    assert [len(weights) for weights in lstm.all_weights] == [12] * 4

    gru = make("GRUCell", **everything("GRUCell"))
    assert {key: tuple(p.shape) for key, p in gru.named_parameters()} == {
        "weight_ih": (18, 3),
        "weight_hh": (2, 9, 3),
        "bias_ih": (18,),
        "bias_hh": (18,),
        "norm_ih": (18,),
        "norm_hh": (18,),
        "h_0": (1, 6),
    }


def test_one_seed_gives_the_weights_of_torch_and_the_others_start_as_they_should(name: str) -> None:
    own = {
        key: value for key, value in everything(name).items() if key not in ("heads", "peephole")
    }
    torch.manual_seed(3)
    theirs = getattr(nn, name)(SIZE, H, dtype=F64)
    torch.manual_seed(3)
    ours = make(name, **own)
    drawn = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        expected = drawn.pop(key) if key in drawn else None
        if expected is None:
            ones = key.startswith(("norm_ih", "norm_hh", "norm_c")) and "bias" not in key
            assert torch.equal(parameter, torch.full_like(parameter, float(ones))), key
        elif key.startswith("bias_ih") and "LSTM" in name:
            assert torch.equal(parameter[H : 2 * H], torch.ones(H, dtype=F64))
            rest = [*range(H), *range(2 * H, 4 * H)]
            assert torch.equal(parameter[rest], expected[rest])
        else:
            assert torch.equal(parameter, expected), key
    assert not drawn


def test_drawn_weights_lie_within_the_bound(name: str) -> None:
    ours = make(name, heads=3, **({"peephole": True} if "LSTM" in name else {}))
    for parameter in ours.parameters():
        assert 0 < parameter.abs().max() <= H**-0.5


def test_reset_parameters_redraws_all_of_them(name: str) -> None:
    ours = make(name, **everything(name))
    torch.manual_seed(1)
    ours.reset_parameters()
    first = copy.deepcopy(ours.state_dict())
    for parameter in ours.parameters():
        parameter.data.normal_()
    torch.manual_seed(1)
    ours.reset_parameters()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, first[key])


def test_an_option_that_is_off_changes_nothing(name: str) -> None:
    """Neither the options that the engine sees, nor a weight, nor a bit of a result."""
    off = {key: value for key, value in COMMON_OPTIONS.items() if key in everything(name)}
    if "LSTM" in name:
        off |= {"peephole": False, "forget_bias": None}
    results = []
    for options in ({}, off):
        torch.manual_seed(2)
        ours = make(name, **options)
        input = batch(name).requires_grad_()
        outputs = list(tensors(ours(input)))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        results.append([*outputs, input.grad, *(p.grad for p in ours.parameters())])
        assert ours._options == getattr(fastrnn, name)(SIZE, H)._options
        assert repr(ours) == f"{name}(3, 6)"
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# ---- Copies, pickles, state dicts ----------------------------------------------------------------


def test_copies_pickles_and_state_dicts(name: str) -> None:
    ours = make(name, **everything(name)).eval()
    input = batch(name)
    expected = list(tensors(ours(input)))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    other = make(name, **everything(name)).eval()
    other.load_state_dict(ours.state_dict(), strict=True)
    on_meta = getattr(fastrnn, name)(SIZE, H, device="meta", dtype=F64, **everything(name)).eval()
    on_meta.load_state_dict(ours.state_dict(), assign=True)
    twins = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
        other,
        on_meta,
    ]
    for twin in twins:
        assert repr(twin) == repr(ours)
        torch.testing.assert_close(list(tensors(twin(input))), expected, rtol=0, atol=0)


def test_a_pickle_from_before_the_options_existed(name: str) -> None:
    ours = make(name)
    state = ours.__getstate__()
    for key in everything(name):
        del state[key]
    old = type(ours).__new__(type(ours))
    old.__setstate__(state)
    input = batch(name)
    torch.testing.assert_close(
        list(tensors(old(input))), list(tensors(ours(input))), rtol=0, atol=0
    )


def test_state_dicts_of_other_options_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="norm_ih_l0"):
        make("GRU", layer_norm=True).load_state_dict(make("GRU").state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        make("GRU", heads=2).load_state_dict(make("GRU").state_dict())


def test_repr_shows_what_is_on() -> None:
    lstm = make("LSTM", **{**everything("LSTM"), "zoneout": (0.1, 0.2)})
    assert repr(lstm) == (
        "LSTM(3, 6, peephole=True, layer_norm=True, heads=2, recurrent_dropout=0.3, "
        "zoneout=(0.1, 0.2), learn_initial_state=True, grad_clip=0.5, recompute=True, "
        "forget_bias=1.0)"
    )
    assert repr(make("RNNCell", heads=3)) == "RNNCell(3, 6, heads=3)"


# ---- Errors --------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"heads": 4}, ValueError, "heads must divide hidden_size, got heads=4 and hidden_size=6"),
    ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
    ({"heads": 2.0}, TypeError, "heads must be an int, got float"),
    ({"heads": True}, TypeError, "heads must be an int, got bool"),
    ({"layer_norm": 1}, TypeError, "layer_norm must be a bool, got int"),
    ({"zoneout": -0.1}, ValueError, "zoneout must be a number from 0 to 1, got -0.1"),
    ({"zoneout": float("nan")}, ValueError, "zoneout must be a number from 0 to 1, got nan"),
    ({"zoneout": "0.1"}, TypeError, "zoneout must be a number from 0 to 1, got str"),
    ({"zoneout": (0.1, 0.1, 0.1)}, ValueError, "zoneout must be "),
    ({"learn_initial_state": 1}, TypeError, "learn_initial_state must be a bool, got int"),
    ({"grad_clip": 0.0}, ValueError, "grad_clip must be None or greater than 0, got 0.0"),
    ({"grad_clip": -1}, ValueError, "grad_clip must be None or greater than 0, got -1"),
    ({"grad_clip": True}, TypeError, "grad_clip must be None or a number, got bool"),
]
WRONG_LAYERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"recurrent_dropout": 1.1}, ValueError, "recurrent_dropout must be a number from 0 to 1"),
    ({"recurrent_dropout": None}, TypeError, "recurrent_dropout must be a number from 0 to 1"),
    ({"recompute": 1}, TypeError, "recompute must be a bool, got int"),
]
WRONG_LSTMS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"peephole": None}, TypeError, "peephole must be a bool, got NoneType"),
    ({"zoneout": (0.1, 2)}, ValueError, "zoneout must be a number from 0 to 1, got 2"),
    ({"forget_bias": "1"}, TypeError, "forget_bias must be None or a number, got str"),
    ({"forget_bias": float("inf")}, ValueError, "forget_bias must be None or a finite number"),
    (
        {"forget_bias": 1.0, "bias": False},
        ValueError,
        "forget_bias must be None where bias=False, got 1.0",
    ),
]


def test_errors_name_the_option(name: str) -> None:
    wrong = (
        WRONG + (WRONG_LAYERS if name in LAYERS else []) + (WRONG_LSTMS if "LSTM" in name else [])
    )
    for options, error, message in wrong:
        with pytest.raises(error, match=message.replace("(", r"\(")):
            make(name, **options)
    if "LSTM" not in name:
        with pytest.raises(ValueError, match=r"zoneout must be one number: of .* there is no c"):
            make(name, zoneout=(0.1, 0.1))
        with pytest.raises(TypeError, match="peephole"):
            make(name, peephole=True)
    if name == "LSTM":
        with pytest.raises(ValueError, match="heads must divide proj_size, got heads=2"):
            make(name, heads=2, proj_size=3)


def test_what_does_not_fit_a_cell_is_not_taken(a_cell: str) -> None:
    for option, value in OF_LAYERS.items():
        with pytest.raises(TypeError, match=option):
            make(a_cell, **{option: value})


def test_a_learned_state_of_another_shape_is_refused(name: str) -> None:
    ours = make(name, learn_initial_state=True)
    ours.h_0 = nn.Parameter(torch.zeros(1, 1, H + 1, dtype=F64))
    with pytest.raises(RuntimeError, match=r"h_0 must have shape \(1, .*got \(1, 1, 7\)"):
        ours(batch(name))


# ---- Masks ---------------------------------------------------------------------------------------

DRAWN: list[dict[str, Any]] = [{"recurrent_dropout": 0.4}, {"zoneout": 0.4}]
DRAWN += [{"recurrent_dropout": 0.4, "zoneout": 0.3, "num_layers": 2, "dropout": 0.5}]


@pytest.mark.parametrize("options", DRAWN, ids=",".join)
def test_masks_are_drawn_in_training_alone_and_repeat_with_the_seed(
    layer: str, options: dict[str, Any]
) -> None:
    ours, input = make(layer, bidirectional=True, **options), batch(layer)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ours(input)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    with torch.no_grad():  # not the short way
        torch.manual_seed(1)
        assert torch.equal(ours(input)[0], results[0])
    ours.eval()
    state = torch.get_rng_state()
    assert torch.equal(ours(input)[0], ours(input)[0])
    with torch.no_grad():
        assert torch.equal(ours(input)[0], ours(input)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_are_those_that_draw_gives(layer: str) -> None:
    """The layer is the function with the masks of `random_masks.draw` under the same seed."""
    options = {"recurrent_dropout": 0.4, "zoneout": 0.3, "num_layers": 2, "bidirectional": True}
    ours, input = make(layer, **options), batch(layer)
    torch.manual_seed(5)
    expected, _ = ours(input)
    torch.manual_seed(5)
    extras = random_masks.draw(ours._options, input, B, H, 0.4)
    masks = (extras.zoneout_h_mask, extras.zoneout_c_mask)
    got, _ = getattr(fastrnn.functional, layer.lower())(
        input,
        None,
        list(ours.parameters()),
        num_layers=2,
        bidirectional=True,
        zoneout=0.3,
        dropout_mask=extras.dropout_mask,
        zoneout_mask=masks if layer == "LSTM" else masks[0],
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_masks_have_the_probabilities_asked_for() -> None:
    lstm = fastrnn.LSTM(2, 50, num_layers=2, bidirectional=True, zoneout=(0.1, 0.7))
    extras = random_masks.draw(lstm._options, torch.randn(20, 30, 2), 30, 50, 0.25)
    assert extras.dropout_mask.shape == (4, 30, 50)
    assert extras.dropout_mask.unique().tolist() == [0.0, torch.tensor(1 / 0.75).item()]
    assert extras.dropout_mask.mean().item() == pytest.approx(1.0, abs=0.05)
    assert extras.zoneout_h_mask.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert extras.zoneout_c_mask.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert extras.zoneout_h_mask.shape == extras.zoneout_c_mask.shape == (4, 20, 30, 50)


def test_eval_takes_the_expectation(name: str) -> None:
    plain = make(name).eval()
    zoned = make(name, zoneout=0.25).eval()
    zoned.load_state_dict(plain.state_dict())
    one = torch.randn((1, B, SIZE) if name in LAYERS else (B, SIZE), dtype=F64)
    shape = (1, B, H) if name in LAYERS else (B, H)
    states = [torch.randn(shape, dtype=F64) for _ in range(2)]
    hx = tuple(states) if "LSTM" in name else states[0]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, got = ([*tensors(m(one, hx))] for m in (plain, zoned))
        for new, mixed, old in zip(
            expected[-len(states) :], got[-len(states) :], states, strict=False
        ):
            if "LSTM" in name or len(expected) <= 2:
                target = old if "LSTM" in name else states[0]
                torch.testing.assert_close(mixed, 0.25 * target + 0.75 * new)


def test_zoneout_of_c_alone(a_cell: str) -> None:
    if a_cell != "LSTMCell":
        return
    cell = make(a_cell, zoneout=(0.0, 1.0))
    hx = torch.randn(B, H, dtype=F64), torch.randn(B, H, dtype=F64)
    x = batch(a_cell)
    h, c = cell(x, hx)
    assert torch.equal(c, hx[1])  # all of c is kept
    plain = make(a_cell)
    plain.load_state_dict(cell.state_dict())
    torch.testing.assert_close(h, plain(x, hx)[0])  # h comes from the new c


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # torch's own
@pytest.mark.parametrize("option", [{"recurrent_dropout": 0.5}, {"zoneout": 0.5}], ids=str)
def test_masks_follow_the_randomness_of_vmap(layer: str, option: dict[str, Any]) -> None:
    ours, input = make(layer, **option), batch(layer)
    twice = torch.stack([input, input])

    def run(x: Tensor) -> Tensor:
        return ours(x)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(twice)
    same = torch.func.vmap(run, randomness="same")(twice)
    torch.testing.assert_close(same[0], same[1], rtol=1e-12, atol=1e-12)
    different = torch.func.vmap(run, randomness="different")(twice)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("option", [{"recurrent_dropout": 0.5}, {"zoneout": 0.5}], ids=str)
def test_compiled_masks_are_those_of_eager(layer: str, option: dict[str, Any]) -> None:
    torch._dynamo.reset()
    ours, input = make(layer, **option), batch(layer)
    torch.manual_seed(4)
    expected = ours(input)[0]
    torch.manual_seed(4)
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(input)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_dropout_between_layers_draws_after_the_masks_and_as_ever_without_them(layer: str) -> None:
    torch.manual_seed(1)
    theirs = getattr(nn, layer)(SIZE, H, 2, dropout=0.5, dtype=F64)
    torch.manual_seed(1)
    ours = make(layer, num_layers=2, dropout=0.5, grad_clip=1.0)
    input = batch(layer)
    torch.manual_seed(2)
    expected = theirs(input)[0]
    torch.manual_seed(2)
    torch.testing.assert_close(ours(input)[0], expected, rtol=1e-12, atol=1e-12)


# ---- The learned initial state -------------------------------------------------------------------


def learned(name: str, **options: Any) -> tuple[Any, Any]:
    """A layer or cell with learned states that are not zero, and the states as arguments."""
    ours = make(name, learn_initial_state=True, **options)
    states = [ours.h_0, ours.c_0] if "LSTM" in name else [ours.h_0]
    for state in states:
        nn.init.normal_(state)
    hx = [s.expand(-1, B, -1) if name in LAYERS else s.expand(B, -1) for s in states]
    return ours, tuple(hx) if "LSTM" in name else hx[0]


def test_learned_states_stand_where_hx_is_none(name: str) -> None:
    ours, hx = learned(name)
    input = batch(name)
    expected = list(tensors(ours(input, hx)))
    torch.testing.assert_close(list(tensors(ours(input))), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(list(tensors(ours(input))), expected, rtol=0, atol=0)
    sum(y.sum() for y in tensors(ours(input))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (ours.h_0,))
    one = input[:, 0] if name in LAYERS else input[0]
    alone = [y.squeeze(-2) if name in LAYERS else y for y in tensors(ours(one))]
    picked = [y[..., 0, :] for y in expected]
    torch.testing.assert_close([a.flatten() for a in alone], [p.flatten() for p in picked])


def test_learned_states_follow_a_reset_and_learn_from_it(layer: str) -> None:
    ours, hx = learned(layer, bidirectional=True)
    input = batch(layer)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2, 1] = True
    output, _ = ours(input, reset=reset)
    for steps in (slice(0, 2), slice(2, T)):
        alone, _ = ours(input[steps, 1:2])
        torch.testing.assert_close(output[steps, 1:2], alone, rtol=1e-12, atol=1e-12)
    given = [torch.zeros_like(s) for s in tensors(hx)]
    output, _ = ours(input, tuple(given) if layer == "LSTM" else given[0], reset=reset)
    (d_learned,) = torch.autograd.grad(output[2:, :, :H].sum(), ours.h_0)
    assert d_learned[0].abs().max() > 0  # the forward direction begins with it at step 2
    assert not d_learned[1].any()  # the reverse one with the state that was given
    output, _ = ours(input, tuple(given) if layer == "LSTM" else given[0])
    assert torch.autograd.grad(output.sum(), ours.h_0, allow_unused=True) == (None,)


def test_learned_states_of_sequences_without_steps(layer: str) -> None:
    ours, hx = learned(layer)
    _, hx_n = ours(batch(layer), lengths=[0, 3, 0, T])
    for last, first in zip(tensors(hx_n), tensors(hx), strict=True):
        assert torch.equal(last[:, [0, 2]], first[:, [0, 2]])


def test_learned_states_of_a_packed_sequence(layer: str) -> None:
    ours, _ = learned(layer, num_layers=2, bidirectional=True)
    sequences = [torch.randn(t, SIZE, dtype=F64) for t in (2, 5, 3)]
    output, hx_n = ours(pack_sequence(sequences, enforce_sorted=False))
    for k, sequence in enumerate(sequences):
        expected = ours(sequence)
        for last, alone in zip(tensors(hx_n), tensors(expected[1]), strict=True):
            torch.testing.assert_close(last[:, k], alone, rtol=1e-12, atol=1e-12)
    assert output.data.shape == (10, 2 * H)


# ---- The whole call ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
def test_everything_at_once_trains(layer: str, kind: str) -> None:
    ours = make(layer, num_layers=2, bidirectional=True, dropout=0.2, **everything(layer))
    input: Any = batch(layer).requires_grad_()
    options: dict[str, Any] = {}
    if kind == "lengths":
        options = {"lengths": [0, 2, T, 3], "reset": torch.rand(T, B) < 0.3}
    if kind == "packed":
        rows = [input[:t, b] for b, t in enumerate((2, T, 1, 3))]
        input = pack_sequence(rows, enforce_sorted=False)
    output, hx_n, states = ours(input, return_states=True, **options)
    values = [*tensors(output), *tensors(hx_n), *tensors(tuple(states))]
    assert all(torch.isfinite(y).all() for y in values)
    sum(y.square().sum() for y in values).backward()
    for key, parameter in ours.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_at_once_in_narrow_types_and_under_autocast(
    name: str, dtype: torch.dtype
) -> None:
    ours = make(name, **everything(name)).to(dtype)
    torch.manual_seed(1)
    outputs = list(tensors(ours(batch(name).to(dtype))))
    assert {y.dtype for y in outputs} == {dtype}
    if dtype != torch.float32:
        wide = make(name, **everything(name)).float()
        wide.load_state_dict({k: v.float() for k, v in ours.state_dict().items()})
        with torch.autocast("cpu", dtype=dtype):
            values = list(tensors(wide(batch(name).float())))
        sum(y.float().sum() for y in values).backward()
        assert all(p.grad.dtype == torch.float32 for p in wide.parameters())


def test_a_cell_is_one_step_of_its_layer_with_every_option(layer: str) -> None:
    options = everything(f"{layer}Cell")
    whole = make(layer, **options).eval()
    cell = make(f"{layer}Cell", **options).eval()
    state = {key.removesuffix("_l0"): value for key, value in whole.state_dict().items()}
    state |= {key: state[key][0] for key in ("h_0", "c_0") if key in state}
    cell.load_state_dict(state)
    input = batch(layer).requires_grad_()
    expected = list(tensors(whole(input)[1]))
    carried = None
    for x in input:
        carried = cell(x, carried)
    got = list(tensors(carried))
    torch.testing.assert_close(got, [y[0] for y in expected], rtol=1e-12, atol=1e-12)
    found = [
        torch.autograd.grad(values, [input, *leaves], [torch.ones_like(y) for y in values])
        for values, leaves in ((expected, whole.parameters()), (got, cell.parameters()))
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.flatten(), theirs.flatten(), rtol=1e-11, atol=1e-11)


def test_functional_call_and_parametrizations(layer: str) -> None:
    ours = make(layer, **everything(layer)).eval()
    input = batch(layer)
    doubled = {key: 2 * p for key, p in ours.named_parameters()}
    expected = torch.func.functional_call(ours, doubled, (input,))[0]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(ours(input)[0], expected, rtol=1e-12, atol=1e-12)
    before = ours(input)[0]
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    torch.testing.assert_close(ours(input)[0], before, rtol=1e-10, atol=1e-10)


def test_compile_and_export_of_every_option(layer: str) -> None:
    torch._dynamo.reset()
    ours, input = make(layer, num_layers=2, **everything(layer)).eval(), batch(layer)
    arguments = {"lengths": torch.tensor([2, 0, T, 3]), "reset": torch.rand(T, B) < 0.3}
    expected = ours(input, **arguments, return_states=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = compiled(input, **arguments, return_states=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with torch.no_grad():
        program = torch.export.export(
            ours,
            (input,),
            dynamic_shapes=({0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")},),
        )
    longer = torch.randn(T + 4, B - 2, SIZE, dtype=F64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(longer), ours(longer), rtol=0, atol=0)


# ---- To and from torch.nn ------------------------------------------------------------------------


def test_what_torch_has_no_equal_of_is_refused_by_name(name: str) -> None:
    harmless = ("forget_bias", "recompute")
    for option, value in everything(name).items():
        ours = make(name, **{option: value})
        if option in harmless:
            theirs = fastrnn.to_torch(ours)
            assert type(theirs) is getattr(nn, name)
            assert not hasattr(theirs, option)
            continue
        with pytest.raises(ValueError, match=rf"the {name} .* has {option}={value}, which torch"):
            fastrnn.to_torch(ours)


def test_convert_gives_layers_with_every_option_off(name: str) -> None:
    theirs = getattr(nn, name)(SIZE, H)
    ours = fastrnn.convert(theirs)
    assert all(getattr(ours, key) == default for key, default in ours.own_options.items())


# ---- the same bits by whatever path ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_clip_changes_no_bit_of_what_is_put_out(cell: str, dtype: torch.dtype) -> None:
    plain = getattr(fastrnn, cell)(16, 32, num_layers=2, bidirectional=True, dtype=dtype)
    clipped = getattr(fastrnn, cell)(
        16, 32, num_layers=2, bidirectional=True, dtype=dtype, grad_clip=0.5
    )
    clipped.load_state_dict(plain.state_dict())
    for steps, batch in ((20, 3), (1, 1)):
        x = torch.randn(steps, batch, 16).to(dtype)
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                assert torch.equal(plain(x)[0], clipped(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_state_gives_the_same_bits_with_resets_and_without(
    cell: str, dtype: torch.dtype
) -> None:
    layer = getattr(fastrnn, cell)(16, 32, num_layers=2, learn_initial_state=True, dtype=dtype)
    for state in (layer.h_0, getattr(layer, "c_0", layer.h_0)):
        torch.nn.init.normal_(state)
    x = torch.randn(20, 3, 16).to(dtype)
    reset = torch.zeros(20, 3, dtype=torch.bool)
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            assert torch.equal(layer(x)[0], layer(x, reset=reset)[0])
            late = reset.clone()
            late[15] = True
            whole = layer(x, reset=late)[0]
            assert torch.equal(whole[:10], layer(x[:10])[0])
            assert torch.equal(whole[15:], layer(x[15:])[0])


@pytest.mark.parametrize("layers", [1, 2])
def test_relu_passes_the_gradient_of_nan_on_as_torch(layers: int) -> None:
    theirs = torch.nn.RNN(3, 4, layers, nonlinearity="relu").double()
    ours = fastrnn.RNN(3, 4, layers, nonlinearity="relu").double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    x[2, 1, 0] = torch.nan
    gradients = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        layer(leaf)[0].sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*gradients, equal_nan=True)
