"""What the commands print has these forms."""


def format_bytes(count: int) -> str:
    """Return a size for people: three digits and a unit, 1.23 GB."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if unit != "TB" else f"{size:.2f} TB"


def printable(text: str) -> str:
    """Return `text` with escapes for what does not print: it came from outside."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
