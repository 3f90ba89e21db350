"""Exit codes of commands, and the line that says an error (the table is in `proxy/errors.py`)."""

from proxy.cli.display.text import escape_unprintable
from proxy.errors import ProxyError, error_outcome

FAILED = 1
USAGE_ERROR = 2
CORRUPTION_FOUND = 3
PARTIAL_SUCCESS = 4
INTERRUPTED = 130


def exit_code(error: Exception) -> int | None:
    """Return the exit code for `error`, or None if nobody foresaw it here."""
    if isinstance(error, BrokenPipeError):
        return None  # `pullcache config show | head`: click ends quietly
    if isinstance(error, ProxyError):
        return error_outcome(error).exit_code
    # An address in use, a directory that may not be written. Anything else keeps its traceback.
    return FAILED if isinstance(error, OSError) else None


def format_error(error: Exception) -> str:
    """Return one line that says what happened; what it quotes may have come from anywhere."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return escape_unprintable(" ".join(text.split())) or type(error).__name__
