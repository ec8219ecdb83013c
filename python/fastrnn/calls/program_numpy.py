"""The `Arrays` of NumPy, for programs on arrays without torch (arrays.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _C

if TYPE_CHECKING:
    import numpy.typing as npt


def writable(x: Any) -> Any:
    """A ``fastrnn.Tensor`` of float32 or float64 as a NumPy array; anything else unchanged."""
    return x.numpy() if x is not None and x.dtype in ("float32", "float64") else x


class NumPyArrays:
    """`Arrays` of NumPy; inputs and targets may also be ``fastrnn.Tensor``."""

    threads = 0

    def __init__(self, dtype: str) -> None:
        self.dtype = "float64" if dtype == "float64" else "float32"

    def empty(self, *shape: int) -> npt.NDArray[Any]:
        return _C.empty(shape, self.dtype).numpy()

    def wide(self, x: Any) -> npt.NDArray[Any]:
        if str(x.dtype) != self.dtype:
            target = _C.empty(x.shape, self.dtype)
            _C.convert(x, target)
            return target.numpy()
        array: npt.NDArray[Any] = np.asarray(x)
        return array if array.strides[-1] == array.itemsize else np.ascontiguousarray(array)

    def dense(self, x: Any) -> npt.NDArray[Any]:
        return np.ascontiguousarray(self.wide(x))

    def columns(self, x: npt.NDArray[Any], columns: slice) -> npt.NDArray[Any]:
        return x[..., columns]

    def numbers(self, mask: Any) -> npt.NDArray[Any]:
        return np.asarray(mask).astype(self.dtype)

    def store(self, values: npt.NDArray[Any], target: Any) -> None:
        _C.convert(values, target)

    def is_wide(self, target: Any) -> bool:
        return isinstance(target, np.ndarray) and target.dtype == self.dtype

    def valid(self, counts: Any, steps: int, rows: int, packed: bool) -> npt.NDArray[Any]:
        if packed:
            return np.arange(rows) < np.asarray(counts)[:, None]
        return np.arange(steps)[:, None] < np.asarray(counts)

    def positions(self, valid: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.flatnonzero(valid)

    def fresh(self, reset: Any, valid: Any, reverse: bool) -> npt.NDArray[Any]:
        reset = np.asarray(reset) if valid is None else np.asarray(reset) & valid
        return np.concatenate([reset[1:], np.zeros_like(reset[:1])]) if reverse else reset
