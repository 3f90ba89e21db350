"""The one table from errors to exit codes."""

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

# The first class that fits decides. Anything else is a bug: it keeps its traceback.
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, USAGE_ERROR),
    (InvalidReferenceError, USAGE_ERROR),
    (InvalidRequestError, USAGE_ERROR),
    (DigestMismatchError, CORRUPTION_FOUND),
    (ProxyError, FAILED),
    (OSError, FAILED),  # an address in use, a directory that may not be written
)


def exit_code(error: Exception) -> int | None:
    """Return the exit code for `error`, or None if nobody foresaw it here."""
    if isinstance(error, BrokenPipeError):
        return None  # `pullcache config show | head`: click ends quietly
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), None)


def format_error(error: Exception) -> str:
    """Return one line that says what happened; what it quotes may have come from anywhere."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return escape_unprintable(" ".join(text.split())) or type(error).__name__
