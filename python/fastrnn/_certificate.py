"""The certificate of a device: the results of `fastrnn certify`, and the kernels they allow.

There is one JSON file for each kind of device, in the user's cache folder or in the folder that
FASTRNN_CERTIFICATES names. It is the complete report of `fastrnn certify`::

    {"format": 1,
     "key": {"device", "capability", "driver", "cuda", "torch", "fastrnn", "kernels"},
     "classes": [{"cell", "dtype", "layers", "bidirectional", "pass", "kernels",
                  "hidden": [from, to], "rows": [from, to],
                  "trusted", "steps", "ratio", "why"}, ...],
     ...}

Every field of the key must equal that of this machine, including the hash of the compiled kernels.
A file for another device, driver, torch or fastrnn is ignored with a warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _C

if TYPE_CHECKING:
    from ._options import Options

FORMAT = 1
FOLDER_VARIABLE = "FASTRNN_CERTIFICATES"
NONE = "no certificate of this device; `fastrnn certify` makes one"
UNCERTIFIED = "the certificate of this device does not cover the case"
KERNELS = ("steps", "persistent")
DRIVER = Path("/proc/driver/nvidia/version")


class Key(NamedTuple):
    """The configuration for which a certificate is valid. None: unknown."""

    device: str  # its name
    capability: str  # "9.0"
    driver: str | None
    cuda: str | None  # torch's
    torch: str | None
    fastrnn: str
    kernels: str  # SHA-256 of the compiled module


class Trusted(NamedTuple):
    """Sizes, bounds included, for which a kind of kernels was correct and faster."""

    hidden: tuple[int, int]
    rows: tuple[int, int]
    steps: int  # the smallest T
    ratio: float  # torch's time / fastrnn's time, in the worst case
    persistent: bool


class Certificate(NamedTuple):
    """The trusted classes of one device, and the state of its certificate as text."""

    state: str
    classes: dict[tuple[str, str, bool, bool], list[Trusted]] = {}  # noqa: RUF012 - never written
    ignored: bool = False  # there is a file, but it is not valid here

    def find(
        self,
        options: Options,
        dtype: str,
        rows: int,
        hidden_size: int,
        training: bool,
        steps: int | None,
    ) -> Trusted | None:
        """The fastest trusted class that covers a call; None if there is none."""
        if not _is_certified(options):
            return None
        name = (options.cell, dtype, options.bidirectional, training)
        for found in self.classes.get(name, ()):
            (least, most), (fewest, largest) = found.hidden, found.rows
            fits = least <= hidden_size <= most and fewest <= rows <= largest
            if fits and found.steps <= (1 if steps is None else steps):
                return found
        return None


def _is_certified(options: Options) -> bool:
    """Whether `fastrnn certify` tests stacks with these options (see fastrnn.certify)."""
    return (
        options.in_torch_nn
        and options.bias
        and options.proj_size == 0
        and (options.bidirectional or options.num_layers == 1)
        and not options.recompute
    )


@lru_cache(maxsize=64)
def of_device(device: int) -> Certificate:
    """The certificate of a CUDA device, read once per process; warns if the file is not valid."""
    found = read(device)
    if found.ignored:
        warnings.warn(found.state, stacklevel=4)
    return found


def read(device: int) -> Certificate:
    """Read the certificate of a CUDA device from its file."""
    if not any(folder().glob("*.json")):  # return before the first CUDA call
        return Certificate(NONE)
    key = key_of(device)
    path = path_of(key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Certificate(NONE)
    except (OSError, ValueError) as error:
        return _ignored(path, f"it cannot be read ({error})")
    try:
        written, classes = _parse(text)
    except (KeyError, TypeError, ValueError, AttributeError):
        return _ignored(path, "it is damaged or has another format")
    for name, here, there in zip(Key._fields, key, written, strict=True):
        if here != there:
            return _ignored(path, f"it was made for {name} {there}, but this machine has {here}")
    count = sum(map(len, classes.values()))
    return Certificate(f"{path}: {count} class{'es' * (count != 1)} trusted", classes)


def _ignored(path: Path, what: str) -> Certificate:
    return Certificate(
        f"the certificate {path} is ignored: {what}; `fastrnn certify` writes a new one",
        ignored=True,
    )


def _parse(
    text: str,
) -> tuple[Key, dict[tuple[str, str, bool, bool], list[Trusted]]]:
    """The key and the trusted classes of a certificate, fastest first."""
    document = json.loads(text)
    if document["format"] != FORMAT:
        raise ValueError(document["format"])
    key = Key(**document["key"])
    classes: dict[tuple[str, str, bool, bool], list[Trusted]] = {}
    for entry in document["classes"]:
        if entry["trusted"] is not True:
            continue
        bidirectional = {True: True, False: False}[entry["bidirectional"]]
        training = ("inference", "training").index(entry["pass"]) == 1
        trusted = Trusted(
            hidden=_range(entry["hidden"]),
            rows=_range(entry["rows"]),
            steps=_integer(entry["steps"]),
            ratio=float(entry["ratio"]),
            persistent=KERNELS.index(entry["kernels"]) == 1,
        )
        name = (entry["cell"], entry["dtype"], bidirectional, training)
        classes.setdefault(name, []).append(trusted)
    for found in classes.values():
        found.sort(key=lambda trusted: -trusted.ratio)
    return key, classes


def _range(pair: list[Any]) -> tuple[int, int]:
    first, last = pair
    return _integer(first), _integer(last)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def write(document: dict[str, Any]) -> Path:
    """Write a report of `fastrnn certify` to the path where the route reads it, atomically.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = path_of(Key(**document["key"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        unfinished.write_text(json.dumps(document, indent=1), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    of_device.cache_clear()
    return path


def folder() -> Path:
    """The folder of certificates: that in FASTRNN_CERTIFICATES, else the user's cache folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("fastrnn", appauthor=False) / "certificates"


def path_of(key: Key) -> Path:
    """The path of a device's certificate, from the device's name and capability."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{key.device} sm {key.capability}".lower()).strip("-")
    return folder() / f"{words}.json"


def key_of(device: int) -> Key:
    """The key of a CUDA device of this machine.

    Raises:
        ValueError: there is no device with this index.
    """
    info = _C.cuda_info()
    if info is None or device >= len(info["devices"]):
        count = len(info["devices"]) if info else 0
        raise ValueError(f"cuda:{device}: there is no such device; CUDA finds {count}")
    known = info["devices"][device]
    torch: Any = None
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")
    return Key(
        device=known["name"],
        capability=".".join(map(str, known["capability"])),
        driver=_driver() or info["driver"],
        cuda=torch and torch.version.cuda,
        torch=torch and str(torch.__version__),
        fastrnn=importlib.import_module("fastrnn").__version__,
        kernels=_hash_of_kernels(),
    )


def _driver() -> str | None:
    """The version of Linux's kernel module, which CUDA does not report."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found and found[0]


@lru_cache(maxsize=1)
def _hash_of_kernels() -> str:
    import hashlib

    return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()
