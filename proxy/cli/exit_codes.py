"""Exit codes of the commands: the table from error classes to codes, and the text of errors."""

from proxy.cli.display.text import escape_unprintable
from proxy.errors import (
    ConfigError,
    DigestMismatchError,
    InvalidReferenceError,
    InvalidRequestError,
    ProxyError,
)

FAILED = 1
USAGE_ERROR = 2
CORRUPTION_FOUND = 3
PARTIAL_SUCCESS = 4
INTERRUPTED = 130

# The first class that matches decides.
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, USAGE_ERROR),
    (InvalidReferenceError, USAGE_ERROR),
    (InvalidRequestError, USAGE_ERROR),
    (DigestMismatchError, CORRUPTION_FOUND),
    (ProxyError, FAILED),
    (OSError, FAILED),  # for example an address in use or a read-only directory
)


def exit_code(error: Exception) -> int | None:
    """Return the exit code for `error`, None if it is unexpected and deserves a traceback."""
    if isinstance(error, BrokenPipeError):
        return None  # `pullcache config show | head`: click exits silently
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), None)


def format_error(error: Exception) -> str:
    """Return the message of `error` as one printable line; it may quote untrusted input."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return escape_unprintable(" ".join(text.split())) or type(error).__name__
