"""What became of a call: a right result, a clear error, or a finding."""

from __future__ import annotations

import re
from typing import Any

import torch

CLEAR = (TypeError, ValueError, RuntimeError, NotImplementedError)
# What Python, C++ or torch says by itself when an argument was not checked.
UNCLEAR = re.compile(
    r"bad_alloc|std::|vector|basic_string|INTERNAL ASSERT|assert|incompatible (func|constr)"
    r"|'NoneType' |has no (attribute|len\(\))|object is not|not subscriptable|to unpack|unpack "
    r"|unsupported operand|not supported between|positional argument|interpreted as an integer"
    r"|index out of range|division|multiple values|item\(\) cannot|maximum recursion|unhashable"
    r"|must be real number|expected str|not iterable"
)
NO_MEMORY = re.compile(r"allocate|out of memory|cannot be addressed|overflow|maximum (size|numel)")
# Of operations that torch.nn's layers do not do either.
OF_TORCH = re.compile(
    r"^Inference tensors cannot be saved for backward"
    r"|^INDICES element is out of DATA bounds"
    r"|^Internal error: NestedTensorImpl doesn.t support strides"
    r"|^Trying to create tensor with negative dimension"
    r"|^Expected sequence length to be larger than 0 in RNN$"
)


def unclear(error: BaseException, names: set[str], by_torch: BaseException | None) -> str | None:
    """Why an error is no clear one; None where it is.

    Arguments:
        names: of the arguments of the call; a clear message has one of them.
        by_torch: the error of torch.nn in the same call, whose words are right.
    """
    message = str(error)
    if by_torch is not None and type(error) is type(by_torch) and message == str(by_torch):
        return None
    if type(error) is MemoryError and not message:  # Python's own, of a list beyond all memory
        return None
    if isinstance(error, (MemoryError, RuntimeError)) and NO_MEMORY.search(message):
        return None
    if OF_TORCH.search(message):
        return None
    if isinstance(error, IndexError) and message.startswith("rows: "):
        return None
    if not isinstance(error, (*CLEAR, BufferError)):
        return f"a {type(error).__name__}"
    if not message.strip():
        return "an empty message"
    if found := UNCLEAR.search(message):
        return f"an unclear message ({found[0]!r})"
    if not any(re.search(rf"\b{re.escape(name)}", message) for name in names):
        return "a message that names no argument"
    return None


TOLERANCE = {torch.float64: 1e-7, torch.complex64: 1e-3, torch.float32: 1e-3}


def differ(ours: Any, expected: Any, at: str = "result") -> str | None:
    """Where two results differ; None where they are close."""
    if isinstance(expected, (tuple, list)):
        if not isinstance(ours, (tuple, list)) or len(ours) != len(expected):
            return f"{at} is no tuple of {len(expected)}"
        pairs = enumerate(zip(ours, expected, strict=True))
        found = (differ(x, y, f"{at}[{i}]") for i, (x, y) in pairs)
        return next((where for where in found if where), None)
    if not isinstance(expected, torch.Tensor):
        return None if type(ours) is type(expected) else f"{at} is a {type(ours).__name__}"
    tolerance = TOLERANCE.get(expected.dtype, 0.05)
    scale = float(expected.detach().abs().max()) if expected.numel() > 0 else 0.0
    near = {"rtol": tolerance, "atol": tolerance * max(1.0, scale)}
    try:
        torch.testing.assert_close(ours, expected, **near, equal_nan=True)
    except AssertionError as error:
        return f"{at}: {' '.join(str(error).split())[:200]}"
    return None
