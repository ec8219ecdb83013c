"""Random arguments: valid ones, odd ones that mean the same, and wrong ones."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

if TYPE_CHECKING:
    from collections.abc import Callable

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 2**70, 0.0, 1.5, -0.5),
    *(float("nan"), float("inf"), "", "text", b"abc", [], (), {}, [1, "a"], [[1], [1, 2]]),
    *(object(), range(3), len, np.float32(1), np.int64(3), np.datetime64("2026-11-30")),
    *(torch.float32, torch.float16, "float64", "int8", torch.device("meta"), "cpu", 1j),
)

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.uint16),
)

HUGE = 2**45  # elements: more than any memory holds


class Draw(random.Random):
    """Random choices, and a record of what was done to the arguments."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.notes: list[str] = []
        self.broken = False  # something may be wrong; else the call is a valid one
        self.finite = True  # else sums of another order may give NaN in place of infinity
        self.tensors = torch.Generator().manual_seed(self.getrandbits(60))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.tensors).to(dtype)

    # ---- an argument, as it is, odd or wrong ----------------------------------------------------

    def odd(self, name: str, value: Any) -> Any:
        """The same values in another form, now and then."""
        if isinstance(value, Tensor) and self.chance(0.3):
            return self._by(KEEPING, name, value)
        if isinstance(value, np.ndarray) and self.chance(0.3):
            return self._by(KEEPING_NUMPY, name, value)
        return value

    def wrong(self, name: str, value: Any) -> Any:
        """Something else in its place, most of it wrong."""
        self.broken = True
        if self.chance(0.2):
            junk = self.choice(JUNK)
            self.notes.append(f"{name}={junk!r:.40}")
            return junk
        if isinstance(value, PackedSequence):
            part = self.choice(("data", "batch_sizes", "sorted_indices", "unsorted_indices"))
            old = getattr(value, part)
            whole = isinstance(old, Tensor) and not old.is_nested
            if part == "batch_sizes" and whole and self.chance(0.7):
                self.notes.append("batch_sizes tampered with")
                new = self.choice(BATCH_SIZES)(old.clone())
            else:
                new = self.wrong(part, old)
            return _packed(value, part, new)
        if isinstance(value, Tensor):
            return self._by(BREAKING, name, value)
        if isinstance(value, np.ndarray):
            return self._by(BREAKING_NUMPY, name, value)
        if isinstance(value, (tuple, list)) and value:
            return self._structure(name, list(value))
        junk = self.choice(JUNK)
        self.notes.append(f"{name}={junk!r:.40}")
        return junk

    def _structure(self, name: str, parts: list[Any]) -> Any:
        at = self.randrange(len(parts))
        kind = self.choice(("inside", "inside", "inside", "short", "long", "swapped", "as a list"))
        self.notes.append(f"{name} {kind} at {at}")
        if kind == "inside":
            parts[at] = self.wrong(f"{name}[{at}]", parts[at])
        elif kind == "short":
            del parts[at]
        elif kind == "long":
            parts.append(parts[at])
        elif kind == "swapped":
            parts.reverse()
        return parts if kind == "as a list" else tuple(parts)

    def _by(self, table: dict[str, Callable[[Draw, Any], Any]], name: str, value: Any) -> Any:
        kind = self.choice(tuple(table))
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size > 2**20:  # huge by now
            return value
        self.notes.append(f"{name} {kind}")
        if kind == "of inference mode":  # refused where a gradient is recorded, as by torch.nn
            self.broken = True
        try:
            return table[kind](self, value)
        except Exception:
            return value  # cannot be done to this one: too few axes, of another dtype

    def arguments(self, given: dict[str, Any], wrong: float) -> dict[str, Any]:
        """All arguments of a call, some of them odd, and with that probability some wrong."""
        given = {name: self.odd(name, value) for name, value in given.items()}
        while given and self.chance(wrong):
            name = self.choice(tuple(given))
            given[name] = self.wrong(name, given[name])
            wrong /= 4
        return given


def _packed(value: PackedSequence, part: str, new: Any) -> PackedSequence:
    """With another part, past the checks of the constructor."""
    fields = dict(zip(value._fields, value, strict=True)) | {part: new}
    return tuple.__new__(PackedSequence, fields.values())


# ---- the same values in another form ------------------------------------------------------------


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_zeros([2 * size for size in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


KEEPING: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "transposed": lambda d, x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda d, x: _sliced(x),
    "with an offset": lambda d, x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "a negation pending": lambda d, x: torch._neg_view(-x),
    "a Parameter": lambda d, x: torch.nn.Parameter(x),
    "a leaf": lambda d, x: x.clone().requires_grad_(),
    "no leaf": lambda d, x: x.clone().requires_grad_() * 1,
    "of inference mode": lambda d, x: _inference(x),
}


def _unaligned(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


def _read_only(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.copy()
    x.flags.writeable = False
    return x


KEEPING_NUMPY: dict[str, Callable[[Draw, np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "in Fortran's order": lambda d, x: np.asfortranarray(x),
    "sliced": lambda d, x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda d, x: x[::-1].copy()[::-1],
    "read-only": lambda d, x: _read_only(x),
}

# ---- wrong ones ---------------------------------------------------------------------------------


def _resized(d: Draw, x: Any, by: int) -> Any:
    shape = list(x.shape)
    axis = d.randrange(len(shape))
    shape[axis] = max(0, shape[axis] + by)
    return x.new_ones(shape) if isinstance(x, Tensor) else np.ones(shape, x.dtype)


def _unbounded(d: Draw, x: Tensor, value: float) -> Tensor:
    d.finite = False
    x = x.clone()
    x.view(-1)[d.randrange(x.numel())] = value
    return x


BREAKING: dict[str, Callable[[Draw, Tensor], Any]] = {
    "of another dtype": lambda d, x: x.to(d.choice(DTYPES)),
    "with an axis more": lambda d, x: x.unsqueeze(d.randrange(x.dim() + 1)),
    "with an axis less": lambda d, x: x.select(d.randrange(x.dim()), 0),
    "without axes": lambda d, x: x.flatten()[0],
    "flattened": lambda d, x: x.flatten(),
    "permuted": lambda d, x: x.permute(d.sample(range(x.dim()), x.dim())),
    "larger": lambda d, x: _resized(d, x, 1),
    "smaller": lambda d, x: _resized(d, x, -1),
    "empty": lambda d, x: _resized(d, x, -99),
    "huge by expansion": lambda d, x: x[:1].expand(HUGE, *x.shape[1:]),
    "on meta": lambda d, x: x.to("meta"),
    "sparse": lambda d, x: x.to_sparse(),
    "quantized": lambda d, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "conjugate": lambda d, x: x.to(torch.complex64).conj(),
    "NaN": lambda d, x: _unbounded(d, x, float("nan")),
    "infinite": lambda d, x: _unbounded(d, x, float("-inf")),
    "large": lambda d, x: _unbounded(d, x, 1e30),
    "negative": lambda d, x: -x.abs() - 1,
    "an array of NumPy": lambda d, x: x.numpy(),
    "a list": lambda d, x: x.tolist(),
    "a nested tensor": lambda d, x: torch.nested.nested_tensor(list(x)),
}

BREAKING_NUMPY: dict[str, Callable[[Draw, np.ndarray[Any, Any]], Any]] = {
    "of another dtype": lambda d, x: x.astype(d.choice("f4 f8 f2 g i1 i8 u2 ? c8 c16 >f4".split())),
    "of no numbers": lambda d, x: x.astype(d.choice("U4 S4 O M8[s] m8[s] V8".split())),
    "with fields": lambda d, x: np.zeros(x.shape, [("a", "f4"), ("b", "f4")]),
    "with an axis more": lambda d, x: np.expand_dims(x, d.randrange(x.ndim + 1)),
    "with an axis less": lambda d, x: np.take(x, 0, d.randrange(x.ndim)),
    "with many axes": lambda d, x: x.reshape(*[1] * 30, *x.shape),
    "without axes": lambda d, x: x.ravel()[0],
    "permuted": lambda d, x: x.transpose(d.sample(range(x.ndim), x.ndim)),
    "larger": lambda d, x: _resized(d, x, 1),
    "smaller": lambda d, x: _resized(d, x, -1),
    "empty": lambda d, x: _resized(d, x, -99),
    "huge by expansion": lambda d, x: np.broadcast_to(x[:1], (HUGE, *x.shape[1:])),
    "unaligned": lambda d, x: _unaligned(x),
    "masked": lambda d, x: np.ma.masked_array(x, mask=x > 0),
    "a matrix": lambda d, x: np.matrix(x.reshape(x.shape[0], -1)),
    "a tensor of torch": lambda d, x: torch.from_numpy(x.copy()),
    "a list": lambda d, x: x.tolist(),
    "a memoryview": lambda d, x: memoryview(x),
}

BATCH_SIZES: tuple[Callable[[Tensor], Any], ...] = (
    lambda b: -b,
    lambda b: b * 0,
    lambda b: b[:0],
    lambda b: b + 1,
    lambda b: b.flip(0),
    lambda b: b * 2**40,
    lambda b: b * 2**61,
    lambda b: torch.cat([b, b]),
    lambda b: b.repeat_interleave(2)[::2],
    lambda b: b.int(),
    lambda b: b.double(),
    lambda b: b[:, None],
    lambda b: b.to("meta"),
    lambda b: b.tolist(),
    lambda b: None,
)
