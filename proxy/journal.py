"""Priorities of lines on stderr: a prefix from which journald reads the severity (sd-daemon(3))."""

import os
from typing import TextIO

# Levels of syslog(3).
_PRIORITY_PREFIXES = {
    "critical": b"<2>",
    "error": b"<3>",
    "warning": b"<4>",
    "info": b"<6>",
    "debug": b"<7>",
}


def is_journal_stream(stream: TextIO) -> bool:
    """Tell whether journald reads `stream` (JOURNAL_STREAM in systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # without a descriptor, or closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def priority_prefix(level: str) -> bytes:
    """Return the prefix for a line of this level."""
    return _PRIORITY_PREFIXES.get(level, _PRIORITY_PREFIXES["info"])


def add_priority(level: str, text: bytes) -> bytes:
    """Return the text with the prefix before each line."""
    return b"".join(priority_prefix(level) + line for line in text.splitlines(keepends=True))
