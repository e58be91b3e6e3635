r"""Patterns for the `tokenizers` library, whose regular expressions are Oniguruma's (Ruby's dialect).

What `regex` and Oniguruma read differently, and how it is written there:

    regex          meaning                        Oniguruma
    X{1,3}+        at most three, and keep them   (?>X{1,3})      there, X{1,3}+ is (X{1,3}) once or more
    ^   \A         the beginning of the text      \A              there, ^ begins every line
    $              the end, or before a last \n   \Z              there, $ ends every line
    \Z             the very end                   \z
"""

from __future__ import annotations

from scratchlm.tokenizer.patterns import PATTERNS

_ANCHORS = {"^": r"\A", "$": r"\Z", r"\Z": r"\z"}
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


def to_oniguruma(pattern: str) -> str:
    """`pattern` (a name or a pattern of `regex`) as Oniguruma writes it."""
    text = PATTERNS.get(pattern, pattern)
    written: list[str] = []  # atoms so far; a group is joined into one when it closes
    groups: list[int] = []  # where open groups begin in `written`
    position = 0
    while position < len(text):
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
