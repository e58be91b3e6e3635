"""The shape of an operation's result, from the operation itself on small tensors.

torch has a rule for shapes beside each kernel, but many are written in Python, slow, and import torch's symbolic shapes. Few operations look
at sizes, though: they only say which size of a result is which size of an argument. So each size among the arguments becomes a small prime
of its own, the kernel runs for real on the few numbers that are left, and the primes in its result are turned back::

    (16, 1024, 4096) + (4096,)   →   (3, 5, 7) + (7,)   ──kernel──►   (3, 5, 7)   →   (16, 1024, 4096)

Where a result has a size that no argument has (a concatenation, say), this does not answer; that it is none by chance, a second
run with other sizes makes sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
_OTHERS = tuple(range(6, 56, 5))
"""For the second run: one more than a multiple of 5, so that neither the sum of some is one of them nor one less a small number, 5 left out."""

_LARGEST_NUMBER = 8
"""A whole number up to this says which dimension, or how many; a larger one is a size."""

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides."""


class Unanswered(Exception):
    """The results cannot be read off small ones."""


def ask_small(func: Any, args: Any, kwargs: Mapping[str, Any], answer: Callable[..., Any]) -> Any:
    """Run an operation of ATen on small tensors.

    Args:
        func: the operation.
        args, kwargs: of any size; not touched.
        answer: (results, arguments, a tensor's :data:`Layout` in large sizes) → what is wanted of them.

    Returns:
        What `answer` gave, twice the same.

    Raises:
        Unanswered: its results do not follow from sizes alone.
    """
    if func.namespace != "aten" or _draws(func):
        raise Unanswered
    found = []
    for sizes in (_PRIMES, _OTHERS):
        small = _Small((args, dict(kwargs)), sizes)
        given, named = small.arguments
        before = _layouts(small.arguments)
        try:
            out = func(*given, **named)
        except (RuntimeError, IndexError, ValueError):
            raise Unanswered from None
        if _layouts(small.arguments) != before:  # it turned one of them
            raise Unanswered
        found.append(answer(out, (*given, *named.values()), small.back))
    if found[0] != found[1]:
        raise Unanswered
    return found[0]


def _draws(func: Any) -> bool:
    """Whether the kernel would move the state of torch's random numbers; flash attention on a CPU knows no dropout."""
    drops_nothing = func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return torch.Tag.nondeterministic_seeded in func.tags and not drops_nothing


def _layouts(arguments: Any) -> list[Any]:
    return [(value.shape, value.stride()) for value in _leaves(arguments) if isinstance(value, Tensor)]


class _Small:
    """Arguments with small sizes, and the way back."""

    def __init__(self, arguments: Any, small: Sequence[int]) -> None:
        numbers: set[int] = set()
        sizes: set[int] = set()
        for value in _leaves(arguments):
            if isinstance(value, Tensor):
                sizes |= {size for size in value.shape if size > 1}
            elif isinstance(value, int):
                (sizes if value > _LARGEST_NUMBER else numbers).add(value)
        free = [size for size in small if size not in numbers]
        if len(sizes) > len(free):
            raise Unanswered
        self._small = {0: 0, 1: 1} | dict(zip(sorted(sizes), free, strict=False))
        self._large = {small: size for size, small in self._small.items()}
        self.arguments = self._of(arguments)

    def _of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            shape, stride = self._shrink(tuple(value.shape), value.stride())
            return torch.empty_strided(shape, stride, dtype=value.dtype).zero_()
        if isinstance(value, list | tuple):
            return type(value)([self._of(one) for one in value])
        if isinstance(value, dict):
            return {name: self._of(one) for name, one in value.items()}
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            return self._small[value]
        return value

    def _shrink(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> Layout:
        """The same order of dimensions in memory, repeated ones and gaps where they are."""
        small = tuple(self._small[size] for size in shape)
        strides, extent, extent_small = [0] * len(shape), 1, 1
        for at in _inner_first(shape, stride):
            if stride[at] == 0 and shape[at] > 1:
                continue
            if shape[at] > 1:
                if stride[at] < extent:
                    raise Unanswered  # it overlaps itself
                extent_small *= 2 if stride[at] > extent else 1
                extent = stride[at]
            strides[at] = extent_small
            extent, extent_small = extent * max(1, shape[at]), extent_small * max(1, small[at])
        return small, tuple(strides)

    def back(self, result: Tensor) -> Layout:
        """Sizes and strides that a small result stands for.

        Raises:
            Unanswered: it has a size of its own, or gaps.
        """
        if any(size not in self._large for size in result.shape):
            raise Unanswered
        shape = tuple(self._large[size] for size in result.shape)
        strides, extent, extent_small = [1] * len(shape), 1, 1
        for at in _inner_first(result.shape, result.stride()):
            if result.shape[at] > 1 and result.stride()[at] != extent_small:
                raise Unanswered
            strides[at] = extent
            extent, extent_small = extent * max(1, shape[at]), extent_small * max(1, result.shape[at])
        return shape, tuple(strides)


def _inner_first(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Dimensions as they lie in memory, the innermost first."""
    return sorted(range(len(shape)), key=lambda at: (stride[at], shape[at] > 1, -at))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _leaves(one)
    else:
        yield value
