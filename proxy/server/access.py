"""What the configuration asks of clients: how many there may be, by which certificates they know us, who they are."""

import asyncio
from collections.abc import Callable, Sequence

from aiohttp import hdrs
from aiohttp.web import BaseRequest

from proxy.concurrency import started
from proxy.config import Address, ServerSettings
from proxy.errors import ConfigError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.server.connection_limit import Crowd
from proxy.server.tls import Certificates, Tls, load_certificates
from proxy.server.users import Passwords, Users, load_passwords

# What anybody may ask: who watches over the daemon has no login.
_OPEN = ("/healthz", "/readyz")

log = get_logger(__name__)


class Access:
    """Judges who connects and who asks. `prepare` takes new settings over while clients stay connected."""

    def __init__(
        self, settings: ServerSettings, group: asyncio.TaskGroup, metrics: Metrics
    ) -> None:
        """Read the files that `settings` name. Blocks; raises `ConfigError`."""
        certificates, passwords = _load(settings)
        # A thread of its own: the logins of strangers must not keep the disk's from clients.
        self._threads = started(1, "login")
        self._users = Users(passwords, self._threads, group)
        self.tls = Tls(certificates) if certificates else None
        metrics.certificates(certificates.expiries if certificates else {})
        self.crowd = Crowd(settings, metrics.connection_refused)
        metrics.watch_connections(lambda: self.crowd.connected)
        self._metrics = metrics
        self._settings = settings

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask, without a login."""
        return not self._users.are_asked

    def close(self) -> None:
        """Wait for the password that is being checked, if there is one."""
        self._threads.shutdown(cancel_futures=True)

    async def check(self, request: BaseRequest) -> None:
        """Raise `UnauthorizedError` or `CrowdedError` if the request needs a login and has no right one."""
        if self._users.are_asked and request.raw_path.partition("?")[0] not in _OPEN:
            given = request.headers.get(hdrs.AUTHORIZATION, "")
            await self._users.check(given, request.remote or "")

    def prepare(self, settings: ServerSettings) -> Callable[[], None]:
        """Check what `settings` name. What is returned puts it to use: it is called in the loop, and cannot fail.

        Blocks; raises `ConfigError`.
        """
        certificates, passwords = _load(settings)
        if (certificates is None) != (self.tls is None):
            raise ConfigError(
                "server.tls_certificate: http becomes https, or https http, by a restart"
            )

        def apply() -> None:
            if self.tls and certificates:
                self.tls.use(certificates)
                self._metrics.certificates(certificates.expiries)
            self._users.use(passwords)
            self.crowd.resize(settings)
            self._settings = settings

        return apply

    def tell_of_risks(self, addresses: Sequence[str]) -> None:
        """Say in the log what an operator who listens at `addresses` may not have meant."""
        settings = self._settings
        exposed = [one for one in addresses if not _is_near(one)]
        if exposed and not settings.htpasswd:
            log.warning(
                "open_to_other_machines",
                addresses=exposed,
                reason="whoever reaches them can pull what this cache can",
                help="keep strangers out, or set server.htpasswd",
            )
        if exposed and settings.htpasswd and not settings.tls_certificate:
            log.warning(
                "passwords_in_clear",
                addresses=exposed,
                help="set server.tls_certificate, unless something in front of the cache speaks TLS",
            )
        if addresses and self.crowd.total < settings.max_connections:
            log.warning(
                "few_open_files",
                connections=self.crowd.total,
                wanted=settings.max_connections,
                help="raise the limit on open files (LimitNOFILE=, ulimit -n)",
            )


def _is_near(address: str) -> bool:
    return address.startswith("unix:") or Address(address).is_loopback


def check_files(settings: ServerSettings) -> None:
    """Read the files that `settings` name. Blocks; raises `ConfigError`."""
    _load(settings)


def _load(settings: ServerSettings) -> tuple[Certificates | None, Passwords | None]:
    passwords = load_passwords(settings.htpasswd) if settings.htpasswd else None
    return load_certificates(settings), passwords
