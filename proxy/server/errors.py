"""Errors as responses in the form of the distribution specification ("Error Codes")."""

from collections.abc import Mapping

from proxy import errors
from proxy.metrics import RequestKind
from proxy.server.responses import Response, json_response

# Seconds after which a client may try again.
_RETRY_AFTER_BY_STATUS: Mapping[int, str] = {429: "5", 502: "10", 503: "10", 504: "10"}

# A manifest with one of these failed for a reason that lies behind the cache.
_UPSTREAM_FAILURES = (502, 503, 504)
_MAX_MESSAGE_LENGTH = 200
_CHALLENGE = 'Basic realm="pullcache"'


def oci_error_response(error: errors.ProxyError, kind: RequestKind = "other") -> Response:
    """Return the response to a request of `kind` that failed with `error`."""
    status, code, _, _ = errors.error_outcome(error)
    if kind == "blob" and status >= 500:
        # After a 5xx, docker stalls for a minute per blob; after a 404 it falls back at once.
        status, code = 404, "BLOB_UNKNOWN"
    elif kind == "blob" and isinstance(error, errors.UpstreamUnauthorizedError):
        code = "BLOB_UNKNOWN"
    response = error_response(status, code, str(error))
    if isinstance(error, errors.RateLimitedError | errors.PolicyUndecidedError):
        response.headers["Retry-After"] = f"{error.retry_after:.0f}"
    elif status in _RETRY_AFTER_BY_STATUS:
        response.headers["Retry-After"] = _RETRY_AFTER_BY_STATUS[status]
    if status == 401:
        response.headers["WWW-Authenticate"] = _CHALLENGE
    is_refusal = isinstance(error, errors.DeniedError | errors.PolicyUndecidedError)
    if is_refusal or (kind == "manifest" and status in _UPSTREAM_FAILURES):
        # containerd and docker ask by HEAD, whose answer has no body, and print the status line.
        response.reason = str(error)[:_MAX_MESSAGE_LENGTH]
    return response


def error_response(status: int, code: str, message: str) -> Response:
    """Return a response with one error of the specification."""
    document = {
        "errors": [{"code": code, "message": message[:_MAX_MESSAGE_LENGTH], "detail": None}]
    }
    headers = {"Cache-Status": "pullcache; fwd=miss" if status >= 404 else "pullcache; fwd=bypass"}
    return json_response(document, status=status, headers=headers)
