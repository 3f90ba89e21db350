"""The border to aiohttp's client: its exceptions become ours, and no body is read without a bound."""

import asyncio
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec
from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientHttpProxyError,
    ClientProxyConnectionError,
    ClientResponse,
    ClientResponseError,
)

from proxy.errors import (
    ProxyError,
    UnknownBlobError,
    UnknownManifestError,
    UnknownNameError,
    UnsatisfiableRangeError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
)
from proxy.upstream import retry

# OpenSSL's verdicts on a certificate whose time has not come, or is over (openssl-verification-options).
_CERTIFICATE_TIME_ERRORS = frozenset({9, 10})


MAX_ERROR_BODY = 64 << 10
# An error is not worth a long wait for its words.
ERROR_BODY_TIMEOUT = 1.0
_NOT_FOUND_ERRORS = {"blob": UnknownBlobError, "tags": UnknownNameError}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


class _RegistryErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _RegistryErrorBody(msgspec.Struct):
    errors: list[_RegistryErrorEntry] | None = None


class _TagsPage(msgspec.Struct):
    tags: list[str] | None


async def read_error_reason(response: ClientResponse) -> str:
    """Return `": "` and upstream's own words, at most 100 characters, or an empty text.

    Whatever the body is, this never fails: it decorates an error that is raised in any case.
    """
    try:
        async with asyncio.timeout(ERROR_BODY_TIMEOUT):
            content = await response.content.read(MAX_ERROR_BODY)
        errors = msgspec.json.decode(content, type=_RegistryErrorBody).errors or []
    except (ClientError, OSError, TimeoutError, msgspec.MsgspecError, ValueError, RecursionError):
        return ""
    text = next((error.message or error.code for error in errors), "")
    clean = _CONTROL_CHARACTERS.sub(" ", text)[:100].strip()
    return f": {clean}" if clean else ""


def error_from_status(label: str, status: int, kind: str, reason: str) -> ProxyError:
    """Return what a status other than success, redirect and 429 means; `reason` is as above."""
    if status in (401, 403, 451):
        return access_denied_error(label, reason)
    if status == 404:
        return _NOT_FOUND_ERRORS.get(kind, UnknownManifestError)(
            f"{label} does not have it{reason}"
        )
    if status == 416:
        return UnsatisfiableRangeError(f"{label} has nothing at this offset")
    if status in retry.TRANSIENT_STATUSES:
        return UpstreamUnavailableError(f"{label} answered {status}{reason}")
    return UpstreamError(f"{label} answered {status}{reason}")


def access_denied_error(label: str, reason: str) -> UpstreamUnauthorizedError:
    """Return what is said of content that is not for us, or not there: registries do not say which."""
    return UpstreamUnauthorizedError(
        f"{label} shows it to nobody, or not to this cache{reason}; "
        "if it is private, configure credentials"
    )


def invalid_credentials_error(label: str, reason: str) -> UpstreamUnauthorizedError:
    """Return what is said if username and password themselves were sent, and refused."""
    return UpstreamUnauthorizedError(
        f"{label} refuses this cache's own login{reason}; check its username and password"
    )


def parse_tags(content: bytes) -> list[str]:
    """Return the tags of one page (distribution-spec, "Listing Tags"), or raise `UpstreamError`."""
    try:
        return msgspec.json.decode(content, type=_TagsPage).tags or []
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("upstream sent something that is no list of tags") from error


def _ignore_status(_status: str) -> None:
    """Do nothing: the answer whose body breaks was counted when it came."""


@contextmanager
def map_errors(
    label: str, record_status: Callable[[Literal["error"]], None] = _ignore_status
) -> Iterator[None]:
    """Turn what aiohttp raises into `UpstreamError`s that name `peer`.

    `observe` is told "error" for each. Nothing but calls into aiohttp belongs inside: an
    `OSError` of the disk would be taken for one of the network.
    """
    try:
        yield
    except TimeoutError as error:
        record_status("error")
        raise UpstreamTimeoutError(f"{label} did not answer in time") from error
    except (ClientError, OSError, ValueError) as error:
        record_status("error")
        raise UpstreamUnavailableError(
            f"{label} cannot be reached: {_describe_error(error)}"
        ) from error


def _describe_error(error: Exception) -> str:
    """Return what happened, without the URL, which may be a signed one, in at most 80 characters."""
    if isinstance(error, ClientHttpProxyError):
        is_login = error.status == 407
        said = (
            f"its proxy {'wants another login (407)' if is_login else f'answered {error.status}'}"
        )
    elif isinstance(error, ClientConnectorError) and isinstance(error.os_error, ssl.SSLError):
        said = _describe_tls_error(error.os_error)
    elif isinstance(error, ClientConnectorError):
        # uvloop puts an address where the reason should be. Of names it says a negative number.
        number = error.os_error.errno or 0
        said = os.strerror(number) if number > 0 else str(error.os_error.strerror)
        if isinstance(error, ClientProxyConnectionError):
            said = f"its proxy: {said}"
    elif isinstance(error, ClientResponseError):
        said = error.message
    else:
        said = str(error)
    return said.partition("\n")[0][:80] or type(error).__name__


def _describe_tls_error(error: ssl.SSLError) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
    if error.verify_code in _CERTIFICATE_TIME_ERRORS:
        return f"{error.verify_message}; check this machine's clock"
    return error.verify_message


async def read_bounded(response: ClientResponse, limit: int) -> bytes:
    """Return the whole body, or raise `UpstreamError` if it has more than `limit` bytes.

    The bytes are counted as they come: a `Content-Length` may lie.
    """
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            response.close()
            raise UpstreamError(f"upstream sent more than {limit} bytes where few were due")
    return bytes(content)
