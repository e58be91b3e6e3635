# ruff: noqa: E402  (the cases lie among the tests)
"""Speed of prefill and decode, ours against transformers: the same weights, machine, dtype and threads, interleaved in one process.

Every family's random test case is widened to the size asked for and written by `save`; each side opens that folder its own way,
transformers with its default (fused) attention. Prefill reads a prompt and gives the last logits; decode writes greedy tokens one
by one with the cache, both by their forward pass, without the bookkeeping of either's generate(). A round is prefill and decode of
one side, then of the other; the ratio of a round is theirs over ours, in seconds, and medians over rounds are reported.

Run: ``python benchmarks/interop.py [--families llama gpt2] [--dtypes fp32 bf16] [--rounds 7] [--out docs/results/interop]``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "interop"), str(TESTS)]

import torch
from all_cases import CASES
from transformers_oracle import Case, transformers

from scratchlm.errors import UserError
from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json
from scratchlm.generate.cache import KVCache
from scratchlm.interop import load, save
from scratchlm.interop.family import families
from scratchlm.model import ModelConfig, Transformer
from scratchlm.progress import progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def widened(case: Case, options: argparse.Namespace) -> ModelConfig:
    """The case's configuration at the size asked for; its choices stay as they are."""
    arguments = case.draw(random.Random(0))
    values = transformers.AutoConfig.for_model(case.model_type, **arguments).to_dict()
    drawn = families()[case.model_type].read(values, case.id)
    heads = options.d_model // 64
    kv_heads = {True: heads, False: max(1, heads // 4)}[drawn.resolved_kv_heads == drawn.heads]
    kv_heads = 1 if drawn.resolved_kv_heads == 1 else kv_heads
    width: dict[str, Any] = {
        "vocab_size": options.vocab,
        "context_length": 1024,
        "d_model": options.d_model,
        "layers": options.layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 64,
        "d_ff": 4 * options.d_model,
        "window": 128,
        "attention_scale": drawn.attention_scale if drawn.attention_scale in (None, 1.0) else 0.125,
    }
    fields = drawn.model_dump() | width
    fields["rope"] |= {"scaling": ("none",), "factor": 1.0, "original_context": None, "attention_factor": None}
    fields["rope"]["fraction"] = max(2, 2 * round(drawn.rope.fraction * 32)) / 64  # a share that 64 dimensions have
    if "mla" in drawn.attention:
        fields |= {"kv_heads": None, "attention_scale": None}
        fields["latent"] |= {"kv_rank": 128, "q_rank": 192 if drawn.latent.q_rank else None, "rope_dim": 32}
        fields["latent"] |= {"value_dim": 64}
    if drawn.moe.experts:
        fields["moe"] |= {"experts": 8, "top_k": 2, "d_expert": options.d_model, "first_dense": 0, "every": 1}
        fields["moe"] |= {"groups": 1, "top_groups": None}
        fields["moe"] |= {"d_shared": options.d_model if drawn.moe.d_shared else None}
    return ModelConfig(**fields)


def has_cache(model: Any) -> bool:
    """Whether transformers keeps keys and values for this model."""
    return "past_key_values" in model(torch.ones(1, 2, dtype=torch.long))


class Ours:
    """A model of ours, a prompt, and its cache."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)[0]

    def prefill(self, ids: torch.Tensor, room: int) -> torch.Tensor:
        self.cache = KVCache(self.model.config, 1, ids.shape[1] + room)
        return self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model.logits(self.model.hidden(ids, cache=self.cache)[:, -1])
        self.cache.advance(ids.shape[1])
        return logits.argmax(-1, keepdim=True)

    def decode(self, token: torch.Tensor, count: int) -> list[int]:
        written = []
        for _ in range(count):
            written.append(int(token))
            token = self._forward(token)
        return written


class Theirs:
    """The same of transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.config.use_cache = True
        parameters = inspect.signature(self.model.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        self.caches = has_cache(self.model)

    def prefill(self, ids: torch.Tensor, room: int) -> torch.Tensor:
        self.cache, self.read = None, ids[:, :0]
        return self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        more: dict[str, Any] = {"logits_to_keep": 1} if self.keeps else {}
        if self.caches:
            more |= {"past_key_values": self.cache, "use_cache": True}
        else:  # GPT has no cache there: it reads everything again
            ids = self.read = torch.cat([self.read, ids], dim=1)
        answer = self.model(ids, **more)
        self.cache = answer.past_key_values if self.caches else None
        return answer.logits[:, -1].argmax(-1, keepdim=True)

    decode = Ours.decode


@torch.no_grad()
def compare(case: Case, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides on one model."""
    config = widened(case, options)
    model = Transformer(config, seed=0)
    ids = torch.randint(0, config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model", family=case.model_type, dtype=dtype)
        sides = {"ours": Ours(Path(folder) / "model"), "theirs": Theirs(Path(folder) / "model", DTYPES[dtype])}
    seconds: dict[str, list[float]] = {f"{side}_{what}": [] for side in sides for what in ("prefill", "decode")}
    first: dict[str, list[int]] = {}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, side in sides.items():
            start = time.perf_counter()
            token = side.prefill(ids, options.tokens + 1)
            middle = time.perf_counter()
            written = side.decode(token, options.tokens)
            end = time.perf_counter()
            if round_:
                seconds[f"{name}_prefill"].append(middle - start)
                seconds[f"{name}_decode"].append(end - middle)
            first[name] = written
    row: dict[str, Any] = {"case": case.id, "dtype": dtype, "parameters": model.num_params()}
    for what, count in (("prefill", options.prompt), ("decode", options.tokens)):
        ratios = [
            theirs / ours for theirs, ours in zip(seconds[f"theirs_{what}"], seconds[f"ours_{what}"], strict=True)
        ]
        for side in sides:
            row[f"{side}_{what}_tokens_per_second"] = count / statistics.median(seconds[f"{side}_{what}"])
        row[f"{what}_ratio"] = statistics.median(ratios)
        row[f"{what}_ratio_spread"] = [min(ratios), max(ratios)]
    row["same_first_tokens"] = next(
        (i for i, pair in enumerate(zip(first["ours"], first["theirs"], strict=True)) if pair[0] != pair[1]),
        options.tokens,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", nargs="*", default=None, help="cases, such as llama; none: one of every family"
    )
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for speed.json; none: only print")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen: dict[str, Case] = {}
    for case in CASES:
        if options.families is None or case.id in options.families or case.model_type in options.families:
            chosen.setdefault(case.model_type if options.families is None else case.id, case)
    results = []
    work = [(case, dtype) for case in chosen.values() for dtype in options.dtypes]
    for case, dtype in progress(work, description="speed", unit="model"):
        try:
            row = compare(case, dtype, options)
        except UserError as error:  # the family has no model of this size
            print(f"{case.id}: left out ({error})", flush=True)
            continue
        results.append(row)
        print(
            f"{row['case']:<24} {dtype}  prefill × {row['prefill_ratio']:.2f}  decode × {row['decode_ratio']:.2f}  "
            f"(ours {row['ours_prefill_tokens_per_second']:,.0f} and {row['ours_decode_tokens_per_second']:,.0f} tokens/s)",
            flush=True,
        )
    written = {
        "command": " ".join(["python", "benchmarks/interop.py", *sys.argv[1:]]),
        "environment": describe_environment(0),
        "transformers": transformers.__version__,
        "results": results,
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "speed.json", written)
    ratios = {
        f"{what}_{dtype}": statistics.median([row[f"{what}_ratio"] for row in results if row["dtype"] == dtype])
        for what in ("prefill", "decode")
        for dtype in options.dtypes
    }
    worst = min(results, key=lambda row: min(row["prefill_ratio"], row["decode_ratio"]))
    print(json.dumps({"models": len(results), **ratios, "worst": worst["case"]}))


if __name__ == "__main__":
    main()
