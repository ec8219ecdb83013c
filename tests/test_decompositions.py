"""`fastrnn.decompositions` lowers our operators to aten alone, with the numbers of the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fastrnn
from pairs import CELLS, LAYERS, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning"  # of torch's exporter, about itself
)

T, B, I, H = 4, 3, 4, 6  # noqa: E741
every_layer = pytest.mark.parametrize("name", LAYERS)


def foreign(graph: torch.fx.Graph) -> set[str]:
    """The namespaces of the operators in a graph."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}


def lowered(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The exported program after decomposition, as a module."""
    program = torch.export.export(model, args, kwargs, **options)
    assert foreign(program.graph) >= {"fastrnn"}
    program = program.run_decompositions(fastrnn.decompositions())
    assert foreign(program.graph) == {"aten"}
    return program.module()


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(list(tensors(got)), list(tensors(want)))


OPTIONS: dict[str, dict[str, Any]] = {
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "layer norm": {"layer_norm": True, "zoneout": 0.1, "grad_clip": 0.5, "recompute": True},
    "heads": {"heads": 2, "learn_initial_state": True, "bias": False},
}


@every_layer
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_a_layer(name: str, case: str, recorded: bool) -> None:
    layer, x = getattr(fastrnn, name)(I, H, **OPTIONS[case]).eval(), torch.randn(T, B, I)
    with torch.set_grad_enabled(recorded):
        program = lowered(layer, (x,))
    assert_close(program(x), layer(x))


def test_projection_peepholes_and_functions() -> None:
    layer = fastrnn.LSTM(
        I, H, proj_size=2, peephole=True, activation="relu", gate_activation="hardsigmoid"
    )
    x = torch.randn(T, B, I)
    assert_close(lowered(layer, (x,))(x), layer(x))


@every_layer
def test_states_lengths_and_resets(name: str) -> None:
    layer = getattr(fastrnn, name)(I, H, num_layers=2)
    h = torch.randn(2, B, H)
    args = (torch.randn(T, B, I), (h, h + 1) if name == "LSTM" else h)
    kwargs = {"lengths": torch.tensor([4, 0, 2]), "reset": torch.rand(T, B) > 0.5}
    program = lowered(layer, args, {**kwargs, "return_states": True})
    assert_close(
        program(*args, **kwargs, return_states=True), layer(*args, **kwargs, return_states=True)
    )


@pytest.mark.parametrize("name", CELLS)
def test_a_cell(name: str) -> None:
    cell, x = getattr(fastrnn, name)(I, H), torch.randn(B, I)
    assert_close(lowered(cell, (x,))(x), cell(x))


def test_beside_torchs_own_table() -> None:
    model, x = nn.Sequential(nn.Linear(I, I), fastrnn.GRU(I, H)), torch.randn(T, B, I)
    table = torch.export.default_decompositions()
    table.update(fastrnn.decompositions())
    program = torch.export.export(model, (x,)).run_decompositions(table)
    assert foreign(program.graph) == {"aten"}
    assert torch.ops.aten.linear.default not in {node.target for node in program.graph.nodes}
    assert_close(program.module()(x), model(x))


@every_layer
def test_the_batch_may_be_dynamic(name: str) -> None:
    layer, x = getattr(fastrnn, name)(I, H), torch.randn(T, 7, I)
    program = lowered(layer, (torch.randn(T, B, I),), dynamic_shapes=({1: Dim("rows")},))
    assert_close(program(x), layer(x))


def test_dynamic_steps_are_refused() -> None:
    shapes = ({0: Dim("steps", min=2)},)
    with pytest.raises(ValueError, match=r"unrolls the steps.*constant, got a dynamic one"):
        lowered(fastrnn.GRU(I, H), (torch.randn(T, B, I),), dynamic_shapes=shapes)


def test_packed_sequences_are_refused() -> None:
    layer, operator = fastrnn.GRU(I, H), torch.ops.fastrnn.forward.default
    arguments = (torch.randn(3, I), None, None, layer._flat_weights, torch.tensor([2, 1]))
    rest = (*(None,) * 7, layer._options.text, False, False, False)
    operator(*arguments, *rest)
    with pytest.raises(ValueError, match=r"PackedSequence.*padded tensor and lengths="):
        fastrnn.decompositions()[operator](*arguments, *rest)


@every_layer
@pytest.mark.parametrize("case", ["stack", "layer norm"])
def test_the_gradient(name: str, case: str) -> None:
    # In double: the gradients through a norm of few units magnify float32's rounding.
    layer = getattr(fastrnn, name)(I, H, **OPTIONS[case], dtype=torch.float64).eval()
    names = [n for n, _ in layer.named_parameters()]

    def gradients(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        leaves = [w.detach().requires_grad_() for w in (x, *weights)]
        parameters = dict(zip(names, leaves[1:], strict=True))
        result = torch.func.functional_call(layer, parameters, (leaves[0],))
        return torch.autograd.grad(sum(y.pow(2).sum() for y in tensors(result)), leaves)

    args = (torch.randn(T, B, I, dtype=torch.float64), *layer.parameters())
    assert foreign(make_fx(gradients)(*args).graph) == {"aten", "fastrnn"}
    graph = make_fx(gradients, decomposition_table=fastrnn.decompositions())(*args)
    assert foreign(graph.graph) == {"aten"}
    assert_close(graph(*args), gradients(*args))


def test_ensembles_and_their_gradients() -> None:
    layer, x = fastrnn.LSTM(I, H, num_layers=2), torch.randn(3, T, 1, I)
    weights = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output, (_, c_n) = torch.func.functional_call(layer, weights, (x,))
        return output.pow(2).sum() + c_n.sum()

    def of_each(x: Tensor) -> Any:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)

    graph = make_fx(of_each, decomposition_table=fastrnn.decompositions())(x)
    assert foreign(graph.graph) == {"aten"}
    torch.testing.assert_close(graph(x), of_each(x))
