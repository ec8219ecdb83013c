"""Which route a call takes, of tensors on devices that this machine may not have."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrnn import _C, _engine, _recurrent
from fastrnn._engine import NO_EXTRAS, CudaRoute, engine_options, scalars
from fastrnn._options import GATES, Options


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for a tensor on a device whose kernels are turned on."""
    monkeypatch.setattr(_recurrent, "cuda_route", lambda: CudaRoute(True, "a test"))
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), is_complex=lambda: False)


def composed(input: Any, options: Options = Options("LSTM"), **extras: Any) -> bool:  # noqa: B008
    return _recurrent._needs_composed(options, input, NO_EXTRAS._replace(**extras))


def test_cuda_kernels_run_where_they_are_turned_on(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not composed(cuda)
    monkeypatch.setattr(_recurrent, "cuda_route", lambda: CudaRoute(False, "a test"))
    assert composed(cuda)


@pytest.mark.parametrize(
    "own",
    [{"peephole": True}, {"layer_norm": True}, {"zoneout_h": 0.1}, {"zoneout_c": 0.1},
     {"grad_clip": 1.0}, {"recompute": True}, {"heads": 2, "layer_norm": True}],
)  # fmt: skip
def test_cuda_kernels_know_no_options_of_a_step(cuda: Any, own: dict[str, Any]) -> None:
    assert composed(cuda, Options("LSTM", **own))


def test_cuda_kernels_know_heads(cuda: Any) -> None:
    assert not composed(cuda, Options("LSTM", heads=2))
    assert not composed(cuda, Options("GRU", 2, True, heads=4, reset_after=False))


def test_cuda_kernels_know_no_extras(cuda: Any) -> None:
    assert composed(cuda, dropout_mask=torch.ones(1))


def test_under_a_transform_cuda_tensors_are_composed(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def observe(x: torch.Tensor) -> torch.Tensor:
        seen.append(composed(cuda))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        seen.append(composed(cuda))  # a compiler meets the operator, whatever is around it
        return x

    torch.func.vmap(observe)(torch.zeros(2))
    assert seen == [True, False]


@pytest.mark.parametrize(("switch", "kernels"), [("0", False), ("1", True)])
def test_a_compiler_takes_the_cuda_route_for_a_constant(
    switch: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_engine.CUDA_SWITCH, switch)
    monkeypatch.setattr(_engine, "built_with_cuda", lru_cache(lambda: True))

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _recurrent._cuda_knows(Options("LSTM"), NO_EXTRAS) else x

    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2))
    assert got.tolist() == [float(kernels)] * 2


@pytest.mark.parametrize("cell", GATES)
def test_options_and_the_engine_agree_on_the_gates(cell: Any) -> None:
    engine: _C.Options = engine_options(*scalars(Options(cell)))
    assert engine.gates == Options(cell).gates
