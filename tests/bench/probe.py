"""A healthy client that requests one manifest repeatedly and records the time of each response.

    python -m tests.bench.probe URL PATH

It is a separate process, so that the work of other loads is not in its figures. When its stdin is closed, it
prints the seconds as JSON.
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
from tests.system.http_client import connect
from tests.system.images import MANIFEST

PAUSE = 0.005  # seconds between a response and the next request


@dataclass
class Latencies:
    """The seconds that each response took, in order."""

    seconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Return the seconds that this share of the responses did not exceed."""
        return percentile(self.seconds, share)


@contextmanager
def probing(url: str, path: str) -> Iterator[Latencies]:
    """Probe while the context lasts. The latencies are filled in at its end."""
    latencies = Latencies()
    argv = [sys.executable, "-m", "tests.bench.probe", url, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline(), "the probe got no response"
        try:
            yield latencies
        finally:
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "the probe failed"
    latencies.seconds += json.loads(output)


def main() -> None:
    url, path = sys.argv[1:]
    connection = connect(url, timeout=60)
    seconds: list[float] = []
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        started = time.perf_counter()
        connection.request("GET", path, headers={"Accept": MANIFEST})
        response = connection.getresponse()
        response.read()
        assert response.status == 200, f"{path}: {response.status}"
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
