"""A process that burns CPU in pieces at a steady rate, as a load does that has nothing to do with pullcache.

    python -m tests.bench.burner RATE SECONDS

It burns so many seconds of CPU in each of `RATE` pieces a second, until its stdin is closed.
"""

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def burning(rate: float, seconds: float) -> Iterator[None]:
    """Burn `seconds` of CPU, `rate` times a second, while the context lasts."""
    argv = [sys.executable, "-m", "tests.bench.burner", str(rate), str(seconds)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline(), "the burner did not start"
        try:
            yield
        finally:
            process.communicate(timeout=60)
    assert process.returncode == 0, "the burner failed"


def main() -> None:
    rate, seconds = map(float, sys.argv[1:])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    next_at = time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, next_at - time.monotonic()))[0]:
        burnt_at = time.process_time() + seconds
        while time.process_time() < burnt_at:
            pass
        next_at += 1 / rate


if __name__ == "__main__":
    main()
