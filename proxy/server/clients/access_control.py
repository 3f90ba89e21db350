"""Access control for clients, as configured: a limit on connections, TLS, and a login."""

import asyncio
from collections.abc import Callable, Sequence

from proxy.concurrency import start_threads
from proxy.config import Address, ServerSettings
from proxy.errors import ConfigError, DeniedError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.server.clients.address import Networks
from proxy.server.clients.connection_limit import ConnectionLimiter
from proxy.server.clients.proxied_connection import TrustedProxies
from proxy.server.clients.users import Htpasswd, HtpasswdAuth, load_htpasswd
from proxy.server.request import Request
from proxy.server.tls import Certificates, TlsContext, load_certificates

# Health checks need no login.
_ANONYMOUS_PATHS = ("/healthz", "/readyz")

log = get_logger(__name__)


class AccessControl:
    """The connection limit, the certificates and the users; a reload keeps clients connected."""

    def __init__(
        self, settings: ServerSettings, group: asyncio.TaskGroup, metrics: Metrics
    ) -> None:
        """Read the files that `settings` name. Blocks; raises `ConfigError`."""
        certificates, htpasswd = _load_files(settings)
        # A thread of its own, so that login attempts do not occupy the threads for the disk.
        self._threads = start_threads(1, "login")
        self._auth = HtpasswdAuth(htpasswd, self._threads, group)
        self.has_logins = self._auth.is_enabled
        self.tls = TlsContext(certificates) if certificates else None
        metrics.set_certificate_expiries(certificates.expiries if certificates else {})
        self._allowed = Networks(settings.allow_clients)
        self.proxies = TrustedProxies(settings.trusted_proxies)
        self.limiter = ConnectionLimiter(settings, metrics.count_rejected_connection)
        metrics.register_connections(lambda: self.limiter.connected)
        self._metrics = metrics
        self._settings = settings

    def needs_login(self, request: Request) -> bool:
        """Tell whether the request must pass `check`."""
        return self.has_logins and request.path not in _ANONYMOUS_PATHS

    def check_address(self, request: Request) -> None:
        """Raise `DeniedError` if the client's network is not allowed. Unix sockets are."""
        client = request.client
        if not self._allowed or client is None or client in self._allowed:
            return
        if request.path not in _ANONYMOUS_PATHS:
            raise DeniedError(f"this cache does not serve {client} (server.allow_clients)")

    def close(self) -> None:
        """Wait for a running password check."""
        self._threads.shutdown(cancel_futures=True)

    async def check(self, request: Request) -> str:
        """Return the user, or raise `UnauthorizedError` or `TooManyRequestsError`."""
        authorization = request.headers.get("authorization", "")
        return await self._auth.check(authorization, request.client or "")

    def prepare_reload(self, settings: ServerSettings) -> Callable[[], None]:
        """Read the files that `settings` name; return a function that applies the settings.

        Blocks; raises `ConfigError`. The function must be called in the loop and cannot fail.
        """
        certificates, htpasswd = _load_files(settings)
        if (certificates is None) != (self.tls is None):
            raise ConfigError(
                "server.tls_certificate: switching between http and https requires a restart"
            )

        def apply() -> None:
            if self.tls and certificates:
                self.tls.set_certificates(certificates)
                self._metrics.set_certificate_expiries(certificates.expiries)
            self._auth.set_htpasswd(htpasswd)
            self.has_logins = self._auth.is_enabled
            self.limiter.update_limits(settings)
            self._allowed = Networks(settings.allow_clients)
            self.proxies.update(settings.trusted_proxies)
            self._settings = settings

        return apply

    def log_risks(self, addresses: Sequence[str]) -> None:
        """Log a warning for each risk of listening on `addresses` that may be unintended."""
        settings = self._settings
        exposed = [address for address in addresses if not _is_local_address(address)]
        if exposed and not settings.htpasswd and not settings.allow_clients:
            log.warning(
                "listener_without_auth",
                addresses=exposed,
                reason="anyone who can reach these addresses can pull every image that this cache can",
                help="restrict access with a firewall, or set server.htpasswd",
            )
        if exposed and settings.htpasswd and not settings.tls_certificate:
            log.warning(
                "listener_without_tls",
                addresses=exposed,
                help="set server.tls_certificate, unless a reverse proxy terminates TLS",
            )
        is_wanted = settings.max_connections != ServerSettings().max_connections
        if addresses and is_wanted and self.limiter.max_connections < settings.max_connections:
            log.warning(
                "file_limit_too_low",
                limit=self.limiter.max_connections,
                configured=settings.max_connections,
                help="raise the limit on open files (LimitNOFILE=, ulimit -n)",
            )


def _is_local_address(address: str) -> bool:
    return address.startswith("unix:") or Address(address).is_loopback


def check_files(settings: ServerSettings) -> None:
    """Read the files that `settings` name. Blocks; raises `ConfigError`."""
    _load_files(settings)


def _load_files(settings: ServerSettings) -> tuple[Certificates | None, Htpasswd | None]:
    htpasswd = load_htpasswd(settings.htpasswd) if settings.htpasswd else None
    return load_certificates(settings), htpasswd
