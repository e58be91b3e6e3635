"""The training loop: one for every task. A task hands it a loss and a source of batches."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.errors import UserError, first_line
from scratchlm.model.transformer import Transformer
from scratchlm.optim import build_optimizers, lr_multiplier
from scratchlm.progress import progress
from scratchlm.tokenizer import Tokenizer
from scratchlm.train import fitting
from scratchlm.train.checkpoint import (
    Checkpoint,
    Progress,
    checkpoints,
    first_difference,
    generator_states,
    load_weights,
    prune,
    remove_leftovers,
    restore_generators,
    save_checkpoint,
)
from scratchlm.train.live import Live, Utilisation, memory_in_use
from scratchlm.train.metrics import MetricsFile
from scratchlm.train.outcome import Outcome
from scratchlm.train.precision import (
    Decision,
    check_fp8,
    choose_compile,
    choose_precision,
    is_compiler_error,
)
from scratchlm.train.signals import Interrupted, Signals
from scratchlm.train.step_graph import NotRecorded, StepGraph
from scratchlm.train.task import Loader, Loss
from scratchlm.train.update import Update
from scratchlm.train.working_copy import Computing


@dataclass
class Trainer:
    """Trains `model` and leaves metrics and checkpoints behind.

    Args:
        model: on the CPU or on `device` already.
        loss: ``loss(batch)`` is the sum over the batch's targets, in nats.
        loader: batches of `config.batch_size` sequences, or as :meth:`TrainConfig.batch_size_at` has them grow.
        config: the loop's settings.
        optim: optimizer, schedule and clipping.
        folder: the run's folder: ``metrics.jsonl`` and ``checkpoints/`` go there.
        device: where to train.
        validate: returns at least ``{"loss": nats per token}`` for the whole validation set; None: no validation.
        trackers: called with every line of metrics, after it is on disk.
        seed: of dropout and jitter; a resumed run goes on from the saved state of the generators.
        tokenizer: saved in every checkpoint; a run resumes with the same one only.
        plan: what a step will need, for micro-batches that are to be fitted; None: they are found by trying.
        utilisation: (FLOP/s, precision) → share of the device's peak; None: it is not shown.
        say: receives one-line messages for the user.
        show_progress: show the bar.
    """

    model: Transformer
    loss: Loss
    loader: Loader
    config: TrainConfig
    optim: OptimConfig
    folder: Path
    device: torch.device
    validate: Callable[[], Mapping[str, float]] | None = None
    trackers: Callable[[Mapping[str, Any]], None] = lambda record: None
    tokenizer: Tokenizer | None = None
    seed: int = 0
    plan: fitting.Plan | None = None
    utilisation: Utilisation | None = None
    say: Callable[[str], None] = print
    show_progress: bool = True
    state: Progress = field(default_factory=Progress)
    _signals: Signals = field(default_factory=Signals)
    _figures: dict[str, Any] = field(default_factory=dict)
    _parts: int | None = None  # micro-batches per step, as they were fitted
    _live: Live = field(default_factory=Live)
    _computing: Computing = field(init=False)
    update: Update = field(init=False)
    _graph: StepGraph | None = None
    _told_of_parts: bool = False
    _ahead: bool = False  # a step that is not finite is left out on the device: the host need not wait for it

    def fit(self) -> Progress:
        """Train until `config.steps`, from the newest checkpoint if there is one.

        Raises:
            Interrupted: a signal arrived.
            UserError: the checkpoint is of another model, too many losses in a row were not finite, or memory does not
                suffice for the micro-batches demanded (if they are fitted: for one sequence).
        """
        self.model.to(self.device)
        self.optimizers = build_optimizers(self.model, self.optim)
        remove_leftovers(self._checkpoints)
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        try:
            self._start()
            self._look_ahead()
            with self._signals:
                self._run()
        finally:
            self.metrics.close()
        return self.state

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _start(self) -> None:
        """Resume from the newest checkpoint, or begin; decide how to compute.

        A resumed run computes as it did before, so that it goes on to the last digit, unless the recipe now demands
        something else.
        """
        config = self.config
        found = checkpoints(self._checkpoints)
        if found:
            self._resume(found[-1])
        else:
            torch.manual_seed(self.seed)  # dropout and the routers' jitter draw from torch's own generators
            self.metrics.truncate_after(-1)
        if found and config.precision == "auto":
            precision = Decision(self.state.precision, "as before")
        else:
            precision = choose_precision(config.precision, self.device)
        if found and config.compile == "auto" and self.state.compile == "off":
            compiling = Decision("off", "as before")
        else:  # asked anew even if it was on: the compiler may have gone since
            compiling = choose_compile(config.compile, self.device, config.steps)
        self._compute(precision.value, compiling.value)
        self.say(
            f"training on {self.device.type}: {precision.value}{', weights too' if self._computing.copy else ''}{', products in fp8' if config.fp8 else ''} ({precision.reason}), "
            f"torch.compile {compiling.value} ({compiling.reason})"
        )
        if config.weights == "bf16" and self._computing.copy is None:
            self.say(f"train.weights = bf16 is for products in bf16: the weights stay fp32 in {precision.value}")
        if self.model.config.idle_router:
            self.say(
                "each token has one expert, and normalised its gate is always 1: the router learns from the balance loss alone; "
                "set model.moe.normalise = false, with router = softmax_topk or sigmoid"
            )
        if config.cuda_graph and self._on_gpu:
            alone = functools.partial(self._one, alone=True)
            self._graph = StepGraph(alone, self.loss, self.update.with_gradients(), self.device)
        elif config.cuda_graph:
            self.say(f"train.cuda_graph is for GPUs: {self.device.type} goes on without")
        if config.parts is None:
            self._fit_memory(as_before=found[-1].state().get("parts") if found else None)

    def _compute(self, precision: str, compile: str) -> None:
        """Compute in this precision, compiled or not, from now on, with what the recipe has to say of both.

        Raises:
            UserError: the device has no fp8, which the recipe demands.
        """
        self.state.precision, self.state.compile = precision, compile
        self._computing = Computing(self.model, precision, self.config.weights, self.device)
        self.update = Update(self.optimizers, self._computing, self.optim.grad_clip)
        if self._computing.copy is not None:
            self.loss.use(self._computing.model)
        if self.config.fp8:
            check_fp8(precision, self.device)
            self._computing.model.multiply_in_fp8()
        if compile == "on":
            self.loss.compile(self.config.compile_mode)

    def _look_ahead(self) -> None:
        """Go on to the next step without waiting for this one, where the device can leave it out by itself. (A router's biases are moved by the
        host, which has to know.)"""
        self._ahead = self.optimizers.skips_on_device() and not self.model.config.moe.bias_update

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def parts(self) -> int:
        """Micro-batches per step, at present."""
        return self.config.parts or self._parts or 1

    def _fit_memory(self, as_before: Any) -> None:
        """Choose how batches are split, and try it on a batch of random ids; nothing of the run changes.

        Args:
            as_before: the parts that the run to be resumed had, if any: its last digits depend on them.
        """
        config = self.config
        if type(as_before) is int and as_before >= 1 and config.batch_size % as_before == 0:
            self._parts = as_before
            self.say(f"micro-batches of {config.batch_size // as_before}, as before")
            return
        self._parts = 1
        if self.plan is None:  # the first step will tell
            return
        with fitting.untouched_generators(self.device):
            state = self.optimizers.named_state().values()
            weights = [*self.model.parameters(), *self.model.buffers(), *self._computing.copied()]
            held = fitting.held_bytes([*weights, *state], self.device)
            how = self.state.precision, self.loss.compiled
            size, need = fitting.choose(config, *how, self.device, held, self.plan, self.say)
            self._parts = config.batch_size // size
            # The optimizer's state comes with the first step: until then its room is taken here.
            missing = max(0, need.state - fitting.held_bytes(state, self.device))
            with fitting.refused_not_killed(self.device):
                room = fitting.occupied(missing, self.device)
                self._backward(self.plan.probe(config.batch_size))
                del room
            self._forget_step()

    def _forget_step(self) -> None:
        """Gradients and sums of a step that does not count."""
        self.update.zero_grad()
        if self._graph is not None:
            self._graph.forget()
        self.loss.after_step(updated=False)
        fitting.release(self.device)

    def _resume(self, checkpoint: Checkpoint) -> None:
        progress = checkpoint.progress()
        if (differing := first_difference(checkpoint.config(), self.model.config)) is not None:
            name, then, now = differing
            raise UserError(
                f"{checkpoint.path} holds a model with {name} = {then}, the recipe says {now}: "
                "resume with the same model section, or start a new run with another --out"
            )
        if self.tokenizer is not None and checkpoint.tokenizer_hash() not in (None, self.tokenizer.content_hash):
            raise UserError(
                f"{checkpoint.path} was trained with another tokenizer: resume with that one, "
                "or start a new run with another --out"
            )
        load_weights(self.model, checkpoint)
        tensors = checkpoint.optimizer()
        if self.optimizers.average is not None:
            tensors |= checkpoint.averages(self.optimizers.average)
        restore_generators(tensors, self.device)
        self.optimizers.load_named_state({k: v for k, v in tensors.items() if not k.startswith("rng.")})
        self.loader.load_state_dict(checkpoint.state()["loader"])
        self.state = progress
        self.metrics.truncate_after(self.state.step)
        self.say(f"resuming from step {self.state.step:,} of {self.config.steps:,}")

    def _run(self) -> None:
        config, state = self.config, self.state
        self._clock = time.perf_counter() - state.seconds
        self._live = Live(
            self.model.training_flops_per_token(self.model.config.context_length),
            self.utilisation,
            lambda: memory_in_use(self.device),
        )
        with progress(
            description="train", total=config.steps, initial=state.step, unit="step", show=self.show_progress
        ) as bar:
            waiting: Outcome | None = None
            while state.step < config.steps:
                outcome = self._step()
                state.step += 1
                state.tokens += outcome.tokens
                last, logs = state.step == config.steps, self._logs(state.step)
                evaluates = last or state.step % config.eval_interval == 0
                saves = last or state.step % config.checkpoint_interval == 0
                if waiting is not None:
                    self._note(waiting, bar)
                    waiting = None
                if self._ahead and not (logs or evaluates or saves or self._signals.arrived is not None):
                    waiting = outcome  # the host goes on to the next step meanwhile
                    continue
                norm = self._note(outcome, bar)
                if logs:
                    self._log(norm)
                improved = evaluates and self._evaluate()
                stop = self._signals.arrived  # read once: it may come at any moment
                if saves or improved or stop is not None:
                    self._save()
                if stop is not None:
                    raise Interrupted(
                        f"{signal.Signals(stop).name}: stopped after step {state.step:,} of {config.steps:,}; "
                        "the checkpoint is written, the same command goes on from there",
                        stop,
                    )
        if config.steps == 0:
            self._save()

    def _step(self) -> Outcome:
        """One optimizer step, in the lecture's six moves."""
        batch = self.loader.next_batch()
        self.optimizers.set_lr(lr_multiplier(self.state.step, self.config.steps, self.optim))
        total, tokens = self._backward(batch)
        norm = self.update.clip()
        if (extra := self.loss.extra()) is not None:
            total = total - extra
        outcome = Outcome(self.state.step + 1, total, norm, tokens)
        self._live.add(tokens, batch.targets.numel())
        if self._logs(outcome.step):
            self._figures = self.loss.figures()
        updates = self._ahead or outcome.is_finite()
        self.loss.after_step(updates)
        if updates:
            self.update.apply(skip=outcome.failed() if self._ahead else None)  # 6
        return outcome

    def _note(self, outcome: Outcome, bar: Any) -> float:
        """Take down what a step came to; returns its gradient norm."""
        loss, norm = outcome.read()
        if outcome.is_finite():
            self.state.loss_sum += loss
            self.state.loss_steps += 1
            self.state.skipped_in_a_row = 0
        else:  # an event in the metrics, not a part of the mean
            self._skip(outcome.step, loss, norm)
        self._update_bar(bar, loss)
        return norm

    def _backward(self, batch: Any) -> tuple[Tensor, int]:
        """The batch's gradient; returns its summed loss and the number of its targets.

        What fails for want of memory, or of a working compiler, is done again on the same batch in another way.
        """
        tokens = fitting.count_targets(self.loss.targets(batch))
        drawn = None if self.config.parts is not None else generator_states(self.device)
        while True:
            try:
                return self._gradients(fitting.split(batch, self._at_once(batch)), tokens), tokens
            except Exception as error:
                if fitting.is_out_of_memory(error):
                    self._smaller_parts(error)
                elif self.loss.compiled and is_compiler_error(error):
                    self._without_compiler(error)
                elif self._graph is not None and isinstance(error, NotRecorded):
                    self.say(f"{error}: going on without train.cuda_graph, slower")
                    self._graph = None
                else:
                    raise
            # Only here the exception is gone, and with it the tensors that its frames held.
            self._forget_step()
            if drawn is not None:
                restore_generators(drawn, self.device)

    def _at_once(self, batch: Any) -> int:
        """Sequences per micro-batch. While the batch still grows it is one number for all its sizes: each shape that a
        compiled model meets is compiled anew."""
        size = self.config.batch_size // self.parts
        whole = batch.inputs.shape[0] == self.config.batch_size
        return size if whole else math.gcd(size, self.config.batch_warmup_start)

    def _smaller_parts(self, error: Exception) -> None:
        """Back off to the next smaller micro-batch, or say why there is none."""
        config, step = self.config, self.state.step + 1
        size = config.batch_size // self.parts
        if config.parts is not None:
            raise UserError(
                f"out of memory at step {step} with {size} sequences at once: set train.micro_batch = auto, or a smaller "
                "number; the same command then goes on from the last checkpoint"
            ) from error
        less = fitting.smaller(config.batch_size, size)
        if less is None:
            raise UserError(
                f"out of memory at step {step} with a single sequence at once: lower model.context_length or the model's "
                "size, or choose another device"
            ) from error
        self._parts = config.batch_size // less
        message = f"out of memory with {size} sequences at once: going on with micro-batches of {less}, {self._parts} per step"
        self._record({"kind": "event", "step": step, "message": message})
        self.say(message)

    def _without_compiler(self, error: Exception) -> None:
        stop = self._signals.arrived
        if stop is not None:  # Ctrl-C reaches the C++ compiler too: it did not fail, it was stopped
            raise Interrupted(
                f"{signal.Signals(stop).name}: stopped while compiling, after step {self.state.step:,} of "
                f"{self.config.steps:,}; the same command goes on from the last checkpoint",
                stop,
            ) from error
        self.say(f"torch.compile failed ({first_line(error)}): going on without it, slower")
        self.loss.eager()
        self.state.compile = "off"

    def _logs(self, step: int) -> bool:
        """Whether this step gets a line of metrics."""
        return step == self.config.steps or step % self.config.log_interval == 0

    def _gradients(self, micro_batches: list[Any], tokens: int) -> Tensor:
        """The gradient of the step's mean loss, summed over micro-batches; returns the summed loss.

        Each part is divided by all of the step's tokens, so that accumulation equals the big batch exactly.
        """
        self.update.zero_grad()  # 2
        if self._graph is not None and len(micro_batches) == 1:
            return self._graph(micro_batches[0].to(self.device), tokens)
        if self._graph is not None and not self._told_of_parts:
            self._told_of_parts = True
            self.say(
                "train.cuda_graph records batches that are computed at once: this one, in micro-batches, goes without"
            )
        if self.loss.replayed and len(micro_batches) > 1:
            # Else a gradient would be the graph's own memory, which the next part writes over.
            for parameter in self.update.parameters:
                parameter.grad = torch.zeros_like(parameter)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            total += self._one(batch, max(tokens, 1), alone=len(micro_batches) == 1)
        self._begins("optimizer")
        return total

    def _one(self, batch: Any, tokens: int | Tensor, *, alone: bool = False) -> Tensor:
        """Forward and backward of one micro-batch, the step's only one if `alone`; returns its summed loss."""
        self._begins("forward")
        with self._computing.context():
            loss = self.loss(batch.to(self.device))  # 1, 3, 4: batch to device, forward, loss
        self._begins("backward")
        (loss / tokens).backward()  # 5
        self.update.collect(alone=alone)
        return loss.detach()

    def _begins(self, phase: str) -> None:
        """For who wants to know (:mod:`scratchlm.resources.profile_timing`): a part of the step begins."""

    def _skip(self, step: int, loss: float, norm: float) -> None:
        """The policy for a loss or gradient that is not finite: leave the weights alone, count, stop after too many."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        message = f"loss {loss}, gradient norm {norm}: step skipped ({state.skipped_in_a_row} in a row)"
        self._record({"kind": "event", "step": step, "message": message})
        if state.skipped_in_a_row > self.config.max_non_finite:
            raise UserError(
                f"training stopped at step {step}: {state.skipped_in_a_row} steps in a row had a loss or gradient "
                f"that is not finite; begin anew (--fresh, or another --out) with a lower optim.lr or more optim.warmup_steps"
            )
        self.say(message)

    def _evaluate(self) -> bool:
        """Validate, log, and say whether it is the best so far."""
        if self.validate is None:
            return False
        result, said = dict(self.validate()), ""
        state = self.state
        if (average := self.optimizers.average) is not None:
            with average.swapped():
                result |= {f"{name}_ema": value for name, value in self.validate().items()}
            said = f", averaged weights {result['loss_ema']:.4f}"
        self._record(
            {
                "kind": "validation",
                "step": state.step,
                **result,
                "tokens": state.tokens,
                "seconds": self._elapsed(),
            }
        )
        bits = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
        self.say(f"step {state.step:,}: validation loss {result['loss']:.4f}{bits}{said}")
        self._live.restart()  # validation does not count as training speed
        best = math.inf if state.best_loss is None else state.best_loss
        if result["loss"] < best:  # never true of NaN
            state.best_loss, state.best_step = result["loss"], state.step
            return True
        return False

    def _log(self, norm: float) -> None:
        state = self.state
        if not state.loss_steps:  # all steps since the last line were skipped
            return
        speed, complaint = self._live.figures(state.precision)
        if complaint is not None:
            self._record({"kind": "event", "step": state.step, "message": complaint})
            self.say(complaint)
        self._record(
            {
                "kind": "train",
                "step": state.step,
                "loss": state.loss_sum / state.loss_steps,
                "lr": self._lr(),
                "grad_norm": norm,
                "tokens": state.tokens,
                "seconds": self._elapsed(),
                **speed,
                **self._figures,
            }
        )
        state.loss_sum, state.loss_steps = 0.0, 0
        self._live.restart()

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.log(record)
        self.trackers(record)

    def _lr(self) -> float:
        """The learning rate of the step just made."""
        return self.optim.lr * lr_multiplier(self.state.step - 1, self.config.steps, self.optim)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._clock

    def _save(self) -> None:
        state = self.state
        state.seconds = self._elapsed()
        tensors = {**self.optimizers.named_state(), **generator_states(self.device)}
        saved = {"progress": vars(state), "loader": self.loader.state_dict(), "parts": self.parts}
        average = self.optimizers.average
        save_checkpoint(self._checkpoints, state.step, self.model, tensors, saved, self.tokenizer, average)
        prune(self._checkpoints, self.config.keep_checkpoints, state.best_step)
        self._live.restart()  # nor does writing checkpoints

    def _update_bar(self, bar: Any, loss: float) -> None:
        live = self._live.postfix(self.state.precision)
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{self._lr():.2e}", **live, refresh=False)
        bar.update(1)
