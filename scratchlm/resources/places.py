"""Where in a model a step is, forward and backward."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Places:
    """Where a step is: by the module that runs, and in the backward pass by the module that made the node.

    Autograd numbers its nodes as they are made. Whenever the place changes, the next number is noted; so a node's number tells
    where it was made::

        place      ""  │ blocks.0.attention │ blocks.0.feedforward │ ""
        number      0  3                    9                      14          a node numbered 10 is the feed-forward's

    Attributes:
        now: dotted name of the innermost module of the model that runs. What is no part of the model counts to its caller.

    Args:
        model: its modules tell when they begin and end, until :meth:`remove`.
        outside: the place outside of all modules.
    """

    def __init__(self, model: nn.Module, outside: str = "") -> None:
        self.now = self.outside = outside
        self._around: list[str] = []
        self._numbers: list[int] = []
        self._made_at: list[str] = []
        self._owner = {parameter: name.rpartition(".")[0] for name, parameter in model.named_parameters()}
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            if name:
                self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
                self._hooks.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))
        self._note()

    def enter(self, place: str) -> None:
        """What comes belongs to `place`, until :meth:`leave`."""
        self._around.append(self.now)
        self.now = place
        self._note()

    def leave(self) -> None:
        """Back to where it was before."""
        self.now = self._around.pop()
        self._note()

    @contextlib.contextmanager
    def inside(self, place: str) -> Iterator[None]:
        """Everything in this block belongs to `place`."""
        self.enter(place)
        try:
            yield
        finally:
            self.leave()

    def _note(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._made_at.append(self.now)

    def made_at(self, node: Any) -> str:
        """Where a node of the graph was made; of one that takes up a parameter's gradient, whose parameter that is."""
        if hasattr(node, "variable"):
            return self._owner.get(node.variable, self.outside)
        return self._made_at[bisect.bisect_right(self._numbers, node._sequence_nr()) - 1]

    def remove(self) -> None:
        """The model's modules are as before."""
        for hook in self._hooks:
            hook.remove()
