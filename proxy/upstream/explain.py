"""Small documents that upstream sends beside content: error bodies and lists of tags."""

import re

import msgspec
from aiohttp import ClientError, ClientResponse

from proxy.errors import UpstreamError

MAX_ERROR_BODY = 64 << 10
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] | None = None


class _Tags(msgspec.Struct):
    tags: list[str] | None


async def reason(response: ClientResponse) -> str:
    """Return `": "` and upstream's own words, at most 100 characters, or an empty text.

    Whatever the body is, this never fails: it decorates an error that is raised in any case.
    """
    try:
        content = await response.content.read(MAX_ERROR_BODY)
        errors = msgspec.json.decode(content, type=_Errors).errors or []
    except (ClientError, OSError, TimeoutError, msgspec.MsgspecError, ValueError, RecursionError):
        return ""
    text = next((error.message or error.code for error in errors), "")
    clean = _CONTROL.sub(" ", text)[:100].strip()
    return f": {clean}" if clean else ""


def tags(content: bytes) -> list[str]:
    """Return the tags of one page (distribution-spec, "Listing Tags"), or raise `UpstreamError`."""
    try:
        return msgspec.json.decode(content, type=_Tags).tags or []
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent something that is no list of tags") from error
