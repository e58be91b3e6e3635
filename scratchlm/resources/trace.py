"""A training step on tensors without memory: what every operation would compute, move and keep.

The model, the loss and the optimizer are the real ones; their tensors know shape, dtype and device but hold no numbers
(`hollow_tensor`). So nothing here restates an architecture: a new choice in the model is traced like any other, and
what is counted is what a run does. Each operation is noted with its phase, its module and its FLOPs; each storage with its birth
and its death, which gives the live bytes at every moment, and the moment of the peak.

::

    operation      0   1   2   3   4   5   6   7   8   9
    phase          └─── forward ───┘   └─ backward ┘  └ optimizer
    weights        ■   ■   ■   ■   ■   ■   ■   ■   ■   ■
    activations        ■   ■■  ■■■ ■■■ ■■  ■
    gradients                              ■   ■■  ■■
                                   ▲ peak
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

import scratchlm.kernels.moe
import scratchlm.kernels.wide_product  # noqa: F401  (they register products of ours)
from scratchlm.kernels.flash_attention_op import workspace
from scratchlm.resources.hollow_tensor import Hollow, tensors_in, without_numbers
from scratchlm.resources.places import Places

Phase = Literal["setup", "forward", "backward", "optimizer"]
Kind = Literal["weights", "gradients", "optimizer state", "activations", "temporaries", "batch and tables"]


@dataclass
class Operation:
    """One call of a torch operation that is no mere view.

    Attributes:
        name: of the operation, such as ``mm``.
        phase: when.
        module: dotted path of the module that called it ("" outside of any).
        flops: of its matrix products (a multiply and an add are two); 0 for everything else.
        read, written: bytes of its arguments and of its results.
        shapes: of its tensor arguments.
        dtype: of its (first) result.
        inputs, outputs: numbers of the storages it reads and writes, for what a compiler could leave out.
    """

    name: str
    phase: Phase
    module: str
    flops: int
    read: int
    written: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / max(1, self.read + self.written)


@dataclass
class Storage:
    """One piece of memory.

    Attributes:
        size: in bytes.
        born: number of the operation that made it.
        died: number of the first operation before which it was free again; None: still there at the end.
        phase, module, maker: of its maker.
        kind: what it is.
        owner: name of the parameter it belongs to, if it does to one.
        number: its place among all storages.
    """

    size: int
    born: int
    phase: Phase
    module: str
    maker: str
    died: int | None = None
    kind: Kind = "temporaries"
    owner: str = ""
    number: int = -1

    def lives_at(self, moment: int) -> bool:
        """Whether it is there while operation `moment` runs."""
        return self.born <= moment and (self.died is None or moment < self.died)


@dataclass
class Trace:
    """What a step did: its operations in order, and all storages."""

    operations: list[Operation] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)

    def timeline(self) -> list[int]:
        """Live bytes while each operation runs."""
        change = [0] * (len(self.operations) + 1)
        for storage in self.storages:
            change[min(storage.born, len(self.operations))] += storage.size
            if storage.died is not None:
                change[min(storage.died, len(self.operations))] -= storage.size
        live, total = [], 0
        for step in change[: len(self.operations)]:
            total += step
            live.append(total)
        return live

    def timeline_by_kind(self) -> dict[str, list[int]]:
        """Live bytes of each kind while each operation runs; together they are :meth:`timeline`."""
        return {
            kind: Trace(self.operations, [s for s in self.storages if s.kind == kind]).timeline()
            for kind in get_args(Kind)
        }

    def peak(self) -> tuple[int, int]:
        """Number of the operation at which most bytes live, and these bytes."""
        live = self.timeline()
        moment = max(range(len(live)), key=live.__getitem__)
        return moment, live[moment]

    def live_by(self, moment: int, key: Callable[[Storage], str]) -> dict[str, int]:
        """Bytes alive at one moment, grouped."""
        found: dict[str, int] = defaultdict(int)
        for storage in self.storages:
            if storage.lives_at(moment):
                found[key(storage)] += storage.size
        return dict(found)

    def flops(self, phase: Phase | None = None) -> int:
        """FLOPs of all matrix products, or of those of one phase."""
        return sum(op.flops for op in self.operations if phase is None or op.phase == phase)


class Tracer(TorchDispatchMode):
    """Notes operations and storages while it is entered; see :class:`Trace`.

    Args:
        model: its modules are the places of operations.
        hollow: whether tensors made inside hold no numbers, as in :class:`scratchlm.resources.hollow_tensor.Hollow`, but sooner: one mode is asked
            about every operation in the place of two.
    """

    def __init__(self, model: nn.Module, *, hollow: bool = False) -> None:
        super().__init__()
        self.hollow = hollow
        self.trace = Trace()
        self.phase: Phase = "setup"
        self._model = model
        self._places: Places | None = None
        self._known: dict[int, Storage] = {}
        self._watchers: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Hollow

    def __enter__(self) -> Tracer:
        self._places = Places(self._model)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        assert self._places is not None
        self._places.remove()
        self._watchers.clear()  # what dies later is no longer part of it

    def watch(self, tensor: Tensor, kind: Kind, owner: str = "") -> None:
        """Note a storage that was there before, or say what one is."""
        storage = self._note(tensor, "")
        storage.kind, storage.owner = kind, owner

    def note_kept(self) -> None:
        """The forward pass is over: what it made and is still there is kept for the backward pass."""
        for storage in self._known.values():
            if storage.phase == "forward" and storage.kind == "temporaries":
                storage.kind = "activations"

    def _module(self) -> str:
        if self.phase == "optimizer" or self._places is None:
            return ""
        node = torch._C._current_autograd_node()
        return self._places.now if node is None else self._places.made_at(node)

    def _note(self, tensor: Tensor, maker: str) -> Storage:
        memory = tensor.untyped_storage()
        key = memory._cdata
        known = self._known.get(key)
        if known is not None:
            return known
        number = len(self.trace.storages)
        born = len(self.trace.operations)
        storage = Storage(memory.nbytes(), born, self.phase, self._module(), maker, number=number)
        self._known[key] = storage
        self.trace.storages.append(storage)
        self._watchers[key] = weakref.ref(memory, functools.partial(self._died, key))
        return storage

    def _note_workspace(self, maker: str, size: int) -> int:
        """Note what is there during the next operation alone, and give its number."""
        born, number = len(self.trace.operations), len(self.trace.storages)
        noted = Storage(size, born, self.phase, self._module(), maker, died=born + 1, number=number)
        self.trace.storages.append(noted)
        return number

    def _died(self, key: int, _: Any) -> None:
        self._known.pop(key).died = len(self.trace.operations)
        self._watchers.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked by C++ more often than all else together
            return args[0].device
        kwargs = kwargs or {}
        out = without_numbers(func, args, kwargs) if self.hollow else func(*args, **kwargs)
        known = _known(func)
        if known.is_view:
            return out
        given, made = tensors_in(args, kwargs), tensors_in(out)
        if not (made or given):
            return out
        old = {t.untyped_storage()._cdata for t in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in old:
                self._note(tensor, known.name)
        results = made or tensors_in([args[place] for place in known.written if place < len(args)], {})
        numbers = tuple(dict.fromkeys(self._note(t, "").number for t in given))
        outputs = tuple(dict.fromkeys(self._note(t, known.name).number for t in results))
        if besides := workspace(func, args):
            outputs = *outputs, self._note_workspace(known.name, besides)
        self.trace.operations.append(
            Operation(
                known.name,
                self.phase,
                self._module(),
                int(known.count(*args, **kwargs, out_val=out)) if known.count is not None else 0,
                0 if known.touches_nothing else sum(_bytes(t) for t in given),
                0 if known.touches_nothing else sum(_bytes(t) for t in results),
                tuple(tuple(t.shape) for t in given),
                (given[-1] if known.widens else results[0]).dtype if results else torch.float32,
                numbers,
                outputs,
            )
        )
        return out


@dataclass(frozen=True)
class _Known:
    """What is to be known about a torch operation, asked once."""

    name: str
    is_view: bool
    written: tuple[int, ...]  # arguments that are changed
    widens: bool
    touches_nothing: bool
    count: Callable[..., int] | None


@functools.cache
def _known(func: Any) -> _Known:
    name = func._schema.name.split("::")[-1]
    return _Known(
        name,
        is_view=func.is_view or name in _VIEWS or func.namespace == "prim",
        written=tuple(
            place
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        widens=name in _WIDENING,
        touches_nothing=name in _UNTOUCHED,
        count=_COUNTS.get(func._overloadpacket),
    )


_VIEWS = {"_unsafe_view"}
"""Views that torch does not call so: their argument is given up."""

_WIDENING = {"product_"}
"""Products whose result is of a wider dtype than what is multiplied, which is what takes the time."""

_UNTOUCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""They make memory and touch none of it."""


def _bytes(tensor: Tensor) -> int:
    """What a pass over a tensor touches: its elements once (an expanded one costs what it holds)."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


Shape = Sequence[int]


def _flash(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and mixture, all pairs of positions, as is the convention also under a causal mask."""
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (width + value[-1])


def _flash_backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    """Scores again, and four products for the gradients of values, weights, queries and keys."""
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (3 * width + 2 * value[-1])


def _grouped(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Each row times the matrix of its expert."""
    return 2 * x[0] * weight[-2] * weight[-1]


def _grouped_outer(d_y: Shape, x: Shape, *_: Any, **__: Any) -> int:
    """The gradients of all experts' matrices: each row counts once."""
    return 2 * x[0] * d_y[-1] * x[-1]


def _wide(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    torch.ops.scratchlm.grouped_product: _grouped,
    torch.ops.scratchlm.grouped_outer: _grouped_outer,
    torch.ops.scratchlm.product_: _wide,
}
"""FLOPs, from shapes, of products that torch's own counter does not know: flash attention on a CPU, our grouped and wide products."""

_COUNTS: dict[Any, Callable[..., int]] = {**flop_registry, **{op: shape_wrapper(f) for op, f in FLOPS.items()}}


def without_memory() -> Hollow:
    """Tensors made inside hold no numbers."""
    return Hollow()
