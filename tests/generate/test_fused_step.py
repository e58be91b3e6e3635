"""One compiled function per token: the logits of the plain forward pass, in fp64 as well, over drawn and over all listed architectures."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
import torch.nn.utils.parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scratchlm.config import GenerateConfig
from scratchlm.errors import UserError
from scratchlm.generate import Generator
from scratchlm.generate import generator as generator_module
from scratchlm.generate.cache import KVCache
from scratchlm.generate.fused_step import _PLAIN, FusedStep, Int8Matrices, fused_step, why_not
from scratchlm.kernels.decode_step import GROUP, quantised_int8, restored_int8
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.linear import Linear
from scratchlm.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from model_variants import VARIANTS

SMALL: dict[str, Any] = {"vocab_size": 61, "context_length": 24, "d_model": 32, "layers": 2, "heads": 4, "d_ff": 40}


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """With gains and everything else away from where they start."""
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


@torch.no_grad()
def read(model: Transformer, ids: Tensor, room: int = 20) -> KVCache:
    cache = KVCache(model.config, 1, room)
    model.hidden(ids, cache=cache)
    cache.advance(ids.shape[1])
    return cache


@torch.no_grad()
def compared(model: Transformer, prompt: int = 5, new: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of tokens that follow a prompt: fused, by the plain pass in the model's dtype, and by full passes in fp64."""
    exact = copy.deepcopy(model).double()
    ids = torch.randint(model.config.vocab_size, (1, prompt + new), generator=torch.Generator().manual_seed(2))
    cache = read(model, ids[:, :prompt])
    step = fused_step(model, cache)
    assert step is not None
    fused = torch.cat([step(int(ids[0, at]), at) for at in range(prompt, prompt + new)])
    assert cache.length == prompt + new and fused.dtype == torch.float32
    other, plain = read(model, ids[:, :prompt]), []
    for at in range(prompt, prompt + new):
        plain.append(model(ids[:, at : at + 1], torch.tensor([[at]]), cache=other)[:, -1])
        other.advance(1)
    return fused.double(), torch.cat(plain).double(), exact(ids)[0, prompt:]


def check(model: Transformer) -> None:
    fused, plain, exact = compared(model)
    allowed = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[model.head.weight.dtype] * (1 + exact.abs().max())
    assert (fused - exact).abs().max() < allowed
    assert (fused - exact).abs().max() < 2 * (plain - exact).abs().max() + 1e-5 * (1 + exact.abs().max())


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1), (3, 3)]),
    head_dim=st.sampled_from([2, 8, 12]),
    choices=st.fixed_dictionaries(
        {
            "norm": st.sampled_from(["rmsnorm", "rmsnorm_noscale", "rmsnorm_unit_offset"]),
            "qk_norm": st.sampled_from(["none", "head"]),
            "feedforward": st.sampled_from(
                ["swiglu", "reglu", "geglu", "geglu_tanh", "glu", "relu", "relu2", "gelu", "gelu_tanh", "silu"]
            ),
            "position": st.sampled_from(["rope", "none"]),
            "tied_embeddings": st.booleans(),
            "attention_scale": st.sampled_from([None, 0.3]),
            "d_ff": st.sampled_from([1, 17, 40]),
        }
    ),
    rope=st.fixed_dictionaries(
        {
            "pairs": st.sampled_from(["half", "interleaved"]),
            "fraction": st.sampled_from([1.0, 0.5]),
            "theta": st.sampled_from([100.0, 1e4]),
        }
    ),
)
def test_drawn_architectures(heads: tuple[int, int], head_dim: int, choices: dict[str, Any], rope: Any) -> None:
    rope = rope if head_dim != 2 else {**rope, "fraction": 1.0}
    sizes = {"heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
    check(model_of(ModelConfig(**{**SMALL, **sizes, **choices, "rope": rope})))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "head", "kv_heads": 2, "tied_embeddings": True}])
def test_in_bf16_it_is_nearer_to_exact_sums_than_the_plain_pass(changes: dict[str, Any]) -> None:
    model = model_of(ModelConfig(**{**SMALL, **changes}), torch.bfloat16)
    check(model)
    fused, plain, exact = compared(model)
    assert (fused - exact).abs().mean() < (plain - exact).abs().mean()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_every_listed_architecture_is_right_or_refused(config: ModelConfig) -> None:
    model = model_of(config)
    if why_not(model) is None:
        check(model)
    else:
        ids = torch.zeros(1, 3, dtype=torch.int64)
        assert fused_step(model, read(model, ids)) is None


def test_some_of_them_are_not_refused() -> None:
    assert sum(why_not(Transformer(config)) is None for config in VARIANTS.values()) >= 10


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block": "parallel"}, "model.block = parallel"),
        ({"norm": "layernorm"}, "model.norm = layernorm"),
        ({"norm_placement": "double"}, "model.norm_placement"),
        ({"qk_norm": "head", "qk_norm_kind": "layernorm"}, "queries and keys normed by layernorm"),
        ({"attention_bias": ["q"]}, "model.attention_bias"),
        ({"feedforward": "swiglu_clamped"}, "model.feedforward"),
        ({"mask": "sliding_window", "window": 4}, "model.mask"),
        ({"position": "alibi"}, "model.position"),
        ({"rope": {"theta": [1e4, 1e6]}}, "positions that differ"),
        ({"moe": {"experts": 4}}, "model.moe.experts = 4"),
        ({"kernels": "reference"}, "model.kernels"),
        ({"layers": 0}, "model.layers = 0"),
    ],
)
def test_what_the_function_does_not_know_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    found = why_not(Transformer(ModelConfig(**{**SMALL, **changes}), seed=0))
    assert found is not None and reason in found


def test_whoever_watches_gets_the_plain_pass() -> None:
    model = model_of(ModelConfig(**SMALL))
    cache = read(model, torch.zeros(1, 3, dtype=torch.int64))
    assert isinstance(fused_step(model, cache), FusedStep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_step(model, cache) is None and why_not(model) == "autocast"
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert why_not(model) == "hooks on its modules"
    everywhere.remove()
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    assert fused_step(model, cache) is None
    hook.remove()
    assert fused_step(model.double(), cache) is None
    model = model.float()
    padded = KVCache(model.config, 1, 8, padding=torch.tensor([1]))
    assert fused_step(model, padded) is None and fused_step(model, KVCache(model.config, 2, 8)) is None
    assert fused_step(model, KVCache(model.config, 1, 8)) is None, "nothing was read yet"


class Adapted(torch.nn.Module):
    """What adapters do: the base's weight is to be had, but the forward pass does more."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 2


class Double(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Other(Transformer):
    def logits(self, hidden: Tensor) -> Tensor:
        return -super().logits(hidden)


def adapted(model: Any) -> None:
    model.blocks[0].attention.output = Adapted(model.blocks[0].attention.output)


def parametrized(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", Double())


def without_a_branch(model: Any) -> None:
    model.blocks[1].feedforward = torch.nn.Identity()


def patched(model: Any) -> None:
    model.norm.forward = lambda x: x


def reshaped(model: Any) -> None:
    model.blocks[0].feedforward.down.weight = torch.nn.Parameter(torch.zeros(32, 8))


def mixed(model: Any) -> None:
    model.blocks[0].attention.qkv.bfloat16()


def transposed(model: Any) -> None:
    weight = model.blocks[0].attention.output.weight
    model.blocks[0].attention.output.weight = torch.nn.Parameter(weight.detach().T.contiguous().T)


@pytest.mark.parametrize("change", [adapted, parametrized, without_a_branch, patched, reshaped, mixed, transposed])
def test_a_model_that_was_changed_is_refused(change: Callable[[Any], None]) -> None:
    model = model_of(ModelConfig(**SMALL))
    assert why_not(model) is None
    change(model)
    assert why_not(model) is not None
    assert why_not(Other(ModelConfig(**SMALL))) == "a model of class Other"


def test_every_field_of_the_model_is_thought_of() -> None:
    """A new one has to be known to the compiled function, refused by it, or listed here as without a say in one token's pass."""
    checked = {"feedforward", "moe", "attention", "mask", "position", "rope", "qk_norm_kind", "layers"}
    computed = {
        "vocab_size",
        "context_length",
        "d_model",
        "heads",
        "kv_heads",
        "head_dim",
        "d_ff",
        "d_ff_ratio",
        "d_ff_multiple",
        "norm_eps",
        "qk_norm_eps",
        "attention_scale",
    }
    computed |= {"tied_embeddings", "final_norm"}
    of_others = {
        "window",
        "mask_block",
        "mask_local_blocks",
        "stride_summary",
        "global_tokens",
        "block_size",
        "stride",
        "prefix_length",
        "latent",
        "linear",
        "value_dim",
    }
    silent = {"attention_kernel", "mtp_depth", "residual_init"} | {
        name for name in ModelConfig.model_fields if name.startswith("init")
    }
    silent |= {name for name in ModelConfig.model_fields if name.endswith("dropout")}
    thought_of = {*_PLAIN, *checked, *computed, *of_others, *silent}
    assert set(ModelConfig.model_fields) - thought_of == set()


def test_memory_that_the_model_gives_up_is_not_read() -> None:
    """A step goes on with the weights it was made for, and sees what is changed in place."""
    model = model_of(ModelConfig(**SMALL))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    step, other = fused_step(model, read(model, ids)), fused_step(model, read(model, ids))
    assert step is not None and other is not None
    before = other(5, 3)
    model.to(torch.float64)
    torch.empty(10**6).fill_(float("nan"))
    torch.testing.assert_close(step(5, 3), before, rtol=0, atol=0)
    model = model_of(ModelConfig(**SMALL))
    step = fused_step(model, read(model, ids))
    assert step is not None
    with torch.no_grad():
        model.head.weight.mul_(2)
    torch.testing.assert_close(step(5, 3), 2 * before, rtol=1e-6, atol=1e-6)


def test_matrices_in_eight_bits_follow_the_weights() -> None:
    matrices, weight = Int8Matrices(), torch.nn.Parameter(torch.randn(4, 8))
    first = matrices.of(weight)
    assert matrices.of(weight) is first
    with torch.no_grad():
        weight.mul_(2)
    assert not torch.equal(matrices.of(weight), first)


def test_in_bf16_a_longer_text_begins_with_the_shorter_one() -> None:
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], special_tokens=["<|endoftext|>"])
    model = model_of(ModelConfig(**{**SMALL, "vocab_size": 257}), torch.bfloat16)
    generator = Generator(model, tokenizer)
    stream = list(generator._tokens([[65, 66]], GenerateConfig(max_tokens=40, stop=[]), set()))
    for count in (1, 2, 3, 20):
        config = GenerateConfig(max_tokens=count, stop=[])
        assert list(generator._tokens([[65, 66]], config, set())) == stream[:count]


def test_beyond_the_cache_and_the_vocabulary_is_an_error() -> None:
    model = model_of(ModelConfig(**SMALL))
    step = fused_step(model, read(model, torch.zeros(1, 3, dtype=torch.int64), room=4))
    assert step is not None
    for token in (-1, 61):
        with pytest.raises(IndexError, match="no such token, slot, or position"):
            step(token, 3)
    with pytest.raises(IndexError, match="no such token, slot, or position"):
        step(1, -1)
    step(60, 3)
    with pytest.raises(IndexError, match="no such token, slot, or position"):
        step(0, 4)


@settings(deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
def test_eight_bits_are_off_by_half_a_step_at_most(rows: int, columns: int, scale: float) -> None:
    weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    numbers, scales = quantised_int8(weight)
    assert numbers.dtype == torch.int8 and int(numbers.abs().max()) <= 127
    assert scales.shape == (rows, -(-columns // GROUP))
    steps = scales.repeat_interleave(GROUP, dim=1)[:, :columns]
    off = (restored_int8(weight) - weight).abs()
    assert bool((off <= 0.5001 * steps).all()) and bool(off.isfinite().all())
    largest = weight.abs().amax(dim=1)
    torch.testing.assert_close(restored_int8(weight).abs().amax(dim=1), largest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{"d_model": 96, "heads": 3}, {"d_ff": 130, "kv_heads": 2, "tied_embeddings": True}]
)
def test_in_eight_bits_it_is_the_model_with_restored_matrices(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(ModelConfig(**{**SMALL, **changes}), dtype)
    ids = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(2))
    matrices = Int8Matrices()
    step = fused_step(model, read(model, ids[:, :5]), matrices)
    assert step is not None
    found = torch.cat([step(int(ids[0, at]), at) for at in range(5, 9)]).double()
    # By definition: the prompt's keys and values by the model's own matrices, all else by the restored ones.
    restored = copy.deepcopy(model)
    embedding = restored.embedding.weight.detach().clone()
    with torch.no_grad():
        for module in restored.modules():
            if isinstance(module, Linear):
                module.weight = torch.nn.Parameter(restored_int8(module.weight))
    restored.embedding.weight = torch.nn.Parameter(embedding)
    cache, wanted = read(model, ids[:, :5]), []
    other = fused_step(restored, cache)
    assert other is not None
    wanted = torch.cat([other(int(ids[0, at]), at) for at in range(5, 9)]).double()
    # bf16 rounds what is restored, the function does not.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * (1 + wanted.abs().max())
    assert (found - wanted).abs().max() < allowed
    assert len(matrices._packed) == 4 * 2 + 1


def test_threads_change_nothing_and_are_not_changed() -> None:
    model = model_of(ModelConfig(**{**SMALL, "d_model": 128, "d_ff": 256}))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            if threads > numba.config.NUMBA_NUM_THREADS:
                pytest.skip("numba has one thread here: OMP_NUM_THREADS or NUMBA_NUM_THREADS says so")
            torch.set_num_threads(threads)
            found.append(compared(model)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_the_generator_writes_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within and beyond the context, where the cache is filled anew; by itself, not in a batch."""
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], special_tokens=["<|endoftext|>"])
    model = model_of(ModelConfig(**{**SMALL, "vocab_size": 300}))  # ids beyond the tokenizer's are never drawn
    generator = Generator(model, tokenizer)
    calls = 0
    step = FusedStep.__call__

    def counted(self: FusedStep, token: int, position: int) -> Tensor:
        nonlocal calls
        calls += 1
        return step(self, token, position)

    monkeypatch.setattr(FusedStep, "__call__", counted)
    texts: list[Callable[[], list[str]]] = [
        lambda: generator.generate("abc", max_tokens=70, temperature=0.0, stop=[]),
        lambda: generator.generate("abc", max_tokens=70, seed=3, stop=[]),
        lambda: ["".join(generator.stream("abc", max_tokens=70, seed=3, stop=[]))],
    ]
    fused = [text() for text in texts]
    written = calls
    # 21 tokens fill the context of 24; then every twelfth token fills the cache anew.
    assert written == 3 * (70 - 1 - 4)
    assert generator.generate(["abc", "de"], max_tokens=64, stop=[]) and calls == written
    assert generator.generate("abc", max_tokens=1, stop=[]) and calls == written
    eight = generator.generate(["abc", "de"], max_tokens=20, stop=[], weights="int8")
    assert calls == written + 2 * 19 and eight[0] == "".join(
        generator.stream("abc", max_tokens=20, stop=[], weights="int8")
    )
    assert generator.generate([], weights="int8") == []
    other = Generator(model_of(ModelConfig(**{**SMALL, "vocab_size": 300, "norm": "layernorm"})), tokenizer)
    for call in (other.generate, other.stream):
        with pytest.raises(
            UserError,
            match=r"int8 is for Llama-like models .* on a CPU, here is model\.norm = layernorm; leave it out",
        ):
            call("abc", weights="int8")
    written = calls
    monkeypatch.setattr(generator_module, "FUSED_FROM", 10**9)
    assert [text() for text in texts] == fused and calls == written
