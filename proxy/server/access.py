"""What the configuration asks of clients: how many there may be, by which certificates they know us, who they are."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import hdrs
from aiohttp.web import BaseRequest

from proxy.config import ServerSettings
from proxy.errors import ConfigError
from proxy.flight import in_thread
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.server.crowd import Crowd
from proxy.server.tls import Certificates, Tls, load_certificates
from proxy.server.users import Passwords, Users, load_passwords

# What anybody may ask: who watches over the daemon has no login.
_OPEN = ("/healthz", "/readyz")

log = get_logger(__name__)


class Access:
    """Judges who connects and who asks. `reload` takes new settings over while clients stay connected."""

    def __init__(
        self, settings: ServerSettings, group: asyncio.TaskGroup, metrics: Metrics
    ) -> None:
        """Read the files that `settings` name. Blocks; raises `ConfigError`."""
        certificates, passwords = _load(settings)
        # A thread of its own: the logins of strangers must not keep the disk's from clients.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="login")
        self._users = Users(passwords, self._threads, group)
        self.tls = Tls(certificates) if certificates else None
        self.crowd = Crowd(settings, metrics.connection_refused)
        metrics.watch_connections(lambda: self.crowd.connected)
        _tell_of_risks(settings, self.crowd)

    def close(self) -> None:
        """Wait for the password that is being checked, if there is one."""
        self._threads.shutdown(cancel_futures=True)

    async def check(self, request: BaseRequest) -> None:
        """Raise `UnauthorizedError` or `CrowdedError` if the request needs a login and has no right one."""
        if self._users.are_asked and request.raw_path.partition("?")[0] not in _OPEN:
            given = request.headers.get(hdrs.AUTHORIZATION, "")
            await self._users.check(given, request.remote or "")

    async def reload(self, settings: ServerSettings) -> None:
        """Take over certificates, users and limits. Raises `ConfigError`, and then nothing has changed."""
        apply = await in_thread(self._threads, self.prepare, settings)
        apply()

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
            self._users.use(passwords)
            self.crowd.resize(settings)

        return apply


def check_files(settings: ServerSettings) -> None:
    """Read the files that `settings` name. Blocks; raises `ConfigError`."""
    _load(settings)


def _load(settings: ServerSettings) -> tuple[Certificates | None, Passwords | None]:
    passwords = load_passwords(settings.htpasswd) if settings.htpasswd else None
    return load_certificates(settings), passwords


def _tell_of_risks(settings: ServerSettings, crowd: Crowd) -> None:
    """Say in the log what an operator may not have meant."""
    exposed = [str(address) for address in settings.listen if not address.is_loopback]
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
    if settings.listen and crowd.total < settings.max_connections:
        log.warning(
            "few_open_files",
            connections=crowd.total,
            wanted=settings.max_connections,
            help="raise the limit on open files (LimitNOFILE=, ulimit -n)",
        )
