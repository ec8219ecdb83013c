"""Replace torch.nn's classes by fastrnn's, for packages whose source you cannot change."""

from __future__ import annotations

import copyreg
import functools
import pkgutil
import threading
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import rnn

from ..layers.cell import RecurrentCell
from ..layers.layer import RecurrentLayer
from ..layers.surface import RECOGNISED
from ..nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

if TYPE_CHECKING:
    from types import TracebackType

# fastrnn's classes by torch's names, and torch's own classes at the import of this module.
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

_HOMES = (torch.nn, torch.nn.modules, rnn)  # the modules with these names

_lock = threading.RLock()
_patched: ExitStack | None = None  # the callbacks that undo the patch, while torch is patched


class TorchPatch(AbstractContextManager[None]):
    """The context manager of `patch_torch`: leaving its ``with`` block undoes the patch."""

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
    """Bind torch.nn's names to fastrnn's classes: layers constructed from now on are fastrnn's.

    The call replaces ``RNN``, ``LSTM``, ``GRU``, ``RNNCell``, ``LSTMCell``, ``GRUCell``,
    ``RNNBase`` and ``RNNCellBase`` in ``torch.nn``, ``torch.nn.modules`` and
    ``torch.nn.modules.rnn``. Call it before you import the packages that should use fastrnn:
    classes derived from ``torch.nn.LSTM`` before the call, and names imported from torch.nn before
    the call, still refer to torch's classes. `fastrnn.convert` converts models made from these.

    While torch is patched:

    - Layers that packages construct are fastrnn's, also when a package loads its own files.
      New classes derived from ``torch.nn.LSTM`` derive from ``fastrnn.LSTM``. Its forward has its
      own checks: it does not call ``check_input``, ``permute_hidden`` and similar methods of these
      classes.
    - Models pickled as a whole with torch.nn's layers load with fastrnn's layers
      (``torch.load(file, weights_only=False)``).
    - ``isinstance(m, torch.nn.LSTM)`` is True for fastrnn's layers, and for torch's layers
      constructed earlier; the same holds for ``issubclass`` of their classes.
    - torch's layers constructed earlier work as before, and can be copied and pickled.
    - ``torch.compile(fullgraph=True)`` supports fastrnn's layers: the call sets dynamo's
      ``allow_rnn``.

    The patch affects the whole process. A second call does nothing, and one `unpatch_torch` undoes
    all calls. A block ``with patch_torch():`` undoes the patch only if its own call began it: an
    inner block, or a block in a patched process, leaves torch patched.

    Returns:
        A context manager, which you may ignore.

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
    """Undo `patch_torch`: restore torch.nn's classes. Does nothing if torch is not patched.

    Layers and classes that were created while torch was patched do not change.

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
    """Patch torch; return whether this call did so, False if torch was patched already."""
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
    """Let dynamo trace the classes that torch.nn.LSTM etc. now refer to, in every thread."""
    from torch._dynamo import config as module  # imported here, because it takes a second

    config: Any = module
    entry = config._config["allow_rnn"]
    undo.callback(setattr, entry, "default", entry.default)
    entry.default = True  # setting the public name would affect only this thread
    if not config.allow_rnn:  # the user has set it to False in this thread
        undo.callback(setattr, config, "allow_rnn", False)
        config.allow_rnn = True


# ---- pickling and copying torch's own layers --------------------------------------------------


class _Named:
    """One of torch's classes, pickled by its name, which is fastrnn's while torch is patched.

    pickle itself refuses a class whose name is bound to another class. Reading the pickle does not
    need fastrnn.
    """

    def __init__(self, cls: type[torch.nn.Module]) -> None:
        self.cls = cls

    def __reduce__(self) -> tuple[Any, ...]:
        return pkgutil.resolve_name, (f"{self.cls.__module__}:{self.cls.__qualname__}",)


class _Maker:
    """Makes an empty layer: of torch's class when copied, of the name's class when unpickled."""

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
