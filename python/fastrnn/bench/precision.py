"""The precision of float32 products on a CUDA device: IEEE or TF32.

By default torch allows TF32 in cuDNN's recurrent layers, and forbids it in its matrix products.
Here both follow the case: `Case.tf32`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32, enable cuDNN's benchmark mode, and restore the settings afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic}
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        with cudnn.flags(benchmark=True, allow_tf32=tf32, **kept):
            yield
    finally:
        matmul.allow_tf32 = before
