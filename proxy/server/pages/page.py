"""The parts of the pages: a page, an action, and the request that both get.

To add a page:

1. Write its handler in a module of `views`: an `async def` that takes a `PageRequest`, calls
   operations of the admin API by `request.api`, and returns what its template shows: a mapping,
   whose values msgspec can encode, because it is the page's JSON too.
2. Write its template in `templates`; it extends `layout`, and uses the macros of `_macros.html`. Its
   block `live`, in an element with the id `live`, is sent anew when it changes, if the page `is_live`.
3. List the `Page`, and its `Action`s, in `views/__init__.py`.
4. Add its path to `PATHS` in `tests/browser/paths.py`: all checks of the browser then apply.

An action is the POST of a form, made by the macro `post_form`, which has the token of the page. Its handler
calls operations of the API, and returns `Done`; an error is shown on the page that the form is on. Pages work
without JavaScript: what takes long is a `Job`, whose page shows its progress.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import unquote

from proxy.server.admin.actor import Actor
from proxy.server.admin.api import ByteStream
from proxy.server.pages.calls import ApiCaller

Model = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request for a page or an action.

    `query` and `form` have the last value of each name; `form_values` has all of them. `origin` is the
    address that the browser has used, as in `http://127.0.0.1:5001`, `now` the Unix time. `upload` is the file of an action
    that `takes_upload`.
    """

    api: ApiCaller
    actor: Actor
    origin: str
    now: float
    path_params: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, str] = field(default_factory=dict)
    form_values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    upload: AsyncIterator[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A page at `path`, in which `{name}` is a parameter, and `{name:path}` one that may have slashes.

    `nav` is its name in the navigation, empty if it is not there; `title` is that of the window.
    """

    path: str
    handler: Callable[[PageRequest], Awaitable[Model]]
    template: str
    title: str
    nav: str = ""
    is_live: bool = False

    def match(self, path: str) -> dict[str, str] | None:
        """Return the parameters if `path`, still percent-encoded, is this page's, else None."""
        match = _compile_path(self.path).fullmatch(path)
        return {name: unquote(text) for name, text in match.groupdict().items()} if match else None


@dataclass(frozen=True, slots=True)
class Done:
    """The result of an action: a message, or none, for the page at `path`, by default the one of the form."""

    message: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """The result of an action that is a page of its own."""

    template: str
    title: str
    model: Model


@dataclass(frozen=True, slots=True)
class JobLine:
    """A line of a job; it replaces the line with the same `key`, if that is not empty.

    `share` is how much is done, from 0 to 1, None if that is not known. `image` is the stored image with
    whose name the text begins, empty if there is none.
    """

    text: str
    key: str = ""
    is_problem: bool = False
    share: float | None = None
    image: str = ""


@dataclass(frozen=True, slots=True)
class NewJob:
    """The result of an action that takes long: events, and the line that shows each of them.

    `back` is the page that its page leads to.
    """

    title: str
    events: AsyncGenerator[object, None]
    describe: Callable[[object], JobLine | None]
    back: str = "/"


ActionResult = Done | View | NewJob | ByteStream


@dataclass(frozen=True, slots=True)
class Action:
    """What the POST of a form at `path` does; one that changes nothing `is_read`."""

    path: str
    handler: Callable[[PageRequest], Awaitable[ActionResult]]
    is_read: bool = False
    takes_upload: bool = False


@cache
def _compile_path(path: str) -> re.Pattern[str]:
    pattern = re.sub(r"\\{(\w+):path\\}", r"(?P<\1>.+)", re.escape(path))
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", pattern))
