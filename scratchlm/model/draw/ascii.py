"""The drawings in text that stand beside the code: read from docstrings, so that a page shows what the code says."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap

from scratchlm.model.choices import BLOCK, NORM_PLACEMENT, Choices
from scratchlm.model.config import ModelConfig

_STROKES = set("─│┌└■►")


def drawing_in(docstring: str | None) -> str:
    """The paragraphs of a docstring (cleaned of its indentation) that are drawn; empty if there are none."""
    paragraphs = (docstring or "").split("\n\n")
    drawn = [paragraph for paragraph in paragraphs if _STROKES & set(paragraph)]
    return textwrap.dedent("\n\n".join(drawn)).rstrip()


@functools.cache
def _strings_after_names(module: str) -> dict[str, str]:
    """name → the string literal below its assignment, which Python keeps nowhere."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            # The first line begins behind three quotes, which the others are lined up with.
            found[statement.targets[0].id] = textwrap.dedent("   " + str(following.value.value))
    return found


def drawing_of(axis: Choices, name: str) -> str:
    """The drawing of a choice: in its docstring, else in that of what it inherits from, else in its file's."""
    chosen = axis.get(name)
    module, attribute = axis.table[name].split(":")
    if not isinstance(chosen, type):
        below = _strings_after_names(f"scratchlm.{module}").get(attribute)
        return drawing_in(below or inspect.getdoc(chosen))
    for kind in chosen.__mro__:
        if kind.__module__.startswith("scratchlm.") and (drawn := drawing_in(inspect.cleandoc(kind.__doc__ or ""))):
            return drawn
    return drawing_in(importlib.import_module(f"scratchlm.{module}").__doc__)


def drawings_of(config: ModelConfig) -> dict[str, str]:
    """What a model is made of, from the outside in: title → drawing."""
    from scratchlm.model import choices

    asked = [(BLOCK, config.block), (NORM_PLACEMENT, config.norm_placement)]
    asked += [(choices.ATTENTION, name) for name in dict.fromkeys(map(config.attention_at, range(config.layers)))]
    asked.append((choices.FEEDFORWARD, config.feedforward))
    drawings = {f"{axis.axis} = {name}": drawing_of(axis, name) for axis, name in asked}
    if config.moe.experts:
        drawings["moe"] = drawing_in(importlib.import_module("scratchlm.model.moe").__doc__)
    return {title: drawn for title, drawn in drawings.items() if drawn}
