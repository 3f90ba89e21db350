"""What the commands print has these forms."""

import sys
from collections.abc import Iterable, Sequence

# How wide a table is where nobody says: what reads it is no terminal, and cells are not to be cut.
_UNLIMITED_WIDTH = 10_000


def format_bytes(count: int) -> str:
    """Return a size for people: three digits and a unit, 1.23 GB."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if unit != "TB" else f"{size:.2f} TB"


def format_count(count: int, noun: str) -> str:
    """Return how many there are of what `noun` names: 1 blob, 2 blobs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def escape_unprintable(text: str) -> str:
    """Return `text` with escapes for what does not print: it came from outside."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short_digest(text: str) -> str:
    """Return a digest's beginning, as people compare them; anything else as it is."""
    algorithm, colon, encoded = text.partition(":")
    return f"{algorithm}:{encoded[:12]}" if colon and len(encoded) > 12 else text


class Truncator:
    """Cuts texts for a terminal; elsewhere, and where it is asked for, they stay whole."""

    def __init__(self, *, no_trunc: bool) -> None:
        self._no_trunc = no_trunc or not sys.stdout.isatty()

    def digest(self, text: str) -> str:
        """Return a digest, or its beginning; anything else as it is."""
        return text if self._no_trunc else short_digest(text)

    def platform(self, text: str) -> str:
        """Return a platform; for a terminal without the system that nearly all have."""
        return text if self._no_trunc else text.removeprefix("linux/")

    def text(self, text: str, length: int) -> str:
        """Return a text, or its beginning."""
        is_short = self._no_trunc or len(text) <= length
        return text if is_short else f"{text[: length - 1]}…"


def format_duration(seconds: float) -> str:
    """Return a time for people, its two greatest units: 3 d 4 h."""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2) or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout: in columns as wide as they need, with colour only on a terminal without NO_COLOR.

    A column whose name begins with ">" is set to the right. Cells may hold anything: what does not print is escaped.
    """
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    stream = sys.stdout
    console = Console(
        file=stream, width=None if stream.isatty() else _UNLIMITED_WIDTH, soft_wrap=False
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if name != column else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_unprintable(cell)) for cell in row))
    console.print(table)
