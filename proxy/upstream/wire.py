"""The border to aiohttp's client: its exceptions become ours, and no body is read without a bound."""

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientHttpProxyError,
    ClientProxyConnectionError,
    ClientResponse,
    ClientResponseError,
)

from proxy.errors import UpstreamError, UpstreamTimeoutError, UpstreamUnavailableError


def _ignore(_status: str) -> None:
    """Do nothing: the answer whose body breaks was counted when it came."""


@contextmanager
def translated(peer: str, observe: Callable[[Literal["error"]], None] = _ignore) -> Iterator[None]:
    """Turn what aiohttp raises into `UpstreamError`s that name `peer`.

    `observe` is told "error" for each. Nothing but calls into aiohttp belongs inside: an
    `OSError` of the disk would be taken for one of the network.
    """
    try:
        yield
    except TimeoutError as error:
        observe("error")
        raise UpstreamTimeoutError(f"{peer} did not answer in time") from error
    except (ClientError, OSError, ValueError) as error:
        observe("error")
        raise UpstreamUnavailableError(f"{peer} cannot be reached: {_reason(error)}") from error


# OpenSSL's verdicts on a certificate whose time has not come, or is over (openssl-verification-options).
_OUT_OF_TIME = frozenset({9, 10})


def _reason(error: Exception) -> str:
    """Return what happened, without the URL, which may be a signed one, in at most 80 characters."""
    if isinstance(error, ClientHttpProxyError):
        is_login = error.status == 407
        said = (
            f"its proxy {'wants another login (407)' if is_login else f'answered {error.status}'}"
        )
    elif isinstance(error, ClientConnectorError) and isinstance(error.os_error, ssl.SSLError):
        said = _tls_reason(error.os_error)
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


def _tls_reason(error: ssl.SSLError) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
    if error.verify_code in _OUT_OF_TIME:
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
