"""`pullcache client-config`: what a client has to be told so that it pulls through the cache."""

from pathlib import Path

import click

from proxy.cli.files.client_files import CLIENT_FILES, ClientFile
from proxy.cli.options import config_options, load_config
from proxy.config import Config, ServerSettings
from proxy.config.values import Address, RegistryUrl
from proxy.errors import ConfigError, ProxyError


def _parse_address(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> RegistryUrl | None:
    try:
        return None if text is None else RegistryUrl.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command("client-config")
@config_options
@click.argument("client", type=click.Choice([*CLIENT_FILES]))
@click.option(
    "--address",
    metavar="URL",
    callback=_parse_address,
    help="Where clients find the cache: http://mirror:5000. [default: by server.listen]",
)
@click.option(
    "-o",
    "--output",
    "output_dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the files below DIR, which takes the place of the client's directory, and overwrite none.",
)
def client_config(
    *,
    path: Path | None,
    store: str | None,
    client: str,
    address: RegistryUrl | None,
    output_dir: Path | None,
) -> None:
    """Print the files by which CLIENT pulls through this cache, from any upstream of the configuration that it can.

    Each says where it goes, and what is to be restarted.
    """
    config = load_config(path, store)
    files = [*CLIENT_FILES[client](address or _default_cache_url(config), config.upstreams)]
    if output_dir is None:
        click.echo("\n".join(f"{file.header}\n{file.content}" for file in files), nl=False)
    else:
        _write_files(output_dir, files)


def _default_cache_url(config: Config) -> RegistryUrl:
    """Return where clients on this machine find the cache."""
    listen = config.server.listen[0]
    if not listen.port:
        raise click.UsageError("server.listen leaves the port open; say --address URL")
    if config.server.tls_certificate:
        address = Address(_certified_address(config.server, listen))
        url = RegistryUrl(f"https://{address}")
    else:
        address = Address(listen.local_address)
        url = RegistryUrl(f"http://{address}")
    if address.is_loopback:
        click.echo(f"{url} is for this machine; for others say --address URL", err=True)
    return url


def _certified_address(settings: ServerSettings, listen: Address) -> str:
    """Return the address under a name that the certificate has: the one listened at, else its first."""
    from proxy.server.tls import load_certificates  # noqa: PLC0415 - few have one

    try:
        certificates = load_certificates(settings)
    except ConfigError as error:
        raise click.UsageError(f"{error}; say --address URL") from error
    assert certificates
    names = [name for name in certificates.by_name if not name.startswith("*.")]
    if listen.host in names or not names:
        return listen.local_address
    name = f"[{names[0]}]" if ":" in names[0] else names[0]
    return f"{name}:{listen.port}"


def _write_files(output_dir: Path, files: list[ClientFile]) -> None:
    paths = {output_dir / file.path: file for file in files}
    if there := [str(path) for path in paths if path.exists()]:
        raise ProxyError(f"{there[0]} exists; it is left as it is, and nothing was written")
    for path, file in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.file_text, encoding="utf-8")
        click.echo(path)
