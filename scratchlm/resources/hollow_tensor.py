"""Tensors that know shape, dtype and place and hold no numbers.

A meta tensor of torch has a shape and no memory, but says its device is ``meta``, and code that asks for the device, autocast and
the choice of an attention kernel would go another way than in a real run. So a hollow tensor is a meta tensor that answers as a
CPU's would: above the kernels everything runs as it will, and where a kernel would compute, its results are made by shape alone. That
shape is asked of the kernel itself on small tensors (`small_sizes`), of a few rules here, or of torch's rule.

torch's own FakeTensor does the same for its compiler, with what a compiler needs besides; importing that takes longer than a
whole estimate (`docs/log.md`). The tests hold whole steps to those of real tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from scratchlm.resources.no_compiler import the_real
from scratchlm.resources.small_sizes import Unanswered, ask_small

META, CPU = torch.device("meta"), torch.device("cpu")
_ATEN = torch.ops.aten


class HollowTensor(Tensor):
    """See above. Made by operations inside :class:`Hollow`, never directly.

    ``item()`` and whatever else needs numbers raises a RuntimeError.
    """

    in_kernel = False
    """Whether torch's rule for shapes runs now, to which the device is meta."""

    @staticmethod
    def __new__(cls, meta: Tensor) -> HollowTensor:
        return Tensor._make_subclass(
            cls, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=CPU
        )

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return META if HollowTensor.in_kernel else CPU

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        return without_numbers(func, args, kwargs or {})  # outside of the mode they stay hollow all the same


class Hollow(TorchDispatchMode):
    """Inside, every tensor that is made is hollow; real ones that are given count by their shape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to make sure that nobody compiles what is below, torch would import its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return without_numbers(func, args, kwargs or {})


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among arguments and results of an operation: lists, tuples and keywords are looked into."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def without_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives of hollow tensors, called where no dispatch mode is active: hollow ones, in the real ones' shapes and strides."""
    if func is torch.ops.prim.device.default:  # how C++ asks
        return META if HollowTensor.in_kernel else CPU
    if HollowTensor.in_kernel:
        raise RuntimeError(f"{func} came back while its shape was asked for")
    if not func._schema.returns:  # a fused optimizer's step, say: it changes numbers alone
        return None
    if func is _ATEN._unsafe_view.default:
        func = _ATEN.view.default  # it is one, of what nobody looks at any more
    asked = _question(func, args, kwargs)
    if asked is not None:
        if asked not in _ANSWERS:
            _ANSWERS[asked] = _ask(func, args, kwargs)
        if _ANSWERS[asked] is not None:
            return _again(_ANSWERS[asked], (*args, *kwargs.values()))
    try:
        return _by_rule(func, args, kwargs)
    except NotImplementedError:  # unless the rule was not there yet
        _fetch_rules()
        return _by_rule(func, args, kwargs)


def _by_rule(func: Any, args: Any, kwargs: Any) -> Any:
    """torch's rule, on the hollow tensors themselves: views of them share their memory."""
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        HollowTensor.in_kernel = True
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            out = func(*_each(_shape_alone, args), **_on_meta(func, _each(_shape_alone, kwargs)))
        finally:
            HollowTensor.in_kernel = False
    return _each(_hollow, out)


_ANSWERS: dict[Any, Any] = {}
"""Question → answer. Layers ask the same again and again, and torch's rules for shapes are slow: many are written in Python."""

_MOST_ANSWERS = 10_000


def _question(func: Any, args: Any, kwargs: Any) -> Any:
    """What the shapes of the results depend on; None for an operation that is not remembered: views share their memory."""
    if func.is_view:
        return None
    try:
        asked = (func, _kind(args), tuple((name, _kind(value)) for name, value in kwargs.items()))
        hash(asked)
    except TypeError:
        return None
    if len(_ANSWERS) >= _MOST_ANSWERS:
        _ANSWERS.clear()
    return asked


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple([_kind(one) for one in value])
    return type(value), value  # 1, 1.0 and True are equal and ask differently


def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    """The answer: from the kernel on small tensors, else from torch's rule on others of the same kind, which it may hold on to."""
    if func in _RULES and (answer := _RULES[func](func, *args, **kwargs)) is not None:
        return answer
    with contextlib.suppress(Unanswered):
        return ask_small(func, args, kwargs, _answer)
    if func.namespace == "aten":
        _fetch_rules()
    given, named = _each(_stand_in, args), _each(_stand_in, kwargs)
    try:
        out = func(*given, **_on_meta(func, named))
    except Exception:  # the tensors themselves will say what is wrong with them
        return None
    if _kind(given) != _kind(args):
        return None
    return _answer(out, (*given, *named.values()), lambda tensor: (tensor.shape, tensor.stride()))


@functools.cache
def _fetch_rules() -> None:
    """torch's rules for shapes that are written in Python: some are not there before."""
    with _disable_current_modes():
        the_real("torch._meta_registrations")


def _itself(func: Any, *_: Any, **__: Any) -> Any:
    """It changes numbers of its first argument, and gives it back."""
    return 0


def _made(func: Any, size: Any, *rest: Any, **options: Any) -> Any:
    """A tensor of given sizes: its dtype is that of one without dimensions."""
    return _new(size, func([], *rest, **options).dtype)


def _counted(func: Any, *limits: Any, **options: Any) -> Any:
    """Numbers from a start to an end in steps: their dtype is that of none of them."""
    start, end, step = {1: (0, *limits, 1), 2: (*limits, 1)}.get(len(limits), limits)
    numbers = math.ceil((end - start) / step)
    kind = sum(limits) - sum(limits)  # a float if one of them is
    return _new((numbers,), torch.arange(kind, **options).dtype)


def _product(func: Any, *factors: Any, **_: Any) -> Any:
    """oneDNN writes a kernel for every new size, small ones too."""
    a, b = factors[-2:]
    return _new((*a.shape[:-1], b.shape[-1]), a.dtype)


def _joined(func: Any, tensors: Any, dim: int = 0) -> Any:
    """Several in a row; an empty one of torch's old kind, without any shape, counts for nothing."""
    tensors = [t for t in tensors if t.shape != (0,)] or tensors
    size = list(tensors[0].shape)
    size[dim] = sum(t.shape[dim] for t in tensors)
    return _new(size, functools.reduce(torch.promote_types, [t.dtype for t in tensors]))


def _stacked(func: Any, tensors: Any, dim: int = 0) -> Any:
    """Several side by side along a dimension of their own."""
    size = list(tensors[0].shape)
    size.insert(dim if dim >= 0 else dim + len(size) + 1, len(tensors))
    return _new(size, functools.reduce(torch.promote_types, [t.dtype for t in tensors]))


def _spread(func: Any, gradient: Tensor, size: Any, *_: Any) -> Any:
    """The gradient of a part of a tensor, which is zero outside of it."""
    return _new(size, gradient.dtype)


def _dropped(func: Any, x: Tensor, *_: Any) -> Any:
    """What is left, and which of it that is."""
    return [tuple, (x.shape, x.stride(), x.dtype), (x.shape, x.stride(), torch.bool)] if _is_dense(x) else None


def _padded(func: Any, x: Tensor, pad: Any, *_: Any) -> Any:
    """Two numbers per dimension, from the last one."""
    if not x.is_contiguous():
        return None
    size = list(x.shape)
    for n, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        size[-1 - n] += before + after
    return _new(size, x.dtype)


def _largest(func: Any, x: Tensor, k: int, dim: int = -1, *_: Any) -> Any:
    """The k largest along a dimension, and where they were."""
    if not (x.ndim and x.is_contiguous()):
        return None
    size = list(x.shape)
    size[dim] = k
    return [tuple, _new(size, x.dtype), _new(size, torch.int64)]


def _is_dense(x: Tensor) -> bool:
    """Whether its elements, in whatever order of dimensions, leave no gap: results are laid out like it."""
    extent = 1
    for stride, length in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != extent:
            return False
        extent *= length
    return True


def _new(size: Any, dtype: torch.dtype) -> Any:
    return tuple(size), _contiguous(size), dtype


def _contiguous(size: Any) -> tuple[int, ...]:
    strides, extent = [], 1
    for length in reversed(size):
        strides.append(extent)
        extent *= max(1, length)
    return tuple(reversed(strides))


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (_ATEN.empty.memory_format, _ATEN.zeros.default, _ATEN.ones.default, _ATEN.full.default), _made
    ),
    **dict.fromkeys((_ATEN.add_.Tensor, _ATEN.bernoulli_.float), _itself),
    **dict.fromkeys((_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step), _counted),
    **dict.fromkeys((_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default), _product),
    _ATEN.native_dropout.default: _dropped,
    _ATEN.constant_pad_nd.default: _padded,
    _ATEN.topk.default: _largest,
    _ATEN.cat.default: _joined,
    _ATEN.stack.default: _stacked,
    **dict.fromkeys((_ATEN.slice_backward.default, _ATEN.select_backward.default), _spread),
}
"""What small tensors cannot answer, or not soon: sizes that are given as numbers, operations that draw or whose numbers do not fit small sizes, and
products, which are slow to start. A rule that gives None does not know: small tensors are asked then, and torch's rule at last."""


def _answer(out: Any, args: Any, layout: Callable[[Tensor], Any]) -> Any:
    """Results to be made again: the number of the argument that one is, or what makes a new one; None: neither."""
    if out is None:
        return _NOTHING
    if isinstance(out, Tensor):
        for number, value in enumerate(args):
            if out is value:
                return number
        whole = out.untyped_storage().nbytes() == out.numel() * out.element_size()
        shared = {t.untyped_storage()._cdata for t in tensors_in(args)}
        if not whole or out.untyped_storage()._cdata in shared:
            return None
        return *layout(out), out.dtype
    if isinstance(out, tuple | list):
        answers = [_answer(one, args, layout) for one in out]
        together = {t.untyped_storage()._cdata for t in tensors_in(out)}
        return None if None in answers or len(together) < len(out) else [type(out), *answers]
    return None


_NOTHING = object()
"""The answer of a result that is none: a gradient nobody wants, say."""


def _again(answer: Any, args: Any) -> Any:
    if answer is _NOTHING:
        return None
    if isinstance(answer, int):
        return args[answer]
    if isinstance(answer, list):
        kind, *answers = answer
        return kind([_again(one, args) for one in answers])
    shape, stride, dtype = answer
    return HollowTensor(torch.empty_strided(shape, stride, dtype=dtype, device=META))


def _each(function: Any, value: Any) -> Any:
    """`value` with `function` of all that is no list, tuple or dict."""
    if isinstance(value, dict):
        return {name: _each(function, one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_each(function, one) for one in value])
    return function(value)


def _shape_alone(value: Any) -> Any:
    """An argument as a rule for shapes takes it."""
    return value if isinstance(value, HollowTensor) else _stand_in(value)


def _stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return META if isinstance(value, torch.device) else value


def _hollow(value: Any) -> Any:
    """A result as the caller takes it."""
    return HollowTensor(value) if isinstance(value, Tensor) and not isinstance(value, HollowTensor) else value


def _on_meta(func: Any, named: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an operation that may have to be told where to make what it makes."""
    return named | {"device": META} if _has_a_device(func) else named


@functools.cache
def _has_a_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)
