"""Optional trackers beside metrics.jsonl: Weights & Biases and TensorBoard, behind one ``log``.

Both receive the numbers of every record under ``<kind>/<name>`` (``train/loss``, ``validation/bits_per_byte`` …), with
the optimizer step as the x-axis. Neither package is needed until its name appears in ``train.trackers``.
"""

from __future__ import annotations

import importlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

from scratchlm.errors import UserError
from scratchlm.files import write_text


class Tracker(Protocol):
    """What a tracker has to do."""

    def log(self, kind: str, step: int, numbers: Mapping[str, float], message: str | None) -> None:
        """Take one record: its numbers, or the message of an event."""

    def close(self, failed: bool) -> None:
        """Write out everything and let go of files and processes."""


def _import(module: str, extra: str, needed: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UserError: it is not installed; the message names the extra that brings it.
    """
    missing = UserError(
        f"train.trackers names {extra}, which is not installed: run pip install 'scratchlm[{extra}]' or remove it there"
    )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise missing from error
    # A folder ./wandb of earlier runs is importable too, as an empty namespace package.
    if not hasattr(found, needed):
        raise missing
    return found


class WandbTracker:
    """Weights & Biases. ``WANDB_MODE=offline`` keeps the run in the folder, for ``wandb sync`` later.

    The run's id is kept in ``<folder>/wandb-id.txt``: a resumed run continues its own curves. The server never takes
    back a step, so steps that a resumed run repeats keep their first values there (metrics.jsonl has the new ones).
    """

    def __init__(
        self, folder: Path, project: str, name: str, config: Mapping[str, Any], resumed_at: int | None
    ) -> None:
        wandb = _import("wandb", "wandb", "init")
        id_file = folder / "wandb-id.txt"
        known = resumed_at is not None and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if known else secrets.token_hex(4)
        offline = os.environ.get("WANDB_MODE") == "offline"
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                config=dict(config),
                dir=str(folder),
                id=run_id,
                # Offline there is no server to ask whether the run exists; the id alone joins the parts when synced.
                resume=None if offline else "allow",
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"wandb did not start: {error}; log in, or set WANDB_MODE=offline") from error
        write_text(id_file, run_id + "\n")

    def log(self, kind: str, step: int, numbers: Mapping[str, float], message: str | None) -> None:
        values: dict[str, Any] = {f"{kind}/{name}": value for name, value in numbers.items()}
        if message is not None:
            values[f"{kind}/message"] = message
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TensorBoardTracker:
    """TensorBoard event files under ``<folder>/tensorboard``.

    A resumed run marks the steps after its checkpoint as void (``purge_step``), so that its curves do not run twice.
    """

    def __init__(
        self, folder: Path, project: str, name: str, config: Mapping[str, Any], resumed_at: int | None
    ) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard", "SummaryWriter")
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge)
        if resumed_at is None:
            lines = "\n".join(f"    {field}: {value}" for field, value in config.items())
            self._writer.add_text("recipe", f"{project} / {name}\n\n{lines}", 0)

    def log(self, kind: str, step: int, numbers: Mapping[str, float], message: str | None) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        if message is not None:
            self._writer.add_text(f"{kind}/message", message, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


_TRACKERS: dict[str, Callable[[Path, str, str, Mapping[str, Any], int | None], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}


class Trackers:
    """The trackers of one run; with no names it does nothing at no cost.

    Use it as a context manager: every tracker is closed at the end and on an exception (which wandb then shows as a
    failed run). Trackers only watch: one that fails after its start, because its server or its disk is gone, is named in
    a warning, dropped, and training goes on; metrics.jsonl has every record.

    Args:
        names: of ``"wandb"`` and ``"tensorboard"``, those wanted.
        folder: the run's folder; everything is written below it.
        project: wandb's project.
        name: the run's name.
        config: plain values to show beside the curves; a run gives the fields of its recipe that decide what is learnt,
            by dotted name (``train.steps``).
        resumed_at: step of the checkpoint the run resumes from; None: a new run.

    Raises:
        UserError: an unknown name, a package that is not installed, or wandb that does not start.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        folder: str | os.PathLike[str],
        project: str = "scratchlm",
        name: str = "run",
        config: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ) -> None:
        self._trackers: dict[str, Tracker] = {}
        try:
            for tracker in dict.fromkeys(names):
                if tracker not in _TRACKERS:
                    raise UserError(f"train.trackers: unknown tracker {tracker!r}; known: {', '.join(_TRACKERS)}")
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._trackers[tracker] = _TRACKERS[tracker](Path(folder), project, name, config or {}, resumed_at)
        except BaseException:
            self.close(failed=True)
            raise

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on one record of metrics.jsonl (see :mod:`scratchlm.train.metrics`): its numbers, or its message.

        Warns:
            UserWarning: a tracker failed, and gets no more records.
        """
        if not self._trackers:
            return
        kind, step, message = str(record["kind"]), int(record["step"]), record.get("message")
        numbers = {
            field: float(value) for field, value in record.items() if field not in ("kind", "step", "message")
        }
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(kind, step, numbers, message)
            except Exception as error:  # whatever a third party's package raises
                self._warn(name, f"failed at step {step}", error, "training goes on without it")
                del self._trackers[name]
                self._close(tracker, failed=True)  # said once is enough

    def close(self, failed: bool = False) -> None:
        """Close every tracker; a second call does nothing.

        Warns:
            UserWarning: one of them could not be closed.
        """
        while self._trackers:
            name, tracker = self._trackers.popitem()
            if (error := self._close(tracker, failed)) is not None:
                self._warn(name, "could not be closed", error, "its last records may be missing")

    @staticmethod
    def _close(tracker: Tracker, failed: bool) -> Exception | None:
        """What went wrong, if something did."""
        try:
            tracker.close(failed)
        except Exception as error:
            return error
        return None

    @staticmethod
    def _warn(name: str, what: str, error: Exception, consequence: str) -> None:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"tracker {name} {what} ({message}): {consequence}; metrics.jsonl has every record", stacklevel=3
        )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)
