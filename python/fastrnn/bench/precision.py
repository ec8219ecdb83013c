"""How a CUDA device may multiply float32: the switch between IEEE products and TF32's.

torch lets cuDNN's recurrent layers use TF32 unless it is told not to, and its matrix products only
if it is told to. Here both follow the case: `Case.tf32`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """TF32 as asked, and cuDNN free to try its algorithms; as it was, afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic}
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        with cudnn.flags(benchmark=True, allow_tf32=tf32, **kept):
            yield
    finally:
        matmul.allow_tf32 = before
