"""A whole run: tokenizer → data → train → evaluate → sample → report.

Every step has a key, a hash of all that its result depends on. A step whose key is that of the last time is skipped, one
that was cut off goes on, anything else is done; which it was is said, and kept in ``timings.json``. Tokenizers and
shards lie in a cache under their keys, so that runs with the same text share them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scratchlm.config import Recipe, load_recipe, plain, save_recipe
from scratchlm.data import open_corpus, prepare
from scratchlm.data.corpus import Corpus
from scratchlm.data.tokens import TokenData
from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, disk_errors, file_hash, read_json, stable_hash, write_json
from scratchlm.model.config import ModelConfig
from scratchlm.section import Section
from scratchlm.tokenizer import Tokenizer, train_bpe

if TYPE_CHECKING:
    import torch

    from scratchlm.evaluate.metrics import Evaluation
    from scratchlm.model.transformer import Transformer

STEPS = ("tokenizer", "data", "train", "evaluate", "sample", "report")

TOKENIZER_VERSION = 1
"""Raised when the same corpus and settings give other merges than before."""

_FREE = {
    # Fields that may differ when a run is continued: they decide where and how, not what is learnt.
    "name", "out", "device", "threads", "evaluate", "generate",
    "data.cache", "data.workers", "model.kernels", "model.attention_kernel",
    "train.trackers", "train.project", "train.keep_checkpoints", "train.checkpoint_interval",
    "train.eval_interval", "train.log_interval", "train.max_non_finite", "train.precision", "train.compile",
    "train.loss_kernel", "optim.implementation",
}  # fmt: skip


def what_is_learnt(recipe: Section, prefix: str = "") -> dict[str, Any]:
    """The fields of a recipe that decide the trained weights, dotted."""
    fields: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if prefix + name in _FREE:
            continue
        if isinstance(value, Section):
            fields |= what_is_learnt(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = json.loads(json.dumps(value, default=str))
    return fields


class Pipeline:
    """The steps of one recipe; each makes sure that those before it are up to date.

    Args:
        recipe: the resolved recipe.
        say: receives one-line messages.
        show_progress: show bars.

    Raises:
        UserError: the run's folder holds something else, or a run of a recipe that learns something else.
    """

    def __init__(self, recipe: Recipe, say: Any = print, show_progress: bool = True) -> None:
        self.recipe = recipe
        self.folder = recipe.folder
        self.say = say
        self.show_progress = show_progress
        self._claim_folder()
        if recipe.threads is not None:
            import torch

            torch.set_num_threads(recipe.threads)

    # --- the folder and its records ------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        saved = self.folder / "recipe.toml"
        with disk_errors(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"{self.folder} is a file; choose another --out")
            self.folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        if others and not saved.exists():
            raise UserError(
                f"{self.folder} exists and holds other content ({sorted(others)[0]}); choose another --out or empty it"
            )
        if saved.exists() and (self.folder / "checkpoints").is_dir():
            before, now = what_is_learnt(load_recipe(saved)), what_is_learnt(self.recipe)
            for name in now:
                if before.get(name) != now[name]:
                    raise UserError(
                        f"{self.folder} holds a run with {name} = {before.get(name)!r}, now it is {now[name]!r}: choose "
                        "another --out, or --fresh to move that run aside"
                    )

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Keep a second process out of the run's folder."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"another process is working in {self.folder}; wait for it or choose another --out"
                ) from error
            yield

    def _keys(self) -> dict[str, str]:
        path = self.folder / "steps.json"
        return read_json(path, "run file") if path.exists() else {}

    def _refuse_change(self, step: str, key: str) -> None:
        """A run that has checkpoints goes on with the text and the tokenizer it began with, or not at all."""
        if any((self.folder / "checkpoints").glob("step-*")) and self._keys().get(step, key) != key:
            raise UserError(
                f"the corpus or the tokenizer has changed since {self.folder} was begun: choose another --out, "
                "or --fresh to move that run aside"
            )

    def _finish(self, step: str, key: str | None, action: str, started: float, note: str = "") -> None:
        """Record a step's key and timing, and say what happened."""
        seconds = time.perf_counter() - started
        if key is not None:
            write_json(self.folder / "steps.json", {**self._keys(), step: key})
        path = self.folder / "timings.json"
        timings = read_json(path, "run file") if path.exists() else {}
        if action != "skipped" or step not in timings:
            timings[step] = {"seconds": round(seconds, 2), "action": action}
            write_json(path, timings)
        spent = "" if action == "skipped" else f" in {seconds:.1f} s"
        verb = {"skipped": "up to date, skipped", "built": "done", "resumed": "resumed and done"}[action]
        self.say(f"{step:<10} {verb}{spent}{': ' if note else ''}{note}")

    # --- tokenizer and data --------------------------------------------------------------------------------------

    @functools.cached_property
    def corpus(self) -> Corpus:
        return open_corpus(self.recipe.corpus)

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint(show_progress=self.show_progress)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Train the tokenizer, or take it from the cache or from where the recipe says."""
        config, started = self.recipe.tokenizer, time.perf_counter()
        if config.path is not None:
            tokenizer = Tokenizer.load(config.path)
            key, action = file_hash(config.path) if config.path.is_file() else tokenizer.content_hash, "skipped"
        else:
            fields = {name: value for name, value in plain(config).items() if name != "path"}
            key = stable_hash({"version": TOKENIZER_VERSION, "corpus": self.fingerprint, **fields})
            cached = self.recipe.data.cache / "tokenizer" / key / "tokenizer.json"
            action = "skipped"
            if not cached.exists():
                tokenizer = train_bpe(
                    self._training_text(),
                    vocab_size=config.vocab_size,
                    special_tokens=config.special_tokens,
                    pattern=config.pattern,
                    min_frequency=config.min_frequency,
                    progress=self.show_progress,
                )
                with atomic_directory(cached.parent) as temporary:
                    tokenizer.save(temporary / "tokenizer.json")
                action = "built"
            tokenizer = Tokenizer.load(cached)
        if not tokenizer.special_tokens:
            raise UserError(
                f"tokenizer {config.path} has no special token to separate documents; add one, such as <|endoftext|>"
            )
        self._check_vocabulary(tokenizer)
        self._check_stop_tokens(tokenizer)
        self._refuse_change("tokenizer", key)
        tokenizer.save(self.folder / "tokenizer.json")
        self._finish("tokenizer", key, action, started, f"{tokenizer.vocab_size:,} ids")
        return tokenizer

    def _training_text(self) -> Iterator[str]:
        most = self.recipe.tokenizer.max_train_bytes
        seen = 0
        for document in self.corpus.documents("train"):
            yield document.text
            seen += len(document.text.encode())
            if most is not None and seen >= most:
                return

    def _check_vocabulary(self, tokenizer: Tokenizer) -> None:
        wanted = self.recipe.model.vocab_size
        if wanted and wanted < tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size = {wanted} is smaller than the tokenizer's {tokenizer.vocab_size}; "
                "leave it out to take the tokenizer's"
            )

    def _check_stop_tokens(self, tokenizer: Tokenizer) -> None:
        for token in self.recipe.generate.stop:
            if token not in tokenizer.special_tokens:
                raise UserError(
                    f"generate.stop names {token!r}, which is no special token of the tokenizer "
                    f"({', '.join(tokenizer.special_tokens)})"
                )

    @property
    def separator_id(self) -> int:
        """The first special token separates documents."""
        specials = self.tokenizer.special_tokens
        named = [token for token in self.recipe.tokenizer.special_tokens if token in specials]
        return specials[named[0]] if named else next(iter(specials.values()))

    @functools.cached_property
    def data(self) -> TokenData:
        """Tokenise the corpus, or take it from the cache."""
        tokenizer = self.tokenizer
        config, started = self.recipe.data, time.perf_counter()
        key = stable_hash(
            {
                "corpus": self.fingerprint,
                "tokenizer": tokenizer.content_hash,
                "separator": self.separator_id,
                "shard_tokens": config.shard_tokens,
                "dtype": config.dtype,
            }
        )
        self._refuse_change("data", key)
        folder = config.cache / "data" / key
        action = "skipped" if (folder / "manifest.json").exists() else "built"
        if action == "built" and (folder / "unfinished.json").exists():
            action = "resumed"
        prepare(
            self.corpus, tokenizer, folder, config, separator_id=self.separator_id, show_progress=self.show_progress
        )
        data = TokenData.open(folder, tokenizer)
        train, held_out = data.split("train"), data.split("validation")
        note = f"{len(train):,} tokens to train on, {len(held_out):,} held out ({held_out.bytes:,} bytes)"
        self._finish("data", key, action, started, note)
        return data

    # --- model ---------------------------------------------------------------------------------------------------

    @property
    def model_config(self) -> ModelConfig:
        config = self.recipe.model
        return config if config.vocab_size else config.model_copy(update={"vocab_size": self.tokenizer.vocab_size})

    @functools.cached_property
    def device(self) -> torch.device:
        from scratchlm.train.precision import choose_device

        return choose_device(self.recipe.device)

    @property
    def _train_key(self) -> str:
        return stable_hash(
            {"learnt": what_is_learnt(self.recipe), "data": self._keys()["data"], "model": plain(self.model_config)}
        )

    def train(self) -> None:
        """Train from the newest checkpoint, or from the start, to the last step."""
        from scratchlm.data.loader import EpochLoader, RandomLoader
        from scratchlm.data.prefetch import Prefetcher
        from scratchlm.model.transformer import Transformer
        from scratchlm.train.checkpoint import checkpoints
        from scratchlm.train.loop import Trainer
        from scratchlm.train.loss import NextTokenLoss
        from scratchlm.train.trackers import Trackers

        data, recipe, started = self.data, self.recipe, time.perf_counter()
        key = self._train_key
        found = checkpoints(self.folder / "checkpoints")
        self._refuse_change("training", key)
        if found and found[-1].step >= recipe.train.steps:
            self._finish("train", key, "skipped", started, f"{found[-1].step:,} steps")
            return
        write_json(self.folder / "steps.json", {**self._keys(), "training": key})
        model = Transformer(self.model_config, seed=recipe.seed)
        self.say(
            f"model      {model.num_params():,} parameters, "
            f"{3 * model.flops_per_token(model.config.context_length) / 1e6:,.1f} MFLOP per trained token"
        )
        self._describe_environment(model)
        kind = EpochLoader if recipe.train.loader == "epoch" else RandomLoader
        loader = kind(
            data.split("train"),
            recipe.train.batch_size,
            model.config.context_length,
            recipe.seed,
            document_boundaries=recipe.train.document_boundaries,
        )
        trackers = Trackers(
            recipe.train.trackers,
            folder=self.folder,
            project=recipe.train.project,
            name=recipe.name,
            config=what_is_learnt(recipe),
            resumed_at=found[-1].step if found else None,
        )
        with trackers, Prefetcher(loader) as batches:
            trainer = Trainer(
                model=model,
                loss=NextTokenLoss(model, recipe.train.loss_kernel),
                loader=batches,
                config=recipe.train,
                optim=recipe.optim,
                folder=self.folder,
                device=self.device,
                validate=lambda: self._validation(model, trainer.state.precision),
                trackers=trackers.log,
                tokenizer=self.folder / "tokenizer.json",
                say=self.say,
                show_progress=self.show_progress,
            )
            state = trainer.fit()
        note = f"{state.tokens:,} tokens in {state.seconds:.0f} s"
        if state.skipped:
            note += f", {state.skipped} non-finite steps skipped"
        self._finish("train", key, "resumed" if found else "built", started, note)

    def _describe_environment(self, model: Transformer) -> None:
        from scratchlm.evaluate.environment import describe_environment

        write_json(self.folder / "environment.json", describe_environment(model.num_params()))

    def _windows(self, context_length: int, stride: int | None) -> Iterable[Any]:
        from scratchlm.data.loader import evaluation_windows

        return evaluation_windows(
            self.data.split("validation"), context_length, stride, self.recipe.evaluate.batch_size
        )

    def _validation(self, model: Transformer, precision: str) -> dict[str, float]:
        """The whole validation set, as the training loop asks for it: windows of the model's length, no overlap."""
        import torch

        from scratchlm.evaluate.metrics import evaluate_loss

        summed = evaluate_loss(
            model,
            self._windows(model.config.context_length, None),
            device=self.device,
            autocast=torch.bfloat16 if precision == "bf16" else None,
        )
        return {
            "loss": summed.loss,
            "perplexity": summed.perplexity,
            "bits_per_byte": summed.bits_per_byte(self.data.split("validation").bytes),
        }

    # --- what comes after training -------------------------------------------------------------------------------

    @functools.cached_property
    def _best(self) -> tuple[Path, str]:
        """The best checkpoint's folder, and a name for what it holds."""
        from scratchlm.interop.native import best_checkpoint

        checkpoint = best_checkpoint(self.folder)
        return checkpoint.path, f"{self._keys().get('training')}/{checkpoint.path.name}"

    @property
    def _precision(self) -> str:
        """What training computed in, so that its last validation and the evaluation are one figure."""
        state = read_json(self._best[0] / "state.json", "checkpoint state")
        return str(state["progress"]["precision"])

    @functools.cached_property
    def _trained(self) -> Transformer:
        """The best checkpoint's model on the device."""
        from scratchlm.interop.native import load

        model, _ = load(self._best[0])
        return model.to(self.device)

    def evaluate(self) -> Evaluation:
        """Loss, perplexity and bits per byte of the best checkpoint on the held-out text, beside gzip and xz."""
        from scratchlm.evaluate.compressors import compressed_sizes
        from scratchlm.evaluate.evaluation import evaluate_tokens
        from scratchlm.evaluate.metrics import Evaluation

        data, started = self.data, time.perf_counter()
        key = stable_hash({"model": self._best[1], "evaluate": plain(self.recipe.evaluate)})
        path = self.folder / "evaluation.json"
        if self._keys().get("evaluate") == key and path.exists():
            result = Evaluation.load(path)
            self._finish("evaluate", None, "skipped", started)
            return result
        held_out = data.split("validation")
        compressors = {}
        if self.recipe.evaluate.compressors:
            compressors = compressed_sizes(
                self.corpus.bytes_of("validation"), total=held_out.bytes, show=self.show_progress
            )
        result = evaluate_tokens(
            self._trained,
            held_out,
            self.recipe.evaluate,
            compressors=compressors,
            precision=self._precision,
            show_progress=self.show_progress,
        )
        result.save(path)
        self._finish("evaluate", key, "built", started, f"{result.bits_per_byte:.4f} bits per byte")
        return result

    def sample(self) -> list[tuple[str, str]]:
        """One sample for each prompt, from the best checkpoint."""
        from scratchlm.evaluate.samples import read_samples, write_samples
        from scratchlm.generate import Generator

        started = time.perf_counter()
        key = stable_hash({"model": self._best[1], "generate": plain(self.recipe.generate)})
        path = self.folder / "samples.txt"
        if self._keys().get("sample") == key and path.exists():
            self._finish("sample", None, "skipped", started)
            return [(prompt, continuation) for prompt, continuation in read_samples(path)]
        config = self.recipe.generate
        texts = Generator(self._trained, self.tokenizer).generate(
            config.prompts,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop=config.stop,
            seed=config.seed,
        )
        samples = list(zip(config.prompts, texts, strict=True))
        write_samples(path, samples)
        self._finish("sample", key, "built", started, f"{len(samples)} samples")
        return samples

    def report(self) -> Path:
        """loss.png and report.html."""
        from scratchlm.evaluate.plots import plot_loss
        from scratchlm.evaluate.report import write_report

        started = time.perf_counter()
        shown = ("metrics.jsonl", "evaluation.json", "samples.txt", "recipe.toml", "environment.json")
        key = stable_hash({name: file_hash(self.folder / name) for name in shown if (self.folder / name).exists()})
        page, picture = self.folder / "report.html", self.folder / "loss.png"
        if self._keys().get("report") == key and page.exists() and picture.exists():
            self._finish("report", None, "skipped", started)
            return page
        path = self.folder / "evaluation.json"
        compressors = read_json(path, "evaluation")["compressors"] if path.exists() else {}
        yardsticks = {name: result["bits_per_byte"] for name, result in compressors.items()}
        plot_loss(self.folder / "metrics.jsonl", picture, yardsticks=yardsticks)
        page = write_report(self.folder)
        self._finish("report", key, "built", started)
        return page

    def run(self, until: str = "report") -> None:
        """All steps up to and including `until`, each if it is not up to date."""
        with self._only_one():
            save_recipe(self.recipe, self.folder / "recipe.toml")
            for step in STEPS[: STEPS.index(until) + 1]:
                self._do(step)

    def run_only(self, step: str) -> Any:
        """One step, and of those before it what it reads; the run's recipe.toml stays as it is."""
        with self._only_one():
            return self._do(step)

    def _do(self, step: str) -> Any:
        result = getattr(self, step)  # the tokenizer and the data are made by asking for them
        return result() if step not in ("tokenizer", "data") else result


def move_aside(folder: Path) -> Path | None:
    """Rename an existing run's folder to ``<name>.old-1`` (or the next free number); None if there is nothing."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target
