"""Map upstream's failures, exceptions of aiohttp and error statuses, to `proxy.errors`."""

import asyncio
import errno
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

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
    LoopDetectedError,
    NoDescriptorsError,
    NoReferrersApiError,
    ProxyError,
    UnknownBlobError,
    UnknownManifestError,
    UnknownNameError,
    UnsatisfiableRangeError,
    UpstreamError,
    UpstreamForbiddenError,
    UpstreamRefusedError,
    UpstreamTimeoutError,
    UpstreamUnauthorizedError,
    UpstreamUnavailableError,
    UpstreamUnreachableError,
)
from proxy.upstream.encoding import gunzip, is_gzip_encoded
from proxy.upstream.network import retry

LOOP_DETECTED = 508
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
# Codes of a 404 that is about the repository or the manifest (distribution-spec, "Error Codes").
_UNKNOWN_CODES = frozenset({"NAME_UNKNOWN", "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"})
_DENIED_ERRORS = {
    401: UpstreamUnauthorizedError,
    403: UpstreamForbiddenError,
    451: UpstreamForbiddenError,
}
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

    If this process has no descriptor left, it is a `NoDescriptorsError`.

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
        if _errno(error) in (errno.EMFILE, errno.ENFILE):
            # The registry is not to blame.
            raise NoDescriptorsError(
                "this cache has no file descriptors left; try again, and raise the limit on open files"
            ) from error
        is_connected = not isinstance(error, ClientConnectorError)
        kind = UpstreamUnavailableError if is_connected else UpstreamUnreachableError
        raise kind(f"{label} cannot be reached: {_describe_error(error)}") from error


class RegistryError(NamedTuple):
    """The first error in a registry's response: its code, and its message for ours."""

    code: str = ""
    reason: str = ""


def error_from_status(label: str, status: int, kind: str, error: RegistryError) -> ProxyError:
    """Return the error for any status except success, redirects and 429.

    `kind` is the kind of the request, `error` comes from `read_error`.
    """
    message = f"{label} responded with status {status}{error.reason}"
    if status == LOOP_DETECTED:
        return LoopDetectedError(message)
    if status in retry.TRANSIENT_STATUSES:
        return UpstreamUnavailableError(message)
    if status >= 500 and status not in retry.REFUSAL_STATUSES:
        return UpstreamError(message)
    if kind == "referrers":
        return _no_referrers_error(label, status, error)
    return _refusal(label, status, kind, error)


def _refusal(label: str, status: int, kind: str, error: RegistryError) -> ProxyError:
    if status == 404:
        return _NOT_FOUND_ERRORS.get(kind, UnknownManifestError)(
            f"{label} does not have it{error.reason}"
        )
    if status == 416:
        return UnsatisfiableRangeError(f"{label} cannot satisfy the requested range")
    if status in _DENIED_ERRORS:
        return _DENIED_ERRORS[status](str(access_denied_error(label, error.reason)))
    return UpstreamRefusedError(f"{label} responded with status {status}{error.reason}")


def _no_referrers_error(label: str, status: int, error: RegistryError) -> UnknownManifestError:
    """Return the error for a refused list of referrers: clients go on to the fallback tag.

    It is a `NoReferrersApiError` only if the response is not about this repository or manifest.
    """
    message = f"{label} lists no referrers of it: status {status}{error.reason}"
    if status in (405, 406, *retry.REFUSAL_STATUSES) or (
        status == 404 and error.code not in _UNKNOWN_CODES
    ):
        return NoReferrersApiError(message)
    return UnknownManifestError(message)


def access_denied_error(label: str, reason: str) -> UpstreamUnauthorizedError:
    """Return the error for denied access; registries do not say whether the content exists."""
    return UpstreamUnauthorizedError(
        f"{label} denied access{reason}; it may not exist; if it is private, configure credentials"
    )


def invalid_credentials_error(label: str, reason: str) -> UpstreamUnauthorizedError:
    """Return the error for a username and password that were sent and rejected."""
    error = UpstreamUnauthorizedError(
        f"{label} rejected the configured credentials{reason}; check username and password"
    )
    error.rejects_credentials = True
    return error


async def read_error(response: ClientResponse) -> RegistryError:
    """Return upstream's own error; both parts are empty if there is none.

    `reason` is `": <message>"` with at most 100 characters and no control characters. Never fails,
    whatever the body is: it only adds detail to an error that is raised anyway.
    """
    try:
        async with asyncio.timeout(ERROR_BODY_TIMEOUT):
            content = await response.content.read(MAX_ERROR_BODY)
        if is_gzip_encoded(response.headers):
            content = gunzip(content, MAX_ERROR_BODY)
        entries = msgspec.json.decode(content, type=_RegistryErrorBody).errors or []
    except (*_BODY_ERRORS, UpstreamError):
        return RegistryError()
    entry = next(iter(entries), _RegistryErrorEntry())
    clean = _CONTROL_CHARACTERS.sub(" ", entry.message or entry.code)[:100].strip()
    return RegistryError(entry.code, f": {clean}" if clean else "")


def _errno(error: Exception) -> int | None:
    os_error = error.os_error if isinstance(error, ClientConnectorError) else error
    return os_error.errno if isinstance(os_error, OSError) else None


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
