"""Arrays of the virtual CUDA device of cuda/tests/virtual, whose memory is the host's.

Import it after the module that runs on that device has replaced _C.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

import fastrnn
from fastrnn import _C

CUDA = 2  # DLPack's number of it
ALIGNMENT = 256

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype = ctypes.c_void_p
pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class OnDevice:
    """A host array that is exported as the device's."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def new_empty(self, shape: tuple[int, ...], dtype: str) -> OnDevice:
        """NaN, so that an element that is left unwritten shows; of bfloat16, which NumPy lacks,
        whatever the memory holds."""
        if dtype == "bfloat16":
            return OnDevice(_C.empty(shape, dtype))
        return OnDevice(np.full(shape, np.nan, dtype))

    def __getitem__(self, index: int) -> OnDevice:
        return OnDevice(self.host[index])

    def copy_(self, other: OnDevice) -> None:
        _C.convert(other.host, self.host)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = fastrnn.from_dlpack(self.host).__dlpack__()
        device_type = pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        ctypes.c_int32.from_address(device_type).value = CUDA
        return capsule


def workspace(size: int) -> OnDevice:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return OnDevice(memory[start : start + size])
