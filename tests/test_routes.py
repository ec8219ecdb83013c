"""Which route a call takes, of tensors on devices that this machine may not have."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastrnn import _C, _engine
from fastrnn._engine import NO_EXTRAS, CudaRoute, engine_options
from fastrnn._options import GATES, Options
from fastrnn.calls import call, torch_route


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for a tensor on a device whose kernels are turned on."""
    monkeypatch.setattr(torch_route, "no_kernels", lambda _: False)
    monkeypatch.setattr(torch_route, "cuda_route", lambda *_: CudaRoute(True, "a test"))
    return SimpleNamespace(
        device=SimpleNamespace(type="cuda", index=0),
        dtype=torch.float16,
        shape=(5, 2, 3),
        is_cuda=True,
        is_complex=lambda: False,
        get_device=lambda: 0,
        requires_grad=False,
    )


def route(
    input: Any,
    options: Options = Options("LSTM"),  # noqa: B008
    states: bool = False,
    batch_sizes: torch.Tensor | None = None,
    **extras: Any,
) -> str:
    """engine, torch, torch as an operator, or composed."""
    weights = [SimpleNamespace(shape=(16, 3), requires_grad=False)] * 4
    steps = (batch_sizes, None, None, NO_EXTRAS._replace(**extras))
    found = call._route(options, input, None, weights, steps, states)
    names = {
        call._engine_route: "engine",
        call._torch_as_operator: "torch as an operator",
        call._composed_route: "composed",
        None: "torch",
    }
    return names[found]


def test_cuda_kernels_run_where_they_are_trusted(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert route(cuda) == "engine"
    monkeypatch.setattr(torch_route, "cuda_route", lambda *_: CudaRoute(False, "a test"))
    assert route(cuda) == "torch"


@pytest.mark.parametrize(
    "own",
    [{"peephole": True}, {"layer_norm": True}, {"zoneout_h": 0.1}, {"zoneout_c": 0.1},
     {"grad_clip": 1.0}, {"heads": 2, "layer_norm": True}],
)  # fmt: skip
def test_neither_cuda_kernels_nor_torch_know_options_of_a_step(
    cuda: Any, own: dict[str, Any]
) -> None:
    assert route(cuda, Options("LSTM", **own)) == "composed"


def test_torch_computes_what_is_to_be_computed_again(cuda: Any) -> None:
    """It keeps less than composed operations do."""
    assert route(cuda, Options("LSTM", recompute=True)) == "torch"


def test_cuda_kernels_know_heads(cuda: Any) -> None:
    assert route(cuda, Options("LSTM", heads=2)) == "engine"
    assert route(cuda, Options("GRU", 2, True, heads=4, reset_after=False)) == "engine"


def test_neither_cuda_kernels_nor_torch_know_masks(cuda: Any) -> None:
    assert route(cuda, dropout_mask=torch.ones(1)) == "composed"


@pytest.mark.parametrize("asked", [None, CudaRoute(True, "asked for")])
def test_no_certificate_is_of_packed_sequences_or_of_all_states(
    cuda: Any, asked: CudaRoute | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_route, "cuda_switch", lambda: asked)
    expected = "torch" if asked is None else "engine"
    assert route(cuda, Options("GRU"), states=True) == expected
    assert route(cuda, Options("GRU"), batch_sizes=torch.tensor([2, 2, 1])) == expected
    assert route(cuda, Options("GRU")) == "engine"


@pytest.mark.parametrize("asked", [None, CudaRoute(True, "asked for")])
def test_no_certificate_is_of_cells(
    cuda: Any, asked: CudaRoute | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (torch_route, call):
        monkeypatch.setattr(module, "cuda_switch", lambda: asked)
    cuda.unsqueeze = lambda _: cuda
    weights: Any = [SimpleNamespace(shape=(16, 3), requires_grad=False)] * 4
    assert call.cell_by_torch(Options("LSTM"), cuda, None, weights) == (asked is None)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options("RNN"), "torch"),
        (Options("RNN", activation="relu"), "torch"),
        (Options("RNN", activation="sigmoid"), "composed"),
        (Options("LSTM", 3, True, proj_size=2), "torch"),
        (Options("LSTM", activation="relu"), "composed"),
        (Options("LSTM", gate_activation="hardsigmoid"), "composed"),
        (Options("GRU"), "torch"),
        (Options("GRU", reset_after=False), "composed"),
        (Options("GRU", heads=2), "composed"),
    ],
)
def test_torch_computes_what_it_can_on_every_other_device(
    cuda: Any, kind: str, options: Options, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_route, "cuda_route", lambda *_: CudaRoute(False, "a test"))
    cuda.device.type, cuda.is_cuda = kind, kind == "cuda"
    assert route(cuda, options) == expected


def test_torch_has_no_c_of_every_step(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_route, "cuda_route", lambda *_: CudaRoute(False, "a test"))
    assert route(cuda, Options("GRU"), states=True) == "torch"
    assert route(cuda, Options("LSTM"), states=True) == "composed"


def test_a_traced_graph_has_torchs_call_as_one_operator(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_route, "cuda_route", lambda *_: CudaRoute(False, "a test"))
    with FlopCounterMode(display=False):
        assert route(cuda) == "torch as an operator"
    assert route(cuda) == "torch"


def test_under_a_transform_cuda_tensors_are_composed(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def observe(x: torch.Tensor) -> torch.Tensor:
        seen.append(route(cuda))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        seen.append(route(cuda))  # a compiler meets the operator, whatever is around it
        return x

    torch.func.vmap(observe)(torch.zeros(2))
    assert seen == ["composed", "torch as an operator"]


@pytest.mark.parametrize(("switch", "kernels"), [("0", False), ("1", True)])
def test_a_compiler_takes_the_cuda_route_for_a_constant(
    switch: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_engine.CUDA_SWITCH, switch)
    monkeypatch.setattr(_engine, "built_with_cuda", lru_cache(lambda: True))

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch_route._kernels_of_graphs() else x

    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2))
    assert got.tolist() == [float(kernels)] * 2


@pytest.mark.parametrize("cell", GATES)
def test_options_and_the_engine_agree_on_the_gates(cell: Any) -> None:
    engine: _C.Options = engine_options(Options(cell))
    assert engine.gates == Options(cell).gates
