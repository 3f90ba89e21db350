"""Text output: sizes, durations, untrusted text made printable, and tables."""

import sys
from collections.abc import Iterable, Sequence

# Width of a table that is not printed to a terminal: wide enough that no cell is wrapped.
_UNLIMITED_WIDTH = 10_000


def format_bytes(count: int) -> str:
    """Return a size with three significant digits and a decimal unit: 1.23 GB."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if unit != "TB" else f"{size:.2f} TB"


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun: 1 blob, 2 blobs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: 3 d 4 h."""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2) or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def short_digest(text: str) -> str:
    """Return the first 12 hex digits of a digest with its algorithm; other text unchanged."""
    algorithm, colon, encoded = text.partition(":")
    return f"{algorithm}:{encoded[:12]}" if colon and len(encoded) > 12 else text


def escape_unprintable(text: str) -> str:
    """Return untrusted text with unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Truncator:
    """Shortens text for a terminal; with `no_trunc`, or without a terminal, it changes nothing."""

    def __init__(self, *, no_trunc: bool) -> None:
        self._no_trunc = no_trunc or not sys.stdout.isatty()

    @property
    def is_active(self) -> bool:
        """Whether text is shortened."""
        return not self._no_trunc

    def digest(self, text: str) -> str:
        """Return a digest in its short form; other text unchanged."""
        return text if self._no_trunc else short_digest(text)

    def platform(self, text: str) -> str:
        """Return a platform without `linux/`."""
        return text if self._no_trunc else text.removeprefix("linux/")

    def text(self, text: str, length: int) -> str:
        """Return at most `length` characters, the last one an ellipsis if there were more."""
        is_short = self._no_trunc or len(text) <= length
        return text if is_short else f"{text[: length - 1]}…"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to stdout. Cells may hold untrusted text.

    A column whose name begins with ">" is right-aligned. On a terminal the header is bold, unless
    NO_COLOR is set, and long cells are wrapped.
    """
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    width = None if sys.stdout.isatty() else _UNLIMITED_WIDTH
    console = Console(file=sys.stdout, width=width, soft_wrap=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if name != column else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_unprintable(cell)) for cell in row))
    console.print(table)
