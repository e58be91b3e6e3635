r"""Patterns for other libraries: `tokenizers` reads Oniguruma's dialect (Ruby's), tiktoken that of Rust's fancy-regex.

What `regex` and they read differently, and how it is written there:

    regex          meaning                        Oniguruma                          fancy-regex
    X{1,3}+        at most three, and keep them   (?>X{1,3})                         the same
                                                  (X{1,3}+ is (X{1,3}) once or more)
    ^   \A         the beginning of the text      \A (^ begins every line)           ^   \A
    $              the end, or before a last \n   \Z (there, $ ends every line)      (?=\n?\z)
    \Z             the very end                   \z                                 \z
    (?m:^) (?m:$)  begin and end of a line        ^ $                                the same
    [a[&&b--c~~d]  any of these characters        the same                           [a\[\&&b\--c\~~d]: else operations of sets

fancy-regex takes fuzzy matching, POSIX classes and some escapes for something else without a word; these are refused by name.
"""

from __future__ import annotations

import regex

from scratchlm.errors import UserError
from scratchlm.tokenizer.patterns import PATTERNS

_ANCHORS = {"^": r"\A", "$": r"\Z", r"\Z": r"\z"}
_FANCY_ANCHORS = {"$": r"(?=\n?\z)", r"\Z": r"\z"}
_LINE_ANCHORS = ("(?m:^)", "(?m:$)")
# Escapes that mean the same in `regex` and fancy-regex, beside those of signs and digits.
_SHARED_ESCAPES = frozenset("dDwWsSpPbBAZzxuUnrtfva")
_FROM_ANCHORS = {"^": "(?m:^)", "$": "(?m:$)", r"\Z": "$", r"\z": r"\Z"}


def _atom_end(pattern: str, start: int) -> int:
    """Where the escape, character class or single character that begins at `start` ends."""
    if pattern[start] == "\\" and start + 1 < len(pattern):
        end = start + 2
        if pattern[start + 1] in "pPxNugk" and pattern[end : end + 1] in ("{", "<"):
            closing = "}" if pattern[end] == "{" else ">"
            return pattern.find(closing, end) + 1 or len(pattern)
        return end
    if pattern[start] == "[":
        end = start + 1
        end += pattern[end : end + 1] == "^"
        end += pattern[end : end + 1] == "]"
        while end < len(pattern) and pattern[end] != "]":
            nested = pattern[end] == "[" and pattern[end + 1 : end + 2] == ":"
            end = (
                pattern.find(":]", end) + 2
                if nested
                else _atom_end(pattern, end)
                if pattern[end] == "\\"
                else end + 1
            )
        return end + 1
    return start + 1


def _line_anchor(text: str, position: int) -> str | None:
    return next((anchor for anchor in _LINE_ANCHORS if text.startswith(anchor, position)), None)


def to_oniguruma(pattern: str) -> str:
    """`pattern` (a name or a pattern of `regex`) as Oniguruma writes it."""
    text = PATTERNS.get(pattern, pattern)
    written: list[str] = []  # atoms so far; a group is joined into one when it closes
    groups: list[int] = []  # where open groups begin in `written`
    position = 0
    while position < len(text):
        if line := _line_anchor(text, position):
            written.append(line[4])
            position += len(line)
            continue
        end = _atom_end(text, position)
        atom = text[position:end]
        if atom == "(":
            groups.append(len(written))
            written.append(atom)
        elif atom == ")" and groups:
            start = groups.pop()
            written[start:] = ["".join(written[start:]) + ")"]
        elif atom == "{" and written and (closing := text.find("}", position)) > 0:
            counts = text[position : closing + 1]
            end = closing + 1
            if counts.strip("{},").isdigit() or all(
                part.isdigit() for part in counts.strip("{}").split(",") if part
            ):
                if text[end : end + 1] == "+":
                    written[-1] = f"(?>{written[-1]}{counts})"
                    end += 1
                else:
                    written[-1] += counts
            else:
                written.append(counts)
        elif atom in ("*", "+", "?") and written:
            written[-1] += atom
        else:
            written.append(_ANCHORS.get(atom, atom))
        position = end
    return "".join(written)


def to_fancy_regex(pattern: str) -> str:
    """`pattern` (a name or a pattern of `regex`) as Rust's fancy-regex writes it.

    Raises:
        UserError: it uses what is read otherwise there; it is named.
    """
    text = PATTERNS.get(pattern, pattern)
    position, written = 0, ""
    while position < len(text):
        if line := _line_anchor(text, position):
            written += line
            position += len(line)
            continue
        end = _atom_end(text, position)
        atom = text[position:end]
        if atom == "{":
            end = text.find("}", position) + 1 or len(text)
            atom = text[position:end]
            if not regex.fullmatch(r"\{(\d+(,\d*)?|,\d+)\}", atom):
                raise UserError(f"the pattern uses {atom}, which tiktoken reads otherwise")
        elif atom == "(" and (flags := regex.match(r"\(\?[a-zA-Z0-9]*m[a-zA-Z]*[:)-]", text, pos=position)):
            raise UserError(f"the pattern uses the flag m ({flags.group()}), which is not supported for tiktoken")
        elif atom[0] == "\\" and atom[1:2].isalpha() and atom[1] not in _SHARED_ESCAPES:
            raise UserError(f"the pattern uses {atom}, which tiktoken reads otherwise")
        written += _fancy_class(atom) if atom[0] == "[" else _FANCY_ANCHORS.get(atom, atom)
        position = end
    return written


def _fancy_class(characters: str) -> str:
    """A character class without what Rust reads as a class inside, or as an operation on two classes."""
    position = 1 + characters.startswith("[^")
    written = characters[:position]
    while position < len(characters):
        if characters.startswith("[:", position):
            named = characters[position : characters.find(":]", position) + 2]
            raise UserError(f"the pattern uses [{named}], which tiktoken reads as ASCII only")
        end = _atom_end_in_class(characters, position)
        atom = characters[position:end]
        doubled = atom in ("&", "-", "~") and characters[end : end + 1] == atom
        written += "\\" + atom if doubled or atom == "[" else atom
        position = end
    return written


def _atom_end_in_class(characters: str, position: int) -> int:
    return _atom_end(characters, position) if characters[position] == "\\" else position + 1


def from_oniguruma(text: str) -> str:
    """The name or the `regex` pattern of what stands in a `tokenizer.json`."""
    for name in PATTERNS:
        if to_oniguruma(name) == text:
            return name
    position, written = 0, ""
    while position < len(text):
        end = _atom_end(text, position)
        atom = text[position:end]
        written += _FROM_ANCHORS.get(atom, atom)
        position = end
    return written
