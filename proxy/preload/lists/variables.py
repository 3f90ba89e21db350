"""Variables in compose files and Dockerfiles: `$NAME`, `${NAME:-default}` and their kin. PURE.

The compose specification's chapter on interpolation; Dockerfiles know a part of the same.
"""

import re
from collections.abc import Mapping

from proxy.preload.lists.result import MAX_REFERENCE_LENGTH

# `${A:-${B:-${C}}}` is three deep.
MAX_SUBSTITUTION_DEPTH = 10

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BRACED_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:(:?[-?+])(.*))?", re.DOTALL)
_BRACE_TOKEN = re.compile(r"\$\{|\}")


class VariableError(ValueError):
    """A variable has no value, or is written in a way that is not understood."""


def substitute(text: str, values: Mapping[str, str], depth: int = 0) -> str:
    """Return `text` with its variables replaced, `$$` by `$`; raise `VariableError`."""
    if len(text) > MAX_REFERENCE_LENGTH or depth > MAX_SUBSTITUTION_DEPTH:
        raise VariableError(f"{text[:60]!r}… is too long or nested too deeply for an image")
    pieces = []
    position = 0
    while (dollar := text.find("$", position)) >= 0:
        pieces.append(text[position:dollar])
        piece, position = _expand(text, dollar + 1, values, depth)
        pieces.append(piece)
    result = "".join([*pieces, text[position:]])
    # Values may hold values, each twice: what they come to is bounded, not only what is written.
    if len(result) > MAX_REFERENCE_LENGTH:
        raise VariableError(f"{text[:60]!r} comes to more than {MAX_REFERENCE_LENGTH} characters")
    return result


def _expand(text: str, start: int, values: Mapping[str, str], depth: int) -> tuple[str, int]:
    """Return what stands for the `$` before `start`, and where the text goes on."""
    if text.startswith("$", start):
        return "$", start + 1
    if name := _NAME.match(text, start):
        return _evaluate(name[0], "", "", values, depth), name.end()
    if not text.startswith("{", start):
        return "$", start
    end = _find_closing_brace(text, start + 1)
    braced = _BRACED_VARIABLE.fullmatch(text, start + 1, end)
    if braced is None:
        raise VariableError(f"{text[:60]!r} is not understood: variables are ${{NAME:-default}}")
    name_, operator, word = braced.groups(default="")
    return _evaluate(name_, operator, word, values, depth), end + 1


def _find_closing_brace(text: str, start: int) -> int:
    """Return where the brace ends that was opened before `start`."""
    opened = 1
    for brace in _BRACE_TOKEN.finditer(text, start):
        opened += 1 if brace[0] == "${" else -1
        if not opened:
            return brace.start()
    raise VariableError(f"{text[:60]!r} has a ${{ that is not closed")


def _evaluate(name: str, operator: str, word: str, values: Mapping[str, str], depth: int) -> str:
    """Return the value of a variable, its default, or its replacement."""
    value = values.get(name)
    is_set = bool(value) if operator.startswith(":") else value is not None
    if operator.endswith("+"):
        return substitute(word, values, depth + 1) if is_set else ""
    if is_set:
        return value or ""
    if operator.endswith("-"):
        return substitute(word, values, depth + 1)
    raise VariableError(
        f"the variable {name[:60]} has no value: write ${{{name[:60]}:-default}}, or the image itself"
    )
