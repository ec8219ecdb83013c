"""torch's FlopCounterMode counts a layer's products as it counts those of the same operations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn._engine import NO_EXTRAS
from fastrnn.calls import composed
from pairs import LAYERS, tensors

T, B, I, H = 10, 4, 32, 64  # noqa: E741
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
every_layer = pytest.mark.parametrize("name", LAYERS)


def count(function: Any, *args: Any, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args, **options)
    return counter.get_total_flops()


def both_passes(layer: Any, *args: Any, **options: Any) -> tuple[int, int]:
    """The FLOPs of forward and of backward."""
    with FlopCounterMode(display=False) as forward:
        result = layer(*args, **options)
    with FlopCounterMode(display=False) as backward:
        sum(y.sum() for y in tensors(result)).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@every_layer
def test_a_layer_without_gradient(name: str) -> None:
    layer = getattr(fastrnn, name)(I, H)
    with torch.no_grad():
        assert count(layer, torch.randn(T, B, I)) == 2 * T * B * GATES[name] * H * (I + H)
    with torch.inference_mode():
        assert count(layer, torch.randn(T, B, I)) == 2 * T * B * GATES[name] * H * (I + H)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_a_cell(name: str) -> None:
    flops = count(getattr(fastrnn, name)(I, H), torch.randn(B, I))
    assert flops == 2 * B * GATES[name.removesuffix("Cell")] * H * (I + H)


@pytest.mark.parametrize("name", ["RNN", "GRU"])  # of an LSTM torch counts nothing
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}])
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("of_states", [False, True])
def test_as_torchs_layer(
    name: str, options: dict[str, Any], of_input: bool, of_states: bool
) -> None:
    x = torch.randn(T, B, I, requires_grad=of_input)
    groups = 6 if options else 1
    hx = torch.randn(groups, B, H, requires_grad=True) if of_states else None
    layers = [getattr(module, name)(I, H, **options) for module in (torch.nn, fastrnn)]
    theirs, ours = (both_passes(layer, x, hx) for layer in layers)
    assert ours == theirs


OPTIONS: dict[str, dict[str, Any]] = {
    "projection": {"proj_size": 8, "num_layers": 2, "bidirectional": True},
    "heads": {"heads": 4, "num_layers": 2},
    "layer norm, peephole": {"layer_norm": True, "peephole": True},
    "learned states": {"learn_initial_state": True, "num_layers": 2},
    "frozen": {"num_layers": 2},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_as_the_same_in_plain_operations(case: str) -> None:
    layer = fastrnn.LSTM(I, H, **OPTIONS[case])
    if case == "frozen":
        layer.weight_hh_l0.requires_grad_(False)
        layer.weight_ih_l1.requires_grad_(False)
    x = torch.randn(T, B, I)

    def by_operations(x: torch.Tensor) -> tuple[Any, ...]:
        hx = None
        if layer.learn_initial_state:
            hx = (layer.h_0.expand(-1, B, -1), layer.c_0.expand(-1, B, -1))
        stack = composed.forward(layer._options, x, hx, layer._flat_weights, extras=NO_EXTRAS)
        return stack.hidden[-1], stack.h_n, stack.c_n

    assert both_passes(layer, x) == both_passes(by_operations, x)


@every_layer
def test_rows_that_do_not_run_do_not_count(name: str) -> None:
    layer, x = getattr(fastrnn, name)(I, H), torch.randn(T, B, I)
    lengths = torch.tensor([10, 3, 0, 7])
    assert both_passes(layer, x, lengths=lengths)[0] == 2 * 20 * GATES[name] * H * (I + H)
    packed = pack_padded_sequence(x[:, [0, 3, 1]], lengths[[0, 3, 1]])
    assert both_passes(layer, packed) == both_passes(layer, x, lengths=lengths)


def test_lengths_that_are_not_known_count_as_full() -> None:
    layer = fastrnn.GRU(I, H, device="meta")
    x, lengths = (
        torch.randn(T, B, I, device="meta"),
        torch.empty(B, dtype=torch.int64, device="meta"),
    )
    assert count(layer, x, lengths=lengths) == 2 * T * B * 3 * H * (I + H)


def test_recompute_counts_what_it_computes_again() -> None:
    x = torch.randn(T, B, I)
    forward, backward = both_passes(fastrnn.GRU(I, H), x)
    assert both_passes(fastrnn.GRU(I, H, recompute=True), x) == (forward, forward + backward)


def test_ensembles_count_as_their_members() -> None:
    layer, x = fastrnn.GRU(I, H), torch.randn(5, T, B, I)
    weights = {n: p.detach().expand(5, *p.shape) for n, p in layer.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].sum()

    one = sum(both_passes(layer, x[0]))
    assert count(torch.func.vmap(torch.func.grad(loss)), weights, x) == 5 * one
    forward = both_passes(layer, x[0])[0]
    assert count(torch.func.vmap(loss), weights, x) == 5 * forward


def test_flops_stand_under_the_module_that_computes() -> None:
    model = nn.Sequential(fastrnn.GRU(I, H))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(T, B, I))
    (counted,) = counter.get_flop_counts()["Sequential.0"].items()
    assert counted == (torch.ops.fastrnn.forward, 2 * T * B * 3 * H * (I + H))


COUNTER = """
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
"""
LAYER = """
import fastrnn
layer = fastrnn.RNN(32, 64)
layer(x)
"""


@pytest.mark.parametrize("order", [COUNTER + LAYER, LAYER + COUNTER], ids=["counter", "layer"])
def test_whichever_is_imported_first(order: str) -> None:
    code = (
        "import sys, torch; x = torch.zeros(10, 4, 32)\n"
        f"assert 'torch.utils.flop_counter' not in sys.modules\n{order}\n"
        "with counter: layer(x)\n"
        "print(counter.get_total_flops())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "491520"
