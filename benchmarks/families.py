# ruff: noqa: E402  (the oracle lies among the tests)
"""How exactly each family of the hub is computed: random models of transformers, read by us, compared in fp64 and fp32.

The cases are those of the tests. Run: ``python benchmarks/families.py [--seeds 5] [--out docs/results/interop]``; then
``python -m scratchlm.interop.document`` puts the figures into docs/interop.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "interop"), str(TESTS)]

import torch
import torch.nn.functional as F
from all_cases import CASES
from transformers_oracle import Case, build, greedy, ids_for, layer_outputs, precision, transformers

from scratchlm.evaluate.environment import describe_environment
from scratchlm.files import write_json
from scratchlm.interop.family import families
from scratchlm.interop.huggingface import open_folder
from scratchlm.interop.weights import places_of, stored
from scratchlm.progress import progress

LENGTH, PROMPT, NEW = 40, 24, 64


def measure(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    """The largest differences of one random model."""
    theirs = build(case, seed, torch.float64)
    theirs.save_pretrained(folder / "fp64")
    ours = open_folder(folder / "fp64").model
    ids = ids_for(ours.config.vocab_size, 2, LENGTH, seed)
    with precision(torch.float64):
        answer = theirs(ids, use_cache=False, output_hidden_states=case.hidden)
        F.cross_entropy(answer.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    own = ours(ids)
    F.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    layers = None
    if case.hidden:
        states = zip(layer_outputs(ours, ids), answer.hidden_states, strict=True)
        layers = max((one - two).abs().max().item() for one, two in states)
    prompts = [row.tolist() for row in ids_for(ours.config.vocab_size, 2, PROMPT, seed + 7)]
    prompts[1] = prompts[1][:9]
    padded = torch.tensor([[0] * (PROMPT - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (PROMPT - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with precision(torch.float64), torch.no_grad():
        written = theirs.generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, PROMPT:]
    equal = (torch.tensor(greedy(ours, prompts, NEW)) == written).sum().item()
    single = build(case, seed, torch.float32)
    single.save_pretrained(folder / "fp32")
    with torch.no_grad():
        fp32 = open_folder(folder / "fp32").model(ids) - single(ids, use_cache=False).logits
    return {
        "logits_fp64": (own - answer.logits).abs().max().item(),
        "layers_fp64": layers,
        "gradients_fp64": gradients(case, theirs, ours),
        "logits_fp32": fp32.abs().max().item(),
        "tokens_equal": equal,
        "tokens": written.numel(),
    }


def gradients(case: Case, theirs: Any, ours: Any) -> float:
    """The largest difference of a gradient, relative to the model's largest entry (some tensors' gradients are zero by nature)."""
    from transformers.core_model_loading import revert_weight_conversion

    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    in_files = revert_weight_conversion(theirs, grads)
    own, worst = stored(ours), 0.0
    for place in places_of(ours, families()[case.model_type].weights):
        grad = getattr(own.get(place.ours), "grad", None)
        if grad is not None and place.theirs in in_files:
            worst = max(worst, (place.take(grad) - in_files[place.theirs]).abs().max().item())
    return worst / max(grad.abs().max().item() for grad in grads.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/interop"))
    options = parser.parse_args()
    results = []
    for case in progress(sorted(CASES, key=lambda case: case.id), description="families", unit="case"):
        found = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(case, seed, Path(folder)))
        row: dict[str, Any] = {"case": case.id, "seeds": options.seeds}
        for key in found[0]:
            values = [one[key] for one in found if one[key] is not None]
            row[key] = (sum(values) if key.startswith("tokens") else max(values)) if values else None
        results.append(row)
    written = {
        "command": f"python benchmarks/families.py --seeds {options.seeds}",
        "environment": describe_environment(0),
        "transformers": transformers.__version__,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "errors.json", written)
    worst = {
        key: max(row[key] or 0.0 for row in results) for key in ("logits_fp64", "gradients_fp64", "logits_fp32")
    }
    print(json.dumps({"cases": len(results), **worst}))


if __name__ == "__main__":
    main()
