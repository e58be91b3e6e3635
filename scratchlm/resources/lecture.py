"""The course's exercises in resource accounting, answered by the modules themselves: ``python -m scratchlm.resources.lecture``.

Writes docs/lecture2.md. Published figures stand here with their sources; everything beside them is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.evaluate.report import amount
from scratchlm.files import write_text
from scratchlm.model import presets
from scratchlm.model.draw.cost import components
from scratchlm.model.draw.hollow import hollow
from scratchlm.resources.step import Step, as_run_on, trace_step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lecture2.md"
GPT2 = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shares(preset: str, length: int) -> tuple[float, dict[str, float]]:
    """FLOPs of a forward pass per token, and each component's share."""
    parts = {part.name: part.flops for part in components(hollow(presets.load(preset)), length) if part.flops}
    total = sum(parts.values())
    return total, {name: flops / total for name, flops in parts.items()}


def sizes() -> str:
    """GPT-2 small to XL, and XL with a context sixteen times as long."""
    cases = [(name, 1024) for name in GPT2] + [("gpt2-xl", 16_384)]
    rows = []
    for name, length in cases:
        total, parts = shares(name, length)
        params = hollow(presets.load(name)).num_params()
        cells = [f"{parts[part]:.1%}" for part in ("attention", "scores, states", "feed-forward", "head")]
        rows.append(
            [name, f"{length:,}", f"{params:,}", f"{total / 1e9:.2f}", f"{total * length / 1e12:.2f}", *cells]
        )
    header = [
        "model",
        "context",
        "parameters",
        "GFLOP/token",
        "TFLOP/sequence",
        "projections",
        "scores",
        "feed-forward",
        "head",
    ]
    return table(header, rows)


@dataclass(frozen=True)
class Line:
    """Bytes = fixed + per_sequence · sequences."""

    fixed: float
    per_sequence: float

    def largest(self, memory: float) -> int:
        """Sequences that fit."""
        return max(0, int((memory - self.fixed) // self.per_sequence))


def adamw_memory(preset: str, length: int, precision: str) -> tuple[Line, Step]:
    """Peak bytes of a training step on CUDA as a line in the sequences of a micro-batch, traced at one and two of them."""
    config = presets.load(preset)
    steps = [
        trace_step(
            as_run_on("cuda", config, length),
            OptimConfig(),
            TrainConfig(),
            precision=precision,
            micro_batch=rows,
            length=length,
            device_type="cuda",
        )
        for rows in (1, 2)
    ]
    one, two = (step.trace.peak()[1] for step in steps)
    return Line(2 * one - two, two - one), steps[0]


def memory(preset: str = "gpt2-xl", length: int = 1024) -> str:
    """What AdamW needs for a model, and how many sequences fit into 80 GB."""
    rows = []
    for precision in ("fp32", "bf16"):
        line, step = adamw_memory(preset, length, precision)
        params = sum(step.params.values())
        sizes = [f"{share * params / 1e9:.2f}" for share in (4, 4, 8)]
        rows.append(
            [
                precision,
                *sizes,
                f"{line.fixed / 1e9:.2f}",
                f"{line.per_sequence / 1e9:.2f}",
                str(line.largest(80e9)),
            ]
        )
    header = [
        "precision",
        "weights GB",
        "gradients GB",
        "AdamW's moments GB",
        "fixed part of the peak GB",
        "per sequence GB",
        "sequences in 80 GB",
    ]
    return table(header, rows)


def six_n() -> str:
    """The rule of thumb 6 N beside the products that are there."""
    rows = []
    cases = [
        ("gpt2-small", 1024),
        ("gpt2-xl", 1024),
        ("gpt2-xl", 16_384),
        ("llama-3-8b", 8192),
        ("gpt3-175b", 2048),
    ]
    cases += [("mixtral-8x7b", 4096), ("deepseek-v3-671b", 4096)]
    for name, length in cases:
        model = hollow(presets.load(name))
        exact = model.training_flops_per_token(length)
        n, active = model.num_params(), model.num_active_params()
        rows.append(
            [
                name,
                f"{length:,}",
                amount(n),
                amount(active),
                f"{6 * active / 1e9:,.2f}",
                f"{exact / 1e9:,.2f}",
                f"{exact / (6 * active):.3f}",
            ]
        )
    header = ["model", "context", "N", "active", "6 · active, GFLOP/token", "exact", "exact / 6 N"]
    return table(header, rows)


@dataclass(frozen=True)
class Published:
    """What a paper says about the training of a model.

    Attributes:
        preset, length, tokens: what was trained, on sequences of which length, on how much.
        flops: of the whole training, as published or following from a published figure per token.
        source: where it stands.
        why: what explains the difference.
        device_hours, peak: hours of devices with so many FLOP/s, for the utilisation that follows; None: not published.
    """

    preset: str
    length: int
    tokens: float
    flops: float | None
    source: str
    why: str
    device_hours: float | None = None
    peak: float = 989.4e12


PUBLISHED = (
    Published(
        "gpt3-175b", 2048, 300e9, 3.14e23, "arXiv 2005.14165, table D.1",
        "theirs is 6 N tokens; ours adds the scores and leaves out the embedding's table, which multiplies nothing",
    ),
    Published(
        "llama-3-70b", 8192, 15e12, None, "tokens and 6.4 million H100 hours: the published model card",
        "no figure of FLOPs; the utilisation follows from the hours",
        device_hours=6.4e6,
    ),
    Published(
        "llama-3.1-405b", 8192, 15.6e12, 3.8e25, "arXiv 2407.21783, section 3.2 and table 4",
        "theirs is 6 N tokens; ours adds the scores over all 8,192 keys (a causal kernel does half of them)",
    ),
    Published(
        "deepseek-v3-671b", 4096, 14.8e12, 250e9 * 14.8e12,
        "250 GFLOP per token at 4,096: arXiv 2505.09343, table 2; 2.664 million H800 hours: arXiv 2412.19437, table 1",
        "ours counts all pairs of positions where a causal count has half; the module that predicts a second token is in neither",
        device_hours=2.664e6,
    ),
)  # fmt: skip


def published() -> str:
    """Whole trainings against what was published."""
    rows = []
    for one in PUBLISHED:
        model = hollow(presets.load(one.preset))
        causal = 3 * (model.flops_per_token(one.length) + model.flops_per_token(0)) / 2
        exact = 3 * model.flops_per_token(one.length)
        total = exact * one.tokens
        theirs = "" if one.flops is None else f"{one.flops:.3g}"
        difference = "" if one.flops is None else f"{total / one.flops - 1:+.1%}"
        used = (
            "" if one.device_hours is None else f"{causal * one.tokens / (one.device_hours * 3600 * one.peak):.0%}"
        )
        rows.append(
            [
                one.preset,
                f"{one.tokens / 1e12:g} T",
                f"{exact / 1e9:,.0f}",
                f"{causal / 1e9:,.0f}",
                f"{total:.3g}",
                theirs,
                difference,
                used,
            ]
        )
    header = [
        "model",
        "tokens",
        "GFLOP/token, all pairs",
        "causal half",
        "FLOPs of the training",
        "published",
        "difference",
        "share of bf16 peak that follows",
    ]
    notes = "\n".join(f"- {one.preset}: {one.source}. Difference: {one.why}." for one in PUBLISHED)
    return f"{table(header, rows)}\n\n{notes}"


def page() -> str:
    """The whole page."""
    return f"""# Resource accounting: the lecture's exercises

Written by `python -m scratchlm.resources.lecture`: nothing was run, every figure comes from the modules of the presets
(`scratchlm model list`) or from a step traced on tensors without memory. FLOPs are those of matrix products, two per multiply and add;
attention counts all length² scores.

## GPT-2, small to XL, and XL with sixteen times the context

Forward pass. As the model grows, the projections and the feed-forward take over from the head; as the context grows, the scores do.

{sizes()}

## What AdamW needs for GPT-2 XL, and the largest batch in 80 GB

fp32 weights, gradients and two moments: 16 bytes per parameter. The peak of a step is a line in the number of sequences; its fixed
part also holds the block of logits of the chunked loss. Context 1,024. `bf16` is autocast: weights stay fp32, their bf16 copies live during the
forward and backward pass. Traced as on CUDA, eager: its fused attention keeps no scores, dropout inside or not.

{memory()}

## 6 N against the exact count

6 N counts a multiply and an add for every parameter, once forward and twice backward. It is too high by the embedding's table, which is
looked up, and too low by the scores, which have no parameters. Of mixtures only the experts a token meets count.

{six_n()}

## Published trainings

{published()}
"""


def main() -> None:
    write_text(PAGE, page())
    print(f"{PAGE.name} written")


if __name__ == "__main__":
    main()
