"""fastrnn.Tensor: arrays in and out without a copy, whoever made them."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fastrnn import _C

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMPY_DTYPES = [
    "float32", "float64", "float16", "complex64", "complex128", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
]  # fmt: skip


class DLPackOnly:
    """An array that offers `__dlpack__` and nothing else, and counts how often it is asked."""

    def __init__(self, array: Any, versioned: bool = True) -> None:
        self.array = array
        self.versioned = versioned
        self.asked = 0

    def __dlpack__(self, **kwargs: Any) -> object:
        self.asked += 1
        if not self.versioned and kwargs:
            raise TypeError("__dlpack__() takes no keyword arguments")
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()  # type: ignore[no-any-return]


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast_dlpack(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways in: the DLPack C exchange API, and `__dlpack__` with it switched off."""
    before = _C._set_fast_dlpack(request.param)
    yield request.param
    _C._set_fast_dlpack(before)


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


# ---- made here ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_empty_is_contiguous_aligned_and_writable(dtype: str) -> None:
    tensor = _C.empty((2, 3, 5), dtype)
    assert (tensor.shape, tensor.strides) == ((2, 3, 5), (15, 5, 1))
    assert (tensor.dtype, tensor.device, tensor.ndim) == (dtype, "cpu", 3)
    array = tensor.numpy()
    assert array.dtype == np.dtype(dtype)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert address(array) % 64 == 0
    array[...] = 1
    assert tensor.numpy().sum() == 30


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_no_axes_and_no_elements(shape: tuple[int, ...]) -> None:
    tensor = _C.empty(shape, "float32")
    assert tensor.shape == shape
    assert tensor.numpy().shape == shape
    assert _C.from_dlpack(tensor.numpy()).shape == shape
    assert np.from_dlpack(tensor).shape == shape


def test_empty_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of float32.*, got 'float128'"):
        _C.empty((2,), "float128")
    with pytest.raises(ValueError, match=r"shape: expected sizes of 0 or more, got -1"):
        _C.empty((2, -1), "float32")
    with pytest.raises(ValueError, match="shape: so many elements"):
        _C.empty((2**40, 2**40), "float32")
    with pytest.raises(MemoryError):
        _C.empty((2**60,), "uint8")


# ---- from NumPy and back ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("versioned", [None, True, False], ids=["buffer", "versioned", "legacy"])
def test_numpy_there_and_back_shares_memory(dtype: str, versioned: bool | None) -> None:
    source = np.arange(6).reshape(2, 3).astype(dtype)
    array = source if versioned is None else DLPackOnly(source, versioned)
    tensor = _C.from_dlpack(array)
    assert (tensor.shape, tensor.strides, tensor.dtype) == ((2, 3), (3, 1), dtype)
    for back in (tensor.numpy(), np.asarray(tensor), np.from_dlpack(tensor), memoryview(tensor)):
        np.testing.assert_array_equal(np.asarray(back), source)
        assert address(np.asarray(back)) == address(source)


@pytest.mark.parametrize("wrap", [lambda a: a, DLPackOnly], ids=["buffer", "dlpack"])
def test_strided_and_offset_views(wrap: Any) -> None:
    base = np.arange(60.0).reshape(3, 4, 5)
    for view in (base[1:], base[:, ::2, 1:], base.T, base[::-1], base[:, 1], base[2, 3, 4:]):
        tensor = _C.from_dlpack(wrap(view))
        assert tensor.shape == view.shape
        assert tensor.strides == tuple(s // 8 for s in view.strides)
        np.testing.assert_array_equal(tensor.numpy(), view)
        assert np.shares_memory(tensor.numpy(), base)


@pytest.mark.parametrize("wrap", [lambda a: a, DLPackOnly], ids=["buffer", "dlpack"])
def test_read_only_stays_read_only(wrap: Any) -> None:
    source = np.arange(6.0)
    source.flags.writeable = False
    tensor = _C.from_dlpack(wrap(source))
    assert tensor.read_only
    assert not tensor.numpy().flags.writeable
    assert memoryview(tensor).readonly
    assert not np.from_dlpack(tensor).flags.writeable
    assert tensor.transpose(0, 0).read_only
    assert tensor[2].read_only
    with pytest.raises(BufferError, match=r"read-only .* DLPack 1\.0"):
        tensor.__dlpack__()


def test_objects_with_a_buffer() -> None:
    assert _C.from_dlpack(b"abc").numpy().tolist() == [97, 98, 99]
    assert _C.from_dlpack(b"abc").read_only
    block = bytearray(b"abc")
    _C.from_dlpack(block).numpy()[0] = 100
    assert block == b"dbc"


def test_array_protocol_converts_and_copies_when_asked() -> None:
    source = np.arange(3.0)
    tensor = _C.from_dlpack(source)
    assert np.asarray(tensor, dtype="float32").dtype == np.float32
    copied = np.array(tensor)
    copied[0] = 7
    assert source[0] == 0
    assert tensor.__array__(copy=True) is not source
    assert not np.shares_memory(tensor.__array__(copy=True), source)
    assert np.shares_memory(tensor.__array__(), source)


@pytest.mark.parametrize("array", [np.arange(3.0, dtype=">f8"), np.array(["a"]), np.array([{}])])
def test_arrays_that_are_no_numbers_are_refused(array: Any) -> None:
    with pytest.raises((BufferError, TypeError)):
        _C.from_dlpack(array)


@pytest.mark.parametrize("thing", [None, 3, "text", [1.0, 2.0], object()])
def test_no_array_is_a_type_error(thing: object) -> None:
    with pytest.raises(TypeError, match=f"expected an array .*, got {type(thing).__name__}"):
        _C.from_dlpack(thing)


# ---- bfloat16 -----------------------------------------------------------------------------------


def test_bfloat16_and_numpy_by_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source = np.array([[1.5, -2.0], [0.25, 3.0]], ml_dtypes.bfloat16)[:, ::-1]
    tensor = _C.from_dlpack(source)
    assert (tensor.dtype, tensor.shape, tensor.strides) == ("bfloat16", (2, 2), (2, -1))
    assert tensor.numpy().dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.numpy(), source)
    assert np.shares_memory(tensor.numpy(), source)
    assert tensor[0][0].item() == -2.0


def test_bfloat16_without_ml_dtypes_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    tensor = _C.empty((2,), "bfloat16")
    with pytest.raises(TypeError, match=r"no bfloat16: install ml_dtypes, or use \.torch\(\)"):
        tensor.numpy()
    with pytest.raises(TypeError, match="no bfloat16"):
        tensor.__array__()
    with pytest.raises(BufferError):
        memoryview(tensor)


# ---- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64", "bool"])
def test_torch_there_and_back_shares_memory(fast_dlpack: bool, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    source = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    for view in (source, source[1:, :, ::2], source.transpose(0, 2), source[0, 0], source[1, 2, 3]):
        tensor = _C.from_dlpack(view)
        assert (tensor.shape, tensor.dtype) == (tuple(view.shape), dtype)
        if view.dim() > 1:
            assert tensor.strides == view.stride()
        back = tensor.torch()
        assert back.data_ptr() == view.data_ptr()
        assert torch.equal(back, view)


def test_torch_values_of_a_tensor_that_records_a_gradient(fast_dlpack: bool) -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert np.shares_memory(_C.from_dlpack(parameter).numpy(), parameter.detach().numpy())
    assert _C.from_dlpack(parameter * 2).numpy().sum() == 12


def test_torch_expanded_and_empty(fast_dlpack: bool) -> None:
    torch = pytest.importorskip("torch")
    assert _C.from_dlpack(torch.ones(1, 3).expand(4, 3)).strides[0] == 0
    assert _C.from_dlpack(torch.ones(0, 3)).torch().shape == (0, 3)


def test_torch_values_with_a_pending_conjugation_or_negation(fast_dlpack: bool) -> None:
    torch = pytest.importorskip("torch")
    conjugated = torch.complex(torch.arange(3.0), torch.ones(3)).conj()
    for pending in (conjugated, conjugated.imag):
        expected = pending.resolve_conj().resolve_neg().numpy()
        np.testing.assert_array_equal(_C.from_dlpack(pending).numpy(), expected)


def test_torch_has_no_negative_strides() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="no negative strides"):
        _C.from_dlpack(np.arange(3.0)[::-1]).torch()


@pytest.mark.parametrize("make", ["sparse", "meta"])
def test_torch_tensors_without_memory_are_refused(fast_dlpack: bool, make: str) -> None:
    torch = pytest.importorskip("torch")
    bad = torch.eye(3).to_sparse() if make == "sparse" else torch.empty(3, device="meta")
    with pytest.raises((BufferError, RuntimeError, ValueError)):
        _C.from_dlpack(bad)


# ---- jax ----------------------------------------------------------------------------------------


def test_jax_arrays_come_in_read_only() -> None:
    jnp = pytest.importorskip("jax.numpy")
    source = jnp.arange(6.0).reshape(2, 3)
    tensor = _C.from_dlpack(source)
    np.testing.assert_array_equal(tensor.numpy(), np.asarray(source))
    assert not tensor.numpy().flags.writeable


# ---- the DLPack protocol, as the array API standard tells it ------------------------------------


def capsule_name(capsule: object) -> str:
    return repr(capsule).split('"')[1]


def test_capsules_by_version() -> None:
    tensor = _C.empty((2,), "float32")
    assert tensor.__dlpack_device__() == (1, 0)
    assert capsule_name(tensor.__dlpack__()) == "dltensor"
    assert capsule_name(tensor.__dlpack__(max_version=(0, 8))) == "dltensor"
    assert capsule_name(tensor.__dlpack__(max_version=(1, 0))) == "dltensor_versioned"
    assert capsule_name(tensor.__dlpack__(max_version=(2, 0))) == "dltensor_versioned"
    assert capsule_name(tensor.__dlpack__(dl_device=(1, 0), stream=None)) == "dltensor"


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_a_capsule_is_used_once(max_version: tuple[int, int] | None) -> None:
    source = _C.empty((3,), "float32")
    capsule = source.__dlpack__(max_version=max_version)
    assert np.shares_memory(_C.from_dlpack(capsule).numpy(), source.numpy())
    assert capsule_name(capsule).startswith("used_dltensor")
    with pytest.raises(BufferError, match="not used yet"):
        _C.from_dlpack(capsule)


def test_copy_is_contiguous_and_apart() -> None:
    source = np.arange(12.0).reshape(3, 4).T
    source.flags.writeable = False
    tensor = _C.from_dlpack(source)
    copied = _C.from_dlpack(tensor.__dlpack__(max_version=(1, 0), copy=True))
    np.testing.assert_array_equal(copied.numpy(), source)
    assert copied.strides == (3, 1)
    assert not copied.read_only
    assert not np.shares_memory(copied.numpy(), source)
    same = _C.from_dlpack(tensor.__dlpack__(max_version=(1, 0), copy=False))
    assert np.shares_memory(same.numpy(), source)


def test_other_devices_and_streams_are_refused() -> None:
    tensor = _C.empty((2,), "float32")
    with pytest.raises(BufferError, match=r"dl_device: expected that of the tensor, cpu"):
        tensor.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match=r"stream: expected None .* got 7"):
        tensor.__dlpack__(stream=7)


def test_the_fast_way_does_not_ask_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def asked(*args: object, **kwargs: object) -> object:
        raise BufferError("asked")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", asked)
    assert _C.from_dlpack(torch.ones(3)).shape == (3,)
    before = _C._set_fast_dlpack(False)
    try:
        with pytest.raises(BufferError, match="asked"):
            _C.from_dlpack(torch.ones(3))
    finally:
        _C._set_fast_dlpack(before)


# ---- views --------------------------------------------------------------------------------------


def test_transpose_and_index_are_views() -> None:
    source = np.arange(24.0).reshape(2, 3, 4)
    tensor = _C.from_dlpack(source)
    np.testing.assert_array_equal(tensor.transpose(0, 2).numpy(), source.transpose(2, 1, 0))
    np.testing.assert_array_equal(tensor.transpose(-1, 0).numpy(), source.transpose(2, 1, 0))
    np.testing.assert_array_equal(tensor[1].numpy(), source[1])
    np.testing.assert_array_equal(tensor[-2][2].numpy(), source[0, 2])
    assert [len(tensor), len(tensor[0]), len(tensor[0][0])] == [2, 3, 4]
    tensor[1][2].numpy()[3] = -1
    assert source[1, 2, 3] == -1


def test_bad_axes_and_indices() -> None:
    tensor = _C.empty((2, 3), "float32")
    for index in (2, -3):
        with pytest.raises(IndexError, match=rf"index: expected one below 2, got {index}"):
            tensor[index]
    with pytest.raises(IndexError, match=r"axis: expected one of a tensor with 2 axes, got 2"):
        tensor.transpose(0, 2)
    with pytest.raises(IndexError, match="without axes"):
        _C.empty((), "float32")[0]
    with pytest.raises(TypeError, match="without axes"):
        len(_C.empty((), "float32"))
    with pytest.raises(TypeError):
        tensor[0:1]  # type: ignore[index]


def test_numbers_come_out() -> None:
    assert _C.from_dlpack(np.array(2.5)).item() == 2.5
    assert float(_C.from_dlpack(np.array([2.5], np.float16))) == 2.5
    assert int(_C.from_dlpack(np.array(-7))) == -7
    assert not _C.from_dlpack(np.array(False))
    with pytest.raises(ValueError, match="item: expected a tensor of one element, got 2"):
        _C.empty((2,), "float32").item()


def test_repr() -> None:
    tensor = _C.empty((2, 3), "float32")
    assert repr(tensor) == "fastrnn.Tensor(shape=(2, 3), dtype='float32', device='cpu')"


# ---- lifetime -----------------------------------------------------------------------------------


class Watched(np.ndarray[Any, Any]):
    """An array that can be watched going away."""


def watched() -> tuple[Watched, weakref.ref[Watched]]:
    array = np.arange(1000.0).view(Watched)
    return array, weakref.ref(array)


@pytest.mark.parametrize("wrap", [lambda a: a, DLPackOnly], ids=["buffer", "dlpack"])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 0),
        lambda t: t[3],
        lambda t: t.numpy(),
        memoryview,
        np.from_dlpack,
        lambda t: t.__dlpack__(),
        lambda t: t.__dlpack__(max_version=(1, 0)),
        _C.from_dlpack,
    ],
    ids=["transpose", "index", "numpy", "memoryview", "from_dlpack", "legacy", "capsule", "again"],
)
def test_every_view_keeps_the_memory_and_the_last_lets_go(wrap: Any, view: Any) -> None:
    array, alive = watched()
    tensor = _C.from_dlpack(wrap(array))
    kept = view(tensor)
    del array, tensor
    gc.collect()
    assert alive() is not None
    del kept
    gc.collect()
    assert alive() is None


def test_memory_of_our_own_outlives_the_tensor() -> None:
    tensor = _C.empty((1000,), "float64")
    array = tensor.numpy()
    array[...] = np.arange(1000.0)
    del tensor
    gc.collect()
    others = [_C.empty((1000,), "float64").numpy() for _ in range(20)]
    for other in others:
        other[...] = -1
    np.testing.assert_array_equal(array, np.arange(1000.0))


def test_torch_memory_outlives_both_tensors(fast_dlpack: bool) -> None:
    torch = pytest.importorskip("torch")
    tensor = _C.from_dlpack(torch.arange(1000.0))
    back = tensor.torch()
    del tensor
    gc.collect()
    others = [torch.full((1000,), -1.0) for _ in range(20)]
    assert torch.equal(back, torch.arange(1000.0))
    assert len(others) == 20


def test_no_abort_at_exit() -> None:
    code = (
        "import numpy as np\n"
        "from fastrnn import _C\n"
        "kept = [_C.from_dlpack(np.ones(3)), _C.empty((2,), 'float32')]\n"
        "capsule = kept[0].__dlpack__()\n"
        "import builtins; builtins.kept = (kept, capsule, kept[0].numpy())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["float16", "float32", "float64"])
@pytest.mark.parametrize("source", ["float16", "float32", "float64"])
def test_convert_is_numpys_over_any_strides(source: str, target: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(source)[:, ::2].transpose(2, 0, 1)
    y = np.zeros((5, 4, 3), target).transpose(0, 2, 1)
    _C.convert(x, y)
    np.testing.assert_array_equal(y, x.astype(target))


def test_convert_to_bfloat16_and_back_rounds_to_nearest() -> None:
    half = _C.empty((4,), "bfloat16")
    _C.convert(np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32), half)
    back = np.zeros(4, np.float32)
    _C.convert(half, back)
    assert back.tolist() == [1.0, 1.0, 1.015625, -2.5]  # ties to even


def test_convert_refuses_other_shapes_and_types() -> None:
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"^target: expected 3 elements along axis 1, .* got 4"):
        _C.convert(x, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"^target: expected the axes of source"):
        _C.convert(x, np.zeros(6, np.float32))
    with pytest.raises(TypeError, match=r"^convert: expected float32, .*, got int64"):
        _C.convert(x, np.zeros((2, 3), np.int64))
