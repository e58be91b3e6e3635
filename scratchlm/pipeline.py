"""A whole run: tokenizer → data → train → evaluate → sample → report.

Every step has a key, a hash of all that its result depends on. A step whose key is that of the last time is skipped, one
that was cut off goes on, anything else is done; which it was is said, and kept in ``timings.json``. Tokenizers and
shards lie in a cache under their keys, so that runs with the same text share them.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scratchlm.config import Recipe, plain
from scratchlm.data import digests, open_corpus, prepare
from scratchlm.data.corpus import Corpus
from scratchlm.data.tokens import TokenData
from scratchlm.errors import UserError
from scratchlm.files import atomic_directory, file_hash, lock, read_json, stable_hash, write_json
from scratchlm.model.config import ModelConfig
from scratchlm.run_folder import RunFolder, what_is_learnt
from scratchlm.tokenizer import Tokenizer, train_bpe

if TYPE_CHECKING:
    import torch

    from scratchlm.evaluate.metrics import Evaluation
    from scratchlm.model.transformer import Transformer

STEPS = ("tokenizer", "data", "train", "evaluate", "sample", "report")

VERSIONS = {"tokenizer": 1, "data": 1, "evaluate": 1, "sample": 1, "report": 1}
"""Part of each step's key. Raised when the same inputs give another result than before: merges, shards, figures, texts,
pages. (Training's is ``FORMAT_VERSION`` of :mod:`scratchlm.train.loop`, kept in the checkpoints.)"""


def _key(step: str, **inputs: Any) -> str:
    return stable_hash({"version": VERSIONS[step], **inputs})


class Pipeline:
    """The steps of one recipe; each makes sure that those before it are up to date.

    Args:
        recipe: the resolved recipe.
        say: receives one-line messages.
        show_progress: show bars.
        finished: only look at a trained run: its tokenizer is taken as it is, and the folder is not claimed.

    Raises:
        UserError: the run's folder holds something else, or a run of a recipe that learns something else.
    """

    def __init__(
        self,
        recipe: Recipe,
        say: Callable[[str], None] = print,
        show_progress: bool = True,
        finished: bool = False,
    ) -> None:
        self.recipe = recipe
        self.folder = RunFolder(recipe, say)
        self.say = say
        self.show_progress = show_progress
        self.finished = finished
        if not finished:
            self.folder.claim()
        if recipe.threads is not None:
            import torch

            torch.set_num_threads(recipe.threads)

    def run(self, until: str = "report") -> None:
        """All steps up to and including `until`, each if it is not up to date."""
        if "train" in STEPS[: STEPS.index(until) + 1]:
            self._check_machine()
        with self.folder.locked():
            self.folder.save_recipe()
            for step in STEPS[: STEPS.index(until) + 1]:
                result = getattr(self, step)  # the tokenizer and the data are made by asking for them
                if step not in ("tokenizer", "data"):
                    result()

    def _check_machine(self) -> None:
        """What the recipe demands and the machine lacks is said now, not after an hour of tokenising."""
        from scratchlm.train.precision import check_fp8, choose_compile, choose_precision

        precision = choose_precision(self.recipe.train.precision, self.device)
        if self.recipe.train.fp8:
            check_fp8(precision.value, self.device)
        choose_compile(self.recipe.train.compile, self.device, self.recipe.train.steps)
        if self.recipe.generate.weights == "int8":
            from scratchlm.generate.fused_step import why_not_config
            from scratchlm.generate.generator import IN_8_BITS

            elsewhere = f"device = {self.device.type}" if self.device.type != "cpu" else None
            if (reason := why_not_config(self.recipe.model) or elsewhere) is not None:
                raise UserError(f"{IN_8_BITS}, here is {reason}; leave it out")
        for tracker in self.recipe.train.trackers:
            if importlib.util.find_spec(tracker) is None:
                raise UserError(f"train.trackers names {tracker}, which is not installed: pip install {tracker}")

    # --- tokenizer and data --------------------------------------------------------------------------------------

    @functools.cached_property
    def corpus(self) -> Corpus:
        return open_corpus(self.recipe.corpus)

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint(show_progress=self.show_progress)

    def _key_of_corpus(self, step: str, **fields: Any) -> str:
        """The key of a step that follows from the corpus and `fields`.

        A run that was begun when corpora were hashed by BLAKE2b keeps its keys, and finds its tokenizer and its tokens by them.
        """
        key, recorded = _key(step, corpus=self.fingerprint, **fields), self.folder.key(step)
        if recorded in (None, key):
            return key
        before = self.corpus.fingerprint(show_progress=self.show_progress, algorithm=digests.BEFORE)
        if _key(step, corpus=before, **fields) == recorded:
            self.__dict__["fingerprint"] = before
            return recorded
        return key

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Train the tokenizer, or take it from the cache, from where the recipe says, or from the finished run."""
        if self.finished:
            return Tokenizer.load(self.folder / "tokenizer.json")
        config, started = self.recipe.tokenizer, time.perf_counter()
        if config.path is not None:
            tokenizer = Tokenizer.load(config.path)
            key, action = tokenizer.content_hash, "skipped"
        else:
            fields = {name: value for name, value in plain(config).items() if name != "path"}
            key = self._key_of_corpus("tokenizer", **fields)
            tokenizer, action = self._trained_tokenizer(key)
        self._check_tokenizer(tokenizer)
        self.folder.refuse_change("tokenizer", key, "the corpus or the tokenizer")
        tokenizer.save(self.folder / "tokenizer.json")
        seconds = time.perf_counter() - started
        self.folder.finish("tokenizer", key, action, seconds, f"{tokenizer.vocab_size:,} ids")
        return tokenizer

    def _trained_tokenizer(self, key: str) -> tuple[Tokenizer, str]:
        """From the cache, else trained; a second process that wants the same one waits for the first."""
        config = self.recipe.tokenizer
        cached = self.recipe.cache / "tokenizer" / key / "tokenizer.json"
        with lock(
            cached.parent.with_name(f"{key}.lock"), busy="another process is training this tokenizer; waiting"
        ):
            if cached.exists():
                return Tokenizer.load(cached), "skipped"
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
            return Tokenizer.load(cached), "built"

    def _training_text(self) -> Iterator[str]:
        most = self.recipe.tokenizer.max_train_bytes
        seen = 0
        for document in self.corpus.documents("train"):
            yield document.text
            seen += len(document.utf8)
            if most is not None and seen >= most:
                return

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """What the later steps will want of it."""
        if not tokenizer.special_tokens:
            raise UserError(
                f"tokenizer {self.recipe.tokenizer.path} has no special token to separate documents; "
                "add one, such as <|endoftext|>"
            )
        wanted = self.recipe.model.vocab_size
        if wanted and wanted < tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size = {wanted} is smaller than the tokenizer's {tokenizer.vocab_size}; "
                "leave it out to take the tokenizer's"
            )
        for token in self.recipe.generate.stop:
            if token not in tokenizer.special_tokens:
                raise UserError(
                    f"generate.stop names {token!r}, which is no special token of the tokenizer "
                    f"({', '.join(tokenizer.special_tokens)})"
                )

    @property
    def separator_id(self) -> int:
        return separator_id(self.tokenizer, self.recipe)

    @functools.cached_property
    def data(self) -> TokenData:
        """Tokenise the corpus, or take it from the cache."""
        tokenizer = self.tokenizer
        config, started = self.recipe.data, time.perf_counter()
        key = self._key_of_corpus(
            "data",
            tokenizer=tokenizer.content_hash,
            separator=self.separator_id,
            shard_tokens=config.shard_tokens,
            dtype=config.dtype,
        )
        if not self.finished:
            self.folder.refuse_change("data", key, "the corpus or the tokenizer")
        elif self.folder.key("data") not in (key, None):
            raise UserError(
                f"the corpus or the tokenizer has changed since {self.folder.path} was trained, and with it what was held out: bring it "
                "back, or name files to evaluate on after the run's folder"
            )
        folder = self.recipe.cache / "data" / key
        action = "skipped" if (folder / "manifest.json").exists() else "built"
        if action == "built" and (folder / "unfinished.json").exists():
            action = "resumed"
        prepare(
            self.corpus, tokenizer, folder, config, separator_id=self.separator_id, show_progress=self.show_progress
        )
        data = TokenData.open(folder, tokenizer)
        self._verify(data)
        train, held_out = data.split("train"), data.split("validation")
        note = f"{len(train):,} tokens to train on, {len(held_out):,} held out ({held_out.bytes:,} bytes)"
        if not self.finished:
            self.folder.finish("data", key, action, time.perf_counter() - started, note)
        return data

    def _verify(self, data: TokenData) -> None:
        """Compare the shards with their checksums, unless their sizes and times are those of the last comparison."""
        found = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(data.folder.glob("*.bin"))
        }
        record = data.folder / "verified.json"
        if not record.exists() or read_json(record) != found:
            data.verify(show_progress=self.show_progress)
            write_json(record, found)

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def model_config(self) -> ModelConfig:
        config = self.recipe.model
        return config if config.vocab_size else config.model_copy(update={"vocab_size": self.tokenizer.vocab_size})

    @functools.cached_property
    def device(self) -> torch.device:
        from scratchlm.train.precision import choose_device

        return choose_device(self.recipe.device)

    def train(self) -> None:
        """Train from the newest checkpoint, or from the start, to the last step."""
        from scratchlm.data.loader import EpochLoader, RandomLoader
        from scratchlm.data.prefetch import Prefetcher
        from scratchlm.evaluate.environment import describe_environment
        from scratchlm.model.transformer import Transformer
        from scratchlm.resources.no_compiler import DYNAMO, without_the_compiler
        from scratchlm.resources.utilisation import mfu_on
        from scratchlm.train.batch_warmup import GrowingBatches
        from scratchlm.train.checkpoint import checkpoints
        from scratchlm.train.loop import Trainer
        from scratchlm.train.loss import NextTokenLoss, loss_options
        from scratchlm.train.precision import choose_compile
        from scratchlm.train.trackers import Trackers

        data, recipe = self.data, self.recipe
        key = stable_hash(
            {
                "learnt": what_is_learnt(recipe),
                "vocab_size": self.model_config.vocab_size,
                "data": self.folder.key("data"),
            }
        )
        found = checkpoints(self.folder / "checkpoints")
        self.folder.refuse_change("training", key, "what is to be learnt")
        if found and found[-1].step >= recipe.train.steps:
            self.folder.finish("train", key, "skipped", 0.0, f"{found[-1].step:,} steps")
            return
        self.folder.set_key("training", key)
        model = Transformer(self.model_config, seed=recipe.seed)
        if recipe.train.start_from is not None and not found:
            from scratchlm.interop.folders import start_from

            start_from(model, recipe.train.start_from, self.tokenizer)
            self.say(f"weights    from {recipe.train.start_from}")
        active = model.num_active_params()
        self.say(
            f"model      {model.num_params():,} parameters, "
            + (f"{active:,} active per token, " if active < model.num_params() else "")
            + f"{model.training_flops_per_token(model.config.context_length) / 1e6:,.1f} MFLOP per trained token"
        )
        write_json(
            self.folder / "environment.json",
            describe_environment(model.num_params(), active if active < model.num_params() else None),
        )
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
            folder=self.folder.path,
            project=recipe.train.project,
            name=recipe.name,
            config=what_is_learnt(recipe),
            resumed_at=found[-1].step if found else None,
        )
        growing = GrowingBatches(loader, recipe.train) if recipe.train.batch_warmup_steps else loader
        plan = None
        if recipe.train.parts is None:
            from scratchlm.resources.plan import plan_of

            plan = plan_of(self.model_config, recipe.optim, recipe.train, device_type=self.device.type)
        eager = choose_compile(recipe.train.compile, self.device, recipe.train.steps).value == "off"
        # An optimizer of torch's kind imports the whole compiler, to be left alone by it: longer than a short run's first steps.
        with without_the_compiler(DYNAMO) if eager else nullcontext(), trackers, Prefetcher(growing) as batches:
            trainer = Trainer(
                model=model,
                loss=NextTokenLoss(model, **loss_options(recipe.train)),
                loader=batches,
                config=recipe.train,
                optim=recipe.optim,
                folder=self.folder.path,
                device=self.device,
                validate=lambda: self._validation(model, trainer.state.precision),
                trackers=trackers.log,
                tokenizer=self.tokenizer,
                seed=recipe.seed,
                plan=plan,
                utilisation=mfu_on(self.device),
                say=self.say,
                show_progress=self.show_progress,
            )
            state = trainer.fit()
        note = f"{state.step:,} steps, {state.tokens:,} tokens"
        if state.skipped:
            note += f", {state.skipped} non-finite steps skipped"
        self.folder.finish("train", key, "resumed" if found else "built", state.seconds, note)

    def _validation(self, model: Transformer, precision: str) -> dict[str, float]:
        """The whole validation set, as the training loop asks for it: windows of the model's length, no overlap."""
        import torch

        from scratchlm.data.loader import evaluation_windows
        from scratchlm.evaluate.evaluation import count_batches
        from scratchlm.evaluate.metrics import evaluate_loss

        held_out = self.data.split("validation")
        context, batch_size = model.config.context_length, self.recipe.evaluate.batch_size
        windows: Iterable[Any] = evaluation_windows(
            held_out,
            context,
            None,
            batch_size,
            document_boundaries=self.recipe.train.document_boundaries,
        )
        summed = evaluate_loss(
            model,
            windows,
            device=self.device,
            autocast=torch.bfloat16 if precision == "bf16" else None,
            show_progress=self.show_progress,
            total=count_batches(len(held_out), context, None, batch_size),
        )
        return {
            "loss": summed.loss,
            "perplexity": summed.perplexity,
            "bits_per_byte": summed.bits_per_byte(held_out.bytes),
        }

    # --- what comes after training -------------------------------------------------------------------------------

    @functools.cached_property
    def _best(self) -> tuple[Path, str]:
        """The best checkpoint's folder, and a name for what it holds."""
        from scratchlm.interop.native import best_checkpoint

        checkpoint = best_checkpoint(self.folder.path)
        return checkpoint.path, f"{self.folder.key('training')}/{checkpoint.path.name}"

    @functools.cached_property
    def _trained(self) -> Transformer:
        """The best checkpoint's model on the device."""
        from scratchlm.interop.native import load

        model, _ = load(self._best[0])
        return model.to(self.device)

    def evaluate(self, record: bool = True) -> Evaluation:
        """Loss, perplexity and bits per byte of the best checkpoint on the held-out text, beside gzip and xz.

        Args:
            record: keep the result as the run's evaluation.json.
        """
        from scratchlm.evaluate.compressors import compressed_sizes
        from scratchlm.evaluate.evaluation import evaluate_tokens
        from scratchlm.evaluate.metrics import Evaluation
        from scratchlm.interop.native import precision_of

        data, started = self.data, time.perf_counter()
        key = _key("evaluate", model=self._best[1], evaluate=plain(self.recipe.evaluate))
        path = self.folder / "evaluation.json"
        if record and self.folder.key("evaluate") == key and path.exists():
            self.folder.finish("evaluate", None, "skipped", 0.0)
            return Evaluation.load(path)
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
            precision=precision_of(self._best[0]),
            document_boundaries=self.recipe.train.document_boundaries,
            show_progress=self.show_progress,
        )
        if record:
            result.save(path)
            seconds = time.perf_counter() - started
            self.folder.finish("evaluate", key, "built", seconds, f"{result.bits_per_byte:.4f} bits per byte")
        return result

    def sample(self) -> None:
        """samples.txt: one continuation of each prompt, from the best checkpoint."""
        from scratchlm.evaluate.samples import write_samples
        from scratchlm.generate import Generator

        started = time.perf_counter()
        config = self.recipe.generate
        key = _key("sample", model=self._best[1], generate=plain(config))
        path = self.folder / "samples.txt"
        if self.folder.key("sample") == key and path.exists():
            self.folder.finish("sample", None, "skipped", 0.0)
            return
        generator = Generator(self._trained, self.tokenizer, separator_id=self.separator_id)
        texts = generator.generate(config.prompts, config, show_progress=self.show_progress)
        write_samples(path, zip(config.prompts, texts, strict=True))
        self.folder.finish("sample", key, "built", time.perf_counter() - started, f"{len(texts)} samples")

    def report(self) -> None:
        """loss.png and report.html."""
        from scratchlm.evaluate.plots import plot_loss
        from scratchlm.evaluate.report import write_report

        started = time.perf_counter()
        shown = ("metrics.jsonl", "evaluation.json", "samples.txt", "recipe.toml", "environment.json")
        inputs = {name: file_hash(self.folder / name) for name in shown if (self.folder / name).exists()}
        key = _key("report", **inputs)
        page, picture = self.folder / "report.html", self.folder / "loss.png"
        if self.folder.key("report") == key and page.exists() and picture.exists():
            self.folder.finish("report", None, "skipped", 0.0)
            return
        compressors = read_json(self.folder / "evaluation.json", "evaluation")["compressors"]
        yardsticks = {name: result["bits_per_byte"] for name, result in compressors.items()}
        plot_loss(self.folder / "metrics.jsonl", picture, yardsticks=yardsticks)
        write_report(self.folder.path)
        self.folder.finish("report", key, "built", time.perf_counter() - started)


def separator_id(tokenizer: Tokenizer, recipe: Recipe) -> int:
    """The id that ends documents: the first of the recipe's special tokens that the tokenizer has."""
    specials = tokenizer.special_tokens
    named = [token for token in recipe.tokenizer.special_tokens if token in specials]
    return specials[named[0]] if named else next(iter(specials.values()))
