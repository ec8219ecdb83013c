"""``fastrnn certify``: find the CUDA kernels that are correct and faster than torch's.

The run compares fastrnn's kernels with torch's layers, in a separate process with a watchdog
(watch.py). A kernel that hangs, crashes or makes the device unusable is therefore one line of the
report and does not end the run. A *class* (plan.py) is a cell, a precision, a stack, a pass, a kind
of kernels, and a range of H and of B. It is trusted if every case of the class was

- correct: outputs, final states and all gradients agree with torch's, within the tolerances of
  ``fastrnn bench``;
- repeatable: the same bits before and after the timed calls;
- faster than torch's by `judge.MARGIN`, by the medians of interleaved runs.

The report, with the trusted classes, is the certificate that the route reads (_certificate.py).

Everything that is trusted was run, or follows from cases that were run:

- *H and B*: the cases are the corners of the ranges, and one case in the middle with odd sizes,
  because the corners have sizes that suit tensor cores. Sizes outside the ranges are not trusted.
- *T*: the model of a call's time is a constant plus a time per step. Two lengths, T = 1 and a long
  one, determine both, for fastrnn and for torch, and so the number of steps from which on fastrnn
  is faster.
- *stacks*: one layer in one direction; and two layers in both directions, which represents any
  number of layers, because in every library each layer must wait for the whole layer below. A
  stack in one direction is never trusted: cuDNN may overlap its layers, so its time does not follow
  from the time of one layer.
- *lengths and resets*: one case each for every cell, precision, stack, pass and kind, compared with
  the default route without fastrnn's kernels. If it fails, none of the sizes is trusted.
- *input size, bias*: the input size equals the hidden size, with biases. Layers without biases,
  projections, heads and options that torch.nn does not have are never trusted. For the RNN the odd
  case uses relu, the other cases tanh.

After a class is rejected, its remaining cases do not run. A class that the time limit interrupts is
not trusted. The order of `plan.Grid` puts the most common classes first.
"""

from __future__ import annotations

from fastrnn.certify.judge import CertifyError, run
from fastrnn.certify.plan import QUICK, WHOLE, Grid, plan

__all__ = ["QUICK", "WHOLE", "CertifyError", "Grid", "plan", "run"]
