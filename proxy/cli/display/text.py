"""Text output: sizes, durations, untrusted text made printable, and tables."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

import click

from proxy.sizes import format_bytes as format_bytes  # noqa: PLC0414 - for the commands

# Width of a table that is not printed to a terminal: wide enough that no cell is wrapped.
_UNLIMITED_WIDTH = 10_000
# Width of the names of fields, and of the shortest cells that a narrow terminal leaves of a text.
_FIELD_WIDTH = 11
_MIN_FLEXIBLE_WIDTHS = (16, 12)
_NO_BREAK = "\N{NO-BREAK SPACE}"
# Spaces between two columns of a table.
_COLUMN_GAP = 2


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
        self.no_trunc = no_trunc or not sys.stdout.isatty()

    @property
    def is_active(self) -> bool:
        """Whether text is shortened."""
        return not self.no_trunc

    def digest(self, text: str) -> str:
        """Return a digest in its short form; other text unchanged."""
        return text if self.no_trunc else short_digest(text)

    def platform(self, text: str) -> str:
        """Return a platform without `linux/`."""
        return text if self.no_trunc else text.removeprefix("linux/")

    def text(self, text: str, length: int) -> str:
        """Return at most `length` characters, the last one an ellipsis if there were more."""
        return text if self.no_trunc else shorten(text, length)


def terminal_width() -> int | None:
    """Return the width of the terminal that stdout is, None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap(text: str, width: int | None, *, indent: str = "") -> str:
    """Return a text in lines of at most `width` columns, broken between words, never within one.

    `indent` begins the second line and those after it.
    """
    if width is None:
        return text
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def echo(text: str, *, err: bool = False) -> None:
    """Print a line of prose; on a terminal it is broken between words."""
    is_terminal = (sys.stderr if err else sys.stdout).isatty()
    click.echo(wrap(text, shutil.get_terminal_size().columns if is_terminal else None), err=err)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns; leave out empty values, which may be untrusted."""
    for name, value in fields:
        for number, line in enumerate(value.split("\n") if value else ()):
            head = f"{'' if number else name:<{_FIELD_WIDTH}}"
            click.echo(
                wrap(
                    f"{head}{escape_unprintable(line)}", terminal_width(), indent=" " * _FIELD_WIDTH
                )
            )


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    optional: Sequence[str] = (),
    flexible: str | Sequence[str] = (),
    no_trunc: bool = False,
) -> None:
    """Print a table to stdout. Cells may hold untrusted text.

    A column whose name begins with ">" is right-aligned. On a terminal the header is bold, unless
    NO_COLOR is set. If the terminal is too narrow, the columns `optional` are left out one by one, then
    cells of the columns `flexible` are shortened in turn, and then each row is printed as a few lines.
    With `no_trunc` the table is as wide as it is.
    """
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    cells = [[escape_unprintable(cell) for cell in row] for row in rows]
    width = None if no_trunc else terminal_width()
    flexible = (flexible,) if isinstance(flexible, str) else flexible
    layout = _TableLayout(columns, cells)
    if width is not None and not layout.fit(width, optional, flexible):
        if cells:
            click.echo(columns[0].removeprefix(">"))
        for row in cells:
            click.echo(_format_row(columns, row, width))
        return
    console = Console(file=sys.stdout, width=_UNLIMITED_WIDTH, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in layout.columns:
        shown = name.removeprefix(">")
        table.add_column(shown, justify="right" if shown != name else "left", no_wrap=True)
    for row in layout.rows:
        table.add_row(*map(Text, row))
    console.print(table)


class _TableLayout:
    """The columns and cells of a table that are shown."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]

    def fit(self, width: int, optional: Sequence[str], flexible: Sequence[str]) -> bool:
        """Leave out and shorten what is needed; tell whether the table then has at most `width`."""
        for name in optional:
            if self._excess(width) <= 0:
                return True
            number = self.columns.index(name)
            for row in (self.columns, *self.rows):
                del row[number]
        for name, least in zip(flexible, _MIN_FLEXIBLE_WIDTHS, strict=False):
            self._shorten(self.columns.index(name), least, width)
        return self._excess(width) <= 0

    def _shorten(self, number: int, least: int, width: int) -> None:
        """Shorten the cells of a column by what is too much, to `least` at most."""
        excess = self._excess(width)
        if excess > 0:
            length = max(least, self._width_of(number) - excess)
            for row in self.rows:
                row[number] = shorten(row[number], length)

    def _excess(self, width: int) -> int:
        widths = [self._width_of(number) + _COLUMN_GAP for number in range(len(self.columns))]
        return sum(widths) - _COLUMN_GAP - width

    def _width_of(self, number: int) -> int:
        from rich.cells import cell_len  # noqa: PLC0415 - slow to import

        texts = [self.columns[number].removeprefix(">"), *(row[number] for row in self.rows)]
        return max(map(cell_len, texts))


def _format_row(columns: Sequence[str], row: Sequence[str], width: int) -> str:
    """Return a row as its first cell, and the others below it with their names."""
    named = zip(columns[1:], row[1:], strict=True)
    parts = [
        f"{name.removeprefix('>').lower()} {cell}" for name, cell in named if cell not in ("", "-")
    ]
    # A name stays with a short value, and a number with its unit.
    joined = [part.replace(" ", _NO_BREAK) if len(part) < width // 2 else part for part in parts]
    text = wrap("  " + ", ".join(joined), width, indent="  ").replace(_NO_BREAK, " ")
    return f"{row[0]}\n{text}"


def shorten(text: str, length: int) -> str:
    """Return at most `length` characters, whole words if there are several, and an ellipsis."""
    if len(text) <= length:
        return text
    cut = text[: length - 1]
    if text[length - 1] != " " and " " in cut.strip():
        cut = cut.rpartition(" ")[0]
    return f"{cut.rstrip()}…"
