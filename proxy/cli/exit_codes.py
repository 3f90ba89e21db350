"""Exit codes of the commands, and the text of errors; the table is in `proxy/errors.py`."""

from proxy.cli.display.text import escape_unprintable
from proxy.errors import ProxyError, error_outcome

FAILED = 1
USAGE_ERROR = 2
CORRUPTION_FOUND = 3
PARTIAL_SUCCESS = 4
INTERRUPTED = 130


def exit_code(error: Exception) -> int | None:
    """Return the exit code for `error`, None if it is unexpected and deserves a traceback."""
    if isinstance(error, BrokenPipeError):
        return None  # `pullcache config show | head`: click exits silently
    if isinstance(error, ProxyError):
        return error_outcome(error).exit_code
    # For example an address in use or a read-only directory. Anything else keeps its traceback.
    return FAILED if isinstance(error, OSError) else None


def format_error(error: Exception) -> str:
    """Return the message of `error` as one printable line; it may quote untrusted input."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return escape_unprintable(" ".join(text.split())) or type(error).__name__
