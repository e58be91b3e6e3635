"""The README of a saved model: what it is and how to open it, from its own fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scratchlm.model.config import ModelConfig
from scratchlm.section import Section

if TYPE_CHECKING:
    from scratchlm.model.transformer import Transformer
    from scratchlm.tokenizer import Tokenizer

_WIDTHS = ("vocab_size", "context_length", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff")

_OPEN = {
    "scratchlm": """\
from scratchlm.interop import load

model, tokenizer = load("path/of/this/folder")""",
    "standalone": """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", trust_remote_code=True)""",
}
_OPEN_FAMILY = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")"""

_FILES = {
    "config.json": "the fields above, and those that are at their defaults",
    "model.safetensors": "the weights, by the names of the model's modules",
    "tokenizer.json": "the tokenizer, in Hugging Face's format",
    "optimizer.safetensors": "of a checkpoint in training: moments and random states",
    "state.json": "of a checkpoint in training: step, place in the data, best loss",
}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def _set_fields(section: Section, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, value, description) of every field that is not at its default."""
    rows = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            rows += _set_fields(value, f"{prefix}{name}.")
        elif value != field.default and prefix + name not in _WIDTHS:
            rows.append((prefix + name, _shown(value), field.description or ""))
    return rows


def card(model: Transformer, tokenizer: Tokenizer | None = None, family: str = "scratchlm") -> str:
    """Markdown: how to open the folder, the model's widths and choices with what each field means, the tokenizer.

    Args:
        model: the model that is saved.
        tokenizer: the one beside it.
        family: ``scratchlm``, ``standalone``, or the family of the hub it is written as.
    """
    config = model.config
    resolved = {
        "kv_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
        "d_ff": config.resolved_d_ff,
    }
    rows = [
        (name, _shown(resolved.get(name, getattr(config, name))), ModelConfig.model_fields[name].description or "")
        for name in _WIDTHS
    ]
    total, active = model.num_params(), model.num_active_params()
    lines = [
        "---",
        f"library_name: {'scratchlm' if family == 'scratchlm' else 'transformers'}",
        "pipeline_tag: text-generation",
        "---",
        "# A language model written by ScratchLM",
        "",
        f"{total:,} parameters" + (f", {active:,} of them active for a token." if active != total else "."),
        "",
        "```python",
        _OPEN.get(family, _OPEN_FAMILY),
        "```",
        "",
        "| field | value | meaning |",
        "|---|---|---|",
        *(f"| `{name}` | {value} | {text.replace('|', '¦')} |" for name, value, text in rows + _set_fields(config)),
    ]
    if tokenizer is not None:
        special = ", ".join(f"`{name}`" for name in tokenizer.special_tokens) or "none"
        lines += [
            "",
            f"The tokenizer is byte-level BPE with {tokenizer.vocab_size:,} tokens; special tokens: {special}.",
        ]
    if family == "scratchlm":
        lines += ["", "| file | content |", "|---|---|", *(f"| {name} | {text} |" for name, text in _FILES.items())]
    return "\n".join(lines) + "\n"
