"""DLPack exporters that leave out optional fields, or give impossible ones.

The capsules are made here field by field, as a careless library would make them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from fastrnn import _C, Stream, functional

FLOAT, BFLOAT = 2, 4


class DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Exporter:
    """float32 0 … 5 of shape (2, 3), but for the fields that are given."""

    def __init__(self, *, version: tuple[int, int] | None = (1, 1), **fields: Any) -> None:
        self.memory = (ctypes.c_float * 6)(*range(6))
        shape, strides = fields.pop("shape", (2, 3)), fields.pop("strides", None)
        self.vectors = [v and (ctypes.c_int64 * len(v))(*v) for v in (shape, strides)]
        address, *_ = map(ctypes.addressof, (self.memory,))
        described: dict[str, Any] = {
            "data": address,
            "device_type": 1,
            "device_id": 0,
            "ndim": len(shape or ()),
            "dtype": (FLOAT, 32, 1),
            "byte_offset": 0,
            **dict(zip(("shape", "strides"), map(self._address, self.vectors), strict=True)),
            **fields,
        }
        flags = described.pop("flags", 0)
        tensor = DLTensor(**described | {"dtype": DataType(*described["dtype"])})
        if version is None:
            self.managed: Any = Managed(tensor, None, None)
            self.name = b"dltensor"
        else:
            self.managed = ManagedVersioned(*version, None, None, flags, tensor)
            self.name = b"dltensor_versioned"

    @staticmethod
    def _address(vector: Any) -> int | None:
        return ctypes.addressof(vector) if vector else None

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> object:
        return new_capsule(ctypes.addressof(self.managed), self.name, None)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 99)])
def test_missing_strides_mean_contiguous(version: tuple[int, int] | None) -> None:
    source = Exporter(version=version)
    tensor = _C.from_dlpack(source)
    assert tensor.strides == (3, 1)
    assert tensor.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_offset_in_bytes_is_added() -> None:
    tensor = _C.from_dlpack(source := Exporter(shape=(2,), byte_offset=8))
    assert tensor.numpy().tolist() == [2, 3]
    del source


def test_a_scalar_needs_neither_shape_nor_strides() -> None:
    tensor = _C.from_dlpack(source := Exporter(shape=None, ndim=0))
    assert (tensor.shape, tensor.item()) == ((), 0)
    del source


@pytest.mark.parametrize(("flags", "read_only"), [(0, False), (1, True), (2, False), (3, True)])
def test_flags_of_a_capsule(flags: int, read_only: bool) -> None:
    tensor = _C.from_dlpack(source := Exporter(flags=flags))
    assert tensor.read_only is read_only
    del source


def test_no_elements_need_no_memory() -> None:
    assert _C.from_dlpack(Exporter(shape=(0, 3), data=None)).shape == (0, 3)
    assert _C.from_dlpack(Exporter(shape=(2**62, 0, 2**62), data=None)).shape[1] == 0


LIES = {
    "negative size": ({"shape": (2, -3)}, "expected sizes of 0 or more, got -3 of axis 1"),
    "negative axes": ({"ndim": -1}, "expected 0 to 64 axes, got -1"),
    "too many axes": ({"shape": (1,) * 65}, "expected 0 to 64 axes, got 65"),
    "no shape": (
        {"shape": None, "ndim": 2},
        "expected a shape, got an array of 2 axes without one",
    ),
    "no data": ({"data": None}, "expected an array with data, got one without"),
    "sizes beyond": ({"shape": (2**40, 2**40)}, "expected an array in memory"),
    "strides beyond": ({"strides": (2**62, 1)}, "expected an array in memory"),
    "negative strides beyond": ({"strides": (-(2**63), 1)}, "expected an array in memory"),
    "four bits": ({"dtype": (FLOAT, 4, 2)}, "expected an array of numbers, got DLPack type"),
    "no type at all": ({"dtype": (99, 7, 0)}, "expected an array of numbers, got DLPack type"),
    "another DLPack": ({"version": (2, 0)}, r"expected an array by DLPack 1.x, got DLPack 2.x"),
}


@pytest.mark.parametrize(("fields", "message"), LIES.values(), ids=LIES.keys())
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, BufferError), match=f"^x: {message}"):
        _C.from_dlpack(Exporter(**fields))
    one = np.ones((1, 1), np.float32)
    with pytest.raises((TypeError, ValueError), match=r"^input "):
        functional.rnn(Exporter(**fields), None, [one, one], bias=False)
    stream = Stream.from_weights("RNN", [np.ones((1, 3), np.float32), one], bias=False)
    with pytest.raises((TypeError, ValueError), match=r"^x: "):
        stream.step(Exporter(**fields))


def test_the_stride_of_an_axis_of_one_element_does_not_matter() -> None:
    tensor = _C.from_dlpack(source := Exporter(shape=(1, 6), strides=(2**62, 1)))
    assert tensor.numpy().tolist() == [[0, 1, 2, 3, 4, 5]]
    del source


# ---- the buffer protocol ------------------------------------------------------------------------


def test_a_buffer_without_strides_is_contiguous() -> None:
    assert _C.from_dlpack((ctypes.c_float * 3)(1, 2, 3)).numpy().tolist() == [1, 2, 3]
    rows = ((ctypes.c_double * 2) * 2)((1, 2), (3, 4))
    assert _C.from_dlpack(rows).numpy().tolist() == [[1, 2], [3, 4]]
    assert _C.from_dlpack((ctypes.c_float * 0)()).shape == (0,)


DATES = {
    "date": np.datetime64("2026-11-30"),
    "NaT": np.datetime64("NaT"),
    "time": np.timedelta64(3, "s"),
    "dates": np.array([["2026-11-30"]], "M8[s]"),
    "times": np.array([[3]], "m8[s]"),
    "strings": np.array([["a"]]),
    "records": np.zeros((1, 1), [("a", "f4")]),
    "objects": np.array([[None]]),
    "long doubles": np.zeros((1, 1), np.longdouble),
    "other byte order": np.zeros((1, 1), ">f4"),
    "void": np.void(b"abcd"),
    "empty void": np.zeros((1, 1), "V0"),
}


@pytest.mark.parametrize("array", DATES.values(), ids=DATES.keys())
def test_arrays_of_no_numbers_are_refused_by_name(array: Any) -> None:
    with pytest.raises((TypeError, BufferError), match=r"^x: "):
        _C.from_dlpack(array)
    stream = Stream.from_weights("RNN", [np.ones((1, 1), np.float32)] * 2, bias=False)
    with pytest.raises(TypeError, match=r"^x: "):
        stream.step(array)
    with pytest.raises(TypeError, match=r"^state: "):
        stream.state = array
    with pytest.raises(TypeError, match=r"^input "):
        functional.rnn(array, None, [np.ones((1, 1))] * 2, bias=False)


# ---- `__dlpack__` -------------------------------------------------------------------------------


class Liar:
    """`__dlpack__` returns what the test sets."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [None, 3, "capsule", np.ones(2), object(), ValueError("no"), KeyError("no"), MemoryError("no")],
    ids=lambda answer: type(answer).__name__,
)
def test_a_dlpack_method_without_a_capsule_is_refused(answer: Any) -> None:
    with pytest.raises((BufferError, TypeError, ValueError), match=r"^x: .*(capsule|no)"):
        _C.from_dlpack(Liar(answer))


def test_a_keyboard_interrupt_is_passed_on() -> None:
    class Interrupted(Liar):
        def __dlpack__(self, **_: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _C.from_dlpack(Interrupted(None))
