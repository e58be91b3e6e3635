"""The rows of the table: what each variant came to, and whether that differs from the reference by more than noise."""

from __future__ import annotations

import csv
import io
import math
import statistics as plain_statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scratchlm.evaluate.report import amount
from scratchlm.experiments.budget import SHAPE_TOLERANCE, TIME_TOLERANCE, Amount, tokens_per_step
from scratchlm.experiments.plan import Outcomes, Plan, Trial
from scratchlm.experiments.results import Failure, Result
from scratchlm.experiments.spec import Experiment, Variant
from scratchlm.experiments.statistics import LEVEL, Difference, Verdict, mean_and_error, paired_difference

OWN, SHARED = "own", "reference's"


@dataclass(frozen=True)
class Row:
    """A variant at one learning rate.

    Attributes:
        variant: its name.
        rate: whose best learning rate it ran at: its own or the reference's; empty without a sweep of rates.
        factor: of the recipe's learning rates.
        seeds: finished, of how many.
        loss, error: mean of the last validation over seeds, nats per token, and its standard error.
        bits, bits_error: the same in bits per byte.
        difference: to the reference with the same seeds, in the unit the experiment is judged by.
        verdict: by the difference's interval; "worse" with no number where all runs of it failed or diverged.
        figures: medians (of counts of trouble sums, of speed, memory and the greatest gradient the greatest) over the finished runs; empty without one.
        notes: what has to be known: errors, a missed budget, a best rate at the edge of those tried.
    """

    variant: str
    rate: str
    factor: float
    seeds: tuple[int, int]
    loss: float
    error: float
    bits: float
    bits_error: float
    difference: Difference | None
    verdict: Verdict | str
    figures: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All rows, and how they were judged.

    Attributes:
        experiment: what was asked.
        amount: what every variant got.
        unit: "nats per token", or "bits per byte" where the variants have tokenizers of their own.
        rows: the reference first; each variant's rows together.
        trials: of each row, by seed.
    """

    experiment: Experiment
    amount: Amount
    unit: str
    rows: tuple[Row, ...]
    trials: tuple[tuple[Trial, ...], ...]

    @property
    def by_chance(self) -> float:
        """How many of the verdicts one would expect to name a difference if there were none at all."""
        judged = sum(row.difference is not None and row.difference.pairs > 1 for row in self.rows)
        return (1 - LEVEL) * judged


def compare(experiment: Experiment, plan: Plan, planned: Amount, outcome: Outcomes) -> Comparison:
    """Judge what is finished.

    Args:
        experiment, plan: what was asked, and its runs.
        planned: the budget.
        outcome: what became of a trial.
    """
    by_bits = _tokenizers_differ(experiment)
    judge: Callable[[Result], float] = (lambda r: r.bits_per_byte) if by_bits else (lambda r: r.loss)
    reference = experiment.reference
    ordered = [reference, *(variant for variant in experiment.variants if variant is not reference)]
    swept = experiment.spec.rates is not None
    rows: list[Row] = []
    trials: list[tuple[Trial, ...]] = []
    shared = plan.choices[reference.name].factor if reference.name in plan.choices else 1.0
    for variant in ordered:
        choice = plan.choices.get(variant.name)
        own = choice.factor if choice is not None else 1.0
        for factor in dict.fromkeys((own, shared)):
            runs = plan.of(variant.name, factor)
            against = plan.of(reference.name, shared)
            rate = "" if not swept else " = ".join(n for n, f in ((OWN, own), (SHARED, shared)) if f == factor)
            notes = _why_none(variant.name, plan, outcome) if not runs else []
            if factor == own and choice is not None and choice.at_edge:
                notes.append(f"×{own:g} is at the edge of the rates tried: the best one may lie beyond")
            row = _row(variant, rate, factor, runs, against, judge, planned, outcome, notes)
            if variant is reference:
                row = replace(row, difference=None, verdict="reference")
            elif notes and not runs:
                row = replace(row, verdict="failed")
            rows.append(row)
            trials.append(tuple(runs))
    return Comparison(
        experiment, planned, "bits per byte" if by_bits else "nats per token", tuple(rows), tuple(trials)
    )


def _tokenizers_differ(experiment: Experiment) -> bool:
    """Losses per token compare only what has the same tokens, of the same text."""
    first = experiment.variants[0].recipe
    return any(
        (one.recipe.tokenizer, one.recipe.corpus) != (first.tokenizer, first.corpus) for one in experiment.variants
    )


def _why_none(variant: str, plan: Plan, outcome: Outcomes) -> list[str]:
    """Why a variant has no runs that count: its budget cannot be met, or the runs before them failed."""
    if variant in plan.refused:
        return [plan.refused[variant]]
    before = [outcome(trial) for trial in plan.trials if trial.variant == variant and trial.purpose != "seed"]
    return list(dict.fromkeys(one.message for one in before if isinstance(one, Failure)))


def _row(
    variant: Variant,
    rate: str,
    factor: float,
    runs: Sequence[Trial],
    against: Sequence[Trial],
    judge: Callable[[Result], float],
    planned: Amount,
    outcome: Outcomes,
    notes: list[str],
) -> Row:
    found = {trial.seed: outcome(trial) for trial in runs}
    results = {seed: one for seed, one in found.items() if isinstance(one, Result)}
    good = {seed: one for seed, one in results.items() if not one.diverged}
    base = {trial.seed: one for trial in against if isinstance(one := outcome(trial), Result) and not one.diverged}
    both = sorted(good.keys() & base.keys())
    difference = paired_difference([judge(good[seed]) for seed in both], [judge(base[seed]) for seed in both])
    verdict: Verdict | str = difference.verdict
    failed = [one for one in found.values() if isinstance(one, Failure)]
    lost = len(failed) + len(results) - len(good)
    for message in dict.fromkeys(one.message for one in failed):
        times = sum(one.message == message for one in failed)
        notes.append(message if times == 1 else f"{message} ({times} runs)")
    if len(results) > len(good):
        notes.append(f"{len(results) - len(good)} of {len(runs)} runs diverged")
    if lost and not good:
        verdict = "failed" if failed else "diverged"
    notes += [
        f"seed {seed}: {wrong}" for seed, one in results.items() if (wrong := budget_missed(one, runs, planned))
    ]
    loss, error = mean_and_error([one.loss for one in good.values()])
    bits, bits_error = mean_and_error([one.bits_per_byte for one in good.values()])
    return Row(
        variant=variant.name,
        rate=rate,
        factor=factor,
        seeds=(len(good), len(runs)),
        loss=loss,
        error=error,
        bits=bits,
        bits_error=bits_error,
        difference=difference if both else None,
        verdict=verdict,
        figures=_figures(list(results.values())),
        notes=tuple(notes),
    )


_SUMMED = ("spikes", "skipped")
_GREATEST = ("peak_memory", "grad_norm_max", "tokens_per_second")
"""Of the speeds the greatest, too: what slows a run from outside is none of the choice's doing."""


def _figures(results: Sequence[Result]) -> dict[str, float]:
    """One number per figure over the seeds."""
    if not results:
        return {}
    found: dict[str, float] = {}
    for name in (
        "steps", "tokens", "seconds", "tokens_per_second", "parameters", "active_parameters", "flops_per_token",
        "cache_bytes_per_token", "cache_bytes_bounded", "peak_memory", "spikes", "skipped", "grad_norm_median", "grad_norm_max",
    ):  # fmt: skip
        values = [getattr(one, name) for one in results]
        fold = sum if name in _SUMMED else max if name in _GREATEST else plain_statistics.median
        found[name] = fold(values)
    return found


def budget_missed(result: Result, runs: Sequence[Trial], planned: Amount) -> str | None:
    """What was counted in a run beside what was planned: a sentence if they differ by more than half a step (or, in time, more than
    `TIME_TOLERANCE`; in parameters, more than `SHAPE_TOLERANCE`).

    Targets are counted by the trainer. A step short of targets (document boundaries, prefixes) is a difference, too, if it adds up.
    """
    step = max(tokens_per_step(trial.recipe) for trial in runs)
    if planned.kind == "seconds":
        seconds = result.tokens / result.tokens_per_second
        if abs(seconds / planned.total - 1) > TIME_TOLERANCE:
            return f"trained {seconds:.1f} s of {planned.total:g} s planned"
        return None
    if planned.kind == "parameters":
        number = result.active_parameters if planned.active else result.parameters
        if abs(number / planned.total - 1) > SHAPE_TOLERANCE:
            return f"{number:,} {'active ' if planned.active else ''}parameters of {planned.total:,.0f} planned"
    if planned.kind == "flops":
        counted, wanted, slack = (
            result.tokens * result.flops_per_token,
            planned.total,
            step * result.flops_per_token,
        )
        unit = "FLOPs"
    else:
        counted, wanted, slack, unit = float(result.tokens), planned.tokens, float(step), "tokens"
    if abs(counted - wanted) > 0.5001 * slack:
        return f"counted {counted:.4g} {unit} of {wanted:.4g} planned"
    return None


# --- as text ---------------------------------------------------------------------------------------------------------

COLUMNS: tuple[tuple[str, str], ...] = (
    ("variant", "variant"),
    ("rate", "learning rate"),
    ("seeds", "seeds"),
    ("loss", "validation loss"),
    ("bits", "bits per byte"),
    ("difference", "difference"),
    ("verdict", "verdict"),
    ("speed", "tokens/s"),
    ("parameters", "parameters"),
    ("flops", "FLOPs/token"),
    ("memory", "peak memory"),
    ("cache", "KV cache per token"),
    ("trouble", "spikes / skipped"),
    ("norm", "gradient norm"),
)


def cells(row: Row) -> dict[str, str]:
    """A row as a person reads it."""
    f = row.figures
    active = f.get("active_parameters") != f.get("parameters")
    bounded = f.get("cache_bytes_bounded", 0)
    return {
        "variant": row.variant,
        "rate": f"×{row.factor:g} ({row.rate})" if row.rate else "",
        "seeds": str(row.seeds[0]) if row.seeds[0] == row.seeds[1] else f"{row.seeds[0]} of {row.seeds[1]}",
        "loss": with_error(row.loss, row.error),
        "bits": with_error(row.bits, row.bits_error),
        "difference": interval(row.difference),
        "verdict": row.verdict,
        "speed": f"{f['tokens_per_second']:,.0f}" if f else "",
        "parameters": (amount(f["parameters"]) + (f" ({amount(f['active_parameters'])} active)" if active else ""))
        if f
        else "",
        "flops": amount(f["flops_per_token"]) if f else "",
        "memory": f"{f['peak_memory'] / 1e9:.2f} GB" if f else "",
        "cache": (f"{f['cache_bytes_per_token']:,.0f} B" + (f" + {amount(bounded)}B" if bounded else ""))
        if f
        else "",
        "trouble": f"{f['spikes']:.0f} / {f['skipped']:.0f}" if f else "",
        "norm": f"{f['grad_norm_median']:.2f}, at most {f['grad_norm_max']:.2f}" if f else "",
    }


def with_error(mean: float, error: float) -> str:
    """``3.0712 ± 0.0031``; without a spread the mean alone, "–" without a number."""
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def interval(difference: Difference | None) -> str:
    """``−0.0190 [−0.0252, −0.0121]``."""
    if difference is None or not difference.pairs:
        return ""
    text = f"{difference.mean:+.4f}"
    if math.isfinite(difference.low):
        text += f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    return text.replace("-", "−")


def shown_columns(comparison: Comparison) -> list[tuple[str, str]]:
    """Those that say something: learning rates only if there is more than one."""
    return [(name, title) for name, title in COLUMNS if name != "rate" or any(row.rate for row in comparison.rows)]


def sentences(comparison: Comparison) -> list[str]:
    """How to read the table."""
    spec, planned = comparison.experiment.spec, comparison.amount
    unit = {"tokens": "tokens", "flops": "FLOPs", "parameters": "parameters", "seconds": "seconds of training"}[
        planned.kind
    ]
    budget = f"Every run got {amount(planned.total)} {unit}"
    if planned.kind == "parameters":
        budget += f" (to within {SHAPE_TOLERANCE:.0%}) and {amount(planned.tokens)} tokens"
    lines = [
        f"{budget}; {len(spec.chosen_seeds)} seeds each. Losses are of the whole held-out text after the last step, ± their standard "
        "error over seeds.",
        f"Differences are to {spec.reference!r} with the same seeds, in {comparison.unit}, with a {LEVEL:.0%} interval by a paired bootstrap that "
        "is widened for few seeds; a verdict is given where the interval leaves out zero.",
    ]
    if comparison.by_chance:
        lines.append(
            f"Were all of them equal, about {comparison.by_chance:.1f} of these rows would still be called different."
        )
    if any(row.rate for row in comparison.rows):
        lines.append(
            "Each variant ran at the best of the learning rates tried for itself, and at the best one of the reference: the first is the fair "
            "comparison."
        )
    return lines


def as_markdown(comparison: Comparison) -> str:
    """table.md"""
    columns = shown_columns(comparison)
    lines = [f"# {comparison.experiment.name}", ""]
    if comparison.experiment.spec.question:
        lines += [comparison.experiment.spec.question, ""]
    lines.append("| " + " | ".join(title for _, title in columns) + " |")
    lines.append(
        "|" + "|".join(" --- " if name in ("variant", "verdict") else " ---: " for name, _ in columns) + "|"
    )
    for row in comparison.rows:
        found = cells(row)
        lines.append("| " + " | ".join(found[name].replace("|", "\\|") for name, _ in columns) + " |")
    lines += ["", *sentences(comparison)]
    notes = [
        f"- {row.variant}{f' (×{row.factor:g})' if row.rate else ''}: {note}"
        for row in comparison.rows
        for note in row.notes
    ]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Comparison) -> str:
    """table.csv: plain numbers, one column each."""
    records = as_records(comparison)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def as_records(comparison: Comparison) -> list[dict[str, Any]]:
    """A flat dict per row; what is not known is None."""
    names = sorted({name for row in comparison.rows for name in row.figures})
    return [
        {
            "variant": row.variant,
            "rate": row.rate,
            "factor": row.factor,
            "seeds": row.seeds[0],
            "of_seeds": row.seeds[1],
            "loss": _number(row.loss),
            "loss_error": _number(row.error),
            "bits_per_byte": _number(row.bits),
            "bits_per_byte_error": _number(row.bits_error),
            "difference": None if row.difference is None else _number(row.difference.mean),
            "low": None if row.difference is None else _number(row.difference.low),
            "high": None if row.difference is None else _number(row.difference.high),
            "verdict": row.verdict,
            **{name: _number(row.figures[name]) if name in row.figures else None for name in names},
            "notes": "; ".join(row.notes),
        }
        for row in comparison.rows
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
