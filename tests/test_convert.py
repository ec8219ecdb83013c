"""`convert` and `to_torch`: the same results before and after, on the same Parameter objects."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from pairs import CELLS, LAYERS, Outcome, backward, fresh, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning"  # torch's own layer
)


class Reader(nn.Module):
    """A model with every kind of recurrent layer: packed, projected, both directions, cells."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {
                "lstm": nn.LSTM(5, 8, 2, bidirectional=True, batch_first=True, dropout=0.2),
                "gru": nn.GRU(16, 6, bidirectional=True, bias=False),
            }
        )
        self.projected = nn.LSTM(12, 9, 2, proj_size=4)
        self.elman = nn.Sequential(nn.RNN(4, 7, nonlinearity="relu", batch_first=True))
        self.tied = self.elman[0]
        self.cells = nn.ModuleList([nn.LSTMCell(7, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 3)])
        self.head = nn.Linear(3, 2)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
        hidden, (h_n, _) = self.encoder["lstm"](packed)
        sequence, _ = pad_packed_sequence(hidden)
        sequence, _ = self.encoder["gru"](sequence)
        sequence, _ = self.projected(sequence)
        sequence = self.tied(sequence.transpose(0, 1))[0]
        state = self.cells[0](sequence[:, -1])
        second = self.cells[1](state[0], state[1])
        return self.head(self.cells[2](second)) + h_n.sum()


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    input = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    return input.to(dtype), torch.tensor([4, 7, 2])


def outcome(model: nn.Module, *args: Any) -> Outcome:
    """Outputs and every gradient, under one seed for the dropout."""
    args = fresh(args)
    torch.manual_seed(2)
    outputs = list(tensors(model(*args)))
    backward(outputs)
    d_inputs = [x.grad for x in tensors(args) if x.is_floating_point()]
    d_weights = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return Outcome([o.detach() for o in outputs], d_inputs, d_weights)


def recurrent_classes(model: nn.Module) -> list[str]:
    names = {*LAYERS, *CELLS}
    return [
        f"{type(m).__module__}.{type(m).__name__}"
        for m in model.modules()
        if type(m).__name__ in names
    ]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_model_gives_the_same_outputs_and_gradients_before_and_after(
    dtype: torch.dtype, limit: float
) -> None:
    model = Reader().to(dtype)
    before = outcome(model, *batch(dtype))
    parameters = dict(model.named_parameters())
    assert fastrnn.convert(model) is model
    assert all(name.startswith("fastrnn.nn.") for name in recurrent_classes(model))
    assert len(recurrent_classes(model)) == 7
    assert model.tied is model.elman[0]
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[key] is parameters[key] for key in parameters)
    torch.testing.assert_close(outcome(model, *batch(dtype)), before, rtol=limit, atol=limit)

    assert fastrnn.to_torch(model) is model
    assert all(name.startswith("torch.nn.") for name in recurrent_classes(model))
    assert model.tied is model.elman[0]
    assert all(dict(model.named_parameters())[key] is parameters[key] for key in parameters)
    torch.testing.assert_close(outcome(model, *batch(dtype)), before, rtol=0, atol=0)


def test_an_optimiser_made_before_stays_valid() -> None:
    losses = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Reader().double()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        if convert:
            fastrnn.convert(model)
        losses.append([])
        for step in range(5):
            torch.manual_seed(step)
            optimiser.zero_grad()
            loss = model(*batch(torch.float64)).square().mean()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[1][-1] != losses[1][0]


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_a_layer_itself_is_returned_as_its_counterpart(name: str) -> None:
    layer = getattr(nn, name)(3, 4)
    layer.weight_frozen = None
    next(layer.parameters()).requires_grad_(False)
    layer.eval()
    ours = fastrnn.convert(layer)
    assert type(ours) is getattr(fastrnn, name)
    assert not ours.training
    assert not next(ours.parameters()).requires_grad
    assert repr(ours) == repr(layer)
    back = fastrnn.to_torch(ours)
    assert type(back) is getattr(nn, name)
    assert repr(back) == repr(layer)
    assert set(vars(back)) == set(vars(layer))
    assert all(a is b for a, b in zip(back.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_nothing_that_was_kept_for_the_engine_goes_back(name: str) -> None:
    ours = getattr(fastrnn, name)(3, 4)
    ours(torch.randn((5, 2, 3) if name in LAYERS else (2, 3)))
    back = fastrnn.to_torch(ours)
    assert set(vars(back)) == set(vars(getattr(nn, name)(3, 4)))
    pickle.dumps(back)


def test_a_model_without_recurrent_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = list(model)
    assert fastrnn.convert(model) is model
    assert fastrnn.to_torch(model) is model
    assert list(model) == before
    linear = nn.Linear(2, 2)
    assert fastrnn.convert(linear) is linear


@pytest.mark.parametrize("model", [None, nn.LSTM])
def test_what_is_no_module_is_refused_by_name(model: Any) -> None:
    for change in (fastrnn.convert, fastrnn.to_torch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            change(model)


def test_subclasses_are_left_alone() -> None:
    class MyLSTM(nn.LSTM):
        pass

    class OurGRU(fastrnn.GRU):
        pass

    model = nn.ModuleList([MyLSTM(3, 4), OurGRU(3, 4)])
    before = list(model)
    assert list(fastrnn.convert(model)) == before
    assert list(fastrnn.to_torch(model)) == before


def test_the_old_layer_still_runs_and_shares_its_weights() -> None:
    old = nn.LSTM(3, 4, dtype=torch.float64)
    new = fastrnn.convert(old)
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        new.weight_hh_l0.mul_(2)
    torch.testing.assert_close(new(input), old(input), rtol=1e-12, atol=1e-12)
    new.weight_hh_l0 = nn.Parameter(torch.zeros_like(new.weight_hh_l0))
    assert old.weight_hh_l0.any()


def test_hooks_are_carried_over_and_can_be_removed() -> None:
    calls: list[str] = []
    layer = nn.GRU(3, 4)
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append(type(module).__module__)),
        layer.register_forward_hook(lambda module, args, output: calls.append("after")),
        layer.register_full_backward_hook(lambda module, d_in, d_out: calls.append("backward")),
        layer.register_load_state_dict_pre_hook(
            lambda module, *args: calls.append(f"load {type(module).__module__}")
        ),
    ]
    ours = fastrnn.convert(layer)
    del layer
    ours(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    ours.load_state_dict(ours.state_dict())
    assert calls == ["fastrnn.nn", "after", "backward", "load fastrnn.nn"]
    for handle in handles:
        handle.remove()
    calls.clear()
    ours(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    ours.load_state_dict(ours.state_dict())
    assert not calls


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_weight_norm_and_parametrizations_are_carried_over(name: str, norm: Any) -> None:
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    model = nn.ModuleList([norm(getattr(nn, name)(3, 4, dtype=torch.float64), weight)])
    input = torch.randn((5, 2, 3) if name in LAYERS else (2, 3), dtype=torch.float64)
    state = torch.randn((1, 2, 4) if name in LAYERS else (2, 4), dtype=torch.float64)
    hx = (state, state.flip(0)) if "LSTM" in name else state
    before = outcome(model[0], input, hx)
    keys = list(model.state_dict())
    fastrnn.convert(model)
    assert isinstance(model[0], getattr(fastrnn, name))
    assert list(model.state_dict()) == keys
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(outcome(model[0], input, hx), before, **close)
    if norm is parametrizations.weight_norm:  # torch refuses to copy a layer with the old one
        torch.testing.assert_close(outcome(copy.deepcopy(model[0]), input, hx), before, **close)
    fastrnn.to_torch(model)
    assert isinstance(model[0], getattr(nn, name))
    torch.testing.assert_close(outcome(model[0], input, hx), before, **close)
    fastrnn.convert(model)
    if norm is parametrizations.weight_norm:
        parametrize.remove_parametrizations(model[0], weight)
        assert type(model[0]) is getattr(fastrnn, name)
        torch.testing.assert_close(outcome(model[0], input, hx).outputs, before.outputs, **close)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fastrnn.RNN(3, 4, nonlinearity="sigmoid"), "RNN .*nonlinearity='sigmoid'"),
        (lambda: fastrnn.RNNCell(3, 4, nonlinearity="identity"), "RNNCell .*='identity'"),
        (lambda: fastrnn.LSTM(3, 4, activation="relu"), "LSTM .*activation='relu'"),
        (lambda: fastrnn.GRUCell(3, 4, activation="relu"), "GRUCell .*activation='relu'"),
        (
            lambda: fastrnn.LSTMCell(3, 4, gate_activation="hardsigmoid"),
            "LSTMCell .*gate_activation='hardsigmoid'",
        ),
        (lambda: fastrnn.GRU(3, 4, reset_after=False), "GRU .*reset_after=False"),
    ],
)
def test_what_torch_does_not_have_is_refused_and_nothing_is_changed(make: Any, said: str) -> None:
    layer = make()
    model = nn.ModuleDict({"first": fastrnn.LSTM(3, 4), "inner": nn.Sequential(layer)})
    with pytest.raises(ValueError, match=f"the {said}, which torch.nn does not have"):
        fastrnn.to_torch(model)
    with pytest.raises(ValueError, match=r"at 'inner\.0' has"):
        fastrnn.to_torch(model)
    assert type(model["first"]) is fastrnn.LSTM
    with pytest.raises(ValueError, match="at the top of the model has"):
        fastrnn.to_torch(layer)


@pytest.mark.parametrize("zoneout", [0, (0.0, 0.0), [0, 0]])
def test_zoneout_that_is_off_goes_back(zoneout: Any) -> None:
    for name in ("LSTM", "LSTMCell"):
        ours = getattr(fastrnn, name)(3, 4, zoneout=zoneout)
        assert type(fastrnn.to_torch(ours)) is getattr(nn, name)


def test_every_nonlinearity_torch_has_goes_back() -> None:
    for name in ("RNN", "RNNCell"):
        for nonlinearity in ("tanh", "relu"):
            theirs = fastrnn.to_torch(getattr(fastrnn, name)(3, 4, nonlinearity=nonlinearity))
            assert theirs.nonlinearity == nonlinearity
            assert type(theirs) is getattr(nn, name)
