"""What journald wants of whose stderr it reads: how severe each line is, at its begin (sd-daemon(3))."""

import os
from typing import TextIO

# Of syslog(3).
_PRIORITY_PREFIXES = {
    "critical": b"<2>",
    "error": b"<3>",
    "warning": b"<4>",
    "info": b"<6>",
    "debug": b"<7>",
}


def is_journal_stream(stream: TextIO) -> bool:
    """Tell whether `stream` leads to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it has no descriptor, or not any more
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def priority_prefix(level: str) -> bytes:
    """Return what a line of this level begins with."""
    return _PRIORITY_PREFIXES.get(level, _PRIORITY_PREFIXES["info"])


def add_priority(level: str, text: bytes) -> bytes:
    """Return lines of text, each with its prefix."""
    return b"".join(priority_prefix(level) + line for line in text.splitlines(keepends=True))
