"""What upstream says beside content: statuses, error bodies and lists of tags."""

import asyncio
import re

import msgspec
from aiohttp import ClientError, ClientResponse

from proxy.errors import (
    ProxyError,
    UnknownBlobError,
    UnknownManifestError,
    UnknownNameError,
    UnsatisfiableRangeError,
    UpstreamError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
)
from proxy.upstream import retry

MAX_ERROR_BODY = 64 << 10
# An error is not worth a long wait for its words.
ERROR_BODY_TIMEOUT = 1.0
_UNKNOWN = {"blob": UnknownBlobError, "tags": UnknownNameError}
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
        async with asyncio.timeout(ERROR_BODY_TIMEOUT):
            content = await response.content.read(MAX_ERROR_BODY)
        errors = msgspec.json.decode(content, type=_Errors).errors or []
    except (ClientError, OSError, TimeoutError, msgspec.MsgspecError, ValueError, RecursionError):
        return ""
    text = next((error.message or error.code for error in errors), "")
    clean = _CONTROL.sub(" ", text)[:100].strip()
    return f": {clean}" if clean else ""


def refusal(peer: str, status: int, kind: str, reason: str) -> ProxyError:
    """Return what a status other than success, redirect and 429 means; `reason` is as above."""
    if status in (401, 403, 451):
        return denial(peer, reason)
    if status == 404:
        return _UNKNOWN.get(kind, UnknownManifestError)(f"{peer} does not have it{reason}")
    if status == 416:
        return UnsatisfiableRangeError(f"{peer} has nothing at this offset")
    if status in retry.TRANSIENT:
        return UpstreamUnavailableError(f"{peer} answered {status}{reason}")
    return UpstreamError(f"{peer} answered {status}{reason}")


def denial(peer: str, reason: str) -> UpstreamUnauthorizedError:
    """Return what is said of content that is not for us, or not there: registries do not say which."""
    return UpstreamUnauthorizedError(
        f"{peer} shows it to nobody, or not to this cache{reason}; "
        "if it is private, configure credentials"
    )


def login_refusal(peer: str, reason: str) -> UpstreamUnauthorizedError:
    """Return what is said if username and password themselves were sent, and refused."""
    return UpstreamUnauthorizedError(
        f"{peer} refuses this cache's own login{reason}; check its username and password"
    )


def tags(content: bytes) -> list[str]:
    """Return the tags of one page (distribution-spec, "Listing Tags"), or raise `UpstreamError`."""
    try:
        return msgspec.json.decode(content, type=_Tags).tags or []
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent something that is no list of tags") from error
