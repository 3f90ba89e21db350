"""The types of values in the configuration: sizes, durations, addresses, URLs, secrets.

Each has `parse`, which raises `ValueError` with what to write instead, and `schema`, its part of
the JSON Schema.
"""

import os
import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, ClassVar, Self

_SIZE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}
_DURATION_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}  # in ms
_SIZE_PATTERN = re.compile(r"([0-9]+)(?:\.([0-9]+))? ?([A-Za-z]*)")
_DURATION_PATTERN = re.compile(r"(?:[0-9]+(?:ms|[smhd]))+")
_SIZE_LIMIT = 1 << 63
# A smaller store holds no image: its size is most likely a number that lacks its unit.
MIN_STORE_SIZE = 100_000
_VALKEY_PATTERN = re.compile(
    r"(?:valkey|redis)s?://(?:[^/@:,?#]+@)?"
    r"(?P<hosts>{host}(?:,{host})*)(?:/(?P<database>[0-9]{{1,4}})?)?(?:\?master=[A-Za-z0-9._-]{{1,64}})?".format(
        host=r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    )
)
_DURATION_LIMIT = 36_500 * _DURATION_UNITS["d"]


class Size(int):
    """A number of bytes; `str` returns it with the largest unit that is exact."""

    schema: ClassVar[dict[str, Any]] = {"type": ["string", "integer"], "examples": ["50GB"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the size in 1048576, "1MiB" or "1.5 GB", or raise `ValueError`."""
        match = _SIZE_PATTERN.fullmatch(_to_text(value))
        unit = _SIZE_UNITS.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f'{value!r} is not a size (write "500MB", "50GB" or "20GiB")')
        whole, decimals = match[1], match[2] or ""
        scaled, rest = divmod(int(whole + decimals) * unit, 10 ** len(decimals))
        if rest or scaled >= _SIZE_LIMIT:
            raise ValueError(f"{value!r} is not a whole number of bytes below 2^63")
        return cls(scaled)

    def __str__(self) -> str:
        for unit, factor in sorted(_SIZE_UNITS.items(), key=lambda item: -item[1]):
            if factor > 1 and self and not self % factor:
                prefix = unit[:-1].capitalize() if unit != "kb" else "k"
                return f"{int(self) // factor}{prefix}B"
        return f"{int(self)}B"


class Duration(float):
    """A duration in seconds; `str` returns it with units."""

    schema: ClassVar[dict[str, Any]] = {"type": ["string", "integer"], "examples": ["1h30m"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the duration in 90, "90s", "1m30s" or "2d", or raise `ValueError`."""
        text = _to_text(value)
        text = f"{text}s" if text.isascii() and text.isdigit() else text
        if _DURATION_PATTERN.fullmatch(text) is None:
            raise ValueError(f'{value!r} is not a duration (write "30s", "10m", "1h30m" or "2d")')
        parts = re.findall(r"([0-9]+)([a-z]+)", text)
        milliseconds = sum(int(number) * _DURATION_UNITS[unit] for number, unit in parts)
        if milliseconds > _DURATION_LIMIT:
            raise ValueError(f"{value!r} is longer than a hundred years")
        return cls(milliseconds / 1000)

    def __str__(self) -> str:
        rest, text = round(self * 1000), ""
        for unit, factor in _DURATION_UNITS.items():
            count, rest = divmod(rest, factor)
            text += f"{count}{unit}" if count else ""
        return text or "0s"


class OptionalDuration(Duration):
    """A duration; "off" is another word for 0."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the duration as `Duration.parse` does, or 0 for "off"."""
        return super().parse(0 if value == "off" else value)


class PositiveDuration(Duration):
    """A duration above zero."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the duration as `Duration.parse` does; raise `ValueError` for zero."""
        duration = super().parse(value)
        if not duration:
            raise ValueError(f'{value!r} must be longer than 0 (write "10s")')
        return duration


class InheritedDuration(str):
    """A duration, or empty: then it is not set here."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": ["string", "integer"], "examples": ["6h"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the duration as `Duration.parse` does; an empty string is allowed."""
        return cls("") if value == "" else cls(Duration.parse(value))

    @property
    def seconds(self) -> float:
        """The duration in seconds; it must be set."""
        return float(Duration.parse(str(self)))


class InheritedShare(str):
    """A share of the store ("30%"), or empty: then it is not set here."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["30%"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the share, or raise `ValueError`; an empty string is allowed."""
        if value == "":
            return cls("")
        match = re.fullmatch(r"([0-9]{1,3}) ?%", _to_text(value))
        if match is None or not 1 <= int(match[1]) <= 100:
            raise ValueError(f'{value!r} is not a share of the store (write "1%" to "100%")')
        return cls(f"{int(match[1])}%")

    @property
    def fraction(self) -> float:
        """The share as a number up to 1; it must be set."""
        return int(self[:-1]) / 100


class StoreLimit(str):
    """The maximum size of the store: a size, or a percentage of its file system ("80%")."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": ["string", "integer"], "examples": ["80%"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the limit in "80%" or in a size above zero, or raise `ValueError`."""
        text = _to_text(value)
        percentage = re.fullmatch(r"([0-9]{1,3}) ?%", text)
        if percentage is None:
            size = Size.parse(value)
            if size < MIN_STORE_SIZE:
                raise ValueError(f'{value!r} is less than 100 kB (write "50GB")')
            return cls(size)
        if not 1 <= int(percentage[1]) <= 100:
            raise ValueError(f'{value!r} is not a percentage (write "1%" to "100%")')
        return cls(f"{int(percentage[1])}%")

    def to_bytes(self, total_bytes: int) -> int:
        """Return the limit in bytes on a file system of `total_bytes`."""
        return total_bytes * int(self[:-1]) // 100 if self.endswith("%") else int(Size.parse(self))


class Address(str):
    """An address to listen on: "host:port", "[::1]:5000", or ":5000" for all addresses."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["[::]:5000"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the address, or raise `ValueError`."""
        pattern = r"(\[[0-9A-Fa-f:.]+(%\w+)?\]|[A-Za-z0-9._-]*):([0-9]{1,5})"
        match = re.fullmatch(pattern, _to_text(value))
        if match is None or int(match[3]) > 65535:
            raise ValueError(f'{value!r} is not host:port (write "127.0.0.1:5000" or "[::]:5000")')
        return cls(value)

    @property
    def host(self) -> str:
        """The host without brackets; empty for all addresses."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port; 0 for any free port."""
        return int(self.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can connect."""
        return is_loopback(self.host)

    @property
    def local_address(self) -> str:
        """The address for clients on this machine: 127.0.0.1 if it is all addresses."""
        return f"127.0.0.1:{self.port}" if self.host in {"", "0.0.0.0", "::"} else self  # noqa: S104


class Network(str):
    """A network in CIDR notation, or one address."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["10.0.0.0/8"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the network, or raise `ValueError`."""
        text = _to_text(value)
        try:
            return cls(ip_network(text))
        except ValueError as error:
            if "host bits" in str(error):
                network = ip_network(text, strict=False)
                raise ValueError(f'{value!r} has host bits set (write "{network}")') from error
            raise ValueError(
                f'{value!r} is not a network (write "10.0.0.0/8" or "192.0.2.7")'
            ) from error


class InternalLocation(str):
    """The path of an internal location of nginx ("/_blobs"), or empty."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["/_blobs"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the path without a trailing slash, or raise `ValueError`; an empty string is allowed."""
        text = _to_text(value).rstrip("/")
        if value == "":
            return cls("")
        if not re.fullmatch(r"(/[A-Za-z0-9_-]+)+", text) or re.match(r"/v[12](/|$)", text):
            raise ValueError(f'{value!r} is not a path of nginx alone (write "/_blobs")')
        return cls(text)


class RegistryUrl(str):
    """The URL of a registry: http(s)://host[:port] without a path."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["https://ghcr.io"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the URL without a trailing slash, or raise `ValueError`."""
        pattern = r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?"
        match = re.fullmatch(pattern, _to_text(value))
        if "@" in str(value):
            # The message does not quote the URL, which may contain a password.
            raise ValueError("must not contain credentials (set username and password_file)")
        if match is None or not _is_valid_host(match[1].strip("[]")):
            raise ValueError(f"{value!r} is not http(s)://host[:port] (a path is not allowed)")
        return cls(str(value).strip().rstrip("/"))

    @property
    def authority(self) -> str:
        """The host, with the port if the URL has one."""
        return self.partition("://")[2]

    @property
    def host(self) -> str:
        """The host without brackets and port."""
        return re.sub(r":[0-9]+$", "", self.authority).strip("[]")

    @property
    def is_http(self) -> bool:
        """Whether it is http, without TLS."""
        return self.startswith("http://")


class OptionalUrl(RegistryUrl):
    """The URL of a registry, or empty."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the URL as `RegistryUrl.parse` does; an empty string is allowed."""
        return cls("") if value == "" else super().parse(value)


class ValkeyUrl(str):
    """Where a Valkey or Redis server is, or the Sentinels that know it; empty for none.

    "valkey://[user@]host[:port][/database]", "valkeys://" with TLS, "unix:///path"; several hosts with commas
    are Sentinels, and "?master=name" is the name of the server there.
    """

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "type": "string",
        "examples": ["valkey://cache-db:6379/0"],
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the URL, or raise `ValueError` without quoting a password; it may be empty."""
        text = _to_text(value)
        if not text:
            return cls("")
        if re.match(r"[a-z]+://[^/@]*:[^/@]*@", text):
            raise ValueError("must not contain a password (set valkey_password_file)")
        match = _VALKEY_PATTERN.fullmatch(text)
        is_unix = text.startswith("unix:///")
        if match is None and not is_unix:
            raise ValueError(
                f'{value!r} is not the URL of a server (write "valkey://host:6379/0", valkeys:// for '
                'TLS, "valkey://a:26379,b:26379/0?master=name" for Sentinels or unix:///path)'
            )
        if match and any(port > 65535 for _, port in cls(text).hosts):
            raise ValueError(f"{value!r} has a port above 65535")
        return cls(text)

    @property
    def unix_path(self) -> str:
        """The path of a Unix socket; empty for a server on TCP."""
        return self.removeprefix("unix://") if self.startswith("unix:///") else ""

    @property
    def is_tls(self) -> bool:
        """Whether the connection uses TLS."""
        return self.startswith(("valkeys://", "rediss://"))

    @property
    def username(self) -> str:
        """The user to log in as; empty for the default user."""
        before, at, _ = self.partition("@")
        return before.partition("://")[2] if at else ""

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """The hosts, without brackets, and ports; several are Sentinels."""
        match = _VALKEY_PATTERN.fullmatch(self)
        if match is None:
            return []
        hosts = match["hosts"].split(",")
        default = 26379 if len(hosts) > 1 else 6379
        found = []
        for host in hosts:
            name, _, port = host.rpartition(":") if re.search(r":[0-9]+$", host) else (host, "", "")
            found.append((name.strip("[]"), int(port or default)))
        return found

    @property
    def database(self) -> int:
        """The number of the database."""
        match = _VALKEY_PATTERN.fullmatch(self)
        return int(match["database"] or 0) if match else 0

    @property
    def master(self) -> str:
        """The name under which the Sentinels know the server."""
        return self.partition("?master=")[2] or "mymaster"


class FleetName(str):
    """The name of a fleet: the prefix of its keys in Valkey."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["pullcache"]}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the name, or raise `ValueError`."""
        text = _to_text(value)
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
            raise ValueError(f'{value!r} is not a name (write 1 to 64 letters, digits or "._-")')
        return cls(text)


class Secret(str):
    """A secret string, which its `repr` does not show."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "writeOnly": True}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the secret, or raise `ValueError` without quoting it."""
        if not isinstance(value, str):
            raise ValueError("expected a string")  # noqa: TRY004 - msgspec adds the path to these
        return cls(value)

    @property
    def redacted(self) -> str:
        """The text to show instead."""
        return "***" if self else ""

    def __repr__(self) -> str:
        return repr(self.redacted)


class ProxyUrl(Secret):
    """The URL of a proxy, http://[user:password@]host[:port], whose credentials are secret."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "type": "string",
        "examples": ["http://user:password@proxy.example:3128"],
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the URL without a trailing slash, or raise `ValueError` without quoting it."""
        text = Secret.parse(value).strip().rstrip("/")
        host = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
        match = re.fullmatch(
            rf"http://(?:[^@/?#\s]*@)?({host})(?::([0-9]{{1,5}}))?", text, re.IGNORECASE
        )
        is_valid = match and _is_valid_host(match[1].strip("[]")) and int(match[2] or 0) <= 65535
        if text and not is_valid:
            raise ValueError("not a proxy URL (write http://[user:password@]host:port)")
        return cls(text)

    @property
    def redacted(self) -> str:
        """The URL with *** in place of the credentials."""
        credentials, at, rest = self.rpartition("@")
        return f"http://***@{rest}" if at and credentials else str(self)


class WebhookUrl(Secret):
    """The URL of a webhook, http(s)://host[:port]/path, whose path may be secret."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "type": "string",
        "examples": ["https://hooks.example/pullcache"],
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the URL, or raise `ValueError` without quoting it; an empty string is allowed."""
        text = Secret.parse(value).strip()
        pattern = r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?(?:[/?][!-~]*)?"
        match = re.fullmatch(pattern, text)
        is_valid = match and _is_valid_host(match[1].strip("[]")) and int(match[2] or 0) <= 65535
        if text and not is_valid:
            raise ValueError("not a URL of a webhook (write https://host[:port]/path)")
        return cls(text)

    @property
    def redacted(self) -> str:
        """The URL with *** in place of path and query."""
        scheme, colon, rest = self.partition("://")
        host = re.split(r"[/?]", rest, maxsplit=1)[0]
        return str(self) if rest == host else f"{scheme}{colon}{host}/***"


def is_ip_address(host: str) -> bool:
    """Tell whether `host`, without brackets, is an address and not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether `host`, without brackets, is on loopback. The only such name is localhost."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def expand_path(path: str) -> Path:
    """Return the file at `path`; expands `~` and systemd's `$CREDENTIALS_DIRECTORY`."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory and path.startswith("$CREDENTIALS_DIRECTORY/"):
        return Path(directory, path.partition("/")[2])
    return Path(path).expanduser()


def parse_value(kind: Any, value: object) -> Any:
    """Return `value` as `kind`, one of the types here or `Path`, or raise `ValueError`."""
    if kind is not Path:
        return kind.parse(value)
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError(f"expected a directory path, got {value!r}")
    return Path(value).expanduser()


def value_schema(kind: Any) -> dict[str, Any] | None:
    """Return the JSON Schema of one of the types here or `Path`, None for any other type."""
    if kind is Path:
        return {"type": "string", "examples": ["/var/cache/pullcache"]}
    return getattr(kind, "schema", None)


def _is_valid_host(host: str) -> bool:
    """Tell whether `host` is a name or a complete address; 127.1 is neither."""
    if ":" not in host and not host.replace(".", "").isdigit():
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _to_text(value: object) -> str:
    """Return a string or an integer as text, or raise `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"expected a string, got {value!r}")  # noqa: TRY004 - see Secret
    return str(value).strip()
