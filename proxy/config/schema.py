"""The sections and keys of the configuration: their types, defaults and descriptions."""

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct, field

from proxy.config.rates import RateSchedule
from proxy.config.values import (
    Address,
    Duration,
    FleetName,
    InheritedDuration,
    InheritedShare,
    InternalLocation,
    Network,
    OptionalDuration,
    OptionalUrl,
    PositiveDuration,
    ProxyUrl,
    RegistryUrl,
    Secret,
    Size,
    StoreLimit,
    ValkeyUrl,
    WebhookUrl,
    expand_path,
    is_loopback,
)
from proxy.errors import ConfigError, InvalidReferenceError
from proxy.globs import can_match_with_prefix, covers
from proxy.oci.platform import parse_platform
from proxy.oci.reference import parse_image

DEFAULT_UPSTREAM = "docker.io"
DOCKER_HUB_URL = RegistryUrl("https://registry-1.docker.io")
# Docker Hub has a separate host for searching.
DOCKER_HUB_SEARCH_URL = OptionalUrl("https://index.docker.io")
# Another one says who publishes a repository.
DOCKER_HUB_FACTS_URL = OptionalUrl("https://hub.docker.com")

# URLs of registries that are known by name: their tables need no url.
KNOWN_REGISTRIES = {
    DEFAULT_UPSTREAM: DOCKER_HUB_URL,
    "gcr.io": RegistryUrl("https://gcr.io"),
    "ghcr.io": RegistryUrl("https://ghcr.io"),
    "mcr.microsoft.com": RegistryUrl("https://mcr.microsoft.com"),
    "public.ecr.aws": RegistryUrl("https://public.ecr.aws"),
    "quay.io": RegistryUrl("https://quay.io"),
    "registry.k8s.io": RegistryUrl("https://registry.k8s.io"),
}

# Keys that had another name in an earlier version, by path: an error names the new one.
RENAMED_KEYS = {"fetch.parallel_below": "fetch.parallel_max_rate"}

LogLevel = Literal["debug", "info", "warning", "error"]
AdminRole = Literal["read", "operate"]
PrefetchMode = Literal["layers", "off"]
PolicyMode = Literal["audit", "enforce"]
TrustedBadge = Literal["official", "verified_publisher", "sponsored"]
LogFormat = Literal["auto", "json", "console"]


_TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# The token of `server.admin_token_file` has no name of its own.
_OLD_TOKEN_NAME = "admin_token_file"  # noqa: S105 (a key of the configuration)


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file."""


class AdminTokenSettings(Section, frozen=True):
    """A token for the admin API on TCP."""

    name: Annotated[
        str,
        Meta(description="Name of the token, under which the log shows what was done with it."),
    ]
    file: Annotated[str, Meta(description="File with the token, one line of ASCII text.")]
    role: Annotated[
        AdminRole,
        Meta(
            description=(
                'What it permits: "read" for requests that change nothing, or "operate" for all.'
            )
        ),
    ] = "read"

    def __post_init__(self) -> None:
        if not _TOKEN_NAME.fullmatch(self.name):
            raise ValueError(
                f'{self.name[:100]!r} is not a name (write 1 to 64 letters, digits or "._-")'
            )
        if not self.file:
            raise ValueError("file is empty (write the path of a file with the token)")


class AdminToken(NamedTuple):
    """A token that was read from its file."""

    name: str
    secret: str
    role: AdminRole


class ServerSettings(Section, frozen=True):
    """Listeners for clients."""

    listen: Annotated[
        tuple[Address, ...],
        Meta(
            description=(
                'Addresses to listen on; "[::]:5000" means all addresses, port 0 any free port.'
            ),
            min_length=1,
        ),
    ] = (Address("127.0.0.1:5000"),)
    tls_certificate: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "PEM certificate chains; enables HTTPS. SNI selects the certificate; the "
                "first one is the default."
            )
        ),
    ] = ()
    tls_key: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "Private key files, in the same order; empty if each certificate file "
                "contains its key."
            )
        ),
    ] = ()
    htpasswd: Annotated[
        str,
        Meta(
            description=(
                "File of users and bcrypt hashes (htpasswd -B); requires clients to log in. "
                "Reread on change. docker's registry-mirrors cannot log in."
            )
        ),
    ] = ""
    max_connections: Annotated[
        int,
        Meta(description="Maximum client connections; further ones get 429.", ge=1),
    ] = 8192
    max_connections_per_client: Annotated[
        int,
        Meta(
            description=(
                "Maximum connections per client address (IPv6: per /64); behind a proxy that is "
                "not in trusted_proxies all clients share one address."
            ),
            ge=1,
        ),
    ] = 2048
    allow_clients: Annotated[
        tuple[Network, ...],
        Meta(
            description=(
                "Networks of clients that are served, others get 403; empty: everyone is served."
            )
        ),
    ] = ()
    trusted_proxies: Annotated[
        tuple[Network, ...],
        Meta(
            description=(
                "Networks of proxies and load balancers whose PROXY protocol, X-Forwarded-For and "
                "Forwarded are believed."
            )
        ),
    ] = ()
    accel_redirect: Annotated[
        InternalLocation,
        Meta(
            description=(
                "Path of the internal location in which nginx has the store's blobs; nginx then "
                "sends stored blobs itself (X-Accel-Redirect). Needs trusted_proxies; empty: never."
            )
        ),
    ] = InternalLocation("")
    admin_listen: Annotated[
        tuple[Address, ...],
        Meta(description="TCP addresses of the admin API, in addition to admin.sock in the store."),
    ] = ()
    admin_token_file: Annotated[
        str,
        Meta(
            description=(
                "File with the bearer token for the admin API on TCP; required unless it "
                "listens on loopback only, or there are admin_tokens. It permits everything."
            )
        ),
    ] = ""
    admin_tokens: Annotated[
        tuple[AdminTokenSettings, ...],
        Meta(description="Further tokens for the admin API on TCP, by name and role."),
    ] = ()
    admin_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "Names under which `/metrics` and the pages may be requested on admin_listen, in "
                "addition to IP addresses, localhost and the names in admin_listen."
            )
        ),
    ] = ()
    pages: Annotated[
        bool,
        Meta(description="Serve pages for browsers on admin_listen, and for `pullcache ui`."),
    ] = True
    pages_anonymous_read: Annotated[
        bool,
        Meta(
            description=(
                "Show the pages on admin_listen without a login; changes need the token still."
            )
        ),
    ] = False
    registry_proxy_metrics: Annotated[
        bool,
        Meta(
            description=(
                "Also export distribution's registry_proxy_* metrics, for existing dashboards."
            )
        ),
    ] = False
    tracing: Annotated[
        bool,
        Meta(
            description=(
                "Export OpenTelemetry traces of client requests over OTLP/HTTP, configured "
                "by the OTEL_* variables; needs pullcache[opentelemetry]."
            )
        ),
    ] = False
    shutdown_timeout: Annotated[
        Duration,
        Meta(
            description=(
                "How long shutdown waits for running responses; a second signal stops at once."
            )
        ),
    ] = Duration.parse("8s")

    def __post_init__(self) -> None:
        if self.tls_key and len(self.tls_key) != len(self.tls_certificate):
            raise ValueError("tls_certificate and tls_key must list the same number of files")
        if self.accel_redirect and not self.trusted_proxies:
            raise ValueError("accel_redirect needs trusted_proxies (name nginx's address there)")
        exposed = [address for address in self.admin_listen if not address.is_loopback]
        if exposed and not self.admin_token_file and not self.admin_tokens:
            raise ValueError(
                f"admin_listen: {exposed[0]} is open to other machines (set "
                "admin_token_file, or listen on 127.0.0.1)"
            )
        names = [token.name for token in self.admin_tokens]
        if repeated := [name for name in names if names.count(name) > 1 or name == _OLD_TOKEN_NAME]:
            raise ValueError(f"admin_tokens: the name {repeated[0]!r} is taken (choose another)")

    def read_admin_tokens(self) -> list[AdminToken]:
        """Return the tokens of the admin API. Blocking. Raises `ConfigError`."""
        tokens = []
        if self.admin_token_file:
            secret = _read_token(self.admin_token_file, _OLD_TOKEN_NAME)
            tokens.append(AdminToken(_OLD_TOKEN_NAME, secret, "operate"))
        for settings in self.admin_tokens:
            secret = _read_token(settings.file, f"admin_tokens: {settings.name}")
            if same := [token.name for token in tokens if token.secret == secret]:
                raise ConfigError(
                    f"{settings.file}: admin_tokens: {settings.name}: is the token of {same[0]} too "
                    "(write another into one of the files)"
                )
            tokens.append(AdminToken(settings.name, secret, settings.role))
        return tokens


def _read_token(file: str, key: str) -> str:
    try:
        token = expand_path(file).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not ASCII text"
        raise ConfigError(f"{file}: {key}: {reason}") from error
    if not token:
        raise ConfigError(f"{file}: {key}: is empty (write a token into it)")
    return token


class LogSettings(Section, frozen=True):
    """Logging to stderr."""

    level: Annotated[LogLevel, Meta(description="Minimum severity to log.")] = "info"
    format: Annotated[
        LogFormat,
        Meta(description='"json", "console", or "auto": console on a terminal, else JSON.'),
    ] = "auto"


class StatisticsSettings(Section, frozen=True):
    """Totals of what clients pull."""

    clients: Annotated[bool, Meta(description="Keep totals by client address, for a month.")] = True


class NotifySettings(Section, frozen=True):
    """The webhook, which posts what an operator should know."""

    url: Annotated[
        WebhookUrl, Meta(description="URL that events are posted to; empty sends none.")
    ] = WebhookUrl("")
    key_file: Annotated[
        str,
        Meta(description="File with the key that signs events (HMAC-SHA256); read for each event."),
    ] = ""

    def __post_init__(self) -> None:
        if self.key_file and not self.url:
            raise ValueError("key_file is set and url is not (set url, or remove key_file)")

    def read_key(self) -> bytes:
        """Return the key, without a line break at its end; empty if events are not signed.

        Blocking. Raises `ConfigError`.
        """
        if not self.key_file:
            return b""
        try:
            key = expand_path(self.key_file).read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise ConfigError(f"notify.key_file: {self.key_file}: {error.strerror}") from error
        if not key:
            raise ConfigError(f"notify.key_file: {self.key_file} is empty (write a key into it)")
        return key


class StoreSettings(Section, frozen=True):
    """Location and size of the store."""

    path: Annotated[
        Path,
        Meta(
            description="The directory of the store. `$XDG_CACHE_HOME/pullcache` (or "
            "`~/.cache/pullcache`) when no file is given and the user is not root."
        ),
    ] = Path("/var/cache/pullcache")
    max_size: Annotated[
        StoreLimit,
        Meta(
            description=(
                'Maximum size of the store, never exceeded; or a share of the file system, "80%".'
            )
        ),
    ] = StoreLimit("50GB")
    min_free: Annotated[
        Size, Meta(description="Free space to keep on the file system, regardless of max_size.")
    ] = Size.parse("1GB")
    max_idle: Annotated[
        Duration,
        Meta(description="Evict blobs that were not used for this long; 0s disables this."),
    ] = Duration.parse("0s")
    scrub: Annotated[
        OptionalDuration,
        Meta(
            description='Read every blob once in this time, to find damaged ones; "off" disables.'
        ),
    ] = OptionalDuration.parse("30d")
    group_access: Annotated[
        bool,
        Meta(
            description=(
                "Let the group of the store read its blobs, and nothing else in it, as nginx must "
                "for server.accel_redirect."
            )
        ),
    ] = False


class ManifestsSettings(Section, frozen=True):
    """Freshness of tags."""

    ttl: Annotated[
        Duration, Meta(description="How long a cached tag is fresh before it is revalidated.")
    ] = Duration.parse("10m")
    negative_ttl: Annotated[
        Duration, Meta(description="How long to remember that upstream does not have a tag.")
    ] = Duration.parse("30s")
    stale_if_error: Annotated[
        Duration,
        Meta(description="How long after its TTL a stale tag is served while upstream fails."),
    ] = Duration.parse("30d")
    stale_while_revalidate: Annotated[
        Duration,
        Meta(
            description=(
                "How long after its TTL a stale tag is served while it is revalidated in "
                "the background."
            )
        ),
    ] = Duration.parse("0s")
    tag_ttl: Annotated[
        dict[str, Duration],
        Meta(
            description=(
                "TTLs by tag glob; the first match overrides ttl. Setting this table "
                "replaces the default."
            )
        ),
    ] = field(default_factory=lambda: {"latest": Duration.parse("1m")})


class FetchSettings(Section, frozen=True):
    """Downloads from upstream."""

    prefetch: Annotated[
        PrefetchMode,
        Meta(
            description=(
                '"layers": pulling a manifest starts downloads of its config and layers; '
                '"off": they are downloaded on request.'
            )
        ),
    ] = "layers"
    parallel_above: Annotated[
        Size,
        Meta(description="Use several connections for blobs larger than this."),
    ] = Size.parse("16MB")
    parallel_max_rate: Annotated[
        Size,
        Meta(
            description=(
                "Use one connection if it reaches this rate, in bytes a second; 0B always uses one."
            )
        ),
    ] = Size.parse("64MB")
    connections_per_blob: Annotated[
        int,
        Meta(
            description="Maximum connections per blob; 1 disables parallel fetching.", ge=1, le=16
        ),
    ] = 4
    max_downloads: Annotated[
        int, Meta(description="Maximum concurrent downloads from each upstream.", ge=1, le=1000)
    ] = 16
    max_waiting_per_client: Annotated[
        int,
        Meta(
            description=(
                "Maximum waiting downloads that only one client address has requested; "
                "further requests get 429."
            ),
            ge=1,
            le=10_000,
        ),
    ] = 64
    memory_per_download: Annotated[
        Size,
        Meta(description="Memory for the bytes of one download that are not on disk yet."),
    ] = Size.parse("16MiB")
    memory: Annotated[
        Size,
        Meta(description="Memory for the bytes of all downloads that are not on disk yet."),
    ] = Size.parse("128MiB")
    connect_timeout: Annotated[
        PositiveDuration, Meta(description="Timeout for connecting to upstream.")
    ] = PositiveDuration.parse("10s")
    stall_timeout: Annotated[
        PositiveDuration,
        Meta(description=("How long upstream may send nothing; a download has no total timeout.")),
    ] = PositiveDuration.parse("30s")
    max_rate: Annotated[
        RateSchedule,
        Meta(
            description=(
                'Maximum rate of all downloads together, "200Mbit" or "25MB" a second; or a list of '
                'times of day with rates; "off" for none.'
            )
        ),
    ] = RateSchedule.parse("off")
    min_rate: Annotated[
        Size,
        Meta(
            description=(
                "Minimum rate in bytes a second over twice stall_timeout; slower transfers "
                "count as stalled; 0B disables the check."
            )
        ),
    ] = Size.parse("1KiB")
    attempts: Annotated[
        int,
        Meta(
            description="Attempts before a request fails; progress resets the count.", ge=1, le=100
        ),
    ] = 5
    ingest_ttl: Annotated[
        Duration, Meta(description="How long to keep a partial download for resuming.")
    ] = Duration.parse("1d")


class ContentsSettings(Section, frozen=True):
    """Packages in images."""

    scan: Annotated[
        Literal["asked", "off"],
        Meta(
            description=(
                'Read the packages of a stored image when somebody asks for them; or "off": never, '
                "only what was read before is shown."
            )
        ),
    ] = "asked"
    scanner: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "Command of a scanner for vulnerabilities, which prints trivy's or grype's JSON or "
                "CycloneDX; {image} is the image in this cache, {cache} its address."
            )
        ),
    ] = ()
    scanner_timeout: Annotated[
        PositiveDuration, Meta(description="How long the scanner may take for one image.")
    ] = PositiveDuration.parse("10m")
    scan_every: Annotated[
        OptionalDuration,
        Meta(description='Scan all stored images at this interval; "off" for only on demand.'),
    ] = OptionalDuration.parse("off")

    def __post_init__(self) -> None:
        if self.scanner and not any("{image}" in part for part in self.scanner):
            raise ValueError('scanner names no image (write "{image}" as one of its arguments)')
        if self.scan_every and not self.scanner:
            raise ValueError("scan_every needs a scanner (set scanner to its command)")


class FleetSettings(Section, frozen=True):
    """Several nodes that fetch each blob from upstream once."""

    valkey: Annotated[
        ValkeyUrl,
        Meta(
            description=(
                'The Valkey or Redis server of the fleet, "valkey://host:6379/0"; empty: no fleet.'
            )
        ),
    ] = ValkeyUrl("")
    valkey_password_file: Annotated[
        str, Meta(description="File with the password of the server; read at each connection.")
    ] = ""
    valkey_ca_file: Annotated[
        str, Meta(description="Additional PEM CA certificates to trust for valkeys://.")
    ] = ""
    name: Annotated[
        FleetName,
        Meta(description="Name of the fleet, the prefix of all keys in the server."),
    ] = FleetName("pullcache")
    address: Annotated[
        OptionalUrl,
        Meta(
            description='URL at which the other nodes reach this one, "http://10.0.0.7:5000"; needed.'
        ),
    ] = OptionalUrl("")
    token_file: Annotated[
        str,
        Meta(
            description=(
                "File with the secret by which nodes recognise each other; needed unless address is "
                "on loopback."
            )
        ),
    ] = ""
    ca_file: Annotated[
        str,
        Meta(description="Additional PEM CA certificates to trust for the addresses of nodes."),
    ] = ""
    children: Annotated[
        int, Meta(description="How many nodes a node sends the same blob at a time.", ge=1, le=64)
    ] = 4
    heartbeat: Annotated[
        PositiveDuration,
        Meta(description="How often a node reports; one that is silent for three times is gone."),
    ] = PositiveDuration.parse("2s")
    stall_timeout: Annotated[
        PositiveDuration,
        Meta(description="How long another node may send nothing before the next one is asked."),
    ] = PositiveDuration.parse("4s")
    answer_timeout: Annotated[
        PositiveDuration,
        Meta(description="How long the server may take for an answer before the node works alone."),
    ] = PositiveDuration.parse("500ms")

    def __post_init__(self) -> None:
        if not self.valkey:
            if self.address or self.token_file:
                raise ValueError(
                    'valkey is not set (write "valkey://host:6379/0", or remove address and token_file)'
                )
            return
        if not self.address:
            raise ValueError('address is not set (write "http://10.0.0.7:5000")')
        host = self.address.host
        if host in {"0.0.0.0", "::"}:  # noqa: S104 (it is refused)
            raise ValueError(
                f"address: no other node can connect to {host} (write the address of this machine)"
            )
        if is_loopback(host):
            if any(not is_loopback(name) for name, _ in self.valkey.hosts):
                raise ValueError(
                    f"address: {self.address} leads each node to itself (write the address of this "
                    "machine)"
                )
        elif not self.token_file:
            raise ValueError(
                "token_file is not set (write the same secret into a file on all nodes)"
            )

    @property
    def is_on(self) -> bool:
        """Whether this node belongs to a fleet."""
        return bool(self.valkey)

    def read_token(self) -> str:
        """Return the secret of the fleet; empty if there is none. Blocking. Raises `ConfigError`."""
        return _read_token(self.token_file, "fleet.token_file") if self.token_file else ""


class UpstreamSettings(Section, frozen=True):
    """An upstream registry. The table's name is the registry's name in image references."""

    url: Annotated[
        RegistryUrl,
        Meta(
            description=(
                "Registry URL, http(s)://host[:port] without a path. Optional for "
                "docker.io, gcr.io, ghcr.io, mcr.microsoft.com, public.ecr.aws, quay.io and "
                "registry.k8s.io."
            )
        ),
    ]
    mirrors: Annotated[
        tuple[RegistryUrl, ...],
        Meta(
            description=(
                "Mirror URLs to try first, in order, without the credentials of this upstream."
            )
        ),
    ] = ()
    username: Annotated[str, Meta(description="User name; empty for anonymous pulls.")] = ""
    password: Annotated[Secret, Meta(description="Password or token; prefer password_file.")] = (
        Secret("")
    )
    password_file: Annotated[str, Meta(description="File with the password; read at each use.")] = (
        ""
    )
    credential_helper: Annotated[
        str,
        Meta(description='Docker credential helper: "pass" runs docker-credential-pass.'),
    ] = ""
    docker_config: Annotated[
        str, Meta(description="Docker config.json with the credentials or a credential helper.")
    ] = ""
    search_url: Annotated[
        OptionalUrl,
        Meta(
            description=(
                "Registry for `docker search` (/v1/search). Defaults to "
                "https://index.docker.io for docker.io, or to url if that is changed; other "
                "upstreams search the store."
            )
        ),
    ] = OptionalUrl("")
    facts_url: Annotated[
        OptionalUrl,
        Meta(
            description=(
                "Docker Hub's own API, which says who publishes a repository and when a tag was "
                "pushed. https://hub.docker.com for docker.io, unless url is changed; empty asks "
                "nothing."
            )
        ),
    ] = OptionalUrl("")
    hosts: Annotated[
        tuple[str, ...], Meta(description="Host headers that select this upstream.")
    ] = ()
    ca_file: Annotated[
        str, Meta(description="Additional PEM CA certificates to trust for this upstream.")
    ] = ""
    proxy: Annotated[
        ProxyUrl,
        Meta(
            description=(
                "HTTP proxy, http://[user:password@]host:port; empty uses HTTP_PROXY and "
                "HTTPS_PROXY."
            )
        ),
    ] = ProxyUrl("")
    allow: Annotated[tuple[str, ...], Meta(description="Globs of allowed repositories.")] = ("*",)
    deny: Annotated[
        tuple[str, ...],
        Meta(description="Globs of denied repositories; overrides allow."),
    ] = ()

    def __post_init__(self) -> None:
        if self.password and self.password_file:
            raise ValueError("password and password_file are both set (keep one)")
        if bool(self.username) != bool(self.password or self.password_file):
            raise ValueError(
                "username and password must be set together (set username and password_file, "
                "or neither)"
            )
        if sum(map(bool, (self.username, self.credential_helper, self.docker_config))) > 1:
            raise ValueError(
                "credentials are set more than once (keep one of username, credential_helper "
                "and docker_config)"
            )

    def read_password(self) -> str:
        """Return the password, from `password_file` if set. Blocking. Raises `ConfigError`."""
        if not self.password_file:
            return str(self.password)
        try:
            return expand_path(self.password_file).read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigError(f"{self.password_file}: password_file: {reason}") from error


class PreloadSettings(Section, frozen=True):
    """Images to preload at start and at an interval; may be repeated."""

    images: Annotated[
        tuple[str, ...], Meta(description="Images to preload; set this or file.")
    ] = ()
    file: Annotated[
        str,
        Meta(description="Image list in any format of preload -f; reread at each run."),
    ] = ""
    every: Annotated[
        PositiveDuration,
        Meta(description="Interval between runs, with 10 % jitter."),
    ] = PositiveDuration.parse("6h")
    platforms: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "Platforms to preload; defaults to those of the list or of this machine; "
                '"all" for every platform.'
            )
        ),
    ] = ()
    pin: Annotated[bool, Meta(description="Pin the images.")] = False

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.file):
            raise ValueError("set exactly one of images and file")
        try:
            for image in self.images:
                parse_image(image)
            for platform in self.platforms:
                if platform != "all":
                    parse_platform(platform)
        except InvalidReferenceError as error:
            raise ValueError(str(error)) from error


class RuleSettings(Section, frozen=True):
    """What applies to some repositories; may be repeated, the first that matches and has a key decides."""

    images: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                'Globs of the repositories that the rule is about, on "UPSTREAM/REPOSITORY"; `*` '
                "also matches `/`."
            ),
            min_length=1,
        ),
    ]
    ttl: Annotated[
        InheritedDuration,
        Meta(
            description="How long a cached tag is fresh; empty for the next rule or manifests.ttl."
        ),
    ] = InheritedDuration("")
    tag_ttl: Annotated[
        dict[str, Duration],
        Meta(
            description="TTLs by tag glob; empty for the table of the next rule or manifests.tag_ttl."
        ),
    ] = field(default_factory=dict)
    immutable: Annotated[
        tuple[str, ...],
        Meta(description="Globs of tags that never move: upstream is not asked about them again."),
    ] = ()
    max_idle: Annotated[
        InheritedDuration,
        Meta(
            description=(
                "Evict blobs that were not used for this long, 0s for never; empty for the next "
                "rule or store.max_idle."
            )
        ),
    ] = InheritedDuration("")
    max_share: Annotated[
        InheritedShare,
        Meta(
            description=(
                "Share of store.max_size beyond which these images go first when room is needed; "
                "empty for the next rule or no limit."
            )
        ),
    ] = InheritedShare("")
    prefetch: Annotated[
        Literal["", "layers", "off"],
        Meta(description="What a pull prefetches; empty for the next rule or fetch.prefetch."),
    ] = ""

    def __post_init__(self) -> None:
        keys = ("ttl", "tag_ttl", "immutable", "max_idle", "max_share", "prefetch")
        if not any(getattr(self, key) for key in keys):
            raise ValueError(f"the rule sets nothing (set one of {', '.join(keys)})")


class PolicySettings(Section, frozen=True):
    """A rule about which images may be pulled; may be repeated, the first that matches decides."""

    images: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                'Globs of the images that the rule is about, on "UPSTREAM/REPOSITORY"; `*` also '
                "matches `/`."
            ),
            min_length=1,
        ),
    ]
    exclude: Annotated[
        tuple[str, ...],
        Meta(description="Globs of images that the rule is not about; later rules may match them."),
    ] = field(default=(), name="except")
    mode: Annotated[
        PolicyMode,
        Meta(
            description=(
                '"enforce" refuses images; "audit" serves them, logs what would be refused, and '
                "sends a `Warning` header."
            )
        ),
    ] = "audit"
    trusted: Annotated[
        tuple[TrustedBadge, ...],
        Meta(
            description=(
                "Allow images that are official, of a verified publisher, or sponsored open "
                "source on Docker Hub; empty allows all that `allow` does not restrict."
            )
        ),
    ] = ()
    allow: Annotated[
        tuple[str, ...],
        Meta(description="Globs of images that are allowed besides those of `trusted`."),
    ] = ()
    deny_tags: Annotated[tuple[str, ...], Meta(description="Globs of tags that are refused.")] = ()
    min_age: Annotated[
        Duration,
        Meta(description="Minimum age of the content; 0s allows any age."),
    ] = Duration.parse("0s")
    unripe: Annotated[
        Literal["previous", "deny"],
        Meta(
            description=(
                'What a tag means while its content is younger than min_age: "previous", the '
                'newest content that is old enough; or "deny".'
            )
        ),
    ] = "previous"
    first_seen: Annotated[
        Literal["allow", "deny"],
        Meta(
            description=(
                "Whether an image of unknown age is allowed when this cache sees it for the "
                "first time."
            )
        ),
    ] = "allow"
    unknown: Annotated[
        Literal["allow", "deny"],
        Meta(
            description="Whether an image is allowed while a fact about it is unavailable; otherwise the answer is 503."
        ),
    ] = "deny"


class Config(Section, frozen=True):
    """The whole configuration."""

    offline: Annotated[
        bool, Meta(description="Never connect to upstream; serve cached content only.")
    ] = False
    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    notify: NotifySettings = NotifySettings()
    store: StoreSettings = StoreSettings()
    manifests: ManifestsSettings = field(default_factory=ManifestsSettings)
    fetch: FetchSettings = FetchSettings()
    contents: ContentsSettings = ContentsSettings()
    fleet: FleetSettings = FleetSettings()
    upstreams: Annotated[
        dict[str, UpstreamSettings],
        Meta(description="Registries that clients may pull from; no others are contacted."),
    ] = field(default_factory=lambda: {DEFAULT_UPSTREAM: UpstreamSettings(url=DOCKER_HUB_URL)})

    preload: Annotated[
        tuple[PreloadSettings, ...],
        Meta(description="Preloads that the daemon runs on a schedule."),
    ] = ()

    rules: Annotated[
        tuple[RuleSettings, ...],
        Meta(description="Freshness, prefetch and retention by repository, in order."),
    ] = ()

    policy: Annotated[
        tuple[PolicySettings, ...],
        Meta(description="Rules about which images may be pulled, in order."),
    ] = ()

    def __post_init__(self) -> None:
        for number, one in enumerate(self.rules, start=1):
            for glob in one.images:
                self._check_upstream_of_glob(f"rules[{number}].images", glob)
        earlier: list[str] = []
        for number, rule in enumerate(self.policy, start=1):
            for glob in rule.images:
                self._check_policy_glob(number, glob, rule.exclude, earlier)
            if not rule.exclude:
                earlier += rule.images

    def _check_policy_glob(
        self, number: int, glob: str, exclude: tuple[str, ...], earlier: list[str]
    ) -> None:
        """Raise `ValueError` if a glob of a policy can never decide."""
        self._check_upstream_of_glob(f"policy[{number}].images", glob)
        place = f"policy[{number}].images: {glob!r} can never match"
        if any(covers(one, glob) for one in exclude):
            raise ValueError(f"{place}: except excludes all of it (remove one of them)")
        if covering := next((one for one in earlier if covers(one, glob)), None):
            raise ValueError(
                f"{place}: {covering!r} of an earlier policy decides (move this policy up)"
            )

    def _check_upstream_of_glob(self, key: str, glob: str) -> None:
        """Raise `ValueError` if a glob matches no repository of any upstream."""
        if not any(can_match_with_prefix(glob, f"{name}/") for name in self.upstreams):
            example = f"{next(iter(self.upstreams), DEFAULT_UPSTREAM)}/*"
            raise ValueError(
                f'{key}: {glob!r} can never match: no upstream has such a name (write "{example}")'
            )

    def get_search_url(self, name: str) -> str:
        """Return the search URL of an upstream, empty if it has no search."""
        settings = self.upstreams[name]
        if settings.search_url or name != DEFAULT_UPSTREAM:
            return settings.search_url
        return DOCKER_HUB_SEARCH_URL if settings.url == DOCKER_HUB_URL else settings.url
