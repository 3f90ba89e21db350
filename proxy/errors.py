"""The whole error tree.

The classes hold facts, not HTTP: one table, `OUTCOMES`, says what becomes of each at `/v2/`, at the
admin API and as the exit code of a command. A message says what happened and what helps, in at most
200 characters, because docker prints it as it is.
"""

from collections.abc import Mapping
from typing import NamedTuple


class ProxyError(Exception):
    """The root of everything pullcache raises on purpose."""


class ConfigError(ProxyError):
    """The configuration is wrong; the message names file, key path and reason."""


class InvalidReferenceError(ProxyError):
    """What the client named does not follow the grammar of the specification."""


class InvalidNameError(InvalidReferenceError):
    """A repository name is malformed."""


class InvalidTagError(InvalidReferenceError):
    """A tag is malformed."""


class InvalidDigestError(InvalidReferenceError):
    """A digest is malformed, or of an algorithm that cannot be verified here."""


class DeniedError(ProxyError):
    """The configuration forbids this repository or registry."""


class NotFoundError(ProxyError):
    """Upstream does not have it, or will not show it to anybody we can be."""


class UnknownNameError(NotFoundError):
    """The repository is not known."""


class UnknownManifestError(NotFoundError):
    """The manifest is not known."""


class UnknownBlobError(NotFoundError):
    """The blob is not known."""


class InvalidManifestError(ProxyError):
    """A document that should be a manifest is not one."""


class UpstreamError(ProxyError):
    """Upstream answered with something that no registry should answer."""


class RateLimitedError(UpstreamError):
    """Upstream refuses for now. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 60.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamUnavailableError(UpstreamError):
    """Upstream cannot be reached, is failing, or may not be asked (offline)."""


class OfflineError(UpstreamUnavailableError):
    """The configuration forbids to ask anybody."""


class UpstreamTimeoutError(UpstreamUnavailableError):
    """Upstream did not answer in time."""


class UpstreamDownError(UpstreamUnavailableError):
    """Upstream has failed so often that it is left alone for `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamUnauthorizedError(UpstreamError):
    """Upstream wants other credentials than the configured ones."""


class UnsatisfiableRangeError(UpstreamError):
    """Upstream has nothing at the offset that was asked for: what is here is not a part of it."""


class DigestMismatchError(ProxyError):
    """Bytes do not have the digest they were asked by."""


class BusyError(ProxyError):
    """Something that runs just now works with it."""


class FileUnreachableError(ProxyError):
    """The daemon cannot open a file that a command has open; it is to be sent."""


class BundleError(ProxyError):
    """A bundle is damaged, or is none that can be taken."""


class StorageError(ProxyError):
    """The disk failed."""


class StoreInUseError(StorageError):
    """Another process has the store's lock."""


class NoSpaceError(StorageError):
    """There is no room for this content, or none can be made."""


class InvalidRequestError(ProxyError):
    """A request to the admin API is not one; the message names the field."""


class UnauthorizedError(ProxyError):
    """The client has to say who it is: by its login, at the admin API by the token."""


class TooManyRequestsError(ProxyError):
    """Too many ask for the same at once."""


class DaemonUnavailableError(ProxyError):
    """No daemon answers on the store, or it ended in the midst of its answer."""


class ErrorOutcome(NamedTuple):
    """What becomes of an error: `status` and `code` at `/v2/`, `admin_status` at the admin API."""

    status: int
    code: str
    admin_status: int
    exit_code: int = 1


# A registry client retries what has a code it does not know as if it were a 5xx, so `code` is always
# one that the distribution specification registers, or UNKNOWN or UNAVAILABLE of Docker's.
OUTCOMES: Mapping[type[ProxyError], ErrorOutcome] = {
    ProxyError: ErrorOutcome(500, "UNKNOWN", 500),
    ConfigError: ErrorOutcome(500, "UNKNOWN", 500, 2),
    InvalidReferenceError: ErrorOutcome(400, "NAME_INVALID", 400, 2),
    InvalidNameError: ErrorOutcome(400, "NAME_INVALID", 400, 2),
    InvalidTagError: ErrorOutcome(400, "TAG_INVALID", 400, 2),
    InvalidDigestError: ErrorOutcome(400, "DIGEST_INVALID", 400, 2),
    DeniedError: ErrorOutcome(403, "DENIED", 403),
    NotFoundError: ErrorOutcome(404, "MANIFEST_UNKNOWN", 404),
    UnknownNameError: ErrorOutcome(404, "NAME_UNKNOWN", 404),
    UnknownManifestError: ErrorOutcome(404, "MANIFEST_UNKNOWN", 404),
    UnknownBlobError: ErrorOutcome(404, "BLOB_UNKNOWN", 404),
    InvalidManifestError: ErrorOutcome(502, "MANIFEST_INVALID", 500),
    UpstreamError: ErrorOutcome(502, "UNKNOWN", 502),
    RateLimitedError: ErrorOutcome(429, "TOOMANYREQUESTS", 429),
    UpstreamUnavailableError: ErrorOutcome(503, "UNAVAILABLE", 503),
    OfflineError: ErrorOutcome(503, "UNAVAILABLE", 503),
    UpstreamTimeoutError: ErrorOutcome(504, "UNAVAILABLE", 504),
    UpstreamDownError: ErrorOutcome(503, "UNAVAILABLE", 503),
    # Docker Hub says 401 of what does not exist; a client that is challenged sends its password.
    UpstreamUnauthorizedError: ErrorOutcome(404, "NAME_UNKNOWN", 502),
    UnsatisfiableRangeError: ErrorOutcome(502, "UNKNOWN", 502),
    DigestMismatchError: ErrorOutcome(502, "DIGEST_INVALID", 502, 3),
    BusyError: ErrorOutcome(503, "UNAVAILABLE", 409),
    FileUnreachableError: ErrorOutcome(400, "UNKNOWN", 400),
    BundleError: ErrorOutcome(400, "UNKNOWN", 400),
    StorageError: ErrorOutcome(500, "UNKNOWN", 500),
    StoreInUseError: ErrorOutcome(500, "UNKNOWN", 500),
    NoSpaceError: ErrorOutcome(500, "UNKNOWN", 507),
    InvalidRequestError: ErrorOutcome(400, "UNSUPPORTED", 400, 2),
    UnauthorizedError: ErrorOutcome(401, "UNAUTHORIZED", 401),
    TooManyRequestsError: ErrorOutcome(429, "TOOMANYREQUESTS", 429),
    DaemonUnavailableError: ErrorOutcome(500, "UNKNOWN", 500),
}


def error_outcome(error: ProxyError) -> ErrorOutcome:
    """Return what becomes of `error`: the row of its class, or of the nearest class above it."""
    return next(OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES)


def error_code(error: ProxyError) -> str:
    """Return the name of the error's class as the admin API spells it: `unknown_manifest`."""
    name = type(error).__name__.removesuffix("Error")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def error_from_code(code: str, message: str) -> ProxyError:
    """Return the error that `code_of` gave this code, or a plain `ProxyError` if there is none."""
    kinds: list[type[ProxyError]] = [ProxyError]
    for kind in kinds:  # grows while it is gone through
        error = kind(message)
        if error_code(error) == code:
            return error
        kinds += kind.__subclasses__()
    return ProxyError(message)
