"""What every route needs to know about the engine: its options, and its kernels on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _C, _certificate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._options import Options


class States(NamedTuple):
    """The states of every layer at every step, zero at padding, or their gradients.

    Arrays of the kind of the input: torch tensors or ``fastrnn.Tensor``. Packed data has (L, N, ·)
    in place of (L, T, B, ·). Of half types c is float32, as inside the engine.
    """

    h: Any  # (L, T, B, D·O)
    c: Any = None  # (L, T, B, D·H); None for cells of one state


class Extras(NamedTuple):
    """The arrays of a call that only options need, of the kind of the input; None: not given.

    Packed data has (L·D, N, ·) in place of (L·D, T, B, ·).
    """

    reset_h: Any = None  # (L·D, O), storage dtype: h after a reset; not given: zeros
    reset_c: Any = None  # (L·D, H)
    dropout_mask: Any = None  # (L·D, B, O), storage dtype: factors of h on its way into W_hh
    zoneout_h_mask: Any = None  # (L·D, T, B, O), bool: True keeps the old value
    zoneout_c_mask: Any = None  # (L·D, T, B, H), bool

    def of_layer(self, layer: int, directions: int) -> Extras:
        """Those of one layer of the stack."""
        own = slice(layer * directions, (layer + 1) * directions)
        return Extras(*(None if x is None else x[own] for x in self))


NO_EXTRAS = Extras()


def each_layer(
    options: Options, hx: tuple[Any, ...] | None, weights: Sequence[Any]
) -> Iterator[tuple[Options, tuple[Any, ...] | None, Sequence[Any]]]:
    """The layers of a stack as stacks of one: the options, and each one's states and weights."""
    one, directions = replace(options, num_layers=1), options.directions
    size = len(weights) // options.num_layers
    for layer in range(options.num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        states = None if hx is None else tuple(state[own] for state in hx)
        yield one, states, weights[layer * size : (layer + 1) * size]


@lru_cache(maxsize=256)
def engine_options(options: Options, *, int8: bool = False) -> _C.Options:
    """The options that the engine's cells support; the weights show whether there are biases.

    With ``int8`` a call has one array of packed weights (`_C.pack_int8`) in place of them.
    """
    return _C.Options(
        cell=options.cell,
        num_layers=options.num_layers,
        bidirectional=options.bidirectional,
        proj_size=options.proj_size,
        activation=options.activation,
        gate_activation=options.gate_activation,
        reset_after=options.reset_after,
        heads=options.heads,
        recompute=options.recompute and not int8,
        int8=int8,
    )


class Prepared:
    """A stack or a cell as the engine takes it. A module keeps it from call to call.

    Nothing in it depends on the values of a call, except the packed weights of a frozen module.
    """

    __slots__ = (
        "by_cells", "cell", "engine", "frozen", "gradient_by_cells", "names", "options",
        "shares_gradient",
    )  # fmt: skip

    def __init__(
        self, options: Options, names: tuple[str, ...] = (), *, cell: bool = False
    ) -> None:
        self.options = options
        self.names = names  # of the module's weights, in the order of the flat list
        self.engine = engine_options(options)
        self.cell = cell  # whether it is one step without the axes of steps and layers
        # Whether the fused cells compute each pass of a call without `Extras`; else programs do.
        self.by_cells = not options.beyond_the_cells
        self.gradient_by_cells = self.by_cells and options.grad_clip == 0
        # Whether the steps of a loop share one product for the gradient of the weights. A GRU with
        # reset_after=False needs more for it than the gates' gradients.
        self.shares_gradient = cell and self.gradient_by_cells and options.reset_after
        self.shares_gradient = self.shares_gradient and not options.recompute
        self.frozen: Any = None  # by fastrnn.freeze: _C.Frozen, or the weights of a program

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        return Prepared(self.options, self.names, cell=self.cell)


prepared = lru_cache(maxsize=256)(Prepared)  # of options alone, where there is no module


def saved_size(engine: _C.Options, hidden_size: int) -> int:
    """How many values forward saves for each row of each step; its vectors fill up to 16 units."""
    return engine.saved_planes * ((hidden_size + 15) // 16 * 16)


class CudaRoute(NamedTuple):
    """How tensors on a CUDA device are computed, and why."""

    kernels: bool  # the engine's own; else torch's own call, or composed operations
    reason: str
    persistent: bool = False  # of the kernels, a launch for a whole sequence where there is one


CUDNN_STEPS = 2**16  # cuDNN takes fewer
CUDA_SWITCH = "FASTRNN_CUDA_KERNELS"
CUDA_ROUTES = {  # what the switch may say besides auto
    "0": CudaRoute(False, f"{CUDA_SWITCH} is 0"),
    "1": CudaRoute(True, f"{CUDA_SWITCH} is 1"),
    "persistent": CudaRoute(True, f"{CUDA_SWITCH} is persistent", persistent=True),
}


def cuda_route(
    options: Options,
    dtype: str,
    rows: int,
    hidden_size: int,
    training: bool,
    device: int,
    steps: int | None = None,
) -> CudaRoute:
    """Whether the engine's own kernels compute a call on a CUDA device.

    The environment variable FASTRNN_CUDA_KERNELS, read at every call, decides: ``0`` never; ``1`` a
    launch for each step; ``persistent`` a launch for a whole sequence where there is a kernel for
    it; ``auto`` or nothing what the device's certificate (_certificate.py) says, without which they
    never do.

    Arguments:
        options: the stack.
        dtype: of the storage, or ``"tf32"``, float32 whose products torch lets cuDNN round so.
        rows: B.
        hidden_size: H.
        training: whether a backward follows, which the same kernels compute.
        device: the number of the CUDA device.
        steps: T; None: of any number.

    Raises:
        ValueError: the variable says something else.

    >>> from fastrnn._options import Options
    >>> cuda_route(Options("LSTM"), "float32", 8, 256, True, 0).reason != ""
    True
    """
    asked = cuda_switch()
    if asked is not None:
        return asked
    certificate = _certificate.of_device(device)
    if not certificate.classes:
        return CudaRoute(False, certificate.state)
    found = certificate.find(options, dtype, rows, hidden_size, training, steps)
    if found is None:
        return CudaRoute(False, _certificate.UNCERTIFIED)
    reason = f"certified on this device, {found.ratio:.2f} times as fast as torch's"
    return CudaRoute(True, reason, found.persistent)


def cuda_switch() -> CudaRoute | None:
    """The route of all calls, by FASTRNN_CUDA_KERNELS or the build; None: a certificate decides.

    Raises:
        ValueError: the variable says something else than it can.
    """
    if not built_with_cuda():
        return CudaRoute(False, "this build has no CUDA kernels")
    chosen = os.environ.get(CUDA_SWITCH) or "auto"
    if chosen == "auto":
        return None
    if chosen not in CUDA_ROUTES:
        raise ValueError(f"{CUDA_SWITCH}: expected auto, 0, 1 or persistent, got {chosen!r}")
    return CUDA_ROUTES[chosen]


def graphs_take_kernels() -> bool:
    """Whether graphs of torch.compile take the CUDA kernels: where FASTRNN_CUDA_KERNELS asks for
    them. No certificate is asked, as a graph may not know its sizes.
    """
    asked = cuda_switch()
    return asked is not None and asked.kernels


def no_kernels(device: int) -> bool:
    """Whether no call on a CUDA device takes the kernels, whatever its sizes; quick to ask."""
    asked = cuda_switch()
    return not (_certificate.of_device(device).classes if asked is None else asked.kernels)


@lru_cache(maxsize=1)
def built_with_cuda() -> bool:
    """Whether the engine was compiled with its CUDA kernels."""
    return _C.cuda_info() is not None
