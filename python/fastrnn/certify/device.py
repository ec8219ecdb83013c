"""The interface to a device that certify needs, and its implementation for CUDA.

Tests on machines without a GPU replace it by a device whose CUDA is virtual
(tests/virtual_certify.py).
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from fastrnn import _C, _certificate
from fastrnn._engine import CUDA_SWITCH, built_with_cuda
from fastrnn.bench.data import make_data
from fastrnn.bench.providers import Fastrnn, Torch
from fastrnn.bench.timing import CudaClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastrnn.bench.cases import Case, Pass
    from fastrnn.bench.prepare import Prepared
    from fastrnn.bench.timing import Clock

SWITCH_OF = {"steps": "1", "persistent": "persistent"}


class RefusedError(Exception):
    """There is nothing to certify on this machine; the message says why and what to do."""


class Pair(NamedTuple):
    """One case, prepared with fastrnn's kernels and without them."""

    ours: Prepared
    theirs: Prepared
    inputs: int  # the number of inputs of each


class Device(Protocol):
    clock: Clock

    def key(self) -> _certificate.Key:
        """The key of the certificate."""

    def prepare(self, case: Case, pass_: Pass, kernels: str) -> Pair:
        """A case ready to run, with ``kernels`` from `_certificate.KERNELS`."""

    def is_sound(self) -> bool:
        """Whether the device still gives meaningful results."""


class Cuda:
    """A CUDA device, through torch."""

    def __init__(self, name: str) -> None:
        if not built_with_cuda():
            raise RefusedError(
                "this build of fastrnn has no CUDA kernels to certify; build it with nvcc "
                "installed, see docs/installation.md"
            )
        device = torch.device(name)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            known = _C.cuda_info()
            why = known["error"] if known is not None and known["error"] else f"there are {count}"
            raise RefusedError(
                f"--device {name}: torch {torch.__version__} sees no such CUDA device ({why}); "
                "a GPU, its driver and a torch built for CUDA are needed"
            )
        self.number = device.index or 0
        torch.cuda.set_device(self.number)
        self.clock: Clock = CudaClock()

    def key(self) -> _certificate.Key:
        return _certificate.key_of(self.number)

    def prepare(self, case: Case, pass_: Pass, kernels: str) -> Pair:
        data = make_data(case, f"cuda:{self.number}")

        def ours(switch: str) -> Prepared:
            return switched(switch, lambda: Fastrnn().prepare(case, data, pass_))

        # torch.nn has no lengths and resets: compare with fastrnn's default route there.
        theirs = ours("0") if case.options else Torch().prepare(case, data, pass_)
        return Pair(ours(SWITCH_OF[kernels]), theirs, len(data.inputs))

    def is_sound(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # a sticky error, which every later call would raise again
            return False
        return True


def switched(value: str, prepare: Callable[[], Prepared]) -> Prepared:
    """Prepare with FASTRNN_CUDA_KERNELS set to ``value``, and set it in every run as well."""
    with _switch(value):
        prepared = prepare()

    def results() -> dict[str, torch.Tensor]:
        with _switch(value):
            return prepared.results()

    @contextmanager
    def context() -> Iterator[None]:
        with _switch(value), prepared.context():
            yield

    return replace(prepared, results=results, context=context)


@contextmanager
def _switch(value: str) -> Iterator[None]:
    before = os.environ.get(CUDA_SWITCH)
    os.environ[CUDA_SWITCH] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[CUDA_SWITCH]
        else:
            os.environ[CUDA_SWITCH] = before
