"""The default route on a GPU, torch's own call, with the real cuDNN (test_by_torch.py has doubles).

All of it needs a GPU and is skipped elsewhere with the reason.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from cases import LAYOUTS, STACKS
from fastrnn import _engine
from fastrnn._options import Options
from fastrnn.calls import composed, torch_route
from fastrnn.calls.call import recurrent
from pairs import CELLS, LAYERS, outcome, pair
from stacks import Arguments, as_function, make, moved, replayed

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = {k: options for k, options in STACKS.items() if options.in_torch_nn}
every_stack = pytest.mark.parametrize("options", OURS.values(), ids=OURS.keys())
every_layer = pytest.mark.parametrize("layer", LAYERS)
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"bidirectional": True, "num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "batch_first": True, "bias": False},
)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
T, B, SIZE, H = 12, 8, 32, 64


@pytest.fixture
def gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CUDA device without our kernels, and with IEEE products."""
    monkeypatch.setenv(_engine.CUDA_SWITCH, "0")
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.allow_tf32 = allowed


def run(case: Arguments) -> list[Tensor]:
    output, hx_n, _ = recurrent(
        case.options, case.input, case.hx, case.weights, **case.steps, extras=case.extras
    )
    return [output, *hx_n]


def gradients(case: Arguments, values: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(y.pow(2).sum() for y in values), case.leaves)


@every_layer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_gives_torch_nns_bits(
    gpu: torch.device, layer: str, kind: dict[str, Any], dtype: torch.dtype
) -> None:
    """Dropout's masks too; weights lie as torch.nn's do."""
    theirs, ours = (m.to(gpu) for m in pair(layer, SIZE, H, dtype=dtype, **kind))
    assert len({w.untyped_storage().data_ptr() for w in ours.parameters()}) == 1
    x = torch.randn(T, B, SIZE, dtype=dtype, device=gpu)
    torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("sort", [True, False])
def test_a_packed_sequence_gives_torch_nns_bits(gpu: torch.device, layer: str, sort: bool) -> None:
    theirs, ours = (m.to(gpu) for m in pair(layer, SIZE, H, 2, bidirectional=True))
    lengths = [5, 4, 2] if sort else [2, 5, 4]
    rows = [torch.randn(n, SIZE, device=gpu) for n in lengths]
    packed = pack_sequence(rows, enforce_sorted=sort)
    torch.testing.assert_close(outcome(ours, packed), outcome(theirs, packed), rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_gives_torch_nns_bits(gpu: torch.device, cell: str) -> None:
    theirs, ours = (m.to(gpu) for m in pair(cell, SIZE, H))
    x = torch.randn(B, SIZE, device=gpu)
    torch.testing.assert_close(outcome(ours, x), outcome(theirs, x), rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_torch_nns_bits(gpu: torch.device, layer: str, dtype: torch.dtype) -> None:
    theirs, ours = (m.to(gpu) for m in pair(layer, SIZE, H, 2))
    x = torch.randn(T, B, SIZE, device=gpu)
    with torch.autocast("cuda", dtype=dtype):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@every_layer
def test_a_gradient_in_eval_works(gpu: torch.device, layer: str) -> None:
    theirs, ours = (m.to(gpu) for m in pair(layer, SIZE, H, 2, dropout=0.5))
    x = torch.randn(T, B, SIZE, device=gpu)
    theirs.dropout = 0.0
    torch.testing.assert_close(outcome(ours.eval(), x), outcome(theirs, x), rtol=0, atol=0)


@every_stack
@pytest.mark.parametrize("steps", LAYOUTS)
@pytest.mark.parametrize("extras", [[], ["reset_hx"]])
def test_equals_the_cpu(gpu: torch.device, options: Options, steps: str, extras: list[str]) -> None:
    case = make(options, steps, extras=extras if "reset" in steps else [])
    device_case = moved(case, gpu)
    with patch.object(composed, "forward", side_effect=AssertionError):
        actual = run(device_case)
    expected = run(case)
    torch.testing.assert_close([y.cpu() for y in actual], expected, rtol=1e-12, atol=1e-12)
    mine = [d.cpu() for d in gradients(device_case, actual)]
    torch.testing.assert_close(mine, list(gradients(case, expected)), rtol=1e-11, atol=1e-11)


@every_stack
@pytest.mark.parametrize("steps", ["padded", "lengths-reset"])
def test_gradcheck_and_gradgradcheck(gpu: torch.device, options: Options, steps: str) -> None:
    case = moved(make(options, steps, sizes=(3, 2, 2, 3)), gpu)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(case.with_leaves(*leaves)))

    assert torch.autograd.gradcheck(call, case.leaves)
    assert torch.autograd.gradgradcheck(call, case.leaves)


@every_stack
@pytest.mark.parametrize("steps", LAYOUTS)
def test_compiled_equals_eager(gpu: torch.device, options: Options, steps: str) -> None:
    case = moved(make(options, steps), gpu)
    call, arguments = as_function(case, run)
    expected = call(*arguments)
    wanted = gradients(case, expected)
    torch._dynamo.reset()
    with patch.object(torch_route, "call", wraps=torch_route.call) as spy:
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
        found = gradients(case, got)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    # cuDNN's reserve spares backward a second forward, but not with lengths and resets.
    assert spy.call_count == (1 if steps in ("padded", "packed") else 2)


def waits(case: Arguments) -> int:
    """How often forward and backward wait for the device."""
    gradients(case, run(case))  # what is made once is made
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            gradients(case, run(case))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


@every_layer
def test_one_wait_and_none_for_lengths_on_the_cpu(gpu: torch.device, layer: str) -> None:
    options = Options(layer, 2, True)  # type: ignore[arg-type]
    expected_of = {"padded": 0, "packed": 0, "lengths": 1, "reset": 1, "lengths-reset": 1}
    for steps, expected in expected_of.items():
        assert waits(moved(make(options, steps), gpu)) == expected, steps
    case = moved(make(options, "lengths"), gpu)
    assert waits(case._replace(steps={"lengths": case.steps["lengths"].cpu()})) == 0


@every_layer
@pytest.mark.parametrize("steps", ["padded", "lengths-reset"])
def test_a_captured_graph_replays_with_other_values(
    gpu: torch.device, layer: str, steps: str
) -> None:
    options = Options(layer, 2)  # type: ignore[arg-type]
    case, other = (moved(make(options, steps, seed=seed), gpu) for seed in (0, 1))
    values, found = replayed(case, other, run, gradients)
    expected = run(other)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found, gradients(other, expected), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_more_steps_than_cudnn_takes(gpu: torch.device, layer: str) -> None:
    ours = getattr(fastrnn, layer)(2, 4, device=gpu)
    x = torch.randn(70_000, 2, 2, device=gpu)
    with torch.no_grad():
        actual = ours(x)[0].cpu()
        expected = ours.cpu()(x.cpu())[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_layer
def test_nothing_warns_about_weights_apart(gpu: torch.device, layer: str) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H, 2, device=gpu)
    ours.weight_hh_l1 = torch.nn.Parameter(torch.randn_like(ours.weight_hh_l1))
    x = torch.randn(T, B, SIZE, device=gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = ours(x)[0]
        output.sum().backward()
    assert ours.weight_hh_l1.grad is not None
    torch.testing.assert_close(output.cpu(), ours.cpu()(x.cpu())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["RNN", "GRU"])
def test_nothing_warns_about_one_layer_of_a_stack(
    gpu: torch.device, layer: str, dtype: torch.dtype
) -> None:
    """With all states layers run one by one, whose weights are parts of the piece of all."""
    ours = getattr(fastrnn, layer)(SIZE, H, 2, device=gpu, dtype=dtype)
    x = torch.randn(T, B, SIZE, device=gpu, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x)
        ours(x, return_states=True)


@every_layer
def test_weights_as_cudnn_lays_them_are_not_copied(gpu: torch.device, layer: str) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H, 2, bidirectional=True, device=gpu)
    x = torch.randn(T, B, SIZE, device=gpu)
    ours(x)  # learns the layout
    with patch.object(torch_route, "flat_copies", side_effect=AssertionError):
        ours(x)


@every_layer
def test_the_output_may_be_written_to_before_backward(gpu: torch.device, layer: str) -> None:
    ours = getattr(fastrnn, layer)(SIZE, H, 2, device=gpu)
    x = torch.randn(T, B, SIZE, device=gpu)
    weights = list(ours.parameters())
    expected = torch.autograd.grad((2 * ours(x)[0]).pow(2).sum(), weights)
    got = torch.autograd.grad(ours(x)[0].mul_(2).pow(2).sum(), weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
