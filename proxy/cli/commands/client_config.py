"""`pullcache client-config`: configuration files that make a client pull through the cache."""

import re
import subprocess
from contextlib import suppress
from pathlib import Path

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.text import echo, terminal_width, wrap
from proxy.cli.options import config_options, load_config
from proxy.config import Config, ServerSettings
from proxy.config.client_files import CLIENT_FILES, ClientFile, docker_mirror_files
from proxy.config.values import Address, RegistryUrl
from proxy.errors import ConfigError, ProxyError

# What no file can prevent.
_ONLY_PROBLEMS = {
    "docker": "docker cannot be restricted to the cache by registry-mirrors: it needs the containerd "
    "image store, for which these files are",
    "buildkit": "BuildKit cannot be restricted to the cache: it asks the registry for what a mirror "
    "refuses",
    "podman": "podman, buildah and skopeo ask registries that these files do not name",
    "crio": "CRI-O asks registries that these files do not name",
}


# Seconds that the daemon, and docker, may take to answer.
ASK_TIMEOUT = 5.0
# The first version of docker that reads hosts.toml.
_HOSTS_TOML_VERSION = 28


def _parse_url(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> RegistryUrl | None:
    try:
        return None if text is None else RegistryUrl.parse(_with_scheme(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _with_scheme(text: str) -> str:
    return text if "://" in text else f"http://{text}"


@click.command("client-config")
@config_options
@click.argument("client", metavar="CLIENT", type=click.Choice([*CLIENT_FILES]))
@click.option(
    "--address",
    "cache_url",
    metavar="URL",
    callback=_parse_url,
    help="Address of the cache for clients: mirror:5000, or https://mirror:5000. [default: where "
    "the daemon listens, or else server.listen]",
)
@click.option(
    "--docker-file",
    type=click.Choice(("daemon.json", "hosts.toml")),
    metavar="FILE",
    help="The file that docker needs: daemon.json or hosts.toml. [default: what docker info tells]",
)
@click.option(
    "--only",
    is_flag=True,
    help="Have the client ask nothing but the cache, so that it cannot avoid a policy.",
)
@click.option(
    "-o",
    "--output",
    "output_dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the files to DIR instead of stdout; never overwrites a file.",
)
def client_config(
    *,
    path: Path | None,
    store: str | None,
    client: str,
    cache_url: RegistryUrl | None,
    docker_file: str | None,
    only: bool,
    output_dir: Path | None,
) -> None:
    """Print the configuration for a client.

    CLIENT is docker, containerd, podman, buildkit, k3s or crio. Covers every configured upstream that the client supports. Comments say where each file belongs
    and what to restart.

    \b
    Examples:
      pullcache client-config docker
      pullcache client-config k3s --address mirror:5000
      pullcache client-config containerd -o certs.d
    """
    config = load_config(path, store)
    address = cache_url or _default_cache_url(config)
    make_files = CLIENT_FILES[client]
    if docker_file and client != "docker":
        raise click.UsageError("--docker-file is for docker only")
    if client == "docker" and not only and (docker_file or _find_docker_file()) == "daemon.json":
        make_files = docker_mirror_files
    files = [*make_files(address, config.upstreams, only=only)]
    if only and (problem := _ONLY_PROBLEMS.get(client)):
        echo(problem, err=True)
    if output_dir is None:
        texts = (f"{_wrap_comments(file.header)}\n{file.content}" for file in files)
        click.echo("\n".join(texts), nl=False)
    else:
        _write_files(output_dir, files)


def _wrap_comments(header: str) -> str:
    """Return comment lines that fit into the terminal, if there is one."""
    path, *note = header.splitlines()
    width = terminal_width()
    if width and max(map(len, note), default=0) > width:
        # The lines of a note are broken already; those between two sentences stay.
        note = "\n".join(note).replace(".\n", ".\0").replace("\n# ", " ").split("\0")
    return "".join(f"{wrap(line, width, indent='# ')}\n" for line in (path, *note))


def _default_cache_url(config: Config) -> RegistryUrl:
    """Return the URL at which clients on this machine reach the cache."""
    listen = _ask_daemon(config) or config.server.listen[0]
    if not listen.port:
        raise click.UsageError("server.listen uses port 0; pass --address URL")
    if config.server.tls_certificate:
        address = Address(_certified_address(config.server, listen))
        url = RegistryUrl(f"https://{address}")
    else:
        address = Address(listen.local_address)
        url = RegistryUrl(f"http://{address}")
    if address.is_loopback:
        echo(f"{url} works on this machine only; pass --address URL for others", err=True)
    return url


def _ask_daemon(config: Config) -> Address | None:
    """Return where the running daemon listens, None if none runs or it does not answer."""
    with (
        suppress(ProxyError, OSError),
        open_admin_client(config, allow_embedded=False, timeout=ASK_TIMEOUT) as api,
    ):
        addresses = api.get("/api/v1/status")["addresses"]
        return next((Address(one) for one in addresses if not one.startswith("unix:")), None)
    return None


def _find_docker_file() -> str:
    """Return the name of the file that the docker of this machine needs."""
    command = ["docker", "info", "--format", "{{json .ServerVersion}} {{json .DriverStatus}}"]
    version: re.Match[str] | None = None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(  # noqa: S603 (a constant command)
            command, capture_output=True, text=True, check=True, timeout=ASK_TIMEOUT
        )
        version = re.match(r'"(\d+)\.', done.stdout)
    if version is None:
        echo(
            "docker info does not answer; this is for Docker 28 and later with the containerd image "
            "store. For any other docker, pass --docker-file daemon.json",
            err=True,
        )
        return "hosts.toml"
    has_containerd_store = "io.containerd.snapshotter.v1" in done.stdout
    reads_hosts_toml = has_containerd_store and int(version[1]) >= _HOSTS_TOML_VERSION
    return "hosts.toml" if reads_hosts_toml else "daemon.json"


def _certified_address(settings: ServerSettings, listen: Address) -> str:
    """Return the address with a host that the certificate is valid for.

    That is the host of `listen` if possible, else the first name in the certificate.
    """
    from proxy.server.tls import load_certificates  # noqa: PLC0415 - imports ssl

    try:
        certificates = load_certificates(settings)
    except ConfigError as error:
        raise click.UsageError(f"{error}; pass --address URL") from error
    assert certificates
    names = [name for name in certificates.by_name if not name.startswith("*.")]
    if listen.host in names or not names:
        return listen.local_address
    name = f"[{names[0]}]" if ":" in names[0] else names[0]
    return f"{name}:{listen.port}"


def _write_files(output_dir: Path, files: list[ClientFile]) -> None:
    paths = {output_dir / file.path: file for file in files}
    if existing := [str(path) for path in paths if path.exists()]:
        raise ProxyError(f"{existing[0]} exists; nothing was written")
    for path, file in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.file_text, encoding="utf-8")
        click.echo(path)
