"""One step of training as the trainer does it, traced without memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.data.loader import Batch
from scratchlm.kernels import (
    adam,
    attention,
    cross_entropy,
    cross_entropy_cpp,
    flash_attention_cpp,
    flash_attention_op,
    rotary,
    rows_cpp,
    swiglu,
    triton_here,
)
from scratchlm.kernels.attention import SHORT_COMPILED, SHORT_TRAINED
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.draw.hollow import NO_DRAWING
from scratchlm.model.transformer import Transformer
from scratchlm.optim import build_optimizers, clip_grad_norm, newton_schulz
from scratchlm.resources.compiled import compiled as as_compiled
from scratchlm.resources.no_compiler import fetched, uncollected
from scratchlm.resources.trace import Trace, Tracer, without_memory
from scratchlm.train.loss import NextTokenLoss, loss_options
from scratchlm.train.update import Update
from scratchlm.train.working_copy import Computing

CPU = torch.device("cpu")
P = ParamSpec("P")


@dataclass
class Step:
    """A traced step.

    Attributes:
        trace: operations and storages of one micro-batch (of the second, if there are several: gradients are there then) and
            of the optimizer; storages as of an eager step.
        memory: the same operations with the storages that there are: where the blocks are compiled, fewer.
        micro_batch, length: sequences per micro-batch, tokens per sequence.
        accumulation: micro-batches per step.
        precision: ``bf16`` (autocast) or ``fp32``.
        params: of the model: name → numbers.
    """

    trace: Trace
    memory: Trace
    micro_batch: int
    length: int
    accumulation: int
    precision: str
    params: dict[str, int]

    @property
    def tokens(self) -> int:
        """Per micro-batch."""
        return self.micro_batch * self.length


def as_on_a_gpu(config: ModelConfig, length: int) -> ModelConfig:
    """The same with what ``auto`` attention takes on a GPU where it takes something else on a CPU: torch's kernel for short sequences, if all layers
    are causal. (One kernel is named for all layers: where masks are mixed, the causal layers stay traced as on a CPU.)"""
    plain = all(choices.MASK.get(config.mask_at(n)).of(config).is_plain_causal for n in range(config.layers))
    short = config.attention_kernel == "auto" and config.kernels == "fast" and length <= SHORT_TRAINED
    other = short and plain and config.attention_soft_cap is None
    return config.model_copy(update={"attention_kernel": "sdpa"}) if other else config


def as_run_on(device_type: str, config: ModelConfig, length: int) -> ModelConfig:
    """The same with the attention that such a device takes, as far as a trace on a CPU would take another.

    Args:
        device_type: as torch calls it: ``cpu``, ``cuda`` (AMD's, too), ``mps``.
        config: the architecture.
        length: tokens per sequence.
    """
    if device_type == "cpu":
        return config
    if device_type == "cuda":  # its fused attention drops weights without keeping scores
        config = config.model_copy(update={"attention_dropout": 0.0})
    return as_on_a_gpu(config, length)


def _undisturbed(trace: Callable[P, Step]) -> Callable[P, Step]:
    """The same; but where a rule of torch imported a part of torch on the way, traced once more.

    While a module is imported, torch notes its own frames, and through them those of all callers, here of the whole step, stay until Python collects
    what goes in circles. Until then no tensor dies.
    """

    @functools.wraps(trace)
    def twice_if_need_be(*args: P.args, **how: P.kwargs) -> Step:
        before = fetched()
        found = trace(*args, **how)
        return found if fetched() == before else trace(*args, **how)

    return twice_if_need_be


class Traceable:
    """A model and its optimizers, made once, whose step can be traced for several micro-batches.

    A mixture of experts is traced with its grouped products, whatever `moe.dispatch`.

    Args:
        config: the architecture, with its vocabulary.
        optim, train: sections of the recipe.
        real: with memory and numbers, to hold the hollow ones to; slow.
        device_type: whose operations are traced: ``cuda``'s where they differ from a CPU's (:func:`_as_on_cuda`), a CPU's for all others. The
            attention is `config`'s: see :func:`as_run_on`.
    """

    def __init__(
        self,
        config: ModelConfig,
        optim: OptimConfig,
        train: TrainConfig,
        *,
        real: bool = False,
        device_type: str = "cpu",
    ) -> None:
        if config.moe.experts and not real:  # the formula asks which tokens each expert has, which nobody can say
            config = config.model_copy(update={"moe": config.moe.model_copy(update={"dispatch": "grouped"})})
        self.config, self.optim, self.train, self.real = config, optim, train, real
        self.device_type = device_type
        with self._place():
            self.model = Transformer(config.model_copy(update={} if real else NO_DRAWING), seed=0 if real else None)
            self.model.config = config
            self.optimizers = build_optimizers(self.model, optim)
            self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            for parameter in self.named.values():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizers.step()  # makes its state
            self.computing = {kind: Computing(self.model, kind, train.weights, CPU) for kind in ("fp32", "bf16")}

    def _place(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.real else without_memory()

    @_undisturbed
    def step(
        self,
        *,
        precision: str,
        micro_batch: int,
        accumulation: int = 1,
        length: int | None = None,
        loss_kernel: str | None = None,
        for_peak: bool = False,
        compiled: bool = False,
        checkpointing: str | None = None,
    ) -> Step:
        """Trace a step in its steady state: the optimizer's state is there, and between micro-batches the gradients are.

        Args:
            precision: ``bf16`` or ``fp32``.
            micro_batch: sequences at once.
            accumulation: micro-batches per step; two stand for any number above one.
            length: tokens per sequence; None: the model's context.
            loss_kernel: instead of the recipe's.
            for_peak: leave out the optimizer, which does the same whatever the micro-batch, and of the loss's blocks all that do
                as the one before them: the peak of forward and backward is the same.
            compiled: whether the blocks go through torch.compile (:mod:`scratchlm.resources.compiled`).
            checkpointing: instead of the recipe's ``train.activation_checkpointing``.
        """
        length = length or self.config.context_length
        with self._place():
            batch = self.batch(micro_batch, length)
            changed = {"loss_kernel": loss_kernel, "activation_checkpointing": checkpointing}
            train = self.train.model_copy(update={name: value for name, value in changed.items() if value})
            computing = self.computing[precision]
            loss = NextTokenLoss(computing.model, **loss_options(train))
            vocab, on_cuda = self.config.vocab_size, self.device_type == "cuda"
            loss.rows = cross_entropy.rows_for(vocab, compiled=compiled, device_type=self.device_type)
            computing.forget()
            for parameter in self.named.values():  # the micro-batches before have left their gradients
                parameter.grad = torch.zeros_like(parameter) if accumulation > 1 else None
            tracer = Tracer(computing.model, hollow=not self.real)
            self._watch_what_is_there(tracer, batch, computing.model)
            watch_gradients(tracer, self.model)
        in_place = on_cuda or (self.device_type == "cpu" and self._loss_is_in_place(precision, loss))
        place = _as_on_cuda(compiled) if on_cuda else _as_there(compiled, in_place, cpu=self.device_type == "cpu")
        with uncollected(), tracer, place, _few_blocks() if for_peak else contextlib.nullcontext():
            tracer.phase = "forward"
            with computing.context():
                objective = loss(batch)
            tracer.note_kept()
            tracer.phase = "backward"
            (objective / (micro_batch * length)).backward()
            watch_gradients(tracer, computing.model)
            update = Update(self.optimizers, computing, self.optim.grad_clip)
            update.collect(alone=accumulation == 1)
            watch_gradients(tracer, self.model)
            if not for_peak:
                tracer.phase = "optimizer"
                if update.in_one_pass:
                    update.clip()
                else:
                    self._clip()
                update.apply()
        params = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        trace = tracer.trace
        fused_loss = loss.kernel == "chunked" and not in_place  # that is one kernel in the trace already
        memory = as_compiled(trace, fused_loss=fused_loss) if compiled else trace
        return Step(trace, memory, micro_batch, length, accumulation, precision, params)

    def _loss_is_in_place(self, precision: str, loss: NextTokenLoss) -> bool:
        """Whether a kernel of ours puts the gradient in the logits' place on this machine's CPU."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return loss.kernel == "chunked" and cross_entropy_cpp.is_offered(CPU, dtype, loss.options)

    def _clip(self) -> None:
        """As :func:`scratchlm.optim.clip_grad_norm` where the norm is too large: only numbers could say that it is not."""
        clip_grad_norm(self.named.values(), 0)
        if self.optim.grad_clip:
            gradients = [parameter.grad for parameter in self.named.values() if parameter.grad is not None]
            torch._foreach_mul_(gradients, torch.ones(()))

    def batch(self, rows: int, length: int) -> Batch:
        """One of zeros, with what the recipe says of documents."""
        ids = torch.zeros(rows, length, dtype=torch.int64)
        positions = documents = None
        if self.train.document_boundaries:
            positions, documents = torch.zeros_like(ids), torch.zeros_like(ids)
        return Batch(ids, torch.zeros_like(ids), positions, documents)

    def _watch_what_is_there(self, tracer: Tracer, batch: Batch, computing: Transformer) -> None:
        for model in {id(model): model for model in (self.model, computing)}.values():
            for name, parameter in model.named_parameters():
                tracer.watch(parameter, "weights", name)
        tables = [getattr(module, "table", None) for module in self.model.modules()]
        given = [batch.inputs, batch.targets, batch.positions, batch.documents]
        for tensor in [*self.model.buffers(), *tables, *given]:
            if isinstance(tensor, Tensor):
                tracer.watch(tensor, "batch and tables")
        for name, state in self.optimizers.named_state().items():
            if state.ndim:
                tracer.watch(state, "optimizer state", name.split(".", 2)[-1])


def watch_gradients(tracer: Tracer, model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracer.watch(parameter.grad, "gradients", name)


def trace_step(
    config: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    *,
    real: bool = False,
    device_type: str = "cpu",
    **options: Any,
) -> Step:
    """One step; arguments as for :class:`Traceable` and :meth:`Traceable.step`."""
    return Traceable(config, optim, train, real=real, device_type=device_type).step(**options)


@contextlib.contextmanager
def _as_there(compiled: bool, loss_in_place: bool, *, cpu: bool) -> Iterator[None]:
    """The choices of ``auto`` attention and of the loss on a CPU, or on another device that is neither a CPU nor CUDA. Our kernels are not compiled to
    find out whether they could be."""
    from scratchlm.kernels import rms_norm_op, rotary_op, swiglu_op  # noqa: F401  (now, and not in the middle of what is traced)

    chosen = (lambda q: q.shape[-2] <= SHORT_COMPILED) if cpu and compiled else attention.goes_by_blocks
    runs = flash_attention_cpp.is_worth_it if cpu else (lambda dtype: False)
    in_rows = rows_cpp.is_worth_it if cpu and not compiled else (lambda dtype: False)  # a compiler has its own
    with contextlib.ExitStack() as changes:
        changes.enter_context(_replaced(attention, "goes_by_blocks", chosen))
        changes.enter_context(_replaced(flash_attention_cpp, "runs", runs))
        changes.enter_context(_replaced(rows_cpp, "runs", in_rows))
        changes.enter_context(_replaced(cross_entropy_cpp, "runs", lambda dtype: False))
        if loss_in_place:
            changes.enter_context(_replaced(cross_entropy, "_loss_and_gradient", _in_place_on_a_cpu))
        yield


@contextlib.contextmanager
def _as_on_cuda(compiled: bool) -> Iterator[None]:
    """What keeps less on CUDA, or computes in another dtype, does so inside, on a CPU's tensors.

    ::

        chunked loss    the gradient takes the place of the logits; those of the head are added up in fp32 by their products
        attention       under a mask or a soft cap one kernel that keeps no scores
        RMSNorm         one kernel keeps its input and a number per row, as layer norm does on both; compiled, a chain is what is fused
        dropout         keeps a mask of bytes, not factors in the input's dtype
        shared keys     in fp32 repeated for every head
        Newton–Schulz   in bf16, which every GPU since 2020 multiplies natively; matrices of one shape gathered in copies
        Adam, AdamW     one kernel that reads bf16 gradients as they are
        SwiGLU          one kernel, one for its gradient: keeps gate‖up alone
        RoPE            one kernel turns queries and keys and copies the values: keeps cos and sin, not the projection; eager also behind norms
    """
    from scratchlm.kernels import rotary_op, swiglu_op  # noqa: F401  (now, and not in the middle of what is traced)

    dropout = F.dropout

    def masked(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else dropout(x, p, training, inplace)

    def normed(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return F.layer_norm(x, shape, weight, None, eps or 0.0)

    with contextlib.ExitStack() as changes:
        changes.enter_context(_replaced(cross_entropy, "_loss_and_gradient", _in_place))
        changes.enter_context(_replaced(cross_entropy, "multiplies_wide", lambda device, dtype: True))
        changes.enter_context(_replaced(cross_entropy, "_scaled", _times))
        changes.enter_context(_replaced(newton_schulz, "fast_dtype", lambda _: torch.bfloat16))
        changes.enter_context(_replaced(newton_schulz, "in_batches", lambda _: True))
        for kernels in (flash_attention_cpp, cross_entropy_cpp, rows_cpp):
            changes.enter_context(_replaced(kernels, "runs", lambda dtype: False))
        changes.enter_context(_replaced(flash_attention_op, "_is_offered", _in_kernels))
        changes.enter_context(_replaced(attention, "shares_keys", lambda q: q.dtype != torch.float32))
        changes.enter_context(_replaced(F, "dropout", masked))
        changes.enter_context(
            _replaced(adam, "fits", lambda parameters: all(p.dtype == torch.float32 for p in parameters))
        )
        changes.enter_context(_replaced(swiglu, "fits", _in_kernels))
        changes.enter_context(_replaced(rotary, "fits", lambda x: _in_kernels(x) and x.ndim == 3))
        if not compiled:
            changes.enter_context(_replaced(rotary, "fits_heads", lambda x: _in_kernels(x) and x.ndim == 4))
            changes.enter_context(_replaced(F, "rms_norm", normed))
        yield


def _in_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels would take such a tensor on CUDA."""
    return x.dtype in triton_here.DTYPES


def _in_place(products: Tensor, targets: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss's kernel on CUDA reads and writes: a block of logits, which becomes its gradient, and a loss per row."""
    wide = torch.float32 if products.dtype in (torch.bfloat16, torch.float16) else products.dtype
    nats = torch.zeros(targets.shape, dtype=wide, device=products.device).sum()
    return nats.clone(), nats, products.sub_(targets.unsqueeze(-1))


def _in_place_on_a_cpu(products: Tensor, targets: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in C++, where exponentials take their time."""
    nats = torch.zeros(targets.shape, dtype=torch.float32).sum()
    return nats.clone(), nats, products.exp_()


def _times(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel that scales the loss's gradients writes; reading is counted as that of any copy."""
    return x.to(dtype, copy=True)


@contextlib.contextmanager
def _replaced(place: Any, name: str, function: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _few_blocks() -> Iterator[None]:
    """The chunked loss works on its first two blocks and its last one: from the second on, all find and leave the same memory."""
    blocks_of = cross_entropy.blocks_of

    def some_of(tokens: int, rows: int) -> list[slice]:
        blocks = blocks_of(tokens, rows)
        return blocks if len(blocks) <= 3 else [*blocks[:2], blocks[-1]]

    with _replaced(cross_entropy, "blocks_of", some_of):
        yield
