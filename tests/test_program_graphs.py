"""Cells under torch's transforms: compile, export, checkpoint, functional_call, vmap, jvp, DDP."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastrnn
import steps
from fastrnn.program import operators, run

T, B, I, H = 6, 3, 4, 5  # noqa: E741  (the field's names)


class Gated(nn.Module):
    """A cell with a number of its own, and a weight that it computes from another."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(I + H, H), nn.Linear(I, H)
        self.skew = nn.Parameter(torch.randn(H, H) / 2)
        self.rate = 0.5

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(x.shape[0], H) if h is None else h
        gate = torch.sigmoid(self.gate(torch.cat([x, h], -1)))
        new = torch.tanh(self.new(x) + h @ (self.skew - self.skew.t()))
        return self.rate * gate * h + (1 - gate) * new


def backward(outputs: Any, inputs: list[Tensor]) -> list[Tensor]:
    return steps.gradients_of(outputs, inputs)


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (Gated, "eager"),
        (Gated, "aot_eager"),
        (lambda: nn.GRUCell(I, H), "aot_eager"),
        (lambda: nn.LSTMCell(I, H), "aot_eager"),
    ],
)
def test_compiled_whole(make: Any, backend: str) -> None:
    """torch.compile(fullgraph=True) gives the same numbers and gradients."""
    torch._dynamo.reset()
    layer = fastrnn.Recurrent(make(), make())
    x = torch.randn(T, B, I, requires_grad=True)
    lengths, reset = torch.tensor([T, 0, 3]), torch.rand(T, B) < 0.3
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    inputs = [x, *layer.parameters()]
    for options in ({}, {"lengths": lengths}, {"reset": reset, "return_states": True}):
        expected, found = layer(x, **options), compiled(x, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(backward(found, inputs), backward(expected, inputs))


def nodes_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_compiled_is_one_node_that_takes_any_steps() -> None:
    """The graph does not grow with T, nor is it made anew for another T or B."""
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(nodes_of(module.graph))
        return module.forward

    from torch._dynamo.backends.common import aot_autograd

    layer = fastrnn.Recurrent(Gated())
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=backend)
    )
    for t, b in ((40, 3), (90, 7)):
        x = torch.randn(t, b, I)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    assert graphs[0].count("fastrnn.program.default") == 1
    assert len(graphs[0]) < 30


def test_compiled_sees_a_changed_attribute() -> None:
    torch._dynamo.reset()
    layer = fastrnn.Recurrent(Gated())
    x = torch.randn(T, B, I)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.cell.rate = 0.9
    torch.testing.assert_close(compiled(x), layer(x))


def test_exported_with_any_steps_and_rows() -> None:
    layer = fastrnn.Recurrent(Gated())
    dims = {
        0: torch.export.Dim("steps", min=2, max=999),
        1: torch.export.Dim("rows", min=1, max=99),
    }
    program = torch.export.export(layer, (torch.randn(T, B, I),), dynamic_shapes=(dims,))
    assert nodes_of(program.graph).count("fastrnn.program.default") == 1
    x = torch.randn(40, 8, I)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_operators_pass_opcheck() -> None:
    layer = fastrnn.Recurrent(nn.GRUCell(I, H))
    calls: list[Any] = []
    original = operators.run

    def watched(text: str, inputs: Any, reverse: bool) -> Any:
        calls.append((text, inputs))
        return original(text, inputs, reverse)

    operators.run = watched
    try:
        torch.export.export(layer, (torch.randn(T, B, I),))
    finally:
        operators.run = original
    text, inputs = calls[-1]

    def real(tensors: Any) -> list[Tensor]:
        return [torch.randn(t.shape, requires_grad=True) for t in tensors]

    arrays = (
        real(inputs.states.values()),
        real(inputs.xs),
        real(inputs.fixed),
        real(inputs.shared),
    )
    torch.library.opcheck(torch.ops.fastrnn.program.default, (text, *arrays, False, []))


def test_checkpointed() -> None:
    layer, x = fastrnn.Recurrent(Gated()), torch.randn(T, B, I, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = backward(layer(x), inputs)
    found = backward(checkpoint(layer, x, use_reentrant=False), inputs)
    torch.testing.assert_close(found, expected)


def test_functional_call_uses_the_given_weights() -> None:
    layer, x = fastrnn.Recurrent(Gated()), torch.randn(T, B, I)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    layer(x)
    found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(found, other(x))


def test_vmap_over_rows_and_weights() -> None:
    layer, x = fastrnn.Recurrent(Gated()), torch.randn(B, T, I)
    found = torch.vmap(lambda one: layer(one)[0])(x)
    torch.testing.assert_close(found, layer(x.transpose(0, 1))[0].transpose(0, 1))
    weights = {k: torch.stack([v, v * 2]) for k, v in layer.named_parameters()}
    both = torch.vmap(lambda w: torch.func.functional_call(layer, w, (x,))[0])(weights)
    torch.testing.assert_close(both[0], layer(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode() -> None:
    layer, x, v = fastrnn.Recurrent(Gated()), torch.randn(T, B, I), torch.randn(T, B, I)
    value, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))
    torch.testing.assert_close(value, layer(x)[0])
    eps = 1e-3
    slope = (layer(x + eps * v)[0] - layer(x - eps * v)[0]) / (2 * eps)
    torch.testing.assert_close(tangent, slope, rtol=1e-2, atol=1e-2)


def test_gradients_of_gradients() -> None:
    layer = fastrnn.Recurrent(Gated()).double()
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    with steps.by_engine():
        assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
        assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)
        first = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)[0]
        found = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])
    with steps.by_loop():
        first = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)[0]
        expected = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(found, expected)


def test_autocast_runs_the_loop_as_torch_casts_it() -> None:
    layer, x = fastrnn.Recurrent(Gated()), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)[0]
        with steps.by_loop():
            expected = layer(x)[0]
    torch.testing.assert_close(found, expected)


def distributed(file: str) -> None:
    """In a process of its own, as what torch leaves behind may wait for ever: see below."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    layer, x = fastrnn.Recurrent(Gated()), torch.randn(T, B, I)
    expected = backward(layer(x), list(layer.parameters()))
    wrapped = nn.parallel.DistributedDataParallel(layer)
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in wrapped(x))
    total.backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], expected)
    print("equal", flush=True)
    os._exit(0)  # without taking the group down


def test_distributed_gradients(tmp_path: Path) -> None:
    """Under DDP, in a group of one process."""
    code = f"import test_program_graphs as t; t.distributed({str(tmp_path / 'group')!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_a_recording_serves_every_number_of_rows() -> None:
    """Tracing happens once for all T and B."""
    layer = fastrnn.Recurrent(Gated())
    layer(torch.randn(T, B, I))
    known = {id(r) for group in run._recordings.values() for r in group}
    with steps.by_engine():
        for t, b in ((1, 1), (3, 61), (9, 67), (2, 40)):
            layer(torch.randn(t, b, I))
    assert {id(r) for group in run._recordings.values() for r in group} == known


@pytest.mark.parametrize(
    ("cell", "fused"), [(nn.GRUCell, fastrnn.GRU), (nn.LSTMCell, fastrnn.LSTM)]
)
def test_training_keeps_at_most_half_more_than_the_layer(cell: Any, fused: Any) -> None:
    """In bytes for each step and row, the output included."""
    ours = fastrnn.explain(cell(64, 128), None, torch.zeros(2, 3, 64)).saved_bytes
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * 4 if tensor.dim() > 2 else 0)
        return tensor

    x = torch.randn(50, 8, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(64, 128)(x)
    theirs = (sum(kept) - x.numel() * 4) / (50 * 8)
    assert ours + 128 * 4 <= 1.5 * theirs


def test_inference_mode_takes_other_batches() -> None:
    """A program made while training serves inference mode, and batches of another size there."""
    layer = fastrnn.Recurrent(Gated())
    x, other = torch.randn(T, B, I), torch.randn(T, B + 4, I)
    backward(layer(x), list(layer.parameters()))
    expected = layer(other)[0].detach()
    with steps.by_engine(), torch.inference_mode():
        torch.testing.assert_close(layer(other)[0], expected)
        torch.testing.assert_close(layer(other[:, :1])[0], expected[:, :1])
