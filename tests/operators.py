"""What the tests of the operators share."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    """``torch.library.opcheck``.

    From 2.14 on it traces copies of the arguments that are no leaves, and torch asks for their
    ``.grad``. torch keeps that warning from being shown, but not from being raised as an error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        torch.library.opcheck(operator, arguments)
