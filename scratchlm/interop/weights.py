"""Where each tensor of a family's files lies among ours: declared once, used in both directions.

A :class:`Map` names a module of theirs and one of ours. Against a model's own modules it unfolds into :class:`Place`\\ s, one
per tensor of their files: which rows of which of our tensors it is, and how its rows are ordered. A place only moves numbers,
so reading and writing are exact inverses.

    theirs                                    ours
    self_attn.q_proj.weight ─────────────┐
    self_attn.k_proj.weight ─────────────┼──► attention.qkv.weight, parts 0, 1, 2
    self_attn.v_proj.weight ─────────────┘
    attn.c_attn.weight (in, out) ─ Tᵀ ───────► attention.qkv.weight
    query_key_value.weight ─ per head q k v ─► attention.qkv.weight, all q, all k, all v
    experts.3.w1.weight ─────────────────────► feedforward.up.weight[3], part 0
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from scratchlm.interop.rules import value_of
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.linear import Linear
from scratchlm.model.moe import ExpertLinear
from scratchlm.model.transformer import Transformer

SUFFIXES = {"weight": ".weight", "bias": ".bias"}


class _Some:
    def __contains__(self, value: object) -> bool:
        return value is not None


SOME = _Some()
"""For `Map.when`: every value but None."""


class Uncovered(Exception):
    """A family's tensors are not those of a model of ours; the message names the tensor."""


@dataclass(frozen=True)
class Map:
    """Their module (or tensor) and ours.

    ``{layer}`` is every layer, ``{index}`` in `theirs` every slice of our tensor's first dimension (experts, heads). What our
    model does not have, such as a bias, a dense network in a layer of experts, or a norm, unfolds to nothing.

    Attributes:
        theirs: dotted name, without ``.weight``.
        ours: dotted name of a module of :class:`~scratchlm.model.Transformer`, or of one of its tensors.
        parts: which of our row blocks (`Linear.parts`) theirs holds, in this order and adjacent; None: all.
        grouped: a field that says in how many groups their rows come, each with its share of every part (a head's q, k and
            v); None: part after part.
        transposed: their weights are (in, out).
        stacked: theirs holds all experts, as ours does; else experts are ``{index}``, and the same name without is of dense layers.
        unsqueezed: their shape starts with a 1.
        suffixes: what is added to `theirs` for our weight and bias.
        when: a field and the values of it with which the module has this name; None: always.
    """

    theirs: str
    ours: str
    parts: tuple[int, ...] | None = None
    grouped: str | None = None
    transposed: bool = False
    stacked: bool = False
    unsqueezed: bool = False
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)
    when: tuple[str, Container[Any]] | None = None


@dataclass(frozen=True)
class Place:
    """One tensor of their files.

    Attributes:
        theirs: its name.
        ours: the name of our tensor.
        shape: its shape in their file.
        index: which slice of our first dimension, or None.
        start, stop: which of our rows; None: all of the tensor.
        groups: in how many groups their rows come.
        widths: the rows of each part, in our order.
        transposed: theirs is (…, in, out).
    """

    theirs: str
    ours: str
    shape: tuple[int, ...]
    index: int | None = None
    start: int | None = None
    stop: int | None = None
    groups: int = 1
    widths: tuple[int, ...] = ()
    transposed: bool = False

    def view(self, ours: Tensor) -> Tensor:
        """The part of our tensor that this is, as a view."""
        if self.index is not None:
            ours = ours[self.index]
        if self.start is None or self.stop is None:
            return ours
        return ours.narrow(self._rows(ours), self.start, self.stop - self.start)

    def _rows(self, ours: Tensor) -> int:
        return -1 if self.ours.endswith("bias") else -2

    def put(self, theirs: Tensor, ours: Tensor) -> None:
        """Copy their tensor to its place in ours."""
        target = self.view(ours)
        rows = self._rows(target)
        given = theirs.transpose(-1, -2) if self.transposed else theirs
        if self.groups > 1 and len(self.widths) > 1:
            shares = [width // self.groups for width in self.widths]
            pieces = given.unflatten(rows, (self.groups, -1)).split(shares, dim=rows)
            at = 0
            for piece, width in zip(pieces, self.widths, strict=True):
                target.narrow(rows, at, width).unflatten(rows, (self.groups, -1)).copy_(piece)
                at += width
        else:
            target.copy_(given.reshape(target.shape))

    def take(self, ours: Tensor) -> Tensor:
        """Their tensor, contiguous: a copy unless it lies in ours as it is."""
        found = self.view(ours)
        rows = self._rows(found)
        if self.groups > 1 and len(self.widths) > 1:
            pieces = [
                piece.unflatten(rows, (self.groups, -1)) for piece in found.split(list(self.widths), dim=rows)
            ]
            found = torch.cat(pieces, dim=rows).flatten(rows - 1, rows)
        found = found.transpose(-1, -2) if self.transposed else found
        return found.reshape(self.shape).contiguous()


def _module_at(model: nn.Module, name: str) -> nn.Module | Tensor | None:
    found: nn.Module | Tensor | None = model
    for part in name.split("."):
        if isinstance(found, nn.ModuleList):
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _unfold_tensor(
    model: Transformer, entry: Map, name: str, suffix: str, module: nn.Module | None
) -> Iterator[Place]:
    """The places of one of our tensors."""
    tensor = _module_at(model, name)
    assert isinstance(tensor, Tensor)
    bias = name.endswith("bias")
    rows = -1 if bias else -2
    sizes: Sequence[int] = getattr(module, "parts", None) or ()
    shape, start, stop = list(tensor.shape), None, None
    widths: list[int] = list(sizes)
    if entry.parts is not None:
        biased = getattr(module, "biased", [True] * len(sizes))
        wanted = sorted(part % len(sizes) for part in entry.parts)
        present = [
            part for part in range(len(sizes)) if not bias or biased[part]
        ]  # rows of the bias that are stored
        if not set(wanted) <= set(present):
            return
        start = sum(sizes[part] for part in present if part < wanted[0])
        widths = [sizes[part] for part in wanted]
        stop = start + sum(widths)
        shape[rows] = stop - start
    elif bias and not all(getattr(module, "biased", [True])):
        return
    groups = 1 if entry.grouped is None else int(value_of(model.config, entry.grouped))
    place = Place(
        f"{entry.theirs}{suffix}",
        name,
        tuple(shape),
        start=start,
        stop=stop,
        groups=groups,
        widths=tuple(widths),
        transposed=entry.transposed and not bias,
    )
    if place.transposed:
        place = replace(place, shape=(*shape[:-2], shape[-1], shape[-2]))
    if entry.unsqueezed:
        place = replace(place, shape=(1, *place.shape))
    if "{index}" not in entry.theirs:
        yield place
        return
    for index in range(tensor.shape[0]):
        yield replace(place, theirs=place.theirs.replace("{index}", str(index)), index=index, shape=place.shape[1:])


def _unfold(model: Transformer, entry: Map) -> Iterator[Place]:
    """The places of one entry without ``{layer}``."""
    found = _module_at(model, entry.ours)
    each = "{index}" in entry.theirs
    if (isinstance(found, ExpertLinear) and not (each or entry.stacked)) or (isinstance(found, Linear) and each):
        return
    if isinstance(found, Tensor):
        yield from _unfold_tensor(model, entry, entry.ours, "", None)
    elif found is not None:
        for kind, suffix in entry.suffixes.items():
            if isinstance(getattr(found, kind, None), Tensor):
                yield from _unfold_tensor(model, entry, f"{entry.ours}.{kind}", suffix, found)


def places(model: Transformer, maps: Sequence[Map]) -> list[Place]:
    """Every tensor that a family's files hold for this model, in the order of `maps`, layer by layer.

    Args:
        model: the model; on the meta device will do.
        maps: the family's.

    Raises:
        Uncovered: a number of ours is in no tensor of theirs, or in two: the family has no such model, or its file a mistake.
    """
    found: list[Place] = []
    maps = [entry for entry in maps if entry.when is None or value_of(model.config, entry.when[0]) in entry.when[1]]
    layered = [entry for entry in maps if "{layer}" in entry.theirs]
    for entry in maps:
        if entry not in layered:
            found += _unfold(model, entry)
    for layer in range(model.config.layers):
        for entry in layered:
            own = replace(
                entry,
                theirs=entry.theirs.replace("{layer}", str(layer)),
                ours=entry.ours.replace("{layer}", str(layer)),
            )
            found += _unfold(model, own)
    _check_cover(model, found)
    return found


def _check_cover(model: Transformer, found: list[Place]) -> None:
    counted: dict[str, int] = {}
    for place in found:
        counted[place.ours] = counted.get(place.ours, 0) + int(torch.Size(place.shape).numel())
    names = [place.theirs for place in found]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise Uncovered(f"{sorted(twice)[0]}: two places")
    for name, tensor in stored(model).items():
        if counted.get(name, 0) != tensor.numel():
            raise Uncovered(f"{name}: {counted.get(name, 0):,} of {tensor.numel():,} numbers have a place")


def stored(model: Transformer) -> dict[str, Tensor]:
    """Our tensors that are saved: a tied head is the embedding."""
    tensors = model.state_dict(keep_vars=True)
    if model.config.tied_embeddings:
        tensors.pop("head.weight")
    return tensors


def places_of(model: Transformer, maps: Sequence[Map]) -> list[Place]:
    """:func:`places` of a model with weights, from a hollow one (so that nothing depends on where its weights are)."""
    return places(hollow(model.config), maps)
