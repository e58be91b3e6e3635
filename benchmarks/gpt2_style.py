"""GPT-2 without biases, as nanoGPT has it, written plainly: what a from-scratch user would run, to compare with.

As a program it is nanoGPT's recipe for tiny Shakespeare on a CPU, by its README and its config file: ``gpt2_style.py TEXT THREADS [SEED]``. It prints,
as one JSON line, the loss on the whole of the held-out text; whoever calls it looks at the clock.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention and a feed-forward with GELU, a LayerNorm before each."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, d // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(d, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, d))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """Learned positions, LayerNorm, tied head; weights drawn as GPT-2's."""

    def __init__(self, vocab: int, context: int, d: int, layers: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(d, bias=False), nn.Linear(d, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_a_branch = name.endswith(("c_proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if ends_a_branch else 1))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


STEPS, BATCH, CONTEXT, WARMUP, EVERY, ESTIMATES = 2000, 12, 64, 100, 250, 20
LR, LAST_LR = 1e-3, 1e-4


def rate(step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < WARMUP:
        return LR * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return LAST_LR + 0.5 * (1 + math.cos(math.pi * share)) * (LR - LAST_LR)


def shakespeare(text: str, seed: int) -> float:
    """Train on the first 90 % of the characters; the loss on all of the others, in nats per character."""
    torch.manual_seed(seed)
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    cut = int(len(text) * 0.9)
    parts = ids[:cut], ids[cut:]
    model = GPT(len(numbers), CONTEXT, 128, layers=4, heads=4)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))

    def batch(part: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.randint(len(part) - CONTEXT, (BATCH,))
        return tuple(torch.stack([part[at + next_ : at + next_ + CONTEXT] for at in places]) for next_ in (0, 1))  # type: ignore[return-value]

    with tempfile.TemporaryDirectory() as folder:
        for step in range(STEPS + 1):
            if step % EVERY == 0:  # as it does: estimates of both losses, and a checkpoint
                with torch.no_grad():
                    for part in parts:
                        sum(float(model(*batch(part))) for _ in range(ESTIMATES))
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, Path(folder) / "ckpt.pt")
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            model(*batch(parts[0])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    held = parts[1][: (len(parts[1]) - 1) // CONTEXT * CONTEXT + 1]
    with torch.no_grad():
        return float(model(held[:-1].view(-1, CONTEXT), held[1:].view(-1, CONTEXT)))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    loss = shakespeare(Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    print(json.dumps({"loss": loss}))
