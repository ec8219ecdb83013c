"""What training draws at random inside the recurrence: recurrent dropout and zoneout.

torch draws it from the generator of the input's device, each mask at once for all layers,
directions and steps, in the order of `Extras`, before any dropout between layers. So a seed repeats
it, torch.func.vmap's ``randomness`` rules it, and torch.compile traces it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .._engine import NO_EXTRAS, Extras

if TYPE_CHECKING:
    from torch import Tensor

    from .._options import Options


def draw(options: Options, input: Tensor, rows: int, hidden_size: int, dropout: float) -> Extras:
    """The masks of one call while training; None where nothing is drawn.

    Arguments:
        options: the stack.
        input: (T, B, I), or packed (N, I): the masks go by its sizes, dtype and device.
        rows: B.
        hidden_size: H.
        dropout: the probability of recurrent dropout.
    """
    if not (dropout > 0 or options.zoneout_h > 0 or options.zoneout_c > 0):
        return NO_EXTRAS
    groups = options.num_layers * options.directions
    out, device = options.proj_size or hidden_size, input.device
    mask = None
    if dropout > 0:
        dtype = input.dtype.to_real() if input.is_complex() else input.dtype
        ones = torch.ones(groups, rows, out, dtype=dtype, device=device)
        mask = F.dropout(ones, dropout, training=True)
    keep: list[Tensor | None] = []
    for probability, units in ((options.zoneout_h, out), (options.zoneout_c, hidden_size)):
        shape = (groups, *input.shape[:-1], units)
        drawn = probability > 0
        keep.append(
            torch.rand(shape, dtype=torch.float32, device=device) < probability if drawn else None
        )
    return Extras(None, None, mask, *keep)
