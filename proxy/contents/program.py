"""Runs a program with limits of time and output, in a thread."""

import os
import select
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen
from typing import NamedTuple

from proxy.errors import ContentsError

_CHUNK = 64 << 10
# How often a running program is asked whether it should end, in seconds.
_POLL_INTERVAL = 0.2


class ProgramOutput(NamedTuple):
    """What a program printed, and its exit status; negative if a signal ended it."""

    output: bytes
    status: int


def run_program(
    arguments: Sequence[str],
    *,
    stdin: int = DEVNULL,
    timeout: float,
    max_output: int,
    stopping: threading.Event,
    environment: Mapping[str, str],
    stderr: int = DEVNULL,
) -> ProgramOutput:
    """Return the output of a program; it, and what it has started, are killed in any case.

    Raises `ContentsError` if it cannot be started, takes longer than `timeout` seconds, prints more than
    `max_output` bytes, or `stopping` is set. Blocks. Not as a subprocess of the loop: uvloop leaves the pipe
    of a program open that is killed while it prints.
    """
    name = arguments[0]
    try:
        process = Popen(  # noqa: S603 (no shell; the operator configured it, or it is our own)
            arguments,
            bufsize=0,
            stdin=stdin,
            stdout=PIPE,
            stderr=stderr,
            env=dict(environment),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise ContentsError(f"{name[:80]} cannot be run: {error}") from error
    with process:
        try:
            output = _read_output(process, name, time.monotonic() + timeout, max_output, stopping)
            return ProgramOutput(output, process.wait(timeout))
        finally:
            # The whole session: what the program started may keep its output open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_output(
    process: Popen[bytes], name: str, deadline: float, limit: int, stopping: threading.Event
) -> bytes:
    assert process.stdout is not None
    output = bytearray()
    poller = select.poll()  # select.select fails with descriptors above 1023
    poller.register(process.stdout, select.POLLIN)
    while not stopping.is_set():
        if time.monotonic() > deadline:
            raise ContentsError(f"{name[:80]} took too long and was stopped")
        if not poller.poll(_POLL_INTERVAL * 1000):
            continue
        chunk = process.stdout.read(_CHUNK)
        if not chunk:
            return bytes(output)
        output += chunk
        if len(output) > limit:
            raise ContentsError(f"{name[:80]} printed more than {limit} bytes and was stopped")
    raise ContentsError(f"{name[:80]} was stopped, because pullcache stops")
