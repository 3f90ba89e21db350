"""Map upstream's failures, exceptions of aiohttp and error statuses, to `proxy.errors`."""

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
from proxy.upstream.encoding import gunzip, is_gzip_encoded

MAX_ERROR_BODY = 64 << 10
# Seconds. The body only adds detail to an error that is raised anyway.
ERROR_BODY_TIMEOUT = 1.0

# OpenSSL: X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
# (openssl-verification-options).
_CERTIFICATE_TIME_ERRORS = frozenset({9, 10})

_BODY_ERRORS = (
    *(ClientError, OSError, TimeoutError),
    *(msgspec.MsgspecError, ValueError, RecursionError),
)
_NOT_FOUND_ERRORS = {"blob": UnknownBlobError, "tags": UnknownNameError}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


class _RegistryErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _RegistryErrorBody(msgspec.Struct):
    errors: list[_RegistryErrorEntry] | None = None


def _ignore_status(_status: str) -> None:
    """Do nothing: a response whose body breaks was already counted by its status."""


@contextmanager
def map_errors(
    label: str, record_status: Callable[[Literal["error"]], None] = _ignore_status
) -> Iterator[None]:
    """Turn exceptions of aiohttp into `UpstreamUnavailableError`s that start with `label`.

    Calls `record_status("error")` for each. The block must contain only calls into aiohttp: an
    `OSError` of the disk would be reported as one of the network.
    """
    try:
        yield
    except TimeoutError as error:
        record_status("error")
        raise UpstreamTimeoutError(f"{label} did not respond in time") from error
    except (ClientError, OSError, ValueError) as error:
        record_status("error")
        raise UpstreamUnavailableError(
            f"{label} cannot be reached: {_describe_error(error)}"
        ) from error


def error_from_status(label: str, status: int, kind: str, reason: str) -> ProxyError:
    """Return the error for any status except success, redirects and 429.

    `kind` is the kind of the request, `reason` comes from `read_error_reason`.
    """
    if status in (401, 403, 451):
        return access_denied_error(label, reason)
    if status == 404:
        return _NOT_FOUND_ERRORS.get(kind, UnknownManifestError)(
            f"{label} does not have it{reason}"
        )
    if status == 416:
        return UnsatisfiableRangeError(f"{label} cannot satisfy the requested range")
    message = f"{label} responded with status {status}{reason}"
    if status in retry.TRANSIENT_STATUSES:
        return UpstreamUnavailableError(message)
    return UpstreamError(message)


def access_denied_error(label: str, reason: str) -> UpstreamUnauthorizedError:
    """Return the error for denied access; registries do not say whether the content exists."""
    return UpstreamUnauthorizedError(
        f"{label} denied access{reason}; it may not exist; if it is private, configure credentials"
    )


def invalid_credentials_error(label: str, reason: str) -> UpstreamUnauthorizedError:
    """Return the error for a username and password that were sent and rejected."""
    return UpstreamUnauthorizedError(
        f"{label} rejected the configured credentials{reason}; check username and password"
    )


async def read_error_reason(response: ClientResponse) -> str:
    """Return upstream's own message as `": <message>"`, or an empty string if there is none.

    The message has at most 100 characters and no control characters. Never fails, whatever the body
    is: it only adds detail to an error that is raised anyway.
    """
    try:
        async with asyncio.timeout(ERROR_BODY_TIMEOUT):
            content = await response.content.read(MAX_ERROR_BODY)
        if is_gzip_encoded(response.headers):
            content = gunzip(content, MAX_ERROR_BODY)
        entries = msgspec.json.decode(content, type=_RegistryErrorBody).errors or []
    except (*_BODY_ERRORS, UpstreamError):
        return ""
    message = next((entry.message or entry.code for entry in entries), "")
    clean = _CONTROL_CHARACTERS.sub(" ", message)[:100].strip()
    return f": {clean}" if clean else ""


def _describe_error(error: Exception) -> str:
    """Return the cause in at most 80 characters, without the URL, which may be a signed one."""
    if isinstance(error, ClientHttpProxyError):
        cause = (
            "its proxy rejected the credentials (407)"
            if error.status == 407
            else f"its proxy responded with status {error.status}"
        )
    elif isinstance(error, ClientConnectorError) and isinstance(error.os_error, ssl.SSLError):
        cause = _describe_tls_error(error.os_error)
    elif isinstance(error, ClientConnectorError):
        # uvloop puts the address into strerror; errno is negative if getaddrinfo failed.
        number = error.os_error.errno or 0
        cause = os.strerror(number) if number > 0 else str(error.os_error.strerror)
        if isinstance(error, ClientProxyConnectionError):
            cause = f"its proxy: {cause}"
    elif isinstance(error, ClientResponseError):
        cause = error.message
    else:
        cause = str(error)
    return cause.partition("\n")[0][:80] or type(error).__name__


def _describe_tls_error(error: ssl.SSLError) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
    if error.verify_code in _CERTIFICATE_TIME_ERRORS:
        return f"{error.verify_message}; check this machine's clock"
    return error.verify_message
