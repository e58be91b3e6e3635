"""Forward and backward of a step as one CUDA graph: recorded once, then replayed with other batches.

::

    host    record: some hundred launches, none of them run     replay: one launch
                      │                                            │
    device            └─► graph over fixed addresses ──────────────┴─► batch copied in ─► loss, gradients, where they were before

A small model's step is bound by its launches: each takes the host some microseconds, its kernel less. torch.compile can record graphs, too
(``train.compile_mode = cuda_graphs``), after half a minute of compiling; what runs eagerly can be recorded at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scratchlm.errors import UserError, first_line
from scratchlm.train.fitting import is_out_of_memory, untouched_generators
from scratchlm.train.task import Loss

WARM_UP = 3
"""Passes before the recording: what a library chooses, loads or takes at its first calls cannot be recorded."""

Run = Callable[[], list[Tensor]]
"""What is recorded; returns the tensors that it leaves, which replays write over."""

Replay = Callable[[], None]


class NotRecorded(RuntimeError):
    """A pass waits for the device, which cannot be recorded."""


def record(run: Run, device: torch.device) -> Replay:
    """Record what `run` launches on a GPU, without doing it; the result does it."""
    graph = torch.cuda.CUDAGraph()
    # The stream of now is entered, too: where a recording fails, torch leaves its own as the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        run()
    return graph.replay


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside, whatever waits for the GPU raises: after a recording that fails, generator and allocator are not what they were, so it must not begin.

    Raises:
        NotRecorded: something did.
    """
    if device.type != "cuda":  # a test's stand-in
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotRecorded("the step waits for the GPU, and cannot be recorded as a CUDA graph") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


class StepGraph:
    """Stands for the gradients of a batch: the first of a shape is recorded, the others are replays of it.

    Random numbers (dropout) go on from replay to replay as they do without; a batch of another shape is recorded anew.

    Args:
        gradients: (batch on the device, targets in all) → summed loss; leaves the gradients of the mean in ``.grad`` of `parameters`, which it
            finds empty.
        loss: what it has computed beside is put back after each replay.
        parameters: those that are trained.
        device: a GPU.
        record: how; a test's stand-in, where there is no GPU.
    """

    def __init__(
        self,
        gradients: Callable[[Any, Tensor], Tensor],
        loss: Loss,
        parameters: list[Tensor],
        device: torch.device,
        record: Callable[[Run, torch.device], Replay] = record,
    ) -> None:
        self._gradients, self._loss, self._parameters = gradients, loss, parameters
        self._device, self._record = device, record
        self.forget()

    def forget(self) -> None:
        """Give up the recording, and its memory."""
        self._replay: Replay | None = None
        self._batch: Any = None
        self._tokens = self._total = torch.zeros(())
        self._grads: list[Tensor | None] = []
        self._beside: Any = None

    def __call__(self, batch: Any, tokens: int) -> Tensor:
        """The summed loss of `batch` and, in ``.grad``, the gradient of its mean over `tokens` targets.

        Both are overwritten by the next call.

        Raises:
            NotRecorded: the pass cannot be; computed as usual it can.
            UserError: it failed while it was recorded.
        """
        if self._replay is None or _shape(batch) != _shape(self._batch):
            self.forget()
            self._begin(batch, tokens)
        assert self._replay is not None
        for name, tensor in _tensors(self._batch).items():
            tensor.copy_(getattr(batch, name))
        self._tokens.fill_(max(tokens, 1))
        self._replay()
        for parameter, gradient in zip(self._parameters, self._grads, strict=True):
            parameter.grad = gradient
        self._loss.put_back(self._beside)
        return self._total

    def _begin(self, batch: Any, tokens: int) -> None:
        self._batch = replace(batch, **{name: tensor.clone() for name, tensor in _tensors(batch).items()})
        self._tokens = torch.full((), float(max(tokens, 1)), device=self._device)
        with untouched_generators(self._device):
            self._warm_up()

        def run() -> list[Tensor]:
            self._total = self._gradients(self._batch, self._tokens)
            self._grads = [parameter.grad for parameter in self._parameters]
            return [self._total, *(gradient for gradient in self._grads if gradient is not None)]

        self._drop()
        try:
            with untouched_generators(self._device):
                self._replay = self._record(run, self._device)
        except Exception as error:
            self._drop()
            self.forget()
            if is_out_of_memory(error) or not isinstance(error, RuntimeError):
                raise
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({first_line(error)}): leave train.cuda_graph out; the same command then goes on from the last checkpoint"
            ) from error
        self._beside = self._loss.beside()

    def _warm_up(self) -> None:
        """As torch asks for it: on a stream that is not the one of before."""
        with _side_stream(self._device):
            for number in range(1, WARM_UP + 1):
                self._drop()
                with no_waiting(self._device) if number == WARM_UP else contextlib.nullcontext():
                    self._gradients(self._batch, self._tokens)

    def _drop(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._loss.after_step(updated=False)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":  # a test's stand-in
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _tensors(batch: Any) -> dict[str, Tensor]:
    assert is_dataclass(batch)
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _shape(batch: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(batch).items()}
