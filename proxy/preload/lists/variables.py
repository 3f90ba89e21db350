"""Variables in compose files and Dockerfiles: `$NAME`, `${NAME:-default}` and similar. Pure.

The syntax is that of the Compose Specification ("Interpolation"); Dockerfiles have a subset of it.
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
    """A variable has no value or an unsupported syntax."""


def substitute(text: str, values: Mapping[str, str], depth: int = 0) -> str:
    """Return `text` with its variables replaced, and `$$` by `$`. Raises `VariableError`."""
    if len(text) > MAX_REFERENCE_LENGTH or depth > MAX_SUBSTITUTION_DEPTH:
        raise VariableError(f"{text[:60]!r}… is too long or nested too deeply for an image")
    parts = []
    position = 0
    while (dollar := text.find("$", position)) >= 0:
        parts.append(text[position:dollar])
        value, position = _expand(text, dollar + 1, values, depth)
        parts.append(value)
    result = "".join([*parts, text[position:]])
    # A value may use others twice, and so on: a short text can expand to a huge one.
    if len(result) > MAX_REFERENCE_LENGTH:
        raise VariableError(f"{text[:60]!r} expands to more than {MAX_REFERENCE_LENGTH} characters")
    return result


def _expand(text: str, start: int, values: Mapping[str, str], depth: int) -> tuple[str, int]:
    """Return the value of the variable whose `$` is before `start`, and where its name ends."""
    if text.startswith("$", start):
        return "$", start + 1
    if name := _NAME.match(text, start):
        return _evaluate(name[0], "", "", values, depth), name.end()
    if not text.startswith("{", start):
        return "$", start
    end = _find_closing_brace(text, start + 1)
    braced = _BRACED_VARIABLE.fullmatch(text, start + 1, end)
    if braced is None:
        raise VariableError(
            f"{text[:60]!r} is not supported: write variables as ${{NAME:-default}}"
        )
    variable, operator, word = braced.groups(default="")
    return _evaluate(variable, operator, word, values, depth), end + 1


def _find_closing_brace(text: str, start: int) -> int:
    """Return the position of the brace that closes the one before `start`."""
    depth = 1
    for brace in _BRACE_TOKEN.finditer(text, start):
        depth += 1 if brace[0] == "${" else -1
        if not depth:
            return brace.start()
    raise VariableError(f"{text[:60]!r} has a ${{ that is not closed")


def _evaluate(name: str, operator: str, word: str, values: Mapping[str, str], depth: int) -> str:
    """Return the value of a variable, its default (`-`) or its alternative (`+`)."""
    value = values.get(name)
    is_set = bool(value) if operator.startswith(":") else value is not None
    if operator.endswith("+"):
        return substitute(word, values, depth + 1) if is_set else ""
    if is_set:
        return value or ""
    if operator.endswith("-"):
        return substitute(word, values, depth + 1)
    raise VariableError(
        f"the variable {name[:60]} has no value: write ${{{name[:60]}:-default}}, "
        "or the image itself"
    )
