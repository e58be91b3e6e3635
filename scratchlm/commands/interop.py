"""``scratchlm import`` and ``export``: models from and to the formats that others read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from scratchlm.arguments import parse
from scratchlm.commands.shared import say
from scratchlm.errors import UserError
from scratchlm.files import expanded, new_folder
from scratchlm.section import Section

DtypeName = Annotated[
    Literal["keep", "fp32", "bf16", "fp16"],
    Field(description="Of the weights that are written; keep: as they are."),
]


class ImportArguments(Section):
    """Read a Hugging Face folder (config.json, safetensors, tokenizer files) and write it as one of ours."""

    source: tyro.conf.Positional[str] = Field(
        description="A folder, or with --download the id of a model: ORG/NAME."
    )
    out: tyro.conf.Positional[Path] = Field(description="The folder to write; new or empty.")
    dtype: DtypeName = "keep"
    download: bool = Field(default=False, description="Fetch the model from the Hugging Face Hub by its id.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the Hub; None: its main branch."
    )
    allow_pickle: bool = Field(
        default=False, description="Read pytorch_model.bin where there is no safetensors file (weights only)."
    )


class ExportArguments(Section):
    """Write a trained model as a Hugging Face folder that transformers opens, with its tokenizer."""

    source: tyro.conf.Positional[Path] = Field(description="A run, a checkpoint, or an imported model.")
    out: tyro.conf.Positional[Path] = Field(description="The folder to write; new or empty.")
    family: str = Field(
        default="auto",
        description="A model_type of transformers; auto: the first that computes exactly the same; standalone: with code of "
        "its own beside it (trust_remote_code); scratchlm: our own format.",
    )
    dtype: DtypeName = "keep"
    shard_gb: float = Field(default=5.0, gt=0, le=1e6, description="Largest file of weights, in GB.")


def import_model(arguments: list[str]) -> None:
    """``scratchlm import DIR_OR_HUB_ID OUT``"""
    usage = "scratchlm import DIR_OR_HUB_ID OUT"
    _check_folders(arguments, f"{usage} [--option value …]")
    options = parse(ImportArguments, arguments, prog=usage)
    out = new_folder(options.out)
    source = _source(options)
    from scratchlm.interop.folders import import_folder

    opened = import_folder(source, out, dtype=options.dtype, allow_pickle=options.allow_pickle, show_progress=True)
    model = opened.model
    say(f"{opened.family.title}: {model.num_params():,} parameters, {_dtypes(model)}")
    if opened.left_out:
        some = ", ".join(opened.left_out[:3]) + (" …" if len(opened.left_out) > 3 else "")
        say(f"left out: {len(opened.left_out)} tensors that the model does not compute with ({some})")
    if (out / "tokenizer.json").exists():
        say(f"{out}: `scratchlm generate` and `evaluate` take it; {out / 'recipe.toml'} trains it further")
    else:
        say(
            f"{out}: a model without a tokenizer that can be read here, so `scratchlm generate` and `evaluate` refuse it"
        )


def _check_folders(arguments: list[str], usage: str) -> None:
    if set(arguments) & {"-h", "--help"}:
        return
    if sum(not argument.startswith("-") for argument in arguments[:2]) < 2:
        raise UserError(f"which model, and where to? the two folders come first, then the options: {usage}")


def _dtypes(model: object) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}  # type: ignore[attr-defined]
    return " and ".join(sorted(kinds))


def export_model(arguments: list[str]) -> None:
    """``scratchlm export RUN OUT --family auto``"""
    usage = "scratchlm export RUN OUT"
    _check_folders(arguments, f"{usage} [--family auto] [--option value …]")
    options = parse(ExportArguments, arguments, prog=usage)
    out = new_folder(options.out)
    from scratchlm.interop.folders import export_folder

    written = export_folder(
        expanded(options.source),
        out,
        family=options.family,
        dtype=options.dtype,
        shard_bytes=max(1, int(options.shard_gb * 1e9)),
        show_progress=True,
    )
    how = {
        "scratchlm": "our own format",
        "standalone": "code of its own: from_pretrained(…, trust_remote_code=True) opens it",
    }.get(written, f"family {written}: transformers' from_pretrained opens it")
    say(f"{out}: {how}")


def _source(options: ImportArguments) -> Path:
    """The folder to read, fetched if that was asked for."""
    path = expanded(options.source)
    if not options.download:
        if options.revision is not None:
            raise UserError("--revision belongs to --download True; a folder has no revisions")
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{path} is a file; name the folder that holds config.json and the weights")
        hint = "; to fetch it from the Hub add --download True" if _is_id(options.source) else ""
        raise UserError(f"{options.source} is no folder here{hint}")
    if not _is_id(options.source):
        raise UserError(f"{options.source!r} is no id of the Hub; it looks like ORG/NAME")
    from scratchlm.interop.hub import fetch

    return fetch(options.source, options.revision, allow_pickle=options.allow_pickle)


def _is_id(text: str) -> bool:
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None
        and ".." not in text
        and not text.startswith((".", "-"))
    )
