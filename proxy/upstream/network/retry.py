"""When to retry a request, and when a transfer is too slow. Pure: randomness is an argument."""

from collections.abc import Iterator

# Statuses of temporary failures (RFC 9110 sections 15.5.9 and 15.6, RFC 8470). Cloudflare sends 520
# to 530 if it cannot reach the server behind it.
TRANSIENT_STATUSES = frozenset({408, 425, 500, 502, 503, 504, 507, 509, *range(520, 531), 598, 599})

# Statuses of a server that works: "not implemented", and "HTTP version not supported".
REFUSAL_STATUSES = frozenset({501, 505})

# Seconds before the second attempt, doubled for each further one up to the maximum.
INITIAL_DELAY = 0.25
MAX_DELAY = 10.0


def backoff_delays(attempts: int, rng: Iterator[float]) -> Iterator[float]:
    """Yield the `attempts - 1` delays between attempts in seconds: exponential, with jitter.

    `rng` yields numbers in [0, 1). The jitter keeps many caches that lost the same upstream from
    returning at the same moment.
    """
    for attempt, random in zip(range(attempts - 1), rng, strict=False):
        ceiling = min(MAX_DELAY, INITIAL_DELAY * 2**attempt)
        yield ceiling * (0.5 + random / 2)


class MinRateMonitor:
    """Detects transfers below `rate` bytes a second over `window` seconds of waiting.

    A rate of 0 accepts any speed. The monitor runs only when bytes arrive, so complete silence
    needs a timeout of its own.
    """

    def __init__(self, rate: int, window: float) -> None:
        self._rate = rate
        self._window = window
        self._size = 0
        self._waited = 0.0

    def is_too_slow(self, size: int, waited: float) -> bool:
        """Add `size` bytes received after `waited` seconds; tell if the window was too slow."""
        self._size += size
        self._waited += waited
        if self._waited < self._window:
            return False
        is_too_slow = self._size < self._rate * self._waited
        self._size, self._waited = 0, 0.0
        return is_too_slow

    def __str__(self) -> str:
        return f"less than {self._rate} bytes a second"
