"""The same requests to pullcache and to nginx: both accept, both refuse, or the difference is listed here.

    python -m tests.system.http_differential --count 50000 --seed 1

Requests are those of `tests.fakes.requests`, and random changes of a few common ones. Each is followed by a
second request: it is answered only if the server has understood where the first one ends. What pullcache
refuses, or closes after, cannot smuggle a request past it. So the only dangerous differences are those where
pullcache answers more, or other, requests than nginx: see `ANSWERED_HERE`.
"""

import argparse
import asyncio
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.requests import SECOND, generate
from tests.support.ports import reserve_port
from tests.system.http_client import has_status
from tests.system.processes import UNREACHABLE, Process
from tests.system.servers import Daemon

CONNECTIONS = 16
# How long a server may take, in seconds. It waits for more bytes if it has not closed by then.
TIMEOUT, BUSY_TIMEOUT = 1.0, 10.0

_CONFIG = """\
daemon off; master_process off; pid {home}/pid; error_log {home}/error.log crit;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  large_client_header_buffers 4 64k;
  server {{ listen 127.0.0.1:{port}; location / {{ return 200 "ok"; }} }}
}}
"""

_GET = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n"
_POST = b"POST /v2/ HTTP/1.1\r\nHost: x\r\n"
_OLD = b"GET /v2/ HTTP/1.0\r\nHost: x\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
_CHANGED = [
    _GET + b"\r\n",
    b"HEAD /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n" + _GET + b"Accept: a/b;q=0.5, */*\r\nUser-Agent: containerd/2.0\r\n\r\n",
    b"GET http://x/v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    _OLD + b"\r\n",
    _OLD + b"Connection: keep-alive\r\n\r\n",
    _GET + b"Connection: close\r\n\r\n",
    _GET + b"Content-Length: 3\r\n\r\nabc",
    _GET + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    _GET + _CHUNKED + b"\r\n",
    _POST + b"Content-Length: 3\r\n\r\nabc",
    _POST + _CHUNKED + b"T: v\r\n\r\n",
]
_INSERTED = [
    *(bytes([one]) for one in b'\r\n\0 \t:,;\x0b\x0c\x7f\x80\xff01_*/#?"\\x'),
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"\n\n",
        b"HTTP/1.1",
        b"HEAD ",
        b"POST ",
        b"OPTIONS ",
        b"%00",
        b"%2f",
        b"/../",
    ),
    *(
        b"chunked",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Host: y\r\n",
        b"http://y",
    ),
    *(
        b"Connection: close\r\n",
        b"Connection: keep-alive\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: h2c\r\n",
    ),
]


def changed_requests(rng: random.Random, count: int) -> Iterator[bytes]:
    """Yield common requests with one to three random changes."""
    for _ in range(count):
        data = rng.choice(_CHANGED)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) + 1)
            end = min(len(data), at + rng.randint(1, 30))
            data = rng.choice(
                (
                    data[:at] + data[at + rng.randint(1, 3) :],
                    data[:at] + rng.choice(_INSERTED) + data[at + rng.randint(0, 1) :],
                    data[:end] + data[at:end] + data[end:],
                )
            )
        yield data


def make_requests(rng: random.Random, count: int) -> list[bytes]:
    """Return `count` different requests, half of them changed."""
    generated = [request.data for request in generate()]
    chosen = rng.sample(generated, min(len(generated), count // 2))
    return list(dict.fromkeys([*chosen, *changed_requests(rng, count - len(chosen))]))


@dataclass(frozen=True)
class Outcome:
    """What a server did with a request and the second one: its answers, and whether it closed.

    An answer is `ok`, or `refused` if the server has not understood the request.
    """

    answers: tuple[str, ...]
    is_closed: bool

    def is_cautious(self, other: "Outcome") -> bool:
        """Tell whether this server answers no request that the other does not, but refuses, closes or waits.

        An answer before the close is not dangerous: what follows that request is never read.
        """
        accepted = self.answers[:-1] if self.answers[-1:] == ("refused",) else self.answers
        is_single = len(self.answers) == 1 and self.is_closed
        return is_single or other.answers[: len(accepted)] == accepted


@dataclass(frozen=True)
class KnownDifference:
    """A pattern of requests that the servers may treat differently, and why."""

    why: str
    pattern: bytes

    def matches(self, request: bytes) -> bool:
        return re.search(self.pattern, request) is not None


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# For these, pullcache refuses what nginx accepts, or closes after its answer.
CLOSED_HERE = [
    KnownDifference("a line ends with CR and LF", rb"(?<!\r)\n"),
    KnownDifference(
        "a request line is a method, a target of printable ASCII and HTTP/1.0 or HTTP/1.1, a space apart",
        rb"\A(?!(?:\r\n)*[A-Z]+ [!-~]+ HTTP/1\.[01]\r\n)",
    ),
    KnownDifference(
        "a header has a name and a colon; nginx leaves out lines that have not",
        rb"\A(?:\r\n)*[^\n]*\n(?:[^\n]+\n)*?(?!" + _TOKEN + rb":|\r\n)",
    ),
    KnownDifference(
        "a value has no control characters", rb":[^\n]*[\0-\x08\x0b-\x0c\x0e-\x1f\x7f]"
    ),
    KnownDifference(
        "methods but GET and HEAD get 405, and the body is not read", rb"\A(?!\s*(?:GET|HEAD) )"
    ),
    KnownDifference("a body that the client has offered (Expect) is not read", rb"(?i)\nexpect:"),
    KnownDifference("a chunked body is checked before the answer", rb"(?i)\ntransfer-encoding:"),
]
# For these, pullcache accepts what nginx refuses, or continues where nginx closes. None is about where a
# request ends.
ANSWERED_HERE = [
    KnownDifference(
        "`Host` may be empty, and end with a tab", rb"(?i)\nhost:(?:[ \t]*|[^\n]*\t)\r\n"
    ),
    KnownDifference("`Expect` may be repeated", rb"(?i)\nexpect:[^\0]*\nexpect:"),
    KnownDifference(
        "`close` in `Connection` is a word of its own", rb"(?i)\nconnection:[^\n]*close"
    ),
    KnownDifference(
        "nginx refuses a target that leads to no path: `*`, `/..`, `%00`, another host",
        rb"\A\s*[A-Z]+ +\S*(?:\*|\.\.|%|http:)",
    ),
]


async def send(port: int, request: bytes, seconds: float) -> Outcome:
    """Send a request and the second one; read until the server closes, or waits for more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received, is_closed = b"", True
    try:
        writer.write(request + SECOND)
        async with asyncio.timeout(seconds):
            while data := await reader.read(1 << 16):
                received += data
    except TimeoutError:
        is_closed = False
    except ConnectionResetError:
        pass
    finally:
        writer.transport.abort()
    return Outcome(tuple(_answers(received)), is_closed)


def _answers(received: bytes) -> Iterator[str]:
    if received and not received.startswith(b"HTTP/"):
        yield "ok"  # a body without a head, as in HTTP/0.9
    for response in re.split(rb"HTTP/1\.1 (?=[1-5]\d\d )", received)[1:]:
        is_final, is_ours = not response.startswith(b"1"), b"application/json" in response
        is_error = b"is not valid HTTP" in response if is_ours else response[:1] in b"45"
        if is_final:
            yield "refused" if is_error else "ok"


@dataclass(frozen=True)
class Servers:
    """The ports of the servers that are compared."""

    ours: int
    nginx: int

    async def compare(self, request: bytes) -> str:
        """Return how the outcomes differ: '' if they do not, else the reason, or the outcomes themselves."""
        ours, nginx = await asyncio.gather(
            send(self.ours, request, TIMEOUT), send(self.nginx, request, TIMEOUT)
        )
        if not (ours.is_closed and nginx.is_closed):
            # The machine may be busy.
            ours, nginx = await asyncio.gather(
                send(self.ours, request, BUSY_TIMEOUT), send(self.nginx, request, BUSY_TIMEOUT)
            )
        if ours == nginx:
            return ""
        listed = CLOSED_HERE + ANSWERED_HERE if ours.is_cautious(nginx) else ANSWERED_HERE
        whys = (one.why for one in listed if one.matches(request))
        return next(whys, f"UNLISTED: {request!r}: pullcache {ours}, nginx {nginx}")

    async def compare_all(self, requests: list[bytes]) -> Counter[str]:
        """Return how often the outcomes differ, by reason."""
        counts: Counter[str] = Counter()
        left = iter(requests)

        async def work() -> None:
            for request in left:
                counts[await self.compare(request)] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(work())
        return counts


@contextmanager
def running_servers(directory: Path) -> Iterator[Servers]:
    """Run pullcache, with an upstream that is down, and nginx, which answers 200 to all it accepts."""
    home = directory / "nginx"
    home.mkdir()
    daemon = Daemon(directory / "daemon", UNREACHABLE)
    port = reserve_port(daemon)
    config = home / "config"
    config.write_text(_CONFIG.format(home=home, port=port))
    nginx = Process(home, "nginx", ["nginx", "-p", home, "-c", config, "-e", home / "error.log"])
    try:
        nginx.wait_until(lambda: has_status(f"http://127.0.0.1:{port}", "/"), "a response")
        daemon.start()
        yield Servers(int(daemon.address.rpartition(":")[2]), port)
        daemon.finish()
    finally:
        nginx.stop()


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    requests = make_requests(random.Random(options.seed), options.count)
    with (
        tempfile.TemporaryDirectory(prefix="http-") as directory,
        running_servers(Path(directory)) as servers,
    ):
        counts = asyncio.run(servers.compare_all(requests))
    for why, count in counts.most_common():
        sys.stdout.write(f"{count:6} {why or 'no difference'}\n")
    return 1 if any(why.startswith("UNLISTED") for why in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
