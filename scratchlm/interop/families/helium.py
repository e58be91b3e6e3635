"""Kyutai's Helium: Llama with interleaved pairs."""

from __future__ import annotations

from scratchlm.interop.families.shared import DROPOUT, LLAMA_WEIGHTS, WIDTHS, gated, grouped, rms_norm, tied
from scratchlm.interop.family import Family
from scratchlm.interop.rope_rules import Rope
from scratchlm.interop.rules import Biases, Custom, Inexpressible, Key, Reading, Values
from scratchlm.model.config import ModelConfig


def _read_width(config: Reading) -> Values:
    """The class gives the heads' output the model's width, whatever ``head_dim`` says."""
    heads, width = config.whole("num_attention_heads"), config.whole("hidden_size")
    head_dim = config.whole("head_dim", default=128)
    if heads * head_dim != width:
        raise config.wrong("head_dim", head_dim, f"{heads} heads of it do not make hidden_size = {width}")
    return {}


def _write_width(model: ModelConfig) -> Values:
    if model.heads * model.resolved_head_dim != model.d_model:
        raise Inexpressible("head_dim")
    return {}


FAMILIES = (
    Family(
        model_type="helium",
        architecture="HeliumForCausalLM",
        title="Helium 1",
        config=(
            *WIDTHS,
            Key("max_position_embeddings", "context_length", default=4096),
            *grouped(kv_heads=20, head_dim=128),
            Custom((), _read_width, _write_width),
            *rms_norm(1e-8),
            gated(),
            Rope(theta=100_000.0, pairs="interleaved"),
            Biases("attention_bias", "qkv"),
            Key("mlp_bias", "feedforward_bias", default=False),
            tied(False),
            DROPOUT,
        ),
        weights=LLAMA_WEIGHTS,
    ),
)
