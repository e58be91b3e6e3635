"""A model's drawings in a folder: PNG files and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scratchlm.errors import UserError
from scratchlm.evaluate.report import amount
from scratchlm.files import atomic_directory, disk_errors, file_hash, read_json, write_json
from scratchlm.model import presets
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.ascii import drawings_of
from scratchlm.model.draw.cost import beside_it, cache_picture, cost_picture, growing_and_bounded_bytes
from scratchlm.model.draw.hollow import hollow
from scratchlm.model.draw.layouts import block_picture, blocks_of
from scratchlm.model.draw.masks import LONGEST, grids_of, mask_picture
from scratchlm.model.draw.patterns import pattern_picture
from scratchlm.model.draw.positions import position_pictures
from scratchlm.model.draw.routers import router_picture
from scratchlm.model.draw.style import Picture
from scratchlm.model.transformer import Transformer
from scratchlm.pages import page_templates
from scratchlm.progress import progress

MARK = "drawing.json"
"""Says that a folder is ours, and what we wrote there."""
PAGE = "index.html"


def pictures_of(
    config: ModelConfig, name: str, *, length: int | None = None, records: Sequence[Mapping[str, Any]] = ()
) -> list[Picture]:
    """All pictures of a model.

    Args:
        config: the architecture; `vocab_size` must be set.
        name: what it is called.
        length: positions of the masks, and of the sequences whose FLOPs are counted; None: what shows most, and the context
            up to 8192.
        records: lines of a run's metrics.jsonl.
    """
    model = hollow(config)
    counted = min(config.context_length, LONGEST) if length is None else length
    pictures = [cost_picture(model, counted)]
    if config.layers:
        pictures = [
            pattern_picture({name: config}),
            block_picture(blocks_of(model)),
            mask_picture(grids_of(config, length)),
            *position_pictures(config),
            *pictures,
            cache_picture(beside_it(config)),
        ]
    with_experts = [layer for layer in range(config.layers) if config.has_experts(layer)]
    routers = router_picture(records, with_experts)
    return pictures if routers is None else [*pictures, routers]


def refuse_foreign(folder: Path) -> None:
    """Raise if drawing into `folder` would take away anything that is not as we left it.

    Raises:
        UserError: it is no folder, or holds a file that is not ours or was changed since.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    there = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    if not there:
        return
    if not (folder / MARK).is_file():
        raise UserError(f"{folder} exists and holds no drawings of ours; choose another --out")
    mark = read_json(folder / MARK, "list of drawings")
    ours = mark.get("files") if isinstance(mark, dict) else None
    ours = ours if isinstance(ours, dict) else {}
    for path in there:
        name = str(path.relative_to(folder))
        if name != MARK and (path.is_symlink() or name not in ours or file_hash(path) != ours[name]):
            raise UserError(
                f"{path} is not as `scratchlm model draw` left it; move it away, or choose another --out"
            )


def draw_model(
    config: ModelConfig,
    name: str,
    folder: str | os.PathLike[str],
    *,
    source: str = "",
    length: int | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    show_progress: bool = False,
) -> Path:
    """Draw a model into `folder`, all or nothing.

    Args:
        config: the architecture; `vocab_size` must be set.
        name: what it is called.
        folder: a new or empty folder, or one drawn before and not changed since, which is replaced.
        source: a sentence about where the model comes from.
        length, records: as for :func:`pictures_of`.
        show_progress: a bar on standard error.

    Returns:
        Path of the page.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    with disk_errors(folder):
        refuse_foreign(folder)
    model = hollow(config)
    pictures = pictures_of(config, name, length=length, records=records)
    files: dict[str, bytes] = {}
    shown = []
    for picture in progress(pictures, description="draw", unit="picture", show=show_progress, leave=False):
        light = picture.png("light")
        files[f"{picture.name}.png"] = light
        encoded = {"light": light, "dark": picture.png("dark")}
        shown.append(
            {"picture": picture, **{theme: base64.b64encode(png).decode() for theme, png in encoded.items()}}
        )
    files[PAGE] = _render(model, config, name, source, shown).encode("utf-8", "replace")
    with atomic_directory(folder) as temporary:
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        hashes = {file: file_hash(temporary / file) for file in files}
        write_json(temporary / MARK, {"made_by": "scratchlm model draw", "model": name, "files": hashes})
    return folder / PAGE


def _render(model: Transformer, config: ModelConfig, name: str, source: str, shown: list[dict[str, Any]]) -> str:
    environment = page_templates("scratchlm.model.draw")
    per_token, bounded = growing_and_bounded_bytes(config)
    # Prediction modules stay at home when the model is used: they are counted apart.
    modules: list[Any] = list(model.predictions)
    further, further_active = sum(m.num_params() for m in modules), sum(m.num_active_params() for m in modules)
    total, active = model.num_params() - further, model.num_active_params() - further_active
    figures = {"Parameters": (amount(total), f"{total:,}")}
    if active != total:
        figures["Met by one token"] = (amount(active), f"{active:,}")
    if further:
        figures["Prediction modules"] = (amount(further), "in training only")
    heads = f"{config.heads} heads, {config.resolved_kv_heads} kv"
    figures["Width × depth"] = (f"{config.d_model:,} × {config.layers}", heads)
    figures["Context"] = (f"{config.context_length:,}", "tokens")
    figures["Cache"] = (f"{per_token:,}", "bytes per token in bfloat16")
    if bounded:
        figures["States, windows"] = (f"{bounded:,}", "bytes per sequence in bfloat16")
    return environment.get_template("page.html").render(
        name=name,
        source=source,
        figures=figures,
        pictures=shown,
        drawings=drawings_of(config),
        recipe=presets.to_toml(config),
    )
