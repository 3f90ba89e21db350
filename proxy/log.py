"""The log: structured lines on stderr, as JSON or for a console, written by a separate thread.

stdout is for data, so nothing is logged there. Callers only put lines into a bounded queue: if the
reader of stderr stops reading, lines are dropped and counted, but the event loop never blocks.
"""

import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from itertools import chain
from typing import Any, Literal, NoReturn, TextIO

import msgspec
import structlog

from proxy.console import format_admin_request, format_request
from proxy.journal import add_priority, is_journal_stream, priority_prefix

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request in this context; log lines carry it as `request`."""

# Lines that wait to be written: about a second of access lines at full rate.
_QUEUE_SIZE = 20_000
# Lines rendered at a time, which is faster than one by one: the code stays in the CPU's caches.
_BATCH_SIZE = 50
# Seconds between two writes: a busy daemon wakes the thread ten times a second, not a thousand.
_BATCH_DELAY = 0.1
# Seconds that `close` waits for the queue to be written.
_CLOSE_TIMEOUT = 2.0
_NOT_PRINTABLE_ASCII = re.compile(r"[^\x20-\x7e]")

Format = Literal["auto", "json", "console"]
Fields = MutableMapping[str, Any]


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose lines carry `logger: name`; it follows `configure_logging`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(name)
    return logger


def configure_logging(level: str, log_format: Format, stream: TextIO | None = None) -> "LogWriter":
    """Write what structlog and the standard library log to `stream` (default: stderr).

    This lasts until `LogWriter.close`. If the stream goes to systemd's journal, each line begins
    with its priority.
    """
    target = stream or sys.stderr
    is_console = log_format == "console" or (log_format == "auto" and target.isatty())
    # Only the thread renders for a console, which is slow: a batch larger than the queue never is whole.
    batch_size = _QUEUE_SIZE + 1 if is_console else _BATCH_SIZE
    render = _console_renderer(target) if is_console else _render_json_batch
    if is_journal_stream(target):
        render = _add_priorities(render)
    timestamps = _ConsoleTimeFormatter() if is_console else _TimestampFormatter()
    log = LogWriter(_make_writer(target), render, batch_size, timestamps)
    structlog.configure(
        processors=[log.process],
        logger_factory=_LoggerName,
        cache_logger_on_first_use=False,  # the loggers of modules must follow a later call
    )
    log.set_level(level)
    return log


class _LoggerName(str):
    """The logger that structlog wraps: only its name is needed."""

    __slots__ = ()


class LogWriter:
    """Queues lines and writes them in a thread. Methods are thread-safe; only `close` blocks."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        render: Callable[[list[Fields]], bytes],
        batch_size: int,
        timestamps: "_ConsoleTimeFormatter | _TimestampFormatter",
    ) -> None:
        self._write = write
        self._render = render
        self._batch_size = batch_size
        self.is_info_enabled = True
        self._timestamps = timestamps
        # The queue: batches that are rendered already, then lines that are not.
        self._rendered: list[bytes] = []
        self._lines: deque[Fields] = deque()
        self._dropped = 0
        # Set by callers when they queue a line, cleared by the thread before it writes the queue.
        self._is_waking = False
        self._is_closed = False
        self._lock = threading.Lock()
        self._wakeup = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._drain_until_closed, name="log", daemon=True)
        self._thread.start()
        self._stdlib_handler = _StdlibHandler(self)
        logging.getLogger().addHandler(self._stdlib_handler)

    def set_level(self, level: str) -> None:
        """Drop less severe lines from now on."""
        threshold = logging.getLevelNamesMapping()[level.upper()]
        self.is_info_enabled = threshold <= logging.INFO
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(threshold))
        logging.getLogger().setLevel(threshold)

    def log_request(self, event: str, **fields: Any) -> None:
        """Log a request as `info`, bypassing structlog, which would cost more than the request."""
        if self.is_info_enabled:
            line = self._new_line("info", event)
            line.update(fields)
            self.enqueue(line)

    def log_event(self, level: str, event: str, logger: str, fields: Fields) -> None:
        """Log an event; `exc_info` among the fields becomes a traceback."""
        line = self._new_line(level, event)
        line["logger"] = logger
        line.update(structlog.processors.format_exc_info(self, level, fields))
        self.enqueue(line)

    def process(self, logger: Any, method: str, fields: Fields) -> NoReturn:
        """Log an event of structlog, as the last of its processors."""
        self.log_event(method, str(fields.pop("event", "")), str(logger), fields)
        raise structlog.DropEvent

    def close(self) -> None:
        """Write the queue, for two seconds at most; later lines are written immediately."""
        logging.getLogger().removeHandler(self._stdlib_handler)
        self._closing.set()
        self._wakeup.set()
        self._thread.join(_CLOSE_TIMEOUT)
        self._is_closed = not self._thread.is_alive()

    def _new_line(self, level: str, event: str) -> dict[str, Any]:
        line: dict[str, Any] = {"time": time.time_ns(), "level": level, "event": event}
        if current := request_id.get():
            line["request"] = current
        return line

    def enqueue(self, line: Fields) -> None:
        """Queue a whole line, whose `time` is in nanoseconds, and render the batch that it completes.

        If the thread rendered all lines, it would hold the interpreter lock for milliseconds and
        block a busy event loop.
        """
        self._lines.append(line)
        if len(self._lines) >= self._batch_size:
            self._render_batch()
        if self._is_closed:
            self._drain()
        elif not self._is_waking:
            self._is_waking = True
            self._wakeup.set()

    def _render_batch(self) -> None:
        """Render the queued lines, or drop them if the queue is full."""
        with self._lock:
            lines = self._take_lines()
            if (len(self._rendered) + 1) * self._batch_size > _QUEUE_SIZE:
                self._dropped += len(lines)
            elif lines:
                self._rendered.append(self._render_lines(lines))

    def _take_lines(self) -> list[Fields]:
        """Empty the queue of lines. Another thread may append to it meanwhile."""
        lines = []
        with suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        return lines

    def _render_lines(self, lines: list[Fields]) -> bytes:
        for line in lines:
            line["time"] = self._timestamps.format(line["time"])
        return self._render(lines)

    def _drain_until_closed(self) -> None:
        while not self._closing.is_set():
            self._wakeup.wait()
            self._closing.wait(_BATCH_DELAY)
            # Before the drain: a line queued during it wakes the thread again.
            self._wakeup.clear()
            self._is_waking = False
            self._drain()
        self._drain()

    def _drain(self) -> None:
        with self._lock:
            rendered, self._rendered = self._rendered, []
            lines = self._take_lines()
            dropped, self._dropped = self._dropped, 0
        if dropped:
            line = self._new_line("warning", "log_lines_dropped")
            lines.append(line | {"lines": dropped})
        if lines:
            rendered.append(self._render_lines(lines))
        if rendered:
            self._write(b"".join(rendered))


class _ConsoleTimeFormatter:
    """Formats times for a console: the time of day here."""

    def format(self, nanoseconds: int) -> str:
        return time.strftime("%H:%M:%S", time.localtime(nanoseconds // 1_000_000_000))


class _TimestampFormatter:
    """Formats times (RFC 3339); the text of the current second is reused."""

    def __init__(self) -> None:
        self._cached_second = (0, "")  # one tuple, so that threads cannot mix two seconds

    def format(self, nanoseconds: int) -> str:
        second, fraction = divmod(nanoseconds, 1_000_000_000)
        cached, text = self._cached_second
        if cached != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._cached_second = (second, text)
        return f"{text}.{fraction // 1_000_000:03d}Z"


class _StdlibHandler(logging.Handler):
    """Logs the records of libraries (aiohttp, asyncio) in the same form as ours."""

    def __init__(self, log: LogWriter) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        fields: Fields = {"exc_info": record.exc_info} if record.exc_info else {}
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # the arguments do not match the format string
            message = str(record.msg)
        self._log.log_event(record.levelname.lower(), message, record.name, fields)


_encoder = msgspec.json.Encoder(enc_hook=str)
_encode = _encoder.encode


def _render_json_batch(lines: list[Fields]) -> bytes:
    """Return the lines as JSON: encoded in one call, unless one of them must be escaped."""
    try:
        batch = _encoder.encode_lines(lines)
    except (ValueError, TypeError, OverflowError):
        batch = b"\x7f"
    if batch.isascii() and b"\x7f" not in batch:
        return batch
    return b"".join(map(render_json, lines))


def render_json(fields: Mapping[str, Any]) -> bytes:
    """Return `fields` as one line of JSON that contains no control characters."""
    try:
        line = _encode(fields)
    except (ValueError, TypeError, OverflowError):
        # Most likely a lone surrogate: aiohttp decodes header bytes that are not UTF-8 to these.
        line = json.dumps(fields, default=str, skipkeys=True, separators=(",", ":")).encode()
    if not line.isascii() or b"\x7f" in line:
        line = _escape(line.decode()).encode()
    return line + b"\n"


def _escape(text: str) -> str:
    r"""Return `text` with \u escapes for what is not printable, such as controls and bidi marks."""
    return _NOT_PRINTABLE_ASCII.sub(
        lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text
    )


def _add_priorities(render: Callable[[list[Fields]], bytes]) -> Callable[[list[Fields]], bytes]:
    def prioritize(lines: list[Fields]) -> bytes:
        texts = render(lines).splitlines(keepends=True)
        if len(texts) != len(lines):
            # On a console a record with a traceback has many lines.
            return b"".join(add_priority(line["level"], render([line])) for line in lines)
        prefixes = [priority_prefix(line["level"]) for line in lines]
        return b"".join(chain.from_iterable(zip(prefixes, texts, strict=True)))

    return prioritize


# Events that are one short line on a console.
_CONSOLE_FORMS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "request": format_request,
    "admin_request": format_admin_request,
}


def _console_renderer(stream: TextIO) -> Callable[[list[Fields]], bytes]:
    """Return a renderer for consoles, where a request is one short line.

    Tracebacks never show values, which may be secrets.
    """
    renderer = structlog.dev.ConsoleRenderer(
        colors=stream.isatty() and "NO_COLOR" not in os.environ,
        timestamp_key="time",
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
        pad_event_to=0,
        pad_level=False,
    )

    def render(fields: Fields) -> bytes:
        if (form := _CONSOLE_FORMS.get(fields["event"])) and "method" in fields:
            return f"{fields['time']} {_escape(form(fields))}\n".encode(errors="backslashreplace")
        traceback = str(fields.get("exception", "")).split("\n")
        clean = {
            name: value if isinstance(value, bool | int | float) else _escape(str(value))
            for name, value in fields.items()
            if name != "exception" and not (name == "logger" and str(value).startswith("proxy"))
        }
        text = renderer(None, "", clean)
        tail = "".join(f"\n{_escape(line)}" for line in traceback if line)
        return f"{text}{tail}\n".encode(errors="backslashreplace")

    return lambda lines: b"".join(map(render, lines))


def _make_writer(stream: TextIO) -> Callable[[bytes], None]:
    """Return a function that writes to `stream`, by one system call if it has a descriptor."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, io.UnsupportedOperation):
        return lambda batch: (stream.write(batch.decode()), stream.flush(), None)[2]

    def write(batch: bytes) -> None:
        rest = memoryview(batch)
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                select.select([], [descriptor], [])  # another process made our stderr non-blocking
            except OSError:
                return  # nothing reads stderr any more, so the error cannot be reported

    return write
