"""Frozen layers: the same bits from weights that were packed once, until something thaws them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from test_inference import flat, short_way

I, H = 20, 24  # noqa: E741

MODULES = {
    "LSTM": lambda: fastrnn.LSTM(I, H, num_layers=2, bidirectional=True),
    "projected": lambda: fastrnn.LSTM(I, H, proj_size=7),
    "GRU": lambda: fastrnn.GRU(I, H),
    "before": lambda: fastrnn.GRU(I, H, reset_after=False),
    "RNN": lambda: fastrnn.RNN(I, H, bias=False),
    "norm": lambda: fastrnn.LSTM(I, H, layer_norm=True, peephole=True),
    "heads": lambda: fastrnn.GRU(I, H, heads=4),
    "half": lambda: fastrnn.LSTM(I, H, dtype=torch.bfloat16),
    "double": lambda: fastrnn.GRU(I, H, dtype=torch.float64),
    "LSTMCell": lambda: fastrnn.LSTMCell(I, H),
    "GRUCell": lambda: fastrnn.GRUCell(I, H),
    "RNNCell": lambda: fastrnn.RNNCell(I, H),
}


def is_frozen(module: torch.nn.Module) -> bool:
    found = module._prepared.frozen
    return found is not None and found.packed


def inputs(module: Any) -> list[Tensor]:
    shapes = [(3, I)] if "Cell" in type(module).__name__ else [(1, 1, I), (40, 3, I)]
    return [torch.randn(shape).to(next(module.parameters()).dtype) for shape in shapes]


@pytest.mark.parametrize("name", MODULES)
def test_frozen_gives_the_same_bits(name: str) -> None:
    module = MODULES[name]().eval()
    for input in inputs(module):
        fastrnn.unfreeze(module)
        expected = short_way(module, input)
        assert fastrnn.freeze(module) is module
        for _ in range(2):
            got = short_way(module, input)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert is_frozen(module)


@pytest.mark.parametrize("name", MODULES)
def test_a_frozen_call_reads_the_packed_weights(name: str) -> None:
    """What the docstring warns of: a write behind torch's back is not seen until unfreeze."""
    module = MODULES[name]().eval()
    input = inputs(module)[0]
    before = short_way(fastrnn.freeze(module), input)
    module.get_parameter(module._flat_weights_names[0]).data.mul_(0.5)
    assert torch.equal(short_way(module, input)[0], before[0])
    assert not torch.equal(short_way(fastrnn.unfreeze(module), input)[0], before[0])


def written(module: Any) -> None:
    with torch.no_grad():
        module.weight_hh_l0[3, 2] += 1


def loaded(module: Any) -> None:
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def replaced(module: Any) -> None:
    module.weight_ih_l0 = torch.nn.Parameter(torch.randn_like(module.weight_ih_l0))


def moved(module: Any) -> None:
    module.weight_ih_l0.data = torch.randn_like(module.weight_ih_l0)


def stepped(module: Any) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def trained(module: Any) -> None:
    module.train()
    module.weight_hh_l0.data.mul_(0.5)
    module.eval()


def recorded(module: Any) -> None:
    module(torch.randn(2, 1, I))
    module.weight_hh_l0.data.mul_(0.5)


def cast(module: Any) -> None:
    module.double().float()
    module.weight_hh_l0.data.mul_(0.5)


def parametrized(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)


@pytest.mark.parametrize(
    "thaw", [written, loaded, replaced, moved, stepped, trained, recorded, cast, parametrized]
)
@pytest.mark.parametrize("steps", [1, 30])
def test_what_thaws_a_layer(thaw: Any, steps: int) -> None:
    module = fastrnn.freeze(fastrnn.GRU(I, H).eval())
    input, h = torch.randn(steps, 2, I), torch.randn(1, 2, H)
    before = short_way(module, input, h)
    assert is_frozen(module)
    thaw(module)
    got = short_way(module, input, h)
    assert not is_frozen(module)
    expected = short_way(copy.deepcopy(module), input, h)
    assert not torch.equal(before[0], got[0])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_calls_with_lengths_and_resets_use_the_packed_weights_too() -> None:
    module = fastrnn.LSTM(I, H).eval()
    input, lengths = torch.randn(6, 3, I), torch.tensor([6, 0, 2])
    reset = torch.rand(6, 3) < 0.3
    with torch.no_grad():
        expected = module(input, lengths=lengths, reset=reset, return_states=True)
        fastrnn.freeze(module)
        got = module(input, lengths=lengths, reset=reset, return_states=True)
        module.weight_hh_l0.data.mul_(0.5)
        kept = module(input, lengths=lengths, reset=reset, return_states=True)
    for result in (got, kept):
        pairs = zip(flat(result), flat(expected), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert is_frozen(module)


def test_copies_are_not_frozen() -> None:
    module = fastrnn.freeze(fastrnn.GRU(I, H))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not is_frozen(other)
        assert is_frozen(module)


def test_what_cannot_be_frozen_is_named() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(fastrnn.GRU(I, H), "weight_hh_l0")
    model = torch.nn.ModuleDict(
        {"a": fastrnn.LSTM(I, H), "b": normed, "c": fastrnn.RNN(I, H, device="meta")}
    )
    with pytest.warns(UserWarning, match=r"freeze: .*b: its weights.*; c: .* on meta") as caught:
        fastrnn.freeze(model)
    assert len(caught) == 1
    assert "a:" not in str(caught[0].message)
    assert is_frozen(model["a"])


@pytest.mark.parametrize("function", [fastrnn.freeze, fastrnn.unfreeze])
def test_no_model(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        function(3)
