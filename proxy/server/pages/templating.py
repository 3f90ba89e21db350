"""The templates, and the filters by which they show sizes, times, digests and names.

Everything that is shown came from strangers: all output is escaped, and nothing is marked as safe but the
elements made here.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from proxy import __version__
from proxy.sizes import format_bytes

_UNITS = ((60, "s"), (3600, "min"), (86400, "h"), (86400 * 14, "d"), (86400 * 60, "weeks"))
_DIVISORS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "weeks": 86400 * 7}
_SHORT_DIGEST = 12
_SHORT_NAME = 60
# Seconds of rendering in one turn of the event loop: a manifest takes less than that.
_SLICE = 0.00025
_DASH = "\N{EN DASH}"


def create_environment(
    static_path: Callable[[str], str], clock: Callable[[], float] = time.time
) -> Environment:
    """Return the environment of the templates. Reads them all: blocking."""
    environment = Environment(
        loader=PackageLoader("proxy.server.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "size": format_size,
        "ago": partial(show_time, clock=clock),
        "seconds": format_seconds,
        "digest": show_digest,
        "short": shorten,
        "sentence": to_sentence,
        "percent": format_percent,
        "count": format_count,
        "query": with_query,
        "query_set": set_in_query,
    }
    environment.globals |= {
        "static": static_path,
        "version": __version__,
        "copy_button": copy_button,
        "layout": "base.html",
        "now": clock,
    }
    for name in environment.list_templates():
        environment.get_template(name)  # now, because reading a file blocks
    return environment


def show_time(moment: float | None, *, clock: Callable[[], float]) -> Markup | str:
    """Return a Unix time as an element: how long ago, with the time itself as its title."""
    if not moment:
        return "never"
    absolute = datetime.fromtimestamp(moment, UTC)
    text = absolute.strftime("%Y-%m-%d %H:%M:%S UTC")
    return Markup('<time datetime="%s" title="%s">%s</time>') % (
        f"{text[:10]}T{text[11:19]}Z",
        text,
        describe_age(clock() - moment),
    )


def describe_age(seconds: float) -> str:
    """Return an age, or a time to come if it is negative, in words: `3 h ago`, `in 2 min`."""
    if abs(seconds) < 2:
        return "now"
    text = format_seconds(abs(seconds))
    return f"{text} ago" if seconds > 0 else f"in {text}"


def format_seconds(seconds: float) -> str:
    """Return a duration in its largest unit."""
    for limit, unit in _UNITS:
        if seconds < limit:
            return f"{int(seconds / _DIVISORS[unit])} {unit}"
    months = int(seconds / (86400 * 30.44))
    return f"{months} months" if months < 24 else f"{int(seconds / (86400 * 365.25))} years"


def show_digest(digest: str | None) -> Markup | str:
    """Return a digest as an element: its first characters, with the whole as title, and a copy button."""
    if not digest:
        return _DASH
    algorithm, _, text = digest.partition(":")
    short = f"{algorithm}:{text[:_SHORT_DIGEST]}" if text else digest[:_SHORT_DIGEST]
    return Markup('<span class="digest"><code title="{}">{}</code>{}</span>').format(
        digest, short, copy_button(digest, "Copy the digest")
    )


def copy_button(text: str, label: str) -> Markup:
    """Return a button that copies a text; it is shown where the script runs."""
    return Markup(
        '<button type="button" class="copy" data-copy="{}" aria-label="{}" title="{}">copy</button>'
    ).format(text, label, label)


def shorten(text: str, length: int = _SHORT_NAME) -> Markup | str:
    """Return a long text as an element with its middle left out, and the whole as title."""
    if len(text) <= length:
        return text
    head = length * 2 // 3
    tail = length - head - 1
    return Markup('<span title="{}">{}…{}</span>').format(text, text[:head], text[-tail:])


def to_sentence(text: str) -> str:
    """Return the message of an error as a sentence of a page: a capital first, unless that is in a name."""
    first = text.split(" ", 1)[0].rstrip(",:;")
    shown = text[:1].upper() + text[1:] if first.isalpha() else text
    return shown if shown.endswith((".", "!", "?")) else f"{shown}."


def format_percent(ratio: float | None) -> str:
    """Return a ratio in percent; a dash for None."""
    if ratio is None:
        return _DASH
    percent = ratio * 100
    return f"{percent:.1f} %" if 0 < percent < 10 or 99 < percent < 100 else f"{percent:.0f} %"


def format_size(size: int) -> str:
    """Return a size with its unit; what was saved is negative when a preload cost more than it served."""
    return f"\N{MINUS SIGN}{format_bytes(-size)}" if size < 0 else format_bytes(size)


def format_count(number: int | None) -> str:
    """Return a number with its thousands apart; a dash for None."""
    return _DASH if number is None else f"{number:,}".replace(",", "\N{THIN SPACE}")


def with_query(path: str, **values: object) -> str:
    """Return a path with the values as its query, leaving out empty ones."""
    given = {name: value for name, value in values.items() if value not in (None, "", False)}
    return f"{path}?{urlencode(given)}" if given else path


def set_in_query(path: str, name: str, value: str) -> str:
    """Return a path with one more parameter in its query."""
    return f"{path}{'&' if '?' in path else '?'}{urlencode({name: value})}"


class PageRenderer:
    """Renders pages one after another, letting the event loop serve others after each `_SLICE` of work.

    In turns, many pages at once would each have a slice between two steps of a pull.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._turn = asyncio.Lock()

    async def render(self, template: str, context: Mapping[str, object]) -> str:
        """Return the text of a template."""
        found = self._environment.get_template(template)
        parts: list[str] = []
        async with self._turn:
            slice_ends = time.perf_counter() + _SLICE
            for part in found.generate(context):
                parts.append(part)
                if time.perf_counter() > slice_ends:
                    await asyncio.sleep(0)
                    slice_ends = time.perf_counter() + _SLICE
        return "".join(parts)
