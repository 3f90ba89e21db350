"""`pullcache config`: check the configuration, print it, or print its JSON Schema."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from proxy.cli.display.text import print_fields, print_table
from proxy.cli.groups import SummaryGroup
from proxy.cli.options import config_options, json_option, load_config
from proxy.config import (
    Config,
    Duration,
    UpstreamSettings,
    dump,
    json_schema,
    to_toml,
    world_readable_files,
)
from proxy.errors import ConfigError, DeniedError
from proxy.names import NameParser, policy_name
from proxy.oci.digest import Digest
from proxy.oci.reference import parse_image
from proxy.policy.rules import RuleSet
from proxy.repository_rules import NEVER, RepositoryRules
from proxy.upstream.auth.credentials import docker_server_name, helper_program, read_docker_config
from proxy.upstream.network.proxies import ProxySelector


@click.group(cls=SummaryGroup)
def config() -> None:
    """Check and print the configuration.

    \b
    Examples:
      pullcache config check
      pullcache config show
    """


@config.command()
@config_options
def check(*, path: Path | None, store: str | None) -> None:
    """Validate the configuration.

    Also reads the files it names, and looks for credential helpers. Exits 2 on errors.

    \b
    Examples:
      pullcache config check -c pullcache.toml
    """
    loaded = load_config(path, store)
    check_referenced_files(loaded)
    for file in world_readable_files(loaded):
        click.echo(f"{file}: contains a secret and is world-readable (chmod o-r {file})", err=True)
    click.echo("the configuration is valid")


@config.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of TOML.")
def show(*, path: Path | None, store: str | None, as_json: bool) -> None:
    """Print the effective configuration.

    Combines defaults, file, environment and options. Secrets are printed as "***".

    \b
    Examples:
      pullcache config show
    """
    loaded = load_config(path, store)
    click.echo(json.dumps(dump(loaded), indent=2) if as_json else to_toml(loaded), nl=as_json)


@config.command()
@config_options
def schema(*, path: Path | None, store: str | None) -> None:  # noqa: ARG001 - as every command
    """Print the JSON Schema of the configuration file.

    \b
    Examples:
      pullcache config schema > pullcache.schema.json
    """
    click.echo(json.dumps(json_schema(), indent=2))


@config.command()
@config_options
@click.argument("image")
@json_option
def explain(*, path: Path | None, store: str | None, image: str, as_json: bool) -> None:
    """Show what the configuration says about an image.

    For each key, the first of the [[rules]] that matches and sets it decides; FROM names it.

    \b
    Examples:
      pullcache config explain nginx:1.27
    """
    rows = list(_explain(load_config(path, store), image))
    if as_json:
        click.echo(
            json.dumps(
                [dict(zip(("key", "value", "from"), row, strict=True)) for row in rows], indent=2
            )
        )
        return
    # These two are as long as names and reasons are; the others fit into a table.
    print_fields(
        (key, f"{value} ({source})" if source and source not in value else value)
        for key, value, source in rows[:2]
    )
    click.echo()
    print_table(("KEY", "VALUE", "FROM"), rows[2:], flexible="VALUE")


def _explain(config: Config, image: str) -> Iterator[tuple[str, str, str]]:
    """Yield key, value and source of what applies to an image."""
    names, rules = NameParser(config.upstreams), RepositoryRules(config)
    repository, reference = names.to_repository(parse_image(image))
    name = policy_name(repository)
    settings = rules.settings(name)
    yield "repository", name, ""
    upstream = f'upstreams."{repository.upstream}"'
    try:
        names.check_allowed(repository)
    except DeniedError as error:
        yield "pulled", f"no: {error}", upstream
    else:
        yield "pulled", "yes", upstream
    if not isinstance(reference, Digest):
        ttl, source = rules.tag_ttl(name, reference)
        age = "never asked again" if ttl == NEVER else str(Duration(ttl))
        yield f"ttl of {reference}", age, source
    policy = RuleSet(config.policy).find(name)
    for key, value, default in (
        ("ttl", str(Duration(settings.ttl)), "manifests.ttl"),
        (
            "tag_ttl",
            ", ".join(f"{glob}: {ttl}" for glob, ttl in settings.tag_ttl.items()),
            "manifests.tag_ttl",
        ),
        ("immutable", ", ".join(settings.immutable), ""),
        ("prefetch", "layers" if settings.prefetches else "off", "fetch.prefetch"),
        (
            "max_idle",
            str(Duration(settings.max_idle)) if settings.max_idle else "never evicted",
            "store.max_idle",
        ),
        ("max_share", "" if settings.max_share is None else f"{settings.max_share:.0%}", ""),
    ):
        number = settings.sources[key]
        yield key, value or "none", f"rules[{number}].{key}" if number else default
    yield (
        "policy",
        policy.settings.mode if policy else "none",
        f"policy[{policy.number}]" if policy else "",
    )


def check_referenced_files(config: Config) -> None:
    """Read the files that the configuration names, or raise `ConfigError`."""
    from proxy.fleet.opening import check_fleet  # noqa: PLC0415 - imports redis
    from proxy.server.clients.access_control import check_files  # noqa: PLC0415 - imports aiohttp
    from proxy.tracing import check_tracing  # noqa: PLC0415 - imports aiohttp

    config.server.read_admin_tokens()
    check_tracing(is_on=config.server.tracing)
    check_files(config.server)
    check_fleet(config.fleet)
    for number, preload in enumerate(config.preload, 1):
        if preload.file:
            _check_readable(preload.file, f"preload[{number}].file")
    for name, upstream in config.upstreams.items():
        _check_credentials(upstream)
        ProxySelector(os.environ, upstream.proxy)
        if upstream.ca_file:
            _check_readable(upstream.ca_file, f'upstreams."{name}".ca_file')


def _check_readable(file: str, key: str) -> None:
    try:
        Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror} (see {key})") from error


def _check_credentials(upstream: UpstreamSettings) -> None:
    """Read the files with the credentials; look for the credential helper without running it."""
    upstream.read_password()
    helper = upstream.credential_helper
    if upstream.docker_config:
        found = read_docker_config(upstream.docker_config, docker_server_name(upstream.url))
        helper = found if isinstance(found, str) else ""
    if helper and shutil.which(helper_program(helper)) is None:
        raise ConfigError(f"{helper_program(helper)}: not found in PATH")
