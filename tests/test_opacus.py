"""Opacus finds the right gradient of each sample for every layer, cell and form of call."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from pairs import CELLS, LAYERS, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore")  # of Opacus, about itself and its secure mode
pytest.importorskip("opacus", reason="opacus is not installed")

from opacus import PrivacyEngine  # noqa: E402
from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

T, B, I, H = 5, 4, 3, 6  # noqa: E741
every_layer = pytest.mark.parametrize("name", LAYERS)


class Model(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(self.layer, *args)


def loss(result: Any) -> Tensor:
    """Of all that a layer returns, each by another weight."""
    return sum((k + 1) * y.sin().sum() for k, y in enumerate(tensors(result)))


def of_sample(value: Any, axis: int, sample: int) -> Any:
    if isinstance(value, tuple):
        return tuple(of_sample(x, axis, sample) for x in value)
    return value.narrow(axis, sample, 1)


def check(
    layer: nn.Module,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    axes: tuple[int, ...],
    reduction: str = "sum",
    **options: Any,
) -> None:
    """``grad_sample`` is the gradient of each sample by itself, twice over.

    ``axes`` says where the arguments have their samples.
    """
    model = Model(layer, call)
    alone = copy.deepcopy(model)
    samples = args[0].shape[axes[0]]
    want: list[dict[str, Tensor]] = []
    for k in range(samples):
        alone.zero_grad()
        own = [of_sample(x, axis, k) for x, axis in zip(args, axes, strict=True)]
        loss(alone(*own)).backward()
        want.append({n: p.grad.clone() for n, p in alone.named_parameters()})
    wrapped = GradSampleModule(model, loss_reduction=reduction, **options)
    factor = samples if reduction == "mean" else 1
    for _ in range(2):
        wrapped.zero_grad()
        (loss(wrapped(*args)) / factor).backward()
        for name, p in model.named_parameters():
            expected = torch.stack([d[name] for d in want])
            torch.testing.assert_close(p.grad_sample, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(p.grad * factor, expected.sum(0), rtol=1e-4, atol=1e-5)


@every_layer
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer(name: str, reduction: str, batch_first: bool) -> None:
    layer = getattr(fastrnn, name)(I, H, batch_first=batch_first)
    x = torch.randn((B, T, I) if batch_first else (T, B, I))
    axis = 0 if batch_first else 1
    check(layer, lambda r, x: r(x), (x,), (axis,), reduction, batch_first=batch_first)


@every_layer
def test_the_gradient_of_the_last_state_alone(name: str) -> None:
    check(getattr(fastrnn, name)(I, H), lambda r, x: r(x)[1], (torch.randn(T, B, I),), (1,))


@every_layer
@pytest.mark.parametrize("by_name", [False, True])
def test_initial_states(name: str, by_name: bool) -> None:
    h, c = torch.randn(1, B, H), torch.randn(1, B, H)
    hx = (h, c) if name == "LSTM" else h
    call = (lambda r, x, hx: r(x, hx=hx)) if by_name else (lambda r, x, hx: r(x, hx))
    check(getattr(fastrnn, name)(I, H), call, (torch.randn(T, B, I), hx), (1, 1))


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_resets_states_and_options(name: str, batch_first: bool) -> None:
    layer = getattr(fastrnn, name)(
        I,
        H,
        num_layers=2,
        bidirectional=True,
        batch_first=batch_first,
        layer_norm=True,
        learn_initial_state=True,
    )
    x, reset, axis = torch.randn(T, B, I), torch.rand(T, B) > 0.6, 1
    if batch_first:
        x, reset, axis = x.transpose(0, 1), reset.t(), 0

    def call(r: Any, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return r(x, lengths=lengths, reset=reset, return_states=True)

    check(layer, call, (x, torch.tensor([5, 2, 0, 1]), reset), (axis, 0, axis))


@every_layer
def test_packed_sequences(name: str) -> None:
    def call(r: Any, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, h_n, states = r(packed, return_states=True)
        every = [packed._replace(data=data) for data in states.h]
        return [pad_packed_sequence(p)[0] for p in (output, *every)], h_n

    layer = getattr(fastrnn, name)(I, H, num_layers=2, bidirectional=True)
    check(layer, call, (torch.randn(T, B, I), torch.tensor([5, 2, 3, 1])), (1, 0))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [{}, {"learn_initial_state": True, "layer_norm": True}])
def test_a_cell_over_all_steps(name: str, options: dict[str, Any]) -> None:
    def call(cell: Any, x: Tensor) -> list[Any]:
        hx, every = None, []
        for step in x:
            hx = cell(step, hx)
            every.append(hx)
        return every

    check(getattr(fastrnn, name)(I, H, **options), call, (torch.randn(T, B, I),), (1,))


class _Output(fastrnn.GRU):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class _Plain(fastrnn.LSTM):
    """A subclass that changes nothing of the computation."""


def test_subclasses() -> None:
    x = torch.randn(B, T, I)
    check(_Output(I, H, batch_first=True), lambda r, x: r(x), (x,), (0,))
    check(_Plain(I, H, batch_first=True), lambda r, x: r(x)[1], (x,), (0,))


def test_one_sequence_is_one_sample() -> None:
    model = GradSampleModule(Model(fastrnn.GRU(I, H), lambda r, x: r(x)), loss_reduction="sum")
    loss(model(torch.randn(T, I))).backward()
    weight = model._module.layer.weight_hh_l0
    torch.testing.assert_close(weight.grad_sample, weight.grad.unsqueeze(0))


def test_a_batch_without_samples() -> None:
    model = GradSampleModule(Model(fastrnn.GRU(I, H), lambda r, x: r(x)), loss_reduction="sum")
    loss(model(torch.randn(T, 0, I))).backward()
    assert model._module.layer.weight_hh_l0.grad_sample.shape == (0, 3 * H, H)


def test_frozen_parameters_have_none() -> None:
    layer = fastrnn.GRU(I, H)
    layer.bias_hh_l0.requires_grad_(False)
    loss(GradSampleModule(Model(layer, lambda r, x: r(x)))(torch.randn(T, B, I))).backward()
    assert layer.weight_hh_l0.grad_sample.shape == (B, 3 * H, H)
    assert getattr(layer.bias_hh_l0, "grad_sample", None) is None


def test_autocast_holds_for_the_samples_too() -> None:
    layer = fastrnn.GRU(I, H)
    model = GradSampleModule(Model(layer, lambda r, x: r(x)), loss_reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(model(torch.randn(T, B, I)))
    result.backward()
    found, want = layer.weight_hh_l0.grad_sample.sum(0), layer.weight_hh_l0.grad
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.5, "num_layers": 2}, {"recurrent_dropout": 0.5}, {"zoneout": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_what_draws_at_random_is_refused(options: dict[str, Any]) -> None:
    model = GradSampleModule(Model(fastrnn.GRU(I, H, **options), lambda r, x: r(x)))
    with pytest.raises(RuntimeError, match=rf"{next(iter(options))}=0\.5 would draw other masks"):
        model(torch.randn(T, B, I))
    model.eval()(torch.randn(T, B, I))


def test_a_cell_that_draws_at_random_is_refused() -> None:
    model = GradSampleModule(Model(fastrnn.GRUCell(I, H, zoneout=0.5), lambda r, x: r(x)))
    with pytest.raises(RuntimeError, match=r"GRUCell with zoneout=0\.5 would draw other masks"):
        model(torch.randn(B, I))
    model.eval()(torch.randn(B, I))


def test_nothing_is_kept_without_training_or_hooks() -> None:
    layer = fastrnn.GRU(I, H)
    model, x = GradSampleModule(Model(layer, lambda r, x: r(x))), torch.randn(T, B, I)
    model.eval()(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert not getattr(layer, "activations", [])
    model.remove_hooks()
    assert not layer._forward_hooks
    loss(layer(x)).backward()


def test_other_hooks_stay_as_they_are() -> None:
    layer, seen = fastrnn.GRU(I, H), []
    layer.register_forward_hook(lambda module, args, result: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, d_in, d_out: seen.append("backward"))
    x = torch.randn(T, B, I)
    loss(GradSampleModule(Model(layer, lambda r, x: r(x)))(x)).backward()
    assert seen == ["forward", "backward"]
    assert layer.weight_hh_l0.grad_sample.shape == (B, 3 * H, H)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_the_validator_is_satisfied_and_changes_nothing(name: str) -> None:
    model = nn.ModuleDict({"layer": getattr(fastrnn, name)(I, H)})
    assert ModuleValidator.validate(model, strict=True) == []
    assert type(ModuleValidator.fix(model)["layer"]) is getattr(fastrnn, name)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_private_training_takes_a_step(mode: str) -> None:
    model: Any = Model(fastrnn.LSTM(I, H, batch_first=True), lambda r, x: r(x)[1][0][-1])
    before = copy.deepcopy(model.state_dict())
    data = TensorDataset(torch.randn(B, T, I), torch.randint(0, H, (B,)))
    model, optimizer, *criterion, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=DataLoader(data, batch_size=2),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    compute = criterion[0] if criterion else nn.CrossEntropyLoss()
    for x, y in loader:
        optimizer.zero_grad()
        compute(model(x), y).backward()
        optimizer.step()
    after = model._module.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before)
