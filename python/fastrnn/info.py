"""The report of `fastrnn info`: versions, CPU, CUDA, loaded libraries, routes.

It uses only the standard library and guards every probe, because a report is most useful on a
machine where something does not work.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PACKAGES = ("onnxruntime", "onnx", "rich", "matplotlib", "scikit-learn", "flashrnn")
LIBRARIES = re.compile(
    r"^(libgomp|libiomp5|libomp|libtorch|libtorch_cpu|libtorch_cuda|libc10|libmkl\w*|libopenblas\w*"
    r"|libdnnl|libcudart|libcublas|libcublasLt|libcudnn|libcuda|libonnxruntime|_C)([-.].*)?$"
)
COMPOSED = "composed torch operations"
CUDNN = "cuDNN, through torch's own operator"
CUDA_ENGINE = "engine CUDA, one launch per step"
CUDA_PERSISTENT = "engine CUDA, one launch per sequence if there is a kernel for it"


def info() -> dict[str, Any]:
    """Return everything that `fastrnn info` prints, as one dictionary that JSON can represent.

    Imports torch if it is installed. A value that cannot be determined is None.

    >>> import fastrnn
    >>> fastrnn.info()["fastrnn"] == fastrnn.__version__
    True
    """
    import platform

    engine = importlib.import_module("fastrnn._C")
    isa = _guarded(engine.isa)
    return {
        "fastrnn": _guarded(lambda: importlib.import_module("fastrnn").__version__),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "torch": _guarded(_torch),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": {
            "model": _guarded(_cpu_model),
            "cores": os.cpu_count(),
            "isa": isa,
            "isas": _guarded(engine.isas),
        },
        "threads": _guarded(engine.max_threads),
        "openmp": _guarded(engine.openmp_file) or None,
        "cuda": {
            "build": _guarded(engine.cuda_info),
            "devices": _guarded(_cuda_devices),
            "certificates": _guarded(certificates),
        },
        "libraries": _guarded(_libraries),
        "routes": {"cpu": f"engine {isa}", "cuda": _guarded(cuda_route)},
    }


def cuda_route() -> str:
    """The route of tensors on a CUDA device, and the reason, as far as it holds for all cases."""
    try:
        route = importlib.import_module("fastrnn._engine").cuda_switch()
    except ValueError as error:
        return f"none: {error}"
    if route is None:
        return f"{CUDNN}; the engine's kernels for cases that the device's certificate covers"
    name = CUDA_PERSISTENT if route.persistent else CUDA_ENGINE
    return f"{name if route.kernels else CUDNN} ({route.reason})"


def certificates() -> dict[str, str]:
    """The state of the certificate of each CUDA device, by ``cuda:N``."""
    info = importlib.import_module("fastrnn._C").cuda_info()
    read = importlib.import_module("fastrnn._certificate").read
    return {f"cuda:{n}": read(n).state for n in range(len(info["devices"] if info else ()))}


def render(known: dict[str, Any]) -> str:
    """The dictionary of `info` as lines of text."""
    torch, cpu, cuda = known["torch"], known["cpu"], known["cuda"]
    torch_line = "not installed or not importable"
    if torch is not None:
        built = f"CUDA {torch['cuda'] or 'none'}, {torch['threads']} threads"
        torch_line = f"{torch['version']} ({built})"
    packages = ", ".join(f"{n} {v}" for n, v in known["packages"].items() if v) or "none"
    lines = {
        "fastrnn": known["fastrnn"],
        "python": f"{known['python']}, {known['platform']}",
        "numpy": known["numpy"],
        "torch": torch_line,
        "packages": packages,
        "cpu": f"{cpu['model']}, {cpu['cores']} cores",
        "isa": f"{cpu['isa']} of {', '.join(cpu['isas'] or [])} (FASTRNN_ISA chooses)",
        "threads": known["threads"],
        "openmp": known["openmp"] or "no runtime found: the engine runs on one thread",
        "cuda build": _cuda_build(cuda["build"]),
        "cuda devices": ", ".join(cuda["devices"] or []) or "none",
        "certificates": _pairs(cuda["certificates"]) or "none: there is no CUDA device",
        "cpu tensors": known["routes"]["cpu"],
        "cuda tensors": known["routes"]["cuda"],
    }
    text = [f"{name:<13} {value}" for name, value in lines.items()]
    libraries = known["libraries"]
    text.append("libraries     " + ("cannot be listed here" if libraries is None else "loaded:"))
    text += [f"  {name:<24} {path}" for name, path in sorted((libraries or {}).items())]
    return "\n".join(text)


def _cuda_build(build: dict[str, Any] | None) -> str:
    """The versions of a build with CUDA kernels, and the GPUs that it finds."""
    if build is None:
        return "none"
    versions = [f"{name} {build[name]}" for name in ("build", "runtime", "driver") if build[name]]
    devices = build["devices"]
    if not devices:
        return f"{', '.join(versions)}: no GPU found ({build['error']})"
    library = [build["cublaslt"]] if build["cublaslt"] else []
    return f"{', '.join([*versions, *library])}: {len(devices)} GPU{'s' * (len(devices) > 1)} found"


def _guarded(probe: Callable[[], T]) -> T | None:
    """The probe's result, or None if it raises any exception."""
    try:
        return probe()
    except Exception:  # one failing probe must not end the report
        return None


def _version(distribution: str) -> str | None:
    from importlib import metadata

    return _guarded(lambda: metadata.version(distribution))


def _torch() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _cuda_devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    torch = importlib.import_module("torch")
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        import subprocess

        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _libraries() -> dict[str, str]:
    """The relevant shared libraries that this process has loaded, by file name.

    Several packages have a module `_C`, so its key includes the folder.
    """
    loaded = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        path = Path(fields[5] if len(fields) == 6 else "")
        if LIBRARIES.match(path.name):
            module = path.name.startswith("_C.")
            loaded["/".join(path.parts[-2:]) if module else path.name] = str(path)
    return loaded


def _pairs(known: dict[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (known or {}).items())
