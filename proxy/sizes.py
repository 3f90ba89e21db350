"""Sizes as text."""


def format_bytes(count: int) -> str:
    """Return a size with three significant digits and a decimal unit: 1.23 GB."""
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if unit != "TB" else f"{size:.2f} TB"
