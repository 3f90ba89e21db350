"""A clock that only tests advance."""


class Clock:
    """A Unix clock for the `clock` parameters of the program; it moves only by `advance`."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Advance the time, or set it back if negative."""
        self.now += seconds
