"""A healthy client: it asks for one manifest again and again, and remembers how long each answer took.

    python -m tests.bench.probe URL PATH

In a process of its own, so that no other load's work is in its figures. Prints the seconds as JSON when its stdin
is closed.
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.bench.load import percentile
from tests.system.images import MANIFEST
from tests.system.wire import connect

PAUSE = 0.005  # seconds between an answer and the next request


@dataclass
class Latencies:
    """Seconds an answer, in the order they came."""

    seconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Return what that share of the answers did not exceed."""
        return percentile(self.seconds, share)


@contextmanager
def probing(url: str, path: str) -> Iterator[Latencies]:
    """Probe while the context lasts; the latencies are there after it."""
    found = Latencies()
    argv = [sys.executable, "-m", "tests.bench.probe", url, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline(), "the probe had no answer"
        try:
            yield found
        finally:
            said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "the probe failed"
    found.seconds += json.loads(said)


def main() -> None:
    url, path = sys.argv[1:]
    connection = connect(url, timeout=60)
    taken: list[float] = []
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        began = time.perf_counter()
        connection.request("GET", path, headers={"Accept": MANIFEST})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, f"{path}: {answer.status}"
        taken.append(time.perf_counter() - began)
        if len(taken) == 1:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps(taken) + "\n")


if __name__ == "__main__":
    main()
