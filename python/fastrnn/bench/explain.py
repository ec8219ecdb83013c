"""Explain which kernels compute a case on this machine, and why: ``fastrnn info --explain CASE``.

It queries the engine, does not run the case, and does not need torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import TYPE_CHECKING, Any

from fastrnn import _C, _certificate, _engine
from fastrnn.bench.cases import CELLS, PRECISIONS, STEPS, Case, cell_named
from fastrnn.info import COMPOSED, CUDA_ENGINE, CUDNN

if TYPE_CHECKING:
    from fastrnn.bench.cases import Pass

FORM = "CELL,B,T,I,H, such as LSTM,64,50,512,512, or a line of `fastrnn bench --list`"
PERSISTENT = "engine CUDA, one launch per sequence"
FLAGS = {"bi": "bidirectional", "lengths": "lengths", "layernorm": "layer_norm"}
NUMBERS = {
    "T": "T", "B": "B", "I": "I", "H": "H", "L": "layers", "heads": "heads", "members": "members",
}  # fmt: skip
NONLINEARITIES = ("tanh", "relu")


def parse_case(text: str, precision: str | None = None) -> Case:
    """Parse a case: ``CELL,B,T,I,H``, or the format of `Case.label`.

    Arguments:
        text: the case.
        precision: one of `PRECISIONS`, which replaces the one in ``text``.

    Raises:
        ValueError: the text is not a case.

    >>> parse_case("GRU,64,50,256,512", "bfloat16").label()
    'GRU T50 B64 I256 H512 bfloat16'
    """
    words = text.split()
    if "," in text:
        first, *sizes = (word.strip() for word in text.split(","))
        words = [first, *(name + size for name, size in zip("BTIH", sizes, strict=False))]
        if len(sizes) != 4:
            raise ValueError(f"--explain {text!r}: expected {FORM}")
    fields: dict[str, Any] = {}
    for word in words[1:]:
        found = _field(word)
        if found is None:
            raise ValueError(f"--explain {text!r}: {word!r} is not known; expected {FORM}")
        fields |= found
    cell = cell_named(words[0]) if words else None
    if cell is None:
        known = ", ".join((*CELLS, *STEPS))
        raise ValueError(f"--explain {text!r}: expected {FORM}; CELL is one of {known}")
    missing = [name for name in "TBIH" if name not in fields]
    if missing:
        raise ValueError(f"--explain {text!r}: {', '.join(missing)} is missing; expected {FORM}")
    written = fields.pop("precision", "float32")
    return Case(cell, **fields).in_precision(precision or written)


def _field(word: str) -> dict[str, Any] | None:
    """The field of a case, or its precision, that one word of a label sets."""
    if word in FLAGS:
        return {FLAGS[word]: True}
    if word in PRECISIONS:
        return {"precision": word}
    if word in NONLINEARITIES:
        return {"nonlinearity": word}
    if number := re.fullmatch(r"(T|B|I|H|L|heads|members)([1-9]\d*)", word):
        return {NUMBERS[number[1]]: int(number[2])}
    if rate := re.fullmatch(r"reset(0?\.\d+|1|\d+e-\d+)", word):
        return {"reset_rate": float(rate[1])}
    return None


def explain(case: Case, device: str) -> dict[str, str]:
    """The output of `fastrnn info --explain`: the case, then each pass and what computes it.

    Raises:
        ValueError: the device does not support the case's precision, or FASTRNN_CUDA_KERNELS has an
            invalid value.
    """
    known = {"case": case.label(), "device": device}
    if device == "cpu" and case.tf32:
        raise ValueError("--dtype tf32 is only for CUDA devices; add --device cuda")
    if device == "cpu" or case.is_step:
        route = _of_step(case, device) if case.is_step else _on_cpu()
        return known | {"inference": route, "training": route}
    known |= {pass_: cuda_kernel(case, pass_) for pass_ in ("inference", "training")}
    known["certificate"] = _certificate_here()
    if _engine.built_with_cuda() and not _without_kernel(case) and _no_device():
        known["on an H200"] = (
            f"{_persistent(case, 'training', None)} "
            f"(by its data sheet, {_engine.CUDA_SWITCH}=persistent)"
        )
    return known


def render(known: dict[str, str]) -> str:
    """The dictionary of `explain` as lines of text."""
    return "\n".join(f"{name:<13} {value}" for name, value in known.items())


def _on_cpu() -> str:
    threads = _C.max_threads()
    if importlib.util.find_spec("torch") is not None:
        threads = importlib.import_module("torch").get_num_threads()
    return (
        f"engine {_C.isa()}, at most {threads} thread{'s' * (threads != 1)} "
        f"(of {', '.join(_C.isas())}; FASTRNN_ISA chooses)"
    )


def _of_step(case: Case, device: str) -> str:
    """How `fastrnn.Recurrent` runs a cell that is a torch module."""
    if device == "cpu" and case.dtype in ("float32", "float64"):
        return f"{_on_cpu()}, a program of fastrnn.Recurrent"
    return "a loop of torch operations, run by fastrnn.Recurrent"


def cuda_kernel(case: Case, pass_: Pass) -> str:
    """What computes a pass of the case on a CUDA device, and why.

    Raises:
        ValueError: FASTRNN_CUDA_KERNELS has an invalid value.
    """
    route = _engine.cuda_route(
        case.stack,
        case.precision,
        case.B,
        case.H,
        pass_ == "training",
        _current_device(),
        case.T,
    )
    if without := _without_kernel(case):
        return f"{COMPOSED} (no CUDA kernel has {without})"
    missing = _no_device()
    if not route.kernels:
        reason = f"no CUDA device is here: {missing}" if missing else route.reason
        return f"{_by_torch(case)} ({reason})"
    if missing:
        return f"no CUDA device is here ({missing})"
    if not route.persistent:
        return f"{CUDA_ENGINE} ({route.reason})"
    return f"{_persistent(case, pass_, _current_device())}, {route.reason}"


def _by_torch(case: Case) -> str:
    """What computes the case if the engine's kernels do not."""
    if set(case.options) - {"lengths", "resets"}:
        return COMPOSED
    if case.T >= _engine.CUDNN_STEPS:
        limit = f"cuDNN takes fewer than {_engine.CUDNN_STEPS} steps"
        return f"ATen, through torch's own operator: {limit}"
    return f"{CUDNN}, as packed episodes" if case.options else CUDNN


def _without_kernel(case: Case) -> str:
    """The options of the case without a CUDA kernel; empty if there are none."""
    missing = {
        "layer norm": case.layer_norm,
        "members": case.members > 1,
    }
    return " and ".join(name for name, is_on in missing.items() if is_on)


def _no_device() -> str:
    """Why there is no CUDA device; empty if there is one."""
    known = _C.cuda_info()
    if known is None or known["devices"]:
        return ""
    return known["error"] or "the driver reports none"


def _certificate_here() -> str:
    """The state of the current device's certificate."""
    if not _engine.built_with_cuda():
        return "none: this build has no CUDA kernels"
    if missing := _no_device():
        return f"none: no CUDA device is here ({missing})"
    return _certificate.read(_current_device()).state


def _current_device() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    torch = importlib.import_module("torch")
    return int(torch.cuda.current_device()) if torch.cuda.is_available() else 0


def _persistent(case: Case, pass_: Pass, device: int | None) -> str:
    """The kernels where persistent ones are asked for; device None: of an H200."""
    options = _engine.engine_options(case.stack)
    sizes = (case.dtype, case.T, case.B, case.I, case.H)
    found = []
    for backward in (False, True)[: 2 if pass_ == "training" else 1]:
        answer = _C.cuda_kernels(options, *sizes, backward, case.tf32, device)
        persistent, why = answer or (False, "this build has no CUDA kernels")
        found.append(f"{PERSISTENT if persistent else CUDA_ENGINE} ({why})")
    return found[0] if len(found) == 1 else f"forward {found[0]}; backward {found[1]}"
