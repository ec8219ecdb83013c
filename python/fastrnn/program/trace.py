"""Traces a step written in torch into a program.

The step runs once on stand-ins (`Traced`) for the carry and x. Each of its calls also runs on
torch's meta tensors under a dispatch mode, which decomposes it into ATen operations; aten.py lowers
each of them. Torch computes what the step derives from weights alone, with its gradient; like every
tensor that the step closes over, the result is an input of the program.

make_fx with functional_call would need the names of all parameters, and guards on everything else
that the step reads; replay.py detects every change.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .aten_sums import OPERATIONS
from .ir import Arg, Graph, Product
from .lowering import ROW, Lowering, Unknown, View, addresses
from .recording import (
    Call,
    Captured,
    Leaf,
    Recording,
    all_alike,
    contiguous_strides,
    dense_strides,
    is_dense,
)
from .replay import Generators, holds, normal_mode
from .stand_ins import (
    FILLED,
    READS,
    Session,
    Traced,
    Untraceable,
    name_of,
    new_meta,
    on_meta,
    plain,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager


class _Watch(TorchFunctionMode):
    """Collects the tensors that a step fills with one number."""

    def __init__(self, session: _First) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in FILLED and type(out) is not Traced:
            self.session.uniform[id(out)] = out
        return out


# Arguments that do not change values.
_OF_A_NEW_TENSOR = frozenset({"dtype", "layout", "device", "pin_memory", "memory_format"})


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lowers each ATen operation on meta tensors."""

    def __init__(self, session: _First) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        session = self.session
        in_place = func._schema.is_mutable
        if in_place:
            packet, _, overload = name.rpartition(".")
            if not packet.endswith("_") or not session.may_change(args[0]):
                raise Unknown(f"{name} changes a tensor that is not the step's own in place")
            name = f"{packet[:-1]}.{overload}"
        function = OPERATIONS.get(name)
        if function is None:
            raise Unknown(name)
        outputs = func(*args, **kwargs)
        given = {k: v for k, v in kwargs.items() if k not in _OF_A_NEW_TENSOR}
        try:
            views = function(
                session.lowering,
                *[session.lowered(a) for a in args],
                **{k: session.lowered(v) for k, v in given.items()},
            )
        except Unknown as error:
            raise Unknown(f"{name}, which {error}") from None
        session.note(outputs, views, name, in_place)
        return outputs


class _First(Session):
    """The run that makes the program."""

    def __init__(self, rows: int, batch: int | None, dtype: torch.dtype) -> None:
        super().__init__(batch)
        self.rows, self.dtype = rows, dtype
        self.lowering = Lowering(rows)
        self.recording = Recording(rows, [])
        self.views: dict[int, tuple[View, Tensor]] = {}  # by id of a meta tensor; keeps it alive
        self.metas: list[Tensor] = []  # by slot
        self.owners: dict[int, list[int]] = {}  # by memory of results, the ids of its tensors
        self.uniform: dict[int, Tensor] = {}  # tensors that were filled with one number
        self.changed: set[int] = set()  # ids of tensors changed in place through a view
        self.foreign: set[int] = set()  # memory that the step must not change
        self.numbers = 0

    # ---- stand-ins --------------------------------------------------------------------------

    def stand_in(self, op: str, index: int, leaf: Leaf) -> Traced:
        shape, dtype, rowed = leaf
        if dtype is not self.dtype and dtype is not torch.bool:
            raise self.failed(Untraceable(f"{op} of {dtype}"))
        full = (self.rows, *shape) if rowed else shape
        view = self.lowering.input(op, index, full, rowed, dtype is torch.bool)
        return self._traced(self._meta(view, full, contiguous_strides(full), dtype), view)

    def _meta(
        self, view: View, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """A meta tensor for a view, which the step must not change in place."""
        meta = new_meta(shape, strides, dtype)
        self.foreign.add(meta.untyped_storage()._cdata)
        self.views[id(meta)] = (view, meta)
        return meta

    def _traced(self, meta: Tensor, view: View) -> Traced:
        self.views[id(meta)] = (view, meta)
        traced = Traced.make(meta, view, self.numbers)
        self.numbers += 1
        return traced

    # ---- tensors that the step closes over --------------------------------------------------

    def _slot(self, tensor: Tensor) -> int:
        slot = self.slots.get(id(tensor))
        if slot is None:
            slot = self.slots[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self._capture(tensor)
        return slot

    def _capture(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            raise self.refused(f"a tensor on {tensor.device}, of layout {tensor.layout}")
        if tensor.dtype.is_complex or (
            # A 0-D tensor is promoted to the dtype of the others.
            tensor.dtype.is_floating_point and tensor.dtype is not self.dtype and tensor.dim() > 0
        ):
            raise self.refused(f"a tensor of {tensor.dtype} where the step is of {self.dtype}")
        slot, shape, strides = len(self.metas), tuple(tensor.shape), dense_strides(tensor)
        is_bool, is_dense = tensor.dtype is torch.bool, strides == tensor.stride()
        is_parameter = type(tensor) is Parameter
        captured = Captured(shape, tensor.stride(), tensor.dtype, is_dense, is_parameter, "shared")
        if self._made_here(tensor):
            captured.kind, first = "alike", (1, *shape[1:])
            view = self.lowering.shared(slot, first, contiguous_strides(first), is_bool)
            view = view.viewed(np.broadcast_to(view.index, shape))
        else:
            view = self.lowering.shared(slot, shape, strides, is_bool)
        self.recording.captured.append(captured)
        self.metas.append(self._meta(view, shape, strides, tensor.dtype))

    def _made_here(self, tensor: Tensor) -> bool:
        """Whether the step created it with equal rows, as with torch.zeros(x.shape[0], …)."""
        if self.batch is None or tensor.dim() == 0 or tensor.shape[0] != self.rows:
            return False
        if id(tensor) in self.uniform:
            return True
        return torch._C._len_torch_dispatch_stack() == 0 and all_alike(tensor)

    def _per_row(self, slots: Sequence[int]) -> bool:
        """Makes the first axis of these captured tensors the rows, if it can be; whether it did."""
        changed = False
        for slot in slots:
            captured = self.recording.captured[slot]
            if captured.kind != "shared" or not captured.shape or captured.shape[0] != self.batch:
                continue
            if self._was_used(slot):  # as shared by all rows
                continue
            captured.kind, captured.shape = "fixed", captured.shape[1:]
            full = (self.rows, *captured.shape)
            view = self.lowering.input("fixed", slot, full, True, captured.dtype is torch.bool)
            self.metas[slot] = self._meta(view, full, contiguous_strides(full), captured.dtype)
            changed = True
        return changed

    def _was_used(self, slot: int) -> bool:
        value = self.views[id(self.metas[slot])][0].value
        return any(
            value in [a.value for a in node.args]
            or (isinstance(node.info, Product) and node.info.weight == value)
            for node in self.lowering.graph.nodes
        )

    # ---- calls --------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = Call(func, torch.is_grad_enabled(), self.key(args, kwargs))
        call.simple = None if kwargs else self._simple(args)
        self.recording.calls.append(call)
        if func in READS:
            raise self.refused(READS[func])
        try:
            call.outputs = self._outputs(call, func, args, kwargs)
        except Unknown as error:
            raise self.refused(str(error)) from None
        except NotImplementedError as error:
            raise self.refused(f"{name_of(func)}: {str(error).splitlines()[0]}") from None
        return call.outputs

    def _outputs(self, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            outputs = on_meta(self, func, args, kwargs)
        except (Unknown, Untraceable):
            raise
        except Exception:
            # The first axis of a captured tensor may be the rows.
            if self.batch is None or not self._per_row(self._slots_of(call.key)):
                raise
            outputs = on_meta(self, func, args, kwargs)
        return self._wrapped(outputs, self.grad and not torch.is_grad_enabled())

    def _slots_of(self, key: Any) -> list[int]:
        if isinstance(key, tuple):
            if len(key) == 2 and key[0] == "&":
                return [key[1]]
            return [slot for part in key for slot in self._slots_of(part)]
        return []

    def watched(self) -> AbstractContextManager[Any]:
        return _Dispatch(self)

    def meta(self, tensor: Tensor) -> Tensor:
        return self.metas[self.slots[id(tensor)]]

    def _wrapped(self, value: Any, stopped: bool) -> Any:
        if isinstance(value, Tensor):
            view, _ = self.views[id(value)]
            if stopped:
                view = self.lowering.stop(view)
                with _disable_current_modes():
                    value = value.detach()  # another tensor in the same memory
                self.owners.setdefault(value.untyped_storage()._cdata, []).append(id(value))
            return self._traced(value, view)
        if isinstance(value, (list, tuple)):
            return type(value)([self._wrapped(v, stopped) for v in value])
        return value

    def lowered(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self.views.get(id(value))
            if known is None:
                raise Unknown("uses a tensor of unknown origin")
            if id(value) in self.changed:
                raise Unknown("uses a tensor that was changed in place through a view")
            return known[0]
        if isinstance(value, (list, tuple)):
            return [self.lowered(v) for v in value]
        return value

    def may_change(self, tensor: Tensor) -> bool:
        """Whether the step may change it in place; invalidates tensors that share its memory."""
        memory = tensor.untyped_storage()._cdata
        if memory in self.foreign or memory not in self.owners:
            return False
        places = _places(tensor)
        for other in self.owners[memory]:
            if other != id(tensor) and np.isin(_places(self.views[other][1]), places).any():
                self.changed.add(other)
        return True

    def note(self, outputs: Any, views: Any, name: str, in_place: bool = False) -> None:
        """Stores the views of the results of an ATen operation."""
        if isinstance(outputs, Tensor):
            outputs, views = [outputs], [views]
        for tensor, view in zip(outputs, views, strict=True):
            if view is None or not isinstance(tensor, Tensor):
                continue
            if tensor.dtype is not torch.bool and tensor.dtype is not self.dtype:
                raise Unknown(f"{name} gives {tensor.dtype} where the step is of {self.dtype}")
            if tuple(tensor.shape) != view.index.shape:
                raise Unknown(f"{name} gives shape {tuple(tensor.shape)}")
            if tensor.dtype is torch.bool and not view.is_bool:  # such as x.bool(), or True + True
                view = self.lowering.pointwise("ne", view, 0, is_bool=True)
            elif view.is_bool and tensor.dtype is not torch.bool:
                view = View(view.value, view.index, view.rows)
            self.views[id(tensor)] = (view, tensor)
            if not in_place:
                self.owners.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))

    # ---- what the step returns ------------------------------------------------------------------

    def finish(self, nexts: Sequence[Any], ys: Sequence[Any], carry: Sequence[Leaf]) -> None:
        low, recording = self.lowering, self.recording
        graph = low.graph
        for k, (value, leaf) in enumerate(zip(nexts, carry, strict=True)):
            graph.nexts[k] = self._output(value, f"state {k}", leaf)
        for i, value in enumerate(ys):
            if value is None:
                continue
            graph.ys[i] = self._output(value, f"y {i}", None)
            view = self._in_rows(value)
            shape = tuple(value.shape[1:] if view.rows else value.shape)
            graph.widths[i] = math.prod(shape)
            recording.y_shapes[i] = shape
            if view.is_bool:
                recording.y_bool |= {i}
            if self.batch is not None and not view.rows:
                recording.alike_y |= {i}
        recording.structure = (self._key(list(nexts)), self._key(list(ys)))
        recording.nodes = graph.nodes
        recording.only_parameters = all(c.is_parameter for c in recording.captured)
        recording.graph = compacted(graph, low.takes, recording)

    def _output(self, value: Any, name: str, leaf: Leaf | None) -> Arg:
        if not isinstance(value, Tensor):
            raise Untraceable(f"{name}, which is not a tensor")
        if value.dtype is not self.dtype and value.dtype is not torch.bool:
            raise Untraceable(f"{name} of {value.dtype} where the step is of {self.dtype}")
        view = self._in_rows(value)
        low = self.lowering
        if leaf is not None:
            full = (self.rows, *leaf.shape) if leaf.rowed else leaf.shape
            fits = tuple(value.shape) == tuple(full) and value.dtype is leaf.dtype
            if not fits or leaf.rowed is not (view.rows and self.batch is not None):
                raise Untraceable(f"{name}, which has another shape or dtype after the step")
        columns, places, rows = low._by_rows([view.index], [view])
        width = columns[0].size
        if rows:
            standard = np.arange(self.rows)[:, None] * ROW + np.arange(width)
            if value.shape[0] != self.rows or not (places.reshape(self.rows, -1) == standard).all():
                raise Untraceable(f"{name}, whose first axis is not the rows")
        elif width != view.index.size:
            raise Untraceable(f"{name}, whose rows are not on its first axis")
        return low._vector(view, columns[0])

    def _in_rows(self, value: Tensor) -> View:
        """The view of a result; equal rows, such as those computed from weights, become rows."""
        if type(value) is not Traced:
            self._slot(value)
        view = self.views[id(plain(self, value))][0]
        index = view.index
        if view.rows or self.batch is None or index.shape[:1] != (self.rows,):
            return view
        if not (index == index[:1]).all():
            return view
        rows = np.arange(self.rows).reshape(-1, *(1,) * (index.ndim - 1))
        return View(view.value, index + rows * ROW, True, view.is_bool)


def _places(tensor: Tensor) -> Any:
    return addresses(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def compacted(graph: Graph, takes: Sequence[Any], recording: Recording) -> Graph:
    """The used part of a program, with consecutive numbers of shared and fixed inputs."""
    out = Graph()
    renamed: dict[int, int] = {}
    kept = {
        k
        for k, a in graph.nexts.items()
        if graph.nodes[a.value].op == "carry" and graph.nodes[a.value].info == k and a.offset == 0
    }
    nexts = {k: a for k, a in graph.nexts.items() if k not in kept}
    used = graph.used([a.value for a in (*nexts.values(), *graph.ys.values())])
    for i, node in enumerate(graph.nodes):
        if i not in used:
            continue
        args = tuple(a._replace(value=renamed[a.value]) for a in node.args)
        op, info = node.op, node.info
        if isinstance(info, Product):
            info = info._replace(weight=renamed[info.weight])
        elif op == "shared":
            assert isinstance(info, int)
            slot, elements = (info, None) if info >= 0 else takes[-1 - info]
            taken = None if elements is None else _logical(elements, recording.captured[slot])
            recording.shared.append((slot, taken))
            info = len(recording.shared) - 1
        elif op == "fixed" or (op == "carry" and info in kept):
            recording.fixed.append(("captured" if op == "fixed" else "carry", info))  # type: ignore[arg-type]
            op, info = "fixed", len(recording.fixed) - 1
        renamed[i] = out.add(op, args, node.width, info)
    out.nexts = {k: a._replace(value=renamed[a.value]) for k, a in nexts.items()}
    out.ys = {i: a._replace(value=renamed[a.value]) for i, a in graph.ys.items()}
    out.widths = dict(graph.widths)
    recording.kept = frozenset(kept)
    return out


def _logical(elements: Sequence[int], captured: Captured) -> Tensor:
    """Positions in memory as positions in the order of the tensor's axes."""
    shape = (1, *captured.shape[1:]) if captured.kind == "alike" else captured.shape
    strides = contiguous_strides(shape)
    if captured.kind == "shared" and is_dense(shape, captured.strides):
        strides = captured.strides
    places = addresses(shape, strides).reshape(-1)
    order = np.empty(places.size, np.int64)
    order[places] = np.arange(places.size)
    return torch.from_numpy(order[np.asarray(elements, np.int64)])


# Numbers of rows of the stand-ins. Two runs must give one program, or it depends on the number.
_ROWS = (13, 17, 19, 23, 29, 31, 37, 41)


def record(
    step: Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]],
    carry: Sequence[Leaf],
    xs: Sequence[Leaf],
    batch: int | None,
    dtype: torch.dtype,
) -> tuple[Recording, list[Tensor]]:
    """The recording of a step over flat lists of leaves, and the tensors that it closes over."""
    sizes = {s for leaf in (*carry, *xs) for s in leaf.shape}
    if type(batch) is int:
        sizes.add(batch)
    while True:
        rows = [r for r in _ROWS if r not in sizes][:2] if batch is not None else [1]
        runs = [_record(step, carry, xs, batch, dtype, r) for r in rows]
        (first, tensors), (second, others) = runs[0], runs[-1]
        if first.graph is None or _text(first) == _text(second):
            break
        # A weight may have as many rows as the stand-ins: try other numbers.
        both = {s for t in tensors for s in t.shape} & {s for t in others for s in t.shape}
        if both & set(rows) and len({*_ROWS} - sizes - both) >= 2:
            sizes |= both
            continue
        first.graph = None
        first.reason = second.reason or "a number that depends on the size of the batch"
        break
    if first.graph is not None and not holds(first, step, len(carry), batch):
        first.graph, first.only = None, batch
        first.reason = f"what depends on the size of the batch, here {batch}"
    return first, tensors


def _text(recording: Recording) -> str | None:
    return None if recording.graph is None else recording.graph.text()


def _record(
    step: Any,
    carry: Sequence[Leaf],
    xs: Sequence[Leaf],
    batch: int | None,
    dtype: torch.dtype,
    rows: int,
) -> tuple[Recording, list[Tensor]]:
    session = _First(rows, batch, dtype)
    recording = session.recording
    generators = Generators(every=True)
    try:
        with normal_mode(), session:
            given_carry = [session.stand_in("carry", i, leaf) for i, leaf in enumerate(carry)]
            given_x = [session.stand_in("x", i, leaf) for i, leaf in enumerate(xs)]
            recording.inputs = [*given_carry, *given_x]
            with _Watch(session):
                nexts, ys = session.step(step, given_carry, given_x)
            if session.failure is None:
                session.finish(nexts, ys, carry)
    except (Untraceable, Unknown) as error:
        session.failed(error)
    except Exception as error:  # the loop will raise it again
        session.failed(Untraceable(f"it: {type(error).__name__}: {error}"))
    finally:
        if generators.restore():
            session.failed(Untraceable("random numbers inside the step"))
    if session.failure is not None:
        recording.graph, recording.reason = None, str(session.failure)
    return recording, session.tensors
