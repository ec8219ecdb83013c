"""Recurrent layers as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._recurrent import States, recurrent

_TORCH_NAMES = ("States", "recurrent")  # imported, torch with them, when first used


def __getattr__(name: str) -> Any:
    if name not in _TORCH_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _recurrent

    value = globals()[name] = getattr(_recurrent, name)
    return value
