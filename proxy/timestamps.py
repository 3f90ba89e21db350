"""Times as the admin API shows them: whole seconds of Unix time."""

from typing import overload


@overload
def to_seconds(time: float) -> int: ...


@overload
def to_seconds(time: None) -> None: ...


@overload
def to_seconds(time: float | None) -> int | None: ...


def to_seconds(time: float | None) -> int | None:
    """Return the second in which a time is, None for None."""
    return None if time is None else int(time)
