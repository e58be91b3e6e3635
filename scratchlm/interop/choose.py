"""Which family of the hub computes what a configuration says: exactly, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.interop.canonical import differences
from scratchlm.interop.family import Family, families
from scratchlm.interop.weights import Uncovered, places
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.hollow import hollow

FIRST = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "mixtral")
"""Asked before the others: what most software reads."""


@dataclass(frozen=True)
class Fit:
    """A family beside a configuration.

    Attributes:
        family: the family.
        unsaid: the fields whose values it cannot have; none: it computes the same function.
        values: its config.json for the configuration.
        config: what that config.json says.
        repaired: whether the rows of queries and keys have to be put into another order first (see :func:`repair`).
    """

    family: Family
    unsaid: tuple[str, ...]
    values: dict[str, Any]
    config: ModelConfig | None
    repaired: bool = False


def fit(config: ModelConfig, family: Family) -> Fit:
    """How well a family expresses a configuration: its config.json is written, read back and compared."""
    first = _fit(config, family)
    if not first.unsaid or set(first.unsaid) - {"rope.pairs"} or set(config.attention) != {"mha"}:
        return first
    other = {"half": "interleaved", "interleaved": "half"}[config.rope.pairs]
    second = _fit(config.model_copy(update={"rope": config.rope.model_copy(update={"pairs": other})}), family)
    return Fit(family, second.unsaid, second.values, second.config, repaired=True)


def _fit(config: ModelConfig, family: Family) -> Fit:
    values, unsaid = family.write(config)
    try:
        said = family.read(values, "config.json")
    except UserError:  # the family has no such model at all
        return Fit(family, tuple(unsaid) or ("a combination of fields",), values, None)
    unlike = tuple(dict.fromkeys([*unsaid, *differences(config, said)]))
    if not unlike:
        try:
            places(hollow(config), family.weights)
        except Uncovered as error:  # such as a dense model in a family of mixtures
            unlike = (f"weights ({error})",)
    return Fit(family, unlike, values, said)


def choose(config: ModelConfig, name: str = "auto", origin: Family | None = None) -> Fit:
    """The family to write.

    Args:
        config: of the model.
        name: a ``model_type``; ``auto``: the first that computes exactly the same.
        origin: for ``auto`` the family an imported model came from, asked first.

    Raises:
        UserError: no family does (the field that none has is named, or how near the nearest comes), the named one does not
            (its missing fields are named), or the name is unknown.
    """
    if name != "auto":
        from scratchlm.interop.family import family_of

        found = fit(config, family_of(name, "--family"))
        if found.unsaid:
            raise UserError(
                f"family {name} cannot say this model's {', '.join(found.unsaid)}; --family auto looks for one that can, "
                "--family standalone writes a folder with its own code"
            )
        return found
    asked = [] if origin is None else [origin.model_type]
    order = dict.fromkeys([*asked, *(name for name in FIRST if name in families()), *families()])
    fits = []
    for name in order:
        fits.append(fit(config, families()[name]))
        if not fits[-1].unsaid:
            return fits[-1]
    comparable = [candidate for candidate in fits if candidate.config is not None] or fits
    nowhere = set.intersection(*(set(candidate.unsaid) for candidate in comparable))
    if nowhere:
        shown = ", ".join(f"{name} = {_value(config, name)}" for name in sorted(nowhere))
        reason = f"no family of the hub has {shown}"
    else:
        nearest = min(comparable, key=lambda candidate: len(candidate.unsaid))
        shown = ", ".join(f"{name} = {_value(config, name)}" for name in nearest.unsaid)
        reason = f"no family of the hub has this combination; the nearest is {nearest.family.model_type}, without {shown}"
    raise UserError(
        f"{reason}; write it with --family standalone (a folder with its own code, for trust_remote_code) or --family "
        "scratchlm (our own format)"
    )


def _value(config: ModelConfig, name: str) -> Any:
    if name.startswith("weights "):
        return "without places"
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, "?")
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def repair(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """One of our tensors for the other kind of RoPE's pairs: the same function with the rows of q and k in another order.

    Interleaved pairs (0, 1), (2, 3), … become halves (0, d/2), (1, d/2 + 1), …, or the other way round.

    Args:
        name: of the tensor.
        tensor: as it is with `config`.
        config: the model's, with the pairs it was trained with.
    """
    width, turned = config.resolved_head_dim, config.rotated_dims
    halves = [*range(0, turned, 2), *range(1, turned, 2)]
    if config.rope.pairs == "half":
        halves = [
            place for pair in zip(range(turned // 2), range(turned // 2, turned), strict=True) for place in pair
        ]
    order = [*halves, *range(turned, width)]
    parent = name.rsplit(".", 1)[0]
    if parent.endswith("attention.qkv"):
        heads = {"q": config.heads, "k": config.resolved_kv_heads, "v": 0}
        bias = name.endswith("bias")
        rows: list[int] = []
        at = 0
        for part, count in heads.items():
            if bias and part not in config.attention_bias:
                continue
            if part == "v":
                rows += range(at, tensor.shape[0])
            for head in range(count):
                rows += [at + head * width + place for place in order]
            at += count * width
        return tensor[rows]
    if ".q_norm" in name or ".k_norm" in name:
        return tensor.unflatten(-1, (-1, width))[..., order].flatten(-2)
    return tensor
