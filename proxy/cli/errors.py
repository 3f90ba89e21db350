"""The one table from errors to exit codes."""

from proxy.cli.display.text import printable
from proxy.errors import (
    ConfigError,
    DigestMismatchError,
    InvalidReferenceError,
    InvalidRequestError,
    ProxyError,
)

FAILED = 1
USAGE = 2
BAD_BYTES = 3
PARTLY_DONE = 4
INTERRUPTED = 130

# The first class that fits decides. Anything else is a bug: it keeps its traceback.
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, USAGE),
    (InvalidReferenceError, USAGE),
    (InvalidRequestError, USAGE),
    (DigestMismatchError, BAD_BYTES),
    (ProxyError, FAILED),
    (OSError, FAILED),  # an address in use, a directory that may not be written
)


def exit_code(error: Exception) -> int | None:
    """Return the exit code for `error`, or None if nobody foresaw it here."""
    if isinstance(error, BrokenPipeError):
        return None  # `pullcache config show | head`: click ends quietly
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), None)


def explain(error: Exception) -> str:
    """Return one line that says what happened; what it quotes may have come from anywhere."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return printable(" ".join(text.split())) or type(error).__name__
