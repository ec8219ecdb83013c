"""``fastrnn certify``: what of the CUDA kernels is right and faster than torch's, on this machine.

Our kernels run against torch's layers, in a process of its own under a watchdog (watch.py), so that
a kernel that hangs, crashes or spoils the device is a line of the report and not a lost session.
A *class* (plan.py) is a cell, a precision, a stack, a pass, a kind of kernels, and a range of H and
of B. It is trusted if every one of its cases was

- right: outputs, final states and all gradients as torch's, within the tolerances of
  ``fastrnn bench``;
- repeatable: the same bits before and after all that was timed;
- faster by `judge.MARGIN` than torch's, interleaved with it, by medians.

The report, with the trusted classes, is the certificate that the route reads (_certificate.py).

What is trusted must have been run, or follow from what was run:

- *H and B*: the cases are the corners of the ranges, and one in the middle whose sizes are odd, for
  the corners are the sizes that suit tensor cores. Below and above the ranges nothing is trusted.
- *T*: a call takes a constant and a time for each step. Two lengths, T = 1 and a long one, give
  both, of ours and of torch's, and so the number of steps from which ours is faster.
- *stacks*: one layer in one direction; and two layers in both directions, which holds for any
  number of layers, since each layer must wait for the whole one below, of whichever library. A
  stack in one direction is never trusted: cuDNN may run its layers side by side, so that its time
  does not follow from one layer's.
- *lengths and resets*: one case of each for every cell, precision, stack, pass and kind, against
  what runs without our kernels; if it fails, none of the sizes is trusted.
- *input size, bias*: the input is as wide as the layer, with biases. Layers without biases,
  projections, heads and options that torch.nn lacks are never trusted. The odd case of an RNN
  computes relu, the others tanh.

Of a class that has been refused, nothing more is run; one that time does not suffice for is not
trusted. The order of `plan.Grid` brings the most used ones first.
"""

from __future__ import annotations

from fastrnn.certify.judge import CertifyError, run
from fastrnn.certify.plan import QUICK, WHOLE, Grid, plan

__all__ = ["QUICK", "WHOLE", "CertifyError", "Grid", "plan", "run"]
