"""The engine, low level (csrc/bind): arrays in and out, nothing allocated, everything checked."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypedDict, final

import numpy.typing as npt
import torch
from typing_extensions import CapsuleType

# NumPy, torch, fastrnn.Tensor, or any object with __dlpack__ or the buffer protocol.
_Array = Any

@final
class Tensor:
    """A strided view of memory. Views share memory and keep it alive; nothing is copied.

    Strides count elements, as torch's and DLPack's do (NumPy's count bytes).
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> str:
        """The element type by its name in NumPy and torch, `"float32"`."""
    @property
    def device(self) -> str:
        """`"cpu"`, `"cuda:0"`."""
    @property
    def read_only(self) -> bool: ...
    def numpy(self) -> npt.NDArray[Any]:
        """A NumPy array of the same memory. bfloat16 needs ml_dtypes (else TypeError)."""
    def torch(self) -> torch.Tensor:
        """A torch tensor of the same memory."""
    def transpose(self, first: SupportsIndex, second: SupportsIndex) -> Tensor:
        """The view with two axes exchanged. Raises IndexError where there is no such axis."""
    def item(self) -> Any:
        """The only element, as a Python number. Raises ValueError where there are more."""
    def __getitem__(self, index: SupportsIndex) -> Tensor:
        """The view at `index` of the leading axis. Raises IndexError outside of it."""
    def __len__(self) -> int: ...
    def __float__(self) -> float: ...
    def __int__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def empty(shape: Sequence[int], dtype: str) -> Tensor:
    """Contiguous host memory, 64-byte aligned, contents undefined."""

def convert(source: _Array, target: _Array) -> None:
    """Write the elements of one array to another of the same shape, of any floating types.

    Rounds to nearest, ties to even. Raises TypeError for other types, ValueError for other shapes.
    """

def from_dlpack(x: _Array) -> Tensor:
    """The memory of any array as a Tensor, without a copy.

    Takes objects with `__dlpack__` (versioned or not) or the buffer protocol. Read-only arrays stay
    read-only. Raises TypeError for an object that is no array, BufferError for one that cannot be
    described.
    """

def _set_fast_dlpack(on: bool) -> bool:
    """Whether arrays come in by the DLPack C exchange API of their type. Returns what it was."""

@final
class Options:
    """Everything about a stack that is not a size of the data. Immutable."""

    def __init__(
        self,
        *,
        cell: str,
        num_layers: int = 1,
        bidirectional: bool = False,
        proj_size: int = 0,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        reset_after: bool = True,
        heads: int = 1,
        recompute: bool = False,
        int8: bool = False,
    ) -> None: ...
    @property
    def cell(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def bidirectional(self) -> bool: ...
    @property
    def proj_size(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def gate_activation(self) -> str: ...
    @property
    def reset_after(self) -> bool: ...
    @property
    def heads(self) -> int: ...
    @property
    def recompute(self) -> bool: ...
    @property
    def int8(self) -> bool:
        """A call's weights are one array, as `pack_int8` makes it, and it has no gradient."""
    @property
    def gates(self) -> int:
        """Rows of the weights, in units of the hidden size."""
    @property
    def states(self) -> int:
        """1: h alone; 2: h and c."""
    @property
    def saved_planes(self) -> int:
        """Planes of `saved` that backward needs; with `recompute` none."""

class Frozen:
    """A layer's weights, packed once; csrc/bind/frozen.h says when the layer thaws.

    ``input`` is any array (T, B, I) of the weights' dtype.
    """

    def __init__(self, options: Options, input: _Array, weights: tuple[Any, ...]) -> None: ...
    def thaw(self) -> None: ...
    @property
    def packed(self) -> bool:
        """Whether the weights are still kept."""

def quantize(weight: _Array) -> tuple[Tensor, Tensor]:
    """A float32 matrix (M, K) as int8 (M, K) with one scale per row, float32 (M,)."""

def pack_int8(
    options: Options,
    input_size: int,
    hidden_size: int,
    weights: Sequence[_Array],
    biases: bool,
) -> Tensor:
    """int8 weights in the order in which this machine's kernels read them, uint8 (N,).

    ``weights`` is the flat list, each matrix as int8 and followed by its scales. A call with
    another instruction set or other options refuses the result.
    """

def unpack_int8(options: Options, packed: _Array) -> list[Tensor]:
    """The ``weights`` of `pack_int8`."""

def set_torch(
    tensor: type,
    parameter: type,
    get_num_threads: Callable[[], int],
    is_grad_enabled: Callable[[], bool],
    dtypes: list[Any],
    observers: list[Callable[[], Any]],
    observer_variables: list[tuple[dict[str, Any], str]],
    transforms: list[Callable[[], Any]],
    transform_variables: list[tuple[dict[str, Any], str]],
) -> None:
    """What the binding asks torch before a call; once, when fastrnn's torch side is imported.

    ``dtypes``: torch's float32, float64, bfloat16, float16. Observers would notice that a call
    bypasses torch's dispatcher; transforms change what a call means. Both are functions that return
    False, None, 0 or (), and variables (a module's dictionary and a name) that are False or
    negative, while there are none.
    """

def set_recording(apply: Callable[..., Any], node: type, continued: Callable[..., Any]) -> None:
    """What records a call of `layer` (calls/autograd.py).

    Arguments:
        apply: of the autograd Function.
        node: the type of its nodes.
        continued: records a step of a cell whose state is the output of such a node.
    """

def recorded_backward(
    options: Options,
    tensors: tuple[Any, ...],
    cotangents: tuple[Any, ...],
    needs: tuple[bool, ...],
    loop: bool,
    cell: bool,
) -> tuple[Any, ...] | None:
    """The gradients of a call that `layer` recorded, one for each of ``needs``.

    None where the call is not a usual one: autograd records, something observes torch's operations,
    or an array is not a plain tensor on the CPU.

    Arguments:
        tensors: hidden, cell, saved (which is overwritten), input, h0, c0 and the weights.
        cotangents: the gradients d_output, d_hidden, d_cell, d_h_n, d_c_n, or None.
        needs: which gradients: those of `torch.autograd.Function.apply`'s arguments
            (calls/autograd.py).
        loop: whether one argument stands for the weights, whose gradients are found later.
        cell: whether the call is a step of a cell.
    """

def parameter_gradients(
    options: Options,
    input: _Array,
    h0: _Array,
    weights: tuple[Any, ...],
    saved: _Array,
    needs: tuple[bool, ...],
    threads: int = 0,
) -> list[Any]:
    """The gradients of input, h0 and c0, which are None, and of each weight of a cell.

    Arguments:
        input: (B, I), the rows of any number of steps.
        h0: (B, H), the states before them.
        saved: (1, B, …), as `backward` with ``consume_saved`` left it for each step.
        needs: as of `backward`.
    """

def bypass_is_unobservable(tensors: tuple[Any, ...]) -> bool:
    """Whether a call that bypasses torch's dispatcher gives what one through it does.

    No observer, and each of the tensors (or None) is a plain torch.Tensor or Parameter on a CPU or
    a CUDA device whose sign is settled.
    """

_Results = tuple[Any, Any, Any, Any, Any, Any]  # output, h_n, c_n, hidden, cell, saved

class Call:
    """A checked call of a stack; or, with ``cell``, of one step without the axes of steps and
    layers.

    Arguments:
        input: (T, B, I); with ``batch_sizes`` (N, I); of a cell (B, I).
        h0, c0: (L·D, B, ·), of a cell (B, ·); None: zeros.
        weights: the flat list.
        batch_sizes, lengths, reset: as in csrc/problem.h.
        reset_hx: the states after a reset, (h, c), (L·D, ·) each; None: zeros.
        threads: at most so many; 0: as many as OpenMP gives.
        frozen: the weights as they were packed, used where they are still the same.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        options: Options,
        input: _Array,
        h0: _Array | None,
        c0: _Array | None,
        weights: Sequence[_Array],
        batch_sizes: _Array | None = None,
        lengths: _Array | None = None,
        reset: _Array | None = None,
        reset_hx: Sequence[_Array | None] | None = None,
        threads: int = 0,
        cell: bool = False,
        frozen: Frozen | None = None,
    ) -> None: ...
    def forward(
        self,
        states: bool = False,
        save: bool = False,
        zeros: bool = False,
        device: tuple[Any, ...] | None = None,
    ) -> _Results:
        """Run it, once. Results are of the kind of the input; None where not asked for.

        Arguments:
            states: whether h and c of every layer and step are wanted: hidden and cell.
            save: whether a backward follows: hidden, cell and saved.
            zeros: whether the parts of saved that the engine never writes are zeroed.
            device: on a GPU (workspace, stream, allow_tf32, persistent): a function from a number
                of bytes to an array, a cudaStream_t as an int, and two flags.
        """

def backward(
    options: Options,
    input: _Array,
    h0: _Array | None,
    c0: _Array | None,
    weights: Sequence[_Array],
    batch_sizes: _Array | None,
    lengths: _Array | None,
    reset: _Array | None,
    hidden: _Array,
    cell_state: _Array | None,
    saved: _Array | None,
    d_output: _Array | None,
    d_hidden: _Array | None,
    d_cell: _Array | None,
    d_h_n: _Array | None,
    d_c_n: _Array | None,
    needs: tuple[bool, ...],
    consume_saved: bool = False,
    threads: int = 0,
    cell: bool = False,
    device: tuple[Any, ...] | None = None,
) -> list[Any]:
    """The gradients of input, h0, c0 and each weight; None where not needed.

    The first arguments are those of `Call`, then its results, then their gradients (None: zeros).
    With ``consume_saved`` ``saved`` is overwritten.
    """

def forward_members(
    options: Options,
    members: int,
    input: _Array,
    h0: _Array | None,
    c0: _Array | None,
    weights: Sequence[_Array],
    batch_sizes: _Array | None,
    lengths: _Array | None,
    reset: _Array | None,
    reset_hx: Sequence[_Array | None] | None,
    states: bool,
    save: bool,
    threads: int = 0,
    zeros: bool = False,
) -> _Results:
    """`Call` and its ``forward`` for an ensemble: arrays but batch_sizes have a leading axis."""

def backward_members(
    options: Options,
    members: int,
    input: _Array,
    h0: _Array | None,
    c0: _Array | None,
    weights: Sequence[_Array],
    batch_sizes: _Array | None,
    lengths: _Array | None,
    reset: _Array | None,
    hidden: _Array,
    cell_state: _Array | None,
    saved: _Array | None,
    d_output: _Array | None,
    d_hidden: _Array | None,
    d_cell: _Array | None,
    d_h_n: _Array | None,
    d_c_n: _Array | None,
    needs: tuple[bool, ...],
    threads: int = 0,
) -> list[Any]:
    """`backward` for an ensemble."""

def layer(
    own: Any,
    options: Options,
    frozen: Frozen | None,
    parameters: dict[str, Any],
    names: tuple[str, ...],
    input: Any,
    hx: Any,
    batch_first: bool,
    cell: bool,
) -> tuple[Any, ...] | None:
    """The whole call of a torch layer or cell, recorded by autograd where a gradient is.

    Returns:
        ``(output, hx_n, None)`` of a layer, ``hx_n`` of a cell; None where anything is unusual, or
        an argument does not fit: the caller then takes the other way, which says what is wrong.
    """

def fill_new_arrays(byte: int) -> int:
    """For tests: what every byte of a new array is, or -1 for whatever is there; returns the
    value before.
    """

class Stream:
    """A stack fed one step at a time (csrc/bind/stream.h)."""

    def __init__(
        self,
        options: Options,
        weights: Sequence[_Array],
        batch_size: int,
        dtype: str,
        threads: Callable[[], int] | None,
        view: Callable[[Tensor, Any], Any],
        programs: Sequence[tuple[Program, Sequence[_Array]]] | None,
    ) -> None:
        """Packs the weights, whose dtype must be `dtype`; of int8 options float32, or one array as
        `pack_int8` makes it.

        `programs` of a layer with options beyond the cells: of each layer its program and its
        shared arrays, which take the place of the weights.

        `threads` gives how many a step may use, None: as many as OpenMP says. `view(output, x)`
        gives what steps return for arrays of the type of x.
        """
    @property
    def step(self) -> Callable[[_Array], Any]:
        """A function from x (B, I) to the output (B, O), which the next step overwrites.

        Raises TypeError or ValueError, naming x, for what does not fit; RuntimeError while another
        thread is in the middle of a step, as all methods here do.
        """
    def pack(
        self,
        weights: Sequence[_Array],
        programs: Sequence[tuple[Program, Sequence[_Array]]] | None,
    ) -> None:
        """Takes weights of the same shapes and dtype anew."""
    def reset(self, mask: _Array | None) -> None:
        """The rows where the bools (B,) are true, or all, to the initial state."""
    def state(self) -> tuple[Tensor, ...]:
        """Copies of h (L, B, O) and, of an LSTM, c (L, B, H), which of half types is float32."""
    def set_state(self, h: _Array, c: _Array | None) -> None: ...
    def set_initial(self, h: _Array | None, c: _Array | None) -> None:
        """What `reset` puts in place, (L, 1, O) and (L, 1, H); None: zeros."""
    @property
    def input_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def output(self) -> Tensor:
        """The memory of the outputs, (B, O)."""

# (value, offset, scalar) or (-1, number of the constant, True); None where there is no operand.
_Operand = tuple[int, int, bool] | None

@final
class Program:
    """One step of a recurrence as a list of operations over rows (csrc/program.h).

    `values` are ``(home, index, width)`` or ``("sequence", index, width, previous)``. The phases
    `before`, `step` and `after` are lists of

    - ``("product", out, out_off, inp, in_off, weight, w_off, G, out_group, in_group, w_group, w_k,
      w_n, K, N, init, init_off)``, init -1: none;
    - ``("run", width, [(code, dst, a, b, c), ...])``, operands as `_Operand` says;
    - ``("reduce", "sum" or "max", out, out_off, inp, in_off, G, seg, n, elem)``;
    - ``("collect", out, out_off, inp, in_off, count, table)``;

    and `reductions` of ``("outer", target, off, d, d_off, x, x_off, G, d_group, x_group, w_group,
    w_k, w_n, K, N)`` or ``("columns", target, off, d, d_off, width)``. `tables` are pairs
    ``(starts, indices)``.

    Raises ValueError, naming the instruction, for what would read or write out of bounds, or read
    what nothing wrote. Immutable; threads may run it side by side.
    """

    def __init__(
        self,
        dtype: str,
        values: Sequence[tuple[Any, ...]],
        before: Sequence[tuple[Any, ...]],
        step: Sequence[tuple[Any, ...]],
        after: Sequence[tuple[Any, ...]],
        reductions: Sequence[tuple[Any, ...]],
        constants: Sequence[float],
        tables: Sequence[tuple[Any, Any]],
    ) -> None: ...
    def run(
        self,
        T: int,
        B: int,
        reverse: bool,
        threads: int,
        shared: Sequence[_Array | None],
        sequences: Sequence[_Array | None],
        firsts: Sequence[_Array | None],
        fixed: Sequence[_Array | None],
        inits: Sequence[_Array | None],
        finals: Sequence[_Array | None],
        gradients: Sequence[_Array | None],
    ) -> None:
        """Runs all steps; writes the sequences that the program writes, `finals`, `gradients`.

        Each list has an array for each index of its home. None: zeros in `firsts` and `inits`, not
        wanted in `finals`, and what the program does not use. `threads` 0: as many as OpenMP says.
        Raises TypeError or ValueError, naming the array, for what does not fit.
        """
    def team(self, T: int, B: int, threads: int = 0) -> tuple[int, str]:
        """How many threads a run uses where the cores are free, and what they share of a step.

        `"rows"` or `"columns"`.
        """

def isa() -> str:
    """The instruction set the engine runs."""

def isas() -> list[str]:
    """Those this processor can run."""

def max_threads() -> int:
    """Threads the engine uses by default: OpenMP's."""

def openmp_file() -> str:
    """The file of the OpenMP runtime that the engine uses (csrc/cpu/openmp.h).

    Chosen now at the latest. `"linked"` where it is the compiler's own; empty if there is none: the
    engine then runs on one thread.
    """

def estimated_time(
    options: Options,
    dtype: str,
    T: int,
    B: int,
    input_size: int,
    hidden_size: int,
    threads: int,
) -> float:
    """Seconds of an inference call with that many threads, by the estimate that divides layers.

    For the instruction set in use and the costs of csrc/cpu/host.h, not for this machine. 0 threads
    stand for OpenMP's number. Raises ValueError for sizes below 1.
    """

def fma_peak(dtype: str, threads: int, seconds: float) -> float:
    """GFLOP/s of multiply-adds on registers alone, all threads together, timed for `seconds`.

    With the vectors of `isa()`. `dtype` is `"float32"` or `"float64"`. Raises ValueError, naming
    the argument, for what does not fit.
    """

def read_bandwidth(bytes: int, threads: int, seconds: float) -> float:
    """GB/s of every thread reading an array of its own, of `bytes`, again and again.

    What fits into a cache is read from there. Raises ValueError, naming the argument, for what does
    not fit, MemoryError where the arrays find no room.
    """

class StandInCalls:
    """The calls of a recorded step (program/trace.py), to be compared with."""

    def __init__(self, calls: list[Any]) -> None: ...
    def replay(self, session: Any, step: Any, *arguments: Any) -> tuple[int, Any]:
        """The number of calls made, and the results, of step(*arguments), each call compared."""

def set_stand_ins(other: Any, is_grad_enabled: Any) -> Any:
    """Take what the comparison needs of Python; give the __torch_function__ of the stand-ins."""

class _CudaDevice(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes

class _CudaInfo(TypedDict):
    build: str
    runtime: str | None
    driver: str | None
    devices: list[_CudaDevice]
    error: str | None
    cublaslt: str  # the library of matrix products in use, or why there is none

def cuda_info() -> _CudaInfo | None:
    """The CUDA of this build and its devices; None in a build for the CPU alone."""

def cuda_kernels(
    options: Options,
    dtype: str,
    T: int,
    B: int,
    input_size: int,
    hidden_size: int,
    backward: bool,
    allow_tf32: bool,
    device: int | None,
) -> tuple[bool, str] | None:
    """Whether a pass goes by persistent kernels where these are asked for, and by which or why not.

    On the CUDA device of that number; None: by the data sheet of an H200, on any machine. None in
    a build for the CPU alone. Raises RuntimeError where there is no such device.
    """
