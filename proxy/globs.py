"""Globs as `fnmatch` reads them: `*` also matches `/`. Pure."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase, translate

_PART = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)


def matches_any(name: str, globs: Iterable[str]) -> bool:
    """Tell whether one of the globs matches the whole name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def covers(glob: str, other: str) -> bool:
    """Tell whether `glob` certainly matches all that `other` matches; False if that is not clear.

    A glob without `?` and `[…]` that matches the text of `other` does, because its `*` may stand for
    any part of that text, wildcards included.
    """
    return "?" not in glob and "[" not in glob and fnmatchcase(other, glob)


def can_match_with_prefix(glob: str, prefix: str) -> bool:
    """Tell whether the glob matches any text that begins with `prefix`."""
    parts = _PART.findall(glob)
    # The numbers of parts that may have been consumed after each character.
    states = _skip_stars(parts, {0})
    for character in prefix:
        following = set()
        for state in states:
            if state < len(parts):
                if parts[state] == "*":
                    following.add(state)
                elif re.fullmatch(translate(parts[state]), character):
                    following.add(state + 1)
        states = _skip_stars(parts, following)
    return bool(states)


def _skip_stars(parts: list[str], states: set[int]) -> set[int]:
    """Return the states with those that are reached if stars match nothing."""
    return {
        reached
        for state in states
        for reached in range(state, len(parts) + 1)
        if all(part == "*" for part in parts[state:reached])
    }
