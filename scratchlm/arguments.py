"""Options from the command line, by tyro; whatever is wrong with them becomes one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from scratchlm.errors import UserError
from scratchlm.section import nearest_field

Parsed = TypeVar("Parsed")


def parse(
    target: Callable[..., Parsed] | type[Parsed],
    arguments: Sequence[str],
    *,
    prog: str,
    default: Any = None,
    description: str | None = None,
) -> Parsed:
    """Fill `target` (a function or a section) from the command line.

    Args:
        target: what tyro builds options from.
        arguments: the command line after the command's name.
        prog: shown in the help, e.g. ``"scratchlm run RECIPE.toml"``.
        default: an instance whose values are the defaults.
        description: shown in the help; None: the target's docstring.

    Raises:
        UserError: an unknown option (the nearest is named), a wrong type or a refused value, in one line.
        SystemExit: after ``--help``.
    """
    if isinstance(target, type) and isinstance(default, target) and isinstance(default, BaseModel):
        plain = _without_tyro(default, arguments)
        if plain is not None:
            return plain
    import tyro  # a third of a second with all that it looks at

    options: dict[str, Any] = {} if default is None else {"default": default}
    captured = io.StringIO()
    try:
        with _wide_terminal(captured) if not {"-h", "--help"} & set(arguments) else contextlib.nullcontext():
            parsed, unknown = tyro.cli(
                target,
                args=list(arguments),
                prog=prog,
                description=description,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
                return_unknown_args=True,
                **options,
            )
    except UserError as error:  # a section refused its values
        raise _located(error, target) from error
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise UserError(_one_line(captured.getvalue())) from None
    if unknown:
        raise UserError(_unknown_argument(unknown[0], target))
    return parsed


def _without_tyro(default: Any, arguments: Sequence[str]) -> Any:
    """A section with options that are fields of its own, ``--name value``; None: there are others, or something is wrong with them."""
    if len(arguments) % 2:
        return None
    fields = type(default).model_fields
    values = {name: getattr(default, name) for name in fields}
    for option, text in zip(arguments[::2], arguments[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        field = fields.get(name)
        if not option.startswith("--") or field is None or text == "None" or text.startswith("-"):
            return None
        kind: Any = field.annotation
        if bool in (kind, *get_args(kind)):  # tyro takes True and False alone
            return None
        try:
            values[name] = TypeAdapter(kind).validate_strings(text)
        except ValidationError:
            return None
    try:
        return type(default)(**values)
    except UserError:
        return None


@contextlib.contextmanager
def _wide_terminal(stream: io.StringIO) -> Iterator[None]:
    """Catch tyro's boxed message, unwrapped."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _one_line(boxed: str) -> str:
    """The sentence inside tyro's box, without its frame and its help text."""
    lines: list[str] = []
    for line in boxed.splitlines()[1:]:  # the first is a title
        text = line.strip("│| ")
        rule = not text.strip("─-")
        if rule and lines:  # below it stands help text
            break
        if not rule:
            lines.append(text)
    return " ".join(lines).removeprefix("Error parsing ").rstrip(".")


def _located(error: UserError, target: Any) -> UserError:
    """Name the refused field as the recipe does: ``ModelConfig: layers = -1 …`` → ``model.layers = -1 …``."""
    owner, _, sentence = str(error).partition(": ")
    if not (isinstance(target, type) and issubclass(target, BaseModel)):
        return error
    if owner == target.__name__:
        return UserError(sentence)
    for path, section in _sections(target):
        if section.__name__ == owner:
            starts_with_field = re.split(r"\W", sentence)[0] in section.model_fields
            return UserError(f"{path}{'.' if starts_with_field else ': '}{sentence}")
    return error


def _sections(target: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section inside `target` with its dotted name."""
    for name, field in target.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield prefix + name, section
            yield from _sections(section, f"{prefix}{name}.")


def _unknown_argument(argument: str, target: Any) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; an option starts with --, as in --train.steps 500"
    option = argument.split("=")[0]
    hint = ""
    if isinstance(target, type) and issubclass(target, BaseModel):
        hint = nearest_field(target, option.removeprefix("--").replace("-", "_"))
        hint = re.sub(r"did you mean (.*)\?", lambda m: f"did you mean --{m[1].replace('_', '-')}?", hint)
    return f"unknown option {option}{hint or '; --help lists them'}"
