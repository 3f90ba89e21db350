"""Requests of clients, attackers and broken programs, with the outcome that RFC 9112 demands."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# `keep`: answered, and the connection is kept; `close`: answered, then closed; `refuse`: an error,
# then closed.
Outcome = Literal["keep", "close", "refuse"]
Verdict = tuple[str, Outcome]

REQUEST_LINES: list[Verdict] = [
    ("GET /v2/ HTTP/1.1\r\n", "keep"),
    ("HEAD /v2/?a=b HTTP/1.1\r\n", "keep"),
    ("GET /v2/ HTTP/1.0\r\n", "close"),
    ("GET /v2/ HTTP/1.2\r\n", "refuse"),
    ("GET /v2/ HTTP/2.0\r\n", "refuse"),
    ("GET /v2/ HTTP/0.9\r\n", "refuse"),
    ("GET /v2/ HTTP/1.10\r\n", "refuse"),
    ("GET /v2/ http/1.1\r\n", "refuse"),
    ("GET /v2/\r\n", "refuse"),
    ("GET /v2/ HTTP/1.1\n", "refuse"),
    ("GET /v2/ HTTP/1.1\r", "refuse"),
    ("GET /v2/ HTTP/1.1 \r\n", "refuse"),
    ("GET /v2/\x01 HTTP/1.1\r\n", "refuse"),
    ("GET /v2/\xff HTTP/1.1\r\n", "refuse"),
    (" GET /v2/ HTTP/1.1\r\n", "refuse"),
    ("get /v2/ HTTP/1.1\r\n", "refuse"),
    ("G\x00T /v2/ HTTP/1.1\r\n", "refuse"),
]
HOSTS: list[Verdict] = [
    ("Host: x\r\n", "keep"),
    ("hOST:x\r\n", "keep"),
    ("", "refuse"),  # section 3.2; in HTTP/1.0 there is none
    ("Host: x\r\nHost: x\r\n", "refuse"),
    ("Host: x\n", "refuse"),
    ("Host:\r\n", "keep"),
    ("Host: my_cache:5000\r\n", "keep"),
    ("Host: [::1]:5000\r\n", "keep"),
    ("Host: a b\r\n", "refuse"),
    ("Host: a/b\r\n", "refuse"),
    ("Host: a@b\r\n", "refuse"),
    ("Host: a:b\r\n", "refuse"),
    ("Host: \xe4\r\n", "refuse"),
    ("Host: [::1\r\n", "refuse"),
]
HEADERS: list[Verdict] = [
    ("", "keep"),
    ("A: b\r\nA: c\r\n", "keep"),
    ("A:\r\n", "keep"),
    ("A:\t b \t\r\n", "keep"),
    ("A: \xe4\r\n", "keep"),
    ("Connection: close\r\n", "close"),
    ("Connection: keep-alive, Close\r\n", "close"),
    ("A : b\r\n", "refuse"),
    ("A: b\r\n c\r\n", "refuse"),
    ("A: b\r\n\tc\r\n", "refuse"),
    ("A: b\x00c\r\n", "refuse"),
    ("A: b\rc\r\n", "refuse"),
    ("A: b\x7fc\r\n", "refuse"),
    ("A\xe4: b\r\n", "refuse"),
    ('"A": b\r\n', "refuse"),
    ("nonsense\r\n", "refuse"),
    (": b\r\n", "refuse"),
]
CHUNKED = "Transfer-Encoding: chunked\r\n"
BODIES: list[tuple[str, str, Outcome]] = [
    ("", "", "keep"),
    ("Content-Length: 0\r\n", "", "keep"),
    ("Content-Length: 3\r\n", "abc", "keep"),
    ("Content-Length:  3 \r\n", "abc", "keep"),
    ("Content-Length: 003\r\n", "abc", "keep"),
    (CHUNKED, "0\r\n\r\n", "keep"),
    (CHUNKED, "3\r\nabc\r\n0\r\n\r\n", "keep"),
    (CHUNKED, "A;x=y\r\n0123456789\r\n0\r\n\r\n", "keep"),
    (CHUNKED, "1\r\na\r\n0\r\nHost: y\r\n\r\n", "refuse"),  # of a trailer nothing is taken
    (CHUNKED, "1\r\na\r\n0\r\nT: v\r\n\r\n", "keep"),
    ("transfer-encoding: Chunked\r\n", "0\r\n\r\n", "keep"),
    ("Content-Length: 3\r\nContent-Length: 3\r\n", "abc", "refuse"),
    ("Content-Length: 3\r\nContent-Length: 4\r\n", "abcd", "refuse"),
    ("Content-Length: 3, 3\r\n", "abc", "refuse"),
    ("Content-Length: +3\r\n", "abc", "refuse"),
    ("Content-Length: -3\r\n", "abc", "refuse"),
    ("Content-Length: 0x3\r\n", "abc", "refuse"),
    ("Content-Length: 3 3\r\n", "abc", "refuse"),
    ("Content-Length: 3.0\r\n", "abc", "refuse"),
    ("Content-Length:\r\n", "abc", "refuse"),
    ("Content-Length: 99999999999999999999\r\n", "abc", "refuse"),
    ("Content-Length: 3\r\n" + CHUNKED, "0\r\n\r\n", "refuse"),
    (CHUNKED + "Content-Length: 3\r\n", "0\r\n\r\n", "refuse"),
    (CHUNKED + CHUNKED, "0\r\n\r\n", "refuse"),
    ("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n", "refuse"),
    ("Transfer-Encoding: chunked, gzip\r\n", "0\r\n\r\n", "refuse"),
    ("Transfer-Encoding: identity\r\n", "", "refuse"),
    ("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n", "refuse"),
    ("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n", "refuse"),
    ("Transfer-Encoding: chunked\n", "0\r\n\r\n", "refuse"),
    (CHUNKED, "3\nabc\n0\n\n", "refuse"),
    (CHUNKED, "3 \r\nabc\r\n0\r\n\r\n", "refuse"),
    (CHUNKED, "0x3\r\nabc\r\n0\r\n\r\n", "refuse"),
    (CHUNKED, "-3\r\nabc\r\n0\r\n\r\n", "refuse"),
    (CHUNKED, "3\r\nabcd\r\n0\r\n\r\n", "refuse"),
    (CHUNKED, "3;a\nb\r\nabc\r\n0\r\n\r\n", "refuse"),
    (CHUNKED, "fffffffffffffffff\r\nabc\r\n0\r\n\r\n", "refuse"),
]

# Follows every request; it is answered only if the server has understood where the first one ends.
SECOND = b"GET /second HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request as bytes, and its outcome."""

    data: bytes
    outcome: Outcome


def generate() -> Iterator[WireRequest]:
    """Yield every combination: some ten thousand requests."""
    for (line, a), (host, b), (header, c), (framing, body, d) in itertools.product(
        REQUEST_LINES, HOSTS, HEADERS, BODIES
    ):
        # Of each combination at most three pieces are not the plain ones.
        plain = (REQUEST_LINES[0], HOSTS[0], HEADERS[0], BODIES[0])
        pieces = ((line, a), (host, b), (header, c), (framing, body, d))
        if sum(one != other for one, other in zip(pieces, plain, strict=True)) > 3:
            continue
        outcomes = [b, c, d, a]
        if "HTTP/1.0" in line:
            # No host is needed there (section 3.2), and no coding known (section 6.1).
            outcomes[0] = b if host else "keep"
            outcomes[2] = "refuse" if "transfer-encoding" in framing.lower() else d
        outcome: Outcome = "keep"
        if "refuse" in outcomes:
            outcome = "refuse"
        elif "close" in outcomes:
            outcome = "close"
        head = f"{line}{host}{header}{framing}\r\n"
        yield WireRequest((head + body).encode("latin-1"), outcome)
