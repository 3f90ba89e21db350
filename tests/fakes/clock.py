"""A clock that tests turn."""


class Clock:
    """Give it where `clock: Callable[[], float]` is asked for; it moves only by `turn`."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time that the test has set."""
        return self.now

    def turn(self, seconds: float) -> None:
        """Let time pass (or, negative, go back)."""
        self.now += seconds
