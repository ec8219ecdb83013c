"""What the torch operators and the route without torch both ask of the engine."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _C

if TYPE_CHECKING:
    from ._options import Options

Scalars = tuple[str, int, bool, bool, int, str, str, bool]  # the fields of Options, in order


class States(NamedTuple):
    """The states of every layer at every step, zero at padding, or their gradients.

    Arrays of the kind of the input: torch tensors or ``fastrnn.Tensor``. Packed data has (L, N, ·)
    in place of (L, T, B, ·). Of half types c is float32, as inside the engine.
    """

    h: Any  # (L, T, B, D·O)
    c: Any = None  # (L, T, B, D·H); None for cells of one state


def scalars(options: Options) -> Scalars:
    """The fields of ``options``, as the operators take them."""
    return (
        options.cell,
        options.num_layers,
        options.bidirectional,
        options.bias,
        options.proj_size,
        options.activation,
        options.gate_activation,
        options.reset_after,
    )


@lru_cache(maxsize=256)
def engine_options(
    cell: str,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    proj_size: int,
    activation: str,
    gate_activation: str,
    reset_after: bool,
) -> _C.Options:
    """The engine's own form of the same; whether there are biases it sees by the weights."""
    return _C.Options(
        cell=cell,
        num_layers=num_layers,
        bidirectional=bidirectional,
        proj_size=proj_size,
        activation=activation,
        gate_activation=gate_activation,
        reset_after=reset_after,
    )


def saved_size(engine: _C.Options, hidden_size: int) -> int:
    """How many values forward saves for each row of each step; its vectors fill up to 16 units."""
    return engine.saved_planes * ((hidden_size + 15) // 16 * 16)


class CudaRoute(NamedTuple):
    """How tensors on a CUDA device are computed, and why."""

    kernels: bool  # the engine's own
    reason: str


CUDA_SWITCH = "FASTRNN_CUDA_KERNELS"


def cuda_route() -> CudaRoute:
    """The route of CUDA tensors: composed torch operations, unless the kernels are asked for.

    They are the default once they have been seen right on a GPU. Until then ``1`` in the
    environment variable FASTRNN_CUDA_KERNELS turns them on; it is read at every call.

    >>> cuda_route().reason != ""
    True
    """
    if not built_with_cuda():
        return CudaRoute(False, "this build has no CUDA kernels")
    if os.environ.get(CUDA_SWITCH, "0") in ("", "0"):
        return CudaRoute(False, f"{CUDA_SWITCH}=1 turns on the kernels, not yet the default")
    return CudaRoute(True, f"{CUDA_SWITCH} is set")


@lru_cache(maxsize=1)
def built_with_cuda() -> bool:
    """Whether the engine was compiled with its CUDA kernels."""
    return _C.cuda_info() is not None
