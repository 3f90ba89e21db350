"""How much of a long random test runs under the active hypothesis profile."""

from hypothesis import settings

# What hypothesis calls the default, which CI runs with.
_FULL = 100


def scaled(count: int) -> int:
    """Return `count` under the profile of CI, and the same part of it as of examples under another.

    It is at least 2.
    """
    return max(2, count * settings().max_examples // _FULL)
