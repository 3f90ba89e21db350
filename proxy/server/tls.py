"""TLS for clients: certificates from files, selected by SNI, and replaced without a restart."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.config import ServerSettings
from proxy.config.values import expand_path
from proxy.errors import ConfigError

# X509_V_FLAG_NO_CHECK_TIME; the `ssl` module does not define it.
_NO_CHECK_TIME = 0x200000


@dataclass(frozen=True, slots=True)
class Certificates:
    """The certificates in use: one TLS context per name, and the default for all other names.

    `expiries` maps each certificate file to the end of its validity (Unix time).
    """

    default: ssl.SSLContext
    by_name: Mapping[str, ssl.SSLContext]
    expiries: Mapping[str, float]

    def select_context(self, name: str | None) -> ssl.SSLContext:
        """Return the context for a name; `*.example.org` matches one more label (RFC 6125)."""
        host = (name or "").lower().rstrip(".")
        context = self.by_name.get(host) or self.by_name.get(f"*.{host.partition('.')[2]}")
        return context or self.default


class TlsContext:
    """The TLS context of listeners; each handshake uses the current certificates."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self.context = _new_context()
        self.context.sni_callback = self._select_certificate

    def set_certificates(self, certificates: Certificates) -> None:
        """Use these for new connections; open ones keep theirs."""
        self._certificates = certificates

    def _select_certificate(
        self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext
    ) -> None:
        connection.context = self._certificates.select_context(name)


def load_certificates(settings: ServerSettings) -> Certificates | None:
    """Load the configured certificates, None if there are none. Blocks; raises `ConfigError`."""
    files = settings.tls_certificate
    if not files:
        return None
    pairs = zip(files, settings.tls_key or files, strict=True)
    contexts = [
        _load_context(expand_path(certificate), expand_path(key)) for certificate, key in pairs
    ]
    by_name: dict[str, ssl.SSLContext] = {}
    expiries: dict[str, float] = {}
    for file, context in zip(files, contexts, strict=True):
        names, expiries[file] = _read_names_and_expiry(expand_path(file), context)
        for name in names:
            by_name.setdefault(name, context)
    return Certificates(contexts[0], by_name, expiries)


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # OpenSSL 3 reports a connection that ends without close_notify as an error, but many clients do
    # that.
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = _new_context()
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            key_name = "tls_certificate" if path == certificate else "tls_key"
            raise ConfigError(f"{path}: server.{key_name}: {error.strerror}") from error
    try:
        # With None, OpenSSL would prompt for the passphrase on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate}: server.tls_certificate: {_describe_error(error, key)}"
        ) from error
    return context


def _describe_error(error: ssl.SSLError, key: Path) -> str:
    reason = error.reason or ""
    if reason == "KEY_VALUES_MISMATCH":
        return f"is not the certificate of the key {key}"
    if "TOO_SMALL" in reason or "TOO_WEAK" in reason:
        return f"is too weak ({reason}; make one with RSA of 2048 bits, or EC)"
    return f"cannot be used with {key} ({reason or 'not PEM'}; PEM, the key without a passphrase)"


def _read_names_and_expiry(path: Path, context: ssl.SSLContext) -> tuple[list[str], float]:
    """Return the names in a certificate and the end of its validity (Unix time).

    Reads them as the client of a handshake in memory, because the standard library parses only
    the verified certificate of a peer.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # An expired certificate is served anyway: clients check the dates themselves.
    client.verify_flags |= _NO_CHECK_TIME
    client.load_verify_locations(path)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server),
        context.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for _ in range(3):
            for side in sides:
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason
        raise ConfigError(
            f"{path}: server.tls_certificate: clients would reject it: {reason}"
        ) from error
    certificate: dict[str, Any] = sides[0].getpeercert() or {}
    names: Sequence[tuple[str, str]] = certificate.get("subjectAltName", ())
    expiry = ssl.cert_time_to_seconds(certificate["notAfter"])
    return [name.lower() for kind, name in names if kind in ("DNS", "IP Address")], expiry
