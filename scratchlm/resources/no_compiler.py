"""An estimate without torch's compiler, and without what else of torch it has no use for.

torch's optimizers ask its compiler to leave them alone, its rules for shapes check their arguments by a function of its symbolic shapes,
and a tensor of a class of its own is asked whether it is a distributed one. Each imports at first use what it asks, with sympy and more
behind it: about a second, as long as the rest of an estimate takes. Its counter of FLOPs imports Triton. Where sizes are numbers, and nothing is compiled or distributed, there
is nothing to leave alone, the check is ``bool``, and no tensor is one.

torch itself imports, every time, its exporter and its rules for shapes, a quarter of its own start. Nothing here exports; the rules are fetched
when a shape is asked that nothing else knows (:func:`the_real`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

_STAND_INS: dict[str, dict[str, Any]] = {
    "torch.distributed.tensor": {"DTensor": type("DTensor", (), {})},
    "torch.fx.experimental.symbolic_shapes": {"expect_true": bool},
    "torch._dynamo": {"disable": lambda function, *_, **__: function},
    "torch._dynamo.config": {
        "error_on_nested_fx_trace": True
    },  # checkpointing asks; its default, and nothing is traced by FX here
    "torch.export": {},
    "triton.runtime.jit": {
        "JITFunction": type("JITFunction", (), {})
    },  # torch's counter of FLOPs asks of each function whether it is one
    "torch._meta_registrations": {},
}
"""Module → what stands in for its parts."""


DYNAMO = ("torch._dynamo", "torch._dynamo.config")
"""What of these an optimizer asks for."""


@contextlib.contextmanager
def without_the_compiler(modules: Iterable[str] = tuple(_STAND_INS)) -> Iterator[None]:
    """Inside, these modules are not imported unless something asks for more of them than named above.

    With :data:`DYNAMO` alone, for training: optimizers of torch's kind are then not marked as nothing to compile, which matters to who compiles an optimizer's own
    methods, as nobody here does.

    Best entered before torch is imported. For a process that afterwards compiles nothing and counts no FLOPs of Triton kernels: torch remembers what it
    found here. What is imported already stays as it is.
    """
    put = {name: _StandIn(name, _STAND_INS[name]) for name in modules if name not in sys.modules}
    for name, module in put.items():
        outer, _, inner = name.rpartition(".")
        if outer in put:
            setattr(put[outer], inner, module)
    sys.modules.update(put)
    try:
        yield
    finally:
        for name, module in put.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for objects that hold each other: it would walk over all that was imported again and again, a tenth of an estimate's
    time; and what dies there dies by its count."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_FIRST = ("torch.export", "torch._meta_registrations")
"""What torch imports itself, in its order: the others take it for granted."""


def the_real(name: str) -> ModuleType:
    """The module itself, whether something stands in for it or not."""
    parts = name.split(".")
    for wanted in (*_FIRST, *(".".join(parts[:n]) for n in range(1, len(parts))), name):
        if isinstance(sys.modules.get(wanted), _StandIn):
            inside = [one for one in sys.modules if one.startswith(f"{wanted}.") and one in _STAND_INS]
            for stand_in in (wanted, *inside):
                del sys.modules[stand_in]
            importlib.import_module(wanted)
    return importlib.import_module(name)


def fetched() -> tuple[bool, ...]:
    """Which of the parts that torch imports when it is asked for them are there."""
    return tuple(getattr(sys.modules.get(name), "__file__", None) is not None for name in _STAND_INS)


class _StandIn(ModuleType):
    """A module of which a few parts are known; asked for anything else, the real one is imported."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(names)

    def __getattr__(self, wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return getattr(the_real(self.__name__), wanted)
