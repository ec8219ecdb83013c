"""Tools that look at a model see in our layers and cells what they see in torch.nn's."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fastrnn
from pairs import CELLS, LAYERS, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

T, B, I, H = 5, 3, 4, 6  # noqa: E741
every_layer = pytest.mark.parametrize("name", LAYERS)
every_cell = pytest.mark.parametrize("name", CELLS)
every_one = pytest.mark.parametrize("name", [*LAYERS, *CELLS])


class Model(nn.Module):
    """A module that calls its layer in the way that is given."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})
        self.call = call

    def forward(self, x: Any, y: Any = None, z: Any = None) -> Any:
        return self.call(self.inner["layer"], x, y, z)


def sequence(name: str) -> Tensor:
    return torch.randn(B, I) if "Cell" in name else torch.randn(T, B, I)


def states(name: str, groups: int = 1, rows: int = B) -> Any:
    shape = (rows, H) if "Cell" in name else (groups, rows, H)
    h, c = torch.randn(shape), torch.randn(shape)
    return (h, c) if "LSTM" in name else h


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(list(tensors(got)), list(tensors(want)), rtol=0, atol=0)


# ---- torch.fx ------------------------------------------------------------------------------------


def traced(layer: nn.Module, call: Callable[..., Any], *args: Any) -> torch.fx.Graph:
    """The graph of a model that calls the layer so; it computes what the model does."""
    model = Model(layer, call).eval()
    program = torch.fx.symbolic_trace(model)
    program.graph.lint()
    assert_same(program(*args), model(*args))
    return program.graph


def layer_calls(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module"]


def first(result: Any) -> Any:
    return result[0]


@every_one
def test_fx_keeps_a_layer_whole_as_torchs(name: str) -> None:
    kinds = []
    for module in (torch.nn, fastrnn):
        graph = traced(getattr(module, name)(I, H), lambda r, x, *_: first(r(x)), sequence(name))
        assert [node.target for node in layer_calls(graph)] == ["inner.layer"]
        kinds.append([(node.op, node.target) for node in graph.nodes])
    assert kinds[0] == kinds[1]


@every_one
def test_fx_takes_states_in_every_form(name: str) -> None:
    layer, x, hx = getattr(fastrnn, name)(I, H), sequence(name), states(name)
    calls: list[Callable[..., Any]] = [
        lambda r, x, hx, _: first(r(x, hx)),
        lambda r, x, hx, _: first(r(input=x, hx=hx)),
    ]
    if "LSTM" in name:
        calls.append(lambda r, x, hx, _: first(r(x, (hx[0], hx[1]))))
        calls.append(lambda r, x, hx, _: first(r(x, [hx[0], hx[1]])))
    for call in calls:
        assert len(layer_calls(traced(layer, call, x, hx))) == 1


@every_layer
def test_fx_takes_the_arguments_that_torch_does_not_have(name: str) -> None:
    lengths, reset = torch.tensor([5, 0, 2]), torch.rand(T, B) > 0.6

    def call(layer: Any, x: Any, lengths: Any, reset: Any) -> Any:
        output, _, states = layer(x, lengths=lengths, reset=reset, return_states=True)
        return output, states[0]

    layer = getattr(fastrnn, name)(I, H, num_layers=2)
    (node,) = layer_calls(traced(layer, call, sequence(name), lengths, reset))
    assert node.kwargs.keys() == {"lengths", "reset", "return_states"}


def test_fx_sees_proxies_beside_a_constant_input() -> None:
    x = torch.randn(T, B, I)
    for call in (
        lambda r, hx, *_: r(x, hx)[0],
        lambda r, lengths, *_: r(x, lengths=lengths)[0],
    ):
        torch.fx.symbolic_trace(Model(fastrnn.GRU(I, H), call)).graph.lint()
    graph = torch.fx.symbolic_trace(
        Model(fastrnn.LSTMCell(I, H), lambda r, h, *_: r(x[0], (h, torch.zeros(B, H)))[0])
    ).graph
    assert len(layer_calls(graph)) == 1


@every_cell
def test_fx_keeps_every_step_of_a_loop_over_a_cell(name: str) -> None:
    def call(cell: Any, x: Any, hx: Any, _: Any) -> Any:
        for t in range(T):
            hx = cell(x[t], hx)
        return hx

    graph = traced(getattr(fastrnn, name)(I, H), call, torch.randn(T, B, I), states(name))
    assert len(layer_calls(graph)) == T


def test_fx_keeps_a_layer_whole_whatever_the_tracer_calls_a_leaf() -> None:
    class Nothing(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return False

    class Everything(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return True

    model = Model(fastrnn.GRU(I, H), lambda r, x, *_: r(x)[0])
    for tracer in (Nothing(), Everything()):
        assert [n.target for n in layer_calls(tracer.trace(model))] == ["inner.layer"]


class _Plain(fastrnn.GRU):
    """A subclass that changes nothing of the computation."""


class _Twice(fastrnn.GRU):
    """A subclass that does something with the result."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(x)[0]


def test_fx_goes_into_a_subclass_but_not_into_the_layer_below() -> None:
    x = torch.randn(T, B, I)
    assert len(layer_calls(traced(_Plain(I, H), lambda r, x, *_: r(x)[0], x))) == 1
    graph = traced(_Twice(I, H), lambda r, x, *_: r(x), x)
    assert not layer_calls(graph)  # the module does more than the call that is recorded
    assert len([node for node in graph.nodes if node.op == "get_attr"]) == 1


def test_fx_runs_hooks_once() -> None:
    layer = fastrnn.GRU(I, H)
    layer.register_forward_hook(lambda module, args, result: (3 * result[0], result[1]))
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    traced(layer, lambda r, x, *_: r(x)[0], torch.randn(T, B, I))


@pytest.mark.parametrize("kind", ["prune", "weight_norm", "parametrize"])
def test_fx_leaves_weights_that_are_computed_alone(kind: str) -> None:
    layer, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    if kind == "prune":
        prune.random_unstructured(layer, "weight_hh_l0", 0.5)
        source = "weight_hh_l0_orig"
    elif kind == "weight_norm":
        with pytest.warns(FutureWarning, match="deprecated"):
            nn.utils.weight_norm(layer, "weight_hh_l0")
        source = "weight_hh_l0_v"
    else:
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        source = "parametrizations.weight_hh_l0.original1"
    model = Model(layer, lambda r, x, *_: r(x)[0])
    program = torch.fx.symbolic_trace(model)
    assert type(layer.weight_hh_l0) is not torch.fx.Proxy
    before = program(x)
    with torch.no_grad():  # and the graph reads them at every call
        layer.get_parameter(source).copy_(torch.randn_like(layer.get_parameter(source)))
    assert not torch.equal(program(x), before)
    assert_same(program(x), model(x))


def test_fx_says_what_it_cannot_trace() -> None:
    with pytest.raises(RuntimeError, match=r"fastrnn\.GRU as the root module.*Sequential"):
        torch.fx.symbolic_trace(fastrnn.GRU(I, H))
    layer = _Twice(I, H)
    layer.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"loses the backward hooks of fastrnn\.GRU at 'inner"):
        torch.fx.symbolic_trace(Model(layer, lambda r, x, *_: r(x)))
    old = fastrnn.GRU(I, H)
    old.register_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"register_full_backward_hook"):
        torch.fx.symbolic_trace(Model(old, lambda r, x, *_: r(x)[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_fx_quantization_prepares_a_model(name: str) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    x = sequence(name)
    model = Model(getattr(fastrnn, name)(I, H), lambda r, x, *_: first(r(x))).eval()
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
    assert_same(prepared(x), model(x))


# ---- torch.jit -----------------------------------------------------------------------------------

pytest_jit = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


class Scripted(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


@pytest_jit
@every_one
def test_script_compiles_torchs_layer_on_the_same_parameters(name: str) -> None:
    model, x = nn.Sequential(getattr(fastrnn, name)(I, H)), sequence(name)
    layer = model[0]
    compiled = torch.jit.script(model)
    for _ in range(2):
        torch.testing.assert_close(list(tensors(compiled(x))), list(tensors(layer(x))))
        with torch.no_grad():
            next(layer.parameters()).zero_()
    assert type(torch.jit.script(layer)).__name__ == "RecursiveScriptModule"
    assert type(layer).__module__ == "fastrnn.nn"


@pytest_jit
@every_layer
def test_script_takes_a_model_that_holds_a_layer(name: str) -> None:
    model = Scripted(getattr(fastrnn, name)(I, H, num_layers=2, batch_first=True))
    x = torch.randn(B, T, I)
    want = model(x)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(copy.deepcopy(model)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), want)


@pytest_jit
def test_script_takes_a_subclass_that_changes_nothing() -> None:
    layer, x = _Plain(I, H), torch.randn(T, B, I)
    torch.testing.assert_close(torch.jit.script(nn.Sequential(layer))(x)[0], layer(x)[0])


@pytest_jit
@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (fastrnn.GRU(I, H, reset_after=False), r"fastrnn\.GRU: .*reset_after=False"),
        (fastrnn.LSTM(I, H, layer_norm=True), r"fastrnn\.LSTM: .*layer_norm=True"),
        (fastrnn.RNNCell(I, H, nonlinearity="sigmoid"), r"fastrnn\.RNNCell: .*'sigmoid'"),
        (_Twice(I, H), r"_Twice, a subclass of fastrnn\.GRU with its own forward"),
    ],
    ids=["GRU", "LSTM", "RNNCell", "subclass"],
)
def test_script_names_what_torch_does_not_have_and_the_way_out(layer: Any, said: str) -> None:
    for model in (layer, Scripted(layer)):
        with pytest.raises(ValueError, match=rf"{said}.*torch\.jit\.trace or torch\.export"):
            torch.jit.script(model)


@pytest_jit
@every_one
def test_a_trace_takes_another_batch_and_another_length(name: str) -> None:
    for options in ({}, {"learn_initial_state": True, "layer_norm": True}):
        layer = getattr(fastrnn, name)(I, H, **options)
        trace = torch.jit.trace(layer, sequence(name))
        other = torch.randn(7, I) if "Cell" in name else torch.randn(8, 7, I)
        assert_same(trace(other), layer(other))
        hx = states(name)
        trace = torch.jit.trace(layer, (sequence(name), hx))
        other_hx = states(name, rows=7)
        assert_same(trace(other, other_hx), layer(other, other_hx))


@pytest_jit
def test_a_trace_takes_other_lengths_and_resets() -> None:
    model = Model(
        fastrnn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True),
        lambda r, x, lengths, reset: r(x, lengths=lengths, reset=reset, return_states=True)[:2],
    )
    trace = torch.jit.trace(
        model, (torch.randn(B, T, I), torch.tensor([1, 5, 3]), torch.rand(B, T) > 0.5)
    )
    other = (torch.randn(4, 8, I), torch.tensor([8, 0, 3, 7]), torch.rand(4, 8) > 0.5)
    assert_same(trace(*other), model(*other))


# ---- pruning, hooks, summaries -------------------------------------------------------------------


@every_one
def test_pruned_weights_are_those_that_are_computed_with(name: str) -> None:
    layer = getattr(fastrnn, name)(I, H)
    weight = "weight_hh" if "Cell" in name else "weight_hh_l0"
    x = sequence(name)
    prune.random_unstructured(layer, weight, amount=0.5)
    assert (getattr(layer, weight) == 0).sum() == getattr(layer, weight).numel() // 2
    plain = getattr(fastrnn, name)(I, H)
    plain.load_state_dict({n: getattr(layer, n) for n, _ in plain.named_parameters()})
    assert_same(layer(x), plain(x))
    sum(y.sum() for y in tensors(layer(x))).backward()
    masked = getattr(layer, f"{weight}_mask") == 0
    assert not layer.get_parameter(f"{weight}_orig").grad[masked].any()

    prune.remove(layer, weight)
    assert weight in dict(layer.named_parameters())
    assert_same(layer(x), plain(x))
    again = copy.deepcopy(layer)
    with torch.no_grad():
        again.get_parameter(weight).zero_()
    assert_same(layer(x), plain(x))
    assert not torch.equal(
        next(tensors(again(x, states(name)))), next(tensors(layer(x, states(name))))
    )


@every_one
def test_hooks_see_arguments_and_results(name: str) -> None:
    layer, x = getattr(fastrnn, name)(I, H), sequence(name).requires_grad_()
    seen: dict[str, Any] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.update(before=args)),
        layer.register_forward_hook(lambda m, args, result: seen.update(after=result)),
        layer.register_forward_hook(
            lambda m, args, kwargs, result: seen.update(kwargs=kwargs), with_kwargs=True
        ),
        layer.register_full_backward_hook(
            lambda m, d_in, d_out: seen.update(d_in=d_in, d_out=d_out)
        ),
        layer.register_full_backward_pre_hook(lambda m, d_out: seen.update(pre=d_out)),
    ]
    result = layer(x, hx=states(name))
    next(tensors(result)).sum().backward()
    assert seen["before"] == (x,)
    assert next(tensors(seen["after"])) is not None
    assert seen["kwargs"].keys() == {"hx"}
    assert torch.equal(seen["d_in"][0], x.grad)
    assert torch.equal(seen["d_out"][0], torch.ones_like(next(tensors(result))))
    assert torch.equal(seen["pre"][0], seen["d_out"][0])

    for handle in handles:
        handle.remove()
    seen.clear()
    layer(x)
    assert not seen


@every_one
def test_a_hook_may_replace_the_result(name: str) -> None:
    layer = getattr(fastrnn, name)(I, H)
    layer.register_forward_hook(lambda m, args, result: "another")
    assert layer(sequence(name)) == "another"


@every_one
def test_a_summary_counts_what_it_counts_of_torchs(name: str) -> None:
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    rows = []
    for module in (torch.nn, fastrnn):
        layer = getattr(module, name)(I, H)
        report = torchinfo.summary(layer, input_data=sequence(name), verbose=0)
        rows.append((report.total_params, report.trainable_params, report.total_output_bytes))
    assert rows[0] == rows[1]


@every_layer
@pytest.mark.filterwarnings("ignore")  # of captum, about itself
def test_captum_attributes_through_a_layer(name: str) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(I, H, batch_first=True)
    ours = getattr(fastrnn, name)(I, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, I)
    found = []
    for layer in (theirs, ours):
        model = nn.Sequential()
        model.add_module("model", Model(layer, lambda r, x, *_: r(x)[0][:, -1]))
        found.append([attr.IntegratedGradients(model).attribute(x, target=0, n_steps=5)])
        if name != "LSTM":  # captum takes no nested results of a layer
            found[-1] += attr.LayerActivation(model, layer).attribute(x)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
