"""The command line: ``scratchlm <command> …``; every field of a recipe is a flag.

Whatever a user can get wrong ends as one line, ``scratchlm: error: …``, with exit status 2. An interrupted run ends with
128 + the signal's number. A traceback means a bug of ours.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import importlib
import io
import os
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from scratchlm.errors import UserError

_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
}  # fmt: skip
"""What the system refuses because of the user's files, not of our code."""

COMMANDS: dict[str, tuple[str, str]] = {
    # command → (where in scratchlm.commands its function is, what it does)
    "run": ("recipes:run", "tokenizer → data → train → evaluate → sample, from one recipe"),
    "tokenizer train": ("tokenizers:train", "train a byte-level BPE tokenizer on text"),
    "tokenizer encode": ("tokenizers:encode", "text → token ids"),
    "tokenizer decode": ("tokenizers:decode", "token ids → text"),
    "tokenizer inspect": (
        "tokenizer_tools:inspect",
        "what a tokenizer has learnt, how it cuts a text and merges a word",
    ),
    "tokenizer compare": ("tokenizer_tools:compare", "tokenizers and engines side by side on your own text"),
    "tokenizer convert": ("tokenizer_tools:convert", "between tokenizer.json, tiktoken's and GPT-2's files"),
    "data prepare": ("recipes:data_prepare", "the first steps of a recipe: tokenizer and token shards"),
    "train": ("recipes:train", "the steps of a recipe up to the trained model"),
    "evaluate": (
        "trained:evaluate",
        "loss, perplexity and bits per byte of a run, on its held-out text or on files",
    ),
    "generate": ("trained:generate", "continue texts with a trained model"),
    "ablate": (
        "experiments:ablate",
        "compare choices under an equal budget, with seeds: which differ, and is it noise",
    ),
    "lr": (
        "experiments:learning_rate",
        "the range of learning rates that work, by a run in which they rise until it breaks",
    ),
    "import": ("interop:import_model", "a Hugging Face model becomes one of ours"),
    "export": ("interop:export_model", "a trained model becomes a folder that transformers opens"),
    "model list": ("models:list_presets", "known architectures that a recipe can name"),
    "model show": ("models:show", "a known architecture as a recipe's [model], and its parameters"),
    "model shape": ("models:shape", "widths and depth for a wished number of parameters"),
    "model draw": ("drawings:draw", "an architecture in pictures, from its own modules"),
    "resources": (
        "resources:resources",
        "what a recipe needs before it runs: parameters, FLOPs, memory, time, money",
    ),
    "resources devices": (
        "devices:devices",
        "known devices: peaks, memory, bandwidth, price, and where each figure is from",
    ),
    "resources measure": (
        "devices:measure",
        "measure this machine: what its matrix products and its memory really give",
    ),
    "resources dtypes": (
        "dtypes:dtypes",
        "number formats: range, precision, and which of them each operation of a model runs in",
    ),
    "profile": ("profiling:profile", "where a training step's time and memory go, measured"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: ``sys.argv[1:]``.

    Returns:
        The exit status: 0; 2 for bad input; 128 + n after signal n.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows "?" and no traceback
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            function, rest = _find(arguments)
            if function is None:
                return 0
            function(rest)
            sys.stdout.flush()
        except UserError as error:
            return _fail(str(error))
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + 13
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            place = str(error.filename)[:80] if error.filename is not None else "a file"
            return _fail(f"cannot use {place}: {error.strerror}; choose another place")
        except KeyboardInterrupt:
            print("\nscratchlm: interrupted; nothing is lost, the same command goes on from there", file=sys.stderr)
            return 128 + 2
        except Exception as error:
            number = getattr(error, "signal_number", None)  # train.loop.Interrupted, without importing torch for it
            if number is None:
                raise
            print(f"scratchlm: {error}", file=sys.stderr)
            return 128 + int(number)
    return 0


def program() -> NoReturn:
    """The command as a process of its own.

    Having answered, it leaves at once: to take a process with torch in it apart, object by object, takes up to two seconds. What has to be done at its end
    (`atexit`) is done; if threads still work, it waits for them as usual.
    """
    status = main()
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _fail(message: str) -> int:
    sys.stdout.flush()
    print(f"scratchlm: error: {message}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Ours in one line; those of libraries about themselves are not for our users."""
    if category is UserWarning:
        print(f"scratchlm: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _find(arguments: list[str]) -> tuple[Callable[[list[str]], None] | None, list[str]]:
    """The command's function and its arguments; (None, []) when help was all that was wanted."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return None, []
    if arguments[0] == "--version":
        print(f"scratchlm {version('scratchlm')}")
        return None, []
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    words = 2 if arguments[0] in groups else 1
    if " ".join(arguments[:2]) not in COMMANDS and arguments[0] in COMMANDS:
        words = 1  # `resources RECIPE` beside `resources measure`
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if words == 2 and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_overview(arguments[0]))
        return None, []
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *groups], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `scratchlm --help` lists them"
        raise UserError(f"there is no command {name!r}{hint}")
    module, function = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(f"scratchlm.commands.{module}"), function), rest


def _overview(group: str | None = None) -> str:
    shown = {name: text for name, (_, text) in COMMANDS.items() if group is None or name.split()[0] == group}
    lines = "\n".join(f"  {name:<18} {text}" for name, text in shown.items())
    return textwrap.dedent("""\
        scratchlm builds a language model from raw bytes to text.

        usage: scratchlm {command} …

        {lines}

        `scratchlm <command> --help` shows a command's options; every field of a recipe is one, such as
        --model.layers 8 or --train.steps 500.""").format(command=group or "<command>", lines=lines)
