"""Writing one token at a time: ours beside transformers' generate, the same weights, in one process, in turns.

    python benchmarks/generate.py --threads 1 --rounds 5 --out docs/results/generate

Per shape and dtype: prefill (a prompt of 256 tokens, logits after the last), and decode (128 greedy tokens after 16). Ours is the generator's own loop, once with one
compiled function per token (what it takes by itself) and once by plain forward passes; theirs is ``generate`` with its cache, and its forward pass
alone with the cache in a loop. Matrices are put into 8 bits once, outside the clock. In fp32 the texts are compared token by token. The share of bandwidth is bytes of weights read per second over what
summing a large tensor reads. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import scratchlm.generate.generator as generator_module
from scratchlm.config import GenerateConfig
from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json
from scratchlm.generate import Generator
from scratchlm.generate.cache import KVCache
from scratchlm.generate.fused_step import Int8Matrices
from scratchlm.interop.huggingface import open_folder
from scratchlm.progress import progress
from scratchlm.tokenizer import Tokenizer

SHAPES = {"6M": (256, 4), "27M": (512, 6), "85M": (768, 10)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB, CONTEXT, PROMPT, SHORT, NEW = 10_000, 512, 256, 16, 128


def llama(d_model: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=d_model,
        intermediate_size=-(-8 * d_model // (3 * 64)) * 64,
        num_hidden_layers=layers,
        num_attention_heads=d_model // 64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,  # logits far enough apart that rounding decides nothing
    )
    return LlamaForCausalLM(config).eval()


def generator_of(model: Any) -> Generator:
    """Ours with a tokenizer of as many ids, of which only the ids are used."""
    vocab = {number: number.to_bytes(2, "big") if number > 255 else bytes([number]) for number in range(VOCAB)}
    return Generator(model, Tokenizer(vocab, []))


def seconds(go: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = go()
    return time.perf_counter() - start, found


def read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MB, the best of ten."""
    x = torch.ones(64 * 2**20)
    return x.numel() * 4 / min(seconds(x.sum)[0] for _ in range(10))


@torch.no_grad()
def contenders(folder: Path, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = open_folder(folder).model.to(dtype).eval()
    generator = generator_of(ours)
    ids = torch.randint(VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    short = ids[:, :SHORT]
    greedy = GenerateConfig(max_tokens=NEW, temperature=0.0, stop=[])

    @torch.no_grad()
    def our_prefill() -> Any:
        cache = KVCache(ours.config, 1, CONTEXT)
        return ours.logits(ours.hidden(ids, cache=cache)[:, -1])

    def our_decode(fused: bool, matrices: Int8Matrices | None = None) -> list[int]:
        generator_module.FUSED_FROM = 1 if fused else 10**9
        return [step[0][1] for step in generator._tokens([short[0].tolist()], greedy, set(), matrices)]

    eight = Int8Matrices()

    @torch.no_grad()
    def their_prefill() -> Any:
        return theirs(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def their_generate() -> list[int]:
        mask = torch.ones_like(short)
        out = theirs.generate(
            short, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return list(out[0, SHORT:].tolist())

    @torch.no_grad()
    def their_loop() -> list[int]:
        cache, given, found = DynamicCache(config=theirs.config), short, []
        for _ in range(NEW):
            logits = theirs(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            given = logits[:, -1:].argmax(-1)
            found.append(int(given))
        return found

    return {
        "prefill": {"scratchlm": our_prefill, "transformers": their_prefill},
        "decode": {
            "scratchlm": lambda: our_decode(True),
            "scratchlm, int8": lambda: our_decode(True, eight),
            "scratchlm, plain passes": lambda: our_decode(False),
            "transformers": their_generate,
            "transformers, forward alone": their_loop,
        },
    }


def quality(run: Path, data: Path) -> dict[str, float]:
    """Perplexity of a run on the held-out text of its data folder, in fp32, before and after its matrices went through 8 bits."""
    from scratchlm.config import EvaluateConfig
    from scratchlm.data.tokens import TokenData
    from scratchlm.evaluate.evaluation import evaluate_tokens
    from scratchlm.interop import load
    from scratchlm.kernels.decode_step import restored_int8
    from scratchlm.model.linear import Linear

    model, tokenizer = load(run)
    tokens = TokenData.open(data, tokenizer).split("validation")

    def perplexity() -> float:
        return evaluate_tokens(model, tokens, EvaluateConfig(), precision="fp32", show_progress=False).perplexity

    own = perplexity()
    for module in model.modules():
        if isinstance(module, Linear):  # a tied embedding stays as it is
            module.weight = torch.nn.Parameter(restored_int8(module.weight))
    eight = perplexity()
    return {"own": own, "int8": eight, "cost": eight / own - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--quality", nargs=2, type=Path, metavar=("RUN", "DATA"), help="also: what int8 costs this run"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = []
    cases = [(shape, dtype) for shape in given.shapes for dtype in given.dtypes]
    for shape, dtype in progress(cases, description="generate", unit="case", total=len(cases)):
        with tempfile.TemporaryDirectory() as place:
            model = llama(*SHAPES[shape])
            model.save_pretrained(place)
            size = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
            found = contenders(Path(place), DTYPES[dtype])
            texts = {name: go() for name, go in found["decode"].items()}  # and warm everything up
            times: dict[str, dict[str, list[float]]] = {
                what: {name: [] for name in one} for what, one in found.items()
            }
            for _ in range(given.rounds):
                for what, one in found.items():
                    for name, go in one.items():
                        times[what][name].append(seconds(go)[0])
        tokens = {"prefill": PROMPT, "decode": NEW}
        rates = {
            what: {name: tokens[what] / statistics.median(spent) for name, spent in one.items()}
            for what, one in times.items()
        }
        bandwidth = read_bandwidth()
        results.append(
            {
                "shape": shape,
                "dtype": dtype,
                "matrix_parameters": size,
                "tokens_per_second": rates,
                "spread": {
                    what: {
                        name: [tokens[what] / max(spent), tokens[what] / min(spent)] for name, spent in one.items()
                    }
                    for what, one in times.items()
                },
                "times_as_fast": {
                    what: {
                        name: statistics.median(b / a for a, b in zip(times[what]["scratchlm"], spent, strict=True))
                        for name, spent in one.items()
                    }
                    for what, one in times.items()
                },
                "share_of_bandwidth": rates["decode"]["scratchlm"] * size * DTYPES[dtype].itemsize / bandwidth,
                "read_bandwidth": bandwidth,
                "equal_tokens": {
                    name: sum(a == b for a, b in zip(text, texts["scratchlm"], strict=True))
                    for name, text in texts.items()
                },
            }
        )
        print(shape, dtype, {n: round(r) for n, r in rates["decode"].items()}, file=sys.stderr)
    import transformers

    report = {
        "benchmark": "generate",
        "command": "python benchmarks/generate.py " + " ".join(sys.argv[1:]),
        "environment": describe_environment(),
        "transformers": transformers.__version__,
        "threads": given.threads,
        "new_tokens": NEW,
        "results": results,
    }
    if given.quality is not None:
        report["perplexity"] = quality(*given.quality)
    if given.out is not None:
        write_json(given.out / f"generate-{given.threads}.json", report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
