"""Putting our classes in the place of torch.nn's, for packages whose source nobody changes."""

from __future__ import annotations

import copyreg
import functools
import pkgutil
import threading
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import rnn

from ._cells import RecurrentCell
from ._layer import RecurrentLayer
from ._surface import RECOGNISED
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

if TYPE_CHECKING:
    from types import TracebackType

# Ours by torch's names, and torch's own as they were when this module was imported.
OURS: dict[str, type[torch.nn.Module]] = {
    "RNNBase": RecurrentLayer,
    "RNN": RNN,
    "LSTM": LSTM,
    "GRU": GRU,
    "RNNCellBase": RecurrentCell,
    "RNNCell": RNNCell,
    "LSTMCell": LSTMCell,
    "GRUCell": GRUCell,
}
TORCHS: dict[str, type[torch.nn.Module]] = {name: getattr(rnn, name) for name in OURS}

_HOMES = (torch.nn, torch.nn.modules, rnn)  # where torch keeps the names

_lock = threading.RLock()
_patched: ExitStack | None = None  # what puts back, while torch is patched


class TorchPatch(AbstractContextManager[None]):
    """What `patch_torch` returns: leaving its ``with`` block ends what the call began."""

    def __init__(self) -> None:
        self._began = _patch()

    def __enter__(self) -> None:
        self._began = _patch() or self._began

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._began:
            self._began = False
            unpatch_torch()


def patch_torch() -> TorchPatch:
    """Bind torch.nn's names to fastrnn's classes: every layer made from now on is fastrnn's.

    ``RNN``, ``LSTM``, ``GRU``, ``RNNCell``, ``LSTMCell``, ``GRUCell``, ``RNNBase`` and
    ``RNNCellBase`` are replaced in ``torch.nn``, ``torch.nn.modules`` and
    ``torch.nn.modules.rnn``. Call it before importing the packages that it shall reach: a class
    that was derived from ``torch.nn.LSTM``, or a name that was imported from torch.nn, is from
    before and stays torch's; `fastrnn.convert` changes models made of these.

    While torch is patched:

    - Layers constructed inside packages are fastrnn's, also those that a package constructs when it
      loads its own files, and classes derived from ``torch.nn.LSTM`` derive from ``fastrnn.LSTM``.
      Its forward checks by itself: it does not call their ``check_input``, ``permute_hidden`` and
      the like.
    - Whole models that torch.nn's layers were pickled in are loaded with fastrnn's layers
      (``torch.load(file, weights_only=False)``).
    - ``isinstance(m, torch.nn.LSTM)`` is True for fastrnn's layers, and for those that torch made
      before; so is ``issubclass`` for their classes.
    - torch's layers made before work, and are copied and pickled, as always.
    - ``torch.compile(fullgraph=True)`` takes fastrnn's layers: dynamo's ``allow_rnn`` is set.

    The effect is on the whole process. A second call does nothing, and one `unpatch_torch` ends
    all. As a context manager, ``with patch_torch():``, the block ends what its own call began: an
    inner block, or a block in a patched process, leaves torch patched.

    Returns:
        A context manager. Nobody needs to keep it.

    >>> import fastrnn, torch
    >>> with fastrnn.patch_torch():
    ...     layer = torch.nn.LSTM(3, 4)
    ...     isinstance(layer, torch.nn.LSTM)
    True
    >>> type(layer).__module__, isinstance(layer, torch.nn.LSTM)
    ('fastrnn.nn', False)
    """
    return TorchPatch()


def unpatch_torch() -> None:
    """Put back what `patch_torch` replaced; without a `patch_torch` before, do nothing.

    Layers and classes that were made meanwhile stay as they are.

    >>> import fastrnn, torch
    >>> _ = fastrnn.patch_torch()
    >>> fastrnn.unpatch_torch()
    >>> torch.nn.LSTM.__module__
    'torch.nn.modules.rnn'
    """
    global _patched
    with _lock:
        if _patched is not None:
            undo, _patched = _patched, None
            undo.close()


def _patch() -> bool:
    """Whether torch was not patched before this call."""
    global _patched
    with _lock, ExitStack() as undo:
        if _patched is not None:
            return False
        _allow_rnn(undo)
        for name, ours in OURS.items():
            RECOGNISED[ours] = TORCHS[name]
            undo.callback(RECOGNISED.pop, ours)
            if TORCHS[name] not in copyreg.dispatch_table:
                copyreg.dispatch_table[TORCHS[name]] = _reduce
                undo.callback(copyreg.dispatch_table.pop, TORCHS[name], None)
            for home in _HOMES:
                undo.callback(setattr, home, name, getattr(home, name))
                setattr(home, name, ours)
        _patched = undo.pop_all()
        return True


def _allow_rnn(undo: ExitStack) -> None:
    """Let dynamo trace what torch.nn.LSTM and the like name, in every thread."""
    from torch._dynamo import config as module  # here, as its import takes a second

    config: Any = module
    entry = config._config["allow_rnn"]
    undo.callback(setattr, entry, "default", entry.default)
    entry.default = True  # what is set by the public name holds in one thread alone
    if not config.allow_rnn:  # the user set it in this one
        undo.callback(setattr, config, "allow_rnn", False)
        config.allow_rnn = True


# ---- pickling and copying torch's own layers --------------------------------------------------


class _Named:
    """One of torch's classes, pickled by its name alone, which is ours while torch is patched.

    pickle itself refuses a class whose name is bound to another. What is written needs no fastrnn
    to be read.
    """

    def __init__(self, cls: type[torch.nn.Module]) -> None:
        self.cls = cls

    def __reduce__(self) -> tuple[Any, ...]:
        return pkgutil.resolve_name, (f"{self.cls.__module__}:{self.cls.__qualname__}",)


class _Maker:
    """Makes an empty layer, when copied one of torch's, when unpickled one of the class's name."""

    def __init__(self, cls: type[torch.nn.Module]) -> None:
        self.cls = cls

    def __call__(self) -> torch.nn.Module:
        return self.cls.__new__(self.cls)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (copyreg._reconstructor, _Named(self.cls), object, None)  # type: ignore[attr-defined]
        return functools.partial, arguments


def _reduce(layer: torch.nn.Module) -> tuple[Any, ...]:
    reduced: Any = object.__reduce_ex__(layer, 2)
    return _Maker(type(layer)), (), *reduced[2:]
