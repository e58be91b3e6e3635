"""An estimate without torch's compiler.

torch's optimizers ask its compiler to leave them alone, its rules for shapes check their arguments by a function of its symbolic shapes,
and a tensor of a class of its own is asked whether it is a distributed one. Each imports at first use what it asks, with sympy and more
behind it: about a second, as long as the rest of an estimate takes. Where sizes are numbers, and nothing is compiled or distributed, there
is nothing to leave alone, the check is ``bool``, and no tensor is one.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_STAND_INS: dict[str, dict[str, Any]] = {
    "torch.distributed.tensor": {"DTensor": type("DTensor", (), {})},
    "torch.fx.experimental.symbolic_shapes": {"expect_true": bool},
    "torch._dynamo": {"disable": lambda function, *_, **__: function},
}
"""Module → what stands in for its parts."""


@contextlib.contextmanager
def without_the_compiler() -> Iterator[None]:
    """Inside, torch's compiler is not imported unless something asks for more of it than named above.

    For a process that compiles nothing afterwards: torch remembers what it found here. What is imported already
    stays as it is.
    """
    put = {name: _StandIn(name, names) for name, names in _STAND_INS.items() if name not in sys.modules}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name, module in put.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _StandIn(ModuleType):
    """A module of which a few parts are known; asked for anything else, the real one is imported."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(names)

    def __getattr__(self, wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), wanted)
