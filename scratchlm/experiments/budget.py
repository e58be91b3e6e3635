"""The same amount for everybody: of tokens, of FLOPs, of parameters, or of time.

=============  =======================================================  ====================================
budget         what is changed in a variant                             what is counted afterwards
=============  =======================================================  ====================================
tokens         steps                                                    targets trained on
flops          steps: FLOPs of the products per token times tokens      targets × FLOPs per token
parameters     d_model and d_ff (to within 1 %); steps, as for tokens   the model's parameters, and targets
seconds        steps, by the speed measured in a short run              targets / median speed
=============  =======================================================  ====================================

Steps are whole, so tokens and FLOPs are equal to within half a step. The learning rate's schedule is that of the steps: nothing is cut off in its
middle. Smaller batches of a warm-up are counted as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scratchlm.config import Recipe
from scratchlm.errors import UserError
from scratchlm.experiments.spec import BudgetSpec
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.shape import count

SHAPE_TOLERANCE = 0.01
"""Parameters may differ by so much, as a share."""
TIME_TOLERANCE = 0.15
"""Seconds may: the speed of a shared machine changes between the short run and the long one."""


@dataclass(frozen=True)
class Amount:
    """The budget, resolved: what each variant gets.

    Attributes:
        kind: as in the spec.
        total: tokens, FLOPs, parameters or seconds.
        tokens: of training, where the kind says nothing of them (parameters).
        active: the parameters are those that a token meets.
    """

    kind: str
    total: float
    tokens: float
    active: bool = False


def tokens_per_step(recipe: Recipe) -> int:
    """Targets of one optimizer step, if every place has one."""
    return recipe.train.batch_size * recipe.model.context_length


def flops_per_token(recipe: Recipe) -> float:
    """FLOPs of training on one token, forward and backward, of the model's products.

    Raises:
        UserError: the vocabulary's size is not set.
    """
    return hollow(recipe.model).training_flops_per_token(recipe.model.context_length)


def parameters(model: ModelConfig, active: bool) -> int:
    """Parameters, all or those that a token meets."""
    counted = count(model)
    return counted.active if active else counted.total


def amount_of(spec: BudgetSpec, base: Recipe) -> Amount:
    """What the spec asks for, or what the base takes.

    Args:
        spec: kind, and perhaps the amount.
        base: with its vocabulary's size.

    Raises:
        UserError: seconds are asked for without saying how many.
    """
    tokens = base.tokens
    if spec.kind == "seconds" and spec.amount is None:
        raise UserError("budget.kind = seconds needs an amount: how many seconds each run may train")
    if spec.amount is not None:
        total = spec.amount
    elif spec.kind == "flops":
        total = tokens * flops_per_token(base)
    elif spec.kind == "parameters":
        total = parameters(base.model, spec.active)
    else:
        total = tokens
    return Amount(spec.kind, float(total), total if spec.kind == "tokens" else tokens, spec.active)


def with_steps(recipe: Recipe, amount: Amount, speed: float | None = None) -> Recipe:
    """`recipe` with as many steps as the budget allows.

    Args:
        recipe: with its vocabulary's size; for ``parameters`` reshaped already.
        amount: the budget.
        speed: tokens per second, for ``seconds``.

    Raises:
        UserError: not even one step fits.
    """
    if amount.kind == "flops":
        tokens = amount.total / flops_per_token(recipe)
    elif amount.kind == "seconds":
        if speed is None:
            raise ValueError("a budget of seconds needs a measured speed")
        tokens = amount.total * speed
    else:
        tokens = amount.tokens
    steps = _steps_for(tokens / recipe.model.context_length, recipe)
    if steps < 1:
        raise UserError(
            f"the budget of {amount.total:g} {amount.kind} is {tokens:,.0f} tokens here, less than a step of "
            f"{tokens_per_step(recipe):,}; raise it, or lower train.batch_size"
        )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def _steps_for(sequences: float, recipe: Recipe) -> int:
    """As many steps as come nearest to so many sequences."""
    train, seen = recipe.train, 0
    for step in range(train.batch_warmup_steps):
        size = train.batch_size_at(step)
        if seen + size / 2 > sequences:
            return step
        seen += size
    return train.batch_warmup_steps + round((sequences - seen) / train.batch_size)


def reshaped(model: ModelConfig, wish: float, *, active: bool = False) -> ModelConfig:
    """`model` with d_model, and then d_ff, such that it has `wish` parameters to within 1 %.

    Of all shapes that meet the wish the one whose widths are stretched least is taken: d_model and d_ff keep about their ratio. Layers
    and the number of heads stay; d_model stays a multiple of what the heads need.

    Args:
        model: with its vocabulary's size.
        wish: number of parameters.
        active: count those that a token meets.

    Raises:
        UserError: no width comes within 1 %.
    """
    best: tuple[float, ModelConfig] | None = None
    nearest = parameters(model, active)
    if abs(nearest / wish - 1) <= SHAPE_TOLERANCE:
        return model
    for candidate in _widths(model, wish, active):
        found = parameters(candidate, active)
        if abs(found - wish) < abs(nearest - wish):
            nearest = found
        if abs(found / wish - 1) > SHAPE_TOLERANCE:
            continue
        stretch = _stretch(candidate, model)
        if best is None or stretch < best[0]:
            best = stretch, candidate
    if best is None:
        raise UserError(
            f"no width gives {wish:,.0f} parameters to within {SHAPE_TOLERANCE:.0%} (the nearest has {nearest:,}); set the variant's "
            "widths by hand, or budget.kind = tokens"
        )
    return best[1]


def _stretch(candidate: ModelConfig, model: ModelConfig) -> float:
    """How far d_ff / d_model has left its ratio, and d_model its value (which the wish decides anyway, hence less)."""
    ratio = math.log(_inner(candidate) / candidate.d_model) - math.log(_inner(model) / model.d_model)
    return abs(ratio) + 0.1 * abs(math.log(candidate.d_model / model.d_model))


def _inner(model: ModelConfig) -> int:
    """The width that is tuned: of the feed-forward, in a mixture of one expert."""
    return model.resolved_d_expert if model.moe.experts else model.resolved_d_ff


def _with_widths(model: ModelConfig, d_model: int, inner: int | None) -> ModelConfig | None:
    """`model` with other widths; None where it refuses them."""
    values = model.model_dump(mode="json")
    values["d_model"] = d_model
    if model.moe.experts:
        values["moe"]["d_expert"] = inner
    else:
        values["d_ff"] = inner
    try:
        return ModelConfig(**values)
    except UserError:
        return None


def _widths(model: ModelConfig, wish: float, active: bool) -> Iterator[ModelConfig]:
    """Shapes near the wish: d_model around the one that meets it at the same ratio, d_ff by the rule of three."""
    step = math.lcm(model.heads * (2 if model.head_dim is None else 1), 8)
    ratio = _inner(model) / model.d_model

    def at(d_model: int) -> ModelConfig | None:
        return _with_widths(model, d_model, max(1, round(ratio * d_model)))

    low, high = 1, 1
    while (shape := at(high * step)) is not None and parameters(shape, active) < wish and high < 1 << 14:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        shape = at(middle * step)
        if shape is not None and parameters(shape, active) < wish:
            low = middle
        else:
            high = middle
    for multiple in range(max(1, high - 3), high + 3):
        d_model = multiple * step
        inner = max(1, round(ratio * d_model))
        one, two = _with_widths(model, d_model, inner), _with_widths(model, d_model, inner + 8)
        if one is None or two is None:
            continue
        have, slope = parameters(one, active), (parameters(two, active) - parameters(one, active)) / 8
        if not slope:
            yield one
            continue
        wanted = inner + (wish - have) / slope
        for width in {8 * round(wanted / 8), round(wanted)}:
            if width >= 1 and (shape := _with_widths(model, d_model, width)) is not None:
                yield shape
