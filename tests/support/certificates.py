"""Certificates as an operator makes them: by openssl, signed by an authority of our own."""

import ssl
import subprocess
from pathlib import Path


class Authority:
    """A private authority; `ca` is its certificate. What it issues is in a directory beside its own."""

    def __init__(self, directory: Path) -> None:
        self.ca, self._key = directory / "ca.crt", directory.with_name("ca.key")
        self.certs, self.directory = directory, directory.with_name("issued")
        for one in (self.certs, self.directory):
            one.mkdir(parents=True, exist_ok=True)
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", self._key, "-out", self.ca, "-days", "2", "-subj", "/CN=ours"),
        )

    def issue(
        self, name: str, *names: str, days: int = 2, options: tuple[str, ...] = ()
    ) -> tuple[str, str]:
        """Return the files of a certificate and its key; `names` are as `DNS:x` or `IP:y`."""
        certificate, key = (self.directory / f"{name}.{end}" for end in ("pem", "key"))
        request, extensions = (self.directory / f"{name}.{end}" for end in ("csr", "ext"))
        kind = options or ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        _openssl("req", "-new", *kind, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={','.join(names)}\nextendedKeyUsage=serverAuth\n")
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key),
            *("-days", str(days), "-extfile", extensions, "-out", certificate),
        )
        return str(certificate), str(key)

    def trust(self) -> ssl.SSLContext:
        """Return the context of a client that trusts the authority."""
        return ssl.create_default_context(cafile=str(self.ca))


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
