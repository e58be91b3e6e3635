"""docs/architecture.md says what the code does: every choice, every field, formulas, figures, sentences, pictures."""

from __future__ import annotations

import ast
import inspect
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, choices, legality
from scratchlm.model.draw import document
from scratchlm.model.draw.document import BASE, REFUSED, costs_of, example, examples, filled, pictures, refusal_of
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.draw.masks import allowed_pairs
from scratchlm.section import field_paths

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
BY_HAND = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", PAGE, flags=re.DOTALL)


def tables() -> list[list[list[str]]]:
    """Every table written by hand: rows of cells, the header first."""
    found = []
    for text in re.findall(r"(?:^\|.*\|\n)+", BY_HAND, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        found.append([row for row in rows if not set("".join(row)) <= set(" -:")])
    return found


def rows_of(axis: str, column: str | None = None) -> dict[str, list[str]]:
    """name → its row in the first table of an axis (that has `column`)."""
    for header, *rows in tables():
        if header[0] == f"`{axis}`" and (column is None or column in header):
            return {row[0].strip("`"): row for row in rows}
    raise AssertionError(f"no table of {axis}")


def column_of(axis: str, column: str) -> dict[str, str]:
    """name → its cell in a column."""
    header = next(rows[0] for rows in tables() if rows[0][0] == f"`{axis}`" and column in rows[0])
    return {name: row[header.index(column)] for name, row in rows_of(axis, column).items()}


def value(formula: str, letters: dict[str, float]) -> float:
    """What a formula of the page comes to."""
    python = formula.replace("·", "*").replace("−", "-").replace("²", "**2")
    return float(eval(python, {"__builtins__": {}}, letters))


def letters_of(config: ModelConfig, length: int) -> dict[str, float]:
    latent, linear = config.latent, config.linear
    return {
        "d": config.d_model,
        "h": config.heads,
        "h_kv": config.resolved_kv_heads,
        "d_h": config.resolved_head_dim,
        "f": config.resolved_d_ff,
        "n": length,
        "s": length,
        "c": linear.chunk,
        "w": linear.conv_width,
        "r": latent.kv_rank,
        "d_R": latent.rope_dim,
        "d_v": config.resolved_value_dim,
        **{
            field: getattr(config, field)
            for field in ("window", "stride", "stride_summary", "mask_block", "mask_local_blocks", "global_tokens")
        },
        "prefix": config.prefix_length,
    }


OTHER: tuple[dict[str, Any], ...] = (
    {},
    {
        "d_model": 96,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 24,
        "d_ff": 200,
        "linear": {"chunk": 32, "conv_width": 3},
    },
)


def test_every_value_of_every_axis_has_a_row() -> None:
    for axis in choices.AXES:
        rows = rows_of(axis.axis)
        assert list(rows) == list(axis.names), axis.axis
        assert all(row[1] for row in rows.values()), axis.axis


def test_sources_are_arxiv_numbers_or_names() -> None:
    for header, *rows in tables():
        if "source" in header:
            cells = [row[header.index("source")] for row in rows]
            assert all(re.match(r"(\d{4}\.\d{4,5}|[A-Z]|$)", cell) for cell in cells)
            assert sum(bool(cell) for cell in cells) >= 0.6 * len(cells)
    for month in re.findall(r"\b(\d{4})\.\d{4,5}\b", BY_HAND):
        assert 7 <= int(month[:2]) <= 26 and 1 <= int(month[2:]) <= 12


def test_every_field_is_named() -> None:
    def leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
        paths = set(field_paths(section))
        return [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]

    code = set(re.findall(r"`([\w.]+)`", BY_HAND)) | {"kernels"} & set(re.findall(r"`(kernels) =", BY_HAND))
    assert not [field for field in leaves(ModelConfig) if field not in code]


def test_what_the_code_writes_is_up_to_date() -> None:
    assert filled(PAGE) == PAGE, "run python -m scratchlm.model.draw"
    with pytest.raises(UserError, match="costs"):
        filled("a page without marks")


def test_the_example_table_has_every_choice_and_real_counts() -> None:
    shown = dict(examples())
    assert {f"{axis.axis} = {name}" for axis in choices.AXES for name in axis.names} <= set(shown)
    table = document.cost_table()
    for axis in choices.AXES:
        lines = [line for line in table.splitlines() if line.startswith(f"| `{axis.axis}` = ")]
        listed = [name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1].split(" = ")[1])]
        assert sorted(listed) == sorted(axis.names)
    config = shown["attention = mla"]
    small = config.model_copy(update={"vocab_size": 64, "context_length": 32})
    from scratchlm.model import Transformer

    built = Transformer(small, seed=0)
    counted = sum(p.numel() for p in {id(p): p for p in built.parameters()}.values())
    assert costs_of(small)[0] == counted
    assert costs_of(small)[3] == 2 * 4 * (128 + 32)


@pytest.mark.parametrize("other", OTHER, ids=["base", "other widths"])
def test_formulas_of_attention(other: dict[str, Any]) -> None:
    length = 256
    columns = ("parameters", "FLOPs", "cache, numbers per token", "state, numbers")
    cells = {column: column_of("attention", column) for column in columns}
    for name in choices.ATTENTION.names:
        changes = {key: entry for key, entry in other.items() if not (name == "mla" and key == "kv_heads")}
        config = ModelConfig(**{**BASE, **changes, "attention": name})
        layer: Any = hollow(config).blocks[0].attention
        letters = letters_of(config, length)

        def meant(column: str, letters: dict[str, float] = letters, name: str = name) -> float:
            formula = cells[column][name].replace("retention's", f"({cells[column]['retention']})")
            return value(formula, letters)

        letters["parameters"] = meant("parameters")
        found = (
            layer.num_params(),
            layer.flops_per_token(length),
            layer.cache_widths(config),
            layer.state_size(config),
        )
        assert found == tuple(meant(column) for column in columns), name


@pytest.mark.parametrize("other", OTHER, ids=["base", "other widths"])
def test_formulas_of_norms_feedforward_and_residual(other: dict[str, Any]) -> None:
    for axis, column in (
        ("norm", "parameters per norm"),
        ("qk_norm", "parameters"),
        ("residual", "parameters"),
        ("feedforward", "parameters"),
    ):
        for name, formula in column_of(axis, column).items():
            config = ModelConfig(**{**BASE, **other, axis: name})
            block: Any = hollow(config).blocks[0]
            attention = block.attention
            found = {
                "norm": lambda block=block: block.attention_norm.num_params(),
                "qk_norm": lambda a=attention: a.q_norm.num_params() + a.k_norm.num_params(),
                "residual": lambda b=block: b.attention_scale.num_params() + b.feedforward_scale.num_params(),
                "feedforward": lambda b=block: b.feedforward.num_params(),
            }[axis]()
            assert found == value(formula, letters_of(config, 1)), f"{axis} = {name}"
            if axis == "feedforward":
                assert block.feedforward.flops_per_token(1) == 2 * found
    for name, count in column_of("norm_placement", "norms per block").items():
        norms = hollow(ModelConfig(**{**BASE, "norm_placement": name})).blocks[0]
        assert _norms(norms) == int(count), name


def _norms(block: Any) -> int:
    names = ("attention_norm", "attention_post_norm", "feedforward_norm", "feedforward_post_norm")
    return sum(getattr(block, name).num_params() > 0 for name in names)


def test_scores_of_masks_on_long_sequences() -> None:
    length = 4096
    sizes = {"window": 100, "stride": 64, "stride_summary": 4, "mask_block": 32, "mask_local_blocks": 3}
    config = ModelConfig(**{**BASE, **sizes, "global_tokens": 20, "prefix_length": 1000})
    for name, formula in column_of("mask", "scores, long sequences").items():
        rule = choices.MASK.get(name).of(config)
        found = allowed_pairs(rule, length, config.prefix_length if name == "prefix_lm" else 0)
        assert found == pytest.approx(value(formula, letters_of(config, length)), rel=0.03), name


def test_experts_predictions_and_heads_as_said() -> None:
    assert "E · w + d · E parameters, of which k · w + d · E work for a token; FLOPs 2 · (k · w + d · E)" in BY_HAND
    for feedforward, matrices in (("swiglu", 3), ("relu2", 2)):
        moe = {"experts": 6, "top_k": 2, "fine_grained": 4, "shared": 1, "shared_gate": True, "router_bias": True}
        config = ModelConfig(**{**BASE, "feedforward": feedforward, "moe": moe})
        mixture: Any = hollow(config).blocks[0].feedforward
        d, experts, k = config.d_model, 24, 8
        w = matrices * d * (config.resolved_d_ff // 4)
        shared = w + d
        assert mixture.num_params() == experts * w + d * experts + experts + shared
        assert mixture.num_active_params() == k * w + d * experts + experts + shared
        assert mixture.flops_per_token(8) == 2 * (k * w + d * experts + shared)
    model: Any = hollow(ModelConfig(**{**BASE, "mtp_depth": 1}))
    assert "per module 2 · d² + 3 norms + a block" in BY_HAND
    assert model.predictions[0].num_params() == 2 * 512**2 + 3 * 512 + model.blocks[0].num_params()
    fewer = costs_of(ModelConfig(**BASE))[0] - costs_of(ModelConfig(**{**BASE, "tied_embeddings": True}))[0]
    assert fewer == BASE["vocab_size"] * BASE["d_model"]


def test_every_sentence_of_legality_has_its_example() -> None:
    source = inspect.getsource(legality)
    sentences = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)}
    said: list[int] = []
    for changes in REFUSED:
        assert refusal_of(changes) in PAGE
        config = ModelConfig()
        asked = ModelConfig.model_construct(
            **{
                **dict(config),
                **{
                    name: type(getattr(config, name))(**given) if isinstance(given, dict) else _pattern(name, given)
                    for name, given in changes.items()
                },
            }
        )
        with pytest.raises(ValueError) as refused:
            legality.check(asked)
        frames = traceback.extract_tb(refused.value.__traceback__)
        said.append(next(frame.lineno for frame in reversed(frames) if frame.filename == legality.__file__) or 0)
    starts = [max(line for line in sentences if line <= at) for at in said]
    assert sorted(starts) == sorted(sentences)
    assert refusal_of({}) == ""


def _pattern(name: str, given: Any) -> Any:
    return tuple(given.split()) if name in ("mask", "attention", "position") else given


def test_pictures_are_there_and_small() -> None:
    linked = set(re.findall(r"\(architecture/([\w-]+\.png)\)", PAGE))
    kept = {path.name: path.stat().st_size for path in (DOCS / "architecture").iterdir()}
    of_a_run = {"routers.png"}  # the others are drawn anew by `python -m scratchlm.model.draw`
    assert linked == set(kept) == {f"{picture.name}.png" for picture in pictures()} | of_a_run
    assert max(kept.values()) < 60_000 and sum(kept.values()) < 1_500_000
    for name in kept:
        assert (DOCS / "architecture" / name).read_bytes().startswith(b"\x89PNG")


def test_what_an_example_is_shown_with_is_of_effect() -> None:
    base = costs_of(ModelConfig(**BASE))
    for name in choices.MASK.names[1:]:
        assert costs_of(example("mask", name))[2] < base[2]
    assert set(document.NEEDED) <= {f"{axis.axis} = {name}" for axis in choices.AXES for name in axis.names}
