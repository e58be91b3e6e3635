"""GPT-2 without biases, as nanoGPT has it, written plainly: what a from-scratch user would run, to compare with.

As a program it is nanoGPT's recipe for tiny Shakespeare, by its README and its config file: ``gpt2_style.py TEXT cpu|cuda THREADS SEED``. It prints,
as one JSON line, the loss on the whole of the held-out text, and on a GPU the lowest estimate on the way, with the seconds since the start when it was made:
that is what its README quotes, since there the model goes on to learn the text by heart. Whoever calls it looks at the clock.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BORN = time.perf_counter()


class Block(nn.Module):
    """Causal attention and a feed-forward with GELU, a LayerNorm before each."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, d // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(d, dim=2)
        )
        share = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=share, is_causal=True)
        x = x + F.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, d)), share)
        return x + F.dropout(self.down(F.gelu(self.up(self.ln_2(x)))), share)


class GPT(nn.Module):
    """Learned positions, LayerNorm, tied head; weights drawn as GPT-2's."""

    def __init__(self, vocab: int, context: int, d: int, layers: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(Block(d, heads, dropout) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(d, bias=False), nn.Linear(d, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_a_branch = name.endswith(("c_proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if ends_a_branch else 1))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.dropout(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


@dataclass(frozen=True)
class Shakespeare:
    """nanoGPT's recipe; the defaults are those for a CPU."""

    layers: int = 4
    heads: int = 4
    d: int = 128
    context: int = 64
    batch: int = 12
    dropout: float = 0.0
    steps: int = 2000
    warmup: int = 100
    lr: float = 1e-3
    last_lr: float = 1e-4
    every: int = 250
    estimates: int = 20
    compile: bool = False

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        share = (step - self.warmup) / (self.steps - self.warmup)
        return self.last_lr + 0.5 * (1 + math.cos(math.pi * share)) * (self.lr - self.last_lr)


RECIPES = {
    "cpu": Shakespeare(),
    "cuda": Shakespeare(6, 6, 384, 256, 64, 0.2, steps=5000, estimates=200, compile=True),
}


def shakespeare(text: str, device: str, seed: int) -> dict[str, float]:
    """Train on the first 90 % of the characters; the loss on all of the others, in nats per character."""
    torch.manual_seed(seed)
    recipe = RECIPES[device]
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    cut = int(len(text) * 0.9)
    parts = ids[:cut], ids[cut:]
    model = GPT(len(numbers), recipe.context, recipe.d, recipe.layers, recipe.heads, recipe.dropout).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=device == "cuda" or None)
    run = torch.compile(model) if recipe.compile else model
    computing = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")

    def batch(part: Tensor) -> tuple[Tensor, ...]:
        places = torch.randint(len(part) - recipe.context, (recipe.batch,))
        pair = (torch.stack([part[at + next_ : at + next_ + recipe.context] for at in places]) for next_ in (0, 1))
        if device == "cpu":
            return tuple(pair)
        return tuple(x.pin_memory().to(device, non_blocking=True) for x in pair)

    best = math.inf, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for step in range(recipe.steps + 1):
            if step % recipe.every == 0:  # as it does: estimates of both losses, and a checkpoint
                model.eval()
                with torch.no_grad(), computing:
                    losses = [
                        sum(float(run(*batch(part))) for _ in range(recipe.estimates)) / recipe.estimates
                        for part in parts
                    ]
                model.train()
                best = min(best, (losses[1], time.perf_counter() - BORN))
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, Path(folder) / "ckpt.pt")
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            with computing:
                loss = run(*batch(parts[0]))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    held = parts[1][: (len(parts[1]) - 1) // recipe.context * recipe.context + 1].to(device)
    with torch.no_grad():
        found = float(model(held[:-1].view(-1, recipe.context), held[1:].view(-1, recipe.context)))
    return {"loss": found, "best_estimate": best[0], "seconds_to_best": best[1]}


if __name__ == "__main__":
    path, device, threads, seed = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(shakespeare(Path(path).read_text(encoding="utf-8"), device, int(seed))))
