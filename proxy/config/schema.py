"""The sections and keys: types, defaults and descriptions, each said once."""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from proxy.config.values import (
    Address,
    Duration,
    OptionalUrl,
    ProxyUrl,
    RegistryUrl,
    Secret,
    Size,
    StoreLimit,
    Timeout,
    file_of,
)
from proxy.errors import ConfigError, InvalidReferenceError
from proxy.oci.platform import parse_platform
from proxy.oci.reference import parse_image

DEFAULT_UPSTREAM = "docker.io"
DEFAULT_URL = RegistryUrl("https://registry-1.docker.io")
# Docker Hub is searched elsewhere than it is pulled from.
DEFAULT_SEARCH_URL = OptionalUrl("https://index.docker.io")

# The addresses of registries that are known by name: their tables need no url.
PRESETS = {
    DEFAULT_UPSTREAM: DEFAULT_URL,
    "gcr.io": RegistryUrl("https://gcr.io"),
    "ghcr.io": RegistryUrl("https://ghcr.io"),
    "mcr.microsoft.com": RegistryUrl("https://mcr.microsoft.com"),
    "public.ecr.aws": RegistryUrl("https://public.ecr.aws"),
    "quay.io": RegistryUrl("https://quay.io"),
    "registry.k8s.io": RegistryUrl("https://registry.k8s.io"),
}

LogLevel = Literal["debug", "info", "warning", "error"]
Prefetching = Literal["layers", "off"]
LogFormat = Literal["auto", "json", "console"]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class ServerSettings(Section, frozen=True):
    """Where clients connect."""

    listen: Annotated[
        tuple[Address, ...],
        Meta(
            description='Addresses to listen on; "[::]:5000" is every address, port 0 any free '
            "port.",
            min_length=1,
        ),
    ] = (Address("127.0.0.1:5000"),)
    tls_certificate: Annotated[
        tuple[str, ...],
        Meta(
            description="PEM files, each a certificate and what signed it; then clients connect by https. A "
            "client gets the first that has the name it asks for, or the first."
        ),
    ] = ()
    tls_key: Annotated[
        tuple[str, ...],
        Meta(
            description="The files of their keys, in the same order; empty: each is with its certificate."
        ),
    ] = ()
    htpasswd: Annotated[
        str,
        Meta(
            description="A file of users and bcrypt hashes (htpasswd -B); then clients must log in. Read "
            "again when it changes. Not for docker's registry-mirrors."
        ),
    ] = ""
    max_connections: Annotated[
        int,
        Meta(description="Connections of clients at a time; who is one more gets 429.", ge=1),
    ] = 8192
    max_connections_per_client: Annotated[
        int,
        Meta(
            description="The same for one address (of IPv6 one /64); behind a reverse proxy all clients "
            "are one.",
            ge=1,
        ),
    ] = 2048
    admin_listen: Annotated[
        tuple[Address, ...],
        Meta(
            description="TCP addresses of the admin API, which is always on admin.sock in the store."
        ),
    ] = ()
    admin_token_file: Annotated[
        str,
        Meta(
            description="A file with the token that the admin API wants on TCP; needed off loopback."
        ),
    ] = ""
    registry_proxy_metrics: Annotated[
        bool,
        Meta(
            description="Tell distribution's registry_proxy_* metrics too, for dashboards there are."
        ),
    ] = False
    tracing: Annotated[
        bool,
        Meta(
            description="Send OpenTelemetry traces of clients' requests, by OTLP/HTTP as the variables OTEL_* "
            "say; needs pullcache[opentelemetry]."
        ),
    ] = False
    shutdown_timeout: Annotated[
        Duration,
        Meta(
            description="How long a stop waits for what is being sent; a second signal ends that."
        ),
    ] = Duration.parse("8s")

    def __post_init__(self) -> None:
        if self.tls_key and len(self.tls_key) != len(self.tls_certificate):
            raise ValueError("tls_certificate and tls_key have to be of the same number")
        open_to_others = [one for one in self.admin_listen if not one.is_loopback]
        if open_to_others and not self.admin_token_file:
            raise ValueError(
                f"admin_listen: {open_to_others[0]} is open to other machines (set "
                "admin_token_file, or listen on 127.0.0.1)"
            )

    def read_admin_token(self) -> str:
        """Return the token, "" if none is set; reads its file (small, blocking) or raises `ConfigError`."""
        if not self.admin_token_file:
            return ""
        try:
            token = file_of(self.admin_token_file).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not ASCII text"
            raise ConfigError(f"{self.admin_token_file}: admin_token_file: {reason}") from error
        if not token:
            raise ConfigError(
                f"{self.admin_token_file}: admin_token_file: is empty (write a token into it)"
            )
        return token


class LogSettings(Section, frozen=True):
    """What goes to stderr."""

    level: Annotated[LogLevel, Meta(description="The least severe records to write.")] = "info"
    format: Annotated[
        LogFormat,
        Meta(description='"json", "console", or "auto": console on a terminal, else JSON.'),
    ] = "auto"


class StoreSettings(Section, frozen=True):
    """Where content lies, and how much of it."""

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
            description='The most the store holds, never exceeded; or a share of the disk, "80%".'
        ),
    ] = StoreLimit("50GB")
    min_free: Annotated[
        Size, Meta(description="Free space to leave on the file system, whatever max_size says.")
    ] = Size.parse("1GB")
    max_idle: Annotated[
        Duration, Meta(description="Drop what nobody has used for so long; 0s is never.")
    ] = Duration.parse("0s")


class ManifestsSettings(Section, frozen=True):
    """How long an answer for a tag is good."""

    ttl: Annotated[
        Duration, Meta(description="How long a tag is served before upstream is asked again.")
    ] = Duration.parse("10m")
    negative_ttl: Annotated[
        Duration, Meta(description="How long a tag that upstream does not have is remembered.")
    ] = Duration.parse("30s")
    stale_if_error: Annotated[
        Duration,
        Meta(description="How long after its TTL a tag is still served while upstream fails."),
    ] = Duration.parse("30d")
    stale_while_revalidate: Annotated[
        Duration,
        Meta(
            description="How long after its TTL a tag is served at once and upstream asked behind."
        ),
    ] = Duration.parse("0s")
    tag_ttl: Annotated[
        dict[str, Duration],
        Meta(
            description="TTLs by glob on the tag; the first that matches wins over ttl. "
            "A table that is given replaces this one."
        ),
    ] = field(default_factory=lambda: {"latest": Duration.parse("1m")})


class FetchSettings(Section, frozen=True):
    """How content comes from upstream."""

    prefetch: Annotated[
        Prefetching,
        Meta(
            description='"layers": a manifest that is pulled starts the download of the config and '
            'layers it names; "off": they come when they are asked for.'
        ),
    ] = "layers"
    parallel_above: Annotated[
        Size,
        Meta(description="Blobs larger than this come over several connections at once."),
    ] = Size.parse("16MB")
    parallel_below: Annotated[
        Size,
        Meta(
            description="Unless one connection brings so many bytes a second: others would then cost "
            "work and bring nothing. 0B is never several."
        ),
    ] = Size.parse("64MB")
    connections_per_blob: Annotated[
        int, Meta(description="Connections for such a blob; 1 is never several.", ge=1, le=16)
    ] = 4
    max_downloads: Annotated[
        int, Meta(description="Downloads that may run at once.", ge=1, le=1000)
    ] = 16
    connect_timeout: Annotated[
        Timeout, Meta(description="How long connecting to upstream may take.")
    ] = Timeout.parse("10s")
    stall_timeout: Annotated[
        Timeout, Meta(description="How long upstream may send nothing; a whole download may last.")
    ] = Timeout.parse("30s")
    min_rate: Annotated[
        Size,
        Meta(
            description="Bytes a second below which, over twice stall_timeout, a transfer counts as "
            "stalled; 0B is never."
        ),
    ] = Size.parse("1KiB")
    attempts: Annotated[
        int,
        Meta(description="Attempts before a request fails; progress resets them.", ge=1, le=100),
    ] = 5
    ingest_ttl: Annotated[
        Duration, Meta(description="How long an unfinished download is kept for resuming.")
    ] = Duration.parse("1d")


class UpstreamSettings(Section, frozen=True):
    """A registry to ask. The table's name is the registry's name in image references."""

    url: Annotated[
        RegistryUrl,
        Meta(
            description="Its address, http(s)://host[:port] without a path. Known for docker.io, "
            "gcr.io, ghcr.io, mcr.microsoft.com, public.ecr.aws, quay.io and registry.k8s.io."
        ),
    ]
    mirrors: Annotated[
        tuple[RegistryUrl, ...],
        Meta(description="Addresses to ask before it, in this order, without its login."),
    ] = ()
    username: Annotated[str, Meta(description="The user to log in as; empty is anonymous.")] = ""
    password: Annotated[
        Secret, Meta(description="The user's password or token. password_file is safer.")
    ] = Secret("")
    password_file: Annotated[
        str, Meta(description="A file that holds the password; read again at each use.")
    ] = ""
    credential_helper: Annotated[
        str,
        Meta(
            description='A program that knows user and password: "pass" is docker-credential-pass.'
        ),
    ] = ""
    docker_config: Annotated[
        str, Meta(description="A docker config.json that holds the login, or names its helper.")
    ] = ""
    search_url: Annotated[
        OptionalUrl,
        Meta(
            description="Where `docker search` goes, by /v1/search. Empty is https://index.docker.io for "
            "docker.io, or docker.io's own url if that is another; for others what is cached."
        ),
    ] = OptionalUrl("")
    hosts: Annotated[
        tuple[str, ...], Meta(description="Host headers of requests that mean this upstream.")
    ] = ()
    ca_file: Annotated[
        str, Meta(description="PEM certificates to trust for it beside the system's.")
    ] = ""
    proxy: Annotated[
        ProxyUrl,
        Meta(
            description="The proxy to ask through, http://[user:password@]host:port; empty is the "
            "environment's HTTP_PROXY and HTTPS_PROXY."
        ),
    ] = ProxyUrl("")
    allow: Annotated[
        tuple[str, ...], Meta(description="Globs of the repositories that may be pulled.")
    ] = ("*",)
    deny: Annotated[
        tuple[str, ...],
        Meta(description="Globs of the repositories that may not, even if allowed."),
    ] = ()

    def __post_init__(self) -> None:
        if self.password and self.password_file:
            raise ValueError("password and password_file are both set (keep one)")
        if bool(self.username) != bool(self.password or self.password_file):
            raise ValueError("a login has two parts (set username and password_file, or neither)")
        if sum(map(bool, (self.username, self.credential_helper, self.docker_config))) > 1:
            raise ValueError(
                "a login comes from one place (keep one of username, credential_helper and "
                "docker_config)"
            )

    def read_password(self) -> str:
        """Return the password; reads `password_file` (small, blocking) or raises `ConfigError`."""
        if not self.password_file:
            return str(self.password)
        try:
            return file_of(self.password_file).read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigError(f"{self.password_file}: password_file: {reason}") from error


class PreloadSettings(Section, frozen=True):
    """Images to fetch at the start and every so often; there may be several such tables."""

    images: Annotated[
        tuple[str, ...], Meta(description="The images; or file has a list of them.")
    ] = ()
    file: Annotated[
        str,
        Meta(description="A list of images in any format that -f takes; read again each time."),
    ] = ""
    every: Annotated[
        Timeout, Meta(description="How often; a tenth more or less, so that not all ask at once.")
    ] = Timeout.parse("6h")
    platforms: Annotated[
        tuple[str, ...],
        Meta(description="The platforms; empty is the list's or this machine's, \"all\" is all."),
    ] = ()
    pin: Annotated[bool, Meta(description="Keep them in the store.")] = False

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.file):
            raise ValueError("names no images, or in two ways (set images or file)")
        try:
            for image in self.images:
                parse_image(image)
            for platform in self.platforms:
                if platform != "all":
                    parse_platform(platform)
        except InvalidReferenceError as error:
            raise ValueError(str(error)) from error


class Config(Section, frozen=True):
    """The whole configuration."""

    offline: Annotated[
        bool, Meta(description="Never dial out: serve what is cached and nothing else.")
    ] = False
    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    store: StoreSettings = StoreSettings()
    manifests: ManifestsSettings = field(default_factory=ManifestsSettings)
    fetch: FetchSettings = FetchSettings()
    upstreams: Annotated[
        dict[str, UpstreamSettings],
        Meta(description="The registries that may be asked; no other ever is."),
    ] = field(default_factory=lambda: {DEFAULT_UPSTREAM: UpstreamSettings(url=DEFAULT_URL)})

    preload: Annotated[
        tuple[PreloadSettings, ...],
        Meta(description="What the daemon preloads by itself."),
    ] = ()

    def search_url(self, name: str) -> str:
        """Return where the upstream called `name` is searched, empty if nowhere."""
        settings = self.upstreams[name]
        if settings.search_url or name != DEFAULT_UPSTREAM:
            return settings.search_url
        return DEFAULT_SEARCH_URL if settings.url == DEFAULT_URL else settings.url
