"""`convert` and `to_torch`: the same results before and after, on the same Parameter objects."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.layers.cell import RecurrentCell
from fastrnn.layers.layer import RecurrentLayer
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
def test_converting_back_drops_what_was_kept_for_the_engine(name: str) -> None:
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


def test_subclasses_of_ours_are_left_alone() -> None:
    class OurGRU(fastrnn.GRU):
        pass

    model = nn.ModuleList([OurGRU(3, 4)])
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
def test_a_layer_with_zoneout_off_converts_back(zoneout: Any) -> None:
    for name in ("LSTM", "LSTMCell"):
        ours = getattr(fastrnn, name)(3, 4, zoneout=zoneout)
        assert type(fastrnn.to_torch(ours)) is getattr(nn, name)


def test_every_nonlinearity_of_torch_converts_back() -> None:
    for name in ("RNN", "RNNCell"):
        for nonlinearity in ("tanh", "relu"):
            theirs = fastrnn.to_torch(getattr(fastrnn, name)(3, 4, nonlinearity=nonlinearity))
            assert theirs.nonlinearity == nonlinearity
            assert type(theirs) is getattr(nn, name)


# ---- users' classes ---------------------------------------------------------------------------


class Bare(nn.GRU):
    """It changes nothing."""


class Halved(nn.LSTM):
    """It does something around torch's forward, and takes its own arguments."""

    def __init__(self, *sizes: int, factor: float = 0.5) -> None:
        super().__init__(*sizes, batch_first=True)
        self.factor = factor
        self.head = nn.Linear(self.hidden_size, 2)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx=hx)
        return self.head(output * self.factor), states

    def size(self) -> int:
        return self.hidden_size


class Flexible(abc.ABC, nn.RNNBase):
    """A base class of the user's with an abstract method."""

    @abc.abstractmethod
    def start(self, input: Tensor) -> Any: ...

    def forward(self, input: Any, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(input, self.start(input) if hx is None else hx)
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, states = super().forward(packed, hx=hx)
        return pad_packed_sequence(output)[0], states


class FlexibleRNN(Flexible, nn.RNN):
    def start(self, input: Tensor) -> Tensor:
        return input.new_ones(self.num_layers, input.shape[1], self.hidden_size)


class Stepped(nn.GRU):
    """The call of torch's forward stands in another method, with the long form of super."""

    def forward(self, input: Tensor) -> Tensor:
        return self._last(input) * 2

    def _last(self, input: Tensor) -> Tensor:
        return super(Stepped, self).forward(input)[1]  # noqa: UP008


class QuietCell(nn.LSTMCell):
    @torch.no_grad()
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)


class Dropped(nn.LSTM):
    """Its weights are drawn anew by a forward that is put on the object."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        weight = self._parameters.pop("weight_hh_l0")
        self.weight_hh_l0_raw = nn.Parameter(weight.data)
        module, inner = self, self.forward

        def forward(*args: Any) -> Any:
            dropped = nn.functional.dropout(module.weight_hh_l0_raw, 0.5, module.training)
            module.weight_hh_l0 = dropped * 1
            return inner(*args)

        self.forward = forward  # type: ignore[method-assign]


class Normed(nn.GRU):
    """Its attributes have the names of our options."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.layer_norm = nn.LayerNorm(self.hidden_size)
        self.heads = 3
        self.recurrent_dropout = 0.7

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return self.layer_norm(super().forward(input, hx)[0]) * self.heads


USERS = [Bare, Halved, FlexibleRNN, Stepped, QuietCell, Dropped, Normed]


@pytest.fixture(params=USERS, ids=lambda cls: cls.__name__)
def users(request: pytest.FixtureRequest) -> Any:
    """A module of each of the users' classes."""
    torch.manual_seed(1)
    return request.param(3, 4)


def given_to(module: Any) -> Tensor:
    torch.manual_seed(3)
    return torch.randn((2, 3) if isinstance(module, nn.RNNCellBase | RecurrentCell) else (5, 2, 3))


def results(module: Any) -> list[Tensor]:
    torch.manual_seed(2)
    return [result.detach() for result in tensors(module(given_to(module)))]


def converted(module: Any) -> Any:
    """The module changed over, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fastrnn.convert(module)


def test_a_users_class_keeps_its_name_and_methods_over_our_layer(users: Any) -> None:
    cls, before, keys = type(users), results(users), list(users.state_dict())
    ours = converted(users)
    assert isinstance(ours, cls)
    assert isinstance(ours, RecurrentLayer | RecurrentCell)
    assert not isinstance(ours, nn.RNNBase | nn.RNNCellBase)
    assert type(ours).__name__ == cls.__name__
    assert type(ours).__module__ == cls.__module__
    assert repr(ours) == repr(users)
    assert list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(ours.parameters(), users.parameters(), strict=True))
    torch.testing.assert_close(results(ours), before)
    if cls is Halved:
        assert ours.size() == 4
        assert isinstance(type(ours)(3, 4, factor=0.1), RecurrentLayer)


def test_a_users_class_converts_back(users: Any) -> None:
    cls, before, attributes = type(users), results(users), set(vars(users))
    back = fastrnn.to_torch(converted(users))
    assert type(back) is cls
    assert set(vars(back)) == attributes
    assert all(torch.equal(a, b) for a, b in zip(results(back), before, strict=True))


def test_a_converted_users_module_is_copied_and_pickled(users: Any) -> None:
    ours = converted(users)
    if type(users) is Dropped:  # torch copies no module with a function on it that holds it
        ours = converted(Bare(3, 4))
    expected = results(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert type(copied) is type(ours)
        assert all(torch.equal(a, b) for a, b in zip(results(copied), expected, strict=True))
        assert set(vars(fastrnn.to_torch(copied))) == set(vars(fastrnn.to_torch(ours)))


def test_two_modules_of_one_users_class_have_one_class_afterwards() -> None:
    model = converted(nn.ModuleList([Halved(3, 4), Halved(3, 4)]))
    assert type(model[0]) is type(model[1])
    assert isinstance(Halved(3, 4), nn.LSTM)  # the class itself is as it was


def test_a_users_forward_gets_our_gradients_and_is_compiled_whole() -> None:
    torch.manual_seed(1)
    theirs = Halved(3, 4).double()
    input = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = outcome(theirs, input)
    ours = converted(theirs)
    torch.testing.assert_close(outcome(ours, input), expected, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), ours(input), rtol=0, atol=0)


def test_a_forward_on_the_object_follows_the_new_module() -> None:
    old = Dropped(3, 4)
    ours = converted(old)
    old.eval()
    input = given_to(ours)
    first, second = (ours(input)[0] for _ in range(2))
    assert not torch.equal(first, second)
    plain = nn.GRU(3, 4)
    inner = plain.forward
    plain.forward = lambda input: inner(input)[0] * 2  # type: ignore[method-assign, assignment]
    expected = plain(given_to(plain))
    ours = converted(plain)
    torch.testing.assert_close(ours(given_to(plain)), expected)
    assert ours.forward.__closure__[0].cell_contents.__self__ is ours


def test_functions_on_other_modules_follow_too() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Dropped(3, 4)
            self.forward = self.layer.forward  # type: ignore[method-assign, assignment]
            self.part = functools.partial(self.layer.forward)
            self.bound = self.layer.extra_repr
            vars(self)["hidden"] = self.layer

    wrapper = converted(Wrapper())
    for value in (wrapper.forward, wrapper.part.func):
        caught = inspect.getclosurevars(value).nonlocals
        assert caught["module"] is wrapper.layer
        assert caught["inner"].__self__ is wrapper.layer
    assert wrapper.bound.__self__ is wrapper.hidden is wrapper.layer
    input = given_to(wrapper.layer)
    assert not torch.equal(wrapper(input)[0], wrapper(input)[0])
    wrapper.eval()
    assert torch.equal(wrapper.part(input)[0], wrapper.layer(input)[0])


def test_a_parametrized_users_class_changes_over_and_back() -> None:
    module = parametrizations.weight_norm(Halved(3, 4), "weight_hh_l0")
    before = results(module)
    ours = converted(module)
    torch.testing.assert_close(results(ours), before)
    assert isinstance(ours, Halved)
    torch.testing.assert_close(results(copy.deepcopy(ours)), before)
    back = fastrnn.to_torch(ours)
    assert isinstance(back, nn.LSTM)
    torch.testing.assert_close(results(back), before)
    parametrize.remove_parametrizations(back, "weight_hh_l0")
    assert type(back) is Halved


def test_recurrent_modules_inside_a_users_module_change_over_too() -> None:
    class Nested(nn.GRU):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.inner = nn.LSTM(3, 4)

        def forward(self, input: Tensor) -> Any:
            return super().forward(input)[0] + self.inner(input)[0]

    nested = Nested()
    before = results(nested)
    ours = converted(nested)
    assert type(ours.inner) is fastrnn.LSTM
    torch.testing.assert_close(results(ours), before)
    assert type(fastrnn.to_torch(ours).inner) is nn.LSTM


def test_a_compiled_module_does_not_keep_what_was_compiled_of_the_old() -> None:
    layer = nn.LSTM(3, 4)
    layer.compile(backend="aot_eager")
    ours = converted(layer)
    assert ours._compiled_call_impl is None
    assert type(ours(given_to(ours))[0]) is Tensor
    ours.compile(backend="aot_eager")
    assert fastrnn.to_torch(ours)._compiled_call_impl is None


# ---- what is left, and the warning that says so -----------------------------------------------


class OwnEngine(nn.GRU):
    def forward(self, input: Tensor) -> Any:
        h = input.new_zeros(1, input.shape[1], self.hidden_size)
        weights = self._flat_weights
        return torch._VF.gru(input, h, weights, True, 1, 0.0, False, False, False)[0]


class OwnForward(nn.LSTM):
    def forward(self, input: Tensor) -> Any:
        return nn.functional.linear(input, self.weight_ih_l0)


class Named(nn.LSTM):
    def forward(self, input: Tensor) -> Any:
        return nn.LSTM.forward(self, input)


class Unchecked(nn.LSTM):
    def check_forward_args(self, *args: Any) -> None:
        """It lets everything through."""


class OwnWeights(nn.LSTM):
    @property
    def _flat_weights(self) -> Any:
        return self.kept

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        self.kept = weights


class OwnRun(nn.LSTM):
    def _run(self) -> None:
        """A name of ours."""


class OwnBase(nn.RNNBase):
    def __init__(self, *sizes: int) -> None:
        super().__init__("GRU", *sizes)


class OwnReduce(nn.GRU):
    def __reduce__(self) -> Any:
        return OwnReduce, (self.input_size, self.hidden_size)


class Slotted(nn.GRU):
    __slots__ = ("kept",)


class Registered(nn.GRU):
    """A class that lets nothing be derived from it without a name."""

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()


REASONS = {
    OwnEngine: r"forward of OwnEngine calls torch's engine, _VF, itself",
    OwnForward: r"its forward does not call super\(\)\.forward",
    Named: r"forward of Named names torch\.nn's LSTM itself",
    Unchecked: r"Unchecked defines check_forward_args",
    OwnWeights: r"OwnWeights defines _flat_weights",
    OwnRun: r"OwnRun defines _run, which has another meaning in fastrnn",
    OwnBase: r"derives directly from torch\.nn's base class",
    OwnReduce: r"OwnReduce defines __reduce__",
    Slotted: r"Slotted has __slots__",
    Registered: r"no class can be derived from it: .*'name'",
}


@pytest.mark.parametrize("cls", REASONS, ids=lambda cls: cls.__name__)
def test_what_does_more_than_call_torchs_forward_is_left_and_named(cls: Any) -> None:
    model = nn.ModuleDict({"first": nn.LSTM(3, 4), "rest": nn.Sequential(cls(3, 4))})
    layer = model["rest"][0]
    said = rf"convert left 1 recurrent module as torch\.nn's: 'rest\.0' \(.*\): .*{REASONS[cls]}"
    with pytest.warns(UserWarning, match=said) as caught:
        fastrnn.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model["rest"][0] is layer
    assert type(layer) is cls
    assert type(model["first"]) is fastrnn.LSTM
    with pytest.warns(UserWarning, match="the model itself"):
        assert fastrnn.convert(layer) is layer


def test_one_warning_names_all_that_is_left() -> None:
    quantized = torch.ao.nn.quantized.reference.LSTMCell(3, 4)
    replaced = nn.GRU(3, 4)
    replaced.forward = lambda input: input  # type: ignore[method-assign, assignment]
    taken = nn.GRU(3, 4)
    taken._own = 1
    model = nn.ModuleDict({"a": OwnForward(3, 4), "b": replaced, "c": quantized, "d": taken})
    model["again"] = model["a"]
    with pytest.warns(UserWarning, match="convert left 4 recurrent modules") as caught:
        fastrnn.convert(model)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'b' (torch.nn.modules.rnn.GRU): its forward was replaced by one" in message
    assert (
        "'c' (torch.ao.nn.quantized.reference.modules.rnn.LSTMCell): it derives directly" in message
    )
    assert "'d' (torch.nn.modules.rnn.GRU): its attribute _own has another meaning" in message
    assert [type(module) for module in model.values()][:2] == [OwnForward, nn.GRU]


def test_a_users_file_is_loaded_where_torch_is_patched_first(tmp_path: Any) -> None:
    (tmp_path / "users_module.py").write_text(
        textwrap.dedent("""
            import torch

            class Doubled(torch.nn.LSTM):
                def forward(self, input, hx=None):
                    return super().forward(input, hx)[0] * 2
        """)
    )
    run = "import pickle, sys, torch, fastrnn; sys.path.insert(0, sys.argv[1]); "
    write = run + textwrap.dedent("""
        import users_module
        layer = fastrnn.convert(users_module.Doubled(3, 4))
        input = torch.randn(5, 2, 3)
        open(sys.argv[1] + "/file", "wb").write(pickle.dumps((layer, input, layer(input))))
    """)
    read = run + textwrap.dedent("""
        import contextlib
        for patch in (fastrnn.patch_torch, contextlib.nullcontext):
            with patch():
                sys.modules.pop("users_module", None)
                layer, input, output = pickle.loads(open(sys.argv[1] + "/file", "rb").read())
            assert isinstance(layer, fastrnn.LSTM), type(layer).__mro__
            assert torch.equal(layer(input), output)
    """)
    for code in (write, read):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
