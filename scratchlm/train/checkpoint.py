"""Checkpoints: folders that hold all a run needs to go on, written whole or not at all.

    checkpoints/step-00000500/
        config.json            the model's configuration
        model.safetensors      weights, fp32
        optimizer.safetensors  moments and step counts by parameter name, and the random generators' states
        state.json             step, place in the data, seconds, tokens, best loss, decisions
        tokenizer.json         so that the folder is whole
        README.md              what all this is: every field with its value and meaning
        ema/                   with optim.ema: the averaged weights, their config.json, tokenizer.json and README.md

Only safetensors and JSON: nothing in a checkpoint is code.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, read_json, write_json, write_text
from scratchlm.model.card import card
from scratchlm.model.config import ModelConfig
from scratchlm.model.transformer import Transformer
from scratchlm.optim.ema import WeightAverage
from scratchlm.section import flat_fields, validate
from scratchlm.tokenizer import Tokenizer

_NAME = re.compile(r"step-(\d+)")


AVERAGED = "ema"
"""The folder of the averaged weights within a checkpoint."""

FORMAT_VERSION = 1
"""Raised when a change makes old checkpoints continue differently: they are then not resumed."""


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A model section as the first checkpoints wrote it, in today's names: the model is the same."""
    values = dict(values)
    if "rope_theta" in values:
        values["rope"] = {"theta": values.pop("rope_theta")}
    if values.get("qk_norm") == "rmsnorm":
        values["qk_norm"] = "head"
    if values.get("block") == "pre_norm":
        values["block"] = "serial"
    return values


@dataclass
class Progress:
    """Everything of the loop's state that is not a tensor; goes into ``state.json`` and comes back exactly."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # since the last line of metrics
    loss_steps: int = 0
    skipped: int = 0  # steps with a non-finite loss or gradient, in all
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    precision: str = "fp32"
    compile: str = "off"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """What ``state.json`` holds."""
        state: dict[str, Any] = read_json(self.path / "state.json", "checkpoint state")
        return state

    def progress(self) -> Progress:
        """The loop's part of the state.

        Raises:
            UserError: it is damaged, or of another version of scratchlm.
        """
        saved = self.state().get("progress")
        version = saved.get("format_version") if isinstance(saved, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UserError(
                f"{self.path} was written by a version of scratchlm that trains differently; "
                "start a new run with another --out"
            )
        try:
            return TypeAdapter(Progress).validate_python(saved)
        except ValidationError as error:
            raise UserError(f"{self.path / 'state.json'} is damaged; use another checkpoint") from error

    def tokenizer_hash(self) -> str | None:
        """`content_hash` of the tokenizer the weights were trained with, if they name one."""
        return self._said("tokenizer")

    def separator(self) -> str | None:
        """The special token between documents, if the weights name one (an export's do; a run's recipe says it)."""
        return self._said("separator")

    def _said(self, key: str) -> str | None:
        with _reading(self.path / "model.safetensors"), safe_open(self.path / "model.safetensors", "pt") as file:
            found: str | None = (file.metadata() or {}).get(key)
            return found

    def _values(self) -> dict[str, Any]:
        values = read_json(self.path / "config.json", "model config")
        if not isinstance(values, dict):
            raise UserError(f"{self.path / 'config.json'} is no JSON object; use another checkpoint")
        return values

    def config(self) -> ModelConfig:
        """The architecture of the saved weights."""
        return validate(ModelConfig, _renamed(self._values()), str(self.path / "config.json"))

    def weights(self) -> dict[str, Tensor]:
        """Parameter name → tensor."""
        loaded = _load(self.path / "model.safetensors")
        if self._values().get("qk_norm") != "rmsnorm":
            return loaded
        return {
            re.sub(r"\.([qk]_norm)\.weight$", r".\1.norm.weight", name): value for name, value in loaded.items()
        }

    def optimizer(self) -> dict[str, Tensor]:
        """Optimizer and generator states by name; not the averaged weights."""
        return _load(self.path / "optimizer.safetensors")

    def averages(self, average: WeightAverage) -> dict[str, Tensor]:
        """The averaged weights of the parameters of `average`, named as in its state; none where none were saved."""
        if not (self.path / AVERAGED).exists():
            return {}
        saved = _load(self.path / AVERAGED / "model.safetensors")
        return {f"{average.PREFIX}.average.{name}": saved[name] for name in average.parameters if name in saved}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; the checkpoint is incomplete, use another one") from error
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read ({error}); the file is cut off or damaged, use another one"
        ) from error


def _load(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        return load_file(path)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    return sorted((Checkpoint(path, int(name[1])) for path, name in found if name), key=lambda c: c.step)


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint that a user means by `path`: a checkpoint folder, a ``checkpoints`` folder, or a run (its last).

    ``ema`` below any of these means its averaged weights.

    Raises:
        UserError: there is none.
    """
    if (path / "model.safetensors").exists():
        name = _NAME.fullmatch(path.name)
        return Checkpoint(path, int(name[1]) if name else 0)
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return found[-1]
    if path.name == AVERAGED and not path.exists() and path.parent.exists():
        raw = checkpoint_at(path.parent)
        if not (raw.path / AVERAGED).exists():
            raise UserError(f"{raw.path} holds no averaged weights; train with optim.ema above 0 to have them")
        return Checkpoint(raw.path / AVERAGED, raw.step)
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run's folder or one of its checkpoints")
    raise UserError(f"{path} holds no checkpoint; name a run's folder or one of its checkpoints")


def save_checkpoint(
    folder: Path,
    step: int,
    model: Transformer,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    average: WeightAverage | None = None,
) -> Checkpoint:
    """Write ``folder/step-XXXXXXXX``, complete or not at all.

    Args:
        folder: of all checkpoints.
        step: names the checkpoint.
        model: its weights are saved, and once more as the `average` has them.
        optimizer: states by name. What is in the averaged weights is not written twice.
        state: plain JSON values.
        tokenizer: saved beside the weights.
        average: of the model's parameters.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    with atomic_directory(target) as temporary:
        save_weights(model, temporary, tokenizer)
        twice: set[str] = set()
        if average is not None and average.updates:
            (temporary / AVERAGED).mkdir()
            with average.swapped():
                save_weights(model, temporary / AVERAGED, tokenizer)
            twice = average.named_state().keys() - {average.COUNT}
        kept = {name: tensor for name, tensor in optimizer.items() if name not in twice}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}
        _save(tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", dict(state))
    return Checkpoint(target, step)


def save_weights(
    model: Transformer, folder: Path, tokenizer: Tokenizer | None = None, separator: str | None = None
) -> None:
    """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``README.md`` into `folder`.

    A tied head is stored once, as the embedding. The weights' metadata names the tokenizer by its hash, so that another
    one beside them is noticed, and the special token between documents where it is given.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied_embeddings:
        weights.pop("head.weight")
    metadata = {"format": "pt"}
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer.content_hash
        tokenizer.save(folder / "tokenizer.json")
    if separator is not None:
        metadata["separator"] = separator
    _save(weights, folder / "model.safetensors", metadata)
    write_json(folder / "config.json", model.config.model_dump(mode="json"))
    write_text(folder / "README.md", card(model, tokenizer))


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # how the library reports the system's refusal
        raise UserError(f"cannot write {path} ({error}); free some space, or choose another place") from error


def load_weights(model: Transformer, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into `model`.

    Raises:
        UserError: names or shapes are those of another architecture.
    """
    weights = checkpoint.weights()
    expected = check_weights(model, weights, checkpoint.path)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])


def check_weights(model: Transformer, weights: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors of `model` that a checkpoint stores, if `weights` are of these names and shapes.

    Raises:
        UserError: they are those of another architecture.
    """
    expected = dict(model.state_dict())
    if model.config.tied_embeddings:
        expected.pop("head.weight")
    differing = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if differing:
        raise UserError(
            f"{where} holds a different model than asked for (first difference: {differing[0]}); "
            "use the model section it was trained with"
        )
    return expected


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".step-"):
                shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Keep the `keep` newest checkpoints and the best one."""
    for checkpoint in checkpoints(folder)[:-keep]:
        if checkpoint.step != best_step:
            doomed = (
                folder / f".{checkpoint.path.name}.removed"
            )  # so that half of it is never taken for a checkpoint
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """torch's random states, by name."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo :func:`generator_states`."""
    if "rng.cpu" in states:
        torch.set_rng_state(states["rng.cpu"])
    if "rng.cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["rng.cuda"], device)


SAME_FUNCTION = ("kernels", "attention_kernel", "linear.form", "linear.chunk", "moe.dispatch")
"""Fields of the model that are only another way to compute the same."""


def first_difference(then: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The first field that changes what is learnt."""
    before = flat_fields(then)
    for name, value in flat_fields(now).items():
        if name not in SAME_FUNCTION and before[name] != value:
            return f"model.{name}", before[name], value
    return None
