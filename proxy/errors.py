"""The errors that the program raises on purpose.

The classes know nothing of HTTP: the table `OUTCOMES` maps each to a status at `/v2/`, a status of
the admin API and the exit code of a command. A message says what happened and what to do, in at
most 200 characters, because docker prints it unchanged.
"""

from collections.abc import Mapping
from typing import NamedTuple


class ProxyError(Exception):
    """Base of all errors that pullcache raises on purpose."""


class ConfigError(ProxyError):
    """The configuration is invalid; the message names file, key path and reason."""


class AddressUnavailableError(ProxyError):
    """An address to listen on is in use, or does not belong to this machine."""


class InvalidReferenceError(ProxyError):
    """A name, tag or digest does not match the grammar of the specification."""


class InvalidNameError(InvalidReferenceError):
    """A repository name is malformed."""


class InvalidTagError(InvalidReferenceError):
    """A tag is malformed."""


class InvalidDigestError(InvalidReferenceError):
    """A digest is malformed, or its algorithm is not supported."""


class DeniedError(ProxyError):
    """The configuration forbids this repository or registry."""


class PolicyDeniedError(DeniedError):
    """A policy refuses the image, or only until the Unix time `ripe_at` if it is too young."""

    def __init__(self, message: str, *, ripe_at: float | None = None) -> None:
        super().__init__(message)
        self.ripe_at = ripe_at


class PolicyUndecidedError(ProxyError):
    """A policy cannot decide now, because a fact cannot be had; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 60.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFoundError(ProxyError):
    """Upstream does not have the content, or denies it with the configured credentials."""


class UnknownNameError(NotFoundError):
    """The repository does not exist."""


class UnknownManifestError(NotFoundError):
    """The manifest or tag does not exist."""


class NoReferrersApiError(UnknownManifestError):
    """Upstream has no referrers API; clients then ask for the fallback tag."""


class UnknownBlobError(NotFoundError):
    """The blob does not exist in the repository."""


class InvalidManifestError(ProxyError):
    """A document is not a valid manifest, index or config."""


class UpstreamError(ProxyError):
    """Upstream failed, or sent a response that violates the specification."""


class RateLimitedError(UpstreamError):
    """Upstream limits the rate of requests; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 60.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamUnavailableError(UpstreamError):
    """Upstream cannot be reached, is failing, or must not be asked (offline)."""


class OfflineError(UpstreamUnavailableError):
    """The cache is offline: no upstream may be asked."""


class UpstreamUnreachableError(UpstreamUnavailableError):
    """No connection to upstream can be established."""


class UpstreamTimeoutError(UpstreamUnavailableError):
    """Upstream did not respond in time."""


class UpstreamDownError(UpstreamUnavailableError):
    """Upstream has failed repeatedly and is not asked for `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LoopDetectedError(UpstreamError):
    """A request has come back: caches name each other as upstream or mirror."""


class NoDescriptorsError(UpstreamError):
    """No descriptor is left for a connection to upstream."""


class UpstreamUnauthorizedError(UpstreamError):
    """Upstream rejects the configured credentials, or requires some."""

    rejects_credentials = False


class UpstreamForbiddenError(UpstreamUnauthorizedError):
    """Upstream refuses a request that is authenticated as well as it can be."""


class UpstreamRefusedError(UpstreamError):
    """Upstream answers with an error status that a retry does not change."""


class UnsatisfiableRangeError(UpstreamError):
    """Upstream has no bytes at the offset where a partial download should be resumed."""


class DigestMismatchError(ProxyError):
    """Content does not match the digest by which it was requested."""


class BusyError(ProxyError):
    """A running operation is using the image."""


class FileUnreachableError(ProxyError):
    """The daemon cannot open a file of the client, which must upload it instead."""


class BundleError(ProxyError):
    """A bundle is damaged, or its format is not supported."""


class ContentsError(ProxyError):
    """What is in an image cannot be read."""


class LayerError(ContentsError):
    """A layer is damaged, or larger than what is read."""


class StorageError(ProxyError):
    """Reading or writing the store failed."""


class StoreInUseError(StorageError):
    """Another process holds the lock of the store."""


class StoreNotFoundError(StorageError):
    """A command that only uses a store was started on a directory that holds none."""


class NoSpaceError(StorageError):
    """The store has no space for the content, and none can be freed."""


class InvalidRequestError(ProxyError):
    """A request to the admin API is invalid; the message names the field."""


class UnauthorizedError(ProxyError):
    """The client must authenticate, by its login or, for the admin API, by the token."""


class TooManyRequestsError(ProxyError):
    """Too many concurrent requests for a limited resource."""


class DaemonUnavailableError(ProxyError):
    """No daemon runs on the store, or it stopped before the end of its response."""


# While upstream raises these, nothing can be requested from it.
UNREACHABLE_ERRORS = (OfflineError, UpstreamDownError, UpstreamUnreachableError)


class ErrorOutcome(NamedTuple):
    """The outcome of an error: `status` and `code` at `/v2/`, `admin_status` at the admin API."""

    status: int
    code: str
    admin_status: int
    exit_code: int = 1


# Registry clients retry an error with an unknown code as if it were a 5xx, so `code` is always one
# from the distribution specification, or Docker's UNKNOWN or UNAVAILABLE.
OUTCOMES: Mapping[type[ProxyError], ErrorOutcome] = {
    ProxyError: ErrorOutcome(500, "UNKNOWN", 500),
    ConfigError: ErrorOutcome(500, "UNKNOWN", 500, 2),
    AddressUnavailableError: ErrorOutcome(500, "UNKNOWN", 500),
    InvalidReferenceError: ErrorOutcome(400, "NAME_INVALID", 400, 2),
    InvalidNameError: ErrorOutcome(400, "NAME_INVALID", 400, 2),
    InvalidTagError: ErrorOutcome(400, "TAG_INVALID", 400, 2),
    InvalidDigestError: ErrorOutcome(400, "DIGEST_INVALID", 400, 2),
    DeniedError: ErrorOutcome(403, "DENIED", 403),
    PolicyDeniedError: ErrorOutcome(403, "DENIED", 403),
    PolicyUndecidedError: ErrorOutcome(503, "UNAVAILABLE", 503),
    NotFoundError: ErrorOutcome(404, "MANIFEST_UNKNOWN", 404),
    UnknownNameError: ErrorOutcome(404, "NAME_UNKNOWN", 404),
    UnknownManifestError: ErrorOutcome(404, "MANIFEST_UNKNOWN", 404),
    NoReferrersApiError: ErrorOutcome(404, "MANIFEST_UNKNOWN", 404),
    UnknownBlobError: ErrorOutcome(404, "BLOB_UNKNOWN", 404),
    InvalidManifestError: ErrorOutcome(502, "MANIFEST_INVALID", 500),
    UpstreamError: ErrorOutcome(502, "UNKNOWN", 502),
    RateLimitedError: ErrorOutcome(429, "TOOMANYREQUESTS", 429),
    UpstreamUnavailableError: ErrorOutcome(503, "UNAVAILABLE", 503),
    OfflineError: ErrorOutcome(503, "UNAVAILABLE", 503),
    UpstreamUnreachableError: ErrorOutcome(503, "UNAVAILABLE", 503),
    UpstreamTimeoutError: ErrorOutcome(504, "UNAVAILABLE", 504),
    UpstreamDownError: ErrorOutcome(503, "UNAVAILABLE", 503),
    LoopDetectedError: ErrorOutcome(508, "UNKNOWN", 502),
    NoDescriptorsError: ErrorOutcome(429, "TOOMANYREQUESTS", 503),
    # Docker Hub answers 401 for repositories that do not exist; a challenged client sends its
    # password.
    UpstreamUnauthorizedError: ErrorOutcome(404, "NAME_UNKNOWN", 502),
    UpstreamForbiddenError: ErrorOutcome(404, "NAME_UNKNOWN", 502),
    UpstreamRefusedError: ErrorOutcome(502, "UNKNOWN", 502),
    UnsatisfiableRangeError: ErrorOutcome(502, "UNKNOWN", 502),
    DigestMismatchError: ErrorOutcome(502, "DIGEST_INVALID", 502, 3),
    BusyError: ErrorOutcome(503, "UNAVAILABLE", 409),
    FileUnreachableError: ErrorOutcome(400, "UNKNOWN", 400),
    BundleError: ErrorOutcome(400, "UNKNOWN", 400),
    ContentsError: ErrorOutcome(500, "UNKNOWN", 500),
    LayerError: ErrorOutcome(500, "UNKNOWN", 500),
    StorageError: ErrorOutcome(500, "UNKNOWN", 500),
    StoreInUseError: ErrorOutcome(500, "UNKNOWN", 500),
    StoreNotFoundError: ErrorOutcome(500, "UNKNOWN", 500, 2),
    NoSpaceError: ErrorOutcome(500, "UNKNOWN", 507),
    InvalidRequestError: ErrorOutcome(400, "UNSUPPORTED", 400, 2),
    UnauthorizedError: ErrorOutcome(401, "UNAUTHORIZED", 401),
    TooManyRequestsError: ErrorOutcome(429, "TOOMANYREQUESTS", 429),
    DaemonUnavailableError: ErrorOutcome(500, "UNKNOWN", 500),
}


def error_outcome(error: ProxyError) -> ErrorOutcome:
    """Return the outcome of `error`: the row of its class, or of its nearest base class."""
    return next(OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES)


def error_code(error: ProxyError) -> str:
    """Return the admin API's code for an error: its class name, as in `unknown_manifest`."""
    name = type(error).__name__.removesuffix("Error")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def error_from_code(code: str, message: str) -> ProxyError:
    """Return an error of the class that `error_code` maps to `code`; `ProxyError` if unknown."""
    classes: list[type[ProxyError]] = [ProxyError]
    for error_class in classes:  # grows during the iteration
        error = error_class(message)
        if error_code(error) == code:
            return error
        classes += error_class.__subclasses__()
    return ProxyError(message)
