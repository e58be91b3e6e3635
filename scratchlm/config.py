"""The recipe: everything that decides a run, as typed sections read from TOML.

A recipe is data. Every field is also a command-line flag (``--train.steps 500``); the resolved recipe, with all defaults
filled in, is saved in the run's folder and can be run again as it is.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from scratchlm.errors import UserError
from scratchlm.files import write_text
from scratchlm.model import presets
from scratchlm.model.config import ModelConfig
from scratchlm.processes import MAX_WORKERS
from scratchlm.section import Section, validate
from scratchlm.sizes import parse_bytes

DEVICE: Any = Field(
    default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda[:n]."
)
"""The field `device` of a recipe and of the commands that take one."""

ByteErrors = Literal["strict", "replace", "skip"]

MAX_VOCAB = 2**24  # as tokenizer.training has it, which is not imported for this
COUNTABLE = 2**62  # of a number that is only compared with counts

_FILES = ("text", "jsonl", "parquet")
_READ_BY: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    # fields of a corpus, the kinds that read them, what they are
    (("paths", "validation_paths"), _FILES, "files"),
    (("separator",), ("text",), "separator"),
    (("text_field",), ("jsonl", "parquet", "huggingface"), "fields"),
    (("dataset", "subset", "train_split", "validation_split"), ("huggingface",), "dataset"),
)
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Fitted = Annotated[int, Field(ge=1)] | Literal["auto"]
"""A number, or what fits the device's memory."""


def _size(text: str) -> str:
    try:
        parse_bytes(text)
    except UserError as error:
        raise ValueError(str(error)) from None
    return text


Size = Annotated[str, AfterValidator(_size)]
"""Bytes, as :func:`scratchlm.sizes.parse_bytes` reads them."""


class TokenizerConfig(Section):
    """Byte-level BPE: how it is trained, or where a finished one lies."""

    path: Path | None = Field(
        default=None, description="A finished tokenizer.json to use instead of training one on the corpus."
    )
    vocab_size: int = Field(
        default=4096, ge=1, le=MAX_VOCAB, description="Size wanted: 256 bytes + merges + special tokens."
    )
    pattern: str = Field(
        default="gpt2", description="Pre-tokenisation: gpt2, cl100k, o200k, or any pattern of the regex library."
    )
    special_tokens: list[str] = Field(
        default=["<|endoftext|>"], description="Kept whole; the first one separates documents in the shards."
    )
    min_frequency: int = Field(
        default=1, ge=1, le=COUNTABLE, description="Pairs seen less often than this are not merged."
    )
    max_train_bytes: int | None = Field(
        default=None,
        ge=1,
        le=COUNTABLE,
        description="Train on about the first so many bytes of text; None: on all of it.",
    )


class CorpusConfig(Section):
    """Where text comes from and which of it is held out."""

    kind: Literal["python-stdlib", "text", "jsonl", "parquet", "huggingface"] = Field(
        default="python-stdlib", description="python-stdlib needs no files; the others read `paths` or `dataset`."
    )
    paths: list[str] = Field(default=[], description="Files or globs (text, jsonl, parquet); ** searches below.")
    validation_paths: list[str] = Field(
        default=[], description="Files or globs held out; empty: a share of the documents is held out."
    )
    validation_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the text held out: documents chosen by a hash of their name.",
    )
    hold_out: Literal["documents", "ends"] = Field(
        default="documents",
        description="What that share is: whole documents, or the end of every document, as nanoGPT splits its one text.",
    )
    separator: str = Field(
        default="<|endoftext|>", description="Splits a text file into documents; '': one per file."
    )
    text_field: str = Field(default="text", description="Field or column that holds the text (jsonl, parquet, HF).")
    dataset: str | None = Field(default=None, description="Hugging Face dataset name (or a local folder of one).")
    subset: str | None = Field(default=None, description="Configuration of the Hugging Face dataset.")
    train_split: str = Field(default="train", description="Split of the Hugging Face dataset to train on.")
    validation_split: str | None = Field(
        default=None, description="Split held out; None: a share of the training documents."
    )
    encoding_errors: ByteErrors = Field(
        default="strict", description="Bytes that are not UTF-8: stop, replace by U+FFFD, or skip the document."
    )
    max_documents: int | None = Field(
        default=None, ge=1, le=COUNTABLE, description="Stop after so many documents (for trials)."
    )

    @model_validator(mode="after")
    def _only_what_is_read(self) -> CorpusConfig:
        """Refuse a field that has a value of its own and would be ignored: paths of a corpus that reads no files."""
        for names, kinds, what in _READ_BY:
            changed = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if changed and self.kind not in kinds:
                fitting = kinds[0]
                if changed[0] == "paths":
                    fitting = next((kind for kind in kinds if f".{kind}" in self.paths[0]), fitting)
                raise ValueError(
                    f"{changed[0]} is set, but kind = {self.kind} reads no {what}: leave it out, or set kind = "
                    f'"{fitting}"'
                )
        for name in ("validation_paths", "validation_split"):
            if getattr(self, name) and self.hold_out == "ends":
                raise ValueError(f"{name} says what is held out: leave it out, or hold_out = ends")
        return self


class DataConfig(Section):
    """Tokenise and save: shards of token ids on disk."""

    shard_tokens: int = Field(default=100_000_000, ge=1, le=2**40, description="Tokens per shard file, at most.")
    dtype: Literal["auto", "uint16", "uint32"] = Field(
        default="auto", description="Id type on disk; auto: the smallest that holds the vocabulary."
    )
    workers: int | None = Field(
        default=None, ge=1, le=MAX_WORKERS, description="Tokenising processes; None: one per core."
    )
    cache: Path = Field(
        default=Path("runs/cache"),
        description="Tokenizers and shards, named by a hash of their inputs and shared between runs.",
    )


class OptimConfig(Section):
    """Optimizer, learning-rate schedule, clipping."""

    optimizer: Literal["adamw", "adam", "lion", "adafactor", "sgd", "muon"] = Field(
        default="adamw", description="muon: Muon on hidden matrices, AdamW on embeddings, head and norms."
    )
    lr: float = Field(
        default=1e-3,
        gt=0,
        le=1000,
        description="Peak learning rate (of all but Muon). Lion wants 3 to 10 times less than AdamW.",
    )
    embedding_lr: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Peak learning rate of the token embedding; None: lr.",
    )
    muon_lr: float = Field(default=0.02, gt=0, le=1000, description="Peak learning rate of Muon's matrices.")
    betas: tuple[DecayRate, DecayRate] = Field(
        default=(0.9, 0.95), description="AdamW's and Adam's decay rates of the two moments."
    )
    lion_betas: tuple[DecayRate, DecayRate] = Field(
        default=(0.9, 0.99), description="Lion's decay rates of the step's direction and of its memory."
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="AdamW's and Adam's ε.")
    adafactor_decay: float = Field(
        default=-0.8, ge=-1, lt=0, description="Adafactor: step t keeps 1 − t^this of its second moments."
    )
    adafactor_clip: float = Field(
        default=1.0, ge=1, le=1e6, description="Adafactor: largest RMS of an update, times the learning rate."
    )
    adafactor_relative_step: bool = Field(
        default=False, description="Adafactor: the learning rate of step t is at most 1/√t (the paper: lr = 0.01)."
    )
    adafactor_scale_parameter: bool = Field(
        default=False, description="Adafactor: the learning rate is relative to each parameter's RMS (the paper)."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, le=1000, description="Decoupled decay, times the learning rate, per step."
    )
    adam_weight_decay: float = Field(
        default=0.0, ge=0, le=1000, description="Adam's, in place of weight_decay: added to the gradient (L2)."
    )
    muon_weight_decay: float = Field(default=0.0, ge=0, le=1000, description="Decoupled decay of Muon's matrices.")
    decay_embeddings_and_norms: bool = Field(default=False, description="Apply weight decay to these too.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Momentum of SGD and Muon.")
    nesterov: bool = Field(default=True, description="Nesterov momentum in SGD and Muon.")
    implementation: Literal["auto", "reference", "foreach", "fused"] = Field(
        default="auto",
        description="How parameters are updated: one tensor at a time, multi-tensor, or fused (where torch has a kernel); "
        "equal up to rounding. Muon: reference iterates in fp32, the others in bf16 where that is native, so that their "
        "digits differ.",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant", "rise"] = Field(
        default="cosine",
        description="Learning rate after warm-up; wsd: warm-up, stable, then a decay; rise: exponentially up from min_lr_ratio, as "
        "`scratchlm lr` does.",
    )
    warmup_steps: int = Field(default=100, ge=0, le=10**12, description="Linear warm-up from zero.")
    decay_fraction: float = Field(default=0.2, ge=0, le=1, description="wsd: share of all steps spent decaying.")
    decay_shape: Literal["linear", "sqrt", "cosine"] = Field(
        default="linear",
        description="wsd: the decay's curve; sqrt: 1 − √p, steep at first and long at small rates.",
    )
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Last learning rate as a share of the peak; 0: the decay ends at zero."
    )
    grad_clip: float = Field(default=1.0, ge=0, description="Largest global gradient norm; 0: no clipping.")
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay per step of a running average of the weights, validated and saved beside them (over about "
        "1 / (1 − ema) steps); 0: none.",
    )


class TrainConfig(Section):
    """The loop."""

    steps: int = Field(default=1000, ge=0, description="Optimizer steps.")
    start_from: Path | None = Field(
        default=None,
        description="A model whose weights training starts from (a run, an imported model, a Hugging Face folder); None: "
        "random ones.",
    )
    batch_size: int = Field(default=16, ge=1, description="Sequences per optimizer step.")
    batch_warmup_steps: int = Field(
        default=0,
        ge=0,
        le=10**12,
        description="Steps over which the batch grows from batch_warmup_start to batch_size, in equal pieces; 0: whole from "
        "the first.",
    )
    batch_warmup_start: int = Field(
        default=1,
        ge=1,
        description="With batch_warmup_steps: sequences of the first step, and by which it grows; divides batch_size.",
    )
    micro_batch: Fitted | None = Field(
        default=None,
        description="Sequences computed at once; auto: the most that divide batch_size and fit the device's memory; None: "
        "batch_size / accumulation.",
    )
    accumulation: Fitted = Field(
        default=1,
        description="Micro-batches a batch is split into; auto: the fewest that fit. A number beside an auto decides; 1 "
        "leaves it to micro_batch, if that is set.",
    )
    memory_limit: Size | None = Field(
        default=None,
        description="Bytes that auto may plan with, weights included, such as 8GB or 512MiB; None: what is free.",
    )
    loader: Literal["epoch", "random"] = Field(
        default="epoch", description="epoch: every token once, shuffled; random: the course's random windows."
    )
    document_boundaries: bool = Field(
        default=False, description="Attention does not cross documents and positions restart in each."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="bf16: products in bf16 (see weights); auto: bf16 where the hardware is faster with it.",
    )
    weights: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="With precision = bf16. fp32: autocast rounds them where they are used. bf16: computed with a rounded copy, activations and "
        "gradients in bf16, too; the optimizer keeps fp32 masters.",
    )
    fp8: bool = Field(
        default=False,
        description="With precision = bf16, on GPUs that have it (Hopper and newer): the products of the blocks' linear layers in 8 bits.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile; auto: where a compiler exists and the run is long enough."
    )
    compile_mode: Literal["default", "cuda_graphs", "max_autotune", "max_autotune_cuda_graphs"] = Field(
        default="default",
        description="What torch.compile spends more time on: cuda_graphs record all launches of a pass once and replay them (for small models on a "
        "GPU), max_autotune measures several kernels for each product.",
    )
    cuda_graph: bool = Field(
        default=False,
        description="On a GPU, without accumulation: record all launches of forward and backward once and replay them, compiled or not (for small "
        "models, whose launches take longer than their work). Not with a compile_mode that does so by itself.",
    )
    activation_checkpointing: Literal["none", "selective", "blocks"] = Field(
        default="none",
        description="blocks: a block keeps its input alone and computes the rest again in the backward pass; less memory, about a "
        "third more FLOPs. selective: it also keeps what its linear layers and fused attention give; norms, activations and casts are computed again.",
    )
    loss_kernel: Literal["auto", "reference", "chunked"] = Field(
        default="auto", description="chunked: head and cross-entropy by rows, never holding all logits."
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        le=1e3,
        description="Weight of (log Σ exp logits)² in the objective (PaLM: 1e-4); 0: none.",
    )
    mtp_weight: float = Field(
        default=0.3, ge=0, le=1e3, description="Weight of the multi-token predictions, if model.mtp_depth is set."
    )
    eval_interval: int = Field(
        default=250, ge=1, description="Steps between evaluations on the whole validation set."
    )
    log_interval: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    checkpoint_interval: int = Field(default=500, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept, beside the best one.")
    max_non_finite: int = Field(
        default=10,
        ge=0,
        description="Steps with a non-finite loss or gradient are skipped; stop after so many in a row.",
    )
    trackers: list[Literal["wandb", "tensorboard"]] = Field(default=[], description="Besides metrics.jsonl.")
    project: str = Field(default="scratchlm", description="Project name for trackers.")

    def batch_size_at(self, step: int) -> int:
        """Sequences of optimizer step `step`, counted from 0."""
        if step >= self.batch_warmup_steps:
            return self.batch_size
        smaller = self.batch_size // self.batch_warmup_start - 1  # sizes before the last one
        pieces = 1 + step * smaller // self.batch_warmup_steps
        return self.batch_warmup_start * pieces

    @property
    def sequences(self) -> int:
        """Of the whole run: the sum of :meth:`batch_size_at` over its steps, without going through them."""
        growing, smaller = min(self.steps, self.batch_warmup_steps), self.batch_size // self.batch_warmup_start - 1
        begins = (-(-piece * self.batch_warmup_steps // smaller) for piece in range(1, smaller))  # rounded up
        pieces = growing + sum(max(0, growing - step) for step in begins)
        return self.batch_warmup_start * pieces + (self.steps - growing) * self.batch_size

    @property
    def parts(self) -> int | None:
        """Micro-batches per optimizer step, as the recipe demands; None: they are to be fitted to the device."""
        if isinstance(self.micro_batch, int):
            return max(1, self.batch_size // self.micro_batch)
        if self.accumulation == "auto" or (self.micro_batch == "auto" and self.accumulation == 1):
            return None
        return self.accumulation


class EvaluateConfig(Section):
    """Loss, perplexity and bits per byte on held-out text."""

    batch_size: int = Field(default=32, ge=1, le=10**6, description="Windows per forward pass.")
    context_length: int | None = Field(
        default=None, ge=1, le=2**24, description="Window length; None: the model's."
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        le=2**24,
        description="Final evaluation: tokens between windows; smaller than the window gives each token more "
        "context; None: no overlap.",
    )
    compressors: bool = Field(default=True, description="Report gzip -9 and xz -9e of the same bytes beside.")


class GenerateConfig(Section):
    """Sampling."""

    prompts: list[str] = Field(default=["def "], description="One sample is written for each.")
    max_tokens: int = Field(default=256, ge=0, le=10**9, description="Tokens per sample, at most.")
    temperature: float = Field(default=0.8, ge=0, le=10**6, description="0: always the likeliest token.")
    top_k: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Sample among the k likeliest; None: all."
    )
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="Nucleus: smallest set with this probability; 1: all."
    )
    stop: list[str] = Field(default=["<|endoftext|>"], description="Special tokens that end a sample.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Seed of the sampler.")
    weights: Literal["own", "int8"] = Field(
        default="own",
        description="int8: one text at a time on a CPU is written with the matrices in 8 bits, a scale for each 128 numbers (the prompt is read with the "
        "model's own).",
    )


class Recipe(Section):
    """A whole run: tokenizer → data → model → training → evaluation → samples."""

    name: str = Field(default="run", pattern=r"^[\w+-][\w.+-]*$", description="Name of the run.")
    out: Path | None = Field(default=None, description="The run's folder; None: runs/<name>.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Initialisation and data order.")
    device: str = DEVICE
    threads: int | None = Field(default=None, ge=1, description="CPU threads; None: torch's choice.")
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        train = self.train
        if train.precision == "fp32" and train.weights == "bf16":
            raise ValueError(
                "train.weights = bf16 with train.precision = fp32: set precision = bf16 (or auto), or leave the weights in fp32"
            )
        if train.precision == "fp32" and train.fp8:
            raise ValueError(
                "train.fp8 = true with train.precision = fp32: set precision = bf16 (or auto), or leave fp8 out"
            )
        if train.cuda_graph and train.compile != "off" and train.compile_mode.endswith("cuda_graphs"):
            raise ValueError(
                f"train.cuda_graph = true with train.compile_mode = {train.compile_mode}: one of them records the step; leave the other out"
            )
        if train.cuda_graph and (train.parts or 1) > 1:
            raise ValueError(
                f"train.cuda_graph = true with {train.parts} micro-batches per step: a step is recorded in one piece; leave cuda_graph or the accumulation out"
            )
        for name, number in (("accumulation", train.accumulation), ("micro_batch", train.micro_batch)):
            if isinstance(number, int) and train.batch_size % number:
                raise ValueError(f"train.{name} = {number} does not divide train.batch_size = {train.batch_size}")
        if train.batch_size % train.batch_warmup_start:
            raise ValueError(
                f"train.batch_warmup_start = {train.batch_warmup_start} does not divide train.batch_size = {train.batch_size}"
            )
        if isinstance(train.micro_batch, int) and train.accumulation not in (1, "auto", train.parts):
            raise ValueError(
                f"train.micro_batch = {train.micro_batch} times train.accumulation = {train.accumulation} is not "
                f"train.batch_size = {train.batch_size}: leave one of them out"
            )
        window = self.evaluate.context_length or self.model.context_length
        if window > self.model.context_length:
            raise ValueError(
                f"evaluate.context_length = {window} is longer than model.context_length = {self.model.context_length}"
            )
        if self.evaluate.stride is not None and self.evaluate.stride > window:
            raise ValueError(
                f"evaluate.stride = {self.evaluate.stride} is longer than the window of {window}: tokens would be left out"
            )
        duplicates = {t for t in self.tokenizer.special_tokens if self.tokenizer.special_tokens.count(t) > 1}
        if duplicates:
            raise ValueError(f"tokenizer.special_tokens names {sorted(duplicates)[0]!r} twice")
        if not self.tokenizer.special_tokens and self.tokenizer.path is None:
            raise ValueError("tokenizer.special_tokens is empty; the first one must separate documents")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out.expanduser() if self.out is not None else Path("runs") / self.name

    @property
    def tokens(self) -> int:
        """Targets of the whole run, if every place has one."""
        return self.train.sequences * self.model.context_length

    @property
    def cache(self) -> Path:
        """Where tokenizers and shards lie."""
        return self.data.cache.expanduser()


def load_recipe(path: str | Path, preset: str | None = None) -> Recipe:
    """Read a recipe. ``preset = "llama-3-tiny"`` in its ``[model]`` stands for that preset's fields, below its own ones.

    Args:
        path: the TOML file.
        preset: takes the place of the whole ``[model]``; None: that of the recipe.

    Raises:
        UserError: the file is missing, is not TOML, or has an unknown or ill-typed field (the nearest one is named), or
            there is no such preset.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"recipe {path} does not exist; recipes/ holds examples") from error
    except IsADirectoryError as error:
        raise UserError(f"recipe {path} is a folder; name the .toml file") from error
    except OSError as error:
        raise UserError(f"recipe {str(path)[:80]} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error
    values.setdefault("name", re.sub(r"[^\w.+-]+", "-", path.stem).strip(".-") or "run")
    if preset is not None:
        values["model"] = presets.values(preset)
    elif isinstance(model := values.get("model"), dict):
        try:
            values["model"] = presets.expand(model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return validate(Recipe, values, str(path))


def plain(section: Section) -> dict[str, Any]:
    """A section as plain JSON values."""
    return section.model_dump(mode="json")


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as TOML (fields that are None are left out: TOML has no null)."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return value

    write_text(path, tomli_w.dumps(without_none(plain(recipe)), multiline_strings=False))
