"""transformers' models as oracles: small, random, of unusual values, and in true float64 where that is asked for."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scratchlm.generate.cache import KVCache
from scratchlm.model import Transformer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Double(TorchFunctionMode):
    """Whoever asks for fewer bits gets float64: transformers computes norms, softmaxes and angles in fp32 whatever the
    model's dtype, which would hide differences below 1e-6."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half):
            func = torch.Tensor.double
        if kwargs.get("dtype") in NARROW:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(arg, torch.dtype) and arg in NARROW else arg for arg in args)
        return func(*args, **kwargs)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """What is built and computed here is of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Double() if dtype == torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Case:
    """How a family's models are drawn.

    Attributes:
        model_type: the family.
        draw: random numbers → arguments of its configuration class.
        title: further words, where a family has several cases.
        hidden: whether transformers reports the hidden states of its layers.
        tolerance: largest difference of float64 logits.
    """

    model_type: str
    draw: Callable[[random.Random], dict[str, Any]]
    title: str = ""
    hidden: bool = True
    tolerance: float = 1e-9

    @property
    def id(self) -> str:
        return f"{self.model_type}{'-' + self.title if self.title else ''}"


def build(case: Case, seed: int, dtype: torch.dtype) -> Any:
    """A random model of transformers: no norm is 1, no bias 0, logits are of the order of 1."""
    arguments = case.draw(random.Random(seed))
    with precision(dtype):
        config = transformers.AutoConfig.for_model(case.model_type, **arguments)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # the others know no float64
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.to(dtype)
        randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Fill every parameter and every saved buffer."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters()]
    saved = set(model.state_dict())
    named += [
        (name, buffer) for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()
    ]
    for name, tensor in named:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if any(part in name for part in ("inv_freq", "original_inv_freq")):
            continue
        if tensor.ndim == 1 or "norm" in name or ".ln" in name:
            # (a norm of gain 1 + w starts from zeros)
            centre = 1.0 if name.endswith("weight") and "bias" not in name and tensor.any() else 0.0
            tensor.copy_(centre + 0.3 * noise)
        else:
            tensor.copy_(noise * 1.2 * tensor.shape[-1] ** -0.5)


def ids_for(vocab: int, batch: int, length: int, seed: int) -> Tensor:
    """Random token ids, (batch, length)."""
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def layer_outputs(model: Transformer, ids: Tensor) -> list[Tensor]:
    """Our residual stream after the embedding and after each layer, the last one normed, as transformers reports it."""
    context = model.context(ids)
    x = model.embed(ids)
    states = [x]
    for block in model.blocks:
        x = block(x, context)
        states.append(x)
    states[-1] = model.norm(x)
    return states


@torch.no_grad()
def greedy(model: Transformer, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The next `count` tokens of each prompt with the cache, shorter prompts padded on the left."""
    length = max(map(len, prompts))
    padding = torch.tensor([length - len(prompt) for prompt in prompts])
    cache = KVCache(model.config, len(prompts), length + count, torch.device("cpu"), padding=padding)
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    positions = (torch.arange(length) - padding[:, None]).clamp(min=0)
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(count):
        logits = model(ids, positions, cache=cache)[:, -1]
        cache.advance(ids.shape[1])
        ids = logits.argmax(-1, keepdim=True)
        positions = positions[:, -1:] + 1
        for row, token in enumerate(ids[:, 0].tolist()):
            written[row].append(token)
    return written


def save(model: Any, folder: Path) -> None:
    """As transformers writes it."""
    model.save_pretrained(folder)


def reload(folder: Path, dtype: torch.dtype) -> Any:
    """What transformers makes of a folder; it must find every tensor, and none too many."""
    with precision(dtype):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()


def contents(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
